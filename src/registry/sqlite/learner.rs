//! Attempts and starts, and how a period goes from sealed to its verdict.
//!
//! Invariant: whoever writes holds the lease, the attempt written to is the period's newest, and periods train in
//! order of their start. Leaves to `versions` how a period becomes published.

use sqlx::Row;
use sqlx::sqlite::SqliteRow;

use super::*;

/// What [`Registry::settle_unpublished`] takes beside the lease and the period.
pub(super) struct Verdict<'a> {
    pub state: PeriodState,
    pub reason: &'a str,
    pub now: EventTime,
}

pub(super) async fn begin_attempt(
    tx: &mut Tx,
    lease: &Lease,
    period: PeriodId,
    program_version: &str,
    lineage: Lineage,
) -> Result<AttemptRecord> {
    leases::check(tx, lease).await?;
    let record = periods::period(tx, period).await?;
    let parent = match record.state {
        PeriodState::Sealed => {
            require_its_turn(tx, period).await?;
            match lineage {
                Lineage::Continued => versions::latest(tx).await?,
                Lineage::New => None,
            }
        }
        PeriodState::Training | PeriodState::Evaluating => {
            let newest = attempt(tx, period, record.attempt).await?;
            if newest.program_version == program_version {
                return Ok(newest);
            }
            newest.parent
        }
        _ => {
            return Err(periods::wrong_state(&record, "sealed, training or evaluating"));
        }
    };
    let number = record.attempt + 1;
    sqlx::query(
        "INSERT INTO attempts (pipeline, period_ms, number, program_version, parent)
         VALUES ($1, $2, $3, $4, $5)",
    )
    .bind(&tx.pipeline)
    .bind(period.start().as_ms())
    .bind(number)
    .bind(program_version)
    .bind(parent.map(|version| db(version.0)))
    .execute(&mut *tx.conn)
    .await?;
    set_state(tx, period, PeriodState::Training).await?;
    attempt(tx, period, number).await
}

/// Every earlier period must have come to its end.
async fn require_its_turn(tx: &mut Tx, period: PeriodId) -> Result<()> {
    let earlier = sqlx::query(
        "SELECT period_ms, state FROM periods
          WHERE pipeline = $1 AND period_ms < $2
            AND state IN ('open', 'sealed', 'training', 'evaluating')
          ORDER BY period_ms LIMIT 1",
    )
    .bind(&tx.pipeline)
    .bind(period.start().as_ms())
    .fetch_optional(&mut *tx.conn)
    .await?;
    let Some(row) = earlier else { return Ok(()) };
    Err(RegistryError::WrongState {
        what: format!("period {}, which is before {period},", periods::period_id(&row, "period_ms")?),
        found: row.try_get("state")?,
        expected: "settled",
    })
}

pub(super) async fn attempt(tx: &mut Tx, period: PeriodId, number: u32) -> Result<AttemptRecord> {
    let row = sqlx::query("SELECT * FROM attempts WHERE pipeline = $1 AND period_ms = $2 AND number = $3")
        .bind(&tx.pipeline)
        .bind(period.start().as_ms())
        .bind(number)
        .fetch_optional(&mut *tx.conn)
        .await?;
    match row {
        Some(row) => read_attempt(&row),
        None => Err(not_found(format!("attempt {number} at period {period}"))),
    }
}

fn read_attempt(row: &SqliteRow) -> Result<AttemptRecord> {
    Ok(AttemptRecord {
        period: periods::period_id(row, "period_ms")?,
        number: row.try_get("number")?,
        program_version: row.try_get("program_version")?,
        parent: row.try_get::<Option<u64>, _>("parent")?.map(Version),
        start: row.try_get("start")?,
        failures: row.try_get("failures")?,
        last_failure: row.try_get("last_failure")?,
    })
}

/// The lease holds, the attempt is the period's newest, and the period's state is one of `states`.
pub(super) async fn require_current(
    tx: &mut Tx,
    lease: &Lease,
    (period, attempt): (PeriodId, u32),
    states: &[PeriodState],
    expected: &'static str,
) -> Result<()> {
    leases::check(tx, lease).await?;
    let record = periods::period(tx, period).await?;
    if !states.contains(&record.state) {
        return Err(periods::wrong_state(&record, expected));
    }
    if record.attempt != attempt {
        return Err(RegistryError::WrongState {
            what: format!("attempt {attempt} at period {period}"),
            found: format!("not attempt {}", record.attempt),
            expected: "the newest one",
        });
    }
    Ok(())
}

const UNDER_WAY: [PeriodState; 2] = [PeriodState::Training, PeriodState::Evaluating];
const UNDER_WAY_TEXT: &str = "training or evaluating";

pub(super) async fn begin_start(tx: &mut Tx, lease: &Lease, period: PeriodId, attempt: u32) -> Result<u64> {
    require_current(tx, lease, (period, attempt), &UNDER_WAY, UNDER_WAY_TEXT).await?;
    let row = sqlx::query(
        "UPDATE attempts SET start = start + 1
          WHERE pipeline = $1 AND period_ms = $2 AND number = $3 RETURNING start",
    )
    .bind(&tx.pipeline)
    .bind(period.start().as_ms())
    .bind(attempt)
    .fetch_one(&mut *tx.conn)
    .await?;
    Ok(row.try_get("start")?)
}

pub(super) async fn record_failure(
    tx: &mut Tx,
    lease: &Lease,
    period: PeriodId,
    attempt: u32,
    reason: &str,
) -> Result<u32> {
    require_current(tx, lease, (period, attempt), &UNDER_WAY, UNDER_WAY_TEXT).await?;
    let row = sqlx::query(
        "UPDATE attempts SET failures = failures + 1, last_failure = $4
          WHERE pipeline = $1 AND period_ms = $2 AND number = $3 RETURNING failures",
    )
    .bind(&tx.pipeline)
    .bind(period.start().as_ms())
    .bind(attempt)
    .bind(reason)
    .fetch_one(&mut *tx.conn)
    .await?;
    Ok(row.try_get("failures")?)
}

pub(super) async fn set_evaluating(tx: &mut Tx, lease: &Lease, period: PeriodId) -> Result<()> {
    leases::check(tx, lease).await?;
    let record = periods::period(tx, period).await?;
    match record.state {
        PeriodState::Training => set_state(tx, period, PeriodState::Evaluating).await,
        PeriodState::Evaluating => Ok(()),
        _ => Err(periods::wrong_state(&record, UNDER_WAY_TEXT)),
    }
}

async fn set_state(tx: &mut Tx, period: PeriodId, state: PeriodState) -> Result<()> {
    sqlx::query("UPDATE periods SET state = $3 WHERE pipeline = $1 AND period_ms = $2")
        .bind(&tx.pipeline)
        .bind(period.start().as_ms())
        .bind(state.as_str())
        .execute(&mut *tx.conn)
        .await?;
    Ok(())
}

pub(super) async fn settle_unpublished(
    tx: &mut Tx,
    lease: &Lease,
    period: PeriodId,
    verdict: &Verdict<'_>,
) -> Result<()> {
    leases::check(tx, lease).await?;
    if !matches!(verdict.state, PeriodState::Rejected | PeriodState::Failed) {
        return Err(RegistryError::WrongState {
            what: format!("the verdict on period {period}"),
            found: verdict.state.as_str().to_owned(),
            expected: "rejected or failed",
        });
    }
    let record = periods::period(tx, period).await?;
    if record.state == verdict.state {
        return Ok(());
    }
    if !UNDER_WAY.contains(&record.state) {
        return Err(periods::wrong_state(&record, UNDER_WAY_TEXT));
    }
    sqlx::query(
        "UPDATE periods SET state = $3, reason = $4, settled_at_ms = $5
          WHERE pipeline = $1 AND period_ms = $2",
    )
    .bind(&tx.pipeline)
    .bind(period.start().as_ms())
    .bind(verdict.state.as_str())
    .bind(verdict.reason)
    .bind(verdict.now.as_ms())
    .execute(&mut *tx.conn)
    .await?;
    Ok(())
}
