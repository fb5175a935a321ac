//! What the brokers hold, asked again and again beside the loop.
//!
//! Owns one task that lists the topics' partitions and asks where the partitions of this process end. Invariant:
//! each end carries the time from *before* its question, so nothing that came later is vouched for. The channel
//! holds one report: a loop that is busy gets the next one later, never an old one.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use futures::{StreamExt, stream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;

use super::Clock;
use super::position::Bounds;
use super::source::Place;
use super::source::kafka::KafkaProbe;
use crate::types::EventTime;

/// Questions under way at a time: each holds one blocking thread for a round trip.
const CONCURRENT_QUESTIONS: usize = 8;

/// What one round of questions brought.
#[derive(Debug, Default)]
pub struct ProbeReport {
    /// The partitions of this process, and when each was asked for.
    pub bounds: Vec<(Place, Bounds, EventTime)>,
    /// All partitions of the topics, when they were listed in this round.
    pub partitions: BTreeMap<String, BTreeSet<i32>>,
    /// The last question that was not answered.
    pub trouble: Option<String>,
}

/// Asks in a rhythm.
pub struct Prober {
    pub probe: KafkaProbe,
    pub topics: Vec<String>,
    pub interval: Duration,
    pub metadata_interval: Duration,
    pub clock: Clock,
    /// What this process reads now.
    pub places: watch::Receiver<Vec<Place>>,
}

impl Prober {
    /// The task ends when the receiver is dropped.
    pub fn spawn(self) -> (mpsc::Receiver<ProbeReport>, JoinHandle<()>) {
        let (reports_in, reports) = mpsc::channel(1);
        (reports, tokio::spawn(self.work(reports_in)))
    }

    async fn work(self, reports: mpsc::Sender<ProbeReport>) {
        let mut ticks = tokio::time::interval(self.interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut listed: Option<tokio::time::Instant> = None;
        loop {
            ticks.tick().await;
            let Ok(slot) = reports.reserve().await else { return };
            let mut report = ProbeReport::default();
            if listed.is_none_or(|at| at.elapsed() >= self.metadata_interval) {
                self.list(&mut report).await;
                listed = Some(tokio::time::Instant::now());
            }
            self.ask_bounds(&mut report).await;
            slot.send(report);
        }
    }

    async fn list(&self, report: &mut ProbeReport) {
        for topic in &self.topics {
            match self.probe.partitions(topic).await {
                Ok(partitions) => {
                    report.partitions.insert(topic.clone(), partitions);
                }
                Err(error) => report.trouble = Some(format!("topic {topic}: {error}")),
            }
        }
    }

    async fn ask_bounds(&self, report: &mut ProbeReport) {
        let places = self.places.borrow().clone();
        let questions = places.into_iter().map(|place| async {
            let asked_at = (self.clock)();
            let bounds = self.probe.bounds(&place).await;
            (place, bounds, asked_at)
        });
        let mut answers = stream::iter(questions).buffer_unordered(CONCURRENT_QUESTIONS);
        while let Some((place, bounds, asked_at)) = answers.next().await {
            match bounds {
                Ok(bounds) => report.bounds.push((place, bounds, asked_at)),
                Err(error) => report.trouble = Some(format!("{place}: {error}")),
            }
        }
    }
}
