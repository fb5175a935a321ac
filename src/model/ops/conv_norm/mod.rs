//! In training: convolution, batch normalisation and activation as one operation, and a whole residual block as one.
//!
//! Why one: between its parts activations go through memory once, in the products' own type (half as large for bf16); moments
//! are taken while a convolution's tile is in the cache, and gradients become the next product's operand in the pass that
//! makes them. A block's input gets one gradient, where the graph would add up those of both ways.
//!
//! Parameters arrive as one vector, because an operation takes at most three tensors: of each [`ConvNormStep`] in turn weight,
//! gamma, beta. Running statistics are the caller's: the batch's moments are returned. With given moments (evaluation)
//! convolution and normalisation stay operations of their own.

mod backward;
mod forward;
mod norm;

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor, bail};

use super::add_relu;
use super::arithmetic::{Arithmetic, Full, Precision};
use super::batch_norm::{
    Activation, BatchNormInput, HostMoments, Moments, batch_norm_train, reference_train,
};
use super::bf16::Bf16;
use super::kernel::{View, into_storage, slice, tensor_like};
use super::patches::{Geometry, KernelOrder, Padded};
use super::single::Single;
use super::{Window, conv2d, has_gpu_kernel, has_kernel};

/// A convolution and its normalisation: `weight` [out, in, kernel, kernel], `gamma` and `beta` [out].
#[derive(Clone, Copy)]
pub struct ConvNormStep<'a> {
    pub weight: &'a Tensor,
    pub gamma: &'a Tensor,
    pub beta: &'a Tensor,
    pub window: Window,
}

/// A residual block's steps. Without `downsample` the input itself goes the way round.
#[derive(Clone, Copy)]
pub struct ResidualSteps<'a> {
    pub first: ConvNormStep<'a>,
    pub second: ConvNormStep<'a>,
    pub downsample: Option<ConvNormStep<'a>>,
}

/// How products and norms are computed.
#[derive(Clone, Copy, Debug)]
pub struct ConvNormRule {
    pub eps: f64,
    /// bf16 needs an even number of result channels.
    pub precision: Precision,
}

/// `activation(norm(conv(x)))`, normalised by the batch's moments, which are returned too.
/// `x` [batch, height, width, in] -> [batch, height', width', out].
pub fn conv_norm(
    x: &Tensor,
    step: ConvNormStep<'_>,
    activation: Activation,
    rule: ConvNormRule,
) -> Result<(Tensor, Moments)> {
    if !has_kernel(x) {
        return reference_step(x, step, activation, rule);
    }
    let (y, moments) = apply(x, &[step], Form::Single(activation), rule)?;
    let Some(moments) = moments.into_iter().next() else { bail!("conv-norm left no moments") };
    Ok((y, moments))
}

/// `relu(norm(conv(relu(norm(conv(x))))) + way round)`, the way round being `x` or `norm(conv(x))`. The moments are those of the
/// first step, the second, and the way round's where it is one.
/// `x` [batch, height, width, in] -> [batch, height', width', out].
pub fn residual_block(
    x: &Tensor,
    steps: ResidualSteps<'_>,
    rule: ConvNormRule,
) -> Result<(Tensor, Vec<Moments>)> {
    if !has_kernel(x) {
        return reference_block(x, steps, rule);
    }
    let all: Vec<ConvNormStep<'_>> =
        [steps.first, steps.second].into_iter().chain(steps.downsample).collect();
    apply(x, &all, Form::Residual, rule)
}

fn reference_step(
    x: &Tensor,
    step: ConvNormStep<'_>,
    activation: Activation,
    rule: ConvNormRule,
) -> Result<(Tensor, Moments)> {
    let x = conv2d::reference(x, step.weight, step.window, rule.precision)?;
    let ConvNormStep { gamma, beta, .. } = step;
    let norm = if has_gpu_kernel(&x) { batch_norm_train } else { reference_train };
    norm(BatchNormInput { x: &x, gamma, beta, eps: rule.eps, activation })
}

fn reference_block(
    x: &Tensor,
    steps: ResidualSteps<'_>,
    rule: ConvNormRule,
) -> Result<(Tensor, Vec<Moments>)> {
    let (hidden, first) = reference_step(x, steps.first, Activation::Relu, rule)?;
    let (y, second) = reference_step(&hidden, steps.second, Activation::Identity, rule)?;
    match steps.downsample {
        None => Ok((add_relu::reference(&y, x)?, vec![first, second])),
        Some(step) => {
            let (shortcut, third) = reference_step(x, step, Activation::Identity, rule)?;
            Ok((add_relu::reference(&y, &shortcut)?, vec![first, second, third]))
        }
    }
}

/// What is made of the steps.
#[derive(Clone, Copy, Debug)]
enum Form {
    Single(Activation),
    Residual,
}

/// The steps' shapes, and where their parameters lie.
#[derive(Clone, Debug)]
struct Plan {
    form: Form,
    eps: f64,
    /// One, or first, second, and perhaps the way round's.
    steps: Vec<Geometry>,
    /// False where the input is data: its gradient is not computed.
    input_tracked: bool,
    /// False where no gradient will be asked for: nothing is kept then.
    tracked: bool,
}

/// Where one step's parameters lie in the vector.
struct Ranges {
    weight: Range<usize>,
    gamma: Range<usize>,
    beta: Range<usize>,
}

impl Plan {
    fn new(x: &Tensor, steps: &[ConvNormStep<'_>], form: Form, rule: ConvNormRule) -> Result<Self> {
        let mut geometries: Vec<Geometry> = Vec::with_capacity(steps.len());
        for (index, step) in steps.iter().enumerate() {
            let (batch, height, width, channels) = match geometries.first() {
                Some(first) if index == 1 => first.out_shape(),
                _ => x.dims4()?,
            };
            let geometry = Geometry::of(&[batch, height, width, channels], step.weight.dims(), step.window)?;
            let out = geometry.out_channels;
            if step.gamma.dims() != [out] || step.beta.dims() != [out] {
                bail!(
                    "conv-norm: gamma {:?}, beta {:?}, {out} channels",
                    step.gamma.shape(),
                    step.beta.shape()
                );
            }
            if rule.precision == Precision::Bf16 && out % 2 != 0 {
                bail!("conv-norm: {out} channels are not even, as bf16 needs them");
            }
            geometries.push(geometry);
        }
        let tracked =
            steps.iter().flat_map(|step| [step.weight, step.gamma, step.beta]).any(Tensor::track_op);
        let plan = Plan {
            form,
            eps: rule.eps,
            steps: geometries,
            input_tracked: x.track_op(),
            tracked: tracked || x.track_op(),
        };
        plan.check_way_round(x.dims4()?)?;
        Ok(plan)
    }

    /// Both ways must meet in one shape, out of the same pixels; all steps have as many positions.
    fn check_way_round(&self, x: (usize, usize, usize, usize)) -> Result<()> {
        let [first, second, rest @ ..] = self.steps.as_slice() else { return Ok(()) };
        let fits = match rest.first() {
            None => second.out_shape() == x && first.window.stride == 1,
            Some(step) => {
                second.out_shape() == step.out_shape()
                    && step.window.stride == first.window.stride
                    && step.window.padding <= first.window.padding
            }
        };
        let keeps_size = second.window.stride == 1 && second.positions() == first.positions();
        if !fits || !keeps_size {
            bail!("residual block: the steps {:?} do not meet in one shape", self.steps);
        }
        Ok(())
    }

    fn output(&self) -> (usize, usize, usize, usize) {
        self.steps[self.steps.len().min(2) - 1].out_shape()
    }

    fn ranges(&self, step: usize) -> Ranges {
        let elements = |step: &Geometry| step.weight_elements() + 2 * step.out_channels;
        let start: usize = self.steps[..step].iter().map(elements).sum();
        let geometry = &self.steps[step];
        let gamma = start + geometry.weight_elements();
        let beta = gamma + geometry.out_channels;
        Ranges { weight: start..gamma, gamma: gamma..beta, beta: beta..beta + geometry.out_channels }
    }
}

/// Applies the steps; moments in their order.
fn apply(
    x: &Tensor,
    steps: &[ConvNormStep<'_>],
    form: Form,
    rule: ConvNormRule,
) -> Result<(Tensor, Vec<Moments>)> {
    let x = x.contiguous()?;
    let plan = Plan::new(&x, steps, form, rule)?;
    let parts = steps.iter().flat_map(|step| [step.weight, step.gamma, step.beta]);
    let parts = parts.map(Tensor::flatten_all).collect::<Result<Vec<_>>>()?;
    let parameters = Tensor::cat(&parts, 0)?;
    let moments = Arc::new(OnceLock::new());
    let shared = moments.clone();
    let y = match (x.dtype(), rule.precision) {
        (DType::F64, _) => x.apply_op2(&parameters, ConvNorm::new(plan, Full::<f64>::new(), shared)),
        (_, Precision::F32) => x.apply_op2(&parameters, ConvNorm::new(plan, Single::new(), shared)),
        (_, Precision::Bf16) => x.apply_op2(&parameters, ConvNorm::new(plan, Bf16::new(), shared)),
    }?;
    let Some(moments) = moments.get() else { bail!("conv-norm: forward pass left no moments") };
    let moments = moments.iter().map(|moments| moments.on(&y)).collect::<Result<_>>()?;
    Ok((y, moments))
}

/// What a step leaves for the backward pass.
struct SavedStep<E> {
    weight: KernelOrder<E>,
    /// The convolution's result, before the normalisation.
    rows: Vec<E>,
}

/// What the backward pass reads besides the result.
struct Saved<A: Arithmetic> {
    /// The input as an operand.
    x: Padded<A::Narrow>,
    first: SavedStep<A::Narrow>,
    /// A residual block's.
    rest: Option<SavedRest<A>>,
}

struct SavedRest<A: Arithmetic> {
    /// The first step's result as an operand.
    hidden: Padded<A::Narrow>,
    second: SavedStep<A::Narrow>,
    downsample: Option<SavedStep<A::Narrow>>,
}

struct ConvNorm<A: Arithmetic> {
    plan: Plan,
    arithmetic: A,
    /// Set by the forward pass, read by the backward pass and by the caller.
    moments: Arc<OnceLock<Vec<HostMoments>>>,
    saved: OnceLock<Saved<A>>,
}

impl<A: Arithmetic> ConvNorm<A> {
    fn new(plan: Plan, arithmetic: A, moments: Arc<OnceLock<Vec<HostMoments>>>) -> Self {
        ConvNorm { plan, arithmetic, moments, saved: OnceLock::new() }
    }
}

impl<A: Arithmetic> CustomOp2 for ConvNorm<A> {
    fn name(&self) -> &'static str {
        "conv-norm"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        if s1.dtype() != s2.dtype() {
            bail!("conv-norm: input of {:?}, parameters of {:?}", s1.dtype(), s2.dtype());
        }
        let pass = forward::Forward {
            plan: &self.plan,
            arithmetic: self.arithmetic,
            parameters: slice::<A::Wide>(s2, l2)?,
        };
        let (y, saved, moments) = pass.run(slice::<A::Wide>(s1, l1)?);
        let twice =
            self.moments.set(moments).is_err() || (self.plan.tracked && self.saved.set(saved).is_err());
        if twice {
            bail!("conv-norm: one operation applied twice");
        }
        Ok((into_storage(y), Shape::from(self.plan.output())))
    }

    fn bwd(
        &self,
        x: &Tensor,
        parameters: &Tensor,
        y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (Some(saved), Some(moments)) = (self.saved.get(), self.moments.get()) else {
            bail!("conv-norm: backward before forward")
        };
        let grad = grad.contiguous()?;
        let (parameter_view, y, grad) = (View::of(parameters), View::of(y), View::of(&grad));
        let pass = backward::Backward {
            plan: &self.plan,
            arithmetic: self.arithmetic,
            parameters: parameter_view.slice::<A::Wide>()?,
            saved,
            moments,
        };
        let (dx, dparameters) = pass.run(y.slice()?, grad.slice()?);
        let dx = dx.map(|dx| tensor_like(dx, x)).transpose()?;
        Ok((dx, Some(tensor_like(dparameters, parameters)?)))
    }
}

#[cfg(test)]
mod tests;
