//! Products of matrices rounded to bf16, summed in f32.
//!
//! One AVX512-BF16 instruction multiplies 16 pairs of neighbours and adds them onto 16 sums in f32: twice the work of an
//! f32 instruction. Where it is missing the same sums are taken by plain loops: slow, and there so that every machine can
//! run (and test) every precision.

use super::arithmetic::{Arithmetic, Left, Patches, Right, Rows, gather};
use super::matrix::Write;
#[cfg(target_arch = "x86_64")]
use super::{avx512::Pairs, blocks};
use crate::widest::widest;

/// The bits of a bf16: the upper half of an f32's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub(super) struct Bits(u16);

/// See the module's text.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bf16 {
    /// The machine has AVX512-BF16. Only `new` sets it: the kernel's safety hangs on it.
    instructions: bool,
}

/// Whether this machine multiplies bf16 faster than f32: AMD's processors with AVX512-BF16 do. A Xeon with AVX512-BF16 did not:
/// on two threads a training step of `resnet_small` took it 1.4 times as long as in f32.
pub fn is_faster() -> bool {
    has_instructions() && is_made_by_amd()
}

fn is_made_by_amd() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        let leaf = std::arch::x86_64::__cpuid(0);
        let vendor = [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes);
        vendor.as_flattened() == b"AuthenticAMD"
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

fn has_instructions() -> bool {
    #[cfg(target_arch = "x86_64")]
    let found = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    let found = false;
    found
}

impl Bf16 {
    pub(super) fn new() -> Self {
        Bf16 { instructions: has_instructions() }
    }

    #[cfg(test)]
    pub(super) fn without_instructions() -> Self {
        Bf16 { instructions: false }
    }
}

impl Arithmetic for Bf16 {
    type Wide = f32;
    type Narrow = Bits;
    const GROUP: usize = 2;
    const FEWEST_ROWS: usize = 6;

    /// To nearest, halves to even; a NaN stays one.
    #[inline(always)]
    fn to_narrow(wide: f32) -> Bits {
        let bits = wide.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        Bits(if wide.is_nan() { 0x7fc0 } else { rounded as u16 })
    }

    #[inline(always)]
    fn to_wide(narrow: Bits) -> f32 {
        f32::from_bits(u32::from(narrow.0) << 16)
    }

    fn narrow<'a>(wide: &'a [f32], scratch: &'a mut Vec<Bits>) -> &'a [Bits] {
        scratch.resize(wide.len(), Bits(0));
        widest!(scratch.iter_mut().zip(wide).for_each(|(out, &value)| *out = Self::to_narrow(value)));
        scratch
    }

    /// Two rows become one of pairs; an odd last row is paired with zeros.
    fn group_rows<'a>(rows: Rows<'a, Bits>, scratch: &'a mut Vec<Bits>) -> Right<'a, Bits> {
        let Rows { data, rows, columns, stride } = rows;
        let depth = rows.div_ceil(2);
        scratch.resize(depth * 2 * columns, Bits(0));
        widest! {
            for (pair, out) in scratch.chunks_exact_mut(2 * columns).enumerate() {
                let row = |index: usize| &data[index * stride..][..columns];
                let upper = row(2 * pair);
                let out = out.as_chunks_mut::<2>().0;
                if 2 * pair + 1 < rows {
                    let lower = row(2 * pair + 1);
                    out.iter_mut().zip(upper).zip(lower).for_each(|((out, &a), &b)| *out = [a, b]);
                } else {
                    out.iter_mut().zip(upper).for_each(|(out, &a)| *out = [a, Bits(0)]);
                }
            }
        };
        Right::side_by_side::<Self>(scratch, depth, columns)
    }

    fn group_columns<'a>(rows: Rows<'a, Bits>, scratch: &'a mut Vec<Bits>) -> Right<'a, Bits> {
        let Rows { data, rows, columns, stride } = rows;
        assert_eq!(columns % 2, 0, "rows of whole pairs");
        scratch.resize(rows * columns, Bits(0));
        // Whole cache lines of the source at a time: 32 columns of all rows.
        for first in (0..columns / 2).step_by(16) {
            let last = (first + 16).min(columns / 2);
            for (row, source) in data.chunks(stride).take(rows).enumerate() {
                let pairs = source[..columns].as_chunks::<2>().0;
                for (pair, elements) in pairs.iter().enumerate().take(last).skip(first) {
                    let at = (pair * rows + row) * 2;
                    scratch[at..at + 2].copy_from_slice(elements);
                }
            }
        }
        Right::side_by_side::<Self>(scratch, columns / 2, rows)
    }

    /// Patches are paired while they are gathered.
    fn group_patches<'a>(patches: Patches<'_, Bits>, scratch: &'a mut Vec<Bits>) -> Right<'a, Bits> {
        let (rows, columns) = (patches.starts.len(), patches.columns());
        scratch.resize(rows.div_ceil(2) * 2 * columns, Bits(0));
        widest! {
            for (pair, out) in scratch.chunks_exact_mut(2 * columns).enumerate() {
                let out = out.chunks_exact_mut(2 * patches.segment_len);
                // An odd last patch is paired with itself, and then with zeros instead.
                let other = (2 * pair + 1).min(rows - 1);
                for (out, (upper, lower)) in out.zip(patches.runs(2 * pair).zip(patches.runs(other))) {
                    let out = out.as_chunks_mut::<2>().0;
                    out.iter_mut().zip(upper).zip(lower).for_each(|((out, &a), &b)| *out = [a, b]);
                }
            }
        }
        if rows % 2 == 1 {
            let last = scratch.len() - 2 * columns;
            scratch[last..].as_chunks_mut::<2>().0.iter_mut().for_each(|pair| pair[1] = Bits(0));
        }
        Right::side_by_side::<Self>(scratch, rows.div_ceil(2), columns)
    }

    /// The kernel reads patches where they lie.
    fn multiply_patches(
        self,
        patches: Patches<'_, Bits>,
        right: Right<'_, Bits>,
        destination: &mut [f32],
        scratch: &mut Vec<Bits>,
    ) {
        #[cfg(target_arch = "x86_64")]
        if self.instructions {
            // SAFETY: `instructions` says that the machine has them.
            unsafe { blocks::multiply_patches::<Pairs>(patches, right, destination) };
            return;
        }
        gather(patches, scratch);
        let left = Self::left(Rows::new(scratch, patches.starts.len(), patches.columns()));
        multiply_portably(left, right, destination, right.columns, Write::Replace);
    }

    fn multiply(
        self,
        left: Left<'_, Bits>,
        right: Right<'_, Bits>,
        destination: &mut [f32],
        stride: usize,
        write: Write,
    ) {
        #[cfg(target_arch = "x86_64")]
        if self.instructions {
            // SAFETY: `instructions` says that the machine has them.
            unsafe { blocks::multiply::<Pairs>(left, right, destination, stride, write) };
            return;
        }
        multiply_portably(left, right, destination, stride, write);
    }
}

fn multiply_portably(
    left: Left<'_, Bits>,
    right: Right<'_, Bits>,
    destination: &mut [f32],
    stride: usize,
    write: Write,
) {
    left.assert_fits(Bf16::GROUP);
    right.assert_fits(Bf16::GROUP);
    let mut sums = vec![0f32; right.columns];
    for row in 0..left.rows {
        sums.fill(0.0);
        for group in 0..left.depth {
            let at = row * left.row_stride + group * left.group_stride;
            let (a, b) = (Bf16::to_wide(left.data[at]), Bf16::to_wide(left.data[at + 1]));
            for column in (0..right.columns).step_by(right.panel_columns) {
                let at = right.start_of(column) + group * right.group_stride;
                let sums = sums[column..].iter_mut().take(right.panel_columns);
                for (sum, pair) in sums.zip(right.data[at..].as_chunks::<2>().0) {
                    *sum += a * Bf16::to_wide(pair[0]) + b * Bf16::to_wide(pair[1]);
                }
            }
        }
        for (out, sum) in destination[row * stride..][..right.columns].iter_mut().zip(&sums) {
            *out = if write == Write::Add { *out + sum } else { *sum };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Small whole numbers: bf16 holds them, and every order of summation gives the same sum.
    fn numbers(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * 37 + seed * 11) % 15) as f32 - 7.0).collect()
    }

    fn narrowed(wide: &[f32]) -> Vec<Bits> {
        wide.iter().map(|&value| Bf16::to_narrow(value)).collect()
    }

    fn expected(a: &[f32], b: &[f32], dims: (usize, usize, usize)) -> Vec<f32> {
        let (rows, depth, columns) = dims;
        let cell = |i: usize, j: usize| (0..depth).map(|d| a[i * depth + d] * b[d * columns + j]).sum();
        (0..rows).flat_map(|i| (0..columns).map(move |j| (i, j))).map(|(i, j)| cell(i, j)).collect()
    }

    #[test]
    fn rounding_is_to_nearest_even_and_keeps_what_is_not_a_number() {
        let narrow = |bits: u32| Bf16::to_narrow(f32::from_bits(bits)).0;
        assert_eq!(narrow(0x3f80_8000), 0x3f80);
        assert_eq!(narrow(0x3f81_8000), 0x3f82);
        assert_eq!(narrow(0x3f80_8001), 0x3f81);
        assert_eq!(narrow(0xff80_0000), 0xff80);
        assert!(Bf16::to_wide(Bf16::to_narrow(f32::from_bits(0x7fff_ffff))).is_nan());
        assert_eq!(narrow(f32::MAX.to_bits()), 0x7f80);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Both layouts of both operands, with and without the instructions, at sizes that leave rests everywhere.
        #[test]
        fn every_layout_gives_the_product(rows in 1usize..15, half_depth in 1usize..20, columns in 1usize..150) {
            let depth = 2 * half_depth;
            let (a, b) = (numbers(rows * depth, 1), numbers(depth * columns, 2));
            let wanted = expected(&a, &b, (rows, depth, columns));
            let (a_rows, b_rows) = (narrowed(&a), narrowed(&b));
            let transpose = |data: &[f32], rows: usize, columns: usize| -> Vec<f32> {
                (0..columns).flat_map(|j| (0..rows).map(move |i| data[i * columns + j])).collect()
            };
            let b_columns = narrowed(&transpose(&b, depth, columns));
            let a_columns = narrowed(&transpose(&a, rows, depth));
            let mut scratch = [Vec::new(), Vec::new(), Vec::new()];
            let [s0, s1, s2] = &mut scratch;
            let rights = [
                Bf16::group_rows(Rows::new(&b_rows, depth, columns), s0),
                Bf16::group_columns(Rows::new(&b_columns, columns, depth), s1),
            ];
            let lefts = [
                Bf16::left(Rows::new(&a_rows, rows, depth)),
                Bf16::group_rows(Rows::new(&a_columns, depth, rows), s2).transposed(),
            ];
            for left in lefts {
                for right in rights {
                    for arithmetic in [Bf16::new(), Bf16::without_instructions()] {
                        let mut out = vec![1f32; rows * columns];
                        arithmetic.multiply(left, right, &mut out, columns, Write::Add);
                        prop_assert!(out.iter().zip(&wanted).all(|(out, wanted)| *out == wanted + 1.0));
                        arithmetic.multiply(left, right, &mut out, columns, Write::Replace);
                        prop_assert_eq!(&out, &wanted);
                    }
                }
            }
        }
    }

    #[test]
    fn patches_give_what_their_copies_give() {
        // Two segments of four elements, from an image of 40.
        let image = narrowed(&numbers(40, 3));
        let starts: Vec<usize> = (0..13).map(|i| i * 2).collect();
        let patches =
            Patches { data: &image, starts: &starts, segments: 2, segment_len: 4, segment_stride: 10 };
        let copies: Vec<Bits> = (0..13).flat_map(|row| patches.runs(row).flatten().copied()).collect();
        let b = narrowed(&numbers(8 * 21, 4));
        let (mut s0, mut s1, mut s2) = (Vec::new(), Vec::new(), Vec::new());
        let right = Bf16::group_rows(Rows::new(&b, 8, 21), &mut s0);
        let mut wanted = vec![0.0; 13 * 21];
        Bf16::new().multiply(Bf16::left(Rows::new(&copies, 13, 8)), right, &mut wanted, 21, Write::Replace);
        for arithmetic in [Bf16::new(), Bf16::without_instructions()] {
            let mut out = vec![f32::NAN; 13 * 21];
            arithmetic.multiply_patches(patches, right, &mut out, &mut s1);
            assert_eq!(out, wanted);
        }
        let grouped = Bf16::group_patches(patches, &mut s1);
        let expected = Bf16::group_rows(Rows::new(&copies, 13, 8), &mut s2);
        assert_eq!((grouped.data, grouped.depth), (expected.data, expected.depth));
    }

    #[test]
    fn an_odd_number_of_rows_is_paired_with_zeros() {
        let (a, b) = (narrowed(&[1.0, 2.0, 3.0, 0.0]), narrowed(&[1.0, 1.0, 1.0]));
        let mut scratch = vec![Bits(0xffff); 8];
        let right = Bf16::group_rows(Rows::new(&b, 3, 1), &mut scratch);
        let mut out = [0.0];
        Bf16::new().multiply(Bf16::left(Rows::new(&a, 1, 4)), right, &mut out, 1, Write::Replace);
        assert_eq!(out, [6.0]);
    }

    #[test]
    #[should_panic(expected = "a left operand beyond its slice")]
    fn an_operand_beyond_its_slice_is_refused() {
        let data = [Bits(0); 8];
        let left = Left { data: &data[..], rows: 3, depth: 2, row_stride: 4, group_stride: 2 };
        let right = Right::side_by_side::<Bf16>(&data, 2, 2);
        Bf16::new().multiply(left, right, &mut [0.0; 6], 2, Write::Replace);
    }
}
