//! From a closed period to a published version.
//!
//! ```text
//! open -> sealed -> training -> evaluating -> published | rejected | failed -> expired        open -> merged
//! ```
//!
//! [`decide`] says what to do next (pure), [`session`] does it as long as [`controller`] holds the learner's lease, [`job`] writes down
//! what a training process needs, [`child`] runs that process and [`worker`] is what runs inside it;
//! [`release`] turns its candidate into a version, [`sweep`] deletes what no record speaks of any more.

pub mod child;
pub mod controller;
pub mod decide;
pub mod history;
pub mod job;
pub mod release;
pub mod report;
mod session;
pub mod sweep;
pub mod worker;
