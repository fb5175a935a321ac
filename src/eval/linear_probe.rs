//! The linear and the few-shot probe: multinomial logistic regression on standardised features.
//!
//! Full-batch L-BFGS from zero, so there is no seed, no learning rate and no order of rows to tune; the objective
//! is convex and the answer is its minimum. The regularisation is scikit-learn's default
//! (`LogisticRegression(C=1)`): mean cross-entropy + |W|^2 / (2 n), biases free.
//!
//! Fast because features, logits and each block's gradient are f32 (an error of some 1e-8 of a gradient that is followed
//! down to 1e-5), features lie as each product reads them (`objective`), and the preconditioner (`lbfgs`) saves two
//! thirds of the evaluations. Weights, sums over blocks and L-BFGS's own state are f64.

mod lbfgs;
mod objective;

use std::collections::BTreeMap;

use rayon::prelude::*;

use super::Embeddings;
use super::linalg::Standardiser;
use super::random::hash;
use super::split::Split;
use objective::Problem;

/// Examples of each label in a few-shot draw.
pub const SHOTS: usize = 10;

/// Draws whose accuracies are averaged: one draw of few examples varies by points.
const DRAWS: u64 = 5;

/// Share of the queries that a classifier fitted on the whole bank answers with their label, 0..1.
/// `embeddings` `[n, d]`, one label a row.
///
/// # Panics
/// If the bank or the queries are empty or name rows that don't exist, or a value is not finite.
pub fn linear(embeddings: &Embeddings, labels: &[u32], split: &Split) -> f64 {
    probe(embeddings, labels, &split.bank, &split.queries)
}

/// As [`linear`], fitted on [`SHOTS`] bank rows of each label (all of a label that has fewer), averaged over five
/// draws that depend on the row numbers alone.
pub fn few_shot(embeddings: &Embeddings, labels: &[u32], split: &Split) -> f64 {
    let draws = (0..DRAWS).into_par_iter().map(|draw| {
        let bank = draw_shots(labels, &split.bank, draw);
        probe(embeddings, labels, &bank, &split.queries)
    });
    draws.collect::<Vec<f64>>().iter().sum::<f64>() / DRAWS as f64
}

fn draw_shots(labels: &[u32], bank: &[usize], draw: u64) -> Vec<usize> {
    let mut by_label = BTreeMap::<u32, Vec<usize>>::new();
    bank.iter().for_each(|&row| by_label.entry(labels[row]).or_default().push(row));
    let mut drawn = Vec::new();
    for rows in by_label.values_mut() {
        rows.sort_by_key(|row| (hash(draw, &row.to_le_bytes()), *row));
        drawn.extend(rows.iter().take(SHOTS));
    }
    drawn.sort_unstable();
    drawn
}

fn probe(embeddings: &Embeddings, labels: &[u32], bank: &[usize], queries: &[usize]) -> f64 {
    assert!(!bank.is_empty() && !queries.is_empty());
    let mut classes: Vec<u32> = bank.iter().map(|&row| labels[row]).collect();
    classes.sort_unstable();
    classes.dedup();
    // A label that is not in the bank is no class: its queries are answered wrongly.
    let class_of = |row: usize| classes.binary_search(&labels[row]).ok();
    let x = embeddings.select(bank);
    let standardiser = Standardiser::fit(&x);
    let targets = bank.iter().filter_map(|&row| class_of(row)).collect();
    let problem = Problem::new(&x, &standardiser, targets, classes.len(), 1.0 / bank.len() as f64);
    let answers =
        problem.classify(&lbfgs::minimise(&problem), &standardiser.apply(&embeddings.select(queries)));
    let hits =
        answers.iter().zip(queries).filter(|(answer, query)| class_of(**query) == Some(**answer)).count();
    hits as f64 / queries.len() as f64
}

#[cfg(test)]
mod tests;
