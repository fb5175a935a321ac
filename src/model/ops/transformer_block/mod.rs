//! A pre-norm transformer block as one operation: `x + attention(norm(x))`, then `x + mlp(norm(x))`.
//!
//! Why one: between its parts everything of a few images fits the second-level cache, where separate operations would
//! write and read the whole batch's activations a dozen times. What the backward pass needs is kept in the products' own
//! type (half as large for bf16); norms, probabilities and GELU are computed again.
//!
//! Parts: tiles of whole images. Parameters arrive as one vector ([`BlockLayout`]), because an operation takes at most
//! three tensors; their gradient is summed over [`GRADIENT_PARTS`] fixed groups of tiles, combined in order.

mod attention;
mod backward;
mod forward;
mod frozen;
mod weights;

use std::ops::Range;
use std::sync::OnceLock;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor, bail};

pub use frozen::FrozenBlock;

use super::add_bias::add_bias;
use super::arithmetic::{Arithmetic, Full, Precision};
use super::bf16::Bf16;
use super::gelu::bias_gelu;
use super::kernel::{View, into_storage, slice, tensor_like};
use super::single::Single;
use super::{has_gpu_kernel, has_kernel, layer_norm, linear};

/// Rows of a tile, if its images are shorter: the tile's activations then stay in a second-level cache of 1 MiB, and the
/// weights that are read once for it are used often enough.
const TILE_ROWS: usize = 256;
/// Tiles are smaller where there would be fewer of them than this, so that threads find work.
const FEWEST_TILES: usize = 8;
/// Partial sums of the parameters' gradient: each costs one copy of them, and no more threads than this can help.
const GRADIENT_PARTS: usize = 16;
/// Width of the hidden layer over the block's.
const MLP_RATIO: usize = 4;

/// Where each parameter of a block of some width lies in the one vector that holds them all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockLayout {
    pub width: usize,
}

/// A block's parameters, in the order in which they lie in the vector. Weights are `[outputs, inputs]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockParameter {
    Norm1Weight,
    Norm1Bias,
    QkvWeight,
    QkvBias,
    ProjWeight,
    ProjBias,
    Norm2Weight,
    Norm2Bias,
    Fc1Weight,
    Fc1Bias,
    Fc2Weight,
    Fc2Bias,
}

impl BlockParameter {
    pub const ALL: [BlockParameter; 12] = [
        BlockParameter::Norm1Weight,
        BlockParameter::Norm1Bias,
        BlockParameter::QkvWeight,
        BlockParameter::QkvBias,
        BlockParameter::ProjWeight,
        BlockParameter::ProjBias,
        BlockParameter::Norm2Weight,
        BlockParameter::Norm2Bias,
        BlockParameter::Fc1Weight,
        BlockParameter::Fc1Bias,
        BlockParameter::Fc2Weight,
        BlockParameter::Fc2Bias,
    ];
}

impl BlockLayout {
    pub fn shape(self, parameter: BlockParameter) -> Vec<usize> {
        let (width, hidden) = (self.width, MLP_RATIO * self.width);
        match parameter {
            BlockParameter::QkvWeight => vec![3 * width, width],
            BlockParameter::QkvBias => vec![3 * width],
            BlockParameter::ProjWeight => vec![width, width],
            BlockParameter::Fc1Weight => vec![hidden, width],
            BlockParameter::Fc1Bias => vec![hidden],
            BlockParameter::Fc2Weight => vec![width, hidden],
            _ => vec![width],
        }
    }

    fn elements_of(self, parameter: BlockParameter) -> usize {
        self.shape(parameter).iter().product()
    }

    /// Elements of the whole vector.
    pub fn elements(self) -> usize {
        BlockParameter::ALL.into_iter().map(|parameter| self.elements_of(parameter)).sum()
    }

    /// The one vector of `parts`, which are in [`BlockParameter::ALL`]'s order.
    pub fn join(self, parts: &[Tensor]) -> Result<Tensor> {
        self.check_parts(parts)?;
        let flat = parts.iter().map(Tensor::flatten_all).collect::<Result<Vec<_>>>()?;
        Tensor::cat(&flat, 0)
    }

    fn check_parts(self, parts: &[Tensor]) -> Result<()> {
        let expected = BlockParameter::ALL.map(|parameter| self.shape(parameter));
        if !parts.iter().map(Tensor::dims).eq(expected.iter().map(Vec::as_slice)) {
            let found: Vec<_> = parts.iter().map(Tensor::shape).collect();
            bail!("transformer-block: {found:?} are not the parameters of width {}", self.width);
        }
        Ok(())
    }

    /// An error where tensors of such a shape are not these parameters.
    fn check(self, parameters: &Shape) -> Result<()> {
        let expected = self.elements();
        if parameters.dims() != [expected] {
            bail!(
                "transformer-block: {parameters:?} are not the {expected} parameters of width {}",
                self.width
            );
        }
        Ok(())
    }

    fn range(self, parameter: BlockParameter) -> Range<usize> {
        let before = BlockParameter::ALL.into_iter().take_while(|other| *other != parameter);
        let start = before.map(|other| self.elements_of(other)).sum();
        start..start + self.elements_of(parameter)
    }
}

/// What a block computes besides its parameters.
#[derive(Clone, Copy, Debug)]
pub struct BlockSpec {
    pub heads: usize,
    pub norm_eps: f64,
    pub precision: Precision,
    pub output: Output,
}

/// Which tokens a block computes. Attention reads all of them either way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    AllTokens,
    /// The first alone: enough of the last block where only its class token is read, and a quarter of the work.
    FirstToken,
}

impl Output {
    fn tokens(self, all: usize) -> usize {
        match self {
            Output::AllTokens => all,
            Output::FirstToken => 1,
        }
    }
}

/// `x` [batch, tokens, width], `parameters` a vector in [`BlockLayout`]'s order -> [batch, tokens (or 1), width].
/// The width must be a multiple of the heads; of twice the heads for bf16.
pub fn transformer_block(x: &Tensor, parameters: &Tensor, spec: BlockSpec) -> Result<Tensor> {
    if !has_kernel(x) {
        return reference(x, parameters, spec);
    }
    let tracked = x.track_op() || parameters.track_op();
    let (x, parameters) = (x.contiguous()?, parameters.contiguous()?);
    let geometry = Geometry::of(x.layout(), parameters.layout(), spec)?;
    match (x.dtype(), spec.precision) {
        (DType::F64, _) => x.apply_op2(&parameters, Block::new(geometry, Full::<f64>::new(), tracked)),
        (_, Precision::F32) => x.apply_op2(&parameters, Block::new(geometry, Single::new(), tracked)),
        (_, Precision::Bf16) => x.apply_op2(&parameters, Block::new(geometry, Bf16::new(), tracked)),
    }
}

/// As [`transformer_block`], of the parameters one by one: `parts[parameter as usize]`.
pub fn transformer_block_of(x: &Tensor, parts: &[Tensor], spec: BlockSpec) -> Result<Tensor> {
    let layout = BlockLayout { width: x.dim(2)? };
    if has_kernel(x) {
        return transformer_block(x, &layout.join(parts)?, spec);
    }
    layout.check_parts(parts)?;
    compose(x, |parameter| Ok(parts[parameter as usize].clone()), spec)
}

pub(super) fn reference(x: &Tensor, parameters: &Tensor, spec: BlockSpec) -> Result<Tensor> {
    let layout = BlockLayout { width: x.dim(2)? };
    layout.check(parameters.shape())?;
    let part = |parameter| {
        let range = layout.range(parameter);
        parameters.narrow(0, range.start, range.len())?.reshape(layout.shape(parameter))
    };
    compose(x, part, spec)
}

/// A block of operations, each with its own kernel where the device has one; `part` gives a parameter in its shape.
fn compose(x: &Tensor, part: impl Fn(BlockParameter) -> Result<Tensor>, spec: BlockSpec) -> Result<Tensor> {
    use BlockParameter as P;
    let multiply = |x: &Tensor, weight| linear::reference(x, &part(weight)?, None, spec.precision);
    let linear = |x: &Tensor, weight, bias| add_bias(&multiply(x, weight)?, &part(bias)?);
    let norm = |x: &Tensor, weight, bias| {
        let norm = if has_gpu_kernel(x) { layer_norm::layer_norm } else { layer_norm::reference };
        norm(x, &part(weight)?, &part(bias)?, spec.norm_eps)
    };
    let qkv = linear(&norm(x, P::Norm1Weight, P::Norm1Bias)?, P::QkvWeight, P::QkvBias)?;
    let attended = attention::reference(&qkv, spec.heads, spec.precision)?;
    let tokens = spec.output.tokens(x.dim(1)?);
    let (x, attended) = (x.narrow(1, 0, tokens)?, attended.narrow(1, 0, tokens)?);
    let x = (x + linear(&attended, P::ProjWeight, P::ProjBias)?)?;
    let normed = norm(&x, P::Norm2Weight, P::Norm2Bias)?;
    let hidden = bias_gelu(&multiply(&normed, P::Fc1Weight)?, &part(P::Fc1Bias)?)?;
    &x + linear(&hidden, P::Fc2Weight, P::Fc2Bias)?
}

#[derive(Clone, Copy)]
struct Geometry {
    batch: usize,
    tokens: usize,
    /// Tokens that are computed: queries of the attention, rows of everything behind it.
    queries: usize,
    width: usize,
    heads: usize,
    norm_eps: f64,
}

impl Geometry {
    fn of(x: &Layout, parameters: &Layout, spec: BlockSpec) -> Result<Self> {
        let BlockSpec { heads, norm_eps, precision, output } = spec;
        let (batch, tokens, width) = x.shape().dims3()?;
        let multiple = if precision == Precision::Bf16 { 2 * heads } else { heads };
        if heads == 0 || batch * tokens * width == 0 || width % multiple != 0 {
            bail!("transformer-block: {heads} heads do not fit {:?} in {precision:?}", x.shape());
        }
        BlockLayout { width }.check(parameters.shape())?;
        Ok(Geometry { batch, tokens, queries: output.tokens(tokens), width, heads, norm_eps })
    }

    fn hidden(&self) -> usize {
        MLP_RATIO * self.width
    }

    fn layout(&self) -> BlockLayout {
        BlockLayout { width: self.width }
    }

    fn images_per_tile(&self) -> usize {
        (TILE_ROWS / self.tokens).min(self.batch.div_ceil(FEWEST_TILES)).max(1)
    }

    /// Rows of a whole tile; the last one may have fewer.
    fn rows_per_tile(&self) -> usize {
        self.images_per_tile() * self.tokens
    }

    fn queries_per_tile(&self) -> usize {
        self.images_per_tile() * self.queries
    }
}

/// What the backward pass reads besides the input, of some images.
struct Saved<A: Arithmetic> {
    /// [images * queries, width]: the sum between attention and MLP.
    middle: Vec<A::Wide>,
    /// [images * tokens, 3 width]: queries, keys, values.
    qkv: Vec<A::Narrow>,
    /// [images * queries, width]: the heads' results side by side.
    attended: Vec<A::Narrow>,
    /// [images * queries, hidden]: before GELU.
    hidden: Vec<A::Narrow>,
}

impl<A: Arithmetic> Saved<A> {
    fn new(geometry: &Geometry, images: usize) -> Self {
        let (rows, queries) = (images * geometry.tokens, images * geometry.queries);
        let narrow = |elements: usize| vec![A::Narrow::default(); elements];
        Saved {
            middle: vec![<A::Wide as super::kernel::Real>::ZERO; queries * geometry.width],
            qkv: narrow(rows * 3 * geometry.width),
            attended: narrow(queries * geometry.width),
            hidden: narrow(queries * geometry.hidden()),
        }
    }
}

struct Block<A: Arithmetic> {
    geometry: Geometry,
    arithmetic: A,
    /// False where no gradient will be asked for: nothing is kept then.
    tracked: bool,
    /// Set by the forward pass, read by the backward pass.
    saved: OnceLock<Saved<A>>,
}

impl<A: Arithmetic> Block<A> {
    fn new(geometry: Geometry, arithmetic: A, tracked: bool) -> Self {
        Block { geometry, arithmetic, tracked, saved: OnceLock::new() }
    }
}

impl<A: Arithmetic> CustomOp2 for Block<A> {
    fn name(&self) -> &'static str {
        "transformer-block"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        if s1.dtype() != s2.dtype() {
            bail!("transformer-block: input of {:?}, parameters of {:?}", s1.dtype(), s2.dtype());
        }
        let (x, parameters) = (slice::<A::Wide>(s1, l1)?, slice::<A::Wide>(s2, l2)?);
        let weights = weights::ForwardWeights::new(self.geometry.width, parameters);
        let pass = forward::Forward::new(self.geometry, self.arithmetic, parameters, &weights);
        let y = if self.tracked {
            let mut saved = Saved::new(&self.geometry, self.geometry.batch);
            let y = pass.run_and_save(x, &mut saved);
            if self.saved.set(saved).is_err() {
                bail!("transformer-block: one operation applied twice");
            }
            y
        } else {
            pass.run(x)
        };
        let Geometry { batch, queries, width, .. } = self.geometry;
        Ok((into_storage(y), Shape::from((batch, queries, width))))
    }

    fn bwd(
        &self,
        x: &Tensor,
        parameters: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let Some(saved) = self.saved.get() else { bail!("transformer-block: backward before forward") };
        let grad = grad.contiguous()?;
        let (x_view, parameter_view, grad) = (View::of(x), View::of(parameters), View::of(&grad));
        let mut buffers = weights::WeightBuffers::<A>::default();
        let pass =
            backward::Backward::new(self.geometry, self.arithmetic, parameter_view.slice()?, &mut buffers);
        let (dx, dparameters) = pass.run(x_view.slice()?, saved, grad.slice()?);
        Ok((Some(tensor_like(dx, x)?), Some(tensor_like(dparameters, parameters)?)))
    }
}

#[cfg(test)]
mod tests;
