//! How a test ends the agent in the middle of its work: with `SENNIT_CRASH_AFTER=N`, and in builds with debug assertions only, it aborts
//! after its N-th write to the host.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

static WRITES: AtomicUsize = AtomicUsize::new(0);
static LIMIT: OnceLock<Option<usize>> = OnceLock::new();

/// The host was changed.
pub(super) fn after_write() {
    if !cfg!(debug_assertions) {
        return;
    }
    let limit = LIMIT.get_or_init(|| std::env::var("SENNIT_CRASH_AFTER").ok()?.parse().ok());
    if limit.is_some_and(|limit| WRITES.fetch_add(1, Ordering::Relaxed) + 1 >= limit) {
        std::process::abort();
    }
}
