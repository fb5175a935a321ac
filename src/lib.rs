//! palimpsest keeps an image embedding up to date with a stream without forgetting.
pub mod eval;
pub mod failpoint;
pub mod metrics;
pub mod model;
pub mod publish;
pub mod registry;
pub mod store;
pub mod types;
