//! How alike two frames are to look at, and which frames that keeps from being trained on.
//!
//! Frames are compared by [`Thumbnail`]s, the whole frame at 8 x 8 pixels: they are alike where the thumbnails differ by no more than a
//! share of their contrast. A difference of colours and not a hash of bits (dHash, pHash): where a picture is flat the sign of a
//! difference is noise, and so are most bits of a dark scene. A share of the contrast and not a number of levels: dark scenes are
//! near each other whatever they show. Frames with the same bytes are copies.
//!
//! Nothing here is random, and no label is looked at.

use std::collections::HashMap;

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::model::preprocess::{Crop, MAX_PIXELS, PreprocessError, RgbFrame, Scaler};

use super::batches::BatchError;
use super::frames::FrameSet;
use super::spec::{Composition, LeftOut};

/// Pixels a side of a thumbnail. Larger tells apart what moved a little, smaller takes different scenes of one colour for the same.
const SIDE: u32 = 8;
const LEN: usize = (3 * SIDE * SIDE) as usize;
/// Levels by which a mean may be off, many times over; what it lets in is compared all the same.
const ROUNDING: f64 = 1e-6;

/// See the module's text.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Thumbnail {
    /// Row by row, three bytes a pixel.
    bytes: [u8; LEN],
    mean: f64,
    /// Mean difference of the bytes from their mean, in levels.
    contrast: f64,
}

impl Thumbnail {
    pub fn of(frame: &RgbFrame, scaler: &mut Scaler) -> Result<Self, PreprocessError> {
        let whole = Crop { left: 0, top: 0, width: frame.width, height: frame.height };
        let mut bytes = [0; LEN];
        bytes.copy_from_slice(scaler.crop(frame, whole, [SIDE, SIDE])?);
        Ok(Self::new(bytes))
    }

    fn new(bytes: [u8; LEN]) -> Self {
        let mean = bytes.iter().map(|byte| f64::from(*byte)).sum::<f64>() / LEN as f64;
        let contrast = bytes.iter().map(|byte| (f64::from(*byte) - mean).abs()).sum::<f64>() / LEN as f64;
        Self { bytes, mean, contrast }
    }

    /// Mean difference of the bytes, in levels: 0 to 255.
    fn difference(&self, other: &Self) -> f64 {
        let differences = self.bytes.iter().zip(&other.bytes).map(|(a, b)| u32::from(a.abs_diff(*b)));
        f64::from(differences.sum::<u32>()) / LEN as f64
    }

    /// How far the mean of one that is like this one may lie: no two thumbnails differ by less than their means do.
    fn reach(&self, limit: f64) -> f64 {
        limit * self.contrast + ROUNDING
    }

    /// Whether they differ by at most `limit` times the smaller one's contrast. Equal ones do at any limit.
    pub fn is_like(&self, other: &Self, limit: f64) -> bool {
        self.difference(other) <= limit * self.contrast.min(other.contrast)
    }
}

/// What a frame is known by.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Look {
    /// SHA-256 of the encoded bytes.
    content: [u8; 32],
    thumbnail: Thumbnail,
}

/// The looks of the frames that `indices` names, in that order. Decodes each once, on the thread pool it is called in.
pub fn looks(frames: &FrameSet, indices: &[usize]) -> Result<Vec<Look>, BatchError> {
    let look = |(decoded, scaler): &mut (RgbFrame, Scaler), &frame: &usize| {
        let bytes = frames.bytes(frame).map_err(|source| BatchError::Read { frame, source })?;
        let image = |source| BatchError::Image { frame, source };
        decoded.decode(&bytes, MAX_PIXELS).map_err(image)?;
        let thumbnail = Thumbnail::of(decoded, scaler).map_err(image)?;
        Ok(Look { content: Sha256::digest(&bytes).into(), thumbnail })
    };
    indices.par_iter().map_init(Default::default, look).collect()
}

/// All pairs of alike thumbnails, by position, the smaller one first; in ascending order.
pub fn alike(thumbnails: &[Thumbnail], limit: f64) -> Vec<(usize, usize)> {
    let mut by_mean: Vec<usize> = (0..thumbnails.len()).collect();
    by_mean.sort_by(|a, b| thumbnails[*a].mean.total_cmp(&thumbnails[*b].mean));
    let mut pairs = Vec::new();
    for (place, &a) in by_mean.iter().enumerate() {
        let thumbnail = &thumbnails[a];
        let farthest = thumbnail.mean + thumbnail.reach(limit);
        let brighter = by_mean[place + 1..].iter().take_while(|b| thumbnails[**b].mean <= farthest);
        let like = brighter.filter(|b| thumbnail.is_like(&thumbnails[**b], limit));
        pairs.extend(like.map(|&b| (a.min(b), a.max(b))));
    }
    pairs.sort_unstable();
    pairs
}

/// Training frames that are left, and how many were left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chosen {
    /// Indices into the set, in the order they had.
    pub train: Vec<usize>,
    pub left_out: LeftOut,
}

/// Leaves out of `train`, frames with `looks`, what is like a frame of `probes`, and then of equal frames all but the first
/// `max_copies`.
pub fn choose(train: &[usize], looks: &[Look], probes: &[Look], rules: &Composition) -> Chosen {
    let probes = Probes::new(probes);
    let near: Vec<bool> =
        looks.par_iter().map(|look| probes.have_one_like(look, rules.duplicate_distance)).collect();
    let mut chosen = Chosen { train: Vec::new(), left_out: LeftOut::default() };
    let mut seen: HashMap<[u8; 32], u64> = HashMap::new();
    for ((&frame, look), near) in train.iter().zip(looks).zip(near) {
        if near {
            chosen.left_out.near_probe += 1;
            continue;
        }
        let copies = seen.entry(look.content).or_insert(0);
        *copies += 1;
        match *copies <= rules.max_copies {
            true => chosen.train.push(frame),
            false => chosen.left_out.copies += 1,
        }
    }
    chosen
}

/// Thumbnails by their means, so that few are compared with.
struct Probes<'a>(Vec<&'a Thumbnail>);

impl<'a> Probes<'a> {
    fn new(looks: &'a [Look]) -> Self {
        let mut by_mean: Vec<&Thumbnail> = looks.iter().map(|look| &look.thumbnail).collect();
        by_mean.sort_by(|a, b| a.mean.total_cmp(&b.mean));
        Self(by_mean)
    }

    fn have_one_like(&self, look: &Look, limit: f64) -> bool {
        let thumbnail = &look.thumbnail;
        let reach = thumbnail.reach(limit);
        let first = self.0.partition_point(|other| other.mean < thumbnail.mean - reach);
        let near = self.0[first..].iter().take_while(|other| other.mean <= thumbnail.mean + reach);
        near.into_iter().any(|other| thumbnail.is_like(other, limit))
    }
}

#[cfg(test)]
#[path = "likeness_tests.rs"]
mod tests;
