//! The two losses of the method, on projections that are not normalised yet, and what the benchmark compares them with.
//!
//! [`ntxent`] is SimCLR's (Chen et al., 2020); [`distillation`] compares every view of the student with every
//! view of the frozen teacher, by cross-entropy in both directions. Both normalise rows themselves, reduce to
//! the mean, keep the dtype, and use only operations whose gradient candle has: no softmax, and a maximum only
//! where it is cut from the graph. No gradient ever reaches the teacher. Frames that show the same ([`Pairs`]) are not each
//! other's negatives. How the terms are weighed is the method's; see [`LossTerms::combine`].

use candle_core::{D, DType, Result, Tensor, bail};

/// Added to a row's squared norm: a row of zeros gets a finite gradient and stays zero. Larger values would
/// shrink short rows; smaller ones vanish beside f32's own rounding of the gradient.
const NORM_EPSILON: f64 = 1e-12;

/// The terms of one step's loss; scalars, in the graph.
#[derive(Debug, Clone)]
pub struct LossTerms {
    /// What is minimised: `ntxent + lambda * distillation`.
    pub total: Tensor,
    pub ntxent: Tensor,
    pub distillation: Option<Tensor>,
}

impl LossTerms {
    /// Weighs the distillation by `lambda`; without one the total is NT-Xent alone.
    pub fn combine(ntxent: Tensor, distillation: Option<(Tensor, f64)>) -> Result<Self> {
        let Some((distillation, lambda)) = distillation else {
            return Ok(Self { total: ntxent.clone(), ntxent, distillation: None });
        };
        Ok(Self { total: (&ntxent + (&distillation * lambda)?)?, ntxent, distillation: Some(distillation) })
    }
}

/// Frames of a batch that show the same, each pair once, by their positions in it. A view of one is no negative of the other's.
pub type Pairs = [(usize, usize)];

/// NT-Xent of `z1`, `z2`: `[n, d]` each, n >= 1, row i of both from the same frame. A scalar: the mean over
/// all 2n views of `-log(exp(z_i.z_p/tau) / sum over j != i of exp(z_i.z_j/tau))`, where j leaves out the views of frames that
/// `same` pairs with i's.
pub fn ntxent(z1: &Tensor, z2: &Tensor, tau: f64, same: &Pairs) -> Result<Tensor> {
    check_pair("ntxent", z1, z2)?;
    let views = normalise_rows(&Tensor::cat(&[z1, z2], 0)?)?;
    let frames = z1.dim(0)?;
    let (z1, z2) = (views.narrow(0, 0, frames)?, views.narrow(0, frames, frames)?);
    let positive = ((z1 * z2)?.sum(D::Minus1)? / tau)?;
    let positive = Tensor::cat(&[&positive, &positive], 0)?;
    let logits = (views.matmul(&views.t()?)? / tau)?;
    // A view is not its own negative either.
    let logits = logits.add(&without(&logits, same, true)?)?;
    cross_entropy(&logits, &positive, 1)?.mean_all()
}

/// Distillation of `q` (student's or predicted projections) to `t` (teacher's), `[m, d]` each, row i of both
/// from the same view; m is even: the first views of all frames, then the second ones. A scalar: half of
/// CE(q t^T / tau_d, i) + CE(t q^T / tau_d, i), each the mean over rows; `same` as in [`ntxent`].
pub fn distillation(q: &Tensor, t: &Tensor, tau_d: f64, same: &Pairs) -> Result<Tensor> {
    check_pair("distillation", q, t)?;
    let q = normalise_rows(q)?;
    let t = normalise_rows(&t.detach())?.detach();
    let positive = ((&q * &t)?.sum(D::Minus1)? / tau_d)?;
    let mut logits = (q.matmul(&t.t()?)? / tau_d)?;
    if !same.is_empty() {
        logits = logits.add(&without(&logits, same, false)?)?;
    }
    let student_to_teacher = cross_entropy(&logits, &positive, 1)?;
    let teacher_to_student = cross_entropy(&logits, &positive, 0)?;
    (student_to_teacher + teacher_to_student)?.mean_all()? * 0.5
}

/// Feature distillation: 1 minus the cosine between the rows of `h` (student's features) and `t` (teacher's), `[m, d]` each, row i
/// of both from the same view. A scalar in 0..2, the mean over rows.
pub fn feature_cosine(h: &Tensor, t: &Tensor) -> Result<Tensor> {
    check_pair("feature cosine", h, t)?;
    let cosines = (normalise_rows(h)? * normalise_rows(&t.detach())?.detach())?.sum(D::Minus1)?;
    cosines.mean_all()?.affine(-1.0, 1.0)
}

/// Rows scaled to unit length: `[n, d]` -> `[n, d]`.
pub fn normalise_rows(z: &Tensor) -> Result<Tensor> {
    let square = z.sqr()?.sum_keepdim(D::Minus1)?;
    z.broadcast_div(&(square + NORM_EPSILON)?.sqrt()?)
}

/// `log(sum over dim of exp(logits)) - positive`. The maximum is subtracted first, from the positive too:
/// where the positive is the largest the difference is exact, so a small loss keeps its digits.
fn cross_entropy(logits: &Tensor, positive: &Tensor, dim: usize) -> Result<Tensor> {
    let largest = logits.detach().max_keepdim(dim)?;
    let sum = logits.broadcast_sub(&largest)?.exp()?.sum(dim)?;
    (largest.squeeze(dim)? - positive)? + sum.log()?
}

/// What is added to logits `[m, m]` of views by views: minus infinity for two views of frames that show the same and, with
/// `diagonal`, for a view with itself; 0 elsewhere. It is added, never multiplied, so that it meets no zero.
fn without(logits: &Tensor, same: &Pairs, diagonal: bool) -> Result<Tensor> {
    let m = logits.dim(0)?;
    let frames = m / 2;
    if let Some(pair) = same.iter().find(|(a, b)| a == b || *a.max(b) >= frames) {
        bail!("{pair:?} is no pair of {frames} frames");
    }
    let mut mask = vec![0f32; m * m];
    if diagonal {
        mask.iter_mut().step_by(m + 1).for_each(|entry| *entry = f32::NEG_INFINITY);
    }
    for &(a, b) in same {
        for (view, other) in [(a, b), (a, b + frames), (a + frames, b), (a + frames, b + frames)] {
            mask[view * m + other] = f32::NEG_INFINITY;
            mask[other * m + view] = f32::NEG_INFINITY;
        }
    }
    Tensor::from_vec(mask, (m, m), logits.device())?.to_dtype(logits.dtype())
}

fn check_pair(loss: &str, a: &Tensor, b: &Tensor) -> Result<()> {
    let (rows, _) = a.dims2()?;
    if rows == 0 || a.dims() != b.dims() || a.dtype() != b.dtype() {
        bail!(
            "{loss} needs two equal non-empty matrices, got {:?} {:?} and {:?} {:?}",
            a.dims(),
            a.dtype(),
            b.dims(),
            b.dtype()
        );
    }
    if !matches!(a.dtype(), DType::F32 | DType::F64) {
        bail!("{loss} is computed in f32 or f64, not {:?}", a.dtype());
    }
    Ok(())
}

#[cfg(test)]
#[path = "loss_tests.rs"]
mod tests;
