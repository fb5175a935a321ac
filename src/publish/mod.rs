//! What a version looks like to those who pull it: its files, their manifest, its card, and pictures for people.
//!
//! Everything here but [`copy`] is a pure function of plain values: the learner, which knows the evaluation and the
//! gate, fills them in. That a version is published is the registry's to say, not a file's.

pub mod card;
pub mod copy;
pub mod embeddings;
pub mod encoder_config;
pub mod manifest;
pub mod plot;
pub mod table;

/// Names of a version's files, relative to its prefix.
pub mod file {
    pub const ENCODER: &str = "encoder.safetensors";
    pub const PROJECTOR: &str = "projector.safetensors";
    pub const CONFIG: &str = "config.json";
    pub const MANIFEST: &str = "manifest.json";
    pub const CARD: &str = "README.md";
}
