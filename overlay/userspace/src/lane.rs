//! Order among threads that do the same work side by side: whoever reads first puts out first.
//!
//! A thread reads under the lane's lock and is given a turn. What it makes of what it read takes as long as it takes;
//! before it puts that out it waits until all earlier turns are over. So packets never overtake each other, and only
//! reading and writing are done one after the other.

use std::hint;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Condvar, Mutex};

// About 2 us: a turn that is due soon is not worth a sleep.
const SPINS: usize = 200;

/// One direction of traffic from one source.
#[derive(Debug, Default)]
pub struct Lane {
    // The number of the next turn; held while reading.
    reading: Mutex<u64>,
    // The number of the turn that puts out.
    serving: AtomicU64,
    sleeping: Mutex<()>,
    over: Condvar,
}

/// A place in the order, which ends when it is dropped.
#[derive(Debug)]
pub struct Turn<'a> {
    lane: &'a Lane,
    number: u64,
}

impl Lane {
    /// Reads, and takes a turn if there was anything. `None` also when another thread is reading.
    pub fn read<T>(&self, read: impl FnOnce() -> Option<T>) -> Option<(T, Turn<'_>)> {
        let next = self.reading.try_lock()?;
        let value = read()?;
        Some((value, self.take(next)))
    }

    /// Takes a turn behind all that has been read so far.
    pub fn enter(&self) -> Turn<'_> {
        self.take(self.reading.lock())
    }

    fn take(&self, mut next: parking_lot::MutexGuard<'_, u64>) -> Turn<'_> {
        let number = *next;
        *next += 1;
        Turn { lane: self, number }
    }
}

impl Turn<'_> {
    /// Waits until all earlier turns are over. Hold no lock that one of those may want.
    pub fn wait(&mut self) {
        for _ in 0..SPINS {
            if self.is_due() {
                return;
            }
            hint::spin_loop();
        }
        let mut sleeping = self.lane.sleeping.lock();
        while !self.is_due() {
            self.lane.over.wait(&mut sleeping);
        }
    }

    fn is_due(&self) -> bool {
        self.lane.serving.load(Ordering::Acquire) == self.number
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.wait();
        self.lane.serving.store(self.number + 1, Ordering::Release);
        // Whoever has found its turn not due holds this lock until it sleeps.
        drop(self.lane.sleeping.lock());
        self.lane.over.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::thread;

    #[test]
    fn threads_put_out_in_the_order_in_which_they_read() {
        let (lane, source, sink) =
            (Lane::default(), Mutex::new(0..20_000u32), Mutex::new(Vec::with_capacity(20_000)));
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    loop {
                        match lane.read(|| source.lock().next()) {
                            Some((number, mut turn)) => {
                                for _ in 0..(number * 7919) % 500 {
                                    hint::spin_loop();
                                }
                                turn.wait();
                                sink.lock().push(number);
                            }
                            None if source.lock().is_empty() => break,
                            None => thread::yield_now(),
                        }
                    }
                });
            }
        });
        assert_eq!(sink.into_inner(), (0..20_000).collect::<Vec<_>>());
    }

    #[test]
    fn a_turn_that_is_given_up_lets_the_next_one_go() {
        let lane = Lane::default();
        let (_, first) = lane.read(|| Some(())).unwrap();
        drop(first);
        let mut second = lane.enter();
        second.wait();
    }

    #[test]
    fn reading_nothing_takes_no_turn_and_a_second_reader_is_turned_away() {
        let lane = Arc::new(Lane::default());
        assert!(lane.read(|| None::<()>).is_none());
        let inner = Arc::clone(&lane);
        let nested = lane.read(|| Some(inner.read(|| Some(())).is_none())).map(|(refused, _turn)| refused);
        assert_eq!(nested, Some(true));
        lane.enter().wait();
    }
}
