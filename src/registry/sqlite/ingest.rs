//! Topics, positions and the transaction of a flush.
//!
//! Invariant: a position moves only from the value that its mover has read (or by an operator's order), together
//! with the segments of what lies between. Leaves to `periods` which periods may take frames.

use sqlx::Row;
use sqlx::sqlite::SqliteRow;

use super::*;

pub(super) async fn open_topic(tx: &mut Tx, topic: &str, identity: &str) -> Result<TopicId> {
    let current = sqlx::query(
        "SELECT topic_id, identity FROM topics WHERE pipeline = $1 AND topic = $2 AND is_current = 1",
    )
    .bind(&tx.pipeline)
    .bind(topic)
    .fetch_optional(&mut *tx.conn)
    .await?;
    if let Some(row) = current
        && row.try_get::<&str, _>("identity")? == identity
    {
        return Ok(TopicId(row.try_get("topic_id")?));
    }
    sqlx::query("UPDATE topics SET is_current = 0 WHERE pipeline = $1 AND topic = $2")
        .bind(&tx.pipeline)
        .bind(topic)
        .execute(&mut *tx.conn)
        .await?;
    let id = next_topic_id(tx).await?;
    sqlx::query(
        "INSERT INTO topics (pipeline, topic_id, topic, identity, is_current) VALUES ($1, $2, $3, $4, 1)",
    )
    .bind(&tx.pipeline)
    .bind(&id.0)
    .bind(topic)
    .bind(identity)
    .execute(&mut *tx.conn)
    .await?;
    Ok(id)
}

/// Unique over all topics, because an object's name holds the id without the topic's name.
async fn next_topic_id(tx: &mut Tx) -> Result<TopicId> {
    let row = sqlx::query(
        "INSERT INTO pipelines (pipeline, last_generation) VALUES ($1, 1)
         ON CONFLICT (pipeline) DO UPDATE SET last_generation = pipelines.last_generation + 1
         RETURNING last_generation",
    )
    .bind(&tx.pipeline)
    .fetch_one(&mut *tx.conn)
    .await?;
    let generation: i64 = row.try_get("last_generation")?;
    Ok(TopicId(format!("g{generation:06}")))
}

pub(super) async fn register_partitions(tx: &mut Tx, partitions: &[TopicPartition]) -> Result<()> {
    for partition in partitions {
        require_topic(tx, partition).await?;
        sqlx::query(
            "INSERT INTO partitions (pipeline, topic_id, partition) VALUES ($1, $2, $3)
             ON CONFLICT (pipeline, topic_id, partition) DO NOTHING",
        )
        .bind(&tx.pipeline)
        .bind(&partition.topic_id.0)
        .bind(partition.partition)
        .execute(&mut *tx.conn)
        .await?;
    }
    Ok(())
}

async fn require_topic(tx: &mut Tx, partition: &TopicPartition) -> Result<()> {
    let TopicPartition { topic, topic_id, .. } = partition;
    sqlx::query("SELECT 1 FROM topics WHERE pipeline = $1 AND topic_id = $2 AND topic = $3")
        .bind(&tx.pipeline)
        .bind(&topic_id.0)
        .bind(topic)
        .fetch_optional(&mut *tx.conn)
        .await?
        .map(|_| ())
        .ok_or_else(|| not_found(format!("topic {topic}/{topic_id}")))
}

pub(super) async fn positions(tx: &mut Tx) -> Result<Vec<PositionRecord>> {
    let rows = sqlx::query(
        "SELECT t.topic, p.* FROM partitions p JOIN topics t USING (pipeline, topic_id)
          WHERE pipeline = $1 AND t.is_current = 1
          ORDER BY t.topic, p.partition",
    )
    .bind(&tx.pipeline)
    .fetch_all(&mut *tx.conn)
    .await?;
    rows.iter().map(read_position).collect()
}

pub(super) async fn position(tx: &mut Tx, partition: &TopicPartition) -> Result<Option<PositionRecord>> {
    let row = sqlx::query(
        "SELECT t.topic, p.* FROM partitions p JOIN topics t USING (pipeline, topic_id)
          WHERE pipeline = $1 AND topic_id = $2 AND t.topic = $3 AND p.partition = $4",
    )
    .bind(&tx.pipeline)
    .bind(&partition.topic_id.0)
    .bind(&partition.topic)
    .bind(partition.partition)
    .fetch_optional(&mut *tx.conn)
    .await?;
    row.as_ref().map(read_position).transpose()
}

fn read_position(row: &SqliteRow) -> Result<PositionRecord> {
    let answered_at: Option<i64> = row.try_get("caught_up_answered_ms")?;
    let quiet_since: Option<i64> = row.try_get("caught_up_quiet_ms")?;
    Ok(PositionRecord {
        partition: TopicPartition {
            topic: row.try_get("topic")?,
            topic_id: TopicId(row.try_get("topic_id")?),
            partition: row.try_get("partition")?,
        },
        position: row.try_get("position")?,
        watermark: row.try_get::<Option<i64>, _>("watermark_ms")?.map(EventTime),
        caught_up: answered_at.zip(quiet_since).map(|(answered_at, quiet_since)| CaughtUp {
            answered_at: EventTime(answered_at),
            quiet_since: EventTime(quiet_since),
        }),
    })
}

pub(super) async fn start_position(tx: &mut Tx, partition: &TopicPartition, start: i64) -> Result<i64> {
    require_topic(tx, partition).await?;
    let row = sqlx::query(
        "INSERT INTO partitions (pipeline, topic_id, partition, position) VALUES ($1, $2, $3, $4)
         ON CONFLICT (pipeline, topic_id, partition) DO UPDATE
            SET position = coalesce(partitions.position, excluded.position)
         RETURNING position",
    )
    .bind(&tx.pipeline)
    .bind(&partition.topic_id.0)
    .bind(partition.partition)
    .bind(start)
    .fetch_one(&mut *tx.conn)
    .await?;
    Ok(row.try_get("position")?)
}

pub(super) async fn reset_position(tx: &mut Tx, partition: &TopicPartition, position: i64) -> Result<()> {
    require_topic(tx, partition).await?;
    let done = sqlx::query(
        "UPDATE partitions
            SET position = $4, caught_up_answered_ms = NULL, caught_up_quiet_ms = NULL
          WHERE pipeline = $1 AND topic_id = $2 AND partition = $3",
    )
    .bind(&tx.pipeline)
    .bind(&partition.topic_id.0)
    .bind(partition.partition)
    .bind(position)
    .execute(&mut *tx.conn)
    .await?;
    match done.rows_affected() {
        0 => Err(not_found(format!("partition {partition}"))),
        _ => Ok(()),
    }
}

pub(super) async fn commit_flush(tx: &mut Tx, flush: &Flush) -> Result<()> {
    check_shape(flush)?;
    move_position(tx, flush).await?;
    for segment in &flush.segments {
        open_period_of(tx, flush, segment).await?;
        insert_segment(tx, segment).await?;
    }
    if let Some(lost) = flush.lost {
        record_lost(tx, &flush.partition, lost).await?;
    }
    Ok(())
}

/// Whether the flush is one: what it says of itself in several places must agree.
fn check_shape(flush: &Flush) -> Result<()> {
    let Flush { partition, offsets, .. } = flush;
    let wrong = |found: String, expected| {
        Err(RegistryError::WrongState {
            what: format!("the flush {offsets} of {partition}"),
            found,
            expected,
        })
    };
    if offsets.start > offsets.end {
        return wrong("backwards".into(), "forwards");
    }
    for (i, segment) in flush.segments.iter().enumerate() {
        if segment.partition != *partition || segment.flush != *offsets {
            let of = format!("with a segment of {} {}", segment.partition, segment.flush);
            return wrong(of, "of one partition and one range");
        }
        if flush.segments[..i].iter().any(|s| s.period == segment.period) {
            let twice = format!("with two segments of {}", segment.period);
            return wrong(twice, "with one segment a period");
        }
    }
    match flush.lost {
        Some(lost) if lost.start < offsets.start || lost.end > offsets.end => {
            wrong(format!("with {lost} lost"), "around what it lost")
        }
        _ => Ok(()),
    }
}

/// The compare-and-swap.
async fn move_position(tx: &mut Tx, flush: &Flush) -> Result<()> {
    let done = sqlx::query(
        "UPDATE partitions
            SET position = $5, caught_up_answered_ms = NULL, caught_up_quiet_ms = NULL,
                watermark_ms = CASE WHEN $6 > watermark_ms OR watermark_ms IS NULL THEN $6
                                    ELSE watermark_ms END
          WHERE pipeline = $1 AND topic_id = $2 AND partition = $3 AND position = $4",
    )
    .bind(&tx.pipeline)
    .bind(&flush.partition.topic_id.0)
    .bind(flush.partition.partition)
    .bind(flush.offsets.start)
    .bind(flush.offsets.end)
    .bind(flush.watermark.map(EventTime::as_ms))
    .execute(&mut *tx.conn)
    .await?;
    match done.rows_affected() {
        0 => Err(position_moved(tx, &flush.partition, flush.offsets.start).await?),
        _ => Ok(()),
    }
}

async fn position_moved(tx: &mut Tx, partition: &TopicPartition, expected: i64) -> Result<RegistryError> {
    let record = position(tx, partition).await?;
    Ok(RegistryError::PositionMoved {
        partition: partition.clone(),
        expected,
        found: record.and_then(|record| record.position),
    })
}

/// Makes the segment's period where it is missing, and refuses it where it takes no frames any more.
async fn open_period_of(tx: &mut Tx, flush: &Flush, segment: &SegmentRecord) -> Result<()> {
    let period = segment.period;
    match flush.periods.iter().find(|bounds| bounds.id == period) {
        Some(bounds) => periods::make_open(tx, *bounds).await,
        None => match periods::period(tx, period).await?.state {
            PeriodState::Open => Ok(()),
            _ => Err(RegistryError::PeriodSealed { period }),
        },
    }
}

/// A row of the same object is there only after an operator has reset the position to before it: the object,
/// named by its hash, holds these frames already.
async fn insert_segment(tx: &mut Tx, segment: &SegmentRecord) -> Result<()> {
    sqlx::query(
        "INSERT INTO segments (pipeline, path, period_ms, topic_id, partition, flush_start, flush_end,
                               sha256, bytes, frames, captured_min_ms, captured_max_ms)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)
         ON CONFLICT (pipeline, path) DO NOTHING",
    )
    .bind(&tx.pipeline)
    .bind(&segment.file.path)
    .bind(segment.period.start().as_ms())
    .bind(&segment.partition.topic_id.0)
    .bind(segment.partition.partition)
    .bind(segment.flush.start)
    .bind(segment.flush.end)
    .bind(&segment.file.sha256.0)
    .bind(db(segment.file.bytes))
    .bind(db(segment.frames))
    .bind(segment.captured_min.as_ms())
    .bind(segment.captured_max.as_ms())
    .execute(&mut *tx.conn)
    .await?;
    Ok(())
}

async fn record_lost(tx: &mut Tx, partition: &TopicPartition, lost: OffsetRange) -> Result<()> {
    sqlx::query(
        "INSERT INTO lost_ranges (pipeline, topic_id, partition, start_offset, end_offset)
         VALUES ($1, $2, $3, $4, $5)
         ON CONFLICT (pipeline, topic_id, partition, start_offset) DO UPDATE
            SET end_offset = max(lost_ranges.end_offset, excluded.end_offset)",
    )
    .bind(&tx.pipeline)
    .bind(&partition.topic_id.0)
    .bind(partition.partition)
    .bind(lost.start)
    .bind(lost.end)
    .execute(&mut *tx.conn)
    .await?;
    Ok(())
}

pub(super) async fn report_caught_up(
    tx: &mut Tx,
    partition: &TopicPartition,
    position: i64,
    report: Option<CaughtUp>,
) -> Result<()> {
    let done = sqlx::query(
        "UPDATE partitions SET caught_up_answered_ms = $5, caught_up_quiet_ms = $6
          WHERE pipeline = $1 AND topic_id = $2 AND partition = $3 AND position = $4",
    )
    .bind(&tx.pipeline)
    .bind(&partition.topic_id.0)
    .bind(partition.partition)
    .bind(position)
    .bind(report.map(|report| report.answered_at.as_ms()))
    .bind(report.map(|report| report.quiet_since.as_ms()))
    .execute(&mut *tx.conn)
    .await?;
    match done.rows_affected() {
        0 => Err(position_moved(tx, partition, position).await?),
        _ => Ok(()),
    }
}

pub(super) async fn advance_watermark(tx: &mut Tx, watermark: EventTime) -> Result<()> {
    sqlx::query(
        "INSERT INTO pipelines (pipeline, watermark_ms) VALUES ($1, $2)
         ON CONFLICT (pipeline) DO UPDATE
            SET watermark_ms = max(coalesce(pipelines.watermark_ms, excluded.watermark_ms),
                                   excluded.watermark_ms)",
    )
    .bind(&tx.pipeline)
    .bind(watermark.as_ms())
    .execute(&mut *tx.conn)
    .await?;
    Ok(())
}

pub(super) async fn watermark(tx: &mut Tx) -> Result<Option<EventTime>> {
    let row = sqlx::query("SELECT watermark_ms FROM pipelines WHERE pipeline = $1")
        .bind(&tx.pipeline)
        .fetch_optional(&mut *tx.conn)
        .await?;
    let Some(row) = row else { return Ok(None) };
    Ok(row.try_get::<Option<i64>, _>("watermark_ms")?.map(EventTime))
}
