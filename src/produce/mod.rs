//! `palimpsest produce`: images of a folder or a Parquet file into Kafka, as frames with capture times of choice.
//!
//! Owns the replay: which frame gets which time (`frames`), in which order and how fast they are sent, and the
//! punctuation at the end. Invariant: the same source and settings give the same records in the same order in
//! each partition, so a replay can be repeated and compared. A stream's frames share a partition. Nothing is
//! forgotten silently: every record is acknowledged or [`produce`] fails.

mod frames;
mod sender;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use rdkafka::error::KafkaError;
use tokio_util::sync::CancellationToken;

pub use frames::{Planned, plan};

use self::sender::Sender;
use crate::types::EventTime;

/// Where the images come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProduceSource {
    /// `DIR/LABEL/STREAM-NNNN.jpg` (or `.jpeg`, `.png`, `.webp`): the stream is `LABEL/STREAM`, `NNNN` the frame's
    /// place in it. A file without a number at its end belongs to the stream `LABEL`, in the order of names.
    Folder(PathBuf),
    /// A Parquet file: a segment of ours, or columns `image` (binary, or struct with `bytes`), and optionally
    /// `label` (text or integer), `stream_id` (default: the label, else the file's name) and `captured_at`.
    /// It is read into memory as a whole.
    Parquet(PathBuf),
}

/// When the frames are said to have been captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CaptureTimes {
    /// What the Parquet file says.
    Recorded,
    /// One frame after the other, taking the streams in turn.
    Every { start: EventTime, interval_ms: i64 },
    /// Each stream evenly over `[start, end)`, all streams at once.
    Spread { start: EventTime, end: EventTime },
}

/// Keeps the producer from running ahead of the consumer, for a broker that keeps only so much.
#[derive(Clone)]
pub struct Pacing {
    /// Bytes of one partition that may be sent and not yet consumed. A larger record still goes alone.
    pub max_ahead_bytes: u64,
    /// The consumer's position in a partition: the next offset that it will need.
    pub consumed: Arc<dyn Fn(i32) -> BoxFuture<'static, i64> + Send + Sync>,
}

/// What to send, and how.
#[derive(Clone)]
pub struct ProduceSettings {
    /// Settings of librdkafka: `bootstrap.servers` at least.
    pub properties: BTreeMap<String, String>,
    pub topic: String,
    pub source: ProduceSource,
    pub times: CaptureTimes,
    /// 0: as fast as it goes.
    pub frames_per_second: f64,
    /// Above 1, up to this many frames of a partition travel as one Arrow batch.
    pub rows_per_record: usize,
    /// Ends the replay with one punctuation in every partition: no earlier frame follows.
    pub watermark: Option<EventTime>,
    pub pacing: Option<Pacing>,
}

/// How far it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ProduceProgress {
    pub frames: u64,
    pub total_frames: u64,
    /// Encoded images alone.
    pub bytes: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum ProduceError {
    #[error("{path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path}: {source}")]
    Parquet { path: PathBuf, source: crate::store::segment::SegmentError },
    #[error("{path} holds no images ({expected})")]
    NoFrames { path: PathBuf, expected: &'static str },
    #[error("frame {index} of {path} has no capture time: choose times for the replay")]
    NoCaptureTime { path: PathBuf, index: usize },
    #[error("{path}: {what}")]
    BadRow { path: PathBuf, what: String },
    #[error("a batch could not be encoded: {0}")]
    Encode(#[from] arrow_schema::ArrowError),
    #[error("kafka: {0}")]
    Kafka(#[from] KafkaError),
}

/// Replays the source. `progress` is called after each frame was handed to the client. Stops early, without
/// the punctuation, when `cancel` is cancelled: then `frames` is below `total_frames`.
pub async fn produce(
    settings: ProduceSettings,
    mut progress: impl FnMut(ProduceProgress),
    cancel: CancellationToken,
) -> Result<ProduceProgress, ProduceError> {
    let (source, times) = (settings.source.clone(), settings.times);
    let planning = tokio::task::spawn_blocking(move || plan(&source, times));
    let planned = planning.await.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))?;
    let mut sender = Sender::new(&settings).await?;
    let mut done = ProduceProgress { total_frames: planned.len() as u64, ..ProduceProgress::default() };
    progress(done);
    let started = tokio::time::Instant::now();
    for frame in planned {
        if settings.frames_per_second > 0.0 {
            let due = Duration::from_secs_f64(done.frames as f64 / settings.frames_per_second);
            tokio::select! {
                () = tokio::time::sleep_until(started + due) => {}
                () = cancel.cancelled() => {}
            }
        }
        if cancel.is_cancelled() {
            sender.finish(None).await?;
            return Ok(done);
        }
        let bytes = sender.push(frame).await?;
        done.frames += 1;
        done.bytes += bytes;
        progress(done);
    }
    sender.finish(settings.watermark).await?;
    Ok(done)
}
