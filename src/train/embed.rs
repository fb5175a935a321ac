//! Embedding many frames with a trained encoder, and its measures on pairs of augmented views.
//!
//! Everything runs in eval mode, so a frame's embedding does not depend on its neighbours in a batch. What the
//! numbers mean is evaluation's to say.

use std::io;

use candle_core::{Device, Tensor};
use rayon::prelude::*;

use crate::model::preprocess::{MAX_PIXELS, PreprocessError, Preprocessing, decode_rgb, embed_views};
use crate::model::{Encoder, Mode};

use super::batches::{BatchError, ViewMaker};
use super::error::TrainError;
use super::likeness::alike;
use super::loss::ntxent;
use super::network::Network;
use super::rng::{Domain, permutation};
use super::spec::Optimisation;

/// An epoch that no training reaches: its order mixes the streams of a probe set.
const PROBE_EPOCH: u32 = u32::MAX;

/// Embeds encoded frames by their evaluation views, `batch` at a time: row-major `[frames, feature_dim]`, in the
/// order of `frames`. Memory is bounded by a batch and the result.
///
/// # Errors
/// Names the position of a frame that could not be read or decoded.
pub fn embed_frames(
    encoder: &dyn Encoder,
    frames: impl Iterator<Item = io::Result<Vec<u8>>>,
    preprocessing: &Preprocessing,
    batch: usize,
    device: &Device,
) -> Result<Vec<f32>, TrainError> {
    let mut rows = Vec::new();
    let mut frames = frames.enumerate().peekable();
    while frames.peek().is_some() {
        let encoded = frames.by_ref().take(batch.max(1)).map(|(frame, bytes)| match bytes {
            Ok(bytes) => Ok((frame, bytes)),
            Err(source) => Err(BatchError::Read { frame, source }),
        });
        let encoded = encoded.collect::<Result<Vec<_>, _>>()?;
        let first = encoded[0].0;
        let views = evaluation_views(&encoded, preprocessing)?;
        let features = embed_views(encoder, views, preprocessing, device);
        rows.extend(features.map_err(|source| BatchError::Image { frame: first, source })?);
    }
    Ok(rows)
}

/// `[encoded.len(), 3, size, size]`, decoded in parallel.
fn evaluation_views(
    encoded: &[(usize, Vec<u8>)],
    preprocessing: &Preprocessing,
) -> Result<Vec<f32>, BatchError> {
    let view_len = preprocessing.view_len();
    let mut views = vec![0f32; encoded.len() * view_len];
    views.par_chunks_exact_mut(view_len).zip(encoded).try_for_each(|(out, (frame, bytes))| {
        let mut view = |bytes: &[u8]| -> Result<(), PreprocessError> {
            preprocessing.evaluation_view(&decode_rgb(bytes, MAX_PIXELS)?, out)
        };
        view(bytes).map_err(|source| BatchError::Image { frame: *frame, source })
    })?;
    Ok(views)
}

/// What a network makes of two augmented views of each frame.
#[derive(Debug, Clone, PartialEq)]
pub struct Pairs {
    /// Features of the first and of the second views, row-major `[frames, feature_dim]`, in the order of frames.
    pub first: Vec<f32>,
    pub second: Vec<f32>,
    /// NT-Xent of the projections, the mean over frames; 0 of no frames.
    pub loss: f64,
}

/// Measures `network` on views and batches (of `optimisation.batch`, at `optimisation.tau`) that do not depend on
/// it: two networks measured with the same arguments can be compared. Frames are mixed by the maker's seed
/// before they are batched; those that are alike by `duplicate_distance` are no negatives of each other, as in training.
pub fn measure_pairs(
    network: &Network,
    maker: &ViewMaker,
    indices: &[usize],
    (optimisation, duplicate_distance): (&Optimisation, f64),
    device: &Device,
) -> Result<Pairs, TrainError> {
    let dim = network.encoder().feature_dim();
    let mut pairs =
        Pairs { first: vec![0.0; indices.len() * dim], second: vec![0.0; indices.len() * dim], loss: 0.0 };
    let order = permutation(maker.seed, Domain::Order, PROBE_EPOCH, indices.len() as u32);
    for positions in order.chunks(optimisation.batch.max(1)) {
        let frames: Vec<usize> = positions.iter().map(|position| indices[*position as usize]).collect();
        let (features, loss) =
            measure_batch(network, maker, &frames, (optimisation.tau, duplicate_distance), device)?;
        let (first, second) = features.split_at(frames.len() * dim);
        for (i, position) in positions.iter().enumerate() {
            let (from, to) = (i * dim..(i + 1) * dim, *position as usize * dim);
            pairs.first[to..to + dim].copy_from_slice(&first[from.clone()]);
            pairs.second[to..to + dim].copy_from_slice(&second[from]);
        }
        pairs.loss += loss * frames.len() as f64 / indices.len() as f64;
    }
    Ok(pairs)
}

/// Features `[2 * frames, feature_dim]` of the first views, then the second ones, and NT-Xent of the projections.
fn measure_batch(
    network: &Network,
    maker: &ViewMaker,
    frames: &[usize],
    (tau, duplicate_distance): (f64, f64),
    device: &Device,
) -> Result<(Vec<f32>, f64), TrainError> {
    let (count, size) = (frames.len(), maker.preprocessing.size);
    let (views, thumbnails) = maker.pairs(Domain::ProbeViews, 0, frames)?;
    let views = Tensor::from_vec(views, (2 * count, 3, size, size), device)?;
    let (features, projections) = network.forward(&views, Mode::Eval)?;
    let projections = projections.detach();
    let same = alike(&thumbnails, duplicate_distance);
    let loss = ntxent(&projections.narrow(0, 0, count)?, &projections.narrow(0, count, count)?, tau, &same)?;
    let loss = f64::from(loss.to_scalar::<f32>()?);
    Ok((features.detach().flatten_all()?.to_vec1()?, loss))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::model::Precision;
    use crate::train::fixtures;
    use crate::train::network::Compute;

    fn network() -> Network {
        Network::initialise(
            &fixtures::model(),
            1,
            None,
            Compute { device: &Device::Cpu, precision: Precision::F32 },
        )
        .unwrap()
    }

    #[test]
    fn a_frames_embedding_does_not_depend_on_its_batch() {
        let (network, frames) = (network(), fixtures::frames(7));
        let embed = |batch| {
            let bytes = (0..7).map(|i| frames.bytes(i));
            embed_frames(network.encoder(), bytes, &fixtures::preprocessing(), batch, &Device::Cpu).unwrap()
        };
        let (one, four) = (embed(1), embed(4));
        assert_eq!(one.len(), 7 * network.encoder().feature_dim());
        for (a, b) in one.iter().zip(four) {
            assert!((a - b).abs() < 1e-5, "{a} {b}");
        }
    }

    #[test]
    fn a_frame_that_cannot_be_embedded_is_named() {
        let (network, frames) = (network(), fixtures::frames_with_a_broken_one(5, 3));
        let bytes = (0..5).map(|i| frames.bytes(i));
        let error =
            embed_frames(network.encoder(), bytes, &fixtures::preprocessing(), 2, &Device::Cpu).unwrap_err();
        assert!(matches!(error, TrainError::Batch(BatchError::Image { frame: 3, .. })), "{error}");
    }

    #[test]
    fn pairs_are_the_same_for_equal_networks_and_stay_in_the_order_of_frames() {
        let maker = ViewMaker {
            frames: Arc::new(fixtures::frames(10)),
            augmentation: fixtures::augmentation(),
            preprocessing: fixtures::preprocessing(),
            seed: 3,
        };
        let optimisation = Optimisation { batch: 4, ..fixtures::optimisation() };
        let measure = |indices: &[usize]| {
            measure_pairs(&network(), &maker, indices, (&optimisation, 0.0), &Device::Cpu).unwrap()
        };
        let all = measure(&[0, 1, 2, 3, 4, 5]);
        assert_eq!(all, measure(&[0, 1, 2, 3, 4, 5]));
        assert!(all.loss > 0.0 && all.first != all.second);
        let dim = network().encoder().feature_dim();
        let some = measure(&[4, 1]);
        for (got, expected) in
            some.first.iter().zip(all.first[4 * dim..5 * dim].iter().chain(&all.first[dim..]))
        {
            assert!((got - expected).abs() < 1e-5, "{got} {expected}");
        }
        assert_eq!(measure(&[]).loss, 0.0);
    }
}
