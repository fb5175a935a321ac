//! Settings of the training process as a whole: priority, allocator and threads. Called once, first thing in it.
//!
//! All were measured to matter: beside a training process of equal rank ingest falls to half of its throughput; with
//! glibc's defaults half of the time of a training step on the CPU goes into pages that are given back to the kernel
//! after each operation and faulted in again; and candle's own thread pool spins on the cores that it waits for.

/// The allocator keeps at least so many bytes, and asks the kernel for so many more at a time. Smaller values
/// bring page faults back; larger ones only hold memory that the next step needs anyway.
const KEEP_BYTES: libc::c_int = 1 << 30;
const GROW_BYTES: libc::c_int = 64 << 20;

#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    #[error("the training process already runs {0} threads: its settings come first")]
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
    let running = std::fs::read_dir("/proc/self/task")?.count();
    if running != 1 {
        return Err(RuntimeError::Threads(running));
    }
    keep_memory();
    // SAFETY: this is the only thread, as just counted.
    unsafe {
        // candle reads these at each use: its spinning pool stays empty, its matrix products use rayon's.
        std::env::set_var("CANDLE_NUM_THREADS", "1");
        std::env::set_var("RAYON_NUM_THREADS", threads.to_string());
    }
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|i| format!("tensor-{i}"))
        .build_global()?;
    Ok(())
}

#[cfg(target_env = "gnu")]
fn keep_memory() {
    // No block is mapped on its own (and unmapped when freed), however large; freed ones stay in the heap.
    let settings =
        [(libc::M_MMAP_MAX, 0), (libc::M_TRIM_THRESHOLD, KEEP_BYTES), (libc::M_TOP_PAD, GROW_BYTES)];
    for (parameter, value) in settings {
        // SAFETY: mallopt only stores the value under malloc's own lock.
        if unsafe { libc::mallopt(parameter, value) } == 0 {
            tracing::warn!(parameter, value, "the allocator refused a setting: training will be slower");
        }
    }
}

#[cfg(not(target_env = "gnu"))]
fn keep_memory() {
    tracing::debug!("this allocator has no settings to change");
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
    }
}
