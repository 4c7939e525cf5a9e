//! Pods of one workload have the same labels and ports: each of these is held once, however many pods there are.

use std::collections::HashSet;
use std::hash::Hash;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

/// Values of which many are equal.
pub(super) struct Pool<T>(LazyLock<Mutex<Held<T>>>);

struct Held<T> {
    values: HashSet<Arc<T>>,
    // When so many are held, those that nobody else holds are let go.
    sweep_at: usize,
}

const SWEEP_LEAST: usize = 1024;

impl<T: Eq + Hash> Pool<T> {
    pub(super) const fn new() -> Self {
        Self(LazyLock::new(|| Mutex::new(Held { values: HashSet::new(), sweep_at: SWEEP_LEAST })))
    }

    /// The value that is equal to this one.
    pub(super) fn share(&self, value: T) -> Arc<T> {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(same) = held.values.get(&value) {
            return Arc::clone(same);
        }
        if held.values.len() >= held.sweep_at {
            held.values.retain(|value| Arc::strong_count(value) > 1);
            held.sweep_at = (held.values.len() * 2).max(SWEEP_LEAST);
        }
        let value = Arc::new(value);
        held.values.insert(Arc::clone(&value));
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_values_are_one_and_those_of_nobody_are_let_go() {
        static POOL: Pool<usize> = Pool::new();
        let kept = POOL.share(7);
        assert!(Arc::ptr_eq(&kept, &POOL.share(7)));
        for value in 100..100 + 3 * SWEEP_LEAST {
            POOL.share(value);
        }
        assert!(POOL.0.lock().unwrap().values.len() <= SWEEP_LEAST);
        assert!(Arc::ptr_eq(&kept, &POOL.share(7)), "what somebody holds stays");
    }
}
