//! Encoders and heads: from normalised images to features, with every parameter by timm's or torchvision's name.
//!
//! `EncoderSpec` says what there is (`parameters`), `Weights` holds it, `build` ties both into an `Encoder`. To add an
//! encoder: a plan in `resnet` or `vit` (or a file beside them), and an arm in each `match` below; the gradient test
//! runs over all architectures.
//!
//! Invariants: each operation's every gradient is checked against finite differences, and each parameter of each
//! network too; on the CPU results do not depend on the number of threads; a model built from frozen weights records
//! no graph. Losses, optimisers and files are left to `train` and `publish`.

mod heads;
mod init;
mod layers;
pub mod ops;
pub mod preprocess;
mod resnet;
mod vit;
mod weights;

#[cfg(test)]
mod tests;

use std::fmt;
use std::str::FromStr;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

pub use heads::{HeadSpec, Predictor, Projector};
pub use init::{Init, ParameterKind, ParameterSpec};
#[cfg(feature = "cuda")]
pub use ops::cuda_device;
pub use ops::{AdamWStep, AdamWTensor, Precision, adamw, bf16_is_faster, sums_of_squares};
pub use weights::{Trainability, Weights};

/// Which network, by the name used in configuration, job files and manifests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Architecture {
    /// timm's `vit_tiny_patch16_224` at any image and patch size: 192 features.
    VitTiny,
    /// torchvision's `resnet18`: 512 features.
    Resnet18,
    /// 24-48-96 channels, 173 thousand parameters, meant for 32 x 32 images: 96 features.
    ResnetSmall,
}

impl Architecture {
    pub const ALL: [Architecture; 3] =
        [Architecture::VitTiny, Architecture::Resnet18, Architecture::ResnetSmall];

    pub fn name(self) -> &'static str {
        match self {
            Architecture::VitTiny => "vit_tiny",
            Architecture::Resnet18 => "resnet18",
            Architecture::ResnetSmall => "resnet_small",
        }
    }

    /// Whether a feature in training depends on the other images of its batch.
    pub fn normalises_by_batch(self) -> bool {
        match self {
            Architecture::VitTiny => false,
            Architecture::Resnet18 | Architecture::ResnetSmall => true,
        }
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Architecture {
    type Err = ModelError;

    fn from_str(text: &str) -> Result<Self, ModelError> {
        let found = Architecture::ALL.into_iter().find(|architecture| architecture.name() == text);
        found.ok_or_else(|| ModelError::UnknownArchitecture { name: text.to_owned() })
    }
}

/// Largest side of an image: beyond it one batch's activations no longer fit a machine.
const MAX_IMAGE_SIZE: usize = 1024;

/// A network's shape.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EncoderSpec {
    pub architecture: Architecture,
    /// Side of the square image, in pixels.
    pub image_size: usize,
    /// Side of a square patch, in pixels. Transformers only; otherwise ignored.
    pub patch_size: usize,
}

enum Plan {
    ResNet(resnet::Plan),
    VisionTransformer(vit::Plan),
}

impl EncoderSpec {
    fn plan(&self) -> Plan {
        match self.architecture {
            Architecture::VitTiny => Plan::VisionTransformer(vit::vit_tiny(self.image_size, self.patch_size)),
            Architecture::Resnet18 => Plan::ResNet(resnet::resnet18(self.image_size)),
            Architecture::ResnetSmall => Plan::ResNet(resnet::resnet_small(self.image_size)),
        }
    }

    /// Length of a feature vector.
    pub fn feature_dim(&self) -> usize {
        match self.plan() {
            Plan::ResNet(plan) => plan.feature_dim(),
            Plan::VisionTransformer(plan) => plan.feature_dim(),
        }
    }

    /// # Errors
    /// `InvalidSpec` with the value and what would be right.
    pub fn validate(&self) -> Result<(), ModelError> {
        let EncoderSpec { architecture, image_size, patch_size } = *self;
        // Smaller images leave nothing of the last stage but padding.
        let smallest = match architecture {
            Architecture::Resnet18 => 32,
            Architecture::VitTiny | Architecture::ResnetSmall => 8,
        };
        if !(smallest..=MAX_IMAGE_SIZE).contains(&image_size) {
            let reason = format!(
                "image size {image_size} px for {architecture} must lie in {smallest}..={MAX_IMAGE_SIZE}"
            );
            return Err(ModelError::InvalidSpec { reason });
        }
        let has_patches = architecture == Architecture::VitTiny;
        if has_patches && (patch_size == 0 || image_size % patch_size != 0) {
            let reason = format!("patch size {patch_size} px must divide image size {image_size} px");
            return Err(ModelError::InvalidSpec { reason });
        }
        Ok(())
    }

    /// Every tensor, in the order in which timm or torchvision lists them.
    ///
    /// # Panics
    /// May divide by zero where `validate` refuses the specification: call that first.
    pub fn parameters(&self) -> Vec<ParameterSpec> {
        match self.plan() {
            Plan::ResNet(plan) => plan.parameters(),
            Plan::VisionTransformer(plan) => plan.parameters(),
        }
    }
}

/// What batch normalisation does. Nothing else differs: there is no dropout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Normalise by the batch's statistics and move the running ones in place.
    Train,
    /// Normalise by the running statistics, which stay as they are.
    Eval,
}

/// From images to features.
pub trait Encoder: Send + Sync {
    /// `images` [batch, 3, size, size], f32, normalised by the preprocessing's mean and deviation
    /// -> [batch, feature_dim] f32.
    ///
    /// # Errors
    /// `Images` for another shape; `FrozenStatistics` for `Mode::Train` on frozen weights with batch normalisation;
    /// `BatchTooSmall` where a batch has no variance.
    fn forward(&self, images: &Tensor, mode: Mode) -> Result<Tensor, ModelError>;

    fn feature_dim(&self) -> usize;
}

/// An encoder that reads its parameters out of `weights` (and sees later updates of them), with products in `precision`.
///
/// # Errors
/// `InvalidSpec`, or the name of the tensor that is missing or of another shape.
pub fn build(
    spec: &EncoderSpec,
    weights: &Weights,
    precision: Precision,
) -> Result<Box<dyn Encoder>, ModelError> {
    spec.validate()?;
    let encoder: Box<dyn Encoder> = match spec.plan() {
        Plan::ResNet(plan) => Box::new(plan.build(weights, precision)?),
        Plan::VisionTransformer(plan) => Box::new(plan.build(weights, precision)?),
    };
    Ok(Box::new(OnWorker(encoder)))
}

/// Runs its encoder on one of rayon's threads: called from elsewhere, every single operation would wake one up and wait,
/// which takes a good part of a lone image's time.
struct OnWorker(Box<dyn Encoder>);

impl Encoder for OnWorker {
    fn forward(&self, images: &Tensor, mode: Mode) -> Result<Tensor, ModelError> {
        rayon::scope(|_| self.0.forward(images, mode))
    }

    fn feature_dim(&self) -> usize {
        self.0.feature_dim()
    }
}

fn check_images(images: &Tensor, size: usize) -> Result<(), ModelError> {
    match images.dims() {
        [batch, 3, height, width] if *batch > 0 && (*height, *width) == (size, size) => Ok(()),
        found => Err(ModelError::Images { size, found: found.to_vec() }),
    }
}

/// What can go wrong with a model.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error("unknown architecture {name:?}: expected vit_tiny, resnet18 or resnet_small")]
    UnknownArchitecture { name: String },
    #[error("{reason}")]
    InvalidSpec { reason: String },
    #[error("tensor {name:?} is missing")]
    MissingTensor { name: String },
    #[error("tensor {name:?} is not part of the model")]
    UnknownTensor { name: String },
    #[error("tensor {name:?} has shape {found:?}, expected {expected:?}")]
    Shape { name: String, expected: Vec<usize>, found: Vec<usize> },
    #[error("tensor {name:?} is of type {found}, expected {expected}")]
    Type { name: String, expected: &'static str, found: String },
    #[error("not a safetensors file: {0}")]
    NotSafetensors(#[from] safetensors::SafeTensorError),
    #[error("images have shape {found:?}, expected [batch, 3, {size}, {size}] with a batch of at least 1")]
    Images { size: usize, found: Vec<usize> },
    #[error("batch normalisation in training mode needs at least 2 values a channel, found {rows}")]
    BatchTooSmall { rows: usize },
    #[error("running statistics {name:?} belong to frozen weights: use evaluation mode")]
    FrozenStatistics { name: String },
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}
