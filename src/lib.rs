//! palimpsest keeps an image embedding up to date with a stream without forgetting.
//!
//! A frame's way: [`ingest`] reads records from Kafka and writes segments to the [`store`], the [`registry`]
//! says what was read. A period's way: [`period`] closes it, [`train`] teaches a [`model`] in a child process,
//! [`eval`] measures, [`publish`] describes the version, [`serve`] hands it out. ARCHITECTURE.md draws both. [`bench`]
//! measures what methods forget.

pub mod app;
pub mod bench;
pub mod cli;
pub mod config;
pub mod demo;
pub mod eval;
pub mod failpoint;
pub mod ingest;
pub mod logging;
pub mod metrics;
pub mod model;
pub mod period;
pub mod produce;
pub mod publish;
pub mod registry;
pub mod serve;
pub mod store;
pub mod supervisor;
pub mod train;
pub mod types;
mod widest;

/// Of this program, as `--version` prints it.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
