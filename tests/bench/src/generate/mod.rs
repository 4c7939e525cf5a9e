//! Traffic that iperf3 cannot make. Cheap, because it shares the machine with what it measures.

pub(crate) mod hostile;
pub(crate) mod many;
pub(crate) mod raw;
pub(crate) mod sessions;
pub(crate) mod socket;
pub(crate) mod steady;

use std::time::{Duration, Instant};

/// How late a sender may be whose packets are to arrive: 20 ms of them fit into any socket's buffer.
const GENTLE: Duration = Duration::from_millis(20);

/// Says how many packets are due at a fixed rate.
#[derive(Debug)]
pub(crate) struct Pace {
    rate: u64,
    began: Instant,
    length: Duration,
    at_once: u64,
    done: u64,
}

impl Pace {
    /// `rate` packets a second for `length`. What a late sender missed by more than `backlog` is not made up for, so
    /// that a wait for the CPU does not end in a burst.
    pub(crate) fn new(rate: u64, began: Instant, length: Duration, backlog: Duration) -> Pace {
        let at_once = (rate as f64 * backlog.as_secs_f64()) as u64 + 1;
        Pace { rate, began, length, at_once, done: 0 }
    }

    /// How many to send now; `None` when the time is up.
    pub(crate) fn due(&mut self, now: Instant) -> Option<u64> {
        let elapsed = now.saturating_duration_since(self.began);
        if elapsed >= self.length {
            return None;
        }
        let target = (elapsed.as_secs_f64() * self.rate as f64) as u64;
        let due = target.saturating_sub(self.done);
        self.done = self.done.max(target);
        Some(due.min(self.at_once))
    }

    /// Waits a moment, so that a few packets become due. Half a millisecond: short against any queue on the way.
    pub(crate) fn rest(&self) {
        std::thread::sleep(Duration::from_micros(500));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pace_gives_its_rate_and_ends() {
        let began = Instant::now();
        let mut pace = Pace::new(10_000, began, Duration::from_secs(1), GENTLE);
        let sum: u64 = (0..1000).filter_map(|ms| pace.due(began + Duration::from_millis(ms))).sum();
        assert_eq!(sum, 9_990);
        assert_eq!(pace.due(began + Duration::from_secs(1)), None);
    }

    #[test]
    fn what_was_missed_is_not_made_up_for_in_a_burst() {
        let began = Instant::now();
        let mut pace = Pace::new(10_000, began, Duration::from_secs(1), GENTLE);
        assert_eq!(pace.due(began + Duration::from_millis(500)), Some(201));
        assert_eq!(pace.due(began + Duration::from_millis(501)), Some(10));
    }
}
