//! Where records come from: what the loop hears of the source, and what it tells it.
//!
//! The client library blocks and calls back, so it lives on a thread of its own (`kafka`) and talks to the loop
//! through two bounded channels. Invariants: the loop says where each partition starts, never the broker's
//! committed offsets; each start has an epoch that the loop draws, and every record carries the epoch it was
//! read under, so records from before a restart are told apart; a partition is given back only after the loop
//! has released it or the time for that is over.

pub mod kafka;
mod membership;

use std::fmt;

use rdkafka::error::KafkaError;
use tokio::sync::OwnedSemaphorePermit;

use super::frame::Record;

/// A partition by the names that Kafka knows.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    pub topic: String,
    pub partition: i32,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.topic, self.partition)
    }
}

/// What the source tells the loop, in the order in which it happened.
#[derive(Debug)]
pub enum SourceEvent {
    /// Each needs a [`SourceCommand::Start`] or [`SourceCommand::Hold`] before any of them is read.
    Assigned(Vec<Place>),
    /// Flush them and answer [`SourceCommand::Released`]; `lost`: somebody else may own them already.
    Revoked {
        places: Vec<Place>,
        lost: bool,
    },
    Record(Received),
    /// A partition of this number was at its end. The client does not say of which topic.
    End {
        partition: i32,
    },
    /// Some partition was asked for an offset that the broker does not hold.
    OutOfRange,
    /// Told for people and readiness; the client goes on by itself.
    Trouble(KafkaError),
    /// The client can't go on.
    Failed(KafkaError),
}

/// A record, and its share of the memory that records in flight may take.
#[derive(Debug)]
pub struct Received {
    pub record: Record,
    /// The start that it was read under.
    pub epoch: u64,
    /// Given back when the record is dropped or buffered.
    pub memory: Option<OwnedSemaphorePermit>,
}

/// What the loop tells the source.
#[derive(Debug)]
pub enum SourceCommand {
    /// Read the partition from `offset` on, whatever was read of it before.
    Start { place: Place, offset: i64, epoch: u64 },
    /// Keep the partition without reading it.
    Hold { place: Place },
    /// The loop has nothing of the revoked partitions in memory any more.
    Released,
    /// Tell the broker how far we are: for lag monitors alone.
    Commit { place: Place, offset: i64 },
    /// Leave the group and end.
    Close,
}
