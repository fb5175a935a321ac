//! The heads on top of an encoder: SimCLR's projector, and CaSSLe's predictor between student and teacher.
//!
//! Names are those of a torch `Sequential(Linear, BatchNorm1d, ReLU, Linear)`: "0.weight", "1.running_mean", "3.bias".
//! Heads are kept beside the encoder, never inside its file.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::init::{Init, ParameterSpec};
use super::layers::{BatchNorm, Linear};
use super::ops::Activation;
use super::weights::Weights;
use super::{Mode, ModelError};

/// input_dim -> hidden_dim -> output_dim.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeadSpec {
    pub input_dim: usize,
    pub hidden_dim: usize,
    pub output_dim: usize,
}

/// SimCLR's projection head (Chen et al. 2020): features [batch, input_dim] -> projections [batch, output_dim], **not**
/// normalised. The first layer has no bias: the normalisation after it would take it away.
pub struct Projector(Mlp);

impl Projector {
    pub fn parameters(spec: &HeadSpec) -> Vec<ParameterSpec> {
        Mlp::parameters(spec, FirstBias::Absent)
    }

    /// # Errors
    /// Names the tensor that is missing or of another shape.
    pub fn build(spec: &HeadSpec, weights: &Weights) -> Result<Self, ModelError> {
        Mlp::build(spec, weights, FirstBias::Absent).map(Projector)
    }

    /// features [batch, input_dim] -> [batch, output_dim]
    pub fn forward(&self, features: &Tensor, mode: Mode) -> Result<Tensor, ModelError> {
        self.0.forward(features, mode)
    }
}

/// CaSSLe's predictor (Fini et al. 2022): the student's projections [batch, input_dim] -> a guess of the teacher's
/// [batch, output_dim], **not** normalised. Both dimensions are the projections'.
pub struct Predictor(Mlp);

impl Predictor {
    pub fn parameters(spec: &HeadSpec) -> Vec<ParameterSpec> {
        Mlp::parameters(spec, FirstBias::Present)
    }

    /// # Errors
    /// Names the tensor that is missing or of another shape.
    pub fn build(spec: &HeadSpec, weights: &Weights) -> Result<Self, ModelError> {
        Mlp::build(spec, weights, FirstBias::Present).map(Predictor)
    }

    /// projections [batch, input_dim] -> [batch, output_dim]
    pub fn forward(&self, projections: &Tensor, mode: Mode) -> Result<Tensor, ModelError> {
        self.0.forward(projections, mode)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum FirstBias {
    Present,
    Absent,
}

struct Mlp {
    first: Linear,
    norm: BatchNorm,
    second: Linear,
}

impl Mlp {
    fn parameters(spec: &HeadSpec, bias: FirstBias) -> Vec<ParameterSpec> {
        let &HeadSpec { input_dim, hidden_dim, output_dim } = spec;
        let (first, second) = (Init::torch_default(input_dim), Init::torch_default(hidden_dim));
        let mut specs = vec![ParameterSpec::trainable("0.weight", &[hidden_dim, input_dim], first)];
        if bias == FirstBias::Present {
            specs.push(ParameterSpec::trainable("0.bias", &[hidden_dim], first));
        }
        specs.extend(ParameterSpec::batch_norm("1", hidden_dim));
        specs.push(ParameterSpec::trainable("3.weight", &[output_dim, hidden_dim], second));
        specs.push(ParameterSpec::trainable("3.bias", &[output_dim], second));
        specs
    }

    fn build(spec: &HeadSpec, weights: &Weights, bias: FirstBias) -> Result<Self, ModelError> {
        let &HeadSpec { input_dim, hidden_dim, output_dim } = spec;
        let first = match bias {
            FirstBias::Present => Linear::new(weights, "0", input_dim, hidden_dim)?,
            FirstBias::Absent => Linear::without_bias(weights, "0", input_dim, hidden_dim)?,
        };
        Ok(Mlp {
            first,
            norm: BatchNorm::new(weights, "1", hidden_dim, Activation::Relu)?,
            second: Linear::new(weights, "3", hidden_dim, output_dim)?,
        })
    }

    fn forward(&self, x: &Tensor, mode: Mode) -> Result<Tensor, ModelError> {
        self.second.forward(&self.norm.forward(&self.first.forward(x)?, mode)?)
    }
}
