//! Nearest neighbours by cosine similarity, exact: blocks of queries against tiles of the bank.
//!
//! Rows are independent and blocks have a fixed size, so the result is the same for any number of threads.
//! Fast because a tile's similarities are read while they lie in the cache, and all but the few that beat the k-th
//! best so far are passed over in groups; where the machine can, `int8` or `int16` look at rounded rows first.

#[cfg(target_arch = "x86_64")]
mod int16;
#[cfg(target_arch = "x86_64")]
mod int8;
#[cfg(target_arch = "x86_64")]
mod shortlist;

use std::ops::Range;

use rayon::prelude::*;

use super::Embeddings;
use super::linalg::{View, product_into};

/// Queries compared at a time: larger leaves cores idle on small sets, smaller packs the bank more often.
const BLOCK: usize = 512;

/// Bank rows compared at a time: `BLOCK * TILE` f32 fit a core's second-level cache of 1 MiB.
const TILE: usize = 256;

/// Similarities that are tested against the k-th best at once.
const LANES: usize = 32;

/// A bank row and its cosine similarity to the query.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Neighbour {
    pub(super) row: usize,
    pub(super) similarity: f32,
}

/// For each query the `k` most similar bank rows, most similar first, equal ones by row. `k` is capped at the
/// bank's size. Both sides must be finite and L2-normalised. With `skip_same_row`, bank row i is no neighbour of query i.
pub(super) fn nearest(
    queries: &Embeddings,
    bank: &Embeddings,
    k: usize,
    skip_same_row: bool,
) -> Vec<Vec<Neighbour>> {
    assert_eq!(queries.dim, bank.dim, "one space");
    assert!(k > 0);
    #[cfg(target_arch = "x86_64")]
    {
        if let Some(found) = int8::nearest(queries, bank, k, skip_same_row) {
            return found;
        }
        // Products of f32 are as fast where registers are wider than AVX2's.
        if !is_x86_feature_detected!("avx512f")
            && let Some(found) = int16::nearest(queries, bank, k, skip_same_row)
        {
            return found;
        }
    }
    by_products(queries, bank, k, skip_same_row)
}

/// The search in f32 throughout.
fn by_products(
    queries: &Embeddings,
    bank: &Embeddings,
    k: usize,
    skip_same_row: bool,
) -> Vec<Vec<Neighbour>> {
    let all = View::new(&queries.data, queries.rows, queries.dim);
    let bank = View::new(&bank.data, bank.rows, bank.dim);
    in_blocks(queries.rows, BLOCK, |rows| {
        let found = rows.clone().map(|row| Nearest::new(k, skip_same_row.then_some(row))).collect();
        let found = search(all.row_range(rows), bank, found);
        found.into_iter().map(|nearest| nearest.found).collect()
    })
}

/// What `search` finds for all of `queries` rows, `block` of them at a time.
fn in_blocks(
    queries: usize,
    block: usize,
    search: impl Fn(Range<usize>) -> Vec<Vec<Neighbour>> + Sync,
) -> Vec<Vec<Neighbour>> {
    let blocks = (0..queries.div_ceil(block)).into_par_iter();
    let found = blocks.map(|index| search(index * block..((index + 1) * block).min(queries)));
    found.collect::<Vec<_>>().into_iter().flatten().collect()
}

fn search(queries: View<f32>, bank: View<f32>, mut found: Vec<Nearest>) -> Vec<Nearest> {
    let mut similarities = vec![0.0; found.len() * TILE];
    for start in (0..bank.rows()).step_by(TILE) {
        let tile = start..(start + TILE).min(bank.rows());
        let similarities = &mut similarities[..found.len() * tile.len()];
        product_into(similarities, queries, bank.row_range(tile.clone()).t());
        for (nearest, similarities) in found.iter_mut().zip(similarities.chunks_exact(tile.len())) {
            nearest.offer_all(start, similarities);
        }
    }
    found
}

/// The best of the bank rows that one query has been compared with, which come in ascending order.
struct Nearest {
    k: usize,
    skip: Option<usize>,
    /// Most similar first, at most `k`.
    found: Vec<Neighbour>,
    /// What a row must surpass: the similarity of the k-th, or minus infinity while there are fewer.
    bar: f32,
}

impl Nearest {
    fn new(k: usize, skip: Option<usize>) -> Self {
        Self { k, skip, found: Vec::new(), bar: f32::NEG_INFINITY }
    }

    fn offer_all(&mut self, first_row: usize, similarities: &[f32]) {
        let (chunks, rest) = similarities.as_chunks::<LANES>();
        for (row, chunk) in (first_row..).step_by(LANES).zip(chunks) {
            // Counted, not searched: without an early exit whole registers are compared.
            let bar = self.bar;
            if chunk.iter().map(|&similarity| u32::from(similarity > bar)).sum::<u32>() > 0 {
                self.offer_each(row, chunk);
            }
        }
        self.offer_each(first_row + chunks.as_flattened().len(), rest);
    }

    fn offer_each(&mut self, first_row: usize, similarities: &[f32]) {
        for (row, &similarity) in (first_row..).zip(similarities) {
            if similarity > self.bar && Some(row) != self.skip {
                self.insert(Neighbour { row, similarity });
            }
        }
    }

    fn insert(&mut self, new: Neighbour) {
        // After its equals: they have smaller rows.
        let place = self.found.partition_point(|other| other.similarity >= new.similarity);
        self.found.truncate(self.k - 1);
        self.found.insert(place, new);
        if self.found.len() == self.k {
            self.bar = self.found[self.k - 1].similarity;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn neighbours_come_by_similarity_then_by_row() {
        let bank = Embeddings::new(4, 2, vec![1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.6, 0.8]);
        let query = Embeddings::new(1, 2, vec![1.0, 0.0]);
        let rows =
            |k, skip| -> Vec<usize> { nearest(&query, &bank, k, skip)[0].iter().map(|n| n.row).collect() };
        assert_eq!(rows(3, false), [0, 2, 3]);
        assert_eq!(rows(9, false), [0, 2, 3, 1]);
        assert_eq!(rows(2, true), [2, 3]);
    }

    #[test]
    fn blocks_of_queries_keep_their_order() {
        let n = 2 * BLOCK + 5;
        let points: Vec<f32> = (0..n)
            .flat_map(|i| {
                let angle = i as f32 / n as f32;
                [angle.cos(), angle.sin()]
            })
            .collect();
        let points = Embeddings::new(n, 2, points);
        for (row, found) in nearest(&points, &points, 1, false).iter().enumerate() {
            assert_eq!(found[0].row, row);
        }
    }

    /// Clusters whose members resemble each other more than 8 or 16 bits can tell, rows of zeros, and sizes that fill no panel.
    #[test]
    fn every_search_finds_the_same_neighbours() {
        for (rows, dim, k, spread) in
            [(700, 70, 20, 1.0), (333, 3, 5, 0.001), (90, 33, 100, 0.3), (65, 4, 64, 0.0), (20, 1, 3, 1.0)]
        {
            let value = |i: usize| {
                let (row, column) = (i / dim, i % dim);
                let centre = ((row % 5 * 31 + column * 7) as f32).sin();
                if row == 7 { 0.0 } else { centre + spread * ((i * i % 1009) as f32 * 1.7).sin() }
            };
            let points = Embeddings::new(rows, dim, (0..rows * dim).map(value).collect()).into_normalised();
            let some = points.select(&(0..rows - 9).collect::<Vec<_>>());
            for (queries, skip) in [(&points, false), (&points, true), (&some, false)] {
                let case = format!("{rows} x {dim}, {} queries, {skip}", queries.rows);
                let expected = by_products(queries, &points, k, skip);
                #[cfg(target_arch = "x86_64")]
                for (search, found) in [
                    ("int8", int8::nearest(queries, &points, k, skip)),
                    ("int16", int16::nearest(queries, &points, k, skip)),
                ] {
                    // None where the machine lacks the instructions.
                    if let Some(found) = found {
                        assert_same(&format!("{search}, {case}"), &found, &expected);
                    }
                }
                assert_same(&case, &nearest(queries, &points, k, skip), &expected);
                let itself =
                    |(query, found): (usize, &Vec<Neighbour>)| found.iter().any(|one| one.row == query);
                assert!(!skip || !expected.iter().enumerate().any(itself), "{case}");
            }
        }
    }

    fn assert_same(case: &str, found: &[Vec<Neighbour>], expected: &[Vec<Neighbour>]) {
        assert_eq!(found.len(), expected.len(), "{case}");
        for (query, (found, expected)) in found.iter().zip(expected).enumerate() {
            let rows = |found: &[Neighbour]| found.iter().map(|one| one.row).collect::<BTreeSet<usize>>();
            assert_eq!((found.len(), rows(found).len()), (expected.len(), expected.len()), "{case}, {query}");
            // Products are summed in another order: rows whose similarities agree to rounding may change places.
            for (found, expected) in found.iter().zip(expected) {
                assert!((found.similarity - expected.similarity).abs() < 1e-6, "{case}, {query}");
            }
        }
    }
}
