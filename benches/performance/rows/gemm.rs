//! The machine's peak: plain f32 matrix products of the gemm crate, which candle calls.

use std::path::Path;

use anyhow::{Result, ensure};
use candle_core::{Device, Tensor};

use super::{Comparison, GEMM, Row, Units, Work, files};

/// Rows, columns and depth of the products of a repetition: one that fits the caches, one that does not.
const SHAPES: [[usize; 3]; 2] = [[1024, 1024, 1024], [4096, 1024, 1024]];

pub struct Gemm;

struct Products(Vec<(Tensor, Tensor)>);

impl Row for Gemm {
    fn name(&self) -> &'static str {
        GEMM
    }

    fn title(&self) -> String {
        "plain f32 matrix products".to_owned()
    }

    fn peer_kind(&self) -> &'static str {
        "none"
    }

    fn comparisons(&self) -> Vec<Comparison> {
        Vec::new()
    }

    fn warm_up(&self) -> usize {
        2
    }

    fn units(&self) -> Units {
        Units { count: 1, name: "pass", as_rate: false }
    }

    fn flops(&self) -> Option<f64> {
        Some(SHAPES.iter().map(|[m, n, k]| 2.0 * (m * n * k) as f64).sum())
    }

    fn prepare(&self, _folder: &Path, _small: bool) -> Result<()> {
        Ok(())
    }

    fn start(&self, _folder: &Path, _: &str) -> Result<Box<dyn Work>> {
        let operand = |rows: usize, columns: usize| {
            Tensor::from_vec(files::noise(1, rows * columns), (rows, columns), &Device::Cpu)
        };
        let pair = |[m, n, k]: [usize; 3]| Ok((operand(m, k)?, operand(k, n)?));
        Ok(Box::new(Products(SHAPES.into_iter().map(pair).collect::<Result<_>>()?)))
    }

    fn verify(&self, check: &[f64]) -> Result<()> {
        ensure!(check.is_empty(), "the products have nothing to agree on");
        Ok(())
    }
}

impl Work for Products {
    fn repeat(&mut self) -> Result<()> {
        for (left, right) in &self.0 {
            left.matmul(right)?;
        }
        Ok(())
    }

    fn check(&self) -> Vec<f64> {
        Vec::new()
    }
}
