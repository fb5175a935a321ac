//! The k-nearest-neighbour probe.
//!
//! Votes are weighted by exp(similarity / 0.07) as in instance discrimination (Wu, Xiong, Yu, Lin, CVPR 2018,
//! equation 5 and section 3.4), cosine similarity, exact search. Equal similarities go by row, equal votes to
//! the smaller label: nothing depends on the order of a hash map or on threads.

use super::Embeddings;
use super::neighbours::{Neighbour, nearest};
use super::split::Split;

/// Temperature of the votes. Smaller approaches one nearest neighbour, larger a plain majority.
const VOTE_TEMPERATURE: f64 = 0.07;

/// What the probe found.
#[derive(Debug, Clone, PartialEq)]
pub struct Knn {
    /// Share of the queries answered with their own label, 0..1.
    pub accuracy: f64,
    /// For each of `split.queries`, in that order: whether it was.
    pub correct: Vec<bool>,
}

/// Classifies each query by its `k` nearest bank rows (all of them if the bank has fewer).
/// `embeddings` `[n, d]` need not be normalised; `labels` holds one for each row.
///
/// # Panics
/// If `k` is 0, the split has no queries or no bank, or a row it names does not exist.
pub fn knn(embeddings: &Embeddings, labels: &[u32], split: &Split, k: usize) -> Knn {
    assert!(k > 0 && !split.bank.is_empty() && !split.queries.is_empty());
    let bank = embeddings.select(&split.bank).into_normalised();
    let queries = embeddings.select(&split.queries).into_normalised();
    let correct: Vec<bool> = nearest(&queries, &bank, k, false)
        .iter()
        .zip(&split.queries)
        .map(|(neighbours, &query)| vote(neighbours, &split.bank, labels) == labels[query])
        .collect();
    let hits = correct.iter().filter(|&&hit| hit).count();
    Knn { accuracy: hits as f64 / correct.len() as f64, correct }
}

fn vote(neighbours: &[Neighbour], bank: &[usize], labels: &[u32]) -> u32 {
    let mut votes = std::collections::BTreeMap::<u32, f64>::new();
    for neighbour in neighbours {
        // Similarity is at most 1, so the weight is at most 1: no overflow.
        let weight = ((f64::from(neighbour.similarity) - 1.0) / VOTE_TEMPERATURE).exp();
        *votes.entry(labels[bank[neighbour.row]]).or_default() += weight;
    }
    let mut winner = (0, f64::NEG_INFINITY);
    for (label, weight) in votes {
        if weight > winner.1 {
            winner = (label, weight);
        }
    }
    winner.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(bank: &[usize], queries: &[usize]) -> Split {
        Split { bank: bank.to_vec(), queries: queries.to_vec() }
    }

    #[test]
    fn separable_clusters_are_told_apart_whatever_their_length() {
        let mut data = Vec::new();
        let mut labels = Vec::new();
        for i in 0..60_u32 {
            let angle = f64::from(i % 3) * 2.0 + f64::from(i) * 0.004;
            let length = 1.0 + f64::from(i);
            data.extend([(length * angle.cos()) as f32, (length * angle.sin()) as f32]);
            labels.push(i % 3);
        }
        let found = knn(
            &Embeddings::new(60, 2, data),
            &labels,
            &split(&(0..40).collect::<Vec<_>>(), &(40..60).collect::<Vec<_>>()),
            20,
        );
        assert_eq!(found.accuracy, 1.0);
        assert_eq!(found.correct.len(), 20);
    }

    #[test]
    fn one_near_neighbour_outweighs_two_far_ones() {
        let embeddings = Embeddings::new(4, 2, vec![1.0, 0.0, 0.8, 0.6, 0.8, -0.6, 1.0, 0.0]);
        // exp(1 / 0.07) against 2 exp(0.8 / 0.07): e^2.857 = 17.4 > 2.
        let near_wins = knn(&embeddings, &[7, 9, 9, 7], &split(&[0, 1, 2], &[3]), 3);
        assert_eq!(near_wins.correct, [true]);
    }

    #[test]
    fn equal_votes_go_to_the_smaller_label() {
        let embeddings = Embeddings::new(3, 2, vec![1.0, 0.0, 1.0, 0.0, 1.0, 0.0]);
        assert_eq!(knn(&embeddings, &[5, 4, 4], &split(&[0, 1], &[2]), 2).correct, [true]);
        assert_eq!(knn(&embeddings, &[4, 5, 5], &split(&[0, 1], &[2]), 2).correct, [false]);
    }

    #[test]
    fn identical_embeddings_score_at_chance() {
        let embeddings = Embeddings::new(40, 3, vec![0.5; 120]);
        let labels: Vec<u32> = (0..40).map(|i| i % 4).collect();
        let (bank, queries) = ((0..20).collect::<Vec<_>>(), (20..40).collect::<Vec<_>>());
        assert_eq!(knn(&embeddings, &labels, &split(&bank, &queries), 20).accuracy, 0.25);
    }
}
