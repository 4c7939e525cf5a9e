//! How large a packet a path carries, found by padded probes (packetization layer path MTU discovery, RFC 8899), so that
//! a path whose ICMP is filtered is found all the same.
//!
//! It begins with the most that our own side carries, which is right nearly everywhere. When packets of a size that was right get
//! lost while small ones arrive, a search sends all usual sizes at once, several times against chance, and then narrows down.

use std::time::{Duration, Instant};

/// Link and tunnel MTUs that are met in the field, in bytes.
const USUAL: [u16; 24] = [
    9000, 8000, 4352, 2304, 1500, 1492, 1480, 1472, 1460, 1450, 1440, 1430, 1420, 1400, 1380, 1360, 1340,
    1320, 1300, 1280, 1200, 1024, 768, 576,
];
/// Every IPv4 host takes packets of so many bytes (RFC 1122, section 3.3.2).
const LEAST: u16 = 576;
/// More is never sent in one probe, so that more is never confirmed.
const MOST: u16 = super::wire::MOST as u16;
/// So many packets of the right size have to be lost in a row, while small ones arrive, before it is doubted. At 30 % loss each way
/// that happens to one in two hundred.
const DOUBT_AFTER: u32 = 8;
/// How often each size is sent in a search.
const ROUNDS: u8 = 8;
/// What a search is content with, in bytes.
const GRAIN: u16 = 8;
/// Sizes that are tried at once when narrowing down.
const CUTS: u16 = 7;
/// How long between the rounds of a search, and between packets that ask again for a size in doubt.
pub const ROUND: Duration = Duration::from_millis(100);
/// How long until more is tried again than what was found (RFC 8899, section 5.1.1: PMTU_RAISE_TIMER is 600 s).
const RAISE: Duration = Duration::from_secs(600);

#[derive(Debug, Clone)]
struct Search {
    sizes: Vec<u16>,
    best: u16,
    // The smallest size that is known not to pass.
    wall: u16,
    round: u8,
    at: Instant,
    // Something smaller than what is looked for was answered meanwhile.
    small: bool,
}

/// What is known of one path's MTU.
#[derive(Debug, Clone)]
pub struct Pmtu {
    most: u16,
    confirmed: Option<u16>,
    lost: u32,
    lost_since: Option<Instant>,
    again: Option<Instant>,
    search: Option<Search>,
    raise_at: Option<Instant>,
    // More than what was found is being tried; that stays in force meanwhile.
    raising: bool,
}

impl Pmtu {
    /// Nothing is known but what our own side carries, in bytes.
    pub fn new(most: u16) -> Self {
        Self {
            most: most.clamp(LEAST, MOST),
            confirmed: None,
            lost: 0,
            lost_since: None,
            again: None,
            search: None,
            raise_at: None,
            raising: false,
        }
    }

    /// What was confirmed, in bytes; during a search the largest size that has been answered in it.
    pub fn confirmed(&self) -> Option<u16> {
        let found = self.search.as_ref().map(|search| search.best).filter(|best| *best > 0);
        found.or(self.confirmed)
    }

    /// Our own side carries another size now.
    pub fn set_most(&mut self, most: u16) {
        let most = most.clamp(LEAST, MOST);
        if most != self.most {
            *self = Self::new(most);
        }
    }

    /// The path is new, or was gone: another way may lie behind its address.
    pub fn forget(&mut self) {
        *self = Self::new(self.most);
    }

    /// The size of a question that is due anyway, in bytes of IP.
    pub fn size(&mut self, now: Instant) -> u16 {
        if self.raise_at.is_some_and(|at| now >= at) {
            (self.raise_at, self.lost, self.lost_since) = (None, 0, None);
            self.raising = true;
        }
        self.full()
    }

    fn full(&self) -> u16 {
        self.confirmed.filter(|_| !self.raising).unwrap_or(self.most)
    }

    /// Whether questions of this size tell about the MTU.
    pub fn is_full(&self, size: u16) -> bool {
        size == self.full()
    }

    /// Sizes to ask for now, beside what is due anyway.
    pub fn due(&mut self, now: Instant) -> Vec<u16> {
        if let Some(search) = &mut self.search {
            if now < search.at {
                return Vec::new();
            }
            search.at = now + ROUND;
            search.round += 1;
            if search.round <= ROUNDS {
                return search.sizes.iter().copied().filter(|size| *size > search.best).collect();
            }
            // A round more, for answers that are under way.
            if search.round == ROUNDS + 1 {
                search.at = now + ROUND * 3;
                return Vec::new();
            }
            self.narrow(now);
            return self.due(now);
        }
        if self.again.is_some_and(|at| now >= at) {
            self.again = Some(now + ROUND);
            return vec![self.size(now)];
        }
        Vec::new()
    }

    /// When [`Pmtu::due`] has something to say.
    pub fn wake_at(&self) -> Option<Instant> {
        self.search.as_ref().map(|search| search.at).or(self.again)
    }

    fn narrow(&mut self, now: Instant) {
        let Some(search) = self.search.take() else { return };
        let wall =
            search.sizes.iter().copied().filter(|size| *size > search.best).min().unwrap_or(search.wall);
        let best = search.best.max(LEAST);
        if search.best == 0 && !search.small {
            // Nothing at all has passed: that is no question of size.
            (self.again, self.lost, self.lost_since) = (None, 0, None);
            return;
        }
        if search.best == 0 || wall.saturating_sub(best) <= GRAIN {
            self.found(best, now);
            return;
        }
        let step = ((wall - best) / (CUTS + 1)).max(GRAIN / 2);
        let sizes = (1..=CUTS).map(|cut| best + cut * step).filter(|size| *size < wall).collect();
        self.search = Some(Search { sizes, best, wall, round: ROUNDS / 2, at: now, small: false });
    }

    fn found(&mut self, size: u16, now: Instant) {
        self.confirmed = Some(size);
        (self.search, self.again, self.lost, self.lost_since, self.raising) = (None, None, 0, None, false);
        self.raise_at = (size < self.most).then(|| now + RAISE);
    }

    /// A question of `size` bytes was answered.
    pub fn answered(&mut self, size: u16, now: Instant) {
        if let Some(search) = &mut self.search {
            if size < LEAST {
                search.small = true;
                return;
            }
            search.best = search.best.max(size);
            if search.best >= self.most {
                self.found(self.most, now);
            }
        } else if self.confirmed == Some(size) && !self.raising {
            (self.lost, self.lost_since, self.again) = (0, None, None);
        } else if self.is_full(size) {
            self.found(size, now);
        }
    }

    /// A question of `size` bytes, asked at `asked`, was not answered; the path answered last at `answered`.
    pub fn lost(&mut self, size: u16, asked: Instant, answered: Option<Instant>, now: Instant) {
        if self.search.is_some() || !self.is_full(size) {
            return;
        }
        self.lost += 1;
        self.again = self.again.or(Some(now));
        let since = *self.lost_since.get_or_insert(asked);
        if self.lost >= DOUBT_AFTER && answered.is_some_and(|answered| answered > since) {
            if let Some(confirmed) = self.confirmed.filter(|_| self.raising) {
                self.found(confirmed, now);
                return;
            }
            let most = self.confirmed.unwrap_or(self.most);
            let sizes = [most].into_iter().chain(USUAL.into_iter().filter(|size| *size < most)).collect();
            self.search = Some(Search { sizes, best: 0, wall: most, round: 0, at: now, small: false });
            self.again = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // A path that carries `mtu` bytes and loses every `nth` packet.
    struct Path {
        pmtu: Pmtu,
        now: Instant,
        mtu: u16,
        nth: u32,
        sent: u32,
    }

    impl Path {
        fn new(most: u16, mtu: u16) -> Self {
            Self { pmtu: Pmtu::new(most), now: Instant::now(), mtu, nth: u32::MAX, sent: 0 }
        }

        fn ask(&mut self, size: u16) {
            self.sent += 1;
            // As lines do, small ones are asked beside.
            self.pmtu.answered(100, self.now);
            if size <= self.mtu && !self.sent.is_multiple_of(self.nth) {
                self.pmtu.answered(size, self.now);
            } else {
                let asked = self.now;
                self.now += Duration::from_millis(1);
                self.pmtu.lost(size, asked, Some(self.now), self.now);
            }
        }

        // How long until a size is confirmed and nothing is in doubt.
        fn settle(&mut self) -> (Option<u16>, Duration) {
            let begun = self.now;
            let size = self.pmtu.size(self.now);
            self.ask(size);
            while let Some(at) = self.pmtu.wake_at() {
                self.now = self.now.max(at);
                for size in self.pmtu.due(self.now) {
                    self.ask(size);
                }
                assert!(self.now - begun < Duration::from_secs(60));
            }
            (self.pmtu.confirmed(), self.now - begun)
        }
    }

    #[test]
    fn what_our_own_side_carries_is_confirmed_by_one_answer() {
        let mut path = Path::new(1500, 9000);
        assert_eq!(path.settle(), (Some(1500), Duration::ZERO));
        assert_eq!(path.sent, 1);
    }

    #[test]
    fn every_smaller_mtu_is_found_within_some_bytes_and_seconds() {
        for most in [1500, 9000] {
            for mtu in (600..most).step_by(7) {
                let mut path = Path::new(most, mtu);
                let (found, took) = path.settle();
                let found = found.unwrap();
                assert!(found <= mtu && mtu - found < 2 * GRAIN, "{most}: {mtu}, found {found}");
                assert!(took < Duration::from_secs(7), "{mtu}: {took:?}");
            }
        }
    }

    #[test]
    fn an_mtu_that_shrinks_is_found_and_one_that_grows_later_too() {
        let mut path = Path::new(1500, 1500);
        path.settle();
        path.mtu = 1300;
        let (found, took) = path.settle();
        assert_eq!(found, Some(1300));
        assert!(took < Duration::from_secs(5), "{took:?}");
        // Still as narrow: what was found stays in force all the time.
        path.now += RAISE;
        assert_eq!(path.pmtu.size(path.now), 1500);
        assert_eq!(path.pmtu.confirmed(), Some(1300));
        assert_eq!(path.settle().0, Some(1300));
        path.mtu = 1500;
        path.now += RAISE;
        assert_eq!(path.settle().0, Some(1500));
    }

    #[test]
    fn loss_alone_shrinks_nothing() {
        let mut path = Path::new(1500, 1500);
        path.nth = 2;
        for _ in 0..1000 {
            assert_eq!(path.settle().0, Some(1500));
        }
    }

    #[test]
    fn a_path_that_carries_only_small_packets_ends_at_the_least() {
        let mut path = Path::new(1500, 100);
        assert_eq!(path.settle().0, Some(LEAST));
    }
}
