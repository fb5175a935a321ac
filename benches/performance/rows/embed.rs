//! The encoder's forward pass in evaluation mode, as `/v1/embed` runs it, without decoding and HTTP.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Result, ensure};
use candle_core::{Device, Tensor};
use palimpsest::model::{Architecture, Encoder, EncoderSpec, Mode, Precision, Trainability, Weights, build};
use serde::{Deserialize, Serialize};

use super::{Comparison, OURS, Row, Units, Work, files};

const IMAGE_SIZE: usize = 64;
/// Features of the first image that both sides compare.
const CHECKED_VALUES: usize = 32;
const SEED: u64 = 5;

pub fn rows() -> Vec<Box<dyn Row>> {
    let row = |name, architecture, batch, inner| -> Box<dyn Row> {
        Box::new(Embed { name, architecture, batch, inner })
    };
    vec![
        row("embed_vit_tiny_32", Architecture::VitTiny, 32, 4),
        row("embed_vit_tiny_1", Architecture::VitTiny, 1, 64),
        row("embed_resnet18_32", Architecture::Resnet18, 32, 4),
        row("embed_resnet18_1", Architecture::Resnet18, 1, 64),
    ]
}

struct Embed {
    name: &'static str,
    architecture: Architecture,
    batch: usize,
    /// Forward passes a repetition: enough for a tenth of a second or more.
    inner: usize,
}

#[derive(Serialize, Deserialize)]
struct Plan {
    architecture: Architecture,
    image_size: usize,
    patch_size: usize,
    warm_up: usize,
    checked_values: usize,
    inner: usize,
}

impl Plan {
    fn encoder(&self) -> EncoderSpec {
        EncoderSpec {
            architecture: self.architecture,
            image_size: self.image_size,
            patch_size: self.patch_size,
        }
    }
}

impl Row for Embed {
    fn name(&self) -> &'static str {
        self.name
    }

    fn title(&self) -> String {
        format!("embed of {}, {}, {IMAGE_SIZE}x{IMAGE_SIZE}", self.batch, self.architecture)
    }

    fn peer_kind(&self) -> &'static str {
        "embed"
    }

    fn comparisons(&self) -> Vec<Comparison> {
        let against = |against, variants| Comparison {
            ours: OURS,
            against,
            variants,
            targets: Some((1.0, 0.7)),
            tolerance: 2e-3,
            checked: OURS,
            needs_bf16: false,
        };
        vec![against("PyTorch f32 eager", &["eager"]), against("onnxruntime", &["onnxruntime"])]
    }

    fn warm_up(&self) -> usize {
        3
    }

    fn units(&self) -> Units {
        Units { count: self.inner, name: "batch", as_rate: false }
    }

    fn prepare(&self, folder: &Path, small: bool) -> Result<()> {
        let patch_size = files::default(&files::defaults()?, "model", "patch_size")?;
        let plan = Plan {
            architecture: self.architecture,
            image_size: IMAGE_SIZE,
            patch_size,
            warm_up: self.warm_up(),
            checked_values: CHECKED_VALUES,
            inner: if small { 1 } else { self.inner },
        };
        let weights = Weights::initialise(&plan.encoder().parameters(), SEED, &Device::Cpu)?;
        std::fs::write(folder.join("encoder.safetensors"), weights.to_safetensors()?)?;
        let shape = [self.batch, 3, IMAGE_SIZE, IMAGE_SIZE];
        let images = Tensor::from_vec(files::noise(SEED, shape.iter().product()), &shape, &Device::Cpu)?;
        files::write_tensors(folder, "images.safetensors", HashMap::from([("images", images)]))?;
        files::write_plan(folder, &plan)
    }

    fn start(&self, folder: &Path, _: &str) -> Result<Box<dyn Work>> {
        let plan: Plan = files::read_plan(folder)?;
        let (spec, bytes) = (plan.encoder(), files::read(folder, "encoder.safetensors")?);
        let weights = Weights::load(&bytes, &spec.parameters(), &Device::Cpu, Trainability::Frozen)?;
        let mut passes = Passes {
            encoder: build(&spec, &weights, Precision::F32)?,
            images: files::read_tensor(folder, "images.safetensors", "images")?,
            inner: plan.inner,
            check: Vec::new(),
        };
        let features = passes.embed()?;
        passes.check = features.iter().take(plan.checked_values).map(|value| f64::from(*value)).collect();
        Ok(Box::new(passes))
    }

    fn verify(&self, features: &[f64]) -> Result<()> {
        let finite = features.len() == CHECKED_VALUES && features.iter().all(|value| value.is_finite());
        ensure!(finite && features.iter().any(|value| *value != features[0]), "{features:?}");
        Ok(())
    }
}

struct Passes {
    encoder: Box<dyn Encoder>,
    images: Tensor,
    inner: usize,
    check: Vec<f64>,
}

impl Passes {
    fn embed(&self) -> Result<Vec<f32>> {
        Ok(self.encoder.forward(&self.images, Mode::Eval)?.flatten_all()?.to_vec1()?)
    }
}

impl Work for Passes {
    fn repeat(&mut self) -> Result<()> {
        for _ in 0..self.inner {
            self.embed()?;
        }
        Ok(())
    }

    fn check(&self) -> Vec<f64> {
        self.check.clone()
    }
}
