//! Who may act as the learner. Owns the rule that a token only grows; time is the caller's.

use sqlx::Row;

use super::*;

/// Refuses what is done under a lease that was taken over, released or never given. The clock has no say: an
/// expired lease that nobody has taken still holds.
pub(super) async fn check(tx: &mut Tx, lease: &Lease) -> Result<()> {
    let held =
        sqlx::query("SELECT 1 FROM leases WHERE pipeline = $1 AND name = $2 AND holder = $3 AND token = $4")
            .bind(&tx.pipeline)
            .bind(&lease.name)
            .bind(&lease.holder)
            .bind(db(lease.token))
            .fetch_optional(&mut *tx.conn)
            .await?;
    held.map(|_| ()).ok_or_else(|| fenced(lease))
}

pub(super) async fn acquire(
    tx: &mut Tx,
    name: &str,
    holder: &str,
    ttl_ms: i64,
    now: EventTime,
) -> Result<Option<Lease>> {
    let expires_at = now.plus_ms(ttl_ms);
    let row = sqlx::query(
        "INSERT INTO leases (pipeline, name, holder, token, expires_at_ms) VALUES ($1, $2, $3, 1, $4)
         ON CONFLICT (pipeline, name) DO UPDATE
            SET holder = excluded.holder, token = leases.token + 1, expires_at_ms = excluded.expires_at_ms
          WHERE leases.holder IS NULL OR leases.holder = excluded.holder OR leases.expires_at_ms <= $5
         RETURNING token",
    )
    .bind(&tx.pipeline)
    .bind(name)
    .bind(holder)
    .bind(expires_at.as_ms())
    .bind(now.as_ms())
    .fetch_optional(&mut *tx.conn)
    .await?;
    let Some(row) = row else { return Ok(None) };
    Ok(Some(Lease {
        name: name.to_owned(),
        holder: holder.to_owned(),
        token: row.try_get("token")?,
        expires_at,
    }))
}

pub(super) async fn renew(tx: &mut Tx, lease: &Lease, ttl_ms: i64, now: EventTime) -> Result<Lease> {
    check(tx, lease).await?;
    let expires_at = now.plus_ms(ttl_ms);
    sqlx::query("UPDATE leases SET expires_at_ms = $3 WHERE pipeline = $1 AND name = $2")
        .bind(&tx.pipeline)
        .bind(&lease.name)
        .bind(expires_at.as_ms())
        .execute(&mut *tx.conn)
        .await?;
    Ok(Lease { expires_at, ..lease.clone() })
}

/// Keeps the row, so that the next token is larger.
pub(super) async fn release(tx: &mut Tx, lease: &Lease) -> Result<()> {
    sqlx::query(
        "UPDATE leases SET holder = NULL
          WHERE pipeline = $1 AND name = $2 AND holder = $3 AND token = $4",
    )
    .bind(&tx.pipeline)
    .bind(&lease.name)
    .bind(&lease.holder)
    .bind(db(lease.token))
    .execute(&mut *tx.conn)
    .await?;
    Ok(())
}

fn fenced(lease: &Lease) -> RegistryError {
    RegistryError::Fenced { name: lease.name.clone(), token: lease.token }
}
