//! What one version knows of one period: probes with labels, and the measures that need none.

use std::sync::Arc;

use candle_core::Device;
use serde::{Deserialize, Serialize};

use super::stream::Period;
use crate::eval::drift::Neighbourhoods;
use crate::eval::{Embeddings, drift, knn, linear_probe};
use crate::model::{Precision, Trainability};
use crate::train::TrainError;
use crate::train::batches::{BatchError, ViewMaker};
use crate::train::embed::{embed_frames, measure_pairs};
use crate::train::network::{Compute, Network, NetworkBytes};
use crate::train::spec::{Augmentation, ModelSpec, Optimisation};

/// Frames embedded at a time; results don't depend on it.
const EMBED_BATCH: usize = 128;
/// Keys the views on which alignment and the contrastive loss are measured: the same for every version.
const VIEWS_SEED: u64 = 0x7061_6C69;

/// Evaluation is f32 on the CPU whatever training was.
pub(super) const COMPUTE: Compute<'static> = Compute { device: &Device::Cpu, precision: Precision::F32 };

/// Of the frames that are tested on, asked of a bank of those that were trained on. Accuracies are 0..1.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// Index of the period.
    pub period: usize,
    pub linear: f64,
    pub knn: f64,
    pub few_shot: f64,
    /// NT-Xent of two views of each frame, at the training's temperature and batch.
    pub contrastive_loss: f64,
    pub alignment: f64,
    pub uniformity: f64,
    pub effective_rank: f64,
    /// Against the version that learned the period; absent on that version itself.
    pub drift: Option<DriftScores>,
    /// Against the version before; absent where that one learned the period: then it is `drift`.
    pub parent_drift: Option<DriftScores>,
}

/// Embeddings of all of one period's frames by earlier versions.
#[derive(Debug, Clone)]
pub struct Earlier {
    /// By the version that learned the period.
    pub learned: Embeddings,
    /// By the version before this one, where that is another.
    pub parent: Option<Embeddings>,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct DriftScores {
    pub cka: f64,
    pub neighbour_overlap: f64,
    /// Absent from results of programs that did not measure it.
    pub neighbour_retention: Option<f64>,
    /// Held-out R² of the old space as a linear function of the new one.
    pub recoverability: f64,
}

/// How versions are measured.
#[derive(Debug, Clone, PartialEq)]
pub struct Measure<'a> {
    pub model: &'a ModelSpec,
    pub optimisation: &'a Optimisation,
    pub augmentation: &'a Augmentation,
    /// As training's.
    pub duplicate_distance: f64,
    /// Neighbours of the kNN probe and of the overlap.
    pub k: usize,
}

impl Measure<'_> {
    /// A version, ready to be measured on any number of periods.
    pub fn network(&self, version: &NetworkBytes) -> Result<Network, TrainError> {
        Ok(Network::load(self.model, version, COMPUTE, Trainability::Frozen)?)
    }

    /// The version's scores on `period`, number `index`, and its embeddings of all the period's frames.
    pub fn measure(
        &self,
        network: &Network,
        (index, period): (usize, &Period),
        earlier: Option<&Earlier>,
    ) -> Result<(Scores, Embeddings), TrainError> {
        let encoder = network.encoder();
        let frames = (0..period.frames.len()).map(|frame| period.frames.bytes(frame));
        let rows = embed_frames(encoder, frames, &self.model.preprocessing(), EMBED_BATCH, COMPUTE.device)?;
        let all = Embeddings::new(period.frames.len(), encoder.feature_dim(), rows);
        if !all.is_finite() {
            return Err(TrainError::NotFinite { step: 0, term: format!("an embedding of {}", period.name) });
        }
        let (split, tested) = (period.split(), period.tested());
        let maker = ViewMaker {
            frames: Arc::clone(&period.frames),
            augmentation: self.augmentation.clone(),
            preprocessing: self.model.preprocessing(),
            seed: VIEWS_SEED,
        };
        let pairs = measure_pairs(
            network,
            &maker,
            &tested,
            (self.optimisation, self.duplicate_distance),
            COMPUTE.device,
        )?;
        let view = |rows| Embeddings::new(tested.len(), all.dim, rows);
        let of_tests = all.select(&tested);
        let against = |old: &Embeddings| {
            let old_tests = old.select(&tested);
            let (now, before) =
                (Neighbourhoods::of(&of_tests, self.k), Neighbourhoods::of(&old_tests, self.k));
            DriftScores {
                cka: drift::linear_cka(&of_tests, &old_tests),
                neighbour_overlap: now.overlap(&before),
                neighbour_retention: Some(drift::retention(&now.retained_from(&before))),
                recoverability: drift::recoverability(&all, old, &split),
            }
        };
        let scores = Scores {
            period: index,
            linear: linear_probe::linear(&all, &period.labels, &split),
            knn: knn::knn(&all, &period.labels, &split, self.k).accuracy,
            few_shot: linear_probe::few_shot(&all, &period.labels, &split),
            contrastive_loss: pairs.loss,
            alignment: drift::alignment(&view(pairs.first), &view(pairs.second)),
            uniformity: drift::uniformity(&of_tests),
            effective_rank: drift::effective_rank(&of_tests),
            drift: earlier.map(|earlier| against(&earlier.learned)),
            parent_drift: earlier.and_then(|earlier| earlier.parent.as_ref()).map(against),
        };
        Ok((scores, all))
    }
}

/// The frame that an error speaks of, if it speaks of one.
pub(super) fn frame_of(error: &TrainError) -> Option<usize> {
    match error {
        TrainError::Batch(BatchError::Image { frame, .. } | BatchError::Read { frame, .. }) => Some(*frame),
        _ => None,
    }
}
