//! One Kafka record -> frames, a punctuation, or the reasons why it is neither.
//!
//! Owns: what a record may look like (content types, headers, columns) and every limit on it. Invariant:
//! whatever the bytes are, [`decode`] returns; each frame that it lets through is an image that decodes
//! entirely, so no later stage meets a broken one. A record that is broken as a whole gives no frame at all,
//! a broken row of a batch costs that row alone. Pure: no clock, no I/O. Leaves to others: which period a
//! frame belongs to (`window`), where rejects go (`dead_letter`).
//!
//! Every image is decoded once here, bounded by the pixel limit that is checked on its header before. That
//! costs a few milliseconds a frame and buys that a training attempt can't fail on a frame days later, when
//! its producer has forgotten it.

mod batch;
mod image;
#[cfg(test)]
mod tests;

use std::panic::AssertUnwindSafe;

use ::image::ImageFormat;
use bytes::Bytes;
use serde::Deserialize;

use crate::types::EventTime;

/// Header that says what a record's value is.
pub const CONTENT_TYPE: &str = "content-type";
/// Header or column: the stream (camera, channel) that a frame comes from. Default: the record's key.
pub const STREAM_ID: &str = "stream_id";
/// Header or column: when the frame was captured, ms since 1970 UTC. Default: the record's timestamp.
pub const CAPTURED_AT: &str = "captured_at";
/// Header or column, optional: a category, for evaluation only.
pub const LABEL: &str = "label";
/// Column: the encoded image.
pub const FRAME: &str = "frame";
/// A batch: an Arrow IPC stream with one row a frame.
pub const ARROW_STREAM: &str = "application/vnd.apache.arrow.stream";
/// A punctuation: `{"watermark": "2026-01-31T00:00:00Z"}` says that no earlier frame follows in this partition.
pub const WATERMARK_JSON: &str = "application/vnd.palimpsest.watermark+json";

/// A longer `stream_id` or `label` is a mistake of its producer; they are repeated in each row and each index.
const MAX_TEXT_BYTES: usize = 1024;

/// What a record may be at most.
#[derive(Debug, Clone)]
pub struct FrameLimits {
    /// A larger record is dead-lettered without its value being read.
    pub max_record_bytes: usize,
    /// Rows of one Arrow batch record.
    pub max_rows: usize,
    /// One encoded image.
    pub max_frame_bytes: usize,
    /// Width x height of one image, as its header states them.
    pub max_pixels: u64,
    /// Frames from before are dead-lettered: a clock that was never set says 1970.
    pub earliest_captured_at: EventTime,
    /// A frame further ahead of the wall clock is dead-lettered.
    pub max_ahead_ms: i64,
}

impl Default for FrameLimits {
    fn default() -> Self {
        Self {
            max_record_bytes: 16 << 20,
            max_rows: 4096,
            max_frame_bytes: 8 << 20,
            max_pixels: 33_554_432,
            earliest_captured_at: EventTime(946_684_800_000),
            max_ahead_ms: 300_000,
        }
    }
}

/// A record as it came from Kafka, detached from the client.
#[derive(Debug, Clone)]
pub struct Record {
    pub topic: String,
    pub partition: i32,
    pub offset: i64,
    pub key: Option<Bytes>,
    pub timestamp: Option<EventTime>,
    pub headers: Vec<(String, Bytes)>,
    pub value: Value,
}

/// A record's value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// Null or no bytes.
    Empty,
    Bytes(Bytes),
    /// Above `max_record_bytes`: not copied out of the client.
    Oversized {
        bytes: usize,
    },
}

impl Record {
    fn header(&self, name: &str) -> Option<&[u8]> {
        self.headers
            .iter()
            .rev()
            .find(|(key, _)| key.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.as_ref())
    }
}

/// One frame that is fit to be stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    pub offset: i64,
    /// Row in the record; 0 where a record is one image.
    pub row: u32,
    pub stream_id: String,
    pub captured_at: EventTime,
    pub label: Option<String>,
    /// The encoded image.
    pub image: Bytes,
}

/// Why a record or a row of it was not taken. The text form stands in the dead letter's headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RejectReason {
    EmptyValue,
    RecordTooLarge,
    MissingContentType,
    UnknownContentType,
    BadHeader,
    MissingStreamId,
    MissingCapturedAt,
    CapturedTooEarly,
    CapturedAhead,
    FrameTooLarge,
    TooManyPixels,
    UndecodableImage,
    BrokenArrowStream,
    BadColumn,
    TooManyRows,
    BadPunctuation,
    /// A decoder panicked on it: a fault of ours or of a library, but the stream goes on.
    DecoderPanicked,
}

impl RejectReason {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::EmptyValue => "empty_value",
            Self::RecordTooLarge => "record_too_large",
            Self::MissingContentType => "missing_content_type",
            Self::UnknownContentType => "unknown_content_type",
            Self::BadHeader => "bad_header",
            Self::MissingStreamId => "missing_stream_id",
            Self::MissingCapturedAt => "missing_captured_at",
            Self::CapturedTooEarly => "captured_too_early",
            Self::CapturedAhead => "captured_ahead_of_clock",
            Self::FrameTooLarge => "frame_too_large",
            Self::TooManyPixels => "too_many_pixels",
            Self::UndecodableImage => "undecodable_image",
            Self::BrokenArrowStream => "broken_arrow_stream",
            Self::BadColumn => "bad_column",
            Self::TooManyRows => "too_many_rows",
            Self::BadPunctuation => "bad_punctuation",
            Self::DecoderPanicked => "decoder_panicked",
        }
    }
}

/// A record (`row` is `None`) or a row of a batch that was not taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reject {
    pub reason: RejectReason,
    pub row: Option<u32>,
    pub detail: String,
}

impl Reject {
    fn record(reason: RejectReason, detail: impl Into<String>) -> Self {
        Self { reason, row: None, detail: detail.into() }
    }

    fn at_row(self, row: u32) -> Self {
        Self { row: Some(row), ..self }
    }
}

/// What one record holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Decoded {
    pub frames: Vec<Frame>,
    /// What a punctuation states.
    pub watermark: Option<EventTime>,
    pub rejects: Vec<Reject>,
}

/// Decodes a record; `now` is the wall clock, for the limit on frames from the future. Never fails and never
/// panics: what can't be taken is in `rejects`.
pub fn decode(record: &Record, limits: &FrameLimits, now: EventTime) -> Decoded {
    let decoded = std::panic::catch_unwind(AssertUnwindSafe(|| decode_value(record, limits, now)));
    let outcome = decoded.unwrap_or_else(|_| {
        Err(Reject::record(RejectReason::DecoderPanicked, "a decoder panicked on this record"))
    });
    outcome.unwrap_or_else(|reject| Decoded { rejects: vec![reject], ..Decoded::default() })
}

fn decode_value(record: &Record, limits: &FrameLimits, now: EventTime) -> Result<Decoded, Reject> {
    let value = match &record.value {
        Value::Bytes(bytes) if !bytes.is_empty() => bytes,
        Value::Bytes(_) | Value::Empty => {
            return Err(Reject::record(RejectReason::EmptyValue, "the value is empty"));
        }
        Value::Oversized { bytes } => return Err(too_large(*bytes, limits)),
    };
    if value.len() > limits.max_record_bytes {
        return Err(too_large(value.len(), limits));
    }
    let content_type = text_header(record, CONTENT_TYPE)?
        .ok_or_else(|| Reject::record(RejectReason::MissingContentType, "no content-type header"))?;
    let context = Context { record, limits, now };
    // Parameters such as `; charset=utf-8` say nothing that we need.
    let media_type = content_type.split(';').next().unwrap_or_default().trim();
    match media_type.to_ascii_lowercase().as_str() {
        "image/jpeg" => single(&context, value, ImageFormat::Jpeg),
        "image/png" => single(&context, value, ImageFormat::Png),
        "image/webp" => single(&context, value, ImageFormat::WebP),
        ARROW_STREAM => batch::decode(&context, value),
        WATERMARK_JSON => punctuation(&context, value),
        _ => Err(Reject::record(RejectReason::UnknownContentType, format!("content-type {content_type:?}"))),
    }
}

fn too_large(bytes: usize, limits: &FrameLimits) -> Reject {
    let max = limits.max_record_bytes;
    Reject::record(RejectReason::RecordTooLarge, format!("the value has {bytes} bytes, more than {max}"))
}

/// What the checks of one record need.
struct Context<'a> {
    record: &'a Record,
    limits: &'a FrameLimits,
    now: EventTime,
}

/// The fields of a frame before they are checked; `None` takes the record's default.
struct Fields {
    row: u32,
    stream_id: Option<String>,
    captured_at: Option<EventTime>,
    label: Option<String>,
    image: Bytes,
    /// `None`: told from the first bytes.
    format: Option<ImageFormat>,
}

impl Context<'_> {
    /// Fills in the record's defaults and checks every limit of one frame.
    fn frame(&self, fields: Fields) -> Result<Frame, Reject> {
        let stream_id = match fields.stream_id {
            Some(stream_id) => stream_id,
            None => self.key()?,
        };
        bounded_text(STREAM_ID, &stream_id)?;
        if let Some(label) = &fields.label {
            bounded_text(LABEL, label)?;
        }
        let captured_at = fields.captured_at.or(self.record.timestamp).ok_or_else(|| {
            Reject::record(RejectReason::MissingCapturedAt, "neither captured_at nor a record timestamp")
        })?;
        self.check_instant(captured_at)?;
        image::check(&fields.image, fields.format, self.limits)?;
        Ok(Frame {
            offset: self.record.offset,
            row: fields.row,
            stream_id,
            captured_at,
            label: fields.label,
            image: fields.image,
        })
    }

    fn key(&self) -> Result<String, Reject> {
        let missing = |detail: &str| Reject::record(RejectReason::MissingStreamId, detail);
        let key = self.record.key.as_ref().filter(|key| !key.is_empty());
        let key = key.ok_or_else(|| missing("neither stream_id nor a record key"))?;
        String::from_utf8(key.to_vec()).map_err(|_| missing("the record key is not UTF-8"))
    }

    fn check_instant(&self, at: EventTime) -> Result<(), Reject> {
        let earliest = self.limits.earliest_captured_at;
        if at < earliest {
            return Err(Reject::record(RejectReason::CapturedTooEarly, format!("{at} is before {earliest}")));
        }
        let latest = self.now.plus_ms(self.limits.max_ahead_ms);
        if at > latest {
            return Err(Reject::record(RejectReason::CapturedAhead, format!("{at} is after {latest}")));
        }
        Ok(())
    }
}

/// A record that is one image, described by its headers.
fn single(context: &Context<'_>, value: &Bytes, format: ImageFormat) -> Result<Decoded, Reject> {
    let record = context.record;
    let captured_at = match text_header(record, CAPTURED_AT)? {
        None => None,
        Some(text) => Some(EventTime(text.trim().parse::<i64>().map_err(|_| {
            Reject::record(
                RejectReason::BadHeader,
                format!("captured_at {text:?} is not a number of milliseconds since 1970"),
            )
        })?)),
    };
    let frame = context.frame(Fields {
        row: 0,
        stream_id: text_header(record, STREAM_ID)?.map(str::to_owned),
        captured_at,
        label: text_header(record, LABEL)?.map(str::to_owned),
        image: value.clone(),
        format: Some(format),
    })?;
    Ok(Decoded { frames: vec![frame], ..Decoded::default() })
}

#[derive(Deserialize)]
struct Punctuation {
    watermark: String,
}

/// The value of a punctuation record.
pub fn punctuation_value(watermark: EventTime) -> String {
    serde_json::json!({ "watermark": watermark.to_string() }).to_string()
}

fn punctuation(context: &Context<'_>, value: &[u8]) -> Result<Decoded, Reject> {
    let bad = |detail: String| Reject::record(RejectReason::BadPunctuation, detail);
    let parsed: Punctuation = serde_json::from_slice(value).map_err(|error| bad(error.to_string()))?;
    let watermark =
        parsed.watermark.parse().map_err(|error: crate::types::ParseError| bad(error.to_string()))?;
    context.check_instant(watermark)?;
    Ok(Decoded { watermark: Some(watermark), ..Decoded::default() })
}

fn text_header<'a>(record: &'a Record, name: &str) -> Result<Option<&'a str>, Reject> {
    let Some(value) = record.header(name) else {
        return Ok(None);
    };
    std::str::from_utf8(value)
        .map(Some)
        .map_err(|_| Reject::record(RejectReason::BadHeader, format!("header {name} is not UTF-8")))
}

fn bounded_text(name: &str, text: &str) -> Result<(), Reject> {
    if !text.is_empty() && text.len() <= MAX_TEXT_BYTES {
        return Ok(());
    }
    let length = text.len();
    Err(Reject::record(
        RejectReason::BadHeader,
        format!("{name} has {length} bytes, not 1 to {MAX_TEXT_BYTES}"),
    ))
}
