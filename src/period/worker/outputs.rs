//! What a candidate consists of, written below its start's prefix and listed for the outcome.

use crate::eval::Embeddings;
use crate::publish::embeddings::{self, EmbeddingRow};
use crate::publish::encoder_config::{Preprocessing, encoder_config};
use crate::store::segment;
use crate::train::frames::FrameMeta;
use crate::train::job::Trained;
use crate::train::spec::output;
use crate::types::{FileRef, PeriodId, Sha256};

use super::measure::Subject;
use super::{Data, Result, Worker, WorkerError};

/// Frames in one part of the period's embeddings: what is in memory at a time.
const ROWS_PER_PART: usize = 50_000;

/// The files so far.
pub struct Written<'a> {
    worker: &'a Worker<'a>,
    pub files: Vec<FileRef>,
}

impl<'a> Written<'a> {
    pub fn new(worker: &'a Worker<'a>) -> Self {
        Self { worker, files: vec![] }
    }

    fn put(&mut self, name: String, bytes: Vec<u8>) -> Result<()> {
        let (sha256, length) = (Sha256::of(&bytes), bytes.len() as u64);
        self.worker.put(&name, bytes)?;
        self.files.push(FileRef { path: name, sha256, bytes: length });
        Ok(())
    }

    /// Weights and the description that timm and torchvision load them by.
    pub fn network(&mut self, trained: &Trained) -> Result<()> {
        self.put(output::ENCODER.into(), trained.network.encoder.clone())?;
        self.put(output::PROJECTOR.into(), trained.network.projector.clone())?;
        let model = &self.worker.job.recipe.model;
        let preprocessing =
            Preprocessing { mean: model.mean, std: model.std, interpolation: "bilinear", crop_ratio: 1.0 };
        let config = encoder_config(&model.encoder, &preprocessing);
        self.put(output::CONFIG.into(), config.into_bytes())
    }

    /// Embeddings of every frame of the period, in parts. Clears `finite` if one is not.
    pub fn frame_embeddings(&mut self, data: &Data, candidate: &Subject, finite: &mut bool) -> Result<()> {
        let indices: Vec<usize> = (0..data.frames.len()).collect();
        for (part, indices) in indices.chunks(ROWS_PER_PART).enumerate() {
            let found = candidate.embed(&data.frames, indices)?;
            *finite &= found.is_finite();
            let rows: Vec<EmbeddingRow> = indices
                .iter()
                .enumerate()
                .map(|(row, frame)| embedding_row(data.frames.meta(*frame), found.row(row)))
                .collect();
            let bytes = embeddings::write(&rows, found.dim)?;
            self.put(output::embeddings(part), bytes.to_vec())?;
        }
        Ok(())
    }

    /// The frames of the new probe set, in the form of a segment.
    pub fn probe_set(&mut self, data: &Data) -> Result<()> {
        let rows = data.split.probe.iter().map(|&index| {
            let meta = data.frames.meta(index);
            let image = data.frames.bytes(index).map_err(WorkerError::Scratch)?;
            Ok(segment::Row {
                image: image.into(),
                stream_id: meta.stream_id.to_string(),
                captured_at: meta.captured_at,
                label: meta.label.as_deref().map(str::to_owned),
                topic: meta.topic.to_string(),
                partition: meta.partition,
                offset: meta.offset,
                row: meta.row,
            })
        });
        let rows = rows.collect::<Result<Vec<_>>>()?;
        let bytes = segment::write(&rows)?;
        self.put(output::PROBE_SET.into(), bytes.to_vec())
    }

    /// Kept for the comparisons of later versions.
    pub fn probe_embeddings(&mut self, period: PeriodId, embeddings: &Embeddings) -> Result<()> {
        let bytes = super::measure::encode(embeddings)?;
        self.put(output::probe_embeddings(period), bytes)
    }
}

fn embedding_row(meta: &FrameMeta, embedding: &[f32]) -> EmbeddingRow {
    EmbeddingRow {
        stream_id: meta.stream_id.to_string(),
        captured_at: meta.captured_at,
        topic: meta.topic.to_string(),
        partition: meta.partition,
        offset: meta.offset,
        row: meta.row,
        embedding: embedding.to_vec(),
    }
}
