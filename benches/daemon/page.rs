//! docs/daemon_performance.md: each benchmark's part stands between two marks and is replaced as a whole.

use std::path::Path;

use anyhow::{Context, Result};

const PAGE: &str = "daemon_performance.md";

/// Puts `text` in place of what a former run of `command` wrote.
pub fn replace(folder: &Path, command: &str, text: &str) -> Result<()> {
    let path = folder.join(PAGE);
    let page = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let (begin, end) = (format!("<!-- {command}: begin -->\n"), format!("<!-- {command}: end -->\n"));
    let (before, rest) =
        page.split_once(&begin).with_context(|| format!("{} has no {begin}", path.display()))?;
    let (_, after) = rest.split_once(&end).with_context(|| format!("{} has no {end}", path.display()))?;
    std::fs::write(&path, format!("{before}{begin}{text}{end}{after}"))?;
    println!("written: {}", path.display());
    Ok(())
}

/// The line that says where figures come from.
pub fn made_by(command: &str) -> Result<String> {
    let processors = std::fs::read_to_string("/proc/cpuinfo")?;
    let value = |name: &str| {
        let line = processors.lines().find(|line| line.split(':').next().map(str::trim) == Some(name))?;
        Some(line.split(':').nth(1)?.trim().to_owned())
    };
    // Where there is no name (aarch64), the architecture must do.
    let processor = value("model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned());
    let cores = std::thread::available_parallelism()?;
    let date = jiff::Timestamp::now().strftime("%Y-%m-%d");
    let version = palimpsest::VERSION;
    Ok(format!("`{command}` on {processor}, {cores} cores, {date}, palimpsest {version}.\n\n"))
}
