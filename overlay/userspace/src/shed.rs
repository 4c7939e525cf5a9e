//! Which part of a flood of handshake initiations the kernel is to drop before it costs a system call.
//!
//! What arrives beyond its budget would be dropped unread anyway; here it is measured how much that is, and of each class
//! of senders only the share is let through that its budget has room for. The kernel's part is
//! [`crate::sys::udp::filter`].

use std::collections::HashSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// Who sends an initiation while we are under load. Each has a budget of its own, so that none keeps the others out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// From an address where no peer is, and without a cookie.
    Stranger = 0,
    /// From an address where a peer is, and without a cookie.
    Familiar = 1,
    /// With what may be a cookie.
    Claiming = 2,
}

/// How many classes there are.
pub const CLASSES: usize = 3;
/// The share that is a whole.
pub const ALL: u32 = 1 << 16;
/// More addresses than these do not fit into a filter; then nothing is dropped in the kernel.
pub const MOST_FAMILIAR: usize = 2048;

// Over less time a share says little.
const PERIOD: Duration = Duration::from_millis(900);

/// Odd numbers without a pattern.
pub const MIX: [u32; 4] = [0x9e37_79b1, 0x85eb_ca77, 0xc2b2_ae3d, 0x27d4_eb2f];

/// The number that an address counts as, in the kernel's filter and here. For IPv4 it is the address; who finds another IPv6
/// address of a peer's number knows the peer's, and can as well use that.
pub fn number(address: IpAddr) -> u32 {
    match address.to_canonical() {
        IpAddr::V4(v4) => v4.into(),
        IpAddr::V6(v6) => {
            let bits = u128::from(v6);
            MIX.iter()
                .enumerate()
                .fold(0, |mixed, (i, mix)| mixed ^ ((bits >> (96 - 32 * i)) as u32).wrapping_mul(*mix))
        }
    }
}

/// What the kernel is to let through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shedding {
    /// The share of each [`Class`] that is let through, in 1/65,536.
    pub shares: [u32; CLASSES],
    /// Where peers are, in order.
    pub familiar: Vec<IpAddr>,
}

impl Shedding {
    /// Everything is let through.
    pub const NONE: Self = Self { shares: [ALL; CLASSES], familiar: Vec::new() };

    /// Whether everything is let through.
    pub fn is_none(&self) -> bool {
        self.shares == [ALL; CLASSES]
    }
}

/// Measures what arrives and decides what is let through.
#[derive(Debug)]
pub struct Shedder {
    budgets: [u64; CLASSES],
    arrived: [u64; CLASSES],
    since: Option<Instant>,
    current: Shedding,
    able: bool,
}

impl Shedder {
    /// A shedder that lets about so many of each class through a second.
    pub fn new(budgets: [u64; CLASSES]) -> Self {
        Self { budgets, arrived: [0; CLASSES], since: None, current: Shedding::NONE, able: true }
    }

    /// An initiation has arrived that the kernel has judged: of several that arrive joined, only the first is one.
    pub fn note(&mut self, class: Class) {
        let arrived = &mut self.arrived[class as usize];
        *arrived = arrived.saturating_add(1);
    }

    /// Whether anything is dropped in the kernel.
    pub fn is_shedding(&self) -> bool {
        !self.current.is_none()
    }

    /// The kernel does not do it: nothing is asked of it any more.
    pub fn give_up(&mut self) {
        self.able = false;
        self.current = Shedding::NONE;
    }

    /// What the kernel is to let through from now on. To be asked about once a second.
    pub fn decide(&mut self, familiar: &HashSet<IpAddr>, now: Instant) -> &Shedding {
        let since = *self.since.get_or_insert(now);
        let passed = now.saturating_duration_since(since);
        if self.able && passed >= PERIOD {
            self.since = Some(now);
            let rates = std::mem::take(&mut self.arrived).map(|count| count as f64 / passed.as_secs_f64());
            self.current = self.next(rates, familiar);
        }
        &self.current
    }

    fn next(&self, rates: [f64; CLASSES], familiar: &HashSet<IpAddr>) -> Shedding {
        let mut next = Shedding::NONE;
        if familiar.len() > MOST_FAMILIAR {
            return next;
        }
        for (class, share) in next.shares.iter_mut().enumerate() {
            *share = self.share(class, rates[class]);
        }
        if !next.is_none() {
            next.familiar = familiar.iter().copied().collect();
            next.familiar.sort_unstable();
        }
        next
    }

    // `rate` is that of those which the kernel has let through.
    fn share(&self, class: usize, rate: f64) -> u32 {
        let (budget, before) = (self.budgets[class] as f64, self.current.shares[class]);
        let sent = rate * f64::from(ALL) / f64::from(before.max(1));
        if sent <= budget {
            return ALL;
        }
        let share = (budget / sent * f64::from(ALL)).clamp(1.0, f64::from(ALL)) as u32;
        // Chance makes rates waver; a filter that is as good as the new one stays.
        if before != ALL && share.abs_diff(before) <= before / 4 { before } else { share }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Flood {
        shedder: Shedder,
        familiar: HashSet<IpAddr>,
        now: Instant,
    }

    impl Flood {
        fn new() -> Self {
            let mut flood = Self {
                shedder: Shedder::new([5_000, 20_000, 20_000]),
                familiar: HashSet::from([IpAddr::from([192, 0, 2, 1])]),
                now: Instant::now(),
            };
            assert!(flood.shedder.decide(&flood.familiar, flood.now).is_none());
            flood
        }

        // A second in which so many are sent; those that the kernel lets through arrive.
        fn second(&mut self, sent: [u64; CLASSES]) -> Shedding {
            for (class, sent) in [Class::Stranger, Class::Familiar, Class::Claiming].into_iter().zip(sent) {
                for _ in 0..sent * u64::from(self.shedder.current.shares[class as usize]) / u64::from(ALL) {
                    self.shedder.note(class);
                }
            }
            self.now += Duration::from_secs(1);
            self.shedder.decide(&self.familiar, self.now).clone()
        }
    }

    #[test]
    fn of_a_flood_the_budget_is_let_through_and_of_others_all() {
        let mut flood = Flood::new();
        let shedding = flood.second([100_000, 10, 19_000]);
        assert_eq!(shedding.shares, [ALL / 20, ALL, ALL]);
        assert_eq!(shedding.familiar, [IpAddr::from([192, 0, 2, 1])]);
        assert!(flood.shedder.is_shedding());
    }

    #[test]
    fn a_filter_that_is_still_right_stays_and_another_follows_the_flood() {
        let mut flood = Flood::new();
        let first = flood.second([100_000, 0, 0]);
        assert_eq!(flood.second([100_000, 0, 0]), first);
        assert_eq!(flood.second([110_000, 0, 0]), first);
        let larger = flood.second([200_000, 0, 0]);
        assert!(larger.shares[0].abs_diff(ALL / 40) <= 1, "{larger:?}");
        flood.familiar.insert(IpAddr::from([192, 0, 2, 0]));
        let moved = flood.second([200_000, 0, 0]);
        assert_eq!(moved.shares, larger.shares);
        assert_eq!(moved.familiar, [[192, 0, 2, 0], [192, 0, 2, 1]].map(IpAddr::from));
    }

    #[test]
    fn it_ends_with_the_flood() {
        let mut flood = Flood::new();
        assert!(!flood.second([100_000, 0, 0]).is_none());
        assert_eq!(flood.second([4_000, 0, 0]), Shedding::NONE);
        assert!(!flood.shedder.is_shedding());
    }

    #[test]
    fn false_cookies_are_shed_too() {
        let mut flood = Flood::new();
        assert_eq!(flood.second([0, 40_000, 80_000]).shares, [ALL, ALL / 2, ALL / 4]);
    }

    #[test]
    fn nothing_is_asked_of_a_kernel_that_cannot_or_with_too_many_peers() {
        let mut flood = Flood::new();
        flood.familiar = (0..=MOST_FAMILIAR as u32).map(|i| IpAddr::from(i.to_be_bytes())).collect();
        assert!(flood.second([100_000, 0, 0]).is_none());
        flood.familiar.clear();
        assert!(!flood.second([100_000, 0, 0]).is_none());
        flood.shedder.give_up();
        assert!(flood.second([100_000, 0, 0]).is_none());
        assert!(!flood.shedder.is_shedding());
    }

    #[test]
    fn a_moment_is_too_short_to_judge_by() {
        let mut flood = Flood::new();
        for _ in 0..50_000 {
            flood.shedder.note(Class::Stranger);
        }
        let soon = flood.now + Duration::from_millis(100);
        assert!(flood.shedder.decide(&flood.familiar, soon).is_none());
        flood.now += Duration::from_secs(1);
        assert!(!flood.shedder.decide(&flood.familiar, flood.now).is_none());
    }
}
