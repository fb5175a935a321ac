//! The benchmarks behind docs/daemon_performance.md: the real daemon, as a process of its own, under measurement.
//!
//! [`periods`] asks whether a period costs the same whatever came before it, [`training`] whether ingest and `embed`
//! stay quick while a period is trained on. Both bring an in-process Kafka-protocol broker ([`broker`]), write the
//! daemon's configuration and start it ([`site`]), look at it from outside ([`process`]), and put their part of the
//! page in place of the former one ([`page`]).

mod broker;
mod chart;
mod page;
mod periods;
mod process;
mod site;
mod training;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "daemon", about = "Measures the daemon; see docs/daemon_performance.md.")]
struct Arguments {
    #[command(subcommand)]
    part: Part,
    #[command(flatten)]
    options: Options,
    /// What `cargo bench` adds.
    #[arg(long, hide = true, global = true)]
    bench: bool,
}

#[derive(clap::Args)]
struct Options {
    /// A trial in a minute: few periods, short windows. Writes nothing, judges nothing.
    #[arg(long, global = true)]
    small: bool,
    /// Frames: a folder a level, in each LABEL/STREAM-NUMBER.jpg.
    #[arg(long, global = true, default_value = "samples/freedoom", value_name = "DIR")]
    frames: PathBuf,
    /// Folder of the page and the picture.
    #[arg(long, global = true, default_value = "docs", value_name = "DIR")]
    out: PathBuf,
    /// Rounds of `training`; not given: 6, small: 1.
    #[arg(long, global = true, value_name = "N")]
    rounds: Option<usize>,
    /// A line of the daemon's configuration over the benchmark's own, such as 'train.priority="normal"'. Writes nothing then.
    #[arg(long, global = true, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

impl Options {
    /// Only a whole run of the configuration as it is described belongs on the page.
    fn writes_page(&self) -> bool {
        !self.small && self.set.is_empty()
    }
}

#[derive(Subcommand)]
enum Part {
    /// Cost over time: many periods of equal size, one after the other.
    Periods,
    /// Ingest and `embed` without and with a training process beside them.
    Training,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("daemon: a bound is not kept");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("daemon: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// False: measured, and a bound is not kept.
fn run(arguments: &Arguments) -> Result<bool> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        match arguments.part {
            Part::Periods => periods::run(&arguments.options).await,
            Part::Training => training::run(&arguments.options).await,
        }
    })
}
