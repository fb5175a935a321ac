//! docs/learning_performance.md: each command's part stands between two marks and is replaced as a whole.

use std::fmt::Write as _;

use anyhow::{Context, Result};

use super::parity::{LOSS_TOLERANCE, Parity, STEPS, TIMES_THE_PEER, WEIGHT_TOLERANCE};
use super::precision::Curves;
use super::run::SCORES;
use super::spread::{Spread, WINDOW};
use crate::driver::{RowResult, SideResult};
use crate::machine::{Machine, today};
use crate::options::Learning;
use crate::report::{mebibytes, ratio_text, ratios};
use crate::rows::{Comparison, OURS};
use crate::statistics::median;

const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/learning_performance.md");
pub const PICTURE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/precision.svg");

/// Prints `text` and puts it in place of what a former run of `command` wrote.
pub fn replace(learning: &Learning, command: &str, text: &str) -> Result<()> {
    println!("{text}");
    if learning.no_write {
        return Ok(());
    }
    let page = std::fs::read_to_string(PAGE).context(PAGE)?;
    let (begin, end) = (format!("<!-- {command}: begin -->\n"), format!("<!-- {command}: end -->\n"));
    let (before, rest) = page.split_once(&begin).with_context(|| format!("{PAGE} has no {begin}"))?;
    let (_, after) = rest.split_once(&end).with_context(|| format!("{PAGE} has no {end}"))?;
    Ok(std::fs::write(PAGE, format!("{before}{begin}{text}{end}{after}"))?)
}

/// The times of all sides, and what they learnt side by side.
pub fn forgetting_run(machine: &Machine, result: &RowResult, peer: &Comparison) -> Result<String> {
    let (ours, fastest) = (result.side(OURS)?, result.fastest(peer)?);
    let sides: Vec<&SideResult> = result.sides.values().collect();
    let versions = sides.iter().flat_map(|side| &side.versions);
    let versions: std::collections::BTreeSet<_> =
        versions.map(|(name, version)| format!("{name} {version}")).collect();
    let versions: Vec<_> = versions.into_iter().collect();
    let (rounds, threads) = (ours.wall_s.len(), result.threads);
    let mut text = format!(
        "`make bench-run`, {}; {}. {rounds} rounds, {threads} threads.\n\n\
         | side | wall, median | CPU, median | wall of each round | peak memory |\n|---|--:|--:|---|--:|\n",
        made_on(machine),
        versions.join(", "),
    );
    for side in &sides {
        let rounds: Vec<_> = side.wall_s.iter().map(|seconds| format!("{seconds:.1}")).collect();
        let (wall, cpu) = (side.median_wall_s(), median(&side.cpu_s).value);
        let (name, memory) = (&side.description, mebibytes(side.peak_bytes));
        writeln!(text, "| {name} | {wall:.1} s | {cpu:.1} s | {} | {memory} |", rounds.join(", "))?;
    }
    let (must, _) = peer.targets.context("the run has a bar")?;
    writeln!(
        text,
        "\nOurs / {}, the median of the rounds' ratios: wall {}, CPU {}; the bar is {must} of the wall time.\n",
        fastest.description,
        ratio_text(&ratios(&ours.wall_s, &fastest.wall_s)),
        ratio_text(&ratios(&ours.cpu_s, &fastest.cpu_s)),
    )?;
    text += &scores(&sides)?;
    Ok(text)
}

/// Accuracies in points, CKA as it is.
fn scores(sides: &[&SideResult]) -> Result<String> {
    let names: Vec<_> = sides.iter().map(|side| side.description.as_str()).collect();
    let mut text =
        format!("| what was learnt | {} |\n|---|{}\n", names.join(" | "), "--:|".repeat(names.len()));
    let mut line = |name: &str, values: Vec<String>| writeln!(text, "| {name} | {} |", values.join(" | "));
    for (index, name) in SCORES.iter().enumerate() {
        let value = |side: &&SideResult| match SCORES.len() - 1 - index {
            0 => format!("{:.3}", side.check[index]),
            _ => format!("{:.1}", 100.0 * side.check[index]),
        };
        line(name, sides.iter().map(value).collect())?;
    }
    for (index, probe) in ["linear", "kNN", "10-shot"].iter().enumerate() {
        let lost = |side: &&SideResult| format!("{:.1}", 100.0 * (side.check[index] - side.check[index + 3]));
        line(&format!("forgotten of a, {probe}"), sides.iter().map(lost).collect())?;
    }
    Ok(text)
}

/// What differs most at each learning rate, and losses side by side at the first of them.
pub fn parity(machine: &Machine, found: [&Parity; 2]) -> Result<String> {
    let [first, _] = found;
    let mut text = format!(
        "`make parity`, {}, palimpsest {}, torch {}.\n\n\
         Over {STEPS} steps, the largest difference of a loss from PyTorch's in f64, in shares of the loss, and at the end that of all \
         learned weights together, in shares of their norm. The bars are {LOSS_TOLERANCE:.0e} and {WEIGHT_TOLERANCE:.0e} at the daemon's \
         learning rate, the first row, and {TIMES_THE_PEER} times PyTorch's own differences at the benchmark's.\n\n\
         | peak learning rate | losses here, in f32 | PyTorch's in f32 | weights here | PyTorch's in f32 |\n|--:|--:|--:|--:|--:|\n",
        made_on(machine),
        palimpsest::VERSION,
        first.torch,
    );
    for parity in found {
        let ([ours, peer], [our_weights, peer_weights]) = (parity.farthest_losses(), parity.distances);
        let rate = parity.learning_rate;
        writeln!(text, "| {rate} | {ours:.1e} | {peer:.1e} | {our_weights:.1e} | {peer_weights:.1e} |")?;
    }
    writeln!(
        text,
        "\nThe losses at {}:\n\n\
         | step | PyTorch in f64 | here | PyTorch in f32 |\n|--:|--:|--:|--:|",
        first.learning_rate
    )?;
    for (step, [ours, exact, peer]) in
        (1..).zip(&first.losses).filter(|(step, _)| step % 10 == 0 || *step == 1)
    {
        let apart = |loss: &f64| (loss - exact) / exact;
        writeln!(
            text,
            "| {step} | {exact:.6} | {ours:.6} ({:+.1e}) | {peer:.6} ({:+.1e}) |",
            apart(ours),
            apart(peer)
        )?;
    }
    Ok(text)
}

/// The picture and what it shows in numbers.
pub fn precision(machine: &Machine, curves: &[Curves]) -> Result<String> {
    let mut text = format!(
        "`make bench-precision`, {}, palimpsest {}.\n\n\
         | network | steps x seeds | bf16 - f32 at equal seeds, mean | farthest | deviation over seeds | loss of the last {WINDOW} steps, bf16 and f32 | agree |\n\
         |---|---|--:|--:|--:|---|---|\n",
        made_on(machine),
        palimpsest::VERSION,
    );
    for network in curves {
        let spread = Spread::of(&network.bf16, &network.f32);
        let (steps, seeds) = (network.f32[0].len() + WINDOW - 1, network.f32.len());
        let [bf16, f32] = spread.last;
        writeln!(
            text,
            "| {}, {} frames a step | {steps} x {seeds} | {:+.4} | {:+.4} | {:.4} | {bf16:.4}, {f32:.4} | {} |",
            network.architecture,
            network.batch,
            spread.mean_difference,
            spread.farthest_difference,
            spread.seeds_deviation,
            if spread.agrees() { "yes" } else { "**no**" },
        )?;
    }
    text += "\n![The loss by step in both precisions](precision.svg)\n";
    Ok(text)
}

fn made_on(Machine { cpu, flags, cores, system, .. }: &Machine) -> String {
    format!("{}: {cpu} ({}), {cores} cores; {system}", today(), flags.join(", "))
}
