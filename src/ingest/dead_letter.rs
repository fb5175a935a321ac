//! Records that could not be taken, with their reason and place, on a topic of their own.
//!
//! Owns the form of a dead letter. Invariant: [`DeadLetters::send`] returns only when the broker has
//! acknowledged every letter, and it is called before the transaction that moves the position over the record.
//! So each is there at least once; (topic id, partition, offset, row) tells repeats apart.
//!
//! Headers: `reason`, `detail`, `source_topic`, `source_topic_id`, `source_partition`, `source_offset`,
//! `source_row` (for a row of a batch), and the record's own `content-type`, `stream_id`, `captured_at` and
//! `label`. The value is the record's, unless it is too large for a topic with default limits; then, and for a
//! row, `value_bytes` says how much was left behind.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use futures::future::try_join_all;
use rdkafka::config::ClientConfig;
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::types::RDKafkaErrorCode;

use super::frame::{CAPTURED_AT, CONTENT_TYPE, LABEL, Record, Reject, STREAM_ID, Value};
use crate::types::TopicPartition;

/// Kafka refuses records above 1 MiB by default; the rest is for the headers.
const MAX_VALUE_BYTES: usize = 900_000;
/// Headers of the record that are longer are left out, longer details cut.
const MAX_HEADER_BYTES: usize = 1024;
/// How long the client tries before the caller learns of it and waits by its own rules.
const DELIVERY_TIMEOUT_MS: &str = "10000";
/// How long a letter waits for room in the client's own queue.
const QUEUE_TIMEOUT: Duration = Duration::from_secs(10);

/// One record or row that was not taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetter {
    headers: Vec<(String, String)>,
    key: Option<Bytes>,
    value: Option<Bytes>,
}

impl DeadLetter {
    pub fn new(source: &TopicPartition, record: &Record, reject: &Reject) -> Self {
        let mut headers = vec![
            ("reason".to_owned(), reject.reason.as_str().to_owned()),
            ("detail".into(), cut(&reject.detail).to_owned()),
            ("source_topic".into(), source.topic.clone()),
            ("source_topic_id".into(), source.topic_id.to_string()),
            ("source_partition".into(), source.partition.to_string()),
            ("source_offset".into(), record.offset.to_string()),
        ];
        headers.extend(reject.row.map(|row| ("source_row".to_owned(), row.to_string())));
        let kept = [CONTENT_TYPE, STREAM_ID, CAPTURED_AT, LABEL];
        headers.extend(record.headers.iter().filter_map(|(name, value)| {
            let wanted = kept.contains(&name.as_str()) && value.len() <= MAX_HEADER_BYTES;
            wanted.then(|| (name.clone(), String::from_utf8_lossy(value).into_owned()))
        }));
        let (value, bytes) = match &record.value {
            Value::Empty => (None, 0),
            Value::Oversized { bytes } => (None, *bytes),
            Value::Bytes(value) => (Some(value.clone()), value.len()),
        };
        let value = value.filter(|value| value.len() <= MAX_VALUE_BYTES && reject.row.is_none());
        if value.is_none() && bytes > 0 {
            headers.push(("value_bytes".into(), bytes.to_string()));
        }
        let key = record.key.clone().filter(|key| key.len() <= MAX_HEADER_BYTES);
        Self { headers, key, value }
    }

    /// What it takes in memory.
    pub fn bytes(&self) -> usize {
        let headers: usize = self.headers.iter().map(|(name, value)| name.len() + value.len()).sum();
        headers + self.value.as_ref().map_or(0, Bytes::len) + self.key.as_ref().map_or(0, Bytes::len)
    }
}

fn cut(text: &str) -> &str {
    let end = (0..=MAX_HEADER_BYTES.min(text.len())).rev().find(|&end| text.is_char_boundary(end));
    &text[..end.unwrap_or(0)]
}

/// The producer of dead letters.
pub struct DeadLetters {
    producer: FutureProducer,
    topic: String,
}

impl DeadLetters {
    /// `properties` as for the consumer. Errors: a setting that the client refuses.
    pub fn new(properties: &BTreeMap<String, String>, topic: &str) -> KafkaResult<Self> {
        let mut config = ClientConfig::new();
        config.set("message.timeout.ms", DELIVERY_TIMEOUT_MS);
        for (key, value) in properties {
            config.set(key, value);
        }
        config.set("enable.idempotence", "true");
        Ok(Self { producer: config.create()?, topic: topic.to_owned() })
    }

    /// Sends them all and waits until each is acknowledged.
    pub async fn send(&self, letters: &[DeadLetter]) -> KafkaResult<()> {
        try_join_all(letters.iter().map(|letter| self.send_one(letter))).await.map(drop)
    }

    async fn send_one(&self, letter: &DeadLetter) -> KafkaResult<()> {
        match self.send_with(letter, letter.value.as_deref()).await {
            // The topic's own limit is lower than the default: the place still tells which record it was.
            Err(KafkaError::MessageProduction(RDKafkaErrorCode::MessageSizeTooLarge)) => {
                self.send_with(letter, None).await
            }
            sent => sent,
        }
    }

    async fn send_with(&self, letter: &DeadLetter, value: Option<&[u8]>) -> KafkaResult<()> {
        let mut headers = OwnedHeaders::new_with_capacity(letter.headers.len());
        for (key, value) in &letter.headers {
            headers = headers.insert(Header { key, value: Some(value) });
        }
        let mut record = FutureRecord::<[u8], [u8]>::to(&self.topic).headers(headers);
        record.key = letter.key.as_deref();
        record.payload = value;
        let sent = self.producer.send(record, QUEUE_TIMEOUT).await;
        sent.map(drop).map_err(|(error, _)| error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ingest::frame::RejectReason;
    use crate::types::{EventTime, TopicId};

    fn source() -> TopicPartition {
        TopicPartition { topic: "frames".into(), topic_id: TopicId("g000001".into()), partition: 3 }
    }

    fn record(value: Value) -> Record {
        Record {
            topic: "frames".into(),
            partition: 3,
            offset: 41,
            key: None,
            timestamp: Some(EventTime(0)),
            headers: vec![(CONTENT_TYPE.into(), "image/jpeg".into()), ("x".into(), "y".into())],
            value,
        }
    }

    fn reject(row: Option<u32>) -> Reject {
        Reject { reason: RejectReason::UndecodableImage, row, detail: "é".repeat(1000) }
    }

    #[test]
    fn a_dead_letter_names_its_reason_and_its_place() {
        let letter = DeadLetter::new(&source(), &record(Value::Bytes("x".into())), &reject(None));
        let header = |name: &str| letter.headers.iter().find(|h| h.0 == name).map(|h| h.1.as_str());
        assert_eq!(header("reason"), Some("undecodable_image"));
        assert_eq!(header("source_topic"), Some("frames"));
        assert_eq!(header("source_topic_id"), Some("g000001"));
        assert_eq!(header("source_partition"), Some("3"));
        assert_eq!(header("source_offset"), Some("41"));
        assert_eq!(header("content-type"), Some("image/jpeg"));
        assert_eq!(header("source_row"), None);
        assert_eq!(header("x"), None);
        assert!(header("detail").is_some_and(|detail| detail.len() <= MAX_HEADER_BYTES));
        assert_eq!(letter.value, Some("x".into()));
    }

    #[test]
    fn a_value_that_no_topic_takes_is_left_behind_and_counted() {
        for (value, row, bytes) in [
            (Value::Oversized { bytes: 40 << 20 }, None, 40 << 20),
            (Value::Bytes(vec![0; 1_000_000].into()), None, 1_000_000),
            (Value::Bytes("batch".into()), Some(7), 5),
        ] {
            let letter = DeadLetter::new(&source(), &record(value), &reject(row));
            assert_eq!(letter.value, None);
            assert!(letter.headers.contains(&("value_bytes".into(), bytes.to_string())));
            assert_eq!(row.is_some(), letter.headers.contains(&("source_row".into(), "7".into())));
        }
    }
}
