//! The Kafka consumer, on one blocking thread.
//!
//! Owns every call into its client library. Rebalances are answered late on purpose: the library's callback
//! only notes them, the loop then looks positions up and flushes while the thread goes on polling, so neither a
//! slow registry nor a slow store costs the membership. Assignment is cooperative: a rebalance disturbs only the
//! partitions that move. A rebalance that the library refuses ends the source: it would be silent ever after.
//!
//! When the loop takes no more (its channel or the memory for records in flight is full), the thread pauses
//! its partitions and polls on. Leaves to others: which start is due when (`membership`), what a
//! record means, where a partition starts (`run`).

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use rdkafka::client::ClientContext;
use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer, ConsumerContext};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::message::{BorrowedMessage, Headers, Message};
use rdkafka::types::{RDKafkaErrorCode, RDKafkaRespErr};
use rdkafka::{Offset, TopicPartitionList};
use tokio::sync::mpsc::error::{TryRecvError, TrySendError};
use tokio::sync::{Semaphore, mpsc};

use super::membership::{Change, Membership, Start, Told};
use super::{Place, Received, SourceCommand, SourceEvent};
use crate::failpoint;
use crate::ingest::client_log;
use crate::ingest::frame::{Record, Value};
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
    /// For a client that joins no group.
    pub fn client(&self) -> ClientConfig {
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
        let (poller, events, commands) = Poller::new(options)?;
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

/// Notes rebalances for the poll loop.
#[derive(Default)]
struct GroupContext {
    told: Mutex<VecDeque<Told>>,
    closing: AtomicBool,
}

impl ClientContext for GroupContext {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        client_log::log(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        client_log::log_error(&error, reason);
    }
}

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
            note_refusal(match assign {
                true => take(consumer, &BTreeMap::new()),
                false => give_up(consumer, &places),
            });
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

/// Tells the library which partitions to read from where.
fn take<C: ConsumerContext>(consumer: &BaseConsumer<C>, starts: &BTreeMap<Place, i64>) -> KafkaResult<()> {
    let mut list = TopicPartitionList::new();
    for (place, offset) in starts {
        list.add_partition_offset(&place.topic, place.partition, Offset::Offset(*offset))?;
    }
    consumer.incremental_assign(&list)
}

/// Tells the library which partitions to read no more; those that were held were never handed over.
fn give_up<C: ConsumerContext>(consumer: &BaseConsumer<C>, places: &[Place]) -> KafkaResult<()> {
    let mut list = TopicPartitionList::new();
    for place in places.iter().filter(|place| is_read(consumer, place)) {
        list.add_partition(&place.topic, place.partition);
    }
    consumer.incremental_unassign(&list)
}

/// On the way out, when nobody reads on anyway.
fn note_refusal(answered: KafkaResult<()>) {
    if let Err(error) = answered {
        tracing::warn!(%error, "the client refused a rebalance while it was closing");
    }
}

fn is_read<C: ConsumerContext>(consumer: &BaseConsumer<C>, place: &Place) -> bool {
    consumer
        .assignment()
        .is_ok_and(|assigned| assigned.find_partition(&place.topic, place.partition).is_some())
}

struct Poller {
    consumer: BaseConsumer<GroupContext>,
    events: mpsc::Sender<SourceEvent>,
    commands: mpsc::Receiver<SourceCommand>,
    memory: Arc<Semaphore>,
    options: KafkaOptions,
    membership: Membership,
    /// What the loop has not taken yet.
    outbox: VecDeque<SourceEvent>,
    stalled_since: Option<Instant>,
    /// What was paused when the loop took no more.
    paused: Option<TopicPartitionList>,
}

impl Poller {
    fn new(
        options: &KafkaOptions,
    ) -> KafkaResult<(Self, mpsc::Receiver<SourceEvent>, mpsc::Sender<SourceCommand>)> {
        let consumer: BaseConsumer<GroupContext> =
            options.consumer().create_with_context(GroupContext::default())?;
        let topics: Vec<&str> = options.topics.iter().map(String::as_str).collect();
        consumer.subscribe(&topics)?;
        let (events_in, events) = mpsc::channel(EVENTS);
        let (commands, commands_out) = mpsc::channel(COMMANDS);
        let poller = Self {
            consumer,
            events: events_in,
            commands: commands_out,
            memory: Arc::new(Semaphore::new(options.max_in_flight_bytes.min(Semaphore::MAX_PERMITS))),
            options: options.clone(),
            membership: Membership::default(),
            outbox: VecDeque::new(),
            stalled_since: None,
            paused: None,
        };
        Ok((poller, events, commands))
    }

    fn run(mut self) {
        while self.step() {}
        self.close();
    }

    /// One round of all there is to do; `false`: end.
    fn step(&mut self) -> bool {
        if !self.obey() || !self.deliver() {
            return false;
        }
        self.next_rebalance();
        while let Some(change) = self.membership.next_change(Instant::now(), self.options.revoke_timeout) {
            self.carry_out(change);
        }
        match self.backpressure() {
            Some(wait) => self.poll(wait),
            None => std::thread::sleep(RETRY),
        }
        true
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
                SourceCommand::Start { place, offset, epoch } => {
                    self.membership.decide(place, Some(Start { offset, epoch }));
                }
                SourceCommand::Hold { place } => self.membership.decide(place, None),
                SourceCommand::Released => self.membership.released(),
                SourceCommand::Commit { place, offset } => self.commit(&place, offset),
            }
        }
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
        if self.membership.is_rebalancing() {
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
        self.membership.open(told, Instant::now());
    }

    /// Tells the library. A restart gives partitions up and takes them again at their new offset: unlike a seek
    /// this also works when the library stopped reading because the old offset was out of range.
    fn carry_out(&mut self, change: Change) {
        // The library keeps a pause over all of this. Where the loop still takes no more, the next round pauses
        // what is read by then, new partitions included.
        self.resume();
        let consumer = &self.consumer;
        let answered = match change {
            Change::Assign(starts) => take(consumer, &starts),
            Change::Unassign(places) => give_up(consumer, &places),
            Change::Restart { places, starts } => {
                give_up(consumer, &places).and_then(|()| take(consumer, &starts))
            }
        };
        let Err(error) = answered else { return };
        tracing::error!(%error, "the client refused a rebalance; all partitions are given back");
        if let Err(error) = consumer.unassign() {
            tracing::error!(%error, "the client refuses to give partitions back");
        }
        self.outbox.push_back(SourceEvent::Failed(error));
    }

    fn resume(&mut self) {
        if let Some(list) = self.paused.take()
            && let Err(error) = self.consumer.resume(&list)
        {
            tracing::error!(%error, "the client refuses to resume partitions");
        }
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
            self.resume();
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
                let Some(epoch) = self.membership.epoch(&place) else { return };
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
        for told in self.membership.unanswered().into_iter().chain(told) {
            note_refusal(match told.assign {
                true => take(&self.consumer, &BTreeMap::new()),
                false => give_up(&self.consumer, &told.places),
            });
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

#[cfg(test)]
mod tests;
