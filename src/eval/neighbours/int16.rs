//! The search on machines whose widest registers are AVX2's: these multiply 16-bit integers half as fast again as f32.
//!
//! Values are rounded to multiples of 1 / `STEPS`. What that takes from a row is no longer than half a step times the root
//! of its dimensions, which bounds how far a rounded similarity lies from the true one (Cauchy & Schwarz). Only the k
//! nearest rows, and the few as near as the last of them but for that bound (0.0007 with 384 dimensions), are compared in f32: the
//! search stays exact.

use std::arch::x86_64::*;
use std::ops::Range;

use super::shortlist::{ROOM, ROUNDER, SLACK, Shortlist, panels};
use super::{Neighbour, in_blocks};
use crate::eval::Embeddings;

/// Queries compared at a time. Larger leaves cores idle on small sets, smaller reads the bank more often.
const BLOCK: usize = 32 * GROUP;

/// Queries whose sums lie in registers together.
const GROUP: usize = 4;

/// Bank rows in a register, each with 2 neighbouring values.
const WIDTH: usize = 8;

/// Registers of bank rows: `GROUP * REGISTERS` sums, `REGISTERS` rows' values and `GROUP` queries' fit the 16 registers, and
/// a panel of 384 columns the first-level cache.
const REGISTERS: usize = 2;

/// Bank rows of a panel.
const PANEL: usize = WIDTH * REGISTERS;
const _: () = assert!(PANEL <= ROOM);

/// Values of a row of length 1 are integers up to this in size: a sum of products, at most the product of two lengths, is
/// half of what 32 bits hold.
const STEPS: f32 = 32_000.0;

/// Candidates that gather before they are pruned.
const GATHERED: usize = 64;

/// As [`super::nearest`]; `None` where the machine lacks the instructions, or rows are too wide or too many.
pub(super) fn nearest(
    queries: &Embeddings,
    bank: &Embeddings,
    k: usize,
    skip_same_row: bool,
) -> Option<Vec<Vec<Neighbour>>> {
    if !is_x86_feature_detected!("avx2") {
        return None;
    }
    let panels = panels(bank, PANEL, Panel::new)?;
    Some(in_blocks(queries.rows, BLOCK, |rows| {
        let groups = rows
            .clone()
            .step_by(GROUP)
            .map(|first| Group::new(queries, first..(first + GROUP).min(rows.end), k, skip_same_row));
        // SAFETY: the machine has the feature that `screen` is compiled for.
        unsafe { screen(groups.collect(), &panels, bank) }
    }))
}

fn in_steps(value: f32) -> i16 {
    (value * STEPS + ROUNDER).to_bits() as i16
}

/// In squared steps: how far the sum of products of two rounded rows can lie from their similarity as f32 computes it.
fn margin(dim: usize) -> f64 {
    let (steps, lost) = (f64::from(STEPS), (dim as f64).sqrt() / 2.0);
    (2.0 * steps + lost) * lost + f64::from(SLACK) * steps * steps
}

/// Sixteen bank rows, eight a register; zeros stand for what is missing of the last panel.
struct Panel {
    rows: Range<usize>,
    /// `[ceil(d / 2)]`: two values of each row.
    values: Vec<[[[i16; 2]; WIDTH]; REGISTERS]>,
}

impl Panel {
    fn new(bank: &Embeddings, rows: Range<usize>) -> Self {
        let mut values = vec![[[[0; 2]; WIDTH]; REGISTERS]; bank.dim.div_ceil(2)];
        for (place, row) in rows.clone().enumerate() {
            let (register, lane) = (place / WIDTH, place % WIDTH);
            for (values, two) in values.iter_mut().zip(bank.row(row).chunks(2)) {
                for (value, &of_row) in values[register][lane].iter_mut().zip(two) {
                    *value = in_steps(of_row);
                }
            }
        }
        Self { rows, values }
    }
}

/// Queries whose words lie together; a short group repeats its last query's.
struct Group<'a> {
    /// At most `GROUP`.
    queries: Vec<Query<'a>>,
    /// `[ceil(d / 2)]`: two values of each query.
    words: Vec<[i32; GROUP]>,
}

impl<'a> Group<'a> {
    fn new(queries: &'a Embeddings, rows: Range<usize>, k: usize, skip_same_row: bool) -> Self {
        let last = rows.end - 1;
        let of_group: [&[f32]; GROUP] =
            std::array::from_fn(|query| queries.row((rows.start + query).min(last)));
        let words = (0..queries.dim).step_by(2).map(|column| {
            of_group.map(|row| {
                let [low, high] = [row[column], row.get(column + 1).copied().unwrap_or(0.0)].map(in_steps);
                i32::from(high) << 16 | i32::from(low) & 0xffff
            })
        });
        let query = |row| Query {
            shortlist: Shortlist::new(queries.row(row), k, skip_same_row.then_some(row), GATHERED),
            margin: margin(queries.dim),
            bar: i32::MIN,
        };
        Self { words: words.collect(), queries: rows.map(query).collect() }
    }
}

struct Query<'a> {
    shortlist: Shortlist<'a>,
    margin: f64,
    /// What a sum must surpass.
    bar: i32,
}

impl Query<'_> {
    /// `sums`: of the products of this query's values and those of the panel's rows.
    #[target_feature(enable = "avx2")]
    fn offer(&mut self, panel: &Panel, sums: &[__m256i; REGISTERS]) {
        let bar = _mm256_set1_epi32(self.bar);
        for (register, &sum) in sums.iter().enumerate() {
            let promising = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(sum, bar)));
            if promising != 0 {
                self.add(panel.rows.start + register * WIDTH..panel.rows.end, promising, &store(sum));
            }
        }
    }

    /// Adds those of a register's rows whose bits are set.
    #[inline(never)]
    fn add(&mut self, rows: Range<usize>, promising: i32, sums: &[i32; WIDTH]) {
        let square = f64::from(STEPS) * f64::from(STEPS);
        for (lane, (row, &sum)) in rows.zip(sums).enumerate() {
            if promising >> lane & 1 == 1 {
                let [upper, lower] =
                    [self.margin, -self.margin].map(|margin| ((f64::from(sum) + margin) / square) as f32);
                self.shortlist.add(upper, lower, row as i32);
            }
        }
        if self.shortlist.make_room() {
            // Rounds down.
            self.bar = (f64::from(self.shortlist.bar) * square - self.margin).floor() as i32;
        }
    }
}

#[target_feature(enable = "avx2")]
fn screen(mut groups: Vec<Group>, panels: &[Panel], bank: &Embeddings) -> Vec<Vec<Neighbour>> {
    for panel in panels {
        for Group { queries, words } in &mut groups {
            let sums = products(words, &panel.values);
            for (query, sums) in queries.iter_mut().zip(&sums) {
                query.offer(panel, sums);
            }
        }
    }
    let queries = groups.into_iter().flat_map(|group| group.queries);
    queries.map(|query| query.shortlist.decide(bank)).collect()
}

/// Sums of products of each query's values and each row's.
#[target_feature(enable = "avx2")]
fn products(
    queries: &[[i32; GROUP]],
    rows: &[[[[i16; 2]; WIDTH]; REGISTERS]],
) -> [[__m256i; REGISTERS]; GROUP] {
    let mut sums = [[_mm256_setzero_si256(); REGISTERS]; GROUP];
    for (words, rows) in queries.iter().zip(rows) {
        let rows: [__m256i; REGISTERS] = std::array::from_fn(|register| load(&rows[register]));
        for (sums, &word) in sums.iter_mut().zip(words) {
            let values = _mm256_set1_epi32(word);
            for (sum, rows) in sums.iter_mut().zip(&rows) {
                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(values, *rows));
            }
        }
    }
    sums
}

#[target_feature(enable = "avx2")]
fn load(values: &[[i16; 2]; WIDTH]) -> __m256i {
    // SAFETY: the array has the register's 32 bytes, and the load asks for no alignment.
    unsafe { _mm256_loadu_si256(values.as_ptr().cast()) }
}

#[target_feature(enable = "avx2")]
fn store(register: __m256i) -> [i32; WIDTH] {
    let mut stored = [0; WIDTH];
    // SAFETY: the array has the register's 32 bytes, and the store asks for no alignment.
    unsafe { _mm256_storeu_si256(stored.as_mut_ptr().cast(), register) };
    stored
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All values are rounded by nearly half a step in one direction: the margin must hold that, and little more.
    #[test]
    fn the_margin_is_what_rounding_can_take() {
        let dim = 2000_usize;
        let value = 1.0 / (dim as f32).sqrt();
        let rounded = f64::from(in_steps(value));
        let sum = dim as f64 * rounded * rounded;
        let similarity = dim as f64 * f64::from(value).powi(2);
        let difference = (sum - similarity * f64::from(STEPS).powi(2)).abs();
        assert!(difference < margin(dim), "{difference} {}", margin(dim));
        assert!(difference > 0.8 * margin(dim), "{difference} {}", margin(dim));
    }
}
