//! Batch normalisation on a GPU: `batch_norm.cu`.

use candle_core::Result;

use super::column_sums::column_sums;
use super::{
    Argument, Call, Machine, Matrix, Module, NormGradients, Span, blocks_of, blocks_of_columns, count,
};

/// What every pass is told: the shape, what is added to the variance, and what results are raised to.
#[derive(Clone, Copy)]
pub(in crate::model::ops) struct Rule {
    pub matrix: Matrix,
    pub eps: f64,
    /// 0 for ReLU, minus infinity for nothing.
    pub floor: f32,
}

/// Mean and biased variance of each column of `x` [rows, width], [width] both: by two passes, so that a large mean costs no digits.
pub(in crate::model::ops) fn moments<M: Machine>(
    machine: &M,
    x: Span<'_>,
    matrix: Matrix,
) -> Result<[M::Memory; 2]> {
    let Matrix { rows, width } = matrix;
    let share = 1.0 / rows as f64;
    let mean = column_sums(machine, x, matrix, share)?;
    let parts = matrix.parts();
    let partial = machine.allocate(parts * width)?;
    let call = Call {
        module: Module::BatchNorm,
        kernel: "batch_norm_squares",
        blocks: blocks_of_columns(width, parts)?,
        arguments: vec![
            x.into(),
            machine.span(&mean).into(),
            machine.span(&partial).into(),
            count(rows)?,
            count(width)?,
            count(matrix.rows_per_part())?,
        ],
    };
    // SAFETY: the kernel's parameters in their order; `column_sums` has checked x, the parts cover its rows, and each writes its
    // `width` sums.
    unsafe { machine.launch(call) }?;
    let variance = column_sums(machine, machine.span(&partial), Matrix { rows: parts, width }, share)?;
    Ok([mean, variance])
}

/// The columns' moments, [width] each.
#[derive(Clone, Copy)]
pub(in crate::model::ops) struct MomentSpans<'a> {
    pub mean: Span<'a>,
    pub variance: Span<'a>,
}

impl MomentSpans<'_> {
    fn expect(&self, width: usize) -> Result<()> {
        self.mean.expect(width, "the means")?;
        self.variance.expect(width, "the variances")
    }
}

/// `x` [rows, width], `gamma` and `beta` [width] -> [rows, width].
pub(in crate::model::ops) fn forward<M: Machine>(
    machine: &M,
    [x, gamma, beta]: [Span<'_>; 3],
    moments: MomentSpans<'_>,
    Rule { matrix, eps, floor }: Rule,
) -> Result<M::Memory> {
    let elements = matrix.elements();
    x.expect(elements, "x")?;
    gamma.expect(matrix.width, "gamma")?;
    beta.expect(matrix.width, "beta")?;
    moments.expect(matrix.width)?;
    let y = machine.allocate(elements)?;
    let call = Call {
        module: Module::BatchNorm,
        kernel: "batch_norm_forward",
        blocks: blocks_of(elements)?,
        arguments: vec![
            x.into(),
            moments.mean.into(),
            moments.variance.into(),
            gamma.into(),
            beta.into(),
            machine.span(&y).into(),
            count(elements)?,
            count(matrix.width)?,
            Argument::Number(eps as f32),
            Argument::Number(floor),
        ],
    };
    // SAFETY: the kernel's parameters in their order; it touches `elements` of both matrices and `width` of each vector.
    unsafe { machine.launch(call) }?;
    Ok(y)
}

/// What a forward pass read and wrote, and the gradient of what it wrote.
#[derive(Clone, Copy)]
pub(in crate::model::ops) struct Saved<'a> {
    pub x: Span<'a>,
    pub y: Span<'a>,
    pub gamma: Span<'a>,
    pub grad: Span<'a>,
    pub moments: MomentSpans<'a>,
    /// Whether the moments are x's own, so that its gradient goes through them too.
    pub through_moments: bool,
}

pub(in crate::model::ops) fn backward<M: Machine>(
    machine: &M,
    saved: Saved<'_>,
    rule: Rule,
) -> Result<NormGradients<M::Memory>> {
    let Saved { x, y, gamma, grad, moments, .. } = saved;
    let (elements, width) = (rule.matrix.elements(), rule.matrix.width);
    [x, y, grad].iter().try_for_each(|matrix| matrix.expect(elements, "a matrix"))?;
    gamma.expect(width, "gamma")?;
    moments.expect(width)?;
    let parameters = parameter_gradients(machine, saved, rule)?;
    let share = if saved.through_moments { 1.0 / rule.matrix.rows as f32 } else { 0.0 };
    let dx = machine.allocate(elements)?;
    let call = Call {
        module: Module::BatchNorm,
        kernel: "batch_norm_backward",
        blocks: blocks_of(elements)?,
        arguments: vec![
            x.into(),
            y.into(),
            grad.into(),
            moments.mean.into(),
            moments.variance.into(),
            gamma.into(),
            machine.span(&parameters).into(),
            machine.span(&dx).into(),
            count(elements)?,
            count(width)?,
            Argument::Number(rule.eps as f32),
            Argument::Number(rule.floor),
            Argument::Number(share),
        ],
    };
    // SAFETY: the kernel's parameters in their order; it touches `elements` of each matrix, `width` of each vector, and 2 * width sums.
    unsafe { machine.launch(call) }?;
    Ok(NormGradients { dx, parameters })
}

/// [2, width]
fn parameter_gradients<M: Machine>(machine: &M, saved: Saved<'_>, rule: Rule) -> Result<M::Memory> {
    let Rule { matrix, eps, floor } = rule;
    let (parts, width) = (matrix.parts(), matrix.width);
    let partial = machine.allocate(parts * 2 * width)?;
    let call = Call {
        module: Module::BatchNorm,
        kernel: "batch_norm_parameters",
        blocks: blocks_of_columns(width, parts)?,
        arguments: vec![
            saved.x.into(),
            saved.y.into(),
            saved.grad.into(),
            saved.moments.mean.into(),
            saved.moments.variance.into(),
            machine.span(&partial).into(),
            count(matrix.rows)?,
            count(width)?,
            count(matrix.rows_per_part())?,
            Argument::Number(eps as f32),
            Argument::Number(floor),
        ],
    };
    // SAFETY: the kernel's parameters in their order; `backward` has checked the spans, the parts cover the rows, and each writes its
    // 2 * width sums.
    unsafe { machine.launch(call) }?;
    column_sums(machine, machine.span(&partial), Matrix { rows: parts, width: 2 * width }, 1.0)
}

#[cfg(test)]
mod tests {
    use super::super::emulation::{Memory, emulate};
    use super::*;
    use crate::model::ops::gradient_check::{assert_close, random};
    use crate::model::ops::{Activation, BatchNormInput, Moments, batch_norm_eval, batch_norm_train};
    use candle_core::{DType, Tensor, Var};

    const EPS: f64 = 1e-3;

    /// On the CPU: y, then the gradients of x, gamma and beta, the moments that it took, and those that it was given.
    fn on_cpu(
        inputs: &[Tensor; 3],
        grad: &Tensor,
        activation: Activation,
        given: Option<&Moments>,
    ) -> Vec<Tensor> {
        let vars = inputs.each_ref().map(|input| Var::from_tensor(input).unwrap());
        let input = BatchNormInput { x: &vars[0], gamma: &vars[1], beta: &vars[2], eps: EPS, activation };
        let (y, moments) = match given {
            None => batch_norm_train(input).unwrap(),
            Some(given) => (batch_norm_eval(input, given).unwrap(), given.clone()),
        };
        let grads = (&y * grad).unwrap().sum_all().unwrap().backward().unwrap();
        let [dx, dgamma, dbeta] = vars.each_ref().map(|var| grads.get(var).unwrap().clone());
        vec![y, dx, Tensor::stack(&[dgamma, dbeta], 0).unwrap(), moments.mean, moments.variance]
    }

    #[test]
    fn values_moments_and_gradients_are_the_cpus() {
        for (rows, width) in [(2, 1), (9, 5), (200, 70)] {
            // A mean far from 0 costs no digits; numbers that f32 has cost none before.
            let x = (random((rows, width), 1) + 100.0).unwrap();
            let x = x.to_dtype(DType::F32).unwrap().to_dtype(DType::F64).unwrap();
            let inputs = [x, random(width, 2), random(width, 3)];
            let grad = random((rows, width), 4);
            let variance = (random(width, 6).abs().unwrap() + 0.5).unwrap();
            let fixed = Moments { mean: (random(width, 5) + 100.0).unwrap(), variance };
            let matrix = Matrix { rows, width };
            for activation in [Activation::Identity, Activation::Relu] {
                for given in [None, Some(&fixed)] {
                    let rule = Rule { matrix, eps: EPS, floor: activation.floor() };
                    let memory = inputs.each_ref().map(Memory::of);
                    let grad_memory = Memory::of(&grad);
                    let results = emulate(|machine| {
                        let [x, gamma, beta] = memory.each_ref().map(|memory| machine.span(memory));
                        let [mean, variance] = match given {
                            None => moments(machine, x, matrix)?,
                            Some(given) => [&given.mean, &given.variance].map(Memory::of),
                        };
                        let spans =
                            MomentSpans { mean: machine.span(&mean), variance: machine.span(&variance) };
                        let y = forward(machine, [x, gamma, beta], spans, rule)?;
                        let saved = Saved {
                            x,
                            y: machine.span(&y),
                            gamma,
                            grad: machine.span(&grad_memory),
                            moments: spans,
                            through_moments: given.is_none(),
                        };
                        let NormGradients { dx, parameters } = backward(machine, saved, rule)?;
                        Ok(vec![y, dx, parameters, mean, variance])
                    });
                    let expected = on_cpu(&inputs, &grad, activation, given);
                    for (expected, result) in expected.iter().zip(results) {
                        assert_close(expected, &result.tensor(expected.shape()), 5e-5, "a result");
                    }
                }
            }
        }
    }
}
