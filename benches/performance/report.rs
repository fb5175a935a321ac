//! docs/performance.md and results.json out of the measurements.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::driver::{RowResult, SideResult};
use crate::machine::Machine;
use crate::options::Options;
use crate::rows::{self, Comparison, GEMM, OURS, OURS_F32, Row, Units};
use crate::statistics::{Median, median};

const TEMPLATE: &str = include_str!("template.md");
const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/performance.md");

#[derive(Serialize)]
struct Results<'a> {
    machine: &'a Machine,
    rows: &'a [RowResult],
}

/// Every single measurement so far.
pub fn save(machine: &Machine, results: &[RowResult], path: &Path) -> Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    Ok(fs::write(path, serde_json::to_vec_pretty(&Results { machine, rows: results })?)?)
}

pub fn write(machine: &Machine, results: &[RowResult], options: &Options) -> Result<()> {
    let page = page(machine, results, options)?;
    println!("{page}");
    if !options.no_write {
        fs::write(PAGE, page)?;
    }
    Ok(())
}

fn page(machine: &Machine, results: &[RowResult], options: &Options) -> Result<String> {
    let page = TEMPLATE
        .replace("{{machine}}", &machine_text(machine, results, options))
        .replace("{{rows}}", &rows_table(results)?)
        .replace("{{variants}}", &variants_table(results)?)
        .replace("{{limit}}", &limit_table(results)?);
    // Tables end with a line break of their own.
    Ok(page.replace("\n\n\n", "\n\n"))
}

fn machine_text(machine: &Machine, results: &[RowResult], options: &Options) -> String {
    let versions: BTreeMap<_, _> =
        results.iter().flat_map(|result| result.sides.values()).flat_map(|side| &side.versions).collect();
    let versions: Vec<_> = versions.iter().map(|(name, version)| format!("{name} {version}")).collect();
    let Machine { date, cpu, flags, cores, memory_bytes, system, rustc } = machine;
    format!(
        "Measured on {date}: {cpu} ({}), {cores} cores, {:.0} GiB of memory; {system}; {rustc}; {}. {} rounds a row.",
        flags.join(", "),
        *memory_bytes as f64 / f64::from(1 << 30),
        versions.join(", "),
        options.pairs,
    )
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
        for comparison in row.comparisons() {
            table += &rows_line(result, row.as_ref(), &comparison)?;
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

fn limit_table(results: &[RowResult]) -> Result<String> {
    let mut table =
        "| encoder | threads | GFLOP a step | gemm's peak, GFLOP/s | ours, GFLOP/s (share of the peak) | \
                     ours in f32 | PyTorch f32 | PyTorch bf16 |\n|---|---|---|---|---|---|---|---|\n"
            .to_owned();
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
            write!(table, " {} |", achieved(result.fastest(comparison)?))?;
        }
        table.push('\n');
    }
    Ok(table)
}
