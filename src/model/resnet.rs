//! Residual networks of basic blocks (He et al. 2016), by torchvision's names: `resnet18` with `fc = Identity()`, and a
//! small one for 32 x 32 images.
//!
//! Invariant: `parameters` and `build` walk the same `Plan`, so they can't disagree.

use candle_core::Tensor;

use super::init::{Init, ParameterSpec};
use super::layers::{ConvNorm, ConvNormSpec, train_residual_block};
use super::ops::{Activation, Precision, Window, channels_last, max_pool2d};
use super::weights::Weights;
use super::{Encoder, Mode, ModelError, check_images};

const MAX_POOL: Window = Window { kernel: 3, stride: 2, padding: 1 };

/// The shape of one network.
pub(super) struct Plan {
    pub image_size: usize,
    stem: Window,
    stem_channels: usize,
    max_pool: bool,
    stages: &'static [Stage],
}

struct Stage {
    blocks: usize,
    channels: usize,
    /// Of the stage's first block.
    stride: usize,
}

/// torchvision's `resnet18`: 11.2 million parameters, 512 features.
pub(super) fn resnet18(image_size: usize) -> Plan {
    const STAGES: [Stage; 4] = [
        Stage { blocks: 2, channels: 64, stride: 1 },
        Stage { blocks: 2, channels: 128, stride: 2 },
        Stage { blocks: 2, channels: 256, stride: 2 },
        Stage { blocks: 2, channels: 512, stride: 2 },
    ];
    Plan {
        image_size,
        stem: Window { kernel: 7, stride: 2, padding: 3 },
        stem_channels: 64,
        max_pool: true,
        stages: &STAGES,
    }
}

/// 173 thousand parameters, 96 features: trains on a CPU in a minute.
pub(super) fn resnet_small(image_size: usize) -> Plan {
    const STAGES: [Stage; 3] = [
        Stage { blocks: 1, channels: 24, stride: 1 },
        Stage { blocks: 1, channels: 48, stride: 2 },
        Stage { blocks: 1, channels: 96, stride: 2 },
    ];
    Plan {
        image_size,
        stem: Window { kernel: 3, stride: 2, padding: 1 },
        stem_channels: 24,
        max_pool: false,
        stages: &STAGES,
    }
}

/// One block: its name and what goes in and out.
struct BlockPlan {
    name: String,
    channels_in: usize,
    channels_out: usize,
    stride: usize,
}

impl BlockPlan {
    /// The way round needs a projection where shapes differ.
    fn has_downsample(&self) -> bool {
        self.stride != 1 || self.channels_in != self.channels_out
    }

    fn first(&self) -> Window {
        Window { kernel: 3, stride: self.stride, padding: 1 }
    }

    fn second(&self) -> Window {
        Window { kernel: 3, stride: 1, padding: 1 }
    }

    fn downsample(&self) -> Window {
        Window { kernel: 1, stride: self.stride, padding: 0 }
    }
}

impl Plan {
    pub(super) fn feature_dim(&self) -> usize {
        self.stages.last().map_or(self.stem_channels, |stage| stage.channels)
    }

    fn blocks(&self) -> Vec<BlockPlan> {
        let mut channels_in = self.stem_channels;
        let mut blocks = Vec::new();
        for (index, stage) in self.stages.iter().enumerate() {
            for block in 0..stage.blocks {
                let name = format!("layer{}.{block}", index + 1);
                let stride = if block == 0 { stage.stride } else { 1 };
                blocks.push(BlockPlan { name, channels_in, channels_out: stage.channels, stride });
                channels_in = stage.channels;
            }
        }
        blocks
    }

    /// In torchvision's order.
    pub(super) fn parameters(&self) -> Vec<ParameterSpec> {
        let mut specs = vec![conv_spec("conv1", (3, self.stem_channels), self.stem)];
        specs.extend(ParameterSpec::batch_norm("bn1", self.stem_channels));
        for block in self.blocks() {
            let BlockPlan { name, channels_in, channels_out, .. } = &block;
            specs.push(conv_spec(&format!("{name}.conv1"), (*channels_in, *channels_out), block.first()));
            specs.extend(ParameterSpec::batch_norm(&format!("{name}.bn1"), *channels_out));
            specs.push(conv_spec(&format!("{name}.conv2"), (*channels_out, *channels_out), block.second()));
            specs.extend(ParameterSpec::batch_norm(&format!("{name}.bn2"), *channels_out));
            if block.has_downsample() {
                let channels = (*channels_in, *channels_out);
                specs.push(conv_spec(&format!("{name}.downsample.0"), channels, block.downsample()));
                specs.extend(ParameterSpec::batch_norm(&format!("{name}.downsample.1"), *channels_out));
            }
        }
        specs
    }

    pub(super) fn build(&self, weights: &Weights, precision: Precision) -> Result<ResNet, ModelError> {
        let blocks = self.blocks();
        let stem = ConvNormSpec {
            conv: "conv1",
            norm: "bn1",
            channels: (3, self.stem_channels),
            window: self.stem,
            activation: Activation::Relu,
        };
        Ok(ResNet {
            image_size: self.image_size,
            feature_dim: self.feature_dim(),
            stem: ConvNorm::new(weights, stem, precision)?,
            max_pool: self.max_pool,
            blocks: blocks
                .iter()
                .map(|block| Block::new(weights, block, precision))
                .collect::<Result<_, _>>()?,
        })
    }
}

fn conv_spec(name: &str, (channels_in, channels_out): (usize, usize), window: Window) -> ParameterSpec {
    let init = Init::kaiming_fan_out(channels_out * window.kernel * window.kernel);
    let shape = [channels_out, channels_in, window.kernel, window.kernel];
    ParameterSpec::trainable(format!("{name}.weight"), &shape, init)
}

/// conv - BN - ReLU - conv - BN, plus the way round, ReLU.
struct Block {
    first: ConvNorm,
    second: ConvNorm,
    downsample: Option<ConvNorm>,
}

impl Block {
    fn new(weights: &Weights, plan: &BlockPlan, precision: Precision) -> Result<Self, ModelError> {
        let step = |conv: &str, norm: &str, channels_in, window, activation| {
            let [conv, norm] = [conv, norm].map(|part| format!("{}.{part}", plan.name));
            let channels = (channels_in, plan.channels_out);
            let spec = ConvNormSpec { conv: &conv, norm: &norm, channels, window, activation };
            ConvNorm::new(weights, spec, precision)
        };
        let way_round = || {
            let (channels, window) = (plan.channels_in, plan.downsample());
            step("downsample.0", "downsample.1", channels, window, Activation::Identity)
        };
        Ok(Block {
            first: step("conv1", "bn1", plan.channels_in, plan.first(), Activation::Relu)?,
            second: step("conv2", "bn2", plan.channels_out, plan.second(), Activation::Identity)?,
            downsample: plan.has_downsample().then(way_round).transpose()?,
        })
    }

    fn forward(&self, x: &Tensor, mode: Mode) -> Result<Tensor, ModelError> {
        let Block { first, second, downsample } = self;
        if mode == Mode::Train {
            return train_residual_block(x, first, second, downsample.as_ref());
        }
        let y = first.evaluate(x, None)?;
        match downsample {
            None => second.evaluate(&y, Some(x)),
            Some(downsample) => second.evaluate(&y, Some(&downsample.evaluate(x, None)?)),
        }
    }
}

/// See the module's text.
pub(super) struct ResNet {
    image_size: usize,
    feature_dim: usize,
    stem: ConvNorm,
    max_pool: bool,
    blocks: Vec<Block>,
}

impl Encoder for ResNet {
    fn forward(&self, images: &Tensor, mode: Mode) -> Result<Tensor, ModelError> {
        check_images(images, self.image_size)?;
        let mut x = self.stem.forward(&channels_last(images)?, mode)?;
        if self.max_pool {
            x = max_pool2d(&x, MAX_POOL)?;
        }
        for block in &self.blocks {
            x = block.forward(&x, mode)?;
        }
        Ok(x.flatten(1, 2)?.mean(1)?)
    }

    fn feature_dim(&self) -> usize {
        self.feature_dim
    }
}
