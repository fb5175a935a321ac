//! Frames onto the wire: records, partitions, acknowledgements and pacing.
//!
//! Invariant: a partition's records are sent in the order in which they were pushed (the client is idempotent),
//! and with pacing at most `max_ahead_bytes` of a partition lie between the producer and the consumer.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use arrow_array::{ArrayRef, BinaryArray, RecordBatch, StringArray, TimestampMillisecondArray};
use arrow_ipc::writer::StreamWriter;
use arrow_schema::ArrowError;
use bytes::Bytes;
use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use rdkafka::config::ClientConfig;
use rdkafka::error::KafkaError;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord, Producer};
use rdkafka::types::RDKafkaErrorCode;

use super::frames::{Image, content_type_of};
use super::{Pacing, Planned, ProduceError, ProduceSettings};
use crate::ingest::frame::{
    ARROW_STREAM, CAPTURED_AT, CONTENT_TYPE, FRAME, LABEL, STREAM_ID, WATERMARK_JSON, punctuation_value,
};
use crate::types::{EventTime, Sha256};

/// Records on the wire at a time: enough to hide the broker's answer, few enough to be small in memory.
const MAX_IN_FLIGHT: usize = 256;
/// How often the consumer's position is asked for while the producer waits for it.
const PACING_POLL: Duration = Duration::from_millis(20);
const METADATA_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a record waits for room in the client's own queue.
const QUEUE_TIMEOUT: Duration = Duration::from_secs(60);

/// What was acknowledged.
struct Acknowledged {
    partition: usize,
    offset: i64,
    bytes: u64,
}

#[derive(Default)]
struct Lane {
    /// Frames that wait to fill a batch.
    batch: Vec<(Planned, Bytes)>,
    /// Acknowledged and not yet consumed: offset and bytes.
    unconsumed: VecDeque<(i64, u64)>,
    /// Bytes of `unconsumed` and of what is in flight.
    ahead_bytes: u64,
}

pub struct Sender {
    producer: FutureProducer,
    topic: String,
    rows_per_record: usize,
    pacing: Option<Pacing>,
    /// By partition.
    lanes: Vec<Lane>,
    in_flight: FuturesUnordered<BoxFuture<'static, Result<Acknowledged, KafkaError>>>,
}

impl Sender {
    pub async fn new(settings: &ProduceSettings) -> Result<Self, ProduceError> {
        let mut config = ClientConfig::new();
        for (key, value) in &settings.properties {
            config.set(key, value);
        }
        config.set("enable.idempotence", "true");
        let producer: FutureProducer = config.create()?;
        let (client, topic) = (producer.clone(), settings.topic.clone());
        let asked = tokio::task::spawn_blocking(move || partitions(&client, &topic)).await;
        let partitions = asked.unwrap_or(Err(KafkaError::Canceled))?;
        Ok(Self {
            producer,
            topic: settings.topic.clone(),
            rows_per_record: settings.rows_per_record.max(1),
            pacing: settings.pacing.clone(),
            lanes: (0..partitions).map(|_| Lane::default()).collect(),
            in_flight: FuturesUnordered::new(),
        })
    }

    /// Takes a frame; returns the bytes of its image. It is sent now, or when its batch is full.
    pub async fn push(&mut self, frame: Planned) -> Result<u64, ProduceError> {
        let image = read(&frame.image).await?;
        let bytes = image.len() as u64;
        let partition = self.partition_of(&frame.stream_id);
        let lane = &mut self.lanes[partition];
        lane.batch.push((frame, image));
        if lane.batch.len() >= self.rows_per_record {
            self.send_batch(partition).await?;
        }
        Ok(bytes)
    }

    /// Sends what waits, then the punctuation, and waits for all acknowledgements.
    pub async fn finish(&mut self, watermark: Option<EventTime>) -> Result<(), ProduceError> {
        for partition in 0..self.lanes.len() {
            self.send_batch(partition).await?;
            if let Some(watermark) = watermark {
                let headers = OwnedHeaders::new().insert(header(CONTENT_TYPE, WATERMARK_JSON));
                self.send(partition, None, punctuation_value(watermark).into(), headers).await?;
            }
        }
        while !self.in_flight.is_empty() {
            self.acknowledge().await?;
        }
        Ok(())
    }

    /// A stream's partition: by hash, so that it is the same in every run.
    fn partition_of(&self, stream_id: &str) -> usize {
        let hash = Sha256::of(stream_id.as_bytes()).0;
        let number = u64::from_str_radix(&hash[..15], 16).unwrap_or(0);
        (number % self.lanes.len() as u64) as usize
    }

    async fn send_batch(&mut self, partition: usize) -> Result<(), ProduceError> {
        let mut batch = std::mem::take(&mut self.lanes[partition].batch);
        if self.rows_per_record > 1 && !batch.is_empty() {
            let headers = OwnedHeaders::new().insert(header(CONTENT_TYPE, ARROW_STREAM));
            let value = encode_batch(&batch)?;
            return self.send(partition, None, value.into(), headers).await;
        }
        for (frame, image) in batch.drain(..) {
            let captured_at = frame.captured_at.as_ms().to_string();
            let mut headers = OwnedHeaders::new()
                .insert(header(CONTENT_TYPE, content_type_of(&image)))
                .insert(header(STREAM_ID, &frame.stream_id))
                .insert(header(CAPTURED_AT, &captured_at));
            if let Some(label) = &frame.label {
                headers = headers.insert(header(LABEL, label));
            }
            self.send(partition, Some(frame.stream_id), image, headers).await?;
        }
        Ok(())
    }

    async fn send(
        &mut self,
        partition: usize,
        key: Option<String>,
        value: Bytes,
        headers: OwnedHeaders,
    ) -> Result<(), ProduceError> {
        let bytes = value.len() as u64;
        self.wait_for_consumer(partition, bytes).await?;
        while self.in_flight.len() >= MAX_IN_FLIGHT {
            self.acknowledge().await?;
        }
        self.lanes[partition].ahead_bytes += bytes;
        let (producer, topic) = (self.producer.clone(), self.topic.clone());
        let number = partition as i32;
        // Queued at once, so that the order is the order of calls.
        let mut record = FutureRecord::<str, [u8]>::to(&topic).partition(number).headers(headers);
        record.key = key.as_deref();
        record.payload = Some(&value);
        let delivery = loop {
            match producer.send_result(record) {
                Ok(delivery) => break delivery,
                Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), back)) => {
                    record = back;
                    if self.in_flight.is_empty() {
                        tokio::time::sleep(QUEUE_TIMEOUT.min(PACING_POLL)).await;
                    } else {
                        self.acknowledge().await?;
                    }
                }
                Err((error, _)) => return Err(error.into()),
            }
        };
        self.in_flight.push(Box::pin(async move {
            let delivered = delivery.await.map_err(|_| KafkaError::Canceled)?;
            let delivered = delivered.map_err(|(error, _)| error)?;
            Ok(Acknowledged { partition, offset: delivered.offset, bytes })
        }));
        Ok(())
    }

    async fn acknowledge(&mut self) -> Result<(), ProduceError> {
        if let Some(acknowledged) = self.in_flight.next().await {
            let Acknowledged { partition, offset, bytes } = acknowledged?;
            let lane = &mut self.lanes[partition];
            // Answers may overtake each other.
            let place = lane.unconsumed.partition_point(|&(earlier, _)| earlier < offset);
            lane.unconsumed.insert(place, (offset, bytes));
        }
        Ok(())
    }

    async fn wait_for_consumer(&mut self, partition: usize, bytes: u64) -> Result<(), ProduceError> {
        let Some(pacing) = self.pacing.clone() else {
            self.lanes[partition].unconsumed.clear();
            return Ok(());
        };
        loop {
            let ahead = self.lanes[partition].ahead_bytes;
            if ahead == 0 || ahead + bytes <= pacing.max_ahead_bytes {
                return Ok(());
            }
            while !self.in_flight.is_empty() {
                self.acknowledge().await?;
            }
            let consumed = (pacing.consumed)(partition as i32).await;
            let lane = &mut self.lanes[partition];
            let before = lane.ahead_bytes;
            while lane.unconsumed.front().is_some_and(|&(offset, _)| offset < consumed) {
                let (_, bytes) = lane.unconsumed.pop_front().unwrap_or_default();
                lane.ahead_bytes -= bytes;
            }
            if lane.ahead_bytes == before {
                tokio::time::sleep(PACING_POLL).await;
            }
        }
    }
}

fn partitions(producer: &FutureProducer, topic: &str) -> Result<usize, KafkaError> {
    let metadata = producer.client().fetch_metadata(Some(topic), METADATA_TIMEOUT)?;
    let found = metadata.topics().iter().find(|t| t.name() == topic);
    match found.map(|t| (t.error(), t.partitions().len())) {
        Some((None, count)) if count > 0 => Ok(count),
        Some((Some(error), _)) => Err(KafkaError::MetadataFetch(error.into())),
        _ => Err(KafkaError::MetadataFetch(RDKafkaErrorCode::UnknownTopicOrPartition)),
    }
}

fn header<'a>(key: &'a str, value: &'a str) -> Header<'a, &'a str> {
    Header { key, value: Some(value) }
}

async fn read(image: &Image) -> Result<Bytes, ProduceError> {
    match image {
        Image::Bytes(bytes) => Ok(bytes.clone()),
        Image::File(path) => match tokio::fs::read(path).await {
            Ok(bytes) => Ok(bytes.into()),
            Err(source) => Err(ProduceError::Read { path: path.clone(), source }),
        },
    }
}

fn encode_batch(frames: &[(Planned, Bytes)]) -> Result<Vec<u8>, ArrowError> {
    let instants = frames.iter().map(|(frame, _)| frame.captured_at.as_ms());
    let labels = frames.iter().map(|(frame, _)| frame.label.as_deref());
    let batch = RecordBatch::try_from_iter_with_nullable([
        (
            FRAME,
            Arc::new(BinaryArray::from_iter_values(frames.iter().map(|(_, image)| image))) as ArrayRef,
            false,
        ),
        (
            STREAM_ID,
            Arc::new(StringArray::from_iter_values(frames.iter().map(|(frame, _)| &frame.stream_id))),
            false,
        ),
        (
            CAPTURED_AT,
            Arc::new(TimestampMillisecondArray::from_iter_values(instants).with_timezone("UTC")),
            false,
        ),
        (LABEL, Arc::new(StringArray::from_iter(labels)), true),
    ])?;
    let mut writer = StreamWriter::try_new(Vec::new(), &batch.schema())?;
    writer.write(&batch)?;
    writer.finish()?;
    writer.into_inner()
}
