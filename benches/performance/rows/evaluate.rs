//! kNN probe, linear probe and linear CKA of 10,000 embeddings of 384 dimensions.
//!
//! The embeddings are clusters in noise; the second space is a mix of the first one with noise of its own.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Result, ensure};
use candle_core::{Device, Tensor};
use palimpsest::eval::split::Split;
use palimpsest::eval::{Embeddings, drift, knn, linear_probe};
use serde::{Deserialize, Serialize};

use super::{Comparison, OURS, Row, Work, files};

const ROWS: usize = 10_000;
const SMALL_ROWS: usize = 1_000;
const DIM: usize = 384;
const CLASSES: usize = 20;
/// Length of a cluster's centre in units of the noise a dimension: about one query in ten is answered wrongly.
const SEPARATION: f32 = 0.22;
const SEED: u64 = 7;

pub struct Evaluate;

#[derive(Serialize, Deserialize)]
struct Plan {
    /// Rows that probes are fitted on; the others are asked.
    bank: usize,
    k: usize,
    warm_up: usize,
}

impl Row for Evaluate {
    fn name(&self) -> &'static str {
        "evaluate"
    }

    fn title(&self) -> String {
        "kNN + linear probe + linear CKA of 10,000 x 384".to_owned()
    }

    fn peer_kind(&self) -> &'static str {
        "evaluate"
    }

    fn comparisons(&self) -> Vec<Comparison> {
        vec![Comparison {
            ours: OURS,
            against: "scikit-learn and NumPy",
            variants: &["f32", "f64"],
            targets: Some((0.5, 0.2)),
            // Accuracies on 2,000 queries: a few lie on a boundary.
            tolerance: 5e-3,
            checked: OURS,
            needs_bf16: false,
        }]
    }

    fn prepare(&self, folder: &Path, small: bool) -> Result<()> {
        let rows = if small { SMALL_ROWS } else { ROWS };
        let k = files::default(&files::defaults()?, "probe", "k")?;
        let matrix = |values: Vec<f32>| Tensor::from_vec(values, (rows, DIM), &Device::Cpu);
        let x = clusters(rows);
        let noise = files::noise(SEED + 2, rows * DIM);
        let y = x.iter().zip(&noise).map(|(x, noise)| 0.8 * x + 0.6 * noise).collect();
        let labels: Vec<i64> = (0..rows).map(|row| (row % CLASSES) as i64).collect();
        let labels = Tensor::from_vec(labels, rows, &Device::Cpu)?;
        let tensors = HashMap::from([("x", matrix(x)?), ("y", matrix(y)?), ("labels", labels)]);
        files::write_tensors(folder, "embeddings.safetensors", tensors)?;
        files::write_plan(folder, &Plan { bank: rows / 5 * 4, k, warm_up: self.warm_up() })
    }

    fn start(&self, folder: &Path, _: &str) -> Result<Box<dyn Work>> {
        let plan: Plan = files::read_plan(folder)?;
        let tensor = |name| files::read_tensor(folder, "embeddings.safetensors", name);
        let embeddings = |name| -> Result<Embeddings> {
            let (rows, dim) = tensor(name)?.dims2()?;
            Ok(Embeddings::new(rows, dim, tensor(name)?.flatten_all()?.to_vec1()?))
        };
        let labels: Vec<i64> = tensor("labels")?.to_vec1()?;
        let rows = labels.len();
        let mut measures = Measures {
            x: embeddings("x")?,
            y: embeddings("y")?,
            labels: labels.into_iter().map(u32::try_from).collect::<Result<_, _>>()?,
            split: Split { bank: (0..plan.bank).collect(), queries: (plan.bank..rows).collect() },
            k: plan.k,
            check: Vec::new(),
        };
        measures.repeat()?;
        Ok(Box::new(measures))
    }

    fn verify(&self, scores: &[f64]) -> Result<()> {
        let chance = 1.0 / CLASSES as f64;
        let above = |score: &f64| (2.0 * chance..=1.0).contains(score);
        ensure!(scores.len() == 3 && scores.iter().all(above), "no better than chance: {scores:?}");
        Ok(())
    }
}

/// `[rows, DIM]`: row r belongs to cluster r % CLASSES.
fn clusters(rows: usize) -> Vec<f32> {
    let centres = files::noise(SEED, CLASSES * DIM);
    let mut values = files::noise(SEED + 1, rows * DIM);
    for (row, values) in values.chunks_exact_mut(DIM).enumerate() {
        let centre = &centres[row % CLASSES * DIM..][..DIM];
        values.iter_mut().zip(centre).for_each(|(value, centre)| *value += SEPARATION * centre);
    }
    values
}

struct Measures {
    x: Embeddings,
    y: Embeddings,
    labels: Vec<u32>,
    split: Split,
    k: usize,
    check: Vec<f64>,
}

impl Work for Measures {
    fn repeat(&mut self) -> Result<()> {
        let neighbours = knn::knn(&self.x, &self.labels, &self.split, self.k).accuracy;
        let linear = linear_probe::linear(&self.x, &self.labels, &self.split);
        self.check = vec![neighbours, linear, drift::linear_cka(&self.x, &self.y)];
        Ok(())
    }

    fn check(&self) -> Vec<f64> {
        self.check.clone()
    }
}
