//! The loop: events of the source in, flushes out.
//!
//! Owns which partitions are read and in what order things happen to them. One partition's records are taken in
//! order; a flush happens inside the loop, so nothing of that partition moves meanwhile, and while it waits for
//! something that is down the source pauses by itself. Memory is bounded by `FlushPolicy::max_total_bytes` plus
//! `KafkaSettings::max_in_flight_bytes`, plus what one flush encodes.
//! Leaves to others: rebalances' mechanics (`source`), durable steps (`flush`), rules (`window`, `position`).

mod assign;
mod report;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use rayon::prelude::*;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::dead_letter::DeadLetters;
use super::flush::{Flushed, Flusher};
use super::frame::{Decoded, Record, decode};
use super::partition::Partition;
use super::patience::persist;
use super::probe::{KafkaProbe, ProbeReport, Prober};
use super::source::kafka::{KafkaOptions, KafkaSource};
use super::source::{Place, SourceCommand, SourceEvent};
use super::status::{IngestStatus, Part};
use super::{Clock, IngestError, IngestParts, IngestSettings};
use crate::metrics::INGEST_BUFFERED;
use crate::registry::Registry;
use crate::store::paths::Paths;
use crate::types::{EventTime, TopicId, TopicPartition};

/// How often age and quiet are looked at.
const TICK: Duration = Duration::from_millis(100);
/// Events taken at once: their images are decoded in parallel.
const EVENTS_AT_ONCE: usize = 256;

/// Consumes until `cancel`; then flushes everything, commits, leaves the group and returns `Ok`. What can't be
/// flushed within `drain_timeout_ms` is left for the next start, which loses and doubles nothing either.
///
/// Waits for a Kafka, registry or store that is down, says so in `parts.status`, and goes on by itself. Errors: see
/// [`IngestError`]; after one the caller may start anew.
pub async fn run(
    settings: IngestSettings,
    parts: IngestParts,
    cancel: CancellationToken,
) -> Result<(), IngestError> {
    parts.status.down(Part::Kafka, &"not joined yet");
    let drain = Duration::from_millis(settings.drain_timeout_ms);
    let mut ingest = tokio::select! {
        started = Ingest::start(settings, parts) => started?,
        () = cancel.cancelled() => return Ok(()),
    };
    let worked = tokio::select! {
        worked = ingest.work(&cancel) => worked,
        () = expired(&cancel, drain) => {
            tracing::warn!("not everything was flushed in time; it will be read again");
            Ok(())
        }
    };
    let closed = ingest.close().await;
    worked.and(closed)
}

async fn expired(cancel: &CancellationToken, drain: Duration) {
    cancel.cancelled().await;
    tokio::time::sleep(drain).await;
}

struct Ingest {
    settings: IngestSettings,
    registry: Arc<dyn Registry>,
    clock: Clock,
    status: IngestStatus,
    flusher: Flusher,
    probe: KafkaProbe,
    source: KafkaSource,
    reports: mpsc::Receiver<ProbeReport>,
    prober: JoinHandle<()>,
    places: watch::Sender<Vec<Place>>,
    topics: BTreeMap<String, TopicId>,
    /// Topics whose partitions the registry has since this start.
    listed: BTreeSet<String>,
    partitions: BTreeMap<Place, Partition>,
    /// Assigned to us, not read: the broker holds less than was read.
    stopped: BTreeMap<Place, TopicPartition>,
    last_epoch: u64,
    watermark: Option<EventTime>,
}

/// An event with its record decoded.
enum Input {
    Record { record: Record, epoch: u64, decoded: Decoded },
    Other(SourceEvent),
}

impl Ingest {
    async fn start(settings: IngestSettings, parts: IngestParts) -> Result<Self, IngestError> {
        let IngestParts { registry, store, clock, status } = parts;
        let kafka = &settings.kafka;
        let mut topics = BTreeMap::new();
        for topic in &kafka.topics {
            let open = || registry.open_topic(topic, &kafka.identity);
            topics.insert(topic.clone(), persist(&status, Part::Registry, open).await?);
        }
        let options = kafka_options(&settings);
        let probe = KafkaProbe::new(&options)?;
        let (places, watched) = watch::channel(Vec::new());
        let prober = Prober {
            probe: probe.clone(),
            topics: kafka.topics.clone(),
            interval: Duration::from_millis(settings.report_interval_ms),
            metadata_interval: Duration::from_millis(kafka.metadata_interval_ms),
            clock: clock.clone(),
            places: watched,
        };
        let flusher = Flusher {
            registry: registry.clone(),
            store,
            paths: Paths::new(&settings.pipeline),
            dead_letters: DeadLetters::new(&kafka.properties, &kafka.dead_letter_topic)?,
            policy: settings.periods.clone(),
            status: status.clone(),
        };
        let source = KafkaSource::start(&options)?;
        let (reports, prober) = prober.spawn();
        Ok(Self {
            registry,
            clock,
            status,
            flusher,
            probe,
            source,
            reports,
            prober,
            places,
            topics,
            listed: BTreeSet::new(),
            partitions: BTreeMap::new(),
            stopped: BTreeMap::new(),
            last_epoch: 0,
            watermark: None,
            settings,
        })
    }

    async fn work(&mut self, cancel: &CancellationToken) -> Result<(), IngestError> {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut inbox = Vec::with_capacity(EVENTS_AT_ONCE);
        loop {
            tokio::select! {
                biased;
                () = cancel.cancelled() => break,
                Some(report) = self.reports.recv() => self.report(report).await?,
                _ = ticks.tick() => self.flush_due().await?,
                count = self.source.events.recv_many(&mut inbox, EVENTS_AT_ONCE) => {
                    if count == 0 {
                        return Err(IngestError::Panicked { what: "the thread of the Kafka client" });
                    }
                    self.events(std::mem::take(&mut inbox)).await?;
                }
            }
        }
        let places: Vec<Place> = self.partitions.keys().cloned().collect();
        for place in places {
            self.write(&place).await?;
        }
        Ok(())
    }

    async fn close(self) -> Result<(), IngestError> {
        self.prober.abort();
        if self.source.close().await {
            return Ok(());
        }
        Err(IngestError::Panicked { what: "the thread of the Kafka client" })
    }

    async fn events(&mut self, events: Vec<SourceEvent>) -> Result<(), IngestError> {
        for input in self.decode(events).await? {
            match input {
                Input::Record { record, epoch, decoded } => self.record(record, epoch, decoded).await?,
                Input::Other(SourceEvent::Assigned(places)) => {
                    for place in places {
                        self.begin(&place).await?;
                    }
                }
                Input::Other(SourceEvent::Revoked { places, lost }) => self.release(places, lost).await?,
                Input::Other(SourceEvent::End { partition }) => {
                    let met = self.partitions.iter_mut().filter(|(place, _)| place.partition == partition);
                    met.for_each(|(_, partition)| partition.met_end());
                }
                Input::Other(SourceEvent::OutOfRange) => self.begin_all_again().await?,
                Input::Other(SourceEvent::Trouble(error)) => {
                    tracing::warn!(%error, "the Kafka client has trouble and goes on trying");
                }
                Input::Other(SourceEvent::Failed(error)) => return Err(error.into()),
                Input::Other(SourceEvent::Record(_)) => {}
            }
        }
        Ok(())
    }

    /// Decodes the images of all records at once, off the async threads, keeping the events' order.
    async fn decode(&self, events: Vec<SourceEvent>) -> Result<Vec<Input>, IngestError> {
        let limits = self.settings.limits.clone();
        let now = (self.clock)();
        let decode_event = move |event| match event {
            SourceEvent::Record(received) => {
                let decoded = decode(&received.record, &limits, now);
                Input::Record { record: received.record, epoch: received.epoch, decoded }
            }
            other => Input::Other(other),
        };
        let work = move || events.into_par_iter().map(decode_event).collect();
        let decoded = tokio::task::spawn_blocking(work).await;
        decoded.map_err(|_| IngestError::Panicked { what: "the decoder of records" })
    }

    async fn record(&mut self, record: Record, epoch: u64, decoded: Decoded) -> Result<(), IngestError> {
        let place = Place { topic: record.topic.clone(), partition: record.partition };
        let now = (self.clock)();
        let policy = &self.settings.flush;
        let Some(partition) = self.partitions.get_mut(&place).filter(|p| p.epoch == epoch) else {
            return Ok(());
        };
        if !partition.take(&record, decoded, now) {
            return Ok(());
        }
        let due = partition.is_due(policy, now);
        let reported = partition.reported;
        if due {
            return self.flush(&place).await;
        }
        if reported {
            self.withdraw_report(&place).await?;
        }
        self.bound_memory().await
    }

    /// Flushes the largest partition while all together take too much.
    async fn bound_memory(&mut self) -> Result<(), IngestError> {
        while self.buffered_bytes() > self.settings.flush.max_total_bytes {
            let largest = self.partitions.iter().max_by_key(|(_, partition)| partition.bytes());
            let Some(place) = largest.map(|(place, _)| place.clone()) else { break };
            self.flush(&place).await?;
        }
        Ok(())
    }

    fn buffered_bytes(&self) -> usize {
        let bytes = self.partitions.values().map(Partition::bytes).sum();
        metrics::gauge!(INGEST_BUFFERED).set(bytes as f64);
        bytes
    }

    async fn flush_due(&mut self) -> Result<(), IngestError> {
        let now = (self.clock)();
        let due = self.partitions.iter().filter(|(_, p)| p.is_due(&self.settings.flush, now));
        let due: Vec<Place> = due.map(|(place, _)| place.clone()).collect();
        for place in due {
            self.flush(&place).await?;
        }
        self.buffered_bytes();
        Ok(())
    }

    /// Flushes a partition; if somebody else has moved its position, reads it anew from there.
    async fn flush(&mut self, place: &Place) -> Result<(), IngestError> {
        match self.write(place).await? {
            Flushed::Committed => Ok(()),
            Flushed::Superseded => self.begin(place).await,
        }
    }

    /// Makes a partition's memory durable, or forgets the partition if it was superseded.
    async fn write(&mut self, place: &Place) -> Result<Flushed, IngestError> {
        let Some(partition) = self.partitions.get_mut(place) else { return Ok(Flushed::Committed) };
        let Some(batch) = partition.take_batch() else { return Ok(Flushed::Committed) };
        let offset = batch.offsets.end;
        let flushed = self.flusher.flush(batch).await?;
        match flushed {
            Flushed::Superseded => {
                self.partitions.remove(place);
            }
            Flushed::Committed => {
                partition.committed();
                self.tell(SourceCommand::Commit { place: place.clone(), offset }).await?;
            }
        }
        Ok(flushed)
    }

    async fn tell(&self, command: SourceCommand) -> Result<(), IngestError> {
        let gone = IngestError::Panicked { what: "the thread of the Kafka client" };
        self.source.commands.send(command).await.map_err(|_| gone)
    }
}

fn kafka_options(settings: &IngestSettings) -> KafkaOptions {
    let kafka = &settings.kafka;
    KafkaOptions {
        properties: kafka.properties.clone(),
        topics: kafka.topics.clone(),
        group: kafka.group.clone(),
        max_record_bytes: settings.limits.max_record_bytes,
        max_in_flight_bytes: kafka.max_in_flight_bytes,
        revoke_timeout: Duration::from_millis(settings.drain_timeout_ms),
        metadata_interval: Duration::from_millis(kafka.metadata_interval_ms),
    }
}
