//! What ingest is waiting for, for readiness and people.
//!
//! Owns one shared note per part that can be down. Ingest never gives up on a part that may come back: it
//! waits, says so here and in the metrics, and goes on by itself.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// What ingest depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    Kafka,
    DeadLetters,
    Store,
    Registry,
    /// The frames waiting to be trained on fill their bound.
    Learner,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kafka => "kafka",
            Self::DeadLetters => "dead letters",
            Self::Store => "store",
            Self::Registry => "registry",
            Self::Learner => "learner",
        })
    }
}

/// Shared between ingest and whoever answers for readiness; clones show the same.
#[derive(Debug, Clone)]
pub struct IngestStatus {
    troubles: Arc<Mutex<BTreeMap<Part, String>>>,
    assigned: Arc<AtomicUsize>,
}

impl Default for IngestStatus {
    /// Not ready: Kafka counts as down until it has answered once.
    fn default() -> Self {
        let status = Self { troubles: Arc::default(), assigned: Arc::default() };
        status.down(Part::Kafka, &"not joined yet");
        status
    }
}

impl IngestStatus {
    /// `None` while all is well, else what is waited for, as "store: ...; registry: ...".
    pub fn trouble(&self) -> Option<String> {
        let troubles = self.troubles();
        let texts: Vec<String> = troubles.iter().map(|(part, text)| format!("{part}: {text}")).collect();
        (!texts.is_empty()).then(|| texts.join("; "))
    }

    /// How many partitions this process reads.
    pub fn assigned(&self) -> usize {
        self.assigned.load(Ordering::Relaxed)
    }

    pub(super) fn set_assigned(&self, partitions: usize) {
        self.assigned.store(partitions, Ordering::Relaxed);
    }

    pub(super) fn down(&self, part: Part, why: &dyn fmt::Display) {
        self.troubles().insert(part, why.to_string());
    }

    pub(super) fn up(&self, part: Part) {
        self.troubles().remove(&part);
    }

    fn troubles(&self) -> std::sync::MutexGuard<'_, BTreeMap<Part, String>> {
        self.troubles.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kafka_counts_as_down_until_it_has_answered() {
        let status = IngestStatus::default();
        assert_eq!(status.trouble().as_deref(), Some("kafka: not joined yet"));
        status.clone().up(Part::Kafka);
        assert_eq!(status.trouble(), None);
    }
}
