//! The command line, of the driver and of the processes that it starts.

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use palimpsest::model::Architecture;

#[derive(Parser)]
#[command(about = "Measures every row of docs/performance.md in interleaved rounds with its peers")]
#[command(args_conflicts_with_subcommands = true)]
pub struct Options {
    /// Rows to measure; all if not given.
    #[arg(long, value_delimiter = ',')]
    pub rows: Vec<String>,
    /// The rows of a CUDA device, the first one, instead of the processor's.
    #[arg(long)]
    pub gpu: bool,
    /// Numbers of threads; each row is measured with each.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2])]
    pub threads: Vec<usize>,
    /// Rounds of a row: in each, every side works once. An interval needs 6.
    #[arg(long, default_value_t = 15)]
    pub pairs: usize,
    /// Only our side with small sizes: does every row work? Measures nothing and needs no Python.
    #[arg(long)]
    pub small: bool,
    /// Print the tables without writing docs/performance.md and what it is made of.
    #[arg(long)]
    pub no_write: bool,
    /// Interpreter of the peers, with benches/peers/requirements.txt installed.
    #[arg(long, default_value = "python3")]
    pub python: PathBuf,
    /// Every single measurement of the run.
    #[arg(long, default_value = "target/performance/results.json")]
    pub results: PathBuf,
    /// Cargo says it to every benchmark.
    #[arg(long, hide = true)]
    pub bench: bool,
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// Of a benchmark of learning, which has a page of its own.
#[derive(clap::Args)]
pub struct Learning {
    /// The stream, as `make streams` makes it.
    #[arg(long)]
    pub stream: PathBuf,
    /// Print what came out without writing docs/learning_performance.md.
    #[arg(long)]
    pub no_write: bool,
    /// Cargo says it to every benchmark.
    #[arg(long, hide = true)]
    pub bench: bool,
}

#[derive(Subcommand)]
pub enum Command {
    /// One run of the forgetting benchmark beside PyTorch.
    ForgettingRun {
        #[command(flatten)]
        learning: Learning,
        /// Rounds: in each, every side runs once.
        #[arg(long, default_value_t = 3)]
        rounds: usize,
        /// Interpreter of the peer, with benches/peers/requirements.txt installed.
        #[arg(long, default_value = "python3")]
        python: PathBuf,
    },
    /// The loss with products in bf16 and in f32.
    Precision {
        #[command(flatten)]
        learning: Learning,
        /// Networks to train; all if not given.
        #[arg(long, value_delimiter = ',')]
        networks: Vec<Architecture>,
        /// Runs of each precision.
        #[arg(long, default_value_t = 3)]
        seeds: u64,
        #[arg(long, default_value_t = 500)]
        steps: u64,
        /// They change no loss.
        #[arg(long, default_value_t = 2)]
        threads: usize,
    },
    /// The same steps of lwf here and in PyTorch, on the same views.
    Parity {
        #[command(flatten)]
        learning: Learning,
        /// Interpreter of the peer, with benches/peers/requirements.txt installed.
        #[arg(long, default_value = "python3")]
        python: PathBuf,
    },
    /// Writes docs/performance.md of the measurements in docs/measurements, those of other machines among them.
    Page,
    /// Our side of a row: says when it is ready, then works once for each line on its standard input.
    #[command(hide = true)]
    Worker {
        row: String,
        folder: PathBuf,
        /// Which of the row's own sides.
        #[arg(long)]
        ours: String,
        #[arg(long)]
        threads: usize,
    },
    /// Writes what both sides of a row read.
    #[command(hide = true)]
    Prepare {
        row: String,
        folder: PathBuf,
        #[arg(long)]
        small: bool,
    },
}
