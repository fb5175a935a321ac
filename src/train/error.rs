//! Why a training job did not end with trained weights.

use crate::model::ModelError;

use super::batches::BatchError;
use super::checkpoint::CheckpointError;
use super::device::DeviceError;

#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// It was asked to stop; a checkpoint of this step is written.
    #[error("interrupted after step {step}")]
    Interrupted { step: u64 },
    #[error("{term} is not finite at step {step}")]
    NotFinite { step: u64, term: String },
    #[error("the job {expected}, but its inputs {found}")]
    Inputs { expected: &'static str, found: &'static str },
    #[error("micro-batches need an encoder that does not normalise by its batch: {architecture} does")]
    MicroBatch { architecture: crate::model::Architecture },
    #[error("checkpoint of step {step} could not be kept: {source}")]
    SaveCheckpoint { step: u64, source: Box<dyn std::error::Error + Send + Sync> },
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    Batch(#[from] BatchError),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}
