//! What is measured: each row's inputs, our side of it, and its peers with what is asked for.
//!
//! Both sides of a row read the same folder, which [`Row::prepare`] has written: plan.json with the sizes, and
//! weights, images or frames.

mod data;
mod embed;
mod evaluate;
pub mod files;
mod gemm;
mod training;

use std::path::Path;

use anyhow::{Context, Result};

use crate::learning::run::ForgettingRun;

/// Our side as users get it.
pub const OURS: &str = "palimpsest";

/// Our side with f32 products, where the other chooses for itself.
pub const OURS_F32: &str = "palimpsest f32";

/// The row that says what the machine can do: part of every training row.
pub const GEMM: &str = "gemm";

/// One row of the tables.
pub trait Row {
    fn name(&self) -> &'static str;

    /// What a reader is told of it.
    fn title(&self) -> String;

    /// The module of benches/peers that is the other side.
    fn peer_kind(&self) -> &'static str;

    fn comparisons(&self) -> Vec<Comparison>;

    /// Repetitions before the first that counts.
    fn warm_up(&self) -> usize {
        0
    }

    fn units(&self) -> Units {
        Units { count: 1, name: "run", as_rate: false }
    }

    /// Operations of one repetition, where the row is compared with the machine's peak.
    fn flops(&self) -> Option<f64> {
        None
    }

    /// Writes what both sides read. `small`: sizes for a trial instead of a measurement.
    fn prepare(&self, folder: &Path, small: bool) -> Result<()>;

    /// Our sides, by name; [`OURS`] first.
    fn ours(&self) -> &'static [&'static str] {
        &[OURS]
    }

    /// Our side of that name, ready for its first repetition.
    fn start(&self, folder: &Path, ours: &str) -> Result<Box<dyn Work>>;

    /// What must hold of our side's numbers whatever the peers say.
    fn verify(&self, check: &[f64]) -> Result<()>;
}

/// One side at work.
pub trait Work {
    fn repeat(&mut self) -> Result<()>;

    /// What the peers must agree on.
    fn check(&self) -> Vec<f64>;

    /// What a reader is told of this side besides its name.
    fn details(&self) -> String {
        String::new()
    }
}

/// A repetition does `count` times what `name` says.
#[derive(Clone, Copy)]
pub struct Units {
    pub count: usize,
    pub name: &'static str,
    /// Whether a reader is told how many a second instead of how long one takes.
    pub as_rate: bool,
}

/// Our time over the peer's: the most that is accepted, and what is aimed at; `None` where nothing is asked for.
pub type Targets = Option<(f64, f64)>;

/// Our side against the fastest of some variants of a peer.
pub struct Comparison {
    pub ours: &'static str,
    pub against: &'static str,
    pub variants: &'static [&'static str],
    pub targets: Targets,
    /// Largest difference of the numbers that both sides must agree on, absolute and relative.
    pub tolerance: f64,
    /// Whose numbers they are.
    pub checked: &'static str,
    /// Left out on a processor without instructions for bf16, where PyTorch takes many times its time in f32.
    pub needs_bf16: bool,
}

/// Every row of the tables, in their order.
pub fn all() -> Vec<Box<dyn Row>> {
    let mut rows = training::rows();
    rows.push(Box::new(data::Data));
    rows.extend(embed::rows());
    rows.push(Box::new(evaluate::Evaluate));
    rows
}

/// Rows that have a page of their own.
pub fn apart() -> Vec<Box<dyn Row>> {
    vec![Box::new(ForgettingRun)]
}

/// Rows that need a CUDA device.
pub fn gpu() -> Vec<Box<dyn Row>> {
    training::gpu_rows()
}

/// The rows of the given names, or all of the processor's (the GPU's) if there is none.
pub fn select(names: &[String], on_gpu: bool) -> Result<Vec<Box<dyn Row>>> {
    match names {
        [] if on_gpu => Ok(gpu()),
        [] => Ok(all()),
        names => names.iter().map(|name| find(name)).collect(),
    }
}

pub fn find(name: &str) -> Result<Box<dyn Row>> {
    let gemm: Box<dyn Row> = Box::new(gemm::Gemm);
    let mut rows = all().into_iter().chain(gpu()).chain(apart()).chain([gemm]);
    rows.find(|row| row.name() == name).with_context(|| {
        let names: Vec<_> = all().iter().chain(&gpu()).map(|row| row.name()).collect();
        format!("no row {name:?}: there are {}", names.join(", "))
    })
}
