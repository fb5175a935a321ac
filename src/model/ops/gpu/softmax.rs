//! Softmax of scaled rows on a GPU: `softmax.cu`.

use candle_core::Result;

use super::{Argument, Call, Machine, Matrix, Module, Span, blocks_of_rows, count};

/// `scores` [rows, width] -> `softmax(scale * scores)` of each row; `scale` is positive.
pub(in crate::model::ops) fn forward<M: Machine>(
    machine: &M,
    scores: Span<'_>,
    matrix: Matrix,
    scale: f64,
) -> Result<M::Memory> {
    scores.expect(matrix.elements(), "the scores")?;
    launch(machine, "softmax_forward", &[scores], matrix, scale)
}

/// The gradient of the scores from the result and its gradient, all [rows, width].
pub(in crate::model::ops) fn backward<M: Machine>(
    machine: &M,
    [probabilities, grad]: [Span<'_>; 2],
    matrix: Matrix,
    scale: f64,
) -> Result<M::Memory> {
    probabilities.expect(matrix.elements(), "the probabilities")?;
    grad.expect(matrix.elements(), "the gradient")?;
    launch(machine, "softmax_backward", &[probabilities, grad], matrix, scale)
}

/// Both kernels take matrices, a result of the same shape, the shape and the scale.
fn launch<M: Machine>(
    machine: &M,
    kernel: &'static str,
    inputs: &[Span<'_>],
    matrix: Matrix,
    scale: f64,
) -> Result<M::Memory> {
    let out = machine.allocate(matrix.elements())?;
    let mut arguments: Vec<Argument> = inputs.iter().map(|&input| input.into()).collect();
    arguments.extend([
        machine.span(&out).into(),
        count(matrix.rows)?,
        count(matrix.width)?,
        Argument::Number(scale as f32),
    ]);
    let call = Call { module: Module::Softmax, kernel, blocks: blocks_of_rows(matrix.rows)?, arguments };
    // SAFETY: the kernels' parameters in their order; they touch `rows` rows of `width` of each matrix.
    unsafe { machine.launch(call) }?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::super::emulation::{Memory, emulate};
    use super::*;
    use crate::model::ops::gradient_check::{assert_close, random};
    use crate::model::ops::softmax::reference;
    use candle_core::Var;

    #[test]
    fn values_and_gradients_are_the_references() {
        for (rows, width) in [(1, 1), (9, 5), (20, 65), (3, 197)] {
            let scores = (random((rows, width), 1) * 30.0).unwrap();
            let grad = random((rows, width), 2);
            let (given, given_grad) = (Memory::of(&scores), Memory::of(&grad));
            let matrix = Matrix { rows, width };
            let results = emulate(|machine| {
                let y = forward(machine, machine.span(&given), matrix, 0.125)?;
                let inputs = [machine.span(&y), machine.span(&given_grad)];
                let dx = backward(machine, inputs, matrix, 0.125)?;
                Ok(vec![y, dx])
            });
            let var = Var::from_tensor(&scores).unwrap();
            let y = reference(&var, 0.125).unwrap();
            let grads = (&y * &grad).unwrap().sum_all().unwrap().backward().unwrap();
            assert_close(&y, &results[0].tensor((rows, width)), 1e-6, "probabilities");
            assert_close(grads.get(&var).unwrap(), &results[1].tensor((rows, width)), 1e-6, "dscores");
        }
    }
}
