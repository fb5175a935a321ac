//! Version numbers, publication, aliases, probe sets and scores.
//!
//! Invariants: a number is drawn once; a period brings at most one visible version; `latest` moves by publication
//! only from the version's parent. A version's parent is its attempt's.

use sqlx::Row;
use sqlx::sqlite::SqliteRow;

use super::*;

pub(super) async fn reserve_version(
    tx: &mut Tx,
    lease: &Lease,
    attempt: (PeriodId, u32),
    files: &[FileRef],
    now: EventTime,
) -> Result<Reservation> {
    let states = [PeriodState::Evaluating];
    learner::require_current(tx, lease, attempt, &states, "evaluating").await?;
    let reserved = sqlx::query(
        "SELECT version, reserved_at_ms FROM versions WHERE pipeline = $1 AND period_ms = $2 AND attempt = $3",
    )
    .bind(&tx.pipeline)
    .bind(attempt.0.start().as_ms())
    .bind(attempt.1)
    .fetch_optional(&mut *tx.conn)
    .await?;
    let reservation = match reserved {
        Some(row) => Reservation {
            version: Version(row.try_get("version")?),
            reserved_at: EventTime(row.try_get("reserved_at_ms")?),
        },
        None => draw_version(tx, attempt, now).await?,
    };
    replace_files(tx, reservation.version, files).await?;
    Ok(reservation)
}

async fn draw_version(
    tx: &mut Tx,
    (period, attempt): (PeriodId, u32),
    now: EventTime,
) -> Result<Reservation> {
    let row = sqlx::query(
        "INSERT INTO pipelines (pipeline, last_version) VALUES ($1, 1)
         ON CONFLICT (pipeline) DO UPDATE SET last_version = pipelines.last_version + 1
         RETURNING last_version",
    )
    .bind(&tx.pipeline)
    .fetch_one(&mut *tx.conn)
    .await?;
    let version = Version(row.try_get("last_version")?);
    sqlx::query(
        "INSERT INTO versions (pipeline, version, period_ms, attempt, reserved_at_ms) VALUES ($1, $2, $3, $4, $5)",
    )
    .bind(&tx.pipeline)
    .bind(db(version.0))
    .bind(period.start().as_ms())
    .bind(attempt)
    .bind(now.as_ms())
    .execute(&mut *tx.conn)
    .await?;
    Ok(Reservation { version, reserved_at: now })
}

async fn replace_files(tx: &mut Tx, version: Version, files: &[FileRef]) -> Result<()> {
    sqlx::query("DELETE FROM version_files WHERE pipeline = $1 AND version = $2")
        .bind(&tx.pipeline)
        .bind(db(version.0))
        .execute(&mut *tx.conn)
        .await?;
    for (ordinal, file) in (0i64..).zip(files) {
        sqlx::query(
            "INSERT INTO version_files (pipeline, version, path, ordinal, sha256, bytes)
             VALUES ($1, $2, $3, $4, $5, $6)",
        )
        .bind(&tx.pipeline)
        .bind(db(version.0))
        .bind(&file.path)
        .bind(ordinal)
        .bind(&file.sha256.0)
        .bind(db(file.bytes))
        .execute(&mut *tx.conn)
        .await?;
    }
    Ok(())
}

pub(super) async fn publish(
    tx: &mut Tx,
    lease: &Lease,
    publication: &Publication,
    now: EventTime,
) -> Result<Published> {
    leases::check(tx, lease).await?;
    let record = version(tx, publication.version).await?;
    let before = latest(tx).await?;
    if record.visible {
        return Ok(match before {
            Some(latest) if latest == record.version => Published::LatestMoved,
            latest => Published::LatestStays { latest },
        });
    }
    let states = [PeriodState::Evaluating];
    let attempt = (record.period, record.attempt);
    learner::require_current(tx, lease, attempt, &states, "evaluating").await?;
    make_visible(tx, &record, &publication.manifest, now).await?;
    replace_files(tx, record.version, &publication.files).await?;
    for score in &publication.scores {
        store_score(tx, score).await?;
    }
    if let Some(probe_set) = &publication.probe_set {
        store_probe_set(tx, probe_set).await?;
    }
    if before != record.parent {
        return Ok(Published::LatestStays { latest: before });
    }
    point_alias(tx, LATEST, record.version).await?;
    Ok(Published::LatestMoved)
}

async fn make_visible(tx: &mut Tx, record: &VersionRecord, manifest: &str, now: EventTime) -> Result<()> {
    sqlx::query(
        "UPDATE versions SET manifest = $3, published_at_ms = $4 WHERE pipeline = $1 AND version = $2",
    )
    .bind(&tx.pipeline)
    .bind(db(record.version.0))
    .bind(manifest)
    .bind(now.as_ms())
    .execute(&mut *tx.conn)
    .await?;
    sqlx::query(
        "UPDATE periods SET state = 'published', settled_at_ms = $3 WHERE pipeline = $1 AND period_ms = $2",
    )
    .bind(&tx.pipeline)
    .bind(record.period.start().as_ms())
    .bind(now.as_ms())
    .execute(&mut *tx.conn)
    .await?;
    Ok(())
}

async fn store_score(tx: &mut Tx, score: &ScoreRecord) -> Result<()> {
    sqlx::query(
        "INSERT INTO scores (pipeline, version, period_ms, measure, value) VALUES ($1, $2, $3, $4, $5)
         ON CONFLICT (pipeline, version, period_ms, measure) DO UPDATE SET value = excluded.value",
    )
    .bind(&tx.pipeline)
    .bind(db(score.version.0))
    .bind(score.period.start().as_ms())
    .bind(&score.measure)
    .bind(score.value)
    .execute(&mut *tx.conn)
    .await?;
    Ok(())
}

async fn store_probe_set(tx: &mut Tx, probe_set: &ProbeSetRecord) -> Result<()> {
    sqlx::query(
        "INSERT INTO probe_sets (pipeline, period_ms, path, sha256, bytes, frames)
         VALUES ($1, $2, $3, $4, $5, $6)",
    )
    .bind(&tx.pipeline)
    .bind(probe_set.period.start().as_ms())
    .bind(&probe_set.file.path)
    .bind(&probe_set.file.sha256.0)
    .bind(db(probe_set.file.bytes))
    .bind(db(probe_set.frames))
    .execute(&mut *tx.conn)
    .await?;
    Ok(())
}

/// All versions, or the one numbered `$2`; only one alone comes with its manifest.
const SELECT_VERSIONS: &str = "
    SELECT v.version, v.period_ms, v.attempt, v.published_at_ms, a.parent,
           CASE WHEN v.version = $2 THEN v.manifest END AS manifest
      FROM versions v
      JOIN attempts a ON a.pipeline = v.pipeline AND a.period_ms = v.period_ms AND a.number = v.attempt
     WHERE v.pipeline = $1 AND ($2 IS NULL OR v.version = $2)
     ORDER BY v.version";

pub(super) async fn version(tx: &mut Tx, version: Version) -> Result<VersionRecord> {
    let row = sqlx::query(SELECT_VERSIONS)
        .bind(&tx.pipeline)
        .bind(db(version.0))
        .fetch_optional(&mut *tx.conn)
        .await?
        .ok_or_else(|| not_found(format!("version {version}")))?;
    let files = files(tx, Some(version)).await?.remove(&version);
    read_version(&row, files.unwrap_or_default())
}

pub(super) async fn versions(tx: &mut Tx) -> Result<Vec<VersionRecord>> {
    let mut files = files(tx, None).await?;
    let rows = sqlx::query(SELECT_VERSIONS).bind(&tx.pipeline).bind(None::<i64>).fetch(&mut *tx.conn);
    read_all(rows, |row| {
        let version = Version(row.try_get("version")?);
        read_version(row, files.remove(&version).unwrap_or_default())
    })
    .await
}

/// Files by version, of all versions or of `one`.
async fn files(tx: &mut Tx, one: Option<Version>) -> Result<BTreeMap<Version, Vec<FileRef>>> {
    let rows = sqlx::query(
        "SELECT * FROM version_files WHERE pipeline = $1 AND ($2 IS NULL OR version = $2)
          ORDER BY version, ordinal",
    )
    .bind(&tx.pipeline)
    .bind(one.map(|version| db(version.0)))
    .fetch(&mut *tx.conn);
    let mut files: BTreeMap<Version, Vec<FileRef>> = BTreeMap::new();
    read_all(rows, |row| {
        let version = Version(row.try_get("version")?);
        files.entry(version).or_default().push(periods::read_file(row)?);
        Ok(())
    })
    .await?;
    Ok(files)
}

fn read_version(row: &SqliteRow, files: Vec<FileRef>) -> Result<VersionRecord> {
    let published_at = row.try_get::<Option<i64>, _>("published_at_ms")?.map(EventTime);
    Ok(VersionRecord {
        version: Version(row.try_get("version")?),
        period: periods::period_id(row, "period_ms")?,
        attempt: row.try_get("attempt")?,
        parent: row.try_get::<Option<u64>, _>("parent")?.map(Version),
        visible: published_at.is_some(),
        files,
        manifest: row.try_get("manifest")?,
        published_at,
    })
}

pub(super) async fn latest(tx: &mut Tx) -> Result<Option<Version>> {
    Ok(aliases(tx).await?.remove(LATEST))
}

pub(super) async fn aliases(tx: &mut Tx) -> Result<BTreeMap<String, Version>> {
    let rows = sqlx::query("SELECT alias, version FROM aliases WHERE pipeline = $1")
        .bind(&tx.pipeline)
        .fetch_all(&mut *tx.conn)
        .await?;
    rows.iter().map(|row| Ok((row.try_get("alias")?, Version(row.try_get("version")?)))).collect()
}

pub(super) async fn set_alias(tx: &mut Tx, alias: &str, to: Version) -> Result<()> {
    if !version(tx, to).await?.visible {
        return Err(RegistryError::WrongState {
            what: format!("version {to}"),
            found: "reserved".into(),
            expected: "visible",
        });
    }
    point_alias(tx, alias, to).await
}

async fn point_alias(tx: &mut Tx, alias: &str, to: Version) -> Result<()> {
    sqlx::query(
        "INSERT INTO aliases (pipeline, alias, version) VALUES ($1, $2, $3)
         ON CONFLICT (pipeline, alias) DO UPDATE SET version = excluded.version",
    )
    .bind(&tx.pipeline)
    .bind(alias)
    .bind(db(to.0))
    .execute(&mut *tx.conn)
    .await?;
    Ok(())
}

pub(super) async fn probe_sets(tx: &mut Tx) -> Result<Vec<ProbeSetRecord>> {
    let rows = sqlx::query("SELECT * FROM probe_sets WHERE pipeline = $1 ORDER BY period_ms")
        .bind(&tx.pipeline)
        .fetch_all(&mut *tx.conn)
        .await?;
    rows.iter()
        .map(|row| {
            Ok(ProbeSetRecord {
                period: periods::period_id(row, "period_ms")?,
                file: periods::read_file(row)?,
                frames: row.try_get("frames")?,
            })
        })
        .collect()
}

pub(super) async fn scores(tx: &mut Tx) -> Result<Vec<ScoreRecord>> {
    let rows = sqlx::query("SELECT * FROM scores WHERE pipeline = $1 ORDER BY version, period_ms, measure")
        .bind(&tx.pipeline)
        .fetch(&mut *tx.conn);
    read_all(rows, |row| {
        Ok(ScoreRecord {
            version: Version(row.try_get("version")?),
            period: periods::period_id(row, "period_ms")?,
            measure: row.try_get("measure")?,
            value: row.try_get::<Option<f64>, _>("value")?.unwrap_or(f64::NAN),
        })
    })
    .await
}
