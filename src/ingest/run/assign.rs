//! Partitions that come and go.
//!
//! Owns: carrying out the decision of where a partition is read from, and giving one back. Invariant: a
//! partition's memory is empty when its reading begins, and gone before it is given back.

use std::time::Duration;

use super::{Ingest, Part, persist};
use crate::ingest::IngestError;
use crate::ingest::partition::Partition;
use crate::ingest::position::{StartDecision, decide_start};
use crate::ingest::source::{Place, SourceCommand};
use crate::metrics::{INGEST_LAG, INGEST_LOST, INGEST_PARTITIONS};
use crate::registry::{Flush, PositionRecord, RegistryError};
use crate::types::{OffsetRange, TopicPartition};

/// What begins to be read, or doesn't.
enum Begin {
    Read(PositionRecord, i64),
    Stop { position: i64, end: i64 },
}

impl Ingest {
    /// Reads a partition from where the registry says, whatever was in memory of it: that is dropped.
    pub(super) async fn begin(&mut self, place: &Place) -> Result<(), IngestError> {
        self.partitions.remove(place);
        self.stopped.remove(place);
        let Some(topic_id) = self.topics.get(&place.topic) else {
            tracing::warn!(%place, "assigned a topic that was not asked for; it is not read");
            return self.tell(SourceCommand::Hold { place: place.clone() }).await;
        };
        let id = TopicPartition {
            topic: place.topic.clone(),
            topic_id: topic_id.clone(),
            partition: place.partition,
        };
        match self.decide(place, &id).await? {
            Begin::Read(record, position) => {
                self.last_epoch += 1;
                let epoch = self.last_epoch;
                let partition = Partition::new(record, position, epoch, (self.clock)());
                self.partitions.insert(place.clone(), partition);
                tracing::info!(%place, position, "reading");
                self.tell(SourceCommand::Start { place: place.clone(), offset: position, epoch }).await?;
            }
            Begin::Stop { position, end } => {
                tracing::error!(
                    %place, position, end,
                    "the broker holds less than was read: the partition stands still until `positions reset`"
                );
                self.stopped.insert(place.clone(), id);
                self.tell(SourceCommand::Hold { place: place.clone() }).await?;
            }
        }
        self.show_assignment();
        Ok(())
    }

    /// Asks registry and broker until there is a start.
    async fn decide(&self, place: &Place, id: &TopicPartition) -> Result<Begin, IngestError> {
        loop {
            let bounds = persist(&self.status, Part::Kafka, || self.probe.bounds(place)).await?;
            let recorded = persist(&self.status, Part::Registry, || self.registry.position(id)).await?;
            let Some(record) = recorded else {
                self.register(std::slice::from_ref(id)).await?;
                continue;
            };
            match decide_start(record.position, bounds, self.settings.kafka.start) {
                StartDecision::Start { at } => return Ok(Begin::Read(record, at)),
                StartDecision::BeyondEnd { position, end } => return Ok(Begin::Stop { position, end }),
                StartDecision::New { start } => {
                    let record_start = || self.registry.start_position(id, start);
                    persist(&self.status, Part::Registry, record_start).await?;
                }
                StartDecision::Gap { lost } => self.record_lost(id, lost).await?,
            }
        }
    }

    pub(super) async fn register(&self, partitions: &[TopicPartition]) -> Result<(), IngestError> {
        let register = || self.registry.register_partitions(partitions);
        Ok(persist(&self.status, Part::Registry, register).await?)
    }

    /// Moves the position over offsets that retention removed.
    async fn record_lost(&self, id: &TopicPartition, lost: OffsetRange) -> Result<(), IngestError> {
        let flush = Flush {
            partition: id.clone(),
            offsets: lost,
            watermark: None,
            segments: Vec::new(),
            periods: Vec::new(),
            lost: Some(lost),
        };
        match persist(&self.status, Part::Registry, || self.registry.commit_flush(&flush)).await {
            Ok(()) => {
                let records = lost.end - lost.start;
                metrics::counter!(INGEST_LOST).increment(records.unsigned_abs());
                tracing::error!(partition = %id, %lost, "retention removed records before they were read");
                Ok(())
            }
            // Another consumer has recorded it, or read on.
            Err(RegistryError::PositionMoved { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// An offset was out of range, and the client does not say of which partition.
    pub(super) async fn begin_all_again(&mut self) -> Result<(), IngestError> {
        let places: Vec<Place> = self.partitions.keys().cloned().collect();
        for place in places {
            self.write(&place).await?;
            self.begin(&place).await?;
        }
        Ok(())
    }

    /// Flushes partitions and gives them back; those that somebody else may own already are dropped.
    pub(super) async fn release(&mut self, places: Vec<Place>, lost: bool) -> Result<(), IngestError> {
        let limit = Duration::from_millis(self.settings.drain_timeout_ms);
        if !lost {
            let written = tokio::time::timeout(limit, async {
                for place in &places {
                    self.write(place).await?;
                }
                Ok::<(), IngestError>(())
            });
            match written.await {
                Ok(result) => result?,
                Err(_) => {
                    tracing::warn!("revoked before everything was flushed; the next owner reads it again")
                }
            }
        }
        for place in &places {
            self.partitions.remove(place);
            self.stopped.remove(place);
            let labels = [("topic", place.topic.clone()), ("partition", place.partition.to_string())];
            metrics::gauge!(INGEST_LAG, &labels).set(f64::NAN);
        }
        tracing::info!(partitions = places.len(), lost, "released");
        self.show_assignment();
        self.tell(SourceCommand::Released).await
    }

    fn show_assignment(&self) {
        let (reading, stopped) = (self.partitions.len(), self.stopped.len());
        metrics::gauge!(INGEST_PARTITIONS, "state" => "assigned").set((reading + stopped) as f64);
        metrics::gauge!(INGEST_PARTITIONS, "state" => "stopped").set(stopped as f64);
        self.status.set_assigned(reading + stopped);
        let places = self.partitions.keys().chain(self.stopped.keys()).cloned().collect();
        self.places.send_replace(places);
    }
}
