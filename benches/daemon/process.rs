//! Processes and files seen from outside: CPU seconds, memory, bytes on disk. Linux's /proc is the source.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};

/// Between two looks at a training process: what it adds to its peak in its last moments is missed.
const WATCH_EVERY: Duration = Duration::from_millis(10);

/// CPU seconds (user and system) so far.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cpu {
    pub own: f64,
    /// Of its children that have ended: the daemon has no others than training processes.
    pub children: f64,
}

pub fn cpu(id: u32) -> Result<Cpu> {
    let path = format!("/proc/{id}/stat");
    let text = std::fs::read_to_string(&path).with_context(|| path.clone())?;
    // The program's name stands in parentheses and may hold anything.
    let fields: Vec<&str> = text.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |at: usize| -> Result<f64> {
        fields.get(at).context(path.clone())?.parse().with_context(|| path.clone())
    };
    let ticks_per_second = ticks_per_second();
    // man 5 proc: utime, stime, cutime and cstime are the fields 14 to 17 of the line, the state is the third.
    Ok(Cpu {
        own: (ticks(11)? + ticks(12)?) / ticks_per_second,
        children: (ticks(13)? + ticks(14)?) / ticks_per_second,
    })
}

fn ticks_per_second() -> f64 {
    // SAFETY: sysconf only reads a constant of the system.
    unsafe { libc::sysconf(libc::_SC_CLK_TCK) as f64 }
}

/// CPU seconds that all cores together were not idle.
pub fn busy_seconds() -> Result<f64> {
    let text = std::fs::read_to_string("/proc/stat")?;
    let first = text.lines().next().unwrap_or_default();
    let fields = first.split_whitespace().skip(1).map(str::parse::<f64>);
    let fields = fields.collect::<Result<Vec<f64>, _>>().context("/proc/stat")?;
    // man 5 proc: user, nice, system, idle, iowait, irq, softirq, steal; guests are counted under user.
    let busy = fields.iter().take(8).enumerate().filter(|(at, _)| !matches!(at, 3 | 4));
    Ok(busy.map(|(_, ticks)| ticks).sum::<f64>() / ticks_per_second())
}

/// Resident bytes now.
pub fn resident_bytes(id: u32) -> Result<u64> {
    status_bytes(id, "VmRSS:").with_context(|| format!("process {id} is gone"))
}

/// A line of /proc/ID/status in kB; `None` if the process has ended.
fn status_bytes(id: u32, name: &str) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{id}/status")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
}

/// The children of all threads of a process.
pub fn children(id: u32) -> Vec<u32> {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{id}/task")) else { return vec![] };
    let lists = tasks.flatten().filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    lists
        .flat_map(|list| list.split_whitespace().filter_map(|id| id.parse().ok()).collect::<Vec<_>>())
        .collect()
}

/// Looks for a process's children and remembers the highest peak of resident memory among them.
pub struct PeakWatch {
    peak: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl PeakWatch {
    pub fn start(parent: u32) -> Result<Self> {
        let (peak, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (seen, ended) = (Arc::clone(&peak), Arc::clone(&stop));
        let thread = std::thread::Builder::new().name("peak-watch".into()).spawn(move || {
            let mut watched = vec![];
            while !ended.load(Ordering::Relaxed) {
                if watched.is_empty() {
                    watched = children(parent);
                }
                watched.retain(|&child| {
                    let found = status_bytes(child, "VmHWM:");
                    seen.fetch_max(found.unwrap_or(0), Ordering::Relaxed);
                    found.is_some()
                });
                std::thread::sleep(WATCH_EVERY);
            }
        })?;
        Ok(Self { peak, stop, thread: Some(thread) })
    }

    /// The highest peak since the last call, in bytes.
    pub fn take(&self) -> u64 {
        self.peak.swap(0, Ordering::Relaxed)
    }
}

impl Drop for PeakWatch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Stops or continues a process.
pub fn signal(id: u32, signal: libc::c_int) -> Result<()> {
    let id = i32::try_from(id)?;
    // SAFETY: kill only sends a signal, to a process that we have just seen as the daemon's child.
    let sent = unsafe { libc::kill(id, signal) };
    if sent != 0 {
        return Err(std::io::Error::last_os_error()).context("the training process can't be signalled");
    }
    Ok(())
}

/// Bytes of all files below a folder; 0 if it isn't there (yet).
pub fn bytes_below(folder: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(folder) else { return 0 };
    let sizes = entries.flatten().map(|entry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => bytes_below(&entry.path()),
        Ok(metadata) => metadata.len(),
        Err(_) => 0,
    });
    sizes.sum()
}
