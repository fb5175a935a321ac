//! Our side of a row: the process that the driver starts.

use std::collections::BTreeMap;
use std::io::{BufRead, Write};
use std::path::Path;
use std::time::Instant;

use anyhow::{Result, bail};
use palimpsest::train::runtime;

use crate::child::{Measured, Ready};
use crate::rows::{self, OURS};

/// Works once for each line of standard input, after the row's warm-up.
pub fn serve(row: &str, folder: &Path, ours: &str, threads: usize) -> Result<()> {
    // First of all, while there is one thread.
    runtime::prepare(threads)?;
    let row = rows::find(row)?;
    let mut work = row.start(folder, ours)?;
    for _ in 0..row.warm_up() {
        work.repeat()?;
    }
    let versions = BTreeMap::from([("palimpsest".to_owned(), palimpsest::VERSION.to_owned())]);
    let description = match work.details().as_str() {
        "" => OURS.to_owned(),
        details => format!("{OURS}, {details}"),
    };
    answer(&Ready { description, versions, check: work.check() })?;
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        if line != "go" {
            bail!("expected go, got {line:?}");
        }
        let (start, cpu_start) = (Instant::now(), cpu_seconds()?);
        work.repeat()?;
        let (wall_s, cpu_s) = (start.elapsed().as_secs_f64(), cpu_seconds()? - cpu_start);
        answer(&Measured { wall_s, cpu_s, check: work.check() })?;
    }
    Ok(())
}

fn answer(line: &impl serde::Serialize) -> Result<()> {
    let mut output = std::io::stdout().lock();
    serde_json::to_writer(&mut output, line)?;
    output.write_all(b"\n")?;
    Ok(output.flush()?)
}

/// User and system time of this process so far.
fn cpu_seconds() -> Result<f64> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes the one timespec that it is given.
    if unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) } != 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    Ok(time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9)
}
