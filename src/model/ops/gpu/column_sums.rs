//! Sums over a matrix's columns on a GPU: `column_sums.cu`.

use candle_core::Result;

use super::{Argument, Call, Machine, Matrix, Module, Span, blocks_of_columns, count};

/// `x` [rows, width] -> [width], times `factor`: first over parts of the rows, then over the parts.
pub(in crate::model::ops) fn column_sums<M: Machine>(
    machine: &M,
    x: Span<'_>,
    matrix: Matrix,
    factor: f64,
) -> Result<M::Memory> {
    let parts = matrix.parts();
    if parts == 1 {
        return sums_of_parts(machine, x, matrix, matrix.rows_per_part(), factor);
    }
    let partial = sums_of_parts(machine, x, matrix, matrix.rows_per_part(), 1.0)?;
    sums_of_parts(machine, machine.span(&partial), Matrix { rows: parts, ..matrix }, parts, factor)
}

/// -> [parts, width]
fn sums_of_parts<M: Machine>(
    machine: &M,
    x: Span<'_>,
    matrix: Matrix,
    rows_per_part: usize,
    factor: f64,
) -> Result<M::Memory> {
    let Matrix { rows, width } = matrix;
    x.expect(matrix.elements(), "x")?;
    let parts = rows.div_ceil(rows_per_part);
    let sums = machine.allocate(parts * width)?;
    let call = Call {
        module: Module::ColumnSums,
        kernel: "column_sums",
        blocks: blocks_of_columns(width, parts)?,
        arguments: vec![
            x.into(),
            machine.span(&sums).into(),
            count(rows)?,
            count(width)?,
            count(rows_per_part)?,
            Argument::Number(factor as f32),
        ],
    };
    // SAFETY: the kernel's parameters in their order; the parts cover the rows, and each writes one row of sums.
    unsafe { machine.launch(call) }?;
    Ok(sums)
}

#[cfg(test)]
mod tests {
    use super::super::emulation::{Emulation, Memory, emulate};
    use super::*;
    use crate::model::ops::gradient_check::{assert_close, random};

    #[test]
    fn every_row_is_summed_once() {
        for (rows, width) in [(1, 1), (3, 40), (64, 32), (65, 33), (500, 7)] {
            let x = random((rows, width), 1);
            let memory = Memory::of(&x);
            let matrix = Matrix { rows, width };
            let sums = emulate(|machine| Ok(vec![column_sums(machine, machine.span(&memory), matrix, 0.5)?]));
            assert_close(&(x.sum(0).unwrap() * 0.5).unwrap(), &sums[0].tensor(width), 1e-5, "sums");
        }
    }

    #[test]
    fn a_matrix_that_is_not_there_is_refused() {
        let memory = Memory::of(&random((3, 4), 1));
        let machine = Emulation::new();
        for matrix in [Matrix { rows: 3, width: 5 }, Matrix { rows: 0, width: 4 }] {
            assert!(column_sums(&machine, machine.span(&memory), matrix, 1.0).is_err());
        }
    }
}
