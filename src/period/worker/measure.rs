//! The candidate on the probe sets: embeds what has to be embedded and hands it to `eval`.

use std::sync::Arc;

use candle_core::Device;
use safetensors::tensor::{Dtype, SafeTensorError, TensorView};

use super::outputs::Written;
use super::{Data, Result, Worker, inputs};
use crate::eval::evaluate::{self, Older, Probe, Reference};
use crate::eval::{Embeddings, FrameMeta, NewProbeEvaluation, ProbeEvaluation};
use crate::model::{Precision, Trainability};
use crate::train::embed::{embed_frames, measure_pairs};
use crate::train::frames::FrameSet;
use crate::train::job::view_maker;
use crate::train::network::{Compute, Network, NetworkBytes};
use crate::train::spec::{ProbeInput, Recipe};
use crate::types::FileRef;

/// Frames embedded at a time. Larger: more memory; smaller: products too small for the cores.
const EMBED_BATCH: usize = 128;
const KEPT_TENSOR: &str = "embeddings";

#[derive(Debug, thiserror::Error)]
pub enum MeasureError {
    #[error("kept embeddings can't be encoded or decoded: {0}")]
    SafeTensors(#[from] SafeTensorError),
    #[error("kept embeddings hold {dtype:?} of shape {shape:?}, not f32 [frames, dimension]")]
    Shape { dtype: Dtype, shape: Vec<usize> },
}

/// A network under measurement.
pub struct Subject<'a> {
    worker: &'a Worker<'a>,
    recipe: &'a Recipe,
    bytes: &'a NetworkBytes,
    network: Network,
    device: &'a Device,
}

impl<'a> Subject<'a> {
    pub fn new(worker: &'a Worker<'a>, bytes: &'a NetworkBytes, device: &'a Device) -> Result<Self> {
        let recipe = &worker.job.recipe;
        // Published embeddings are the encoder's own, as every other reader of its weights computes them.
        let compute = Compute { device, precision: Precision::F32 };
        let network = Network::load(&recipe.model, bytes, compute, Trainability::Frozen)
            .map_err(crate::train::TrainError::from)?;
        Ok(Self { worker, recipe, bytes, network, device })
    }

    /// Whether every weight is.
    pub fn is_finite(&self) -> Result<bool> {
        Ok(all_finite(&self.bytes.encoder)? && all_finite(&self.bytes.projector)?)
    }

    /// `[indices.len(), feature_dim]`.
    pub fn embed(&self, frames: &FrameSet, indices: &[usize]) -> Result<Embeddings> {
        let encoder = self.network.encoder();
        let bytes = indices.iter().map(|&index| match self.worker.is_stopped() {
            true => Err(std::io::Error::from(std::io::ErrorKind::Interrupted)),
            false => frames.bytes(index),
        });
        let preprocessing = self.recipe.model.preprocessing();
        let rows = embed_frames(encoder, bytes, &preprocessing, EMBED_BATCH, self.device)?;
        Ok(Embeddings::new(indices.len(), encoder.feature_dim(), rows))
    }

    /// Embeddings of two augmented views of each frame, and their NT-Xent: the same views for every subject.
    fn views(&self, frames: &Arc<FrameSet>, indices: &[usize]) -> Result<(Embeddings, Embeddings, f64)> {
        let maker = view_maker(self.recipe, frames);
        let settings = (&self.recipe.optimisation, self.recipe.composition.duplicate_distance);
        let pairs = measure_pairs(&self.network, &maker, indices, settings, self.device)?;
        let dim = self.network.encoder().feature_dim();
        let embeddings = |data| Embeddings::new(indices.len(), dim, data);
        Ok((embeddings(pairs.first), embeddings(pairs.second), pairs.loss))
    }
}

fn all_finite(safetensors: &[u8]) -> Result<bool> {
    let tensors = safetensors::SafeTensors::deserialize(safetensors).map_err(MeasureError::from)?;
    Ok(tensors.iter().filter(|(_, tensor)| tensor.dtype() == Dtype::F32).all(|(_, tensor)| {
        tensor.data().as_chunks::<4>().0.iter().all(|bytes| f32::from_le_bytes(*bytes).is_finite())
    }))
}

/// Candidate and reference (the teacher, or the initial weights) on the period's own probe set.
pub fn new_probe(
    worker: &Worker,
    data: &Data,
    candidate: &Subject,
    reference: &Subject,
    written: &mut Written,
) -> Result<NewProbeEvaluation> {
    let (frames, probe) = (&data.frames, &data.split.probe);
    let embeddings = candidate.embed(frames, probe)?;
    let reference_embeddings = reference.embed(frames, probe)?;
    let (first, second, candidate_loss) = candidate.views(frames, probe)?;
    let (.., reference_loss) = reference.views(frames, probe)?;
    let metas = metas(frames, probe);
    let evaluation = evaluate::evaluate_new_probe(
        Probe {
            period: worker.job.recipe.period,
            frames: &metas,
            candidate: &embeddings,
            views: Some((&first, &second)),
        },
        Reference { embeddings: &reference_embeddings, candidate_loss, reference_loss },
        &settings(&worker.job.recipe),
    )?;
    written.probe_embeddings(worker.job.recipe.period, &embeddings)?;
    Ok(evaluation)
}

/// The candidate on an earlier period's set, against what its ancestors made of it.
pub fn earlier_probe(
    worker: &Worker,
    probe: &ProbeInput,
    candidate: &Subject,
    written: &mut Written,
) -> Result<ProbeEvaluation> {
    let frames = Arc::new(inputs::probe_set(worker, &probe.file)?);
    let indices: Vec<usize> = (0..frames.len()).collect();
    let embeddings = candidate.embed(&frames, &indices)?;
    let (first, second, _) = candidate.views(&frames, &indices)?;
    let kept = probe.embeddings.iter().map(|kept| Ok((kept, fetch_kept(worker, &kept.file)?)));
    let kept = kept.collect::<Result<Vec<_>>>()?;
    let older: Vec<Older> = kept
        .iter()
        .map(|(kept, embeddings)| Older { version: kept.version, role: kept.role, embeddings })
        .collect();
    let metas = metas(&frames, &indices);
    let evaluation = evaluate::evaluate_probe(
        Probe {
            period: probe.period,
            frames: &metas,
            candidate: &embeddings,
            views: Some((&first, &second)),
        },
        &older,
        &settings(&worker.job.recipe),
    )?;
    written.probe_embeddings(probe.period, &embeddings)?;
    Ok(evaluation)
}

fn settings(recipe: &Recipe) -> evaluate::Settings {
    let probe = &recipe.probe;
    evaluate::Settings {
        block_ms: probe.block_ms,
        guard_ms: probe.guard_ms,
        k: probe.k,
        resamples: probe.bootstrap,
        seed: recipe.seed,
    }
}

fn metas(frames: &FrameSet, indices: &[usize]) -> Vec<FrameMeta> {
    let metas = indices.iter().map(|&index| frames.meta(index));
    let owned = metas.map(|meta| FrameMeta {
        stream_id: meta.stream_id.to_string(),
        captured_at: meta.captured_at,
        label: meta.label.as_deref().map(str::to_owned),
    });
    owned.collect()
}

fn fetch_kept(worker: &Worker, file: &FileRef) -> Result<Embeddings> {
    let bytes = worker.handle.block_on(worker.store.get_verified(file))?;
    Ok(decode(&bytes)?)
}

/// f32 `[frames, dimension]` as safetensors.
pub fn encode(embeddings: &Embeddings) -> std::result::Result<Vec<u8>, MeasureError> {
    let bytes: Vec<u8> = embeddings.data.iter().flat_map(|value| value.to_le_bytes()).collect();
    let view = TensorView::new(Dtype::F32, vec![embeddings.rows, embeddings.dim], &bytes)?;
    Ok(safetensors::serialize([(KEPT_TENSOR, view)], None)?)
}

fn decode(bytes: &[u8]) -> std::result::Result<Embeddings, MeasureError> {
    let tensors = safetensors::SafeTensors::deserialize(bytes)?;
    let tensor = tensors.tensor(KEPT_TENSOR)?;
    let (dtype, shape) = (tensor.dtype(), tensor.shape());
    let &[rows, dim] = shape else { return Err(MeasureError::Shape { dtype, shape: shape.to_vec() }) };
    if dtype != Dtype::F32 {
        return Err(MeasureError::Shape { dtype, shape: shape.to_vec() });
    }
    let values = tensor.data().as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
    Ok(Embeddings::new(rows, dim, values.collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kept_embeddings_read_back_bit_for_bit() {
        let embeddings = Embeddings::new(2, 3, vec![0.1, -2.0, 3.5, f32::MIN_POSITIVE, 0.0, -0.0]);
        assert_eq!(decode(&encode(&embeddings).unwrap()).unwrap(), embeddings);
    }

    #[test]
    fn kept_embeddings_of_another_shape_are_refused() {
        let view = TensorView::new(Dtype::F32, vec![1], &[0; 4]).unwrap();
        let bytes = safetensors::serialize([(KEPT_TENSOR, view)], None).unwrap();
        assert!(matches!(decode(&bytes), Err(MeasureError::Shape { .. })));
    }
}
