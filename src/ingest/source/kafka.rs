//! The Kafka client: one consumer on one blocking thread, and a second client that asks questions.
//!
//! Owns every call into the client library. Rebalances are answered late on purpose: the library's callback
//! only notes them, the loop then looks positions up and flushes while the thread goes on polling, so neither a
//! slow registry nor a slow store costs the membership. Assignment is cooperative: a rebalance disturbs only the
//! partitions that move.
//!
//! When the loop takes no more (its channel or the memory for records in flight is full), the thread pauses
//! its partitions and polls on. Leaves to others: what a record means, where a partition starts (`run`).

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use rdkafka::client::ClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer, ConsumerContext};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::message::{BorrowedMessage, Headers, Message};
use rdkafka::types::{RDKafkaErrorCode, RDKafkaRespErr};
use rdkafka::{Offset, TopicPartitionList};
use tokio::sync::mpsc::error::{TryRecvError, TrySendError};
use tokio::sync::{Semaphore, mpsc};

use super::{Place, Received, SourceCommand, SourceEvent};
use crate::failpoint;
use crate::ingest::frame::{Record, Value};
use crate::ingest::position::Bounds;
use crate::types::EventTime;

/// How long one poll may wait, and so how late a command may be obeyed.
const POLL: Duration = Duration::from_millis(50);
/// How often a full channel is tried again.
const RETRY: Duration = Duration::from_millis(5);
/// A channel full for longer means that the loop waits for something: then partitions are paused.
const STALL: Duration = Duration::from_millis(500);
/// Events that may wait for the loop. More only adds latency to a revocation; their bytes are bounded apart.
const EVENTS: usize = 1024;
/// Commands that may wait for the thread: some per partition and flush, taken every [`POLL`].
const COMMANDS: usize = 1024;
/// How long a question to the broker may take.
const QUESTION_TIMEOUT: Duration = Duration::from_secs(10);

/// What the client is to consume, and within which bounds.
#[derive(Debug, Clone)]
pub struct KafkaOptions {
    /// Settings of librdkafka, `bootstrap.servers` among them. What the protocol needs is set over them.
    pub properties: BTreeMap<String, String>,
    pub topics: Vec<String>,
    pub group: String,
    /// Larger records are reported by their size alone.
    pub max_record_bytes: usize,
    /// Memory that records on their way to the loop may take.
    pub max_in_flight_bytes: usize,
    /// Without an answer to a revocation for this long the partitions are given back all the same: the
    /// registry's compare-and-swap keeps the protocol right.
    pub revoke_timeout: Duration,
    /// How often the client looks for new partitions.
    pub metadata_interval: Duration,
}

impl KafkaOptions {
    fn client(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config.set("queued.max.messages.kbytes", "16384");
        for (key, value) in &self.properties {
            config.set(key, value);
        }
        config.set("isolation.level", "read_committed");
        config
    }

    fn consumer(&self) -> ClientConfig {
        let mut config = self.client();
        let refresh_ms = self.metadata_interval.as_millis().clamp(100, 3_600_000);
        config
            .set("group.id", &self.group)
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            .set("auto.offset.reset", "error")
            .set("enable.partition.eof", "true")
            .set("partition.assignment.strategy", "cooperative-sticky")
            .set("topic.metadata.refresh.interval.ms", refresh_ms.to_string());
        config
    }
}

/// The loop's ends of the channels, and the thread.
pub struct KafkaSource {
    pub events: mpsc::Receiver<SourceEvent>,
    pub commands: mpsc::Sender<SourceCommand>,
    thread: std::thread::JoinHandle<()>,
}

impl KafkaSource {
    /// Joins the group. Errors: a setting that the client refuses.
    pub fn start(options: &KafkaOptions) -> KafkaResult<Self> {
        let config = options.consumer();
        let context = GroupContext::default();
        let consumer: BaseConsumer<GroupContext> = config.create_with_context(context)?;
        let topics: Vec<&str> = options.topics.iter().map(String::as_str).collect();
        consumer.subscribe(&topics)?;
        let (events_in, events) = mpsc::channel(EVENTS);
        let (commands, commands_out) = mpsc::channel(COMMANDS);
        let poller = Poller {
            consumer,
            events: events_in,
            commands: commands_out,
            memory: Arc::new(Semaphore::new(options.max_in_flight_bytes.min(Semaphore::MAX_PERMITS))),
            options: options.clone(),
            rebalance: None,
            owned: BTreeSet::new(),
            epochs: HashMap::new(),
            restarts: BTreeMap::new(),
            outbox: VecDeque::new(),
            stalled_since: None,
            paused: None,
        };
        let thread = std::thread::Builder::new()
            .name("kafka-poll".into())
            .spawn(move || poller.run())
            .map_err(|error| KafkaError::ClientCreation(format!("no thread: {error}")))?;
        Ok(Self { events, commands, thread })
    }

    /// Leaves the group and waits for the thread's end. `false` if it panicked.
    pub async fn close(self) -> bool {
        // A thread that has ended takes no command, which is what is wanted.
        let _ = self.commands.send(SourceCommand::Close).await;
        drop((self.events, self.commands));
        let thread = self.thread;
        matches!(tokio::task::spawn_blocking(move || thread.join()).await, Ok(Ok(())))
    }
}

/// A rebalance as the library told it.
struct Told {
    assign: bool,
    places: Vec<Place>,
    lost: bool,
}

/// Notes rebalances for the poll loop.
#[derive(Default)]
struct GroupContext {
    told: Mutex<VecDeque<Told>>,
    closing: AtomicBool,
}

impl ClientContext for GroupContext {}

impl ConsumerContext for GroupContext {
    fn rebalance(
        &self,
        consumer: &BaseConsumer<Self>,
        code: RDKafkaRespErr,
        partitions: &mut TopicPartitionList,
    ) {
        let assign = code == RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS;
        let places = places(partitions);
        if self.closing.load(Ordering::SeqCst) {
            answer(consumer, assign, &places, &BTreeMap::new());
            return;
        }
        let lost = !assign && consumer.assignment_lost();
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        told.push_back(Told { assign, places, lost });
    }
}

fn places(list: &TopicPartitionList) -> Vec<Place> {
    let elements = list.elements();
    elements.iter().map(|e| Place { topic: e.topic().to_owned(), partition: e.partition() }).collect()
}

/// Hands the library the answer that it waits for: partitions to read with their offsets, or partitions to
/// give up, of which those that were held were never handed over.
fn answer<C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    assign: bool,
    places: &[Place],
    starts: &BTreeMap<Place, i64>,
) {
    let mut list = TopicPartitionList::new();
    let result = if assign {
        for (place, offset) in starts {
            // An offset is never negative, so it can't be refused.
            let _ = list.add_partition_offset(&place.topic, place.partition, Offset::Offset(*offset));
        }
        consumer.incremental_assign(&list)
    } else {
        for place in places.iter().filter(|place| is_read(consumer, place)) {
            list.add_partition(&place.topic, place.partition);
        }
        consumer.incremental_unassign(&list)
    };
    if let Err(error) = result {
        tracing::warn!(%error, assign, "the client refused a rebalance; all partitions are given back");
        if let Err(error) = consumer.unassign() {
            tracing::error!(%error, "the client refuses to give partitions back");
        }
    }
}

fn is_read<C: ConsumerContext>(consumer: &BaseConsumer<C>, place: &Place) -> bool {
    consumer
        .assignment()
        .is_ok_and(|assigned| assigned.find_partition(&place.topic, place.partition).is_some())
}

/// A rebalance that waits for the loop.
struct Rebalance {
    told: Told,
    /// Partitions that the loop has decided on; `None`: hold.
    decided: BTreeMap<Place, Option<i64>>,
    released: bool,
    since: Instant,
}

struct Poller {
    consumer: BaseConsumer<GroupContext>,
    events: mpsc::Sender<SourceEvent>,
    commands: mpsc::Receiver<SourceCommand>,
    memory: Arc<Semaphore>,
    options: KafkaOptions,
    /// One at a time: the library tells the next one after the answer.
    rebalance: Option<Rebalance>,
    /// Read or held.
    owned: BTreeSet<Place>,
    epochs: HashMap<Place, u64>,
    /// Partitions to be read from another offset, once no rebalance is open.
    restarts: BTreeMap<Place, Option<i64>>,
    /// What the loop has not taken yet.
    outbox: VecDeque<SourceEvent>,
    stalled_since: Option<Instant>,
    /// What was paused when the loop took no more.
    paused: Option<TopicPartitionList>,
}

impl Poller {
    fn run(mut self) {
        while self.obey() && self.deliver() {
            self.next_rebalance();
            self.answer_rebalance();
            self.restart();
            match self.backpressure() {
                Some(wait) => self.poll(wait),
                None => std::thread::sleep(RETRY),
            }
        }
        self.close();
    }

    /// Takes every command; `false`: end.
    fn obey(&mut self) -> bool {
        loop {
            let command = match self.commands.try_recv() {
                Ok(command) => command,
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            };
            match command {
                SourceCommand::Close => return false,
                SourceCommand::Start { place, offset, epoch } => self.decide(place, Some((offset, epoch))),
                SourceCommand::Hold { place } => self.decide(place, None),
                SourceCommand::Released => {
                    if let Some(rebalance) = &mut self.rebalance {
                        rebalance.released = true;
                    }
                }
                SourceCommand::Commit { place, offset } => self.commit(&place, offset),
            }
        }
    }

    fn decide(&mut self, place: Place, start: Option<(i64, u64)>) {
        let offset = start.map(|(offset, _)| offset);
        match &mut self.rebalance {
            Some(open) if open.told.assign && open.told.places.contains(&place) => {
                open.decided.insert(place.clone(), offset);
            }
            // Given back since the loop decided.
            _ if !self.owned.contains(&place) => return,
            _ => {
                self.restarts.insert(place.clone(), offset);
            }
        }
        match start {
            Some((_, epoch)) => self.epochs.insert(place, epoch),
            None => self.epochs.remove(&place),
        };
    }

    fn commit(&self, place: &Place, offset: i64) {
        failpoint::reach("ingest.kafka_commit.before");
        let mut list = TopicPartitionList::new();
        let committed = list
            .add_partition_offset(&place.topic, place.partition, Offset::Offset(offset))
            .and_then(|()| self.consumer.commit(&list, CommitMode::Async));
        if let Err(error) = committed {
            tracing::warn!(%place, offset, %error, "offset not told to Kafka; lag monitors will show too much");
        }
        failpoint::reach("ingest.kafka_commit.after");
    }

    fn next_rebalance(&mut self) {
        if self.rebalance.is_some() {
            return;
        }
        let mut queue = self.consumer.context().told.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(told) = queue.pop_front() else { return };
        drop(queue);
        let places = told.places.clone();
        self.outbox.push_back(if told.assign {
            SourceEvent::Assigned(places)
        } else {
            SourceEvent::Revoked { places, lost: told.lost }
        });
        let since = Instant::now();
        self.rebalance = Some(Rebalance { told, decided: BTreeMap::new(), released: false, since });
    }

    fn answer_rebalance(&mut self) {
        let Some(open) = &self.rebalance else { return };
        let complete = if open.told.assign {
            open.decided.len() == open.told.places.len()
        } else {
            open.released || open.since.elapsed() >= self.options.revoke_timeout
        };
        if !complete {
            return;
        }
        let Some(open) = self.rebalance.take() else { return };
        let starts = open.decided.into_iter().filter_map(|(place, start)| Some((place, start?)));
        answer(&self.consumer, open.told.assign, &open.told.places, &starts.collect());
        if open.told.assign {
            self.owned.extend(open.told.places);
            return;
        }
        for place in &open.told.places {
            self.owned.remove(place);
            self.epochs.remove(place);
            self.restarts.remove(place);
        }
    }

    /// Gives partitions up and takes them again at their new offset: unlike a seek this also works when the
    /// library stopped reading because the old offset was out of range.
    fn restart(&mut self) {
        if self.rebalance.is_some() || self.restarts.is_empty() {
            return;
        }
        let restarts = std::mem::take(&mut self.restarts);
        let places: Vec<Place> = restarts.keys().cloned().collect();
        answer(&self.consumer, false, &places, &BTreeMap::new());
        let starts = restarts.into_iter().filter_map(|(place, start)| Some((place, start?)));
        answer(&self.consumer, true, &[], &starts.collect());
        // What was paused is read anew.
        self.paused = None;
    }

    /// Hands on what the loop takes; `false`: the loop is gone.
    fn deliver(&mut self) -> bool {
        while let Some(mut event) = self.outbox.pop_front() {
            if let SourceEvent::Record(received) = &mut event
                && received.memory.is_none()
            {
                received.memory = self.reserve(&received.record);
                if received.memory.is_none() {
                    self.outbox.push_front(event);
                    return true;
                }
            }
            match self.events.try_send(event) {
                Ok(()) => {}
                Err(TrySendError::Full(event)) => {
                    self.outbox.push_front(event);
                    return true;
                }
                Err(TrySendError::Closed(_)) => return false,
            }
        }
        true
    }

    fn reserve(&self, record: &Record) -> Option<tokio::sync::OwnedSemaphorePermit> {
        let bytes = match &record.value {
            Value::Bytes(bytes) => bytes.len(),
            Value::Empty | Value::Oversized { .. } => 0,
        };
        // A record larger than the whole budget travels alone.
        let permits = bytes.min(self.options.max_in_flight_bytes).try_into().unwrap_or(u32::MAX);
        self.memory.clone().try_acquire_many_owned(permits).ok()
    }

    /// How long to poll; `None`: not now. Pauses what is read while the loop takes no more for [`STALL`].
    fn backpressure(&mut self) -> Option<Duration> {
        if self.outbox.is_empty() {
            self.stalled_since = None;
            if let Some(list) = self.paused.take()
                && let Err(error) = self.consumer.resume(&list)
            {
                tracing::error!(%error, "the client refuses to resume partitions");
            }
            return Some(POLL);
        }
        let since = *self.stalled_since.get_or_insert_with(Instant::now);
        if since.elapsed() < STALL {
            return None;
        }
        if self.paused.is_none() {
            let paused = self.consumer.assignment().and_then(|list| {
                self.consumer.pause(&list)?;
                Ok(list)
            });
            match paused {
                Ok(list) => self.paused = Some(list),
                Err(error) => tracing::error!(%error, "the client refuses to pause partitions"),
            }
        }
        Some(POLL)
    }

    fn poll(&mut self, wait: Duration) {
        let event = match self.consumer.poll(wait) {
            None => return,
            Some(Ok(message)) => {
                let place = Place { topic: message.topic().to_owned(), partition: message.partition() };
                // Without an epoch: read before a revocation or a hold.
                let Some(&epoch) = self.epochs.get(&place) else { return };
                let record = detach(&message, self.options.max_record_bytes);
                SourceEvent::Record(Received { record, epoch, memory: None })
            }
            Some(Err(KafkaError::PartitionEOF(partition))) => SourceEvent::End { partition },
            Some(Err(KafkaError::MessageConsumption(RDKafkaErrorCode::AutoOffsetReset))) => {
                SourceEvent::OutOfRange
            }
            Some(Err(error @ KafkaError::MessageConsumptionFatal(_))) => SourceEvent::Failed(error),
            Some(Err(error)) => SourceEvent::Trouble(error),
        };
        self.outbox.push_back(event);
    }

    /// Answers what is open, so that the library can leave the group.
    fn close(self) {
        let context = self.consumer.context();
        context.closing.store(true, Ordering::SeqCst);
        let told = std::mem::take(&mut *context.told.lock().unwrap_or_else(PoisonError::into_inner));
        for told in self.rebalance.map(|open| open.told).into_iter().chain(told) {
            answer(&self.consumer, told.assign, &told.places, &BTreeMap::new());
        }
    }
}

/// Copies a record out of the client, unless it is too large.
fn detach(message: &BorrowedMessage<'_>, max_record_bytes: usize) -> Record {
    let value = match message.payload() {
        None | Some([]) => Value::Empty,
        Some(payload) if payload.len() > max_record_bytes => Value::Oversized { bytes: payload.len() },
        Some(payload) => Value::Bytes(Bytes::copy_from_slice(payload)),
    };
    let headers = message.headers().map(|headers| {
        let copy = |value: Option<&[u8]>| Bytes::copy_from_slice(value.unwrap_or_default());
        headers.iter().map(|header| (header.key.to_owned(), copy(header.value))).collect()
    });
    Record {
        topic: message.topic().to_owned(),
        partition: message.partition(),
        offset: message.offset(),
        key: message.key().map(Bytes::copy_from_slice),
        timestamp: message.timestamp().to_millis().map(EventTime),
        headers: headers.unwrap_or_default(),
        value,
    }
}

/// Asks the broker questions, beside the consumer so that no answer waits for records.
#[derive(Clone)]
pub struct KafkaProbe {
    client: Arc<BaseConsumer>,
}

impl KafkaProbe {
    pub fn new(options: &KafkaOptions) -> KafkaResult<Self> {
        Ok(Self { client: Arc::new(options.client().create()?) })
    }

    /// The earliest offset and the last stable one.
    pub async fn bounds(&self, place: &Place) -> KafkaResult<Bounds> {
        let place = place.clone();
        self.ask(move |client| {
            let (earliest, end) = client.fetch_watermarks(&place.topic, place.partition, QUESTION_TIMEOUT)?;
            Ok(Bounds { earliest, end })
        })
        .await
    }

    /// The numbers of a topic's partitions.
    pub async fn partitions(&self, topic: &str) -> KafkaResult<BTreeSet<i32>> {
        let topic = topic.to_owned();
        self.ask(move |client| {
            let metadata = client.fetch_metadata(Some(&topic), QUESTION_TIMEOUT)?;
            let found = metadata.topics().iter().find(|t| t.name() == topic);
            match found.map(|t| (t.error(), t.partitions())) {
                Some((None, partitions)) if !partitions.is_empty() => {
                    Ok(partitions.iter().map(|p| p.id()).collect())
                }
                Some((Some(error), _)) => Err(KafkaError::MetadataFetch(error.into())),
                _ => Err(KafkaError::MetadataFetch(RDKafkaErrorCode::UnknownTopicOrPartition)),
            }
        })
        .await
    }

    async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&BaseConsumer) -> KafkaResult<T> + Send + 'static,
    ) -> KafkaResult<T> {
        let client = self.client.clone();
        tokio::task::spawn_blocking(move || question(&client)).await.unwrap_or(Err(KafkaError::Canceled))
    }
}
