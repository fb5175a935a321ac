//! The trial that CI runs: our side of every row with small sizes, without Python. It measures nothing.

use anyhow::{Context, Result, ensure};

use crate::driver::{our_side, prepare};
use crate::options::Options;
use crate::rows;

const THREADS: usize = 2;

/// Every row's inputs are made, its side gets ready, gives numbers that hold, works once more, and ends well.
pub fn run(options: &Options) -> Result<()> {
    let mut chosen = rows::select(&options.rows, options.gpu)?;
    if options.rows.is_empty() {
        chosen.extend(rows::apart());
    }
    for row in chosen {
        let folder = tempfile::tempdir()?;
        prepare(row.as_ref(), folder.path(), true)?;
        for ours in row.ours() {
            let (mut side, ready) = our_side(row.name(), folder.path(), ours, THREADS)?;
            row.verify(&ready.check).with_context(|| row.title())?;
            let measured = side.measure()?;
            ensure!(measured.wall_s > 0.0 && measured.cpu_s > 0.0, "{}: no time was measured", row.name());
            side.end()?;
            println!("{}, {}: works, {:.3?}", row.title(), ready.description, ready.check);
        }
    }
    Ok(())
}
