//! `palimpsest bench`: the command's words and the configuration to the benchmark's settings, its progress to the terminal.

use std::fs::{File, TryLockError};
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::settings;
use crate::bench::method::{self, BenchMethod, Defaults};
use crate::bench::results::{Probe, Results, RunResult, StreamFacts};
use crate::bench::run::{Bench, Execution, Progress, Settings};
use crate::bench::stream::{Source, Stream};
use crate::bench::{BenchError, plot, report};
use crate::cli::WrongUsage;
use crate::config::Config;
use crate::logging;
use crate::model::Precision;
use crate::supervisor::cancel_on_signals;
use crate::train::device::select;
use crate::train::runtime;
use crate::train::spec::{Composition, Optimisation, PrecisionChoice};

const RESULTS: &str = "results.json";
const REPORT: &str = "report.md";
const PICTURE: &str = "accuracy.svg";
/// Empty; held by the benchmark that writes here.
const LOCK: &str = ".lock";

#[derive(clap::Args)]
pub struct BenchArguments {
    /// DIR/NN-name/{train,test}/LABEL/*.png or *.jpg, a folder a period; or imagenet:DIR or celeba:DIR, as those are published. A frame of
    /// a video is named STREAM@MILLISECONDS.png: batches then take one of a stream in train.spacing.
    #[arg(long, value_name = "DIR")]
    stream: String,
    /// Periods that ImageNet's classes are dealt out to.
    #[arg(long, default_value_t = 10)]
    periods: usize,
    /// Rows of the table: random, finetune, lwf, cassle, cosine, replay, joint, with settings as in lwf:lambda=1:lr=1e-3.
    #[arg(long, value_delimiter = ',', default_values = method::DEFAULT, value_name = "METHOD")]
    methods: Vec<String>,
    /// Runs of each method, with the seeds 1, 2, ...
    #[arg(long, default_value_t = 3)]
    seeds: u64,
    /// Steps on every period but the first. Without it: train.steps.
    #[arg(long, value_name = "STEPS")]
    budget: Option<u64>,
    /// Steps on the first period. Without it: train.first_steps.
    #[arg(long, value_name = "STEPS")]
    first_budget: Option<u64>,
    /// Runs at a time; they share the cores.
    #[arg(long, default_value_t = 1)]
    jobs: usize,
    /// Folder of results.json, report.md and accuracy.svg. A benchmark that was stopped goes on with the same one.
    #[arg(long, default_value = "palimpsest-bench", value_name = "DIR")]
    out: PathBuf,
    /// Where trained versions are kept, each build of the program's apart; may be removed at any time. Without it: below --out.
    #[arg(long, value_name = "DIR")]
    work: Option<PathBuf>,
}

/// Runs the benchmark to its end, and writes its report.
pub fn bench(config: &Config, arguments: &BenchArguments) -> Result<()> {
    let methods = methods(config, &arguments.methods)?;
    check(config, arguments)?;
    let execution = execution(config, arguments);
    // First of all, while there is one thread.
    runtime::prepare(execution.threads)?;
    logging::install(&config.log, None)?;
    let settings = settings(config, arguments)?;
    let io = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let stop = Arc::new(AtomicBool::new(false));
    io.spawn(stop_on_signals(Arc::clone(&stop)));

    let _held = hold(&arguments.out)?;
    let source = Source::parse(&arguments.stream, arguments.periods);
    let stream = Stream::read(&source).map_err(BenchError::from)?;
    let facts = StreamFacts::of(&stream, source.name());
    let results = Results::new(facts, serde_json::to_value(&settings)?).resume(&execution.results)?;
    let seeds: Vec<u64> = (1..=arguments.seeds).collect();
    let bench = Bench {
        stream: &stream,
        settings: &settings,
        methods: &methods,
        seeds: &seeds,
        execution: &execution,
    };
    let bar = Bar::new(bench.total_steps());
    let ended = bench.run(results, &bar, &stop);
    bar.0.finish_and_clear();
    write_report(arguments, &ended?)
}

fn methods(config: &Config, names: &[String]) -> Result<Vec<BenchMethod>, WrongUsage> {
    let defaults = defaults(config);
    let mut methods: Vec<BenchMethod> = Vec::new();
    for name in names {
        if methods.iter().any(|known| known.name == *name) {
            return Err(WrongUsage(format!("--methods names {name:?} twice")));
        }
        let method = BenchMethod::parse(name, &defaults);
        methods.push(method.map_err(|error| WrongUsage(format!("--methods {error}")))?);
    }
    Ok(methods)
}

fn defaults(config: &Config) -> Defaults {
    let crate::config::Train { lambda, tau_d, predictor_hidden, teacher_share, .. } = config.train;
    Defaults { lambda, tau_d, predictor_hidden, teacher_share }
}

fn check(config: &Config, arguments: &BenchArguments) -> Result<(), WrongUsage> {
    let least = [("--seeds", arguments.seeds), ("--jobs", arguments.jobs as u64)];
    let steps = [("--budget", arguments.budget), ("--first-budget", arguments.first_budget)];
    let steps = steps.into_iter().filter_map(|(name, steps)| Some((name, steps?)));
    if let Some((name, _)) = least.into_iter().chain(steps).find(|(_, value)| *value == 0) {
        return Err(WrongUsage(format!("{name} must be at least 1")));
    }
    if config.model.init.is_some() {
        return Err(WrongUsage(
            "model.init: a benchmark learns from initial weights; leave it out".to_owned(),
        ));
    }
    Ok(())
}

/// What is left to the machine is decided here, so that results tell it.
fn settings(config: &Config, arguments: &BenchArguments) -> Result<Settings> {
    let optimisation = settings::optimisation(&config.train);
    let selected = select(&config.train.device.to_string(), settings::precision(config.train.precision))?;
    Ok(Settings {
        model: settings::model(&config.model, None),
        // The budget is in steps alone, or methods with more frames would take more of them.
        optimisation: Optimisation {
            steps: arguments.budget.unwrap_or(optimisation.steps),
            max_epochs: u64::MAX,
            ..optimisation
        },
        first_steps: arguments.first_budget.unwrap_or(config.train.first_steps),
        augmentation: settings::augmentation(&config.augment),
        composition: Composition { max_copies: u64::MAX, ..settings::composition(&config.train) },
        k: config.probe.k,
        defaults: defaults(config),
        device: match selected.device.is_cpu() {
            true => "cpu".to_owned(),
            false => config.train.device.to_string(),
        },
        precision: match selected.precision {
            Precision::F32 => PrecisionChoice::F32,
            Precision::Bf16 => PrecisionChoice::Bf16,
        },
        micro_batch: settings::micro_batch(config.train.micro_batch),
    })
}

fn execution(config: &Config, arguments: &BenchArguments) -> Execution {
    let threads = match config.train.threads {
        0 => (settings::cores() / arguments.jobs).max(1),
        threads => threads,
    };
    Execution {
        threads,
        jobs: arguments.jobs,
        checkpoint_steps: config.train.checkpoint_steps,
        work: arguments.work.clone().unwrap_or_else(|| arguments.out.join("work")),
        results: arguments.out.join(RESULTS),
    }
}

/// The first signal ends the runs with checkpoints, the second one ends the process.
async fn stop_on_signals(stop: Arc<AtomicBool>) {
    let token = CancellationToken::new();
    let stopping = async {
        token.cancelled().await;
        stop.store(true, Ordering::Relaxed);
        std::future::pending::<()>().await;
    };
    tokio::select! {
        ended = cancel_on_signals(token.clone()) => if let Err(error) = ended {
            tracing::warn!(%error, "signals can't be waited for: they end the process without a checkpoint");
        },
        () = stopping => {}
    }
}

/// Makes the folder, and keeps other benchmarks out of it until what is returned is dropped: their results would replace ours.
fn hold(out: &Path) -> Result<File> {
    std::fs::create_dir_all(out).with_context(|| out.display().to_string())?;
    let path = out.join(LOCK);
    let options = File::options().create(true).write(true).truncate(false).open(&path);
    let lock = options.with_context(|| path.display().to_string())?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => Err(BenchError::InUse { path: out.to_owned() }.into()),
        Err(TryLockError::Error(error)) => Err(error).with_context(|| path.display().to_string()),
    }
}

fn write_report(arguments: &BenchArguments, results: &Results) -> Result<()> {
    let text = report::markdown(results, &command());
    let write = |name: &str, text: &str| {
        let path = arguments.out.join(name);
        std::fs::write(&path, text).with_context(|| path.display().to_string())
    };
    write(REPORT, &text)?;
    write(PICTURE, &plot::accuracy(results)?)?;
    let results = arguments.out.join(RESULTS);
    match std::io::stdout().is_terminal() {
        true => println!("{text}\n{}", results.display()),
        false => println!("{}", json!({ "event": "finished", "results": results })),
    }
    Ok(())
}

/// As it was typed, the program by its name.
fn command() -> String {
    let words = std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned());
    let words = words.map(|word| match word.contains(char::is_whitespace) {
        true => format!("'{word}'"),
        false => word,
    });
    std::iter::once("palimpsest".to_owned()).chain(words).collect::<Vec<_>>().join(" ")
}

/// All runs' steps on a terminal, a line for each run elsewhere.
struct Bar(ProgressBar);

impl Bar {
    fn new(steps: u64) -> Self {
        let bar = ProgressBar::new(steps);
        let template = "{bar:40.cyan} {pos}/{len} steps, {per_sec:.1}, {eta} to go";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        Self(bar)
    }
}

impl Progress for Bar {
    fn steps(&self, more: u64) {
        self.0.inc(more);
        // What was found done says nothing of what is to come.
        if more > 1 {
            self.0.reset_eta();
        }
    }

    fn finished(&self, run: &RunResult) {
        let lost = Probe::ALL.map(|probe| run.forgetting(probe));
        if !std::io::stdout().is_terminal() {
            let [linear, knn, few_shot] = lost;
            let forgetting = json!({ "linear": linear, "knn": knn, "few_shot": few_shot });
            println!(
                "{}",
                json!({ "event": "run", "method": run.method, "seed": run.seed, "forgetting": forgetting, "seconds": run.seconds() })
            );
            return;
        }
        let points = lost.map(|lost| lost.map_or("-".to_owned(), |lost| format!("{:.1}", 100.0 * lost)));
        self.0.println(format!(
            "{}, seed {}: {} points forgotten (linear / kNN / 10-shot), {:.0} s of training",
            run.method,
            run.seed,
            points.join(" / "),
            run.seconds()
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_benchmarks_do_not_write_to_one_folder() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        let held = hold(&out).unwrap();
        let error = hold(&out).unwrap_err().to_string();
        assert_eq!(
            error,
            format!(
                "another benchmark writes to {}: choose another --out, or wait for its end",
                out.display()
            )
        );
        drop(held);
        hold(&out).unwrap();
    }

    #[test]
    fn a_method_named_twice_or_unknown_is_wrong_usage() {
        let config = Config::default();
        let message = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(ToString::to_string).collect();
            methods(&config, &names).unwrap_err().to_string()
        };
        assert_eq!(message(&["lwf", "joint", "lwf"]), "--methods names \"lwf\" twice");
        assert!(message(&["ewc"]).starts_with("--methods \"ewc\" is no method"));
    }

    #[test]
    fn the_benchmarks_configuration_is_allowed() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/forgetting.toml");
        let config = Config::load(Some(&path)).unwrap();
        assert_eq!((config.train.first_steps, config.train.steps, config.train.batch), (400, 300, 128));
    }
}
