//! AdamW and sums of squares over many tensors on a GPU: `adamw.cu`.

use candle_core::Result;

use super::{Argument, Call, Machine, Module, Span, blocks_of, count};
use crate::model::ops::adamw::{AdamWStep, EPSILON};

/// Elements of one tensor that a block takes. `ELEMENTS_PER_BLOCK` in `adamw.cu`.
const ELEMENTS_PER_BLOCK: usize = 4096;

/// One tensor with what moves it: four spans of one length.
pub(in crate::model::ops) struct Moved<'a> {
    pub parameter: Span<'a>,
    pub gradient: Span<'a>,
    pub moments: [Span<'a>; 2],
    /// What the parameter is multiplied by, for its decay.
    pub keep: f64,
}

/// First blocks of tensors of such lengths, and blocks in all.
fn blocks_of_tensors(lengths: impl Iterator<Item = usize>) -> (Vec<u64>, usize) {
    let mut blocks = 0;
    let first = lengths.map(|elements| {
        let first = blocks as u64;
        blocks += elements.div_ceil(ELEMENTS_PER_BLOCK);
        first
    });
    (first.collect(), blocks)
}

/// The sum of squares of each of `tensors`: [tensors].
pub(in crate::model::ops) fn sums_of_squares<M: Machine>(
    machine: &M,
    tensors: &[Span<'_>],
) -> Result<M::Memory> {
    let (first, blocks) = blocks_of_tensors(tensors.iter().map(|span| span.elements));
    // As `Squared` in the kernels' file.
    let rows =
        tensors.iter().zip(first).flat_map(|(span, first)| [span.address, span.elements as u64, first]);
    let table = machine.upload(&rows.collect::<Vec<_>>())?;
    let (partial, sums) = (machine.allocate(blocks)?, machine.allocate(tensors.len())?);
    let mut arguments = vec![machine.table(&table), count(tensors.len())?, machine.span(&partial).into()];
    let call = |kernel, blocks: usize, arguments| -> Result<Call> {
        Ok(Call { module: Module::AdamW, kernel, blocks: blocks_of(blocks * super::THREADS)?, arguments })
    };
    let of_blocks = call("squares_of_blocks", blocks, arguments.clone())?;
    arguments.extend([count(blocks)?, machine.span(&sums).into()]);
    let of_tensors = call("squares_of_tensors", tensors.len(), arguments)?;
    // SAFETY: the kernels' parameters in their order; blocks are as many as the table's rows say, and so are partial sums.
    unsafe { machine.launch(of_blocks) }?;
    unsafe { machine.launch(of_tensors) }?;
    Ok(sums)
}

/// Moves each parameter and both its moments by one step.
pub(in crate::model::ops) fn update<M: Machine>(
    machine: &M,
    tensors: &[Moved<'_>],
    step: AdamWStep,
) -> Result<()> {
    let (first, blocks) = blocks_of_tensors(tensors.iter().map(|tensor| tensor.parameter.elements));
    let mut rows = Vec::with_capacity(7 * tensors.len());
    for (tensor, first) in tensors.iter().zip(first) {
        let Moved { parameter, gradient, moments, keep } = tensor;
        gradient.expect(parameter.elements, "the gradient")?;
        moments.iter().try_for_each(|moment| moment.expect(parameter.elements, "a moment"))?;
        let addresses = [*parameter, *gradient, moments[0], moments[1]].map(|span| span.address);
        rows.extend(addresses);
        // As the rest of `Moved` in the kernels' file: the low half of the last word is `keep`.
        rows.extend([parameter.elements as u64, first, u64::from((*keep as f32).to_bits())]);
    }
    let table = machine.upload(&rows)?;
    let AdamWStep { scale, beta1, beta2, rate, root_correction } = step;
    let mut arguments = vec![machine.table(&table), count(tensors.len())?];
    let numbers = [scale, beta1, beta2, rate, root_correction, EPSILON];
    arguments.extend(numbers.map(|number| Argument::Number(number as f32)));
    let blocks = blocks_of(blocks * super::THREADS)?;
    let call = Call { module: Module::AdamW, kernel: "adamw", blocks, arguments };
    // SAFETY: the kernel's parameters in their order; its table has a row for each tensor, whose spans are as long as it says,
    // and blocks are as many as the rows say.
    unsafe { machine.launch(call) }
}

#[cfg(test)]
mod tests {
    use super::super::emulation::{Memory, emulate};
    use super::*;
    use crate::model::ops::adamw;
    use crate::model::ops::gradient_check::{assert_close, random};
    use candle_core::{DType, Tensor};

    /// One element, a block less one, a block, one more, and several blocks.
    const LENGTHS: [usize; 5] = [1, 4095, 4096, 4097, 9000];

    fn tensors(seed: u64) -> Vec<Tensor> {
        let tensor = |&length: &usize| random(length, seed + length as u64).to_dtype(DType::F32).unwrap();
        LENGTHS.iter().map(tensor).collect()
    }

    #[test]
    fn every_tensors_squares_are_summed_once() {
        let given = tensors(1);
        let memory: Vec<Memory> = given.iter().map(Memory::of).collect();
        let sums = emulate(|machine| {
            let spans: Vec<_> = memory.iter().map(|memory| machine.span(memory)).collect();
            Ok(vec![sums_of_squares(machine, &spans)?])
        });
        let expected = adamw::sums_of_squares(&given).unwrap();
        assert_close(&expected, &sums[0].tensor(LENGTHS.len()), 1e-6, "sums");
    }

    #[test]
    fn tensors_move_as_on_the_cpu() {
        let step = AdamWStep { scale: 0.7, beta1: 0.9, beta2: 0.999, rate: 0.01, root_correction: 0.5 };
        let keep = |index: usize| if index.is_multiple_of(2) { 0.99 } else { 1.0 };
        let fresh = || {
            let squares = tensors(4).iter().map(|tensor| tensor.sqr().unwrap()).collect();
            [tensors(1), tensors(2), tensors(3), squares]
        };
        let moved = emulate(|machine| {
            let memory = fresh().map(|tensors| tensors.iter().map(Memory::moving).collect::<Vec<_>>());
            let row = |index: usize| {
                let [parameter, gradient, first, second] =
                    memory.each_ref().map(|all| machine.span(&all[index]));
                Moved { parameter, gradient, moments: [first, second], keep: keep(index) }
            };
            update(machine, &(0..LENGTHS.len()).map(row).collect::<Vec<_>>(), step)?;
            Ok(memory.into_iter().flatten().collect())
        });
        let on_cpu = fresh();
        let row = |index: usize| {
            let [parameter, gradient, first, second] = on_cpu.each_ref().map(|all| &all[index]);
            adamw::AdamWTensor { parameter, gradient, moments: [first, second], keep: keep(index) }
        };
        adamw::adamw(&(0..LENGTHS.len()).map(row).collect::<Vec<_>>(), step).unwrap();
        for (expected, moved) in on_cpu.iter().flatten().zip(moved) {
            assert_close(expected, &moved.tensor(expected.shape()), 1e-6, "a tensor");
        }
    }
}
