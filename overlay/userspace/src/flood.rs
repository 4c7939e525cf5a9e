//! How many handshake messages are worth an answer: for the device as a whole, and for one source under load.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

const WINDOW: Duration = Duration::from_secs(1);
// 20 handshakes a second from one source, 5 of them at once, as in the Linux driver.
const COST: Duration = Duration::from_millis(50);
const BURST: u32 = 5;
// Sources remembered, in two generations of this size.
const GENERATION: usize = 4096;

/// Handshake messages of the running second.
#[derive(Debug)]
pub struct Window {
    limit: u64,
    count: u64,
    began: Option<Instant>,
}

impl Window {
    /// A window that lets this many through a second.
    pub fn new(limit: u64) -> Self {
        Self { limit, count: 0, began: None }
    }

    /// Whether another message would be within the limit.
    pub fn is_open(&self, now: Instant) -> bool {
        self.count < self.limit
            || self.began.is_none_or(|began| now.saturating_duration_since(began) >= WINDOW)
    }

    /// Counts one message, and tells whether it is within the limit.
    pub fn take(&mut self, now: Instant) -> bool {
        if self.began.is_none_or(|began| now.saturating_duration_since(began) >= WINDOW) {
            self.began = Some(now);
            self.count = 0;
        }
        self.count = self.count.saturating_add(1);
        self.count <= self.limit
    }
}

// What one host can have many of counts as one: an IPv6 /64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Source {
    V4([u8; 4]),
    V6([u8; 8]),
}

impl From<IpAddr> for Source {
    fn from(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(v4) => Self::V4(v4.octets()),
            IpAddr::V6(v6) => {
                let [a, b, c, d, e, f, g, h, ..] = v6.octets();
                Self::V6([a, b, c, d, e, f, g, h])
            }
        }
    }
}

#[derive(Debug)]
struct Bucket {
    credit: Duration,
    filled: Instant,
}

impl Bucket {
    fn take(&mut self, now: Instant) -> bool {
        let gained = now.saturating_duration_since(self.filled);
        self.credit = self.credit.saturating_add(gained).min(COST * BURST);
        self.filled = self.filled.max(now);
        match self.credit.checked_sub(COST) {
            Some(rest) => {
                self.credit = rest;
                true
            }
            None => false,
        }
    }
}

/// A token bucket for each of the sources seen last.
#[derive(Debug, Default)]
pub struct Buckets {
    young: HashMap<Source, Bucket>,
    old: HashMap<Source, Bucket>,
}

impl Buckets {
    /// Takes one handshake message from a source's bucket; false when it is empty.
    pub fn take(&mut self, from: IpAddr, now: Instant) -> bool {
        let source = Source::from(from);
        if let Some(bucket) = self.young.get_mut(&source) {
            return bucket.take(now);
        }
        if self.young.len() >= GENERATION {
            self.old = std::mem::take(&mut self.young);
        }
        let mut bucket = self.old.remove(&source).unwrap_or(Bucket { credit: COST * BURST, filled: now });
        let taken = bucket.take(now);
        self.young.insert(source, bucket);
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_gets_its_burst_and_then_its_rate() {
        let (mut buckets, began) = (Buckets::default(), Instant::now());
        let source = IpAddr::from([192, 0, 2, 1]);
        let passed = |buckets: &mut Buckets, at: u64, tries: usize| {
            let now = began + Duration::from_millis(at);
            (0..tries).filter(|_| buckets.take(source, now)).count()
        };
        assert_eq!(passed(&mut buckets, 0, 100), 5);
        assert_eq!(passed(&mut buckets, 49, 100), 0);
        assert_eq!((1..=1000).map(|i| passed(&mut buckets, 49 + i, 3)).sum::<usize>(), 20);
        assert_eq!(passed(&mut buckets, 100_000, 100), 5, "credit does not pile up");
    }

    #[test]
    fn a_64_is_one_source_and_neighbours_are_others() {
        let (mut buckets, now) = (Buckets::default(), Instant::now());
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        for i in 0..5 {
            assert!(buckets.take(address(&format!("2001:db8::{i}")), now));
        }
        assert!(!buckets.take(address("2001:db8::ffff"), now));
        assert!(buckets.take(address("2001:db8:0:1::1"), now));
        assert!(buckets.take(address("192.0.2.1"), now));
    }

    #[test]
    fn the_table_is_bounded_and_forgets_those_seen_longest_ago() {
        let (mut buckets, now) = (Buckets::default(), Instant::now());
        let loud = IpAddr::from([192, 0, 2, 1]);
        while buckets.take(loud, now) {}
        for i in 0..10 * GENERATION as u32 {
            buckets.take(IpAddr::from((0x0a00_0000 + i).to_be_bytes()), now);
            assert!(!buckets.take(loud, now), "who keeps sending is not forgotten");
        }
        assert!(buckets.young.len() + buckets.old.len() <= 2 * GENERATION);
    }

    #[test]
    fn a_window_lets_its_limit_through_every_second() {
        let (mut window, now) = (Window::new(3), Instant::now());
        assert_eq!((0..10).filter(|_| window.take(now)).count(), 3);
        assert!(!window.take(now + Duration::from_millis(999)));
        assert!(window.take(now + WINDOW));
    }
}
