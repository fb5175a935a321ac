//! docs/performance.md out of the measurements, of this machine and of those before it.
//!
//! docs/measurements holds every single measurement, one file a machine. A run replaces its own rows in its machine's
//! file and leaves the others; the page is made of all files.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::driver::{RowResult, SideResult};
use crate::machine::Machine;
use crate::rows::{self, Comparison, GEMM, OURS, OURS_F32, Row, Units};
use crate::statistics::{Median, median};

const TEMPLATE: &str = include_str!("template.md");
const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/performance.md");
const MEASUREMENTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/measurements");

/// Every single measurement of one machine.
#[derive(Serialize, Deserialize)]
pub struct Results {
    pub machine: Machine,
    pub rows: Vec<RowResult>,
}

impl Results {
    pub fn save(&self, path: &Path) -> Result<()> {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        Ok(fs::write(path, serde_json::to_vec(self)?)?)
    }

    fn read(path: &Path) -> Result<Self> {
        let bytes = fs::read(path)?;
        serde_json::from_slice(&bytes).with_context(|| path.display().to_string())
    }

    /// Takes the rows of `earlier` that it has not measured itself; rows come in the tables' order.
    fn complete(&mut self, earlier: Results) {
        let measured = |rows: &[RowResult], row: &RowResult| {
            rows.iter().any(|other| (&other.row, other.threads) == (&row.row, row.threads))
        };
        let missing: Vec<_> = earlier.rows.into_iter().filter(|row| !measured(&self.rows, row)).collect();
        self.rows.extend(missing);
        let order: Vec<_> = rows::all().iter().chain(&rows::gpu()).map(|row| row.name()).collect();
        let place = |row: &RowResult| order.iter().position(|name| *name == row.row);
        self.rows.sort_by_key(|row| (place(row), row.threads));
    }
}

/// Prints the tables of `results`. With `keep`, writes them down and the page anew.
pub fn write(mut results: Results, keep: bool) -> Result<()> {
    if !keep {
        println!("{}", section(&results)?);
        return Ok(());
    }
    let path = Path::new(MEASUREMENTS).join(results.machine.file_name()).with_extension("json");
    if path.exists() {
        results.complete(Results::read(&path)?);
    }
    results.save(&path)?;
    println!("{}", section(&results)?);
    write_page()
}

/// The page, anew.
pub fn write_page() -> Result<()> {
    Ok(fs::write(PAGE, page()?)?)
}

/// Of every file of measurements.
fn page() -> Result<String> {
    let files = fs::read_dir(MEASUREMENTS)?.map(|entry| Ok(entry?.path()));
    let mut files: Vec<PathBuf> = files.collect::<Result<_>>()?;
    files.sort();
    let machines = files.iter().map(|path| Results::read(path)).collect::<Result<Vec<_>>>()?;
    let (on_gpu, on_cpu): (Vec<_>, Vec<_>) =
        machines.iter().partition(|results| results.machine.gpu.is_some());
    let sections: Vec<String> = on_cpu.into_iter().chain(on_gpu).map(section).collect::<Result<_>>()?;
    // Tables end with a line break of their own.
    Ok(TEMPLATE.replace("{{machines}}", &sections.join("\n")).replace("\n\n\n", "\n\n"))
}

fn section(results: &Results) -> Result<String> {
    let Results { machine, rows } = results;
    let mut section =
        format!("## {}\n\n{}\n\n{}\n", machine.name(), machine_text(results), rows_table(rows)?);
    if let Some(table) = limit_table(rows)? {
        write!(section, "The distance to the machine's limit:\n\n{table}\n")?;
    }
    write!(section, "<details><summary>Every variant</summary>\n\n{}\n</details>\n", variants_table(rows)?)?;
    Ok(section)
}

fn machine_text(results: &Results) -> String {
    let Results { machine, rows } = results;
    let versions: BTreeMap<_, _> =
        rows.iter().flat_map(|result| result.sides.values()).flat_map(|side| &side.versions).collect();
    let versions: Vec<_> = versions.iter().map(|(name, version)| format!("{name} {version}")).collect();
    let Machine { cpu, gpu, flags, cores, memory_bytes, system, rustc } = machine;
    let gpu = gpu.as_ref().map(|gpu| format!("{gpu}; ")).unwrap_or_default();
    let rounds = rows.iter().flat_map(|row| row.sides.values()).map(|side| side.wall_s.len());
    format!(
        "Measured on {}: {gpu}{cpu} ({}), {cores} cores, {:.0} GiB of memory; {system}; {rustc}; {}. {} rounds a row.",
        range(rows.iter().map(|row| row.date.as_str())),
        flags.join(", "),
        *memory_bytes as f64 / f64::from(1 << 30),
        versions.join(", "),
        range(rounds),
    )
}

/// The smallest and the largest, or the one that both are.
fn range<T: Ord + std::fmt::Display>(values: impl Iterator<Item = T> + Clone) -> String {
    match (values.clone().min(), values.max()) {
        (Some(first), Some(last)) if first != last => format!("{first} to {last}"),
        (Some(only), _) => only.to_string(),
        (None, _) => "none".to_owned(),
    }
}

/// A row's text, by its name.
fn row_of(result: &RowResult) -> Result<Box<dyn Row>> {
    rows::find(&result.row)
}

fn rows_table(results: &[RowResult]) -> Result<String> {
    let mut table = "| row | threads | ours | peer | wall, ours / peer | CPU, ours / peer | must | aim | \
                     peak memory, ours / peer |\n|---|---|---|---|---|---|---|---|---|\n"
        .to_owned();
    for result in results {
        let row = row_of(result)?;
        for comparison in row.comparisons().iter().filter(|comparison| result.has(comparison)) {
            table += &rows_line(result, row.as_ref(), comparison)?;
        }
    }
    Ok(table)
}

fn rows_line(result: &RowResult, row: &dyn Row, comparison: &Comparison) -> Result<String> {
    let (ours, peer) = (result.side(comparison.ours)?, result.fastest(comparison)?);
    let [must, aim] = match comparison.targets {
        Some((must, aim)) => [must.to_string(), aim.to_string()],
        None => ["-", "-"].map(str::to_owned),
    };
    Ok(format!(
        "| {} against {} | {} | {} ({}) | {} ({}) | {} | {} | {must} | {aim} | {} / {} |\n",
        row.title(),
        comparison.against,
        result.threads,
        time_text(row, ours),
        ours.description,
        time_text(row, peer),
        peer.description,
        ratio_text(&ratios(&ours.wall_s, &peer.wall_s)),
        ratio_text(&ratios(&ours.cpu_s, &peer.cpu_s)),
        mebibytes(ours.peak_bytes),
        mebibytes(peer.peak_bytes),
    ))
}

pub fn ratios(ours: &[f64], theirs: &[f64]) -> Median {
    let ratios: Vec<f64> = ours.iter().zip(theirs).map(|(a, b)| a / b).collect();
    median(&ratios)
}

pub fn ratio_text(ratio: &Median) -> String {
    match ratio.interval {
        Some((low, high)) => format!("**{:.2}** [{low:.2}, {high:.2}]", ratio.value),
        None => format!("**{:.2}**", ratio.value),
    }
}

/// The median wall time of one of the row's units, or how many of them make a second.
fn time_text(row: &dyn Row, side: &SideResult) -> String {
    let Units { count, name, as_rate } = row.units();
    let seconds = side.median_wall_s() / count as f64;
    match as_rate {
        true => format!("{:.0} {name}s/s", 1.0 / seconds),
        false if seconds < 0.1 => format!("{:.2} ms", seconds * 1e3),
        false if seconds < 1.0 => format!("{:.0} ms", seconds * 1e3),
        false => format!("{seconds:.3} s"),
    }
}

pub fn mebibytes(bytes: u64) -> String {
    format!("{:.0} MiB", bytes as f64 / f64::from(1 << 20))
}

fn variants_table(results: &[RowResult]) -> Result<String> {
    let mut table =
        "| row | threads | side | wall | CPU | peak memory |\n|---|---|---|---|---|---|\n".to_owned();
    for result in results {
        let row = row_of(result)?;
        for side in result.sides.iter().filter(|(name, _)| *name != GEMM).map(|(_, side)| side) {
            let Units { count, name, .. } = row.units();
            let cpu_ms = 1e3 * median(&side.cpu_s).value / count as f64;
            let (wall, memory) = (time_text(row.as_ref(), side), mebibytes(side.peak_bytes));
            let (title, threads, description) = (row.title(), result.threads, &side.description);
            writeln!(
                table,
                "| {title} | {threads} | {description} | {wall} | {cpu_ms:.2} ms a {name} | {memory} |"
            )?;
        }
    }
    Ok(table)
}

/// `None` where no row is compared with the peak.
fn limit_table(results: &[RowResult]) -> Result<Option<String>> {
    let head =
        "| encoder | threads | GFLOP a step | gemm's peak, GFLOP/s | ours, GFLOP/s (share of the peak) | \
                     ours in f32 | PyTorch f32 | PyTorch bf16 |\n|---|---|---|---|---|---|---|---|\n"
            .to_owned();
    let mut table = String::new();
    let gemm = rows::find(GEMM)?.flops().context("the products have operations")?;
    for result in results {
        let row = row_of(result)?;
        let (Some(flops), Ok(peak)) = (row.flops(), result.side(GEMM)) else { continue };
        let peak = gemm / peak.median_wall_s() / 1e9;
        let achieved = |side: &SideResult| {
            let rate = flops / side.median_wall_s() / 1e9;
            format!("{rate:.0} ({:.0} %)", 100.0 * rate / peak)
        };
        let step = flops / row.units().count as f64 / 1e9;
        write!(table, "| {} | {} | {step:.1} | {peak:.0} | ", row.name(), result.threads)?;
        write!(table, "{} |", achieved(result.side(OURS)?))?;
        write!(table, " {} |", result.side(OURS_F32).map_or_else(|_| "-".to_owned(), achieved))?;
        for comparison in row.comparisons().iter().filter(|comparison| comparison.ours == OURS) {
            write!(table, " {} |", result.fastest(comparison).map_or_else(|_| "-".to_owned(), achieved))?;
        }
        table.push('\n');
    }
    Ok((!table.is_empty()).then(|| head + &table))
}
