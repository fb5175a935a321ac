//! What a job needs out of the object store: frames, teacher, initial weights, the newest checkpoint that fits.

use std::sync::Arc;

use super::{Result, Worker, WorkerError};
use crate::store::{Store, segment};
use crate::train::checkpoint::{Checkpoint, Identity};
use crate::train::device::Selected;
use crate::train::frames::{FrameMeta, FrameSet, FrameSetWriter};
use crate::train::network::NetworkBytes;
use crate::train::spec::{Recipe, SegmentInput, TrainJob};
use crate::types::FileRef;

/// Copies all frames of the job to a scratch file; their order is that of (topic, partition, offset, row),
/// whatever the cuts of the segments were. One segment is in memory at a time; `loading` is
/// told how far it is after each and may end it.
pub async fn frames(store: &Store, recipe: &Recipe, loading: impl Fn(u64) -> Result<()>) -> Result<FrameSet> {
    let mut writer = FrameSetWriter::create(&std::env::temp_dir()).map_err(WorkerError::Scratch)?;
    let mut segments: Vec<&SegmentInput> = recipe.segments.iter().collect();
    segments.sort_by(|a, b| (&a.partition, a.flush_start).cmp(&(&b.partition, b.flush_start)));
    let mut count = 0;
    for segment in segments {
        let bytes = store.get_verified(&segment.file).await?;
        for row in segment::read(bytes)? {
            let row = row?;
            writer.push(meta(&row), &row.image).map_err(WorkerError::Scratch)?;
            count += 1;
        }
        loading(count)?;
    }
    writer.finish_sorted().map_err(WorkerError::Scratch)
}

/// The frames of a probe set, in the order in which they were written: that of the rows of kept embeddings.
pub fn probe_set(worker: &Worker, file: &FileRef) -> Result<FrameSet> {
    let bytes = worker.handle.block_on(worker.store.get_verified(file))?;
    let mut writer = FrameSetWriter::create(&std::env::temp_dir()).map_err(WorkerError::Scratch)?;
    for row in segment::read(bytes)? {
        let row = row?;
        writer.push(meta(&row), &row.image).map_err(WorkerError::Scratch)?;
    }
    writer.finish().map_err(WorkerError::Scratch)
}

fn meta(row: &segment::Row) -> FrameMeta {
    FrameMeta {
        stream_id: row.stream_id.as_str().into(),
        captured_at: row.captured_at,
        label: row.label.as_deref().map(Arc::from),
        topic: row.topic.as_str().into(),
        partition: row.partition,
        offset: row.offset,
        row: row.row,
    }
}

pub async fn teacher(store: &Store, recipe: &Recipe) -> Result<Option<NetworkBytes>> {
    let Some(teacher) = &recipe.teacher else { return Ok(None) };
    let encoder = store.get_verified(&teacher.encoder).await?.to_vec();
    let projector = store.get_verified(&teacher.projector).await?.to_vec();
    Ok(Some(NetworkBytes { encoder, projector }))
}

pub async fn initial_weights(store: &Store, recipe: &Recipe) -> Result<Option<Vec<u8>>> {
    match (&recipe.teacher, &recipe.model.init) {
        (None, Some(file)) => Ok(Some(store.get_verified(file).await?.to_vec())),
        _ => Ok(None),
    }
}

/// The checkpoint with the largest step among those of earlier starts of this attempt that are whole and of the
/// same run. One that isn't is passed over with a warning: it costs steps, never correctness.
pub async fn checkpoint(store: &Store, job: &TrainJob, selected: &Selected) -> Result<Option<Vec<u8>>> {
    let identity = Identity::new(job, selected)?;
    let mut found = vec![];
    for prefix in &job.earlier_prefixes {
        let listed = store.list(&format!("{prefix}/checkpoints")).await?;
        found.extend(listed.into_iter().filter_map(|path| Some((step_of(&path)?, path))));
    }
    found.sort();
    for (step, path) in found.into_iter().rev() {
        let bytes = store.get(&path).await?;
        match Checkpoint::decode(&bytes, &identity) {
            Ok(_) => return Ok(Some(bytes.to_vec())),
            Err(error) => tracing::warn!(%path, step, %error, "a checkpoint can't be used"),
        }
    }
    Ok(None)
}

fn step_of(path: &str) -> Option<u64> {
    path.rsplit('/').next()?.strip_suffix(".safetensors")?.parse().ok()
}
