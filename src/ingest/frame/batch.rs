//! A batch record: an Arrow IPC stream with one row a frame.
//!
//! Owns: reading the stream and its columns. Invariant: the whole stream is read before any row is taken, so a
//! stream that breaks gives no frames. The push decoder is used because it never allocates what a broken
//! length field claims.

use arrow_array::{ArrayRef, RecordBatch, UInt8Array};
use arrow_ipc::reader::StreamDecoder;
use arrow_schema::ArrowError;
use bytes::Bytes;

use super::{CAPTURED_AT, Context, Decoded, FRAME, Fields, LABEL, Reject, RejectReason, STREAM_ID};
use crate::ingest::columns::{
    WrongType, binary_at, column, instant_at, is_binary, is_instant, is_text, text_at,
};

pub(super) fn decode(context: &Context<'_>, value: &Bytes) -> Result<Decoded, Reject> {
    let batches =
        read(value).map_err(|error| Reject::record(RejectReason::BrokenArrowStream, error.to_string()))?;
    let rows: usize = batches.iter().map(RecordBatch::num_rows).sum();
    let max = context.limits.max_rows;
    if rows > max {
        return Err(Reject::record(
            RejectReason::TooManyRows,
            format!("the batch has {rows} rows, more than {max}"),
        ));
    }
    let mut decoded = Decoded::default();
    let mut row = 0;
    for batch in &batches {
        let columns = Columns::of(batch)?;
        for index in 0..batch.num_rows() {
            match columns.frame(context, index, row) {
                Ok(frame) => decoded.frames.push(frame),
                Err(reject) => decoded.rejects.push(reject.at_row(row)),
            }
            row += 1;
        }
    }
    if row == 0 {
        return Err(Reject::record(RejectReason::EmptyValue, "the batch has no rows"));
    }
    Ok(decoded)
}

fn read(value: &Bytes) -> Result<Vec<RecordBatch>, ArrowError> {
    let mut buffer = UInt8Array::from(value.to_vec()).into_parts().1.into_inner();
    let mut decoder = StreamDecoder::new();
    let mut batches = Vec::new();
    while !buffer.is_empty() {
        let Some(batch) = decoder.decode(&mut buffer)? else {
            break;
        };
        batches.push(batch);
    }
    decoder.finish()?;
    if decoder.schema().is_none() {
        return Err(ArrowError::IpcError("the stream has no schema".into()));
    }
    Ok(batches)
}

/// The columns of one batch, their types checked.
struct Columns {
    frame: ArrayRef,
    stream_id: Option<ArrayRef>,
    captured_at: Option<ArrayRef>,
    label: Option<ArrayRef>,
}

impl Columns {
    fn of(batch: &RecordBatch) -> Result<Self, Reject> {
        let frame = column(batch, FRAME, is_binary)?
            .ok_or_else(|| Reject::record(RejectReason::BadColumn, "the batch has no column frame"))?;
        Ok(Self {
            frame,
            stream_id: column(batch, STREAM_ID, is_text)?,
            captured_at: column(batch, CAPTURED_AT, is_instant)?,
            label: column(batch, LABEL, is_text)?,
        })
    }

    fn frame(&self, context: &Context<'_>, index: usize, row: u32) -> Result<super::Frame, Reject> {
        context.frame(Fields {
            row,
            stream_id: self.stream_id.as_ref().and_then(|c| text_at(c, index)),
            captured_at: self.captured_at.as_ref().and_then(|c| instant_at(c, index)),
            label: self.label.as_ref().and_then(|c| text_at(c, index)),
            image: binary_at(&self.frame, index),
            format: None,
        })
    }
}

impl From<WrongType> for Reject {
    fn from(error: WrongType) -> Self {
        Self::record(RejectReason::BadColumn, error.to_string())
    }
}
