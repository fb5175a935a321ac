//! The results as Markdown: what is forgotten, what was learned, and which label-free measure tells of it.
//!
//! Accuracies and forgetting are in points (per cent of the queries), as mean and standard deviation over seeds. A difference
//! is paired: the same seed's runs of two methods are subtracted first, and the interval is that of the mean over seeds.

use std::fmt::Write as _;

use super::label_free;
use super::measure::Scores;
use super::results::{JOINT, Probe, Results, RunResult};
use super::statistics::{Interval, Spread, ratio};

/// What the others are compared with.
const BASELINE: &str = "finetune";
const RANDOM: &str = "random";

/// `command`: what made the results.
pub fn markdown(results: &Results, command: &str) -> String {
    let mut text = String::new();
    head(&mut text, results, command);
    if let Some(table) = validity(results) {
        text += &table;
    }
    forgetting(&mut text, results);
    differences(&mut text, results);
    learned(&mut text, results);
    if results.stream.periods.len() > 2 {
        over_time(&mut text, results);
    }
    label_free::newest(&mut text, results);
    label_free::correlations(&mut text, results);
    label_free::steps(&mut text, results);
    text
}

fn head(text: &mut String, results: &Results, command: &str) {
    let periods: Vec<String> = results
        .stream
        .periods
        .iter()
        .map(|period| {
            format!(
                "{} ({} labels, {} frames to train on, {} to test on)",
                period.name, period.labels, period.train, period.test
            )
        })
        .collect();
    let seeds = seeds(results);
    let _ = write!(
        text,
        "`{command}`\n\npalimpsest {}, {}; stream {} (sha256 {}): {}. {} seed{}.\n\n",
        results.program_version,
        budget(results),
        results.stream.name,
        &results.stream.digest.0[..16],
        periods.join(", then "),
        seeds,
        if seeds == 1 { "" } else { "s" },
    );
}

fn budget(results: &Results) -> String {
    let number =
        |pointer: &str| results.settings.pointer(pointer).map_or("?".to_owned(), ToString::to_string);
    format!(
        "{}, {} steps on the first period and {} on each later one, {} frames a step, peak learning rate {}, on {} in {}",
        number("/model/encoder/architecture").trim_matches('"'),
        number("/first_steps"),
        number("/optimisation/steps"),
        number("/optimisation/batch"),
        number("/optimisation/learning_rate"),
        number("/device").trim_matches('"'),
        number("/precision").trim_matches('"'),
    )
}

fn seeds(results: &Results) -> usize {
    results.methods().iter().map(|method| results.of(method).len()).max().unwrap_or(0)
}

/// Whether there is something to forget: the first period once it is learned beside initial weights.
fn validity(results: &Results) -> Option<String> {
    let learned = results.of(BASELINE);
    let random = results.of(RANDOM);
    if learned.is_empty() || random.is_empty() {
        return None;
    }
    let mut text = format!("What the first period ({}) is worth:\n\n", results.stream.periods[0].name);
    text += "| network | linear | kNN | 10-shot |\n|---|--:|--:|--:|\n";
    let mut row = |name: &str, runs: &[&RunResult]| {
        let cell =
            |probe: Probe| points(&collect(runs, |run| Some(probe.of(run.versions[0].scores.first()?))));
        let cells: Vec<String> = Probe::ALL.map(cell).to_vec();
        let _ = writeln!(text, "| {name} | {} |", cells.join(" | "));
    };
    row("initial weights", &random);
    row("after the first period", &learned);
    text.push('\n');
    Some(text)
}

/// Mean forgetting of the earlier periods by the newest version, and its reduction.
fn forgetting(text: &mut String, results: &Results) {
    text.push_str(
        "Forgotten of the earlier periods at the end, and how much less of it than by `finetune` (per cent, with the 95 % interval \
         of the ratio of paired means; `-` where `finetune` does not clearly forget):\n\n",
    );
    text.push_str(
        "| method | linear | kNN | 10-shot | less by linear | kNN | 10-shot | CKA | seconds of training |\n",
    );
    text.push_str("|---|--:|--:|--:|--:|--:|--:|--:|--:|\n");
    for method in sequences(results) {
        let runs = results.of(method);
        let lost = |probe: Probe| collect(&runs, |run| forgotten(results, run, probe));
        let less = |probe: Probe| match method == BASELINE {
            true => "-".to_owned(),
            false => reduction(&pairs(results, method, BASELINE, |run| forgotten(results, run, probe))),
        };
        let cka = |run: &RunResult| mean_of_earlier(run, |scores| scores.drift.map(|drift| drift.cka));
        let cka = collect(&runs, |run| is_measured_on_all(results, method).then(|| cka(run))?);
        let cka = plain(&cka, 3);
        let seconds = plain(&collect(&runs, |run| Some(run.seconds())), 0);
        let _ = writeln!(
            text,
            "| `{method}` | {} | {} | {cka} | {seconds} |",
            Probe::ALL.map(|probe| points(&lost(probe))).join(" | "),
            Probe::ALL.map(less).join(" | "),
        );
    }
    text.push('\n');
}

/// Paired with `finetune`, and with `lwf`.
fn differences(text: &mut String, results: &Results) {
    for other in [BASELINE, "lwf"] {
        if seeds(results) < 2 || results.of(other).is_empty() {
            continue;
        }
        let _ = write!(
            text,
            "Forgetting minus that of `{other}` with the same seed, mean and 95 % confidence interval (bold: clear of zero; \
             negative: forgets less):\n\n| method | linear | kNN | 10-shot |\n|---|--:|--:|--:|\n",
        );
        for method in sequences(results).into_iter().filter(|method| *method != other) {
            let cell = |probe: Probe| {
                interval(&paired(results, method, other, |run| forgotten(results, run, probe)))
            };
            let _ = writeln!(text, "| `{method}` | {} |", Probe::ALL.map(cell).join(" | "));
        }
        text.push('\n');
    }
}

/// Accuracies of the newest version, on the last period and over all.
fn learned(text: &mut String, results: &Results) {
    let last = results.stream.periods.len() - 1;
    let _ = write!(
        text,
        "Accuracy of the newest version on the last period ({}) and, in brackets, over all periods; then kNN on the last period \
         minus `finetune`'s:\n\n| method | linear | kNN | 10-shot | kNN - `finetune` |\n|---|--:|--:|--:|--:|\n",
        results.stream.periods[last].name,
    );
    for method in results.methods() {
        let runs = results.of(method);
        let cell = |probe: Probe| {
            let of_last = collect(&runs, |run| run.last_on(last).map(|scores| probe.of(scores)));
            let over_all =
                collect(&runs, |run| mean(run.last()?.scores.iter().map(|scores| probe.of(scores))));
            let over_all =
                Spread::of(&over_all).map_or("-".to_owned(), |all| format!("{:.1}", 100.0 * all.mean));
            format!("{} ({over_all})", points(&of_last))
        };
        let behind = match method == BASELINE {
            true => "-".to_owned(),
            false => {
                interval(&paired(results, method, BASELINE, |run| run.last_on(last).map(|scores| scores.knn)))
            }
        };
        let _ = writeln!(text, "| `{method}` | {} | {behind} |", Probe::ALL.map(cell).join(" | "));
    }
    text.push('\n');
}

/// Average forgetting, backward transfer and average accuracy after every period, by kNN.
fn over_time(text: &mut String, results: &Results) {
    let count = results.stream.periods.len();
    let header: String = (2..=count).map(|after| format!(" after {after} |")).collect();
    let _ = write!(
        text,
        "By kNN after every period: average forgetting / backward transfer / average accuracy.\n\n| method |{header}\n|---|{}\n",
        "--:|".repeat(count - 1),
    );
    for method in sequences(results) {
        let runs: Vec<_> = results.of(method).into_iter().filter(|run| run.versions.len() == count).collect();
        if runs.is_empty() {
            continue;
        }
        let cells = (2..=count).map(|after| {
            let version = crate::types::Version(after as u64);
            let histories = || runs.iter().map(|run| run.history(Probe::Knn));
            let mean_of = |values: Vec<f64>| plain_mean(&values);
            format!(
                " {} / {} / {} |",
                mean_of(histories().filter_map(|history| history.average_forgetting(version)).collect()),
                mean_of(histories().filter_map(|history| history.backward_transfer(version)).collect()),
                mean_of(histories().filter_map(|history| history.average_accuracy(version)).collect()),
            )
        });
        let _ = writeln!(text, "| `{method}` |{}", cells.collect::<String>());
    }
    text.push('\n');
}

/// Methods that have something to forget.
pub(super) fn sequences(results: &Results) -> Vec<&str> {
    let forgets = |method: &&str| results.of(method).iter().any(|run| run.versions.len() > 1);
    results.methods().into_iter().filter(forgets).collect()
}

fn collect(runs: &[&RunResult], of: impl Fn(&RunResult) -> Option<f64>) -> Vec<f64> {
    runs.iter().filter_map(|run| of(run)).collect()
}

/// Whether the method's newest version can be compared with an earlier one on every earlier period. `joint`'s can on the first one
/// alone.
pub(super) fn is_measured_on_all(results: &Results, method: &str) -> bool {
    method != JOINT || results.stream.periods.len() <= 2
}

/// The newest version's mean forgetting of the earlier periods.
fn forgotten(results: &Results, run: &RunResult, probe: Probe) -> Option<f64> {
    is_measured_on_all(results, &run.method).then(|| run.forgetting(probe))?
}

/// The values of equal seeds.
fn pairs(results: &Results, a: &str, b: &str, of: impl Fn(&RunResult) -> Option<f64>) -> Vec<(f64, f64)> {
    let pair = |run: &&RunResult| Some((of(run)?, of(results.find(b, run.seed)?)?));
    results.of(a).iter().filter_map(pair).collect()
}

/// The differences of equal seeds.
fn paired(results: &Results, a: &str, b: &str, of: impl Fn(&RunResult) -> Option<f64>) -> Vec<f64> {
    pairs(results, a, b, of).into_iter().map(|(a, b)| a - b).collect()
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    Spread::of(&values.collect::<Vec<_>>()).map(|spread| spread.mean)
}

fn mean_of_earlier(run: &RunResult, of: impl Fn(&Scores) -> Option<f64>) -> Option<f64> {
    mean(run.last()?.scores.iter().filter_map(of))
}

/// Ratios as points: mean ± deviation.
fn points(ratios: &[f64]) -> String {
    spread_text(&ratios.iter().map(|ratio| 100.0 * ratio).collect::<Vec<_>>(), 1)
}

pub(super) fn plain(values: &[f64], digits: usize) -> String {
    Spread::of(values).map_or("-".to_owned(), |spread| format!("{:.digits$}", spread.mean))
}

fn plain_mean(ratios: &[f64]) -> String {
    Spread::of(ratios).map_or("-".to_owned(), |spread| format!("{:.1}", 100.0 * spread.mean))
}

fn spread_text(values: &[f64], digits: usize) -> String {
    match Spread::of(values) {
        None => "-".to_owned(),
        Some(Spread { mean, deviation: None }) => format!("{mean:.digits$}"),
        Some(Spread { mean, deviation: Some(deviation) }) => {
            format!("{mean:.digits$} ± {deviation:.digits$}")
        }
    }
}

/// How much less than the baseline's, of pairs with it: of mean forgetting. Of what the baseline gained there is no share.
fn reduction(pairs: &[(f64, f64)]) -> String {
    let (method, baseline): (Vec<f64>, Vec<f64>) = pairs.iter().copied().unzip();
    let forgets = baseline.iter().sum::<f64>() > 0.0;
    match ratio(&method, &baseline).filter(|_| forgets) {
        None => "-".to_owned(),
        Some(ratio) => {
            let less = |ratio: f64| 100.0 * (1.0 - ratio);
            format!("{:.0} % [{:.0}, {:.0}]", less(ratio.mean), less(ratio.upper), less(ratio.lower))
        }
    }
}

/// Ratios as points: mean [lower, upper].
fn interval(differences: &[f64]) -> String {
    let points: Vec<f64> = differences.iter().map(|ratio| 100.0 * ratio).collect();
    match Interval::of(&points) {
        None => points.first().map_or("-".to_owned(), |only| format!("{only:+.1}")),
        Some(found) => {
            let text = format!("{:+.1} [{:+.1}, {:+.1}]", found.mean, found.lower, found.upper);
            if found.is_clear_of_zero() { format!("**{text}**") } else { text }
        }
    }
}

#[cfg(test)]
#[path = "report_tests.rs"]
mod tests;
