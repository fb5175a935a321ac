//! Periods and their segments: making, sealing, merging, retrying, expiring.
//!
//! Invariants: periods don't overlap; every period before one that is not open is not open either; segments join
//! a period only while it is open. Leaves to `learner` and `versions` the states between sealed and settled.

use sqlx::Row;
use sqlx::sqlite::SqliteRow;

use super::*;

/// What [`Registry::seal`] takes beside the lease.
pub(super) struct SealOrder {
    pub id: PeriodId,
    pub min_frames: u64,
    pub next: PeriodBounds,
    pub now: EventTime,
}

/// All periods, or the one whose start is `$2`.
const SELECT_PERIODS: &str = "
    SELECT p.*,
           coalesce(p.final_frames, s.frames, 0) AS frames,
           coalesce(p.final_bytes, s.bytes, 0) AS bytes,
           coalesce(a.newest, 0) AS attempt,
           v.version
      FROM periods p
      LEFT JOIN (SELECT period_ms, sum(frames) AS frames, sum(bytes) AS bytes FROM segments
                  WHERE pipeline = $1 AND ($2 IS NULL OR period_ms = $2) GROUP BY period_ms) s
             ON s.period_ms = p.period_ms
      LEFT JOIN (SELECT period_ms, max(number) AS newest FROM attempts
                  WHERE pipeline = $1 GROUP BY period_ms) a
             ON a.period_ms = p.period_ms
      LEFT JOIN versions v
             ON v.pipeline = p.pipeline AND v.period_ms = p.period_ms AND v.published_at_ms IS NOT NULL
     WHERE p.pipeline = $1 AND ($2 IS NULL OR p.period_ms = $2)
     ORDER BY p.period_ms";

pub(super) async fn periods(tx: &mut Tx) -> Result<Vec<PeriodRecord>> {
    let rows = sqlx::query(SELECT_PERIODS).bind(&tx.pipeline).bind(None::<i64>).fetch(&mut *tx.conn);
    read_all(rows, read_period).await
}

pub(super) async fn period(tx: &mut Tx, id: PeriodId) -> Result<PeriodRecord> {
    find(tx, id).await?.ok_or_else(|| not_found(format!("period {id}")))
}

async fn find(tx: &mut Tx, id: PeriodId) -> Result<Option<PeriodRecord>> {
    let row = sqlx::query(SELECT_PERIODS)
        .bind(&tx.pipeline)
        .bind(id.start().as_ms())
        .fetch_optional(&mut *tx.conn)
        .await?;
    row.as_ref().map(read_period).transpose()
}

fn read_period(row: &SqliteRow) -> Result<PeriodRecord> {
    let instant = |column: &str| -> Result<_> { Ok(row.try_get::<Option<i64>, _>(column)?.map(EventTime)) };
    Ok(PeriodRecord {
        id: period_id(row, "period_ms")?,
        end: EventTime(row.try_get("end_ms")?),
        state: state(row.try_get("state")?)?,
        frames: row.try_get("frames")?,
        bytes: row.try_get("bytes")?,
        close_requested: row.try_get("close_requested")?,
        sealed_at: instant("sealed_at_ms")?,
        settled_at: instant("settled_at_ms")?,
        merged_into: instant("merged_into_ms")?.map(PeriodId),
        version: row.try_get::<Option<u64>, _>("version")?.map(Version),
        reason: row.try_get("reason")?,
        retries: row.try_get("retries")?,
        attempt: row.try_get("attempt")?,
    })
}

fn state(text: &str) -> Result<PeriodState> {
    PeriodState::parse(text)
        .ok_or_else(|| RegistryError::Corrupt { what: "a period's state", value: text.to_owned() })
}

pub(super) fn period_id(row: &SqliteRow, column: &str) -> Result<PeriodId> {
    Ok(PeriodId(EventTime(row.try_get(column)?)))
}

pub(super) fn wrong_state(record: &PeriodRecord, expected: &'static str) -> RegistryError {
    RegistryError::WrongState {
        what: format!("period {}", record.id),
        found: record.state.as_str().to_owned(),
        expected,
    }
}

/// Makes the period if it is missing, and refuses one that takes no frames any more.
pub(super) async fn make_open(tx: &mut Tx, bounds: PeriodBounds) -> Result<()> {
    match find(tx, bounds.id).await? {
        Some(record) if record.end != bounds.end => Err(RegistryError::WrongState {
            what: format!("period {}", bounds.id),
            found: format!("known to end at {}", record.end),
            expected: "known with the end given",
        }),
        Some(record) if record.state == PeriodState::Open => Ok(()),
        Some(record) => Err(RegistryError::PeriodSealed { period: record.id }),
        None => insert(tx, bounds).await,
    }
}

async fn insert(tx: &mut Tx, bounds: PeriodBounds) -> Result<()> {
    let others = sqlx::query(
        "SELECT period_ms, state FROM periods
          WHERE pipeline = $1 AND ((period_ms > $2 AND state <> 'open') OR (period_ms < $3 AND end_ms > $2))
          ORDER BY state = 'open', period_ms",
    )
    .bind(&tx.pipeline)
    .bind(bounds.id.start().as_ms())
    .bind(bounds.end.as_ms())
    .fetch_optional(&mut *tx.conn)
    .await?;
    if let Some(other) = others {
        let (id, other_state) = (period_id(&other, "period_ms")?, other.try_get("state")?);
        if id > bounds.id && state(other_state)? != PeriodState::Open {
            return Err(RegistryError::PeriodSealed { period: bounds.id });
        }
        return Err(RegistryError::WrongState {
            what: format!("period {}", bounds.id),
            found: format!("overlapping period {id}"),
            expected: "apart from all others",
        });
    }
    sqlx::query("INSERT INTO periods (pipeline, period_ms, end_ms, state) VALUES ($1, $2, $3, 'open')")
        .bind(&tx.pipeline)
        .bind(bounds.id.start().as_ms())
        .bind(bounds.end.as_ms())
        .execute(&mut *tx.conn)
        .await?;
    Ok(())
}

pub(super) async fn segments(tx: &mut Tx, period: PeriodId) -> Result<Vec<SegmentRecord>> {
    let rows = sqlx::query(
        "SELECT t.topic, s.* FROM segments s JOIN topics t USING (pipeline, topic_id)
          WHERE pipeline = $1 AND s.period_ms = $2
          ORDER BY t.topic, topic_id, s.partition, s.flush_start, s.path",
    )
    .bind(&tx.pipeline)
    .bind(period.start().as_ms())
    .fetch_all(&mut *tx.conn)
    .await?;
    rows.iter().map(read_segment).collect()
}

fn read_segment(row: &SqliteRow) -> Result<SegmentRecord> {
    Ok(SegmentRecord {
        period: period_id(row, "period_ms")?,
        partition: TopicPartition {
            topic: row.try_get("topic")?,
            topic_id: TopicId(row.try_get("topic_id")?),
            partition: row.try_get("partition")?,
        },
        flush: OffsetRange { start: row.try_get("flush_start")?, end: row.try_get("flush_end")? },
        file: read_file(row)?,
        frames: row.try_get("frames")?,
        captured_min: EventTime(row.try_get("captured_min_ms")?),
        captured_max: EventTime(row.try_get("captured_max_ms")?),
    })
}

pub(super) fn read_file(row: &SqliteRow) -> Result<FileRef> {
    Ok(FileRef {
        path: row.try_get("path")?,
        sha256: crate::types::Sha256(row.try_get("sha256")?),
        bytes: row.try_get("bytes")?,
    })
}

pub(super) async fn live_objects(tx: &mut Tx) -> Result<LiveObjects> {
    let paths = sqlx::query("SELECT path FROM segments WHERE pipeline = $1")
        .bind(&tx.pipeline)
        .fetch_all(&mut *tx.conn)
        .await?;
    let positions = sqlx::query(
        "SELECT topic_id, partition, position FROM partitions
          WHERE pipeline = $1 AND position IS NOT NULL",
    )
    .bind(&tx.pipeline)
    .fetch_all(&mut *tx.conn)
    .await?;
    Ok(LiveObjects {
        paths: paths.iter().map(|row| row.try_get("path")).collect::<sqlx::Result<_>>()?,
        positions: positions
            .iter()
            .map(|row| {
                let key = (TopicId(row.try_get("topic_id")?), row.try_get("partition")?);
                Ok((key, row.try_get("position")?))
            })
            .collect::<sqlx::Result<_>>()?,
    })
}

pub(super) async fn request_close(tx: &mut Tx, id: PeriodId) -> Result<()> {
    let record = period(tx, id).await?;
    if record.state != PeriodState::Open {
        return Err(wrong_state(&record, "open"));
    }
    sqlx::query("UPDATE periods SET close_requested = 1 WHERE pipeline = $1 AND period_ms = $2")
        .bind(&tx.pipeline)
        .bind(id.start().as_ms())
        .execute(&mut *tx.conn)
        .await?;
    Ok(())
}

pub(super) async fn seal(
    tx: &mut Tx,
    lease: &Lease,
    order: &SealOrder,
) -> Result<Vec<(PeriodId, SealOutcome)>> {
    leases::check(tx, lease).await?;
    period(tx, order.id).await?;
    let rows = sqlx::query(
        "SELECT period_ms FROM periods
          WHERE pipeline = $1 AND period_ms <= $2 AND state = 'open' ORDER BY period_ms",
    )
    .bind(&tx.pipeline)
    .bind(order.id.start().as_ms())
    .fetch_all(&mut *tx.conn)
    .await?;
    let mut outcomes = Vec::with_capacity(rows.len());
    for row in &rows {
        let id = period_id(row, "period_ms")?;
        outcomes.push((id, close(tx, id, order).await?));
    }
    Ok(outcomes)
}

/// Closes the oldest open period.
async fn close(tx: &mut Tx, id: PeriodId, order: &SealOrder) -> Result<SealOutcome> {
    let record = period(tx, id).await?;
    if record.frames < order.min_frames {
        let into = merge_target(tx, id, order.next).await?;
        merge(tx, &record, into, order.now).await?;
        return Ok(SealOutcome::Merged { into, frames: record.frames });
    }
    sqlx::query(
        "UPDATE periods SET state = 'sealed', sealed_at_ms = $3 WHERE pipeline = $1 AND period_ms = $2",
    )
    .bind(&tx.pipeline)
    .bind(id.start().as_ms())
    .bind(order.now.as_ms())
    .execute(&mut *tx.conn)
    .await?;
    Ok(SealOutcome::Sealed { frames: record.frames })
}

/// The oldest open period after `id`, or `next`, which is made.
async fn merge_target(tx: &mut Tx, id: PeriodId, next: PeriodBounds) -> Result<PeriodId> {
    let later = sqlx::query(
        "SELECT period_ms FROM periods
          WHERE pipeline = $1 AND period_ms > $2 AND state = 'open' ORDER BY period_ms LIMIT 1",
    )
    .bind(&tx.pipeline)
    .bind(id.start().as_ms())
    .fetch_optional(&mut *tx.conn)
    .await?;
    if let Some(row) = later {
        return period_id(&row, "period_ms");
    }
    if next.id <= id {
        return Err(RegistryError::WrongState {
            what: format!("period {}, which was given as the next one", next.id),
            found: format!("not after {id}"),
            expected: "after the period that closes",
        });
    }
    make_open(tx, next).await?;
    Ok(next.id)
}

async fn merge(tx: &mut Tx, record: &PeriodRecord, into: PeriodId, now: EventTime) -> Result<()> {
    sqlx::query("UPDATE segments SET period_ms = $3 WHERE pipeline = $1 AND period_ms = $2")
        .bind(&tx.pipeline)
        .bind(record.id.start().as_ms())
        .bind(into.start().as_ms())
        .execute(&mut *tx.conn)
        .await?;
    sqlx::query(
        "UPDATE periods
            SET state = 'merged', sealed_at_ms = $3, merged_into_ms = $4, final_frames = $5, final_bytes = $6
          WHERE pipeline = $1 AND period_ms = $2",
    )
    .bind(&tx.pipeline)
    .bind(record.id.start().as_ms())
    .bind(now.as_ms())
    .bind(into.start().as_ms())
    .bind(db(record.frames))
    .bind(db(record.bytes))
    .execute(&mut *tx.conn)
    .await?;
    Ok(())
}

pub(super) async fn retry(tx: &mut Tx, id: PeriodId) -> Result<()> {
    let record = period(tx, id).await?;
    if !matches!(record.state, PeriodState::Rejected | PeriodState::Failed) {
        return Err(wrong_state(&record, "rejected or failed"));
    }
    let later =
        sqlx::query("SELECT min(period_ms) AS later FROM attempts WHERE pipeline = $1 AND period_ms > $2")
            .bind(&tx.pipeline)
            .bind(id.start().as_ms())
            .fetch_one(&mut *tx.conn)
            .await?;
    if let Some(later) = later.try_get::<Option<i64>, _>("later")? {
        return Err(RegistryError::WrongState {
            what: format!("period {id}"),
            found: format!("behind period {}", PeriodId(EventTime(later))),
            expected: "the last one that was trained on",
        });
    }
    sqlx::query(
        "UPDATE periods SET state = 'sealed', settled_at_ms = NULL, reason = NULL, retries = retries + 1
          WHERE pipeline = $1 AND period_ms = $2",
    )
    .bind(&tx.pipeline)
    .bind(id.start().as_ms())
    .execute(&mut *tx.conn)
    .await?;
    Ok(())
}

pub(super) async fn expire(tx: &mut Tx, lease: &Lease, id: PeriodId, now: EventTime) -> Result<Vec<FileRef>> {
    leases::check(tx, lease).await?;
    let record = period(tx, id).await?;
    match record.state {
        PeriodState::Published | PeriodState::Rejected | PeriodState::Failed => {}
        PeriodState::Expired => return Ok(Vec::new()),
        _ => return Err(wrong_state(&record, "published, rejected or failed")),
    }
    let objects = segments(tx, id).await?;
    sqlx::query("DELETE FROM segments WHERE pipeline = $1 AND period_ms = $2")
        .bind(&tx.pipeline)
        .bind(id.start().as_ms())
        .execute(&mut *tx.conn)
        .await?;
    sqlx::query(
        "UPDATE periods SET state = 'expired', expired_at_ms = $3, final_frames = $4, final_bytes = $5
          WHERE pipeline = $1 AND period_ms = $2",
    )
    .bind(&tx.pipeline)
    .bind(id.start().as_ms())
    .bind(now.as_ms())
    .bind(db(record.frames))
    .bind(db(record.bytes))
    .execute(&mut *tx.conn)
    .await?;
    Ok(objects.into_iter().map(|segment| segment.file).collect())
}
