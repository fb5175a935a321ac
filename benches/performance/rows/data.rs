//! Decoding JPEG frames and SimCLR's augmentation: what a training step is fed with.
//!
//! The frames are mosaics of the committed sample, 5 x 5 of its 64 x 48 pictures, so that they have the detail of
//! real ones at 320 x 240. Views are random on both sides: nothing is compared but their number.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use image::codecs::jpeg::JpegEncoder;
use image::{RgbImage, imageops};
use palimpsest::model::preprocess::Preprocessing;
use palimpsest::train::batches::ViewMaker;
use palimpsest::train::frames::{FrameMeta, FrameSet, FrameSetWriter};
use palimpsest::train::rng::Domain;
use palimpsest::train::spec::Augmentation;
use palimpsest::types::EventTime;
use serde::{Deserialize, Serialize};

use super::{Comparison, OURS, Row, Units, Work, files};

const SAMPLES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/samples/freedoom/01-bases");
const FRAMES: &str = "frames";
const TILES: u32 = 5;
const TILE: (u32, u32) = (64, 48);
const JPEG_QUALITY: u8 = 90;
const BATCH: usize = 64;
/// Batches a repetition.
const BATCHES: usize = 8;
const SMALL_BATCHES: usize = 1;
const SEED: u64 = 6;

pub struct Data;

#[derive(Serialize, Deserialize)]
struct Plan {
    image_size: usize,
    batch: usize,
    batches: usize,
    warm_up: usize,
    mean: [f32; 3],
    std: [f32; 3],
    #[serde(flatten)]
    augmentation: Augmentation,
}

impl Row for Data {
    fn name(&self) -> &'static str {
        "data"
    }

    fn title(&self) -> String {
        let (width, height) = (TILES * TILE.0, TILES * TILE.1);
        format!("decode {width}x{height} JPEG, 2 views of 64x64 by SimCLR's augmentation")
    }

    fn peer_kind(&self) -> &'static str {
        "data"
    }

    fn comparisons(&self) -> Vec<Comparison> {
        vec![Comparison {
            ours: OURS,
            against: "torchvision v2 in a DataLoader",
            variants: &["tensor", "pil"],
            targets: Some((0.5, 0.25)),
            tolerance: 0.0,
            checked: OURS,
            needs_bf16: false,
        }]
    }

    fn warm_up(&self) -> usize {
        1
    }

    fn units(&self) -> Units {
        Units { count: BATCH * BATCHES, name: "frame", as_rate: true }
    }

    fn prepare(&self, folder: &Path, small: bool) -> Result<()> {
        let defaults = files::defaults()?;
        let batches = if small { SMALL_BATCHES } else { BATCHES };
        let plan = Plan {
            image_size: files::default(&defaults, "model", "image_size")?,
            batch: BATCH,
            batches,
            warm_up: self.warm_up(),
            mean: files::default(&defaults, "model", "mean")?,
            std: files::default(&defaults, "model", "std")?,
            augmentation: defaults["augment"].clone().try_into()?,
        };
        write_mosaics(&folder.join(FRAMES), BATCH * batches)?;
        files::write_plan(folder, &plan)
    }

    fn start(&self, folder: &Path, _: &str) -> Result<Box<dyn Work>> {
        let plan: Plan = files::read_plan(folder)?;
        let frames = read_frames(&folder.join(FRAMES))?;
        ensure!(frames.len() == plan.batch * plan.batches, "{} frames", frames.len());
        Ok(Box::new(Epochs {
            maker: ViewMaker {
                frames: Arc::new(frames),
                augmentation: plan.augmentation,
                preprocessing: Preprocessing { size: plan.image_size, mean: plan.mean, std: plan.std },
                seed: SEED,
            },
            batch: plan.batch,
            taken: 0,
        }))
    }

    fn verify(&self, check: &[f64]) -> Result<()> {
        ensure!(check.is_empty(), "views are random: there is nothing to agree on");
        Ok(())
    }
}

fn write_mosaics(folder: &Path, count: usize) -> Result<()> {
    std::fs::create_dir(folder)?;
    let tiles = sample_pictures()?;
    let mut next = tiles.iter().cycle();
    for index in 0..count {
        let mut mosaic = RgbImage::new(TILES * TILE.0, TILES * TILE.1);
        for place in 0..TILES * TILES {
            let tile = next.next().context("the sample has no pictures")?;
            let (x, y) = (place % TILES * TILE.0, place / TILES * TILE.1);
            imageops::replace(&mut mosaic, tile, i64::from(x), i64::from(y));
        }
        let mut bytes = Vec::new();
        JpegEncoder::new_with_quality(&mut bytes, JPEG_QUALITY).encode_image(&mosaic)?;
        std::fs::write(folder.join(format!("{index:05}.jpg")), bytes)?;
    }
    Ok(())
}

/// In the order of their paths.
fn sample_pictures() -> Result<Vec<RgbImage>> {
    let mut pictures = Vec::new();
    for map in sorted_paths(Path::new(SAMPLES))? {
        for path in sorted_paths(&map)? {
            pictures.push(image::open(&path).with_context(|| path.display().to_string())?.into_rgb8());
        }
    }
    Ok(pictures)
}

fn sorted_paths(folder: &Path) -> Result<Vec<std::path::PathBuf>> {
    let entries = std::fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    paths.sort();
    Ok(paths)
}

fn read_frames(folder: &Path) -> Result<FrameSet> {
    let mut writer = FrameSetWriter::create(&std::env::temp_dir())?;
    for (index, path) in sorted_paths(folder)?.iter().enumerate() {
        let meta = FrameMeta {
            stream_id: "sample".into(),
            captured_at: EventTime(index as i64),
            label: None,
            topic: "frames".into(),
            partition: 0,
            offset: index as i64,
            row: 0,
        };
        writer.push(meta, &std::fs::read(path)?)?;
    }
    Ok(writer.finish()?)
}

struct Epochs {
    maker: ViewMaker,
    batch: usize,
    /// Epochs so far: every repetition draws other views.
    taken: u64,
}

impl Work for Epochs {
    fn repeat(&mut self) -> Result<()> {
        let indices: Vec<usize> = (0..self.maker.frames.len()).collect();
        for batch in indices.chunks(self.batch) {
            let (views, _) = self.maker.pairs(Domain::Augmentation, self.taken, batch)?;
            let (first, second) = views.split_at(views.len() / 2);
            ensure!(first != second && views.iter().all(|value| value.is_finite()), "views that can't be");
        }
        self.taken += 1;
        Ok(())
    }

    fn check(&self) -> Vec<f64> {
        Vec::new()
    }
}
