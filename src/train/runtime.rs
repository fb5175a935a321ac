//! Settings of a process as a whole: priority, allocator and threads. Called once, first thing in it.
//!
//! There are two kinds. The training process ([`prepare`]) computes and ends: its allocator keeps all that it once had, for
//! with glibc's defaults half of the time of a training step on the CPU goes into pages that are given back to the
//! kernel after each operation and faulted in again. The daemon ([`prepare_daemon`]) lives for months with many threads:
//! its allocator shares what is free between them. In both candle's own thread pool stays empty, because it spins on
//! the cores that it waits for. Beside a training process of equal rank ingest falls to half of its throughput:
//! [`yield_to_others`].

/// The allocator keeps at least so many bytes, and asks the kernel for so many more at a time. Smaller values
/// bring page faults back; larger ones only hold memory that the next step needs anyway.
const KEEP_BYTES: libc::c_int = 1 << 30;
const GROW_BYTES: libc::c_int = 64 << 20;

/// Arenas of the daemon. glibc's default, 8 a core, gives nearly every thread its own, and each grows to the largest that
/// its thread ever had to do: over 50 small periods what is free in them grew by 6 MiB, what is in use by half a MiB.
/// Fewer than two make all threads wait for one lock.
const DAEMON_ARENAS: libc::c_int = 2;

#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    #[error("the process already runs {0} threads: its settings come first")]
    Threads(usize),
    #[error("the threads of this process could not be counted: {0}")]
    Count(#[from] std::io::Error),
    #[error(
        "the system does not let this process run at idle priority ({0}): set train.priority = \"normal\""
    )]
    Priority(std::io::Error),
    #[error("the thread pool could not be built: {0}")]
    Pool(#[from] rayon::ThreadPoolBuildError),
}

/// From now on this thread, and those that it starts, run on cores that no other thread wants (`SCHED_IDLE`). A nice
/// value was measured and does not do: ingest beside a training process of nice 19 kept 0.74 to 0.87 of its throughput.
///
/// # Errors
/// `Priority` if the system does not allow it: a sandbox, for it is everybody's right otherwise.
pub fn yield_to_others() -> Result<(), RuntimeError> {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: only reads `parameters`, which outlives the call; 0 is the calling thread.
    if unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &parameters) } != 0 {
        return Err(RuntimeError::Priority(std::io::Error::last_os_error()));
    }
    Ok(())
}

/// Tensor operations then run on `threads` threads of one pool.
///
/// # Errors
/// `Threads` if another thread runs already: it might read the environment while it is written.
pub fn prepare(threads: usize) -> Result<(), RuntimeError> {
    let only = OnlyThread::found()?;
    keep_memory();
    only.set("CANDLE_NUM_THREADS", "1");
    only.set("RAYON_NUM_THREADS", &threads.to_string());
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|i| format!("tensor-{i}"))
        .build_global()?;
    Ok(())
}

/// For a process that ingests, learns and serves. Tensor operations (of `embed`) run on rayon's own pool.
///
/// # Errors
/// `Threads` if another thread runs already: it might read the environment while it is written.
pub fn prepare_daemon() -> Result<(), RuntimeError> {
    let only = OnlyThread::found()?;
    share_memory();
    only.set("CANDLE_NUM_THREADS", "1");
    Ok(())
}

/// Proof that no other thread ran when it was made, and so none since: only its holder could have started one.
struct OnlyThread(());

impl OnlyThread {
    fn found() -> Result<Self, RuntimeError> {
        let running = std::fs::read_dir("/proc/self/task")?.count();
        if running != 1 {
            return Err(RuntimeError::Threads(running));
        }
        Ok(Self(()))
    }

    /// candle reads its variables at each use: its spinning pool stays empty, its matrix products use rayon's.
    fn set(&self, name: &str, value: &str) {
        // SAFETY: nobody reads the environment meanwhile, for this is the only thread.
        unsafe { std::env::set_var(name, value) }
    }
}

#[cfg(target_env = "gnu")]
fn keep_memory() {
    // No block is mapped on its own (and unmapped when freed), however large; freed ones stay in the heap.
    set_allocator(&[
        (libc::M_MMAP_MAX, 0),
        (libc::M_TRIM_THRESHOLD, KEEP_BYTES),
        (libc::M_TOP_PAD, GROW_BYTES),
    ]);
}

#[cfg(target_env = "gnu")]
fn share_memory() {
    set_allocator(&[(libc::M_ARENA_MAX, DAEMON_ARENAS)]);
}

#[cfg(target_env = "gnu")]
fn set_allocator(settings: &[(libc::c_int, libc::c_int)]) {
    for &(parameter, value) in settings {
        // SAFETY: mallopt only stores the value under malloc's own lock.
        if unsafe { libc::mallopt(parameter, value) } == 0 {
            tracing::warn!(parameter, value, "the allocator refused a setting: it costs time or memory");
        }
    }
}

#[cfg(not(target_env = "gnu"))]
fn keep_memory() {
    tracing::debug!("this allocator has no settings to change");
}

#[cfg(not(target_env = "gnu"))]
fn share_memory() {
    keep_memory();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn yielding_counts_for_threads_that_start_later_and_for_no_other() {
        // SAFETY: reads a number of the calling thread.
        let policy = || unsafe { libc::sched_getscheduler(0) };
        let inside = std::thread::spawn(move || {
            yield_to_others().unwrap();
            (policy(), std::thread::spawn(policy).join().unwrap())
        });
        assert_eq!(inside.join().unwrap(), (libc::SCHED_IDLE, libc::SCHED_IDLE));
        assert_eq!(policy(), libc::SCHED_OTHER);
    }

    #[test]
    fn a_process_that_has_threads_already_is_refused() {
        // The test harness runs every test on a thread of its own.
        assert!(matches!(prepare(1), Err(RuntimeError::Threads(n)) if n > 1));
        assert!(matches!(prepare_daemon(), Err(RuntimeError::Threads(n)) if n > 1));
    }
}
