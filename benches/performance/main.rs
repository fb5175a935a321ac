//! The benchmark behind docs/performance.md: every row against its peers, in interleaved rounds.
//!
//! Each side is a process of its own ([`child`]): threads and allocator are set once at a process's start, and peak
//! memory belongs to one side. This program is both the driver, which only waits while a side works ([`driver`]), and
//! our side of every row ([`worker`], [`rows`]). What is measured is the rows' matter, how it is summed up
//! [`statistics`]', what a reader sees [`report`]'s. Whole runs of learning have a page of their own ([`learning`]).

mod child;
mod driver;
mod flops;
mod learning;
mod machine;
mod options;
mod report;
mod rows;
mod small;
mod statistics;
mod worker;

use std::process::ExitCode;

use clap::Parser;

use options::{Command, Options};

fn main() -> ExitCode {
    let options = Options::parse();
    let done = match &options.command {
        Some(Command::Worker { row, folder, ours, threads }) => worker::serve(row, folder, ours, *threads),
        Some(Command::Prepare { row, folder, small }) => {
            rows::find(row).and_then(|row| row.prepare(folder, *small))
        }
        Some(Command::ForgettingRun { learning, rounds, python }) => {
            learning::forgetting_run(learning, *rounds, python)
        }
        Some(Command::Precision { learning, networks, seeds, steps, threads }) => {
            learning::precision(learning, networks, (*seeds, *steps), *threads)
        }
        Some(Command::Parity { learning, python }) => learning::parity(learning, python),
        Some(Command::Page) => report::write_page(),
        None if options.small => small::run(&options),
        None => driver::run(&options),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("performance: {error:#}");
            ExitCode::FAILURE
        }
    }
}
