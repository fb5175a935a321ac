//! What the brokers answered: lag, new partitions, ends reached, and the stream's watermark from all of it.
//!
//! Invariant: a report to the registry says that everything up to the answered end is durable, and it is
//! withdrawn when the next record comes.

use super::{Ingest, Part, persist};
use crate::ingest::IngestError;
use crate::ingest::position::{Bounds, StartDecision, decide_start};
use crate::ingest::probe::ProbeReport;
use crate::ingest::source::Place;
use crate::ingest::window::stream_watermark;
use crate::metrics::{INGEST_LAG, INGEST_WATERMARK};
use crate::registry::{CaughtUp, RegistryError};
use crate::types::{EventTime, TopicPartition};

impl Ingest {
    pub(super) async fn report(&mut self, report: ProbeReport) -> Result<(), IngestError> {
        match &report.trouble {
            Some(trouble) => {
                tracing::warn!(trouble, "Kafka does not answer");
                self.status.down(Part::Kafka, trouble);
            }
            None => self.status.up(Part::Kafka),
        }
        let listed = report.partitions.iter().flat_map(|(topic, partitions)| {
            let topic_id = self.topics.get(topic).cloned();
            partitions.iter().filter_map(move |&partition| {
                let (topic, topic_id) = (topic.clone(), topic_id.clone()?);
                Some(TopicPartition { topic, topic_id, partition })
            })
        });
        let listed: Vec<TopicPartition> = listed.collect();
        if !listed.is_empty() {
            self.register(&listed).await?;
        }
        for (place, bounds, asked_at) in report.bounds {
            if self.stopped.contains_key(&place) {
                self.look_at_stopped(&place, bounds).await?;
            } else {
                self.end_answered(&place, bounds, asked_at).await?;
            }
        }
        self.advance_watermark().await
    }

    async fn end_answered(
        &mut self,
        place: &Place,
        bounds: Bounds,
        asked_at: EventTime,
    ) -> Result<(), IngestError> {
        let Some(partition) = self.partitions.get_mut(place) else { return Ok(()) };
        let lag = (bounds.end - partition.next_offset()).max(0);
        let labels = [("topic", place.topic.clone()), ("partition", place.partition.to_string())];
        metrics::gauge!(INGEST_LAG, &labels).set(lag as f64);
        match partition.end_answered(bounds.end, asked_at) {
            None => Ok(()),
            Some(caught_up) => self.set_report(place, Some(caught_up)).await,
        }
    }

    /// A record has come after the last report.
    pub(super) async fn withdraw_report(&mut self, place: &Place) -> Result<(), IngestError> {
        self.set_report(place, None).await
    }

    async fn set_report(&mut self, place: &Place, report: Option<CaughtUp>) -> Result<(), IngestError> {
        let Some(partition) = self.partitions.get_mut(place) else { return Ok(()) };
        let (id, position) = (partition.id.clone(), partition.committed_offset());
        partition.reported = report.is_some();
        let tell = || self.registry.report_caught_up(&id, position, report);
        match persist(&self.status, Part::Registry, tell).await {
            Ok(()) => Ok(()),
            // A rival or an operator: what we have in memory counts for nothing.
            Err(RegistryError::PositionMoved { .. }) => self.begin(place).await,
            Err(error) => Err(error.into()),
        }
    }

    /// Reads a stopped partition again once its position or the broker's log fits.
    async fn look_at_stopped(&mut self, place: &Place, bounds: Bounds) -> Result<(), IngestError> {
        let Some(id) = self.stopped.get(place) else { return Ok(()) };
        let record = persist(&self.status, Part::Registry, || self.registry.position(id)).await?;
        let recorded = record.and_then(|record| record.position);
        match decide_start(recorded, bounds, self.settings.kafka.start) {
            StartDecision::BeyondEnd { .. } => Ok(()),
            _ => self.begin(place).await,
        }
    }

    async fn advance_watermark(&mut self) -> Result<(), IngestError> {
        let positions = persist(&self.status, Part::Registry, || self.registry.positions()).await?;
        let reached = stream_watermark(&positions, (self.clock)(), self.settings.idle);
        if let Some(reached) = reached
            && self.watermark < Some(reached)
        {
            let advance = || self.registry.advance_watermark(reached);
            persist(&self.status, Part::Registry, advance).await?;
            self.watermark = Some(reached);
        }
        let stands = persist(&self.status, Part::Registry, || self.registry.watermark()).await?;
        if let Some(stands) = stands {
            metrics::gauge!(INGEST_WATERMARK).set(stands.as_seconds());
        }
        Ok(())
    }
}
