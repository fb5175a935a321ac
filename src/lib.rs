//! palimpsest keeps an image embedding up to date with a stream without forgetting.
pub mod failpoint;
pub mod ingest;
pub mod metrics;
pub mod produce;
pub mod registry;
pub mod store;
pub mod types;
