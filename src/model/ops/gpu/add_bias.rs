//! A bias added to the rows of a matrix on a GPU: `add_bias.cu`. The bias' gradient is [`super::column_sums`].

use candle_core::Result;

use super::{Call, Machine, Matrix, Module, Span, blocks_of, count};

/// `x` [rows, width], `bias` [width] -> [rows, width].
pub(in crate::model::ops) fn forward<M: Machine>(
    machine: &M,
    [x, bias]: [Span<'_>; 2],
    matrix: Matrix,
) -> Result<M::Memory> {
    let elements = matrix.elements();
    x.expect(elements, "x")?;
    bias.expect(matrix.width, "the bias")?;
    let y = machine.allocate(elements)?;
    let call = Call {
        module: Module::AddBias,
        kernel: "add_bias",
        blocks: blocks_of(elements)?,
        arguments: vec![
            x.into(),
            bias.into(),
            machine.span(&y).into(),
            count(elements)?,
            count(matrix.width)?,
        ],
    };
    // SAFETY: the kernel's parameters in their order; it touches `elements` of both matrices and `width` of the bias.
    unsafe { machine.launch(call) }?;
    Ok(y)
}

#[cfg(test)]
mod tests {
    use super::super::emulation::{Memory, emulate};
    use super::*;
    use crate::model::ops::gradient_check::{assert_close, random};

    #[test]
    fn every_row_gets_the_bias() {
        for (rows, width) in [(1, 1), (7, 33), (300, 5)] {
            let (x, bias) = (random((rows, width), 1), random(width, 2));
            let [x_memory, bias_memory] = [&x, &bias].map(Memory::of);
            let y = emulate(|machine| {
                let inputs = [machine.span(&x_memory), machine.span(&bias_memory)];
                Ok(vec![forward(machine, inputs, Matrix { rows, width })?])
            });
            let expected = x.broadcast_add(&bias).unwrap();
            assert_close(&expected, &y[0].tensor((rows, width)), 1e-6, "y");
        }
    }
}
