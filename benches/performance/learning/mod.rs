//! Whole runs of learning instead of single steps: docs/learning_performance.md.
//!
//! [`run`] is one run of the forgetting benchmark against PyTorch's, [`precision`] the loss in two precisions, [`parity`] the
//! same steps here and in PyTorch. All learn
//! on a benchmark stream with the benchmark's settings ([`recipe`]), and put their part of the page in place
//! of the former one.

mod chart;
mod page;
mod parity;
mod precision;
pub mod recipe;
pub mod run;
mod spread;

use std::os::unix::fs::symlink;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use palimpsest::bench::stream::{Source, Stream};
use palimpsest::model::Architecture;

use crate::driver::{self, Effort};
use crate::machine::Machine;
use crate::options::Learning;
use crate::rows::Row;

/// Measures [`run::ForgettingRun`] in `rounds` rounds.
pub fn forgetting_run(learning: &Learning, rounds: usize, python: &Path) -> Result<()> {
    ensure!(rounds > 0, "--rounds must be at least 1");
    let (row, folder) = (run::ForgettingRun, tempfile::tempdir()?);
    symlink(
        learning.stream.canonicalize().with_context(|| no_stream(learning))?,
        folder.path().join(run::STREAM),
    )?;
    driver::prepare(&row, folder.path(), false)?;
    let result = driver::measure(&row, folder.path(), Effort { threads: recipe::THREADS, rounds, python })?;
    let comparison = row.comparisons().into_iter().next().context("the run has a peer")?;
    let text = page::forgetting_run(&Machine::inspect(false)?, &result, &comparison)?;
    page::replace(learning, "make bench-run", &text)
}

/// Trains `networks` (all if none is named) in both precisions with `seeds` seeds.
pub fn precision(
    learning: &Learning,
    networks: &[Architecture],
    (seeds, steps): (u64, u64),
    threads: usize,
) -> Result<()> {
    // First of all, while there is one thread.
    palimpsest::train::runtime::prepare(threads)?;
    let periods =
        Stream::read(&Source::Folder(learning.stream.clone())).with_context(|| no_stream(learning))?.periods;
    let period = periods.first().context("a stream has a period")?;
    let curves = precision::curves(period, networks, seeds, steps)?;
    if !learning.no_write {
        std::fs::write(page::PICTURE, chart::precisions(&curves)?)?;
    }
    page::replace(learning, "make bench-precision", &page::precision(&Machine::inspect(false)?, &curves)?)
}

/// Trains the same steps here and in PyTorch, and compares losses and weights: at the daemon's learning rate, and at the benchmark's
/// three times as large one, where rounding grows faster.
///
/// # Errors
/// Where they differ by more than they may, after the page says so.
pub fn parity(learning: &Learning, python: &Path) -> Result<()> {
    // First of all, while there is one thread.
    palimpsest::train::runtime::prepare(recipe::THREADS)?;
    let periods =
        Stream::read(&Source::Folder(learning.stream.clone())).with_context(|| no_stream(learning))?.periods;
    let [first, second, ..] = &periods[..] else { anyhow::bail!("the stream has no second period") };
    let teacher = parity::teacher(first)?;
    let compare = |rate| parity::compare(second, &teacher, rate, python);
    let daemon = compare(recipe::Settings::default_learning_rate()?)?;
    let benchmark = compare(recipe::Settings::benchmark()?.optimisation.learning_rate)?;
    let page = page::parity(&Machine::inspect(false)?, [&daemon, &benchmark])?;
    page::replace(learning, "make parity", &page)?;
    ensure!(daemon.holds(), "losses or weights differ by more than they may at the daemon's learning rate");
    ensure!(
        benchmark.is_rounding(),
        "losses or weights differ by more than rounding at the benchmark's learning rate"
    );
    Ok(())
}

fn no_stream(learning: &Learning) -> String {
    format!("no stream in {}: `make streams` makes it", learning.stream.display())
}
