//! The loop against an in-process broker, a SQLite registry and a local store.

pub mod rig;

use std::sync::Arc;

use arrow_array::{ArrayRef, BinaryArray, RecordBatch};
use arrow_ipc::writer::StreamWriter;
use bytes::Bytes;

use self::rig::{HOUR_MS, Rig, Sent, eventually, jpeg, now};
use super::frame::{ARROW_STREAM, CAPTURED_AT, CONTENT_TYPE, FRAME, WATERMARK_JSON, punctuation_value};
use super::window::IdleMode;
use crate::registry::{Flush, PeriodBounds, Registry};
use crate::store::Op;
use crate::types::{EventTime, OffsetRange, PeriodId};

fn arrow_of(frames: &[&[u8]]) -> Vec<u8> {
    let frames = Arc::new(BinaryArray::from_vec(frames.to_vec())) as ArrayRef;
    let batch = RecordBatch::try_from_iter([(FRAME, frames)]).unwrap();
    let mut writer = StreamWriter::try_new(Vec::new(), &batch.schema()).unwrap();
    writer.write(&batch).unwrap();
    writer.into_inner().unwrap()
}

fn huge_png() -> Vec<u8> {
    // Signature, header of 30,000 x 30,000 at 8 bit RGB with its checksum, and the start of pixel data.
    let mut bytes = b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR\0\0\x75\x30\0\0\x75\x30\x08\x02\0\0\0".to_vec();
    let crc = bytes[12..].iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0xEDB8_8320 & (crc & 1).wrapping_neg()))
    });
    bytes.extend_from_slice(&(!crc).to_be_bytes());
    bytes.extend_from_slice(b"\0\0\0\x10IDAT\x78\x9c");
    bytes.extend_from_slice(&[0; 14]);
    bytes
}

/// Every bad input on two topics: each is dead-lettered with its reason and place, and the frame after it arrives.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_input_is_dead_lettered_with_reason_and_place_and_the_next_frame_arrives() {
    let rig = Rig::new(&[("left", 2), ("right", 1)]).await;
    let whole = jpeg(1);
    let mut broken = arrow_of(&[&whole, &whole]);
    broken.truncate(broken.len() - 30);
    let with_bad_row = arrow_of(&[&whole, &whole[..50]]);
    let typed = |content_type: &str, value: Vec<u8>| Sent::new(value).header(CONTENT_TYPE, content_type);
    let at = |ms: i64| typed("image/jpeg", whole.to_vec()).header(CAPTURED_AT, &ms.to_string());
    let bad: Vec<(Sent, &str, &str)> = vec![
        (typed("image/jpeg", whole[..whole.len() / 2].to_vec()), "undecodable_image", ""),
        (typed("image/png", huge_png()), "too_many_pixels", ""),
        (typed("image/jpeg", vec![]), "empty_value", ""),
        (typed("text/html", whole.to_vec()), "unknown_content_type", ""),
        (Sent::new(whole.to_vec()), "missing_content_type", ""),
        (typed(ARROW_STREAM, broken), "broken_arrow_stream", ""),
        (typed(ARROW_STREAM, with_bad_row), "undecodable_image", "1"),
        (at(0), "captured_too_early", ""),
        (at(4_070_908_800_000), "captured_ahead_of_clock", ""),
        (typed("image/jpeg", vec![0xFF; 40 << 20]), "record_too_large", ""),
    ];
    let run = rig.start(|_| ());
    let mut expected = Vec::new();
    let mut frames = 0;
    for (topic, partition) in [("left", 0), ("left", 1), ("right", 0)] {
        // The broker keeps 5 MiB: the large one goes where nothing else waits, and is read before more comes.
        let large_only = partition == 1;
        for (sent, reason, row) in bad.iter().filter(|bad| (bad.1 == "record_too_large") == large_only) {
            let offset = rig.send(topic, partition, sent.clone()).await;
            expected.push((reason.to_string(), topic.to_owned(), partition, offset, row.to_string()));
            frames += usize::from(!row.is_empty());
        }
        if large_only {
            eventually("the large record is passed", async || rig.position(topic, partition).await == 1)
                .await;
            // When this broker drops all that it had, it counts the record that comes as dropped, too.
            rig.send(topic, partition, Sent::punctuation(now())).await;
        }
        rig.send(topic, partition, Sent::frame(1, now())).await;
        frames += 1;
    }
    eventually("every good frame is stored", async || rig.stored().await.len() == frames).await;
    run.stop().await;
    let mut letters = rig.dead_letters(expected.len());
    letters.sort();
    expected.sort();
    assert_eq!(letters, expected);
    assert_eq!(expected.len(), 2 * 9 + 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_and_a_restart_store_each_frame_exactly_once() {
    let rig = Rig::new(&[("frames", 2)]).await;
    let run = rig.start(|settings| settings.flush.max_bytes = 4_000);
    for n in 0..40 {
        rig.send("frames", n % 2, Sent::frame(n as u8, now())).await;
    }
    eventually("something is flushed", async || !rig.stored().await.is_empty()).await;
    run.stop().await;
    for n in 40..60 {
        rig.send("frames", n % 2, Sent::frame(n as u8, now())).await;
    }
    let run = rig.start(|_| ());
    eventually("all is stored", async || rig.stored().await.len() >= 60).await;
    run.stop().await;
    let mut stored = rig.stored().await;
    stored.sort();
    let expected: Vec<_> = (0..2).flat_map(|p| (0..30).map(move |offset| (p, offset, 0))).collect();
    assert_eq!(stored, expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_orderly_stop_flushes_what_is_in_memory() {
    let rig = Rig::new(&[("frames", 1)]).await;
    let run = rig.start(Rig::keep_in_memory);
    for n in 0..5 {
        rig.send("frames", 0, Sent::frame(n, now())).await;
    }
    eventually("the records are in memory", async || rig.reads("frames", 0).await).await;
    run.stop().await;
    // However many had been read when it stopped, those and only those are stored.
    assert_eq!(rig.stored().await.len() as i64, rig.position("frames", 0).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rival_that_moved_the_position_makes_the_loop_read_anew_from_there() {
    let rig = Rig::new(&[("frames", 1)]).await;
    let run = rig.start(Rig::keep_in_memory);
    for n in 0..6 {
        rig.send("frames", 0, Sent::frame(n, now())).await;
    }
    eventually("the start is recorded", async || rig.reads("frames", 0).await).await;
    // The rival took offsets 0-4.
    let id = rig.id("frames", 0).await;
    let rival = Flush {
        partition: id.clone(),
        offsets: OffsetRange { start: 0, end: 4 },
        watermark: None,
        segments: vec![],
        periods: vec![],
        lost: None,
    };
    rig.registry.commit_flush(&rival).await.unwrap();
    rig.send("frames", 0, Sent::punctuation(now())).await;
    eventually("the rest is stored", async || rig.position("frames", 0).await == 7).await;
    run.stop().await;
    let mut stored = rig.stored().await;
    stored.sort();
    assert_eq!(stored, vec![(0, 4, 0), (0, 5, 0)]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_frame_joins_the_open_period() {
    let rig = Rig::new(&[("frames", 1)]).await;
    let hour = now().as_ms() / HOUR_MS * HOUR_MS - 5 * HOUR_MS;
    let period = |n: i64| PeriodBounds {
        id: PeriodId(EventTime(hour + n * HOUR_MS)),
        end: EventTime(hour + (n + 1) * HOUR_MS),
    };
    let run = rig.start(|_| ());
    rig.send("frames", 0, Sent::frame(0, EventTime(hour + 1))).await;
    eventually("the first period exists", async || rig.stored().await.len() == 1).await;
    let lease = rig.registry.acquire_lease("learner", "me", 60_000, now()).await.unwrap().unwrap();
    rig.registry.seal(&lease, period(0).id, 0, period(1), now()).await.unwrap();
    rig.send("frames", 0, Sent::frame(1, EventTime(hour + 2 * HOUR_MS))).await;
    rig.send("frames", 0, Sent::frame(2, EventTime(hour + 2))).await;
    eventually("both are stored", async || rig.stored().await.len() == 3).await;
    run.stop().await;
    // Where a flush cut between the two, the late one had no open period yet and made the next.
    let sealed = rig.registry.segments(period(0).id).await.unwrap();
    assert_eq!(sealed.iter().map(|s| s.frames).sum::<u64>(), 1);
    let open = rig.registry.periods().await.unwrap().into_iter().filter(|p| p.id != period(0).id);
    assert_eq!(open.map(|p| p.frames).sum::<u64>(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_goes_down_and_up_loses_nothing() {
    let rig = Rig::new(&[("frames", 1)]).await;
    rig.faults.take_down(&[Op::Put]);
    let run = rig.start(|_| ());
    for n in 0..10 {
        rig.send("frames", 0, Sent::frame(n, now())).await;
    }
    eventually("the trouble is told", async || {
        run.status.trouble().is_some_and(|trouble| trouble.contains("store"))
    })
    .await;
    assert_eq!(rig.position("frames", 0).await, 0);
    rig.faults.recover();
    eventually("all is stored", async || rig.stored().await.len() == 10).await;
    eventually("the trouble is over", async || run.status.trouble().is_none()).await;
    run.stop().await;
    let mut stored = rig.stored().await;
    stored.sort();
    assert_eq!(stored, (0..10).map(|offset| (0, offset, 0)).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_quiet_topic_lets_the_wall_clock_move_the_watermark_unless_it_holds() {
    for (mode, moves) in [(IdleMode::WallClock, true), (IdleMode::Hold, false)] {
        let rig = Rig::new(&[("frames", 2)]).await;
        let captured = now().minus_ms(3 * HOUR_MS);
        rig.send("frames", 0, Sent::frame(0, captured)).await;
        rig.send("frames", 1, Sent::frame(0, captured)).await;
        let run = rig.start(|settings| settings.idle.mode = mode);
        if moves {
            let started = now();
            eventually("the clock counts", async || {
                rig.registry.watermark().await.unwrap() >= Some(started.minus_ms(1000))
            })
            .await;
        } else {
            eventually("both are caught up", async || {
                let positions = rig.registry.positions().await.unwrap();
                let read = positions.iter().filter(|p| p.position == Some(1));
                read.clone().count() == 2
                    && read.into_iter().all(|p| {
                        p.caught_up.is_some_and(|r| r.answered_at.as_ms() - r.quiet_since.as_ms() > 1000)
                    })
            })
            .await;
            assert_eq!(rig.registry.watermark().await.unwrap(), Some(captured));
        }
        run.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partition_nobody_reads_holds_the_watermark_back_and_a_punctuation_moves_it() {
    let rig = Rig::new(&[("frames", 2)]).await;
    let run = rig.start(|settings| settings.idle.mode = IdleMode::Hold);
    let stated = now().minus_ms(HOUR_MS);
    rig.send("frames", 0, Sent::punctuation(stated)).await;
    eventually("one is punctuated", async || rig.position("frames", 0).await == 1).await;
    assert_eq!(rig.registry.watermark().await.unwrap(), None);
    rig.send("frames", 1, Sent::punctuation(stated)).await;
    eventually("the stream moves", async || rig.registry.watermark().await.unwrap() == Some(stated)).await;
    run.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_retention_removed_is_passed_and_a_position_beyond_the_end_stops_until_reset() {
    let rig = Rig::new(&[("frames", 2)]).await;
    for partition in 0..2 {
        let id = rig.id("frames", partition).await;
        rig.registry.register_partitions(std::slice::from_ref(&id)).await.unwrap();
        rig.registry.start_position(&id, i64::from(partition) * 100).await.unwrap();
    }
    // More than the broker keeps: values that are no image are enough.
    for _ in 0..12 {
        rig.send("frames", 0, Sent::new(vec![0; 600_000])).await;
    }
    rig.send("frames", 0, Sent::frame(0, now())).await;
    rig.send("frames", 1, Sent::frame(0, now())).await;
    let run = rig.start(|_| ());
    eventually("the gap is passed", async || rig.position("frames", 0).await == 13).await;
    assert_eq!(rig.stored().await, vec![(0, 12, 0)]);
    assert_eq!(rig.position("frames", 1).await, 100);
    let id = rig.id("frames", 1).await;
    rig.registry.reset_position(&id, 0).await.unwrap();
    eventually("it is read after the reset", async || rig.stored().await.len() == 2).await;
    run.stop().await;
    assert!(rig.dead_letters(1).len() < 12, "the removed ones were never read");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_members_share_the_partitions_and_double_nothing() {
    let rig = Rig::new(&[("frames", 4)]).await;
    let first = rig.start(|settings| settings.flush.max_bytes = 4_000);
    for n in 0..40 {
        rig.send("frames", n % 4, Sent::frame(n as u8, now())).await;
    }
    eventually("the first reads", async || first.status.assigned() == 4).await;
    let second = rig.start(|settings| settings.flush.max_bytes = 4_000);
    eventually("the second reads too", async || {
        second.status.assigned() == 2 && first.status.assigned() == 2
    })
    .await;
    for n in 40..80 {
        rig.send("frames", n % 4, Sent::frame(n as u8, now())).await;
    }
    first.stop().await;
    eventually("the second reads all", async || rig.stored().await.len() >= 80).await;
    second.stop().await;
    let mut stored = rig.stored().await;
    stored.sort();
    let expected: Vec<_> = (0..4).flat_map(|p| (0..20).map(move |offset| (p, offset, 0))).collect();
    assert_eq!(stored, expected);
}

impl Sent {
    fn punctuation(watermark: EventTime) -> Self {
        Self::new(Bytes::from(punctuation_value(watermark)).to_vec()).header(CONTENT_TYPE, WATERMARK_JSON)
    }
}
