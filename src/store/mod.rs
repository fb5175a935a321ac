//! Objects: segments, probe sets, candidates, versions. A thin layer over `object_store`.
//!
//! Owns: which store a URL names, that a local write is durable (file and directory fsynced), that a write is
//! idempotent, that every request is timed. Leaves to others: what an object means (the registry says that).

pub mod paths;
