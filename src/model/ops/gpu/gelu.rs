//! GELU of a biased matrix on a GPU: `gelu.cu`.

use candle_core::Result;

use super::column_sums::column_sums;
use super::{Argument, Call, Machine, Matrix, Module, Span, blocks_of, count};

/// `x` [rows, width], `bias` [width] -> `gelu(x + bias)`.
pub(in crate::model::ops) fn forward<M: Machine>(
    machine: &M,
    [x, bias]: [Span<'_>; 2],
    matrix: Matrix,
) -> Result<M::Memory> {
    x.expect(matrix.elements(), "x")?;
    bias.expect(matrix.width, "the bias")?;
    launch(machine, "bias_gelu_forward", &[x, bias], matrix)
}

/// Gradients of `x` [rows, width] and of the bias [width].
pub(in crate::model::ops) fn backward<M: Machine>(
    machine: &M,
    [x, bias, grad]: [Span<'_>; 3],
    matrix: Matrix,
) -> Result<[M::Memory; 2]> {
    x.expect(matrix.elements(), "x")?;
    bias.expect(matrix.width, "the bias")?;
    grad.expect(matrix.elements(), "the gradient")?;
    let dx = launch(machine, "bias_gelu_backward", &[x, bias, grad], matrix)?;
    let dbias = column_sums(machine, machine.span(&dx), matrix, 1.0)?;
    Ok([dx, dbias])
}

/// Both kernels take their inputs, a result of x's shape, and the shape.
fn launch<M: Machine>(
    machine: &M,
    kernel: &'static str,
    inputs: &[Span<'_>],
    matrix: Matrix,
) -> Result<M::Memory> {
    let elements = matrix.elements();
    let out = machine.allocate(elements)?;
    let mut arguments: Vec<Argument> = inputs.iter().map(|&input| input.into()).collect();
    let shape = [count(elements)?, count(matrix.width)?];
    arguments.push(machine.span(&out).into());
    arguments.extend(shape);
    let call = Call { module: Module::Gelu, kernel, blocks: blocks_of(elements)?, arguments };
    // SAFETY: the kernels' parameters in their order; they touch `elements` of each matrix and `width` of the bias.
    unsafe { machine.launch(call) }?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::super::emulation::{Memory, emulate};
    use super::*;
    use crate::model::ops::gelu::bias_gelu_reference;
    use crate::model::ops::gradient_check::{assert_close, random};
    use candle_core::Var;

    #[test]
    fn values_and_gradients_are_the_references() {
        for (rows, width) in [(1, 1), (7, 33), (130, 20)] {
            let (x, bias) = ((random((rows, width), 1) * 5.0).unwrap(), random(width, 2));
            let grad = random((rows, width), 3);
            let [x_memory, bias_memory, given] = [&x, &bias, &grad].map(Memory::of);
            let matrix = Matrix { rows, width };
            let results = emulate(|machine| {
                let [x, bias, grad] = [&x_memory, &bias_memory, &given].map(|memory| machine.span(memory));
                let y = forward(machine, [x, bias], matrix)?;
                let [dx, dbias] = backward(machine, [x, bias, grad], matrix)?;
                Ok(vec![y, dx, dbias])
            });
            let (x, bias) = (Var::from_tensor(&x).unwrap(), Var::from_tensor(&bias).unwrap());
            let y = bias_gelu_reference(&x, &bias).unwrap();
            let grads = (&y * &grad).unwrap().sum_all().unwrap().backward().unwrap();
            assert_close(&y, &results[0].tensor((rows, width)), 1e-6, "y");
            assert_close(grads.get(&x).unwrap(), &results[1].tensor((rows, width)), 1e-6, "dx");
            assert_close(grads.get(&bias).unwrap(), &results[2].tensor(width), 1e-5, "dbias");
        }
    }
}
