//! Layer normalisation on a GPU: `layer_norm.cu`.

use candle_core::Result;

use super::column_sums::column_sums;
use super::{
    Argument, Call, Machine, Matrix, Module, NormGradients, Span, blocks_of_columns, blocks_of_rows, count,
};

/// `x` [rows, width], `gamma` and `beta` [width] -> [rows, width].
pub(in crate::model::ops) fn forward<M: Machine>(
    machine: &M,
    [x, gamma, beta]: [Span<'_>; 3],
    matrix: Matrix,
    eps: f64,
) -> Result<M::Memory> {
    let Matrix { rows, width } = matrix;
    x.expect(matrix.elements(), "x")?;
    gamma.expect(width, "gamma")?;
    beta.expect(width, "beta")?;
    let y = machine.allocate(matrix.elements())?;
    let call = Call {
        module: Module::LayerNorm,
        kernel: "layer_norm_forward",
        blocks: blocks_of_rows(rows)?,
        arguments: vec![
            x.into(),
            gamma.into(),
            beta.into(),
            machine.span(&y).into(),
            count(rows)?,
            count(width)?,
            Argument::Number(eps as f32),
        ],
    };
    // SAFETY: the kernel's parameters in their order; it touches `rows` rows of `width` and vectors of `width`.
    unsafe { machine.launch(call) }?;
    Ok(y)
}

/// `x` and `grad` [rows, width], `gamma` [width].
pub(in crate::model::ops) fn backward<M: Machine>(
    machine: &M,
    [x, gamma, grad]: [Span<'_>; 3],
    matrix: Matrix,
    eps: f64,
) -> Result<NormGradients<M::Memory>> {
    let Matrix { rows, width } = matrix;
    x.expect(matrix.elements(), "x")?;
    gamma.expect(width, "gamma")?;
    grad.expect(matrix.elements(), "the gradient")?;
    let (dx, moments) = (machine.allocate(matrix.elements())?, machine.allocate(2 * rows)?);
    let call = Call {
        module: Module::LayerNorm,
        kernel: "layer_norm_backward",
        blocks: blocks_of_rows(rows)?,
        arguments: vec![
            x.into(),
            gamma.into(),
            grad.into(),
            machine.span(&dx).into(),
            machine.span(&moments).into(),
            count(rows)?,
            count(width)?,
            Argument::Number(eps as f32),
        ],
    };
    // SAFETY: the kernel's parameters in their order; it touches `rows` rows of `width`, a vector of `width`, and two moments a row.
    unsafe { machine.launch(call) }?;
    let parts = matrix.parts();
    let partial = machine.allocate(parts * 2 * width)?;
    let call = Call {
        module: Module::LayerNorm,
        kernel: "layer_norm_parameters",
        blocks: blocks_of_columns(width, parts)?,
        arguments: vec![
            x.into(),
            grad.into(),
            machine.span(&moments).into(),
            machine.span(&partial).into(),
            count(rows)?,
            count(width)?,
            count(matrix.rows_per_part())?,
        ],
    };
    // SAFETY: as above; the parts cover the rows, and each writes its 2 * width sums.
    unsafe { machine.launch(call) }?;
    let parameters =
        column_sums(machine, machine.span(&partial), Matrix { rows: parts, width: 2 * width }, 1.0)?;
    Ok(NormGradients { dx, parameters })
}

#[cfg(test)]
mod tests {
    use super::super::emulation::{Memory, emulate};
    use super::*;
    use crate::model::ops::gradient_check::{assert_close, random};
    use crate::model::ops::layer_norm;
    use candle_core::Var;

    /// One row, fewer columns than a warp, several parts, columns that fill no tile.
    const MATRICES: [Matrix; 4] = [
        Matrix { rows: 1, width: 1 },
        Matrix { rows: 9, width: 5 },
        Matrix { rows: 200, width: 70 },
        Matrix { rows: 67, width: 192 },
    ];

    #[test]
    fn values_and_gradients_are_the_cpus() {
        for matrix in MATRICES {
            let Matrix { rows, width } = matrix;
            let inputs = [random((rows, width), 1), random(width, 2), random(width, 3)];
            let grad = random((rows, width), 4);
            let memory = inputs.each_ref().map(Memory::of);
            let given = Memory::of(&grad);
            let results = emulate(|machine| {
                let [x, gamma, beta] = memory.each_ref().map(|memory| machine.span(memory));
                let y = forward(machine, [x, gamma, beta], matrix, 1e-5)?;
                let NormGradients { dx, parameters } =
                    backward(machine, [x, gamma, machine.span(&given)], matrix, 1e-5)?;
                Ok(vec![y, dx, parameters])
            });
            let vars = inputs.each_ref().map(|input| Var::from_tensor(input).unwrap());
            let y = layer_norm(&vars[0], &vars[1], &vars[2], 1e-5).unwrap();
            let grads = (&y * &grad).unwrap().sum_all().unwrap().backward().unwrap();
            let [dx, dgamma, dbeta] = vars.each_ref().map(|var| grads.get(var).unwrap());
            assert_close(&y, &results[0].tensor((rows, width)), 1e-5, "y");
            // One column's deviation is 0: its gradient is nothing times a large number.
            let tolerance = if width == 1 { 1e-3 } else { 1e-5 };
            assert_close(dx, &results[1].tensor((rows, width)), tolerance, "dx");
            let parameters = results[2].tensor((2, width));
            assert_close(dgamma, &parameters.get(0).unwrap(), 1e-5, "dgamma");
            assert_close(dbeta, &parameters.get(1).unwrap(), 1e-5, "dbeta");
        }
    }
}
