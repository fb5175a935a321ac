//! The registry in one SQLite file: for one machine, with several processes (daemon and command line) on it.
//!
//! Owns: the connection's settings, that each method is one transaction, its failpoints and its count. A writing
//! transaction begins with `BEGIN IMMEDIATE`, so writers follow one another and what a transaction has read
//! can't change before it commits; a reading one sees one snapshot (WAL). A commit is on the disk when it
//! returns (`synchronous = FULL`). Leaves to the submodules what each method means.

mod ingest;
mod learner;
mod leases;
mod periods;
mod versions;

use std::collections::BTreeMap;
use std::str::FromStr;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures::{Stream, StreamExt, TryStreamExt};
use sqlx::migrate::Migrator;
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteRow, SqliteSynchronous,
};
use sqlx::{Sqlite, SqlitePool, Transaction};

use super::*;
use crate::failpoint;

static MIGRATIONS: Migrator = sqlx::migrate!("./migrations/sqlite");

/// How long a transaction waits for another process's one. They take milliseconds; larger hides a stuck
/// process, smaller fails when a slow disk syncs.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);

/// Pause before a file that another process is just making is opened again. It makes it in milliseconds.
const OPEN_AGAIN_AFTER: Duration = Duration::from_millis(10);

/// Connections of one process: one writes at a time, the others read beside it.
const CONNECTIONS: u32 = 4;

/// One pipeline's part of a SQLite database.
#[derive(Debug, Clone)]
pub struct SqliteRegistry {
    pool: SqlitePool,
    pipeline: String,
}

/// One transaction for one pipeline; rolled back when dropped before its commit.
pub(super) struct Tx {
    conn: Transaction<'static, Sqlite>,
    pipeline: String,
}

/// One method as one writing transaction: begin, body, failpoint, commit, failpoint, count.
macro_rules! writing {
    ($registry:expr, $method:literal, |$tx:ident| $body:expr) => {{
        let work = async {
            let mut transaction = $registry.begin("BEGIN IMMEDIATE").await?;
            let $tx = &mut transaction;
            let value = $body.await?;
            failpoint::reach(concat!("registry.", $method, ".before_commit"));
            transaction.conn.commit().await?;
            failpoint::reach(concat!("registry.", $method, ".after_commit"));
            Ok(value)
        };
        counted(work.await)
    }};
}

/// One method as one reading transaction: all its queries see the same snapshot.
macro_rules! reading {
    ($registry:expr, |$tx:ident| $body:expr) => {{
        let work = async {
            let mut transaction = $registry.begin("BEGIN DEFERRED").await?;
            let $tx = &mut transaction;
            $body.await
        };
        counted(work.await)
    }};
}

/// Counts a transaction by its outcome.
fn counted<T>(result: Result<T>) -> Result<T> {
    let outcome = match &result {
        Ok(_) => "ok",
        Err(
            RegistryError::Unavailable(_)
            | RegistryError::Refused(_)
            | RegistryError::Corrupt { .. }
            | RegistryError::Migration(_),
        ) => "error",
        Err(_) => "conflict",
    };
    ::metrics::counter!(crate::metrics::REGISTRY_TRANSACTIONS, "outcome" => outcome).increment(1);
    result
}

/// SQLITE_BUSY, or one of its extended codes: another connection holds the lock.
fn is_busy(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(|error| error.code());
    code.and_then(|code| code.parse::<u32>().ok()).is_some_and(|code| code & 0xff == 5)
}

impl SqliteRegistry {
    /// Opens the database that `url` names, `sqlite:///path/to/file` or `sqlite::memory:` (which lives as long
    /// as this value and its clones), making the file and its directory where they are missing. The schema is
    /// [`Registry::migrate`]'s.
    pub async fn open(url: &str, pipeline: &str) -> Result<Self> {
        let options = SqliteConnectOptions::from_str(url)?
            .create_if_missing(true)
            .foreign_keys(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(BUSY_TIMEOUT);
        let in_memory = url.contains(":memory:") || url.contains("mode=memory");
        if !in_memory && let Some(directory) = options.get_filename().parent() {
            std::fs::create_dir_all(directory).map_err(sqlx::Error::Io)?;
        }
        // A database in memory is one connection's and gone with it.
        let pool = SqlitePoolOptions::new()
            .max_connections(if in_memory { 1 } else { CONNECTIONS })
            .min_connections(1)
            .idle_timeout(None)
            .max_lifetime(None);
        let started = Instant::now();
        loop {
            match pool.clone().connect_with(options.clone()).await {
                Ok(pool) => return Ok(Self { pool, pipeline: pipeline.to_owned() }),
                // SQLite waits for no lock while it switches a new file to write-ahead logging: two that open it at once
                // may meet there.
                Err(error) if is_busy(&error) && started.elapsed() < BUSY_TIMEOUT => {
                    tokio::time::sleep(OPEN_AGAIN_AFTER).await;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Closes all connections; the last process to do so folds the write-ahead log into the file.
    pub async fn close(&self) {
        self.pool.close().await;
    }

    async fn begin(&self, statement: &'static str) -> Result<Tx> {
        Ok(Tx { conn: self.pool.begin_with(statement).await?, pipeline: self.pipeline.clone() })
    }
}

/// Applies what is missing, inside the caller's transaction: SQLite's migrator takes no lock of its own, and two
/// processes may start at once.
async fn migrate(tx: &mut Tx) -> Result<()> {
    MIGRATIONS.run_direct(None, &mut *tx.conn, false).await.map_err(RegistryError::Migration)
}

async fn ping(tx: &mut Tx) -> Result<()> {
    sqlx::query("SELECT 1").execute(&mut *tx.conn).await?;
    Ok(())
}

/// Reads each row as it comes. In the driver's hands a row is many times as large as what is read out of it: of the
/// tables that only grow, all at once would be most of the daemon's memory.
async fn read_all<T>(
    rows: impl Stream<Item = sqlx::Result<SqliteRow>>,
    mut read: impl FnMut(&SqliteRow) -> Result<T>,
) -> Result<Vec<T>> {
    rows.map(|row| read(&row?)).try_collect().await
}

/// For a count of bytes, frames or versions: beyond 63 bits it turns negative, which the schema refuses.
const fn db(value: u64) -> i64 {
    value as i64
}

fn not_found(what: impl ToString) -> RegistryError {
    RegistryError::NotFound { what: what.to_string() }
}

#[async_trait]
impl Registry for SqliteRegistry {
    async fn migrate(&self) -> Result<()> {
        writing!(self, "migrate", |tx| migrate(tx))
    }

    async fn ping(&self) -> Result<()> {
        reading!(self, |tx| ping(tx))
    }

    async fn open_topic(&self, topic: &str, identity: &str) -> Result<TopicId> {
        writing!(self, "open_topic", |tx| ingest::open_topic(tx, topic, identity))
    }

    async fn register_partitions(&self, partitions: &[TopicPartition]) -> Result<()> {
        writing!(self, "register_partitions", |tx| { ingest::register_partitions(tx, partitions) })
    }

    async fn positions(&self) -> Result<Vec<PositionRecord>> {
        reading!(self, |tx| ingest::positions(tx))
    }

    async fn position(&self, partition: &TopicPartition) -> Result<Option<PositionRecord>> {
        reading!(self, |tx| ingest::position(tx, partition))
    }

    async fn start_position(&self, partition: &TopicPartition, start: i64) -> Result<i64> {
        writing!(self, "start_position", |tx| { ingest::start_position(tx, partition, start) })
    }

    async fn reset_position(&self, partition: &TopicPartition, position: i64) -> Result<()> {
        writing!(self, "reset_position", |tx| { ingest::reset_position(tx, partition, position) })
    }

    async fn commit_flush(&self, flush: &Flush) -> Result<()> {
        writing!(self, "commit_flush", |tx| ingest::commit_flush(tx, flush))
    }

    async fn report_caught_up(
        &self,
        partition: &TopicPartition,
        position: i64,
        report: Option<CaughtUp>,
    ) -> Result<()> {
        writing!(self, "report_caught_up", |tx| { ingest::report_caught_up(tx, partition, position, report) })
    }

    async fn advance_watermark(&self, watermark: EventTime) -> Result<()> {
        writing!(self, "advance_watermark", |tx| { ingest::advance_watermark(tx, watermark) })
    }

    async fn watermark(&self) -> Result<Option<EventTime>> {
        reading!(self, |tx| ingest::watermark(tx))
    }

    async fn periods(&self) -> Result<Vec<PeriodRecord>> {
        reading!(self, |tx| periods::periods(tx))
    }

    async fn period(&self, id: PeriodId) -> Result<PeriodRecord> {
        reading!(self, |tx| periods::period(tx, id))
    }

    async fn segments(&self, period: PeriodId) -> Result<Vec<SegmentRecord>> {
        reading!(self, |tx| periods::segments(tx, period))
    }

    async fn live_objects(&self) -> Result<LiveObjects> {
        reading!(self, |tx| periods::live_objects(tx))
    }

    async fn request_close(&self, id: PeriodId) -> Result<()> {
        writing!(self, "request_close", |tx| periods::request_close(tx, id))
    }

    async fn seal(
        &self,
        lease: &Lease,
        id: PeriodId,
        min_frames: u64,
        next: PeriodBounds,
        now: EventTime,
    ) -> Result<Vec<(PeriodId, SealOutcome)>> {
        let order = periods::SealOrder { id, min_frames, next, now };
        writing!(self, "seal", |tx| periods::seal(tx, lease, &order))
    }

    async fn retry(&self, id: PeriodId) -> Result<()> {
        writing!(self, "retry", |tx| periods::retry(tx, id))
    }

    async fn begin_attempt(
        &self,
        lease: &Lease,
        period: PeriodId,
        program_version: &str,
        lineage: Lineage,
    ) -> Result<AttemptRecord> {
        writing!(self, "begin_attempt", |tx| {
            learner::begin_attempt(tx, lease, period, program_version, lineage)
        })
    }

    async fn attempt(&self, period: PeriodId, number: u32) -> Result<AttemptRecord> {
        reading!(self, |tx| learner::attempt(tx, period, number))
    }

    async fn begin_start(&self, lease: &Lease, period: PeriodId, attempt: u32) -> Result<u64> {
        writing!(self, "begin_start", |tx| { learner::begin_start(tx, lease, period, attempt) })
    }

    async fn record_failure(
        &self,
        lease: &Lease,
        period: PeriodId,
        attempt: u32,
        reason: &str,
    ) -> Result<u32> {
        writing!(self, "record_failure", |tx| { learner::record_failure(tx, lease, period, attempt, reason) })
    }

    async fn set_evaluating(&self, lease: &Lease, period: PeriodId) -> Result<()> {
        writing!(self, "set_evaluating", |tx| { learner::set_evaluating(tx, lease, period) })
    }

    async fn settle_unpublished(
        &self,
        lease: &Lease,
        period: PeriodId,
        state: PeriodState,
        reason: &str,
        now: EventTime,
    ) -> Result<()> {
        let verdict = learner::Verdict { state, reason, now };
        writing!(self, "settle_unpublished", |tx| {
            learner::settle_unpublished(tx, lease, period, &verdict)
        })
    }

    async fn reserve_version(
        &self,
        lease: &Lease,
        period: PeriodId,
        attempt: u32,
        files: &[FileRef],
        now: EventTime,
    ) -> Result<Reservation> {
        writing!(self, "reserve_version", |tx| {
            versions::reserve_version(tx, lease, (period, attempt), files, now)
        })
    }

    async fn publish(&self, lease: &Lease, publication: &Publication, now: EventTime) -> Result<Published> {
        writing!(self, "publish", |tx| { versions::publish(tx, lease, publication, now) })
    }

    async fn expire(&self, lease: &Lease, period: PeriodId, now: EventTime) -> Result<Vec<FileRef>> {
        writing!(self, "expire", |tx| periods::expire(tx, lease, period, now))
    }

    async fn version(&self, version: Version) -> Result<VersionRecord> {
        reading!(self, |tx| versions::version(tx, version))
    }

    async fn versions(&self) -> Result<Vec<VersionRecord>> {
        reading!(self, |tx| versions::versions(tx))
    }

    async fn aliases(&self) -> Result<BTreeMap<String, Version>> {
        reading!(self, |tx| versions::aliases(tx))
    }

    async fn set_alias(&self, alias: &str, version: Version) -> Result<()> {
        writing!(self, "set_alias", |tx| versions::set_alias(tx, alias, version))
    }

    async fn probe_sets(&self) -> Result<Vec<ProbeSetRecord>> {
        reading!(self, |tx| versions::probe_sets(tx))
    }

    async fn scores(&self) -> Result<Vec<ScoreRecord>> {
        reading!(self, |tx| versions::scores(tx))
    }

    async fn acquire_lease(
        &self,
        name: &str,
        holder: &str,
        ttl_ms: i64,
        now: EventTime,
    ) -> Result<Option<Lease>> {
        writing!(self, "acquire_lease", |tx| { leases::acquire(tx, name, holder, ttl_ms, now) })
    }

    async fn renew_lease(&self, lease: &Lease, ttl_ms: i64, now: EventTime) -> Result<Lease> {
        writing!(self, "renew_lease", |tx| leases::renew(tx, lease, ttl_ms, now))
    }

    async fn release_lease(&self, lease: &Lease) -> Result<()> {
        writing!(self, "release_lease", |tx| leases::release(tx, lease))
    }
}

#[cfg(test)]
mod kill_tests;
#[cfg(test)]
mod tests;
