//! The bank rows that may be neighbours of a query, by bounds of their similarities, and the choice among them.

use std::ops::Range;

use rayon::prelude::*;

use super::Neighbour;
use crate::eval::Embeddings;

/// Values that are folded at once, and the most that one call of [`Shortlist::push`] adds.
pub(super) const LANES: usize = 16;

/// Rows that may be added between two calls of [`Shortlist::make_room`].
pub(super) const ROOM: usize = 64;

/// Rows are numbered in 32 bits, those of the last panel that don't exist too.
const MAX_ROWS: usize = i32::MAX as usize - ROOM;

/// Of wider rows f32 could round off more than `SLACK`.
const MAX_DIM: usize = 1 << 12;

/// More than what f32 rounds off a similarity and its bounds: in the worst case 2.1e-5, of `MAX_DIM` values in `LANES` sums.
pub(super) const SLACK: f32 = 4e-5;

/// Adding it to a small number rounds that to an integer, which then stands in the lowest bits.
pub(super) const ROUNDER: f32 = 12_582_912.0; // 1.5 * 2^23

/// The bank as a search reads it, `rows` to a panel; `None` if its rows are too wide or too many.
pub(super) fn panels<P: Send>(
    bank: &Embeddings,
    rows: usize,
    panel: impl Fn(&Embeddings, Range<usize>) -> P + Sync,
) -> Option<Vec<P>> {
    if bank.dim == 0 || bank.dim > MAX_DIM || bank.rows > MAX_ROWS {
        return None;
    }
    debug_assert!(
        (0..bank.rows)
            .all(|row| lanes(bank.row(row), bank.row(row), |sum, a, b| sum + a * b).iter().sum::<f32>()
                < 1.001),
        "rows of length 1"
    );
    let starts = (0..bank.rows).into_par_iter().step_by(rows);
    Some(starts.map(|start| panel(bank, start..(start + rows).min(bank.rows))).collect())
}

/// Rows that may be neighbours of one query and the bounds of their similarities, the first `len` of each list. The lists
/// are longer, so that whole registers can be stored.
pub(super) struct Shortlist<'a> {
    row: &'a [f32],
    k: usize,
    /// No neighbour.
    skip: Option<usize>,
    /// The k-th largest lower bound at the last pruning (the next one, where a row is no neighbour), or minus infinity: a row
    /// whose upper bound is not above it need not be added.
    pub(super) bar: f32,
    upper: Vec<f32>,
    lower: Vec<f32>,
    rows: Vec<i32>,
    len: usize,
    /// Candidates that gather at least before they are pruned.
    least: usize,
    /// How many gather before the next pruning.
    limit: usize,
}

impl<'a> Shortlist<'a> {
    /// For the `k` nearest rows of `row`, row `skip` not among them. At least `least` candidates gather before they are pruned:
    /// fewer prune more often, more leave the bar low for longer.
    pub(super) fn new(row: &'a [f32], k: usize, skip: Option<usize>, least: usize) -> Self {
        let room = least + ROOM;
        Self {
            row,
            k,
            skip,
            bar: f32::NEG_INFINITY,
            upper: vec![0.0; room],
            lower: vec![0.0; room],
            rows: vec![0; room],
            len: 0,
            least,
            limit: least,
        }
    }

    /// Adds the first `count` of these rows.
    #[inline(always)]
    pub(super) fn push(
        &mut self,
        upper: &[f32; LANES],
        lower: &[f32; LANES],
        rows: &[i32; LANES],
        count: usize,
    ) {
        let places = self.len..self.len + LANES;
        self.upper[places.clone()].copy_from_slice(upper);
        self.lower[places.clone()].copy_from_slice(lower);
        self.rows[places].copy_from_slice(rows);
        self.len += count;
    }

    /// Adds one row.
    #[inline(always)]
    pub(super) fn add(&mut self, upper: f32, lower: f32, row: i32) {
        (self.upper[self.len], self.lower[self.len], self.rows[self.len]) = (upper, lower, row);
        self.len += 1;
    }

    /// Makes sure that `ROOM` rows can be added; true if the bar may have risen.
    #[inline(always)]
    pub(super) fn make_room(&mut self) -> bool {
        let full = self.len >= self.limit;
        if full {
            self.prune();
        }
        full
    }

    /// Raises the bar to what the candidates say and drops those that are below it.
    #[inline(never)]
    fn prune(&mut self) {
        // A row that is no neighbour may be among the best.
        let others = self.k - 1 + usize::from(self.skip.is_some());
        if self.len > others {
            let mut lower = self.lower[..self.len].to_vec();
            self.bar = *lower.select_nth_unstable_by(others, |a, b| b.total_cmp(a)).1;
            self.retain_above_bar();
        }
        self.limit = self.least.max(2 * self.len);
        let room = (self.limit + ROOM).max(self.rows.len());
        self.upper.resize(room, 0.0);
        self.lower.resize(room, 0.0);
        self.rows.resize(room, 0);
    }

    fn retain_above_bar(&mut self) {
        let mut kept = 0;
        for from in 0..self.len {
            let upper = self.upper[from];
            (self.upper[kept], self.lower[kept], self.rows[kept]) =
                (upper, self.lower[from], self.rows[from]);
            kept += usize::from(upper > self.bar);
        }
        self.len = kept;
    }

    /// The neighbours among the candidates: these are compared from the most promising on, until no other can be one.
    /// Inlined, so that it is compiled for its caller's instructions.
    #[inline(always)]
    pub(super) fn decide(mut self, bank: &Embeddings) -> Vec<Neighbour> {
        self.prune();
        let candidates = self.upper[..self.len].iter().zip(&self.rows);
        let mut candidates: Vec<(f32, usize)> =
            candidates.map(|(upper, row)| (*upper, *row as usize)).collect();
        candidates.retain(|(_, row)| Some(*row) != self.skip);
        candidates.sort_unstable_by(|a, b| b.0.total_cmp(&a.0));
        let (mut found, mut bar) = (Vec::<Neighbour>::new(), f32::NEG_INFINITY);
        let descending =
            |a: &Neighbour, b: &Neighbour| b.similarity.total_cmp(&a.similarity).then(a.row.cmp(&b.row));
        for (index, &(upper, row)) in candidates.iter().enumerate() {
            if upper <= bar {
                break;
            }
            if let Some((_, next)) = candidates.get(index + 2) {
                prefetch(bank.row(*next));
            }
            let products = lanes(self.row, bank.row(row), |sum, a, b| sum + a * b);
            let neighbour = Neighbour { row, similarity: products.into_iter().sum() };
            let place = found.partition_point(|other| descending(other, &neighbour).is_lt());
            found.insert(place, neighbour);
            found.truncate(self.k);
            if found.len() == self.k {
                bar = found[self.k - 1].similarity;
            }
        }
        found
    }
}

/// Asks for a row that will be read soon.
#[inline(always)]
fn prefetch(row: &[f32]) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};

    for line in row.chunks(LANES) {
        // SAFETY: a hint, which reads nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
    }
}

/// Folds the pairs of `a` and `b` in sixteen lanes, from 0.
#[inline(always)]
pub(super) fn lanes(a: &[f32], b: &[f32], fold: impl Fn(f32, f32, f32) -> f32) -> [f32; LANES] {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut folded = [0.0; LANES];
    for (a, b) in a.iter().zip(b) {
        for lane in 0..LANES {
            folded[lane] = fold(folded[lane], a[lane], b[lane]);
        }
    }
    for ((folded, a), b) in folded.iter_mut().zip(a_rest).zip(b_rest) {
        *folded = fold(*folded, *a, *b);
    }
    folded
}
