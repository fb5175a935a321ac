//! An encoder with its projector: what a version is, and what student and teacher are while training.
//!
//! Weights come from bytes or from the seed and go back to bytes; how they change is the learner's matter.

use candle_core::{Device, Tensor, Var};

use crate::model::preprocess::Preprocessing;
use crate::model::{Encoder, HeadSpec, Mode, ModelError, Precision, Projector, Trainability, Weights, build};

use super::rng::weights_seed;
use super::spec::ModelSpec;

/// Numbers of the networks for their seeds.
const ENCODER_SEED: u32 = 0;
const PROJECTOR_SEED: u32 = 1;
pub(super) const PREDICTOR_SEED: u32 = 2;

impl ModelSpec {
    pub fn preprocessing(&self) -> Preprocessing {
        Preprocessing { size: self.encoder.image_size, mean: self.mean, std: self.std }
    }

    pub fn projector(&self) -> HeadSpec {
        HeadSpec {
            input_dim: self.encoder.feature_dim(),
            hidden_dim: self.projector_hidden,
            output_dim: self.projector_dim,
        }
    }
}

/// Where a network's tensors live, and what its encoder's products are computed in.
#[derive(Clone, Copy)]
pub struct Compute<'a> {
    pub device: &'a Device,
    pub precision: Precision,
}

/// The files of a version: both in safetensors form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkBytes {
    pub encoder: Vec<u8>,
    pub projector: Vec<u8>,
}

/// See the module's text.
pub struct Network {
    encoder_weights: Weights,
    projector_weights: Weights,
    encoder: Box<dyn Encoder>,
    projector: Projector,
}

impl Network {
    /// # Errors
    /// Names a tensor that is missing, unknown or of another shape than the specification says.
    pub fn load(
        spec: &ModelSpec,
        bytes: &NetworkBytes,
        compute: Compute<'_>,
        trainability: Trainability,
    ) -> Result<Self, ModelError> {
        let device = compute.device;
        spec.encoder.validate()?;
        let encoder = Weights::load(&bytes.encoder, &spec.encoder.parameters(), device, trainability)?;
        let head = Projector::parameters(&spec.projector());
        let projector = Weights::load(&bytes.projector, &head, device, trainability)?;
        Self::from_weights(spec, encoder, projector, compute.precision)
    }

    /// New weights from `seed`; the encoder's from `init`, a timm or torchvision file, if there is one.
    pub fn initialise(
        spec: &ModelSpec,
        seed: u64,
        init: Option<&[u8]>,
        compute: Compute<'_>,
    ) -> Result<Self, ModelError> {
        let device = compute.device;
        spec.encoder.validate()?;
        let parameters = spec.encoder.parameters();
        let encoder = match init {
            Some(bytes) => Weights::load(bytes, &parameters, device, Trainability::Trainable)?,
            None => Weights::initialise(&parameters, weights_seed(seed, ENCODER_SEED), device)?,
        };
        let head = Projector::parameters(&spec.projector());
        let projector = Weights::initialise(&head, weights_seed(seed, PROJECTOR_SEED), device)?;
        Self::from_weights(spec, encoder, projector, compute.precision)
    }

    fn from_weights(
        spec: &ModelSpec,
        encoder: Weights,
        projector: Weights,
        precision: Precision,
    ) -> Result<Self, ModelError> {
        Ok(Self {
            encoder: build(&spec.encoder, &encoder, precision)?,
            projector: Projector::build(&spec.projector(), &projector)?,
            encoder_weights: encoder,
            projector_weights: projector,
        })
    }

    pub fn encoder(&self) -> &dyn Encoder {
        self.encoder.as_ref()
    }

    /// Views `[m, 3, size, size]` -> features `[m, feature_dim]` and projections `[m, projector_dim]`, not normalised.
    pub fn forward(&self, views: &Tensor, mode: Mode) -> Result<(Tensor, Tensor), ModelError> {
        let features = self.encoder.forward(views, mode)?;
        let projections = self.projector.forward(&features, mode)?;
        Ok((features, projections))
    }

    /// features `[m, feature_dim]` -> projections `[m, projector_dim]`, not normalised.
    pub fn project(&self, features: &Tensor, mode: Mode) -> Result<Tensor, ModelError> {
        self.projector.forward(features, mode)
    }

    /// What an optimiser moves of the encoder.
    pub fn encoder_variables(&self) -> impl Iterator<Item = Var> {
        self.encoder_weights.trainable().into_iter().map(|(_, variable)| variable)
    }

    /// What an optimiser moves, `encoder.NAME` and `projector.NAME`, in this order.
    pub fn trainable(&self) -> Vec<(String, Var)> {
        let mut all = prefixed("encoder", &self.encoder_weights);
        all.extend(prefixed("projector", &self.projector_weights));
        all
    }

    /// The bytes of the network that lies `share` of the way from this one to `other`, 0..1; see [`Weights::to_safetensors_towards`].
    pub fn to_bytes_towards(&self, other: &Network, share: f64) -> Result<NetworkBytes, ModelError> {
        Ok(NetworkBytes {
            encoder: self.encoder_weights.to_safetensors_towards(&other.encoder_weights, share)?,
            projector: self.projector_weights.to_safetensors_towards(&other.projector_weights, share)?,
        })
    }

    /// Sync point: copies every tensor to the host.
    pub fn to_bytes(&self) -> Result<NetworkBytes, ModelError> {
        Ok(NetworkBytes {
            encoder: self.encoder_weights.to_safetensors()?,
            projector: self.projector_weights.to_safetensors()?,
        })
    }
}

pub(super) fn prefixed(prefix: &str, weights: &Weights) -> Vec<(String, Var)> {
    weights.trainable().into_iter().map(|(name, var)| (format!("{prefix}.{name}"), var)).collect()
}
