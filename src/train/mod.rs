//! Training: from a period's frames and a teacher to a student, as the job file says.
//!
//! The way through: [`frames`] holds what there is, [`split`] divides it, [`likeness`] leaves out what was seen before, [`batches`]
//! draws and augments it on other threads, [`learner`] takes the steps, [`job`] is the loop around them. Everything random is keyed
//! ([`rng`]); everything else that a resume needs is in a [`checkpoint`]. Nothing here knows Kafka, the registry
//! or the object store: bytes come in, bytes go out, progress goes to a [`job::JobIo`].
//!
//! To add a loss: a function in [`loss`], a variant of [`spec::Method`], an arm in [`learner`], a golden test.

pub mod augment;
pub mod batches;
pub mod checkpoint;
pub mod device;
pub mod embed;
mod error;
pub mod frames;
pub mod job;
pub mod learner;
pub mod likeness;
pub mod loss;
pub mod network;
pub mod optim;
pub mod rng;
pub mod runtime;
pub mod schedule;
pub mod spec;
pub mod split;

#[cfg(test)]
pub(crate) mod fixtures;

pub use error::TrainError;
