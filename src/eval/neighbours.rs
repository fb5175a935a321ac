//! Nearest neighbours by cosine similarity, exact: blocks of queries against the whole bank.
//!
//! Rows are independent and blocks have a fixed size, so the result is the same for any number of threads.

use rayon::prelude::*;

use super::Embeddings;
use super::linalg::{View, product};

/// Queries compared at a time: larger uses more memory (`BLOCK * bank` f32 a thread), smaller packs the bank more often.
const BLOCK: usize = 128;

/// A bank row and its cosine similarity to the query.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Neighbour {
    pub(super) row: usize,
    pub(super) similarity: f32,
}

/// For each query the `k` most similar bank rows, most similar first, equal ones by row. `k` is capped at the
/// bank's size. Both sides must be L2-normalised. With `skip_same_row`, bank row i is no neighbour of query i.
pub(super) fn nearest(
    queries: &Embeddings,
    bank: &Embeddings,
    k: usize,
    skip_same_row: bool,
) -> Vec<Vec<Neighbour>> {
    assert_eq!(queries.dim, bank.dim, "one space");
    let block_values = BLOCK * queries.dim.max(1);
    let blocks: Vec<Vec<Vec<Neighbour>>> = queries
        .data
        .par_chunks(block_values)
        .enumerate()
        .map(|(number, block)| {
            let rows = block.len() / queries.dim.max(1);
            let similarities =
                product(View::new(block, rows, queries.dim), View::new(&bank.data, bank.rows, bank.dim).t());
            (0..rows)
                .map(|row| {
                    let skip = skip_same_row.then_some(number * BLOCK + row);
                    top(&similarities[row * bank.rows..(row + 1) * bank.rows], k, skip)
                })
                .collect()
        })
        .collect();
    blocks.into_iter().flatten().collect()
}

fn top(similarities: &[f32], k: usize, skip: Option<usize>) -> Vec<Neighbour> {
    let mut all: Vec<Neighbour> = similarities
        .iter()
        .enumerate()
        .filter(|(row, _)| Some(*row) != skip)
        .map(|(row, &similarity)| Neighbour { row, similarity })
        .collect();
    let order = |a: &Neighbour, b: &Neighbour| b.similarity.total_cmp(&a.similarity).then(a.row.cmp(&b.row));
    if k < all.len() {
        all.select_nth_unstable_by(k, order);
        all.truncate(k);
    }
    all.sort_by(order);
    all
}

#[cfg(test)]
mod tests {
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
}
