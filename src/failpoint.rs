//! Named points at which a test can make the process die as if it had been killed.
//!
//! Every durable write has one just before and one just after it. In a build without debug assertions the
//! call is empty; otherwise `PALIMPSEST_ABORT_AT=name` aborts the process the first time it gets to `name`,
//! and `name#3` the third time.

/// Aborts here if `PALIMPSEST_ABORT_AT` names this point.
#[inline]
pub fn reach(name: &str) {
    if cfg!(debug_assertions) {
        abort_if_named(name);
    }
}

fn abort_if_named(name: &str) {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU32, Ordering};
    static TARGET: OnceLock<Option<(String, u32)>> = OnceLock::new();
    static SEEN: AtomicU32 = AtomicU32::new(0);
    let target = TARGET.get_or_init(|| {
        let value = std::env::var("PALIMPSEST_ABORT_AT").ok()?;
        let (point, count) = value.split_once('#').unwrap_or((&value, "1"));
        Some((point.to_owned(), count.parse().unwrap_or(1)))
    });
    let Some((point, count)) = target else { return };
    if point == name && SEEN.fetch_add(1, Ordering::SeqCst) + 1 == *count {
        eprintln!("aborting at {name}, as PALIMPSEST_ABORT_AT says");
        std::process::abort();
    }
}
