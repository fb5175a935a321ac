//! The forgetting benchmark: methods and seeds on a stream of labelled periods, and what each of them forgets.
//!
//! A *run* is a method with a seed: it learns the stream's periods one after the other, as the daemon would, and after each
//! of them is asked what it still knows of those before. Learner, losses, augmentation and measures are the daemon's own
//! ([`crate::train`], [`crate::eval`]); here is only what the daemon has no use for: labelled [`stream`]s on disk, methods
//! that keep old frames ([`method`]), the comparison over seeds ([`statistics`], [`report`], [`plot`]).
//!
//! Invariant: a version is a function of the stream's bytes, the recipe and the frames that it learns from, and is kept
//! under the hash of all three ([`versions`]). So a benchmark that was killed goes on where it was, and runs that begin
//! alike share what they have in common. Nothing here prints: progress goes to a callback.

pub mod label_free;
pub mod measure;
pub mod method;
pub mod plot;
pub mod report;
pub mod results;
pub mod run;
pub mod statistics;
pub mod stream;
pub mod versions;

use std::path::PathBuf;

use crate::train::TrainError;

#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    #[error(transparent)]
    Stream(#[from] stream::StreamError),
    #[error("{what} {path}: {source}")]
    File { what: &'static str, path: PathBuf, source: std::io::Error },
    #[error("{path} is no results file of this program: {reason}")]
    Results { path: PathBuf, reason: String },
    #[error("another benchmark writes to {path}: choose another --out, or wait for its end")]
    InUse { path: PathBuf },
    /// Mixing them would compare what can't be compared.
    #[error("{path} holds results of another {what}: choose another --out, or remove it")]
    OtherResults { path: PathBuf, what: &'static str },
    #[error("{method}, seed {seed}, {period}: {frame}{source}")]
    Train { method: String, seed: u64, period: String, frame: String, source: Box<TrainError> },
    #[error("a run's threads could not be started: {0}")]
    Threads(#[from] rayon::ThreadPoolBuildError),
    #[error("stopped; the same command goes on from here")]
    Stopped,
    #[error("the picture can't be drawn: {0}")]
    Plot(String),
}

fn file_error(what: &'static str, path: &std::path::Path) -> impl FnOnce(std::io::Error) -> BenchError {
    move |source| BenchError::File { what, path: path.to_owned(), source }
}
