//! Where a partition is read from, and what lies between two flushes.
//!
//! Owns: the decision at an assignment, and the bookkeeping of offsets as half-open intervals. Pure. Invariant:
//! the offsets of consecutive flushes join without gap or overlap; gaps *inside* (transaction markers,
//! compaction) are nobody's loss. Leaves to others: asking the registry and the broker.

use crate::types::OffsetRange;

/// Where a partition without a recorded position starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KafkaStart {
    Earliest,
    Latest,
}

/// What the broker holds of a partition: `[earliest, end)`, `end` being the last stable offset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    pub earliest: i64,
    pub end: i64,
}

/// What to do with a partition that was assigned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StartDecision {
    /// Read from here.
    Start { at: i64 },
    /// Retention was faster: record these offsets as lost, move the position to their end, read from there.
    Gap { lost: OffsetRange },
    /// The broker holds less than was read: another log than the recorded one. Stop until an operator acts.
    BeyondEnd { position: i64, end: i64 },
    /// Nobody has read it yet: record this start before the first read, then decide again.
    New { start: i64 },
}

pub fn decide_start(recorded: Option<i64>, bounds: Bounds, start: KafkaStart) -> StartDecision {
    let Some(position) = recorded else {
        let start = match start {
            KafkaStart::Earliest => bounds.earliest,
            KafkaStart::Latest => bounds.end,
        };
        return StartDecision::New { start };
    };
    if position < bounds.earliest {
        let lost = OffsetRange { start: position, end: bounds.earliest };
        return StartDecision::Gap { lost };
    }
    if position > bounds.end {
        return StartDecision::BeyondEnd { position, end: bounds.end };
    }
    StartDecision::Start { at: position }
}

/// How far a partition was read, and how much of that is durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    committed: i64,
    next: i64,
}

impl Progress {
    pub const fn starting_at(position: i64) -> Self {
        Self { committed: position, next: position }
    }

    /// Takes the record at `offset`; `false` if it was taken before.
    pub fn take(&mut self, offset: i64) -> bool {
        if offset < self.next {
            return false;
        }
        self.next = offset + 1;
        true
    }

    /// The next offset to be read.
    pub const fn next(&self) -> i64 {
        self.next
    }

    /// Everything before it is durable.
    pub const fn committed_offset(&self) -> i64 {
        self.committed
    }

    /// What a flush now covers; `None` if there is nothing to move over.
    pub fn unflushed(&self) -> Option<OffsetRange> {
        (self.next > self.committed).then_some(OffsetRange { start: self.committed, end: self.next })
    }

    /// The flush of [`Self::unflushed`] is durable.
    pub fn committed(&mut self) {
        self.committed = self.next;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_follows_its_truth_table() {
        use KafkaStart::{Earliest, Latest};
        use StartDecision::{BeyondEnd, Gap, New, Start};
        let lost = OffsetRange { start: 4, end: 10 };
        // (recorded, earliest, end, kafka.start, decision)
        let table = [
            (None, 10, 20, Earliest, New { start: 10 }),
            (None, 10, 20, Latest, New { start: 20 }),
            (None, 0, 0, Earliest, New { start: 0 }),
            (Some(10), 10, 20, Latest, Start { at: 10 }),
            (Some(15), 10, 20, Earliest, Start { at: 15 }),
            (Some(20), 10, 20, Earliest, Start { at: 20 }),
            (Some(0), 0, 0, Earliest, Start { at: 0 }),
            (Some(4), 10, 20, Latest, Gap { lost }),
            (Some(4), 10, 10, Earliest, Gap { lost }),
            (Some(21), 10, 20, Earliest, BeyondEnd { position: 21, end: 20 }),
            (Some(1), 0, 0, Earliest, BeyondEnd { position: 1, end: 0 }),
        ];
        for (recorded, earliest, end, start, expected) in table {
            let bounds = Bounds { earliest, end };
            assert_eq!(decide_start(recorded, bounds, start), expected, "{recorded:?} in {bounds:?}");
        }
    }

    #[test]
    fn flushes_join_over_gaps_and_repeats() {
        let mut progress = Progress::starting_at(5);
        assert_eq!(progress.unflushed(), None);
        assert!(progress.take(5));
        assert!(!progress.take(5), "a repeat is not taken");
        assert!(progress.take(9), "markers lie between");
        assert_eq!(progress.unflushed(), Some(OffsetRange { start: 5, end: 10 }));
        progress.committed();
        assert_eq!(progress.unflushed(), None);
        assert!(!progress.take(9));
        assert!(progress.take(10));
        assert_eq!(progress.unflushed(), Some(OffsetRange { start: 10, end: 11 }));
    }
}
