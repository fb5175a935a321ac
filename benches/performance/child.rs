//! One side of a row as a process: what is said to it, what it answers, what it cost.
//!
//! A side answers with one line of JSON when it is ready and one for each `go`; it ends when its input closes.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// A side's first line.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Ready {
    pub description: String,
    pub versions: BTreeMap<String, String>,
    /// What both sides of a row must agree on: losses, features, scores.
    pub check: Vec<f64>,
}

/// The answer to a `go`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Measured {
    pub wall_s: f64,
    /// User and system time of all of the side's threads and processes.
    pub cpu_s: f64,
    /// The side's numbers after it, as [`Ready::check`] before the first.
    pub check: Vec<f64>,
}

pub struct Side {
    name: String,
    process: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Side {
    /// Starts `command` and waits until it is ready.
    pub fn start(name: &str, mut command: Command) -> Result<(Self, Ready)> {
        let mut process = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("{name} could not be started"))?;
        let input = process.stdin.take().context("the side has no input")?;
        let output = BufReader::new(process.stdout.take().context("the side has no output")?);
        let mut side = Self { name: name.to_owned(), process, input, output };
        let ready = side.answer()?;
        Ok((side, ready))
    }

    /// One repetition.
    pub fn measure(&mut self) -> Result<Measured> {
        self.input.write_all(b"go\n").with_context(|| format!("{} has ended", self.name))?;
        self.answer()
    }

    fn answer<T: DeserializeOwned>(&mut self) -> Result<T> {
        let mut line = String::new();
        if self.output.read_line(&mut line)? == 0 {
            bail!("{} ended with {}", self.name, self.process.wait()?);
        }
        serde_json::from_str(&line).with_context(|| format!("{} answered {line:?}", self.name))
    }

    /// The largest resident memory so far, with that of the processes which the side started itself.
    pub fn peak_bytes(&self) -> Result<u64> {
        let own = self.process.id();
        let children = std::fs::read_to_string(format!("/proc/{own}/task/{own}/children"))?;
        let mut bytes = process_peak_bytes(own)?;
        for child in children.split_whitespace() {
            bytes += process_peak_bytes(child.parse()?)?;
        }
        Ok(bytes)
    }

    /// Closes the side's input and waits for its end.
    pub fn end(mut self) -> Result<()> {
        drop(self.input);
        let status = self.process.wait()?;
        if !status.success() {
            bail!("{} ended with {status}", self.name);
        }
        Ok(())
    }
}

fn process_peak_bytes(process: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    let kibibytes: u64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kibibytes * 1024)
}
