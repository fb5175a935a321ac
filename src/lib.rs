//! palimpsest keeps an image embedding up to date with a stream without forgetting.
pub mod eval;
pub mod model;
pub mod train;
pub mod types;
