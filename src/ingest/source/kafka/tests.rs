//! The thread's rounds, one by one, against an in-process broker.

use super::*;
use crate::ingest::tests::rig::{Rig, Sent, now};

fn options(rig: &Rig) -> KafkaOptions {
    let kafka = rig.settings().kafka;
    KafkaOptions {
        properties: kafka.properties,
        topics: kafka.topics,
        group: kafka.group,
        max_record_bytes: 1 << 20,
        max_in_flight_bytes: 1,
        revoke_timeout: Duration::from_secs(10),
        metadata_interval: Duration::from_secs(1),
    }
}

fn place(partition: i32) -> Place {
    Place { topic: "frames".into(), partition }
}

/// A poller that the test drives in the loop's place.
struct Driven {
    poller: Poller,
    events: mpsc::Receiver<SourceEvent>,
    commands: mpsc::Sender<SourceCommand>,
}

impl Driven {
    fn new(options: &KafkaOptions) -> Self {
        let (poller, events, commands) = Poller::new(options).unwrap();
        Self { poller, events, commands }
    }

    fn start(&self, partition: i32, offset: i64, epoch: u64) {
        let start = SourceCommand::Start { place: place(partition), offset, epoch };
        self.commands.try_send(start).unwrap();
    }

    fn step_until(&mut self, what: &str, mut holds: impl FnMut(&mut Self) -> bool) {
        let started = Instant::now();
        while !holds(self) {
            assert!(started.elapsed() < Duration::from_secs(90), "waited in vain: {what}");
            assert!(self.poller.step());
        }
    }

    /// Waits until the group has given all partitions, and starts them.
    fn join(&mut self, partitions: i32) {
        let mut assigned = 0;
        self.step_until("all are assigned", |driven| {
            while let Ok(event) = driven.events.try_recv() {
                if let SourceEvent::Assigned(places) = event {
                    assigned += places.len();
                    places.iter().for_each(|place| driven.start(place.partition, 0, 1));
                }
            }
            assigned == partitions as usize
        });
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_while_the_loop_takes_no_more_leaves_nothing_paused() {
    let rig = Rig::new(&[("frames", 2)]).await;
    let mut driven = Driven::new(&options(&rig));
    driven.join(2);
    for n in 0..6 {
        rig.send("frames", n % 2, Sent::frame(n as u8, now())).await;
    }
    // One record fills the memory, and the test holds it.
    let mut held = None;
    driven.step_until("a record is there", |driven| {
        held = driven.events.try_recv().ok().filter(|event| matches!(event, SourceEvent::Record(_)));
        held.is_some()
    });
    driven.step_until("all is paused", |driven| driven.poller.paused.is_some());
    // The round that restarts is the one in which the loop takes again, and so would forget the pause.
    drop(held);
    driven.start(0, 0, 2);
    driven.step_until("the restart is told", |driven| driven.poller.membership.epoch(&place(0)) == Some(2));
    for n in 6..12 {
        rig.send("frames", n % 2, Sent::frame(n as u8, now())).await;
    }
    let mut last = BTreeMap::new();
    driven.step_until("both are read to their end", |driven| {
        while let Ok(event) = driven.events.try_recv() {
            if let SourceEvent::Record(Received { record, epoch, .. }) = event {
                last.insert(record.partition, (record.offset, epoch));
            }
        }
        last == BTreeMap::from([(0, (5, 2)), (1, (5, 1))])
    });
    driven.poller.close();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rebalance_that_the_client_refuses_is_a_failure() {
    let rig = Rig::new(&[("frames", 1)]).await;
    let mut driven = Driven::new(&options(&rig));
    driven.join(1);
    driven.step_until("it is read", |driven| driven.poller.membership.epoch(&place(0)).is_some());
    // A partition that is read already can't be assigned again.
    let told = Told { assign: true, places: vec![place(0)], lost: false };
    driven.poller.consumer.context().told.lock().unwrap().push_back(told);
    let mut failure = None;
    driven.step_until("the failure is told", |driven| {
        match driven.events.try_recv() {
            Ok(SourceEvent::Assigned(_)) => driven.start(0, 0, 2),
            Ok(SourceEvent::Failed(error)) => failure = Some(error),
            _ => {}
        }
        failure.is_some()
    });
    assert!(matches!(failure, Some(KafkaError::Subscription(_))), "{failure:?}");
    driven.poller.close();
}
