//! The search on machines that multiply 8-bit integers four times as fast as f32 (AVX-512 VNNI).
//!
//! Rows are rounded to 8 bits with a scale of their own. The length of what rounding took away bounds how far a rounded
//! similarity lies from the true one (Cauchy & Schwarz), so a row whose upper bound is below the k-th best lower bound
//! is no neighbour. The few others, some 50 of 8,000 for k = 20, are compared in f32: the search stays exact.

use std::arch::x86_64::*;
use std::ops::Range;

use super::shortlist::{LANES, ROOM, ROUNDER, SLACK, Shortlist, lanes, panels};
use super::{Neighbour, in_blocks};
use crate::eval::Embeddings;

/// Queries compared at a time. Larger leaves cores idle on small sets, smaller reads the bank more often.
const BLOCK: usize = 20 * GROUP;

/// Queries whose sums lie in registers together.
const GROUP: usize = 6;

/// Registers of `LANES` bank rows, each with 4 neighbouring values: `GROUP * REGISTERS` sums, `REGISTERS` rows' values and a
/// query's fit the 32 registers, and a panel of 384 columns the first-level cache.
const REGISTERS: usize = 4;

/// Bank rows of a panel.
const PANEL: usize = LANES * REGISTERS;
const _: () = assert!(PANEL <= ROOM);

/// Candidates that gather before they are pruned.
const GATHERED: usize = 192;

/// Queries are shifted to 0..=255: the instruction multiplies unsigned by signed.
const SHIFT: i32 = 128;

/// As [`super::nearest`]; `None` where the machine lacks the instructions, or rows are too wide or too many.
pub(super) fn nearest(
    queries: &Embeddings,
    bank: &Embeddings,
    k: usize,
    skip_same_row: bool,
) -> Option<Vec<Vec<Neighbour>>> {
    let found = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vnni");
    if !found {
        return None;
    }
    let panels = panels(bank, PANEL, Panel::new)?;
    Some(in_blocks(queries.rows, BLOCK, |rows| {
        let query = |row| Query::new(queries.row(row), k, skip_same_row.then_some(row));
        // SAFETY: the machine has the three features that `screen` is compiled for.
        unsafe { screen(rows.map(query).collect(), &panels, bank) }
    }))
}

/// A row in 8 bits: close to `scale * values`.
struct Rounded {
    values: Vec<i8>,
    scale: f32,
    /// Length of the difference.
    error: f32,
}

impl Rounded {
    fn new(row: &[f32]) -> Self {
        let largest = lanes(row, row, |largest, value, _| f32::max(largest, value.abs()));
        let largest = largest.into_iter().fold(0.0, f32::max);
        let (scale, per_value) = if largest > 0.0 { (largest / 127.0, 127.0 / largest) } else { (0.0, 0.0) };
        let values: Vec<i8> = row.iter().map(|value| (value * per_value + ROUNDER).to_bits() as i8).collect();
        let rounded: Vec<f32> = values.iter().map(|&value| f32::from(value) * scale).collect();
        let squares = lanes(row, &rounded, |sum, value, rounded| sum + (value - rounded).powi(2));
        Self { values, scale, error: squares.into_iter().sum::<f32>().sqrt() }
    }
}

/// 64 bank rows, sixteen a register; what is missing of the last panel has an upper bound of minus infinity.
struct Panel {
    /// `[ceil(d / 4)]`: four values of each row.
    values: Vec<[[[i8; 4]; LANES]; REGISTERS]>,
    /// What `SHIFT` adds to a sum, negated.
    offsets: [[i32; LANES]; REGISTERS],
    scales: [[f32; LANES]; REGISTERS],
    errors: [[f32; LANES]; REGISTERS],
}

impl Panel {
    fn new(bank: &Embeddings, rows: Range<usize>) -> Self {
        let mut panel = Self {
            values: vec![[[[0; 4]; LANES]; REGISTERS]; bank.dim.div_ceil(4)],
            offsets: [[0; LANES]; REGISTERS],
            scales: [[0.0; LANES]; REGISTERS],
            errors: [[f32::NEG_INFINITY; LANES]; REGISTERS],
        };
        for (place, row) in rows.enumerate() {
            let (register, lane) = (place / LANES, place % LANES);
            let rounded = Rounded::new(bank.row(row));
            let sum: i32 = rounded.values.iter().map(|&value| i32::from(value)).sum();
            panel.offsets[register][lane] = -SHIFT * sum;
            panel.scales[register][lane] = rounded.scale;
            panel.errors[register][lane] = rounded.error;
            for (values, four) in panel.values.iter_mut().zip(rounded.values.chunks(4)) {
                values[register][lane][..four.len()].copy_from_slice(four);
            }
        }
        panel
    }
}

struct Query<'a> {
    shortlist: Shortlist<'a>,
    /// Four shifted values each.
    words: Vec<i32>,
    scale: f32,
    error: f32,
}

impl<'a> Query<'a> {
    fn new(row: &'a [f32], k: usize, skip: Option<usize>) -> Self {
        let rounded = Rounded::new(row);
        let shifted = |value: i8| (i32::from(value) + SHIFT) as u8;
        let words = rounded.values.chunks(4).map(|four| {
            let mut word = [0; 4];
            word.iter_mut().zip(four).for_each(|(byte, &value)| *byte = shifted(value));
            i32::from_le_bytes(word)
        });
        Self {
            shortlist: Shortlist::new(row, k, skip, GATHERED),
            words: words.collect(),
            scale: rounded.scale,
            error: rounded.error,
        }
    }

    /// `sums`: of the products of this query's values and those of the panel's rows.
    #[target_feature(enable = "avx512f")]
    fn offer(&mut self, first_row: i32, panel: &Panel, sums: &[__m512i; REGISTERS]) {
        let scale = _mm512_set1_ps(self.scale);
        let error = _mm512_set1_ps(self.error + SLACK);
        let numbers = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        let lengthened = _mm512_set1_ps(1.0 + self.error);
        for (register, &sum) in sums.iter().enumerate() {
            let lanes = (register * LANES) as i32;
            let sum = _mm512_cvtepi32_ps(_mm512_add_epi32(sum, load(&panel.offsets[register])));
            let similarities = _mm512_mul_ps(sum, _mm512_mul_ps(load_ps(&panel.scales[register]), scale));
            let margins = _mm512_fmadd_ps(load_ps(&panel.errors[register]), lengthened, error);
            let upper = _mm512_add_ps(similarities, margins);
            let promising = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(upper, _mm512_set1_ps(self.shortlist.bar));
            if promising != 0 {
                let rows = _mm512_add_epi32(_mm512_set1_epi32(first_row + lanes), numbers);
                push(&mut self.shortlist, promising, [upper, _mm512_sub_ps(similarities, margins)], rows);
            }
        }
        self.shortlist.make_room();
    }
}

/// Adds the lanes whose bits are set.
#[target_feature(enable = "avx512f")]
fn push(shortlist: &mut Shortlist, lanes: u16, [upper, lower]: [__m512; 2], rows: __m512i) {
    let bits = |values| _mm512_castps_si512(_mm512_maskz_compress_ps(lanes, values));
    let upper = store(bits(upper)).map(f32::from_bits);
    let lower = store(bits(lower)).map(f32::from_bits);
    let rows = store(_mm512_maskz_compress_epi32(lanes, rows)).map(u32::cast_signed);
    shortlist.push(&upper, &lower, &rows, lanes.count_ones() as usize);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn screen(mut queries: Vec<Query>, panels: &[Panel], bank: &Embeddings) -> Vec<Vec<Neighbour>> {
    for (panel, first_row) in panels.iter().zip((0_i32..).step_by(PANEL)) {
        for group in queries.chunks_mut(GROUP) {
            // A short group computes its last query more than once.
            let last = group.len() - 1;
            let words = std::array::from_fn(|query| &group[query.min(last)].words[..]);
            let sums = products(words, panel);
            for (query, sums) in group.iter_mut().zip(&sums) {
                query.offer(first_row, panel, sums);
            }
        }
    }
    queries.into_iter().map(|query| query.shortlist.decide(bank)).collect()
}

/// Sums of products of each query's values and each row's.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn products(queries: [&[i32]; GROUP], panel: &Panel) -> [[__m512i; REGISTERS]; GROUP] {
    let queries = queries.map(|words| &words[..panel.values.len()]);
    let mut sums = [[_mm512_setzero_si512(); REGISTERS]; GROUP];
    for (word, rows) in panel.values.iter().enumerate() {
        let rows: [__m512i; REGISTERS] = std::array::from_fn(|register| load(&rows[register]));
        for (sums, words) in sums.iter_mut().zip(&queries) {
            let values = _mm512_set1_epi32(words[word]);
            for (sum, rows) in sums.iter_mut().zip(&rows) {
                *sum = _mm512_dpbusd_epi32(*sum, values, *rows);
            }
        }
    }
    sums
}

#[target_feature(enable = "avx512f")]
fn load<T: Copy>(values: &[T; LANES]) -> __m512i {
    const { assert!(size_of::<T>() == 4) };
    // SAFETY: the array has the register's 64 bytes, and the load asks for no alignment.
    unsafe { _mm512_loadu_si512(values.as_ptr().cast()) }
}

#[target_feature(enable = "avx512f")]
fn load_ps(values: &[f32; LANES]) -> __m512 {
    _mm512_castsi512_ps(load(values))
}

#[target_feature(enable = "avx512f")]
fn store(register: __m512i) -> [u32; LANES] {
    let mut stored = [0; LANES];
    // SAFETY: the array has the register's 64 bytes, and the store asks for no alignment.
    unsafe { _mm512_storeu_si512(stored.as_mut_ptr().cast(), register) };
    stored
}
