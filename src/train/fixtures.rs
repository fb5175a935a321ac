//! Small frames and parameters for the tests of training.

use std::io::Cursor;

use crate::model::preprocess::Preprocessing;
use crate::model::{Architecture, EncoderSpec};
use crate::types::{EventTime, PeriodId};

use super::frames::{FrameMeta, FrameSet, FrameSetWriter};
use super::spec::{
    Augmentation, Composition, Method, ModelSpec, Optimisation, PrecisionChoice, ProbeSpec, Recipe, SCHEMA,
    TrainJob,
};

pub fn optimisation() -> Optimisation {
    Optimisation {
        tau: 0.2,
        batch: 8,
        steps: 6,
        max_epochs: 100,
        learning_rate: 3e-3,
        warmup_ratio: 0.1,
        weight_decay: 1e-4,
        beta1: 0.9,
        beta2: 0.999,
        clip_norm: 1.0,
    }
}

pub fn augmentation() -> Augmentation {
    Augmentation {
        crop_scale: [0.3, 1.0],
        flip_probability: 0.5,
        jitter_probability: 0.8,
        jitter: [0.4, 0.4, 0.4, 0.1],
        grey_probability: 0.2,
        blur_probability: 0.5,
        blur_sigma: [0.1, 2.0],
    }
}

pub fn preprocessing() -> Preprocessing {
    Preprocessing { size: 32, mean: [0.5; 3], std: [0.25; 3] }
}

/// Stripes whose direction, width and colour depend on `i`.
pub fn picture(i: usize) -> Vec<u8> {
    let picture = image::RgbImage::from_fn(40, 36, |x, y| {
        let along = if i.is_multiple_of(2) { x } else { y };
        let bright = (along as usize / (1 + i / 2 % 5)).is_multiple_of(2);
        let colour = [(i * 37 % 256) as u8, (i * 91 % 256) as u8, (i * 53 % 256) as u8];
        image::Rgb(if bright { colour } else { colour.map(|c| 255 - c) })
    });
    let mut bytes = Cursor::new(Vec::new());
    picture.write_to(&mut bytes, image::ImageFormat::Png).unwrap();
    bytes.into_inner()
}

pub fn frames(count: usize) -> FrameSet {
    frames_with_a_broken_one(count, count)
}

/// Frame `broken` is cut in half; none is if it is not below `count`.
pub fn frames_with_a_broken_one(count: usize, broken: usize) -> FrameSet {
    let mut writer = FrameSetWriter::create(&std::env::temp_dir()).unwrap();
    for i in 0..count {
        let meta = FrameMeta {
            stream_id: format!("stream-{}", i % 4).into(),
            captured_at: EventTime(i as i64 * 1_000),
            label: None,
            topic: "frames".into(),
            partition: 0,
            offset: i as i64,
            row: 0,
        };
        let mut bytes = picture(i);
        if i == broken {
            bytes.truncate(bytes.len() / 2);
        }
        writer.push(meta, &bytes).unwrap();
    }
    writer.finish().unwrap()
}

pub fn model() -> ModelSpec {
    ModelSpec {
        encoder: EncoderSpec { architecture: Architecture::ResnetSmall, image_size: 32, patch_size: 8 },
        projector_hidden: 32,
        projector_dim: 16,
        mean: [0.5; 3],
        std: [0.25; 3],
        init: None,
    }
}

/// A first period's job of six steps.
pub fn job() -> TrainJob {
    let recipe = Recipe {
        period: PeriodId(EventTime(0)),
        period_end: EventTime(1_000_000),
        seed: 11,
        segments: Vec::new(),
        max_frames: 1_000,
        model: model(),
        teacher: None,
        method: Method::Finetune,
        teacher_share: 0.0,
        optimisation: optimisation(),
        augmentation: augmentation(),
        composition: Composition::AS_THEY_COME,
        probe: ProbeSpec { block_ms: 600_000, guard_ms: 0, ratio: 0.1, max_frames: 10, k: 20, bootstrap: 10 },
        probe_sets: Vec::new(),
    };
    TrainJob {
        schema: SCHEMA,
        pipeline: "main".into(),
        attempt: 1,
        start: 1,
        output_prefix: "out".into(),
        earlier_prefixes: Vec::new(),
        device: "cpu".into(),
        precision: PrecisionChoice::F32,
        micro_batch: None,
        threads: 2,
        checkpoint_steps: 2,
        recipe,
    }
}
