//! Measures rows: starts all sides of one, lets them work in turn, and sums up.
//!
//! Every round has each side work once, one at a time, in an order that turns from round to round: what else happens on
//! the machine then hits all sides alike, and the ratios of a round's times are compared, not times of different
//! minutes.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::child::{Measured, Ready, Side};
use crate::machine::{self, Machine, today};
use crate::options::Options;
use crate::report::{self, Results};
use crate::rows::{self, Comparison, GEMM, OURS, Row};
use crate::statistics::median;

/// What glibc's allocator is told on the peers' side: what our training process tells it on ours.
const PEER_ALLOCATOR: [(&str, &str); 3] =
    [("MALLOC_MMAP_MAX_", "0"), ("MALLOC_TRIM_THRESHOLD_", "1073741824"), ("MALLOC_TOP_PAD_", "67108864")];

/// Numerical libraries read their number of threads from these.
const PEER_THREADS: [&str; 3] = ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"];

/// One side's measurements in the order of the rounds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SideResult {
    pub description: String,
    pub versions: BTreeMap<String, String>,
    pub wall_s: Vec<f64>,
    pub cpu_s: Vec<f64>,
    pub peak_bytes: u64,
    /// Its numbers after the last round.
    pub check: Vec<f64>,
}

impl SideResult {
    pub fn median_wall_s(&self) -> f64 {
        median(&self.wall_s).value
    }
}

/// A row at one number of threads.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RowResult {
    pub row: String,
    pub threads: usize,
    pub date: String,
    pub sides: BTreeMap<String, SideResult>,
}

impl RowResult {
    pub fn side(&self, name: &str) -> Result<&SideResult> {
        self.sides.get(name).with_context(|| format!("{} has no side {name}", self.row))
    }

    /// Whether the comparison's sides were measured.
    pub fn has(&self, comparison: &Comparison) -> bool {
        comparison.variants.iter().chain([&comparison.ours]).all(|side| self.sides.contains_key(*side))
    }

    /// The variant of a comparison with the smallest median time.
    pub fn fastest(&self, comparison: &Comparison) -> Result<&SideResult> {
        let sides = comparison.variants.iter().map(|variant| self.side(variant));
        let sides = sides.collect::<Result<Vec<_>>>()?;
        let fastest = sides.into_iter().min_by(|a, b| a.median_wall_s().total_cmp(&b.median_wall_s()));
        fastest.context("a comparison without variants")
    }
}

/// Measures the rows of `options` and writes what came out.
pub fn run(options: &Options) -> Result<()> {
    ensure!(options.pairs > 0, "--pairs must be at least 1");
    let mut measured = Results { machine: Machine::inspect(options.gpu)?, rows: Vec::new() };
    for row in rows::select(&options.rows, options.gpu)? {
        let folder = tempfile::tempdir()?;
        prepare(row.as_ref(), folder.path(), false)?;
        for &threads in &options.threads {
            eprintln!("{}, threads: {threads}", row.title());
            let effort = Effort { threads, rounds: options.pairs, python: &options.python };
            measured.rows.push(measure(row.as_ref(), folder.path(), effort)?);
            measured.save(&options.results)?;
        }
    }
    report::write(measured, !options.no_write)
}

/// This program as it was started, even where it has been built anew since.
fn this_program() -> Command {
    Command::new("/proc/self/exe")
}

/// In a process of its own, so that this one stays without threads.
pub fn prepare(row: &dyn Row, folder: &Path, small: bool) -> Result<()> {
    let mut command = this_program();
    command.arg("prepare").arg(row.name()).arg(folder);
    if small {
        command.arg("--small");
    }
    let status = command.status()?;
    ensure!(status.success(), "{}: its inputs could not be prepared", row.name());
    Ok(())
}

/// Our side `ours` of `row`.
pub fn our_side(row: &str, folder: &Path, ours: &str, threads: usize) -> Result<(Side, Ready)> {
    let mut command = this_program();
    command.arg("worker").arg(row).arg(folder).args(["--ours", ours, "--threads", &threads.to_string()]);
    Side::start(row, command)
}

fn peer_side(
    row: &dyn Row,
    variant: &str,
    folder: &Path,
    threads: usize,
    python: &Path,
) -> Result<(Side, Ready)> {
    let mut command = Command::new(python);
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/peers/worker.py");
    command.arg(script).arg(row.peer_kind()).arg(folder);
    command.args(["--threads", &threads.to_string(), "--variant", variant]);
    command.envs(PEER_ALLOCATOR);
    for name in PEER_THREADS {
        command.env(name, threads.to_string());
    }
    Side::start(variant, command)
}

/// All sides of a row, ready for their first round.
struct Sides {
    names: Vec<String>,
    sides: Vec<Side>,
    ready: Vec<Ready>,
}

impl Sides {
    fn start(row: &dyn Row, folder: &Path, threads: usize, python: &Path) -> Result<Self> {
        let mut all = Self { names: Vec::new(), sides: Vec::new(), ready: Vec::new() };
        for ours in row.ours() {
            let (side, ready) = our_side(row.name(), folder, ours, threads)?;
            row.verify(&ready.check)?;
            all.push(ours, (side, ready));
        }
        if row.flops().is_some() && row.name() != GEMM {
            all.push(GEMM, our_side(GEMM, folder, OURS, threads)?);
        }
        let has_bf16 = machine::has_bf16()?;
        for comparison in row.comparisons().iter().filter(|comparison| has_bf16 || !comparison.needs_bf16) {
            for variant in comparison.variants {
                if all.names.iter().any(|name| name == variant) {
                    continue;
                }
                let (side, ready) = peer_side(row, variant, folder, threads, python)?;
                agree(all.check(comparison.checked)?, &ready.check, comparison.tolerance)
                    .with_context(|| format!("{} and {variant} do not compute the same", row.name()))?;
                eprintln!("  {variant} is ready and agrees");
                all.push(variant, (side, ready));
            }
        }
        Ok(all)
    }

    /// The numbers of the side of that name.
    fn check(&self, name: &str) -> Result<&[f64]> {
        let sides = self.names.iter().zip(&self.ready);
        let found = sides.into_iter().find(|(found, _)| *found == name);
        Ok(&found.with_context(|| format!("no side {name} is ready"))?.1.check)
    }

    fn push(&mut self, name: &str, (side, ready): (Side, Ready)) {
        self.names.push(name.to_owned());
        self.sides.push(side);
        self.ready.push(ready);
    }
}

/// How a row is measured.
#[derive(Clone, Copy)]
pub struct Effort<'a> {
    pub threads: usize,
    pub rounds: usize,
    pub python: &'a Path,
}

/// Measures a row whose inputs are in `folder`.
pub fn measure(row: &dyn Row, folder: &Path, effort: Effort<'_>) -> Result<RowResult> {
    let Effort { threads, rounds, python } = effort;
    let mut all = Sides::start(row, folder, threads, python)?;
    let count = all.sides.len();
    let mut measured: Vec<Vec<Measured>> = vec![Vec::new(); count];
    for round in 0..rounds {
        for turn in order(round, count) {
            measured[turn].push(all.sides[turn].measure()?);
        }
        let last = measured.iter().zip(&all.names).filter_map(|(times, name)| {
            let Measured { wall_s, cpu_s, .. } = times.last()?;
            Some(format!("{name} {wall_s:.3} ({cpu_s:.3})"))
        });
        let last: Vec<_> = last.collect();
        eprintln!("  {:>2}: seconds of wall (and CPU): {}", round + 1, last.join(", "));
    }
    let mut sides = BTreeMap::new();
    for (((name, side), ready), times) in all.names.into_iter().zip(all.sides).zip(all.ready).zip(measured) {
        let result = SideResult {
            description: ready.description,
            versions: ready.versions,
            wall_s: times.iter().map(|time| time.wall_s).collect(),
            cpu_s: times.iter().map(|time| time.cpu_s).collect(),
            peak_bytes: side.peak_bytes()?,
            check: times.last().map(|time| time.check.clone()).unwrap_or_default(),
        };
        side.end()?;
        sides.insert(name, result);
    }
    Ok(RowResult { row: row.name().to_owned(), threads, date: today(), sides })
}

/// Whose turn it is in a round: every other round backwards, and each pair of rounds begins with another side.
fn order(round: usize, sides: usize) -> Vec<usize> {
    let mut turns: Vec<usize> = (0..sides).map(|turn| (turn + round / 2) % sides).collect();
    if round % 2 == 1 {
        turns.reverse();
    }
    turns
}

/// Both sides' numbers must lie within `tolerance` of each other, in units of one and their size.
fn agree(ours: &[f64], theirs: &[f64], tolerance: f64) -> Result<()> {
    let difference = |(a, b): (&f64, &f64)| (a - b).abs() / (1.0 + a.abs());
    let differences: Vec<f64> = ours.iter().zip(theirs).map(difference).collect();
    // Written so that a value that is no number does not agree.
    if ours.len() != theirs.len() || !differences.iter().all(|difference| *difference <= tolerance) {
        bail!("{ours:?} and {theirs:?} differ by more than {tolerance}");
    }
    Ok(())
}
