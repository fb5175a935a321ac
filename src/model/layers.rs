//! The layers of which encoders and heads are made: tensors out of `Weights`, put through `ops`.
//!
//! Images between layers are channels-last, [batch, height, width, channels].

use candle_core::{DType, Tensor};

use super::ops::{
    self, Activation, BatchNormInput, ConvNormRule, ConvNormStep, FrozenConvNorm, FrozenNorm, Moments,
    Precision, ResidualSteps, Window,
};
use super::weights::{Buffer, Weights};
use super::{Mode, ModelError};

/// torch's defaults for `BatchNorm`.
const BATCH_NORM_EPS: f64 = 1e-5;
const BATCH_NORM_MOMENTUM: f64 = 0.1;

/// Convolution without bias, [batch, height, width, in] -> [batch, height', width', out].
struct Conv {
    weight: Tensor,
    window: Window,
    precision: Precision,
}

impl Conv {
    fn new(
        weights: &Weights,
        name: &str,
        channels: (usize, usize),
        window: Window,
        precision: Precision,
    ) -> Result<Self, ModelError> {
        let shape = [channels.1, channels.0, window.kernel, window.kernel];
        Ok(Conv { weight: weights.get_shaped(&format!("{name}.weight"), &shape)?, window, precision })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        Ok(ops::conv2d(x, &self.weight, self.window, self.precision)?)
    }
}

/// Batch normalisation over all dimensions but the last, then `activation`.
pub(super) struct BatchNorm {
    weight: Tensor,
    bias: Tensor,
    running_mean: Buffer,
    running_var: Buffer,
    batches: Buffer,
    activation: Activation,
}

impl BatchNorm {
    pub(super) fn new(
        weights: &Weights,
        name: &str,
        channels: usize,
        activation: Activation,
    ) -> Result<Self, ModelError> {
        let shaped = |part: &str| weights.get_shaped(&format!("{name}.{part}"), &[channels]);
        let buffer = |part: &str| weights.buffer(&format!("{name}.{part}"));
        shaped("running_mean")?;
        shaped("running_var")?;
        Ok(BatchNorm {
            weight: shaped("weight")?,
            bias: shaped("bias")?,
            running_mean: buffer("running_mean")?,
            running_var: buffer("running_var")?,
            batches: buffer("num_batches_tracked")?,
            activation,
        })
    }

    pub(super) fn forward(&self, x: &Tensor, mode: Mode) -> Result<Tensor, ModelError> {
        let input = BatchNormInput {
            x,
            gamma: &self.weight,
            beta: &self.bias,
            eps: BATCH_NORM_EPS,
            activation: self.activation,
        };
        match mode {
            Mode::Eval => {
                let running =
                    Moments { mean: self.running_mean.tensor(), variance: self.running_var.tensor() };
                Ok(ops::batch_norm_eval(input, &running)?)
            }
            Mode::Train => {
                let rows = x.elem_count() / self.bias.elem_count().max(1);
                if rows < 2 {
                    return Err(ModelError::BatchTooSmall { rows });
                }
                let (y, batch) = ops::batch_norm_train(input)?;
                self.track(&batch, rows)?;
                Ok(y)
            }
        }
    }

    /// What it does in evaluation mode, where its weights are frozen.
    fn frozen(&self) -> Option<FrozenNorm<'_>> {
        let (mean, variance) = (self.running_mean.frozen()?, self.running_var.frozen()?);
        Some(FrozenNorm {
            gamma: &self.weight,
            beta: &self.bias,
            mean,
            variance,
            eps: BATCH_NORM_EPS,
            activation: self.activation,
        })
    }

    /// Moves the running statistics towards the batch's, as torch does: `running_var` by the **unbiased** variance.
    fn track(&self, batch: &Moments, rows: usize) -> Result<(), ModelError> {
        let unbiased = (&batch.variance * (rows as f64 / (rows as f64 - 1.0)))?;
        for (buffer, value) in [(&self.running_mean, &batch.mean), (&self.running_var, &unbiased)] {
            let old = (buffer.tensor() * (1.0 - BATCH_NORM_MOMENTUM))?;
            buffer.set(&(old + (value * BATCH_NORM_MOMENTUM)?)?)?;
        }
        let count = self.batches.tensor();
        self.batches.set(&(&count + count.ones_like()?)?)
    }
}

/// Convolution, batch normalisation, and what follows them: names and shape of one such step.
#[derive(Clone, Copy)]
pub(super) struct ConvNormSpec<'a> {
    pub conv: &'a str,
    pub norm: &'a str,
    /// In and out.
    pub channels: (usize, usize),
    pub window: Window,
    pub activation: Activation,
}

/// `activation(norm(conv(x)))`, or `relu(norm(conv(x)) + shortcut)`.
pub(super) struct ConvNorm {
    conv: Conv,
    norm: BatchNorm,
    /// Both in one, where neither will change.
    frozen: Option<FrozenConvNorm>,
}

impl ConvNorm {
    pub(super) fn new(
        weights: &Weights,
        spec: ConvNormSpec<'_>,
        precision: Precision,
    ) -> Result<Self, ModelError> {
        let ConvNormSpec { conv, norm, channels, window, activation } = spec;
        let conv = Conv::new(weights, conv, channels, window, precision)?;
        let norm = BatchNorm::new(weights, norm, channels.1, activation)?;
        let frozen = match norm.frozen() {
            None => None,
            Some(norm) => FrozenConvNorm::new(&conv.weight, norm, window, precision)?,
        };
        Ok(ConvNorm { conv, norm, frozen })
    }

    /// [batch, height, width, in] -> [batch, height', width', out]
    pub(super) fn forward(&self, x: &Tensor, mode: Mode) -> Result<Tensor, ModelError> {
        match mode {
            Mode::Eval => self.evaluate(x, None),
            Mode::Train => {
                let (y, moments) = ops::conv_norm(x, self.step(), self.norm.activation, self.rule())?;
                track([self], &[moments], &y)?;
                Ok(y)
            }
        }
    }

    /// The same by running statistics; `shortcut` is of the result's shape.
    pub(super) fn evaluate(&self, x: &Tensor, shortcut: Option<&Tensor>) -> Result<Tensor, ModelError> {
        if let Some(frozen) = &self.frozen
            && !x.track_op()
            && x.dtype() == DType::F32
        {
            return Ok(frozen.forward(x, shortcut)?);
        }
        let y = self.norm.forward(&self.conv.forward(x)?, Mode::Eval)?;
        match shortcut {
            None => Ok(y),
            Some(shortcut) => Ok(ops::add_relu(&y, shortcut)?),
        }
    }

    fn step(&self) -> ConvNormStep<'_> {
        let Conv { weight, window, .. } = &self.conv;
        ConvNormStep { weight, gamma: &self.norm.weight, beta: &self.norm.bias, window: *window }
    }

    fn rule(&self) -> ConvNormRule {
        ConvNormRule { eps: BATCH_NORM_EPS, precision: self.conv.precision }
    }
}

/// In training a residual block is one operation: `relu(second(first(x)) + way round)`.
pub(super) fn train_residual_block(
    x: &Tensor,
    first: &ConvNorm,
    second: &ConvNorm,
    downsample: Option<&ConvNorm>,
) -> Result<Tensor, ModelError> {
    let steps = ResidualSteps {
        first: first.step(),
        second: second.step(),
        downsample: downsample.map(ConvNorm::step),
    };
    let (y, moments) = ops::residual_block(x, steps, first.rule())?;
    track([first, second].into_iter().chain(downsample), &moments, &y)?;
    Ok(y)
}

/// Moves the running statistics of `steps` towards the moments of a batch that gave `y`.
fn track<'a>(
    steps: impl IntoIterator<Item = &'a ConvNorm>,
    moments: &[Moments],
    y: &Tensor,
) -> Result<(), ModelError> {
    let rows = y.elem_count() / y.dims().last().copied().unwrap_or(1);
    if rows < 2 {
        return Err(ModelError::BatchTooSmall { rows });
    }
    steps.into_iter().zip(moments).try_for_each(|(step, moments)| step.norm.track(moments, rows))
}

/// Layer normalisation over the last dimension.
pub(super) struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    pub(super) fn new(weights: &Weights, name: &str, width: usize, eps: f64) -> Result<Self, ModelError> {
        let shaped = |part: &str| weights.get_shaped(&format!("{name}.{part}"), &[width]);
        Ok(LayerNorm { weight: shaped("weight")?, bias: shaped("bias")?, eps })
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        Ok(ops::layer_norm(x, &self.weight, &self.bias, self.eps)?)
    }
}

/// [.., inputs] -> [.., outputs]
pub(super) struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    pub(super) fn new(
        weights: &Weights,
        name: &str,
        inputs: usize,
        outputs: usize,
    ) -> Result<Self, ModelError> {
        let without = Linear::without_bias(weights, name, inputs, outputs)?;
        let bias = weights.get_shaped(&format!("{name}.bias"), &[outputs])?;
        Ok(Linear { bias: Some(bias), ..without })
    }

    pub(super) fn without_bias(
        weights: &Weights,
        name: &str,
        inputs: usize,
        outputs: usize,
    ) -> Result<Self, ModelError> {
        let weight = weights.get_shaped(&format!("{name}.weight"), &[outputs, inputs])?;
        Ok(Linear { weight, bias: None })
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        Ok(ops::linear(x, &self.weight, self.bias.as_ref())?)
    }
}
