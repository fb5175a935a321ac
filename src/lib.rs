//! palimpsest keeps an image embedding up to date with a stream without forgetting.
pub mod config;
pub mod failpoint;
pub mod metrics;
pub mod registry;
pub mod store;
pub mod types;
