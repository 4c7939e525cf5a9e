//! Destinations for which the kernel refused to split a train, mostly because the path there has a small MTU.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

const FORGOTTEN_AFTER: Duration = Duration::from_secs(60);
const MAX: usize = 1024;

/// What was refused lately, for a bounded number of destinations.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    known: HashMap<IpAddr, Refusal>,
}

#[derive(Clone, Copy, Debug)]
struct Refusal {
    // Bytes per datagram; no more were refused.
    from: usize,
    since: Instant,
}

impl Refusal {
    fn holds(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.since) < FORGOTTEN_AFTER
    }
}

impl Refusals {
    /// Whether trains of `segment` bytes per datagram are worth trying.
    pub(super) fn allow(&self, to: IpAddr, segment: usize, now: Instant) -> bool {
        // Nearly always there are none.
        self.known.is_empty()
            || self.known.get(&to).is_none_or(|refusal| segment < refusal.from || !refusal.holds(now))
    }

    /// Trains of `segment` bytes per datagram, or more, were refused.
    pub(super) fn note(&mut self, to: IpAddr, segment: usize, now: Instant) {
        let before = self.known.get(&to).filter(|refusal| refusal.holds(now));
        let from = before.map_or(segment, |before| before.from.min(segment));
        if before.is_none() && self.known.len() >= MAX {
            self.known.retain(|_, refusal| refusal.holds(now));
            if self.known.len() >= MAX {
                let oldest = self.known.iter().min_by_key(|(_, refusal)| refusal.since).map(|(to, _)| *to);
                oldest.map(|to| self.known.remove(&to));
            }
        }
        self.known.insert(to, Refusal { from, since: now });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(n: usize) -> IpAddr {
        std::net::Ipv4Addr::from(n as u32).into()
    }

    #[test]
    fn a_refusal_is_for_one_destination_and_no_smaller_datagrams_and_for_a_minute() {
        let (mut refusals, start) = (Refusals::default(), Instant::now());
        refusals.note(address(1), 1400, start);
        let later = |seconds| start + Duration::from_secs(seconds);
        assert!(!refusals.allow(address(1), 1400, later(59)));
        assert!(!refusals.allow(address(1), 1452, later(59)));
        assert!(refusals.allow(address(1), 1399, start));
        assert!(refusals.allow(address(2), 1400, start));
        assert!(refusals.allow(address(1), 1400, later(60)));

        refusals.note(address(1), 1300, later(30));
        assert!(!refusals.allow(address(1), 1300, later(89)));
        refusals.note(address(1), 1500, later(200));
        assert!(refusals.allow(address(1), 1400, later(200)), "the old refusal counts no more");
    }

    #[test]
    fn there_are_never_more_than_so_many_and_the_oldest_goes_first() {
        let (mut refusals, start) = (Refusals::default(), Instant::now());
        for n in 0..=MAX {
            refusals.note(address(n), 100, start + Duration::from_millis(n as u64));
        }
        assert_eq!(refusals.known.len(), MAX);
        assert!(refusals.allow(address(0), 100, start));
        assert!(!refusals.allow(address(1), 100, start));
        assert!(!refusals.allow(address(MAX), 100, start));
        refusals.note(address(0), 100, start + Duration::from_secs(100));
        assert_eq!(refusals.known.len(), 1, "what holds no more goes before what does");
    }
}
