//! Vision transformer (Dosovitskiy et al. 2021) as timm's `vit_tiny_patch16_224` builds it with `num_classes = 0`:
//! pre-norm blocks, class token, learned positions, the class token after the last norm as the feature. Image and
//! patch size are free.
//!
//! Invariant: `parameters` and `build` walk the same `Plan`, so they can't disagree.

use candle_core::Tensor;

use super::init::{Init, ParameterSpec};
use super::layers::LayerNorm;
use super::ops::{self, BlockLayout, BlockParameter, BlockSpec, FrozenBlock, Output, Precision};
use super::weights::Weights;
use super::{Encoder, Mode, ModelError, check_images};

/// timm's vision transformers set this, not torch's default of 1e-5.
const LAYER_NORM_EPS: f64 = 1e-6;
const MLP_RATIO: usize = 4;
/// timm's initial values.
const WEIGHT_DEVIATION: f64 = 0.02;
const CLASS_TOKEN_DEVIATION: f64 = 1e-6;

/// The shape of one network.
#[derive(Clone, Copy)]
pub(super) struct Plan {
    image_size: usize,
    patch_size: usize,
    width: usize,
    depth: usize,
    heads: usize,
}

/// timm's `vit_tiny`: 5.5 million parameters at patch 16, 192 features.
pub(super) fn vit_tiny(image_size: usize, patch_size: usize) -> Plan {
    Plan { image_size, patch_size, width: 192, depth: 12, heads: 3 }
}

impl Plan {
    pub(super) fn feature_dim(&self) -> usize {
        self.width
    }

    fn patches_per_side(&self) -> usize {
        self.image_size / self.patch_size
    }

    /// Patches and the class token.
    fn tokens(&self) -> usize {
        self.patches_per_side() * self.patches_per_side() + 1
    }

    fn patch_len(&self) -> usize {
        3 * self.patch_size * self.patch_size
    }

    fn patch_weight_shape(&self) -> [usize; 4] {
        [self.width, 3, self.patch_size, self.patch_size]
    }

    /// In timm's order.
    pub(super) fn parameters(&self) -> Vec<ParameterSpec> {
        let width = self.width;
        let token = Init::Normal { deviation: CLASS_TOKEN_DEVIATION };
        let weight = Init::Normal { deviation: WEIGHT_DEVIATION };
        // timm leaves the patch embedding at torch's default for convolutions.
        let patch = Init::torch_default(self.patch_len());
        let mut specs = vec![
            ParameterSpec::trainable("cls_token", &[1, 1, width], token),
            ParameterSpec::trainable("pos_embed", &[1, self.tokens(), width], weight),
            ParameterSpec::trainable("patch_embed.proj.weight", &self.patch_weight_shape(), patch),
            ParameterSpec::trainable("patch_embed.proj.bias", &[width], patch),
        ];
        for index in 0..self.depth {
            let name = format!("blocks.{index}");
            specs.extend(norm_specs(&format!("{name}.norm1"), width));
            specs.extend(linear_specs(&format!("{name}.attn.qkv"), width, 3 * width));
            specs.extend(linear_specs(&format!("{name}.attn.proj"), width, width));
            specs.extend(norm_specs(&format!("{name}.norm2"), width));
            specs.extend(linear_specs(&format!("{name}.mlp.fc1"), width, MLP_RATIO * width));
            specs.extend(linear_specs(&format!("{name}.mlp.fc2"), MLP_RATIO * width, width));
        }
        specs.extend(norm_specs("norm", width));
        specs
    }

    pub(super) fn build(
        &self,
        weights: &Weights,
        precision: Precision,
    ) -> Result<VisionTransformer, ModelError> {
        let block = |index: usize| Block::new(weights, &format!("blocks.{index}"), self.width, precision);
        Ok(VisionTransformer {
            plan: *self,
            precision,
            cls_token: weights.get_shaped("cls_token", &[1, 1, self.width])?,
            pos_embed: weights.get_shaped("pos_embed", &[1, self.tokens(), self.width])?,
            patch_weight: weights.get_shaped("patch_embed.proj.weight", &self.patch_weight_shape())?,
            patch_bias: weights.get_shaped("patch_embed.proj.bias", &[self.width])?,
            blocks: (0..self.depth).map(block).collect::<Result<_, _>>()?,
            norm: LayerNorm::new(weights, "norm", self.width, LAYER_NORM_EPS)?,
        })
    }
}

fn norm_specs(name: &str, width: usize) -> [ParameterSpec; 2] {
    [
        ParameterSpec::trainable(format!("{name}.weight"), &[width], Init::Constant(1.0)),
        ParameterSpec::trainable(format!("{name}.bias"), &[width], Init::Constant(0.0)),
    ]
}

fn linear_specs(name: &str, inputs: usize, outputs: usize) -> [ParameterSpec; 2] {
    let weight = Init::Normal { deviation: WEIGHT_DEVIATION };
    [
        ParameterSpec::trainable(format!("{name}.weight"), &[outputs, inputs], weight),
        ParameterSpec::trainable(format!("{name}.bias"), &[outputs], Init::Constant(0.0)),
    ]
}

/// timm's name of a block's parameter, inside the block.
fn block_parameter_name(parameter: BlockParameter) -> &'static str {
    match parameter {
        BlockParameter::Norm1Weight => "norm1.weight",
        BlockParameter::Norm1Bias => "norm1.bias",
        BlockParameter::QkvWeight => "attn.qkv.weight",
        BlockParameter::QkvBias => "attn.qkv.bias",
        BlockParameter::ProjWeight => "attn.proj.weight",
        BlockParameter::ProjBias => "attn.proj.bias",
        BlockParameter::Norm2Weight => "norm2.weight",
        BlockParameter::Norm2Bias => "norm2.bias",
        BlockParameter::Fc1Weight => "mlp.fc1.weight",
        BlockParameter::Fc1Bias => "mlp.fc1.bias",
        BlockParameter::Fc2Weight => "mlp.fc2.weight",
        BlockParameter::Fc2Bias => "mlp.fc2.bias",
    }
}

/// One block's parameters, as its operation takes them.
enum Block {
    /// Trained: taken anew for each pass, so that an update is seen.
    Moving(Vec<Tensor>),
    /// Frozen: joined and prepared once.
    Still(Box<FrozenBlock>),
}

impl Block {
    fn new(weights: &Weights, name: &str, width: usize, precision: Precision) -> Result<Self, ModelError> {
        let layout = BlockLayout { width };
        let part = |parameter| {
            let name = format!("{name}.{}", block_parameter_name(parameter));
            weights.get_shaped(&name, &layout.shape(parameter))
        };
        let parts = BlockParameter::ALL.into_iter().map(part).collect::<Result<Vec<_>, _>>()?;
        Ok(if parts.iter().any(Tensor::track_op) {
            Block::Moving(parts)
        } else {
            Block::Still(Box::new(FrozenBlock::new(layout.join(&parts)?, width, precision)?))
        })
    }

    fn forward(&self, x: &Tensor, spec: BlockSpec) -> Result<Tensor, ModelError> {
        match self {
            Block::Moving(parts) => Ok(ops::transformer_block_of(x, parts, spec)?),
            Block::Still(block) => Ok(block.forward(x, spec)?),
        }
    }
}

/// See the module's text.
pub(super) struct VisionTransformer {
    plan: Plan,
    precision: Precision,
    cls_token: Tensor,
    pos_embed: Tensor,
    patch_weight: Tensor,
    patch_bias: Tensor,
    blocks: Vec<Block>,
    norm: LayerNorm,
}

impl VisionTransformer {
    /// The patch embedding is a convolution whose stride is its kernel: a linear map of each patch's pixels.
    /// [batch, 3, size, size] -> [batch, patches, width]
    fn embed_patches(&self, images: &Tensor) -> Result<Tensor, ModelError> {
        let (batch, side, patch) = (images.dim(0)?, self.plan.patches_per_side(), self.plan.patch_size);
        let patches = images
            .reshape(&[batch, 3, side, patch, side, patch])?
            .permute(vec![0, 2, 4, 1, 3, 5])?
            .reshape((batch, side * side, self.plan.patch_len()))?;
        let weight = self.patch_weight.flatten_from(1)?;
        Ok(ops::linear(&patches, &weight, Some(&self.patch_bias))?)
    }
}

impl Encoder for VisionTransformer {
    fn forward(&self, images: &Tensor, _mode: Mode) -> Result<Tensor, ModelError> {
        check_images(images, self.plan.image_size)?;
        let patches = self.embed_patches(images)?;
        let class = self.cls_token.broadcast_as((images.dim(0)?, 1, self.plan.width))?;
        let mut x = Tensor::cat(&[&class, &patches], 1)?.broadcast_add(&self.pos_embed)?;
        for (index, block) in self.blocks.iter().enumerate() {
            // Of the last block only the class token is read.
            let last = index + 1 == self.blocks.len();
            let output = if last { Output::FirstToken } else { Output::AllTokens };
            let spec = BlockSpec {
                heads: self.plan.heads,
                norm_eps: LAYER_NORM_EPS,
                precision: self.precision,
                output,
            };
            x = block.forward(&x, spec)?;
        }
        self.norm.forward(&x.squeeze(1)?)
    }

    fn feature_dim(&self) -> usize {
        self.plan.width
    }
}
