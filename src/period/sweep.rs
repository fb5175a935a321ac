//! Deletes objects that no record speaks of: segments whose transaction can't commit any more, and the files
//! of attempts that are settled. Deleting is idempotent, so a crash in between is found by the next sweep.

use super::controller::LearnError;
use crate::registry::Registry;
use crate::store::Store;
use crate::store::paths::Paths;
use crate::types::PeriodId;

/// Deletes orphaned segments. The objects are listed **before** the registry is read: a segment written after
/// the listing isn't seen, and one with a row by the time of the reading isn't an orphan.
pub async fn orphans(registry: &dyn Registry, store: &Store, paths: &Paths) -> Result<(), LearnError> {
    let listed = store.list(&paths.segments()).await?;
    let live = registry.live_objects().await?;
    let mut deleted = 0_u64;
    for path in listed {
        let name = paths.parse_segment(&path);
        if crate::store::sweep::is_orphan(&path, name.as_ref(), &live.paths, &live.positions) {
            store.delete(&path).await?;
            deleted += 1;
        }
    }
    if deleted > 0 {
        tracing::info!(deleted, "segments of interrupted flushes are deleted");
    }
    Ok(())
}

/// Deletes everything that the attempts at a settled period wrote.
pub async fn attempts(store: &Store, paths: &Paths, period: PeriodId) -> Result<(), LearnError> {
    for path in store.list(&paths.attempts(period)).await? {
        store.delete(&path).await?;
    }
    Ok(())
}
