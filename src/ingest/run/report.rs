//! What the brokers answered: lag, new partitions, ends reached, and the stream's watermark from all of it.
//!
//! Invariant: a report to the registry says that everything up to the answered end is durable, and it is
//! withdrawn when the next record comes. The stream's watermark moves only once every topic was listed: a
//! partition that the registry has never heard of can't hold it back.

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
        self.listed.extend(report.partitions.into_keys());
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
        if self.topics.keys().all(|topic| self.listed.contains(topic)) {
            self.raise_watermark().await?;
        }
        let stands = persist(&self.status, Part::Registry, || self.registry.watermark()).await?;
        if let Some(stands) = stands {
            metrics::gauge!(INGEST_WATERMARK).set(stands.as_seconds());
        }
        Ok(())
    }

    async fn raise_watermark(&mut self) -> Result<(), IngestError> {
        let mut positions = persist(&self.status, Part::Registry, || self.registry.positions()).await?;
        // A topic that is not consumed any more holds nothing back.
        positions.retain(|p| self.topics.get(&p.partition.topic) == Some(&p.partition.topic_id));
        let reached = stream_watermark(&positions, (self.clock)(), self.settings.idle);
        if let Some(reached) = reached
            && self.watermark < Some(reached)
        {
            let advance = || self.registry.advance_watermark(reached);
            persist(&self.status, Part::Registry, advance).await?;
            self.watermark = Some(reached);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;
    use crate::ingest::IngestStatus;
    use crate::ingest::tests::rig::{HOUR_MS, Rig, now};
    use crate::registry::{Flush, Registry};
    use crate::types::OffsetRange;

    async fn vouch(rig: &Rig, topic: &str, watermark: EventTime) {
        let id = rig.id(topic, 0).await;
        rig.registry.register_partitions(std::slice::from_ref(&id)).await.unwrap();
        rig.registry.start_position(&id, 0).await.unwrap();
        let flush = Flush {
            partition: id,
            offsets: OffsetRange { start: 0, end: 1 },
            watermark: Some(watermark),
            segments: vec![],
            periods: vec![],
            lost: None,
        };
        rig.registry.commit_flush(&flush).await.unwrap();
    }

    fn listing(topic: &str) -> ProbeReport {
        let partitions = BTreeMap::from([(topic.to_owned(), BTreeSet::from([0]))]);
        ProbeReport { partitions, ..ProbeReport::default() }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_topic_that_was_never_listed_holds_the_watermark_back() {
        let rig = Rig::new(&[("left", 1), ("right", 1)]).await;
        let watermark = now().minus_ms(HOUR_MS);
        vouch(&rig, "left", watermark).await;
        let parts = rig.parts(IngestStatus::default());
        let mut ingest = Ingest::start(rig.settings(), parts).await.unwrap();
        ingest.report(listing("left")).await.unwrap();
        assert_eq!(rig.registry.watermark().await.unwrap(), None, "nothing is known of the right");
        ingest.report(listing("right")).await.unwrap();
        assert_eq!(rig.registry.watermark().await.unwrap(), None, "nobody reads the right");
        vouch(&rig, "right", watermark.plus_ms(1)).await;
        ingest.report(ProbeReport::default()).await.unwrap();
        assert_eq!(rig.registry.watermark().await.unwrap(), Some(watermark));
        ingest.close().await.unwrap();
    }
}
