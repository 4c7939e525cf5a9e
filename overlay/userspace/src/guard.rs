//! What is done with handshake messages when there are many of them.

use std::collections::HashSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use crate::flood::{Buckets, Window};
use crate::noise::Message;
use crate::shed::{Class, Shedder, Shedding, number};

/// Handshake messages a second, under load, that are worth a look at their MACs and an answer. Each costs some 3 us,
/// most of it for the cookie reply; beyond, they are dropped unseen.
pub const COOKIES_PER_SECOND: u64 = 20_000;
/// The same for messages without a cookie from addresses where no peer is.
pub const STRANGERS_PER_SECOND: u64 = 5_000;

// After too many initiations in one second nobody is answered without a cookie for another one (the same in the Linux
// driver, drivers/net/wireguard/receive.c): a flood does not get the expensive part of each second.
const LOADED_FOR: Duration = Duration::from_secs(1);

/// Counts handshake messages, and says which are worth what.
#[derive(Debug)]
pub struct Guard {
    initiations: Window,
    loaded_until: Option<Instant>,
    // Apart, so that the answers to what we ask for ourselves get through while everyone else asks us.
    responses: Window,
    sources: Buckets,
    // Under load, by class.
    budgets: [Window; 3],
    // Where peers are, and the numbers of those addresses, by which the kernel knows them.
    known: HashSet<IpAddr>,
    numbers: HashSet<u32>,
    // Whether strangers have been dropped since the last look.
    pressed: bool,
    shedder: Shedder,
}

impl Guard {
    /// A guard that asks for cookies beyond `limit` initiations and as many responses a second.
    pub fn new(limit: u64) -> Self {
        let budgets = [STRANGERS_PER_SECOND, COOKIES_PER_SECOND, COOKIES_PER_SECOND];
        Self {
            initiations: Window::new(limit),
            loaded_until: None,
            responses: Window::new(limit),
            sources: Buckets::default(),
            budgets: budgets.map(Window::new),
            known: HashSet::new(),
            numbers: HashSet::new(),
            pressed: false,
            shedder: Shedder::new(budgets),
        }
    }

    /// Whether a message of this kind would be taken without a cookie.
    pub fn is_open(&self, message: Message, now: Instant) -> bool {
        match message {
            Message::Response(_) => self.responses.is_open(now),
            _ => self.loaded_until.is_none_or(|until| now >= until) && self.initiations.is_open(now),
        }
    }

    /// Counts a message whose first MAC is right. Returns whether it is taken without a cookie.
    pub fn count(&mut self, message: Message, now: Instant) -> bool {
        if let Message::Response(_) = message {
            return self.responses.take(now);
        }
        let within = self.initiations.take(now);
        let open = self.loaded_until.is_none_or(|until| now >= until);
        if !within {
            self.loaded_until = Some(now + LOADED_FOR);
        }
        within && open
    }

    /// Under load: whether a message is worth a look at its MACs. `first` says that it came alone, or before those that it
    /// came joined with.
    pub fn take(
        &mut self,
        message: Message,
        datagram: &[u8],
        from: IpAddr,
        first: bool,
        now: Instant,
    ) -> bool {
        let class = self.class(datagram, from);
        if message == Message::Initiation && first {
            self.shedder.note(class);
        }
        let taken = self.budgets[class as usize].take(now);
        self.pressed |= !taken && class == Class::Stranger;
        taken
    }

    fn class(&self, datagram: &[u8], from: IpAddr) -> Class {
        // The last 16 bytes are the MAC under the cookie, zero without one (WireGuard paper, section 5.4.4).
        if datagram.last_chunk::<16>().is_some_and(|mac2| *mac2 != [0; 16]) {
            Class::Claiming
        } else if self.numbers.contains(&number(from)) {
            Class::Familiar
        } else {
            Class::Stranger
        }
    }

    /// Under load: whether this sender, whose address is proven, has not sent too many.
    pub fn take_from(&mut self, from: IpAddr, now: Instant) -> bool {
        self.sources.take(from, now)
    }

    /// Whether it matters where peers are: strangers have been dropped since this was last asked, or are in the kernel.
    pub fn is_pressed(&mut self) -> bool {
        std::mem::take(&mut self.pressed) || self.shedder.is_shedding()
    }

    /// Where peers are: from there, messages without a cookie do not compete with those of strangers.
    pub fn know(&mut self, addresses: HashSet<IpAddr>) {
        self.numbers = addresses.iter().copied().map(number).collect();
        self.known = addresses;
    }

    /// What the kernel is to let through from now on. To be asked about once a second.
    pub fn shedding(&mut self, now: Instant) -> &Shedding {
        self.shedder.decide(&self.known, now)
    }

    /// The kernel does not drop for us.
    pub fn give_up_shedding(&mut self) {
        self.shedder.give_up();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    #[test]
    fn who_comes_within_the_limit_needs_no_cookie() {
        let (mut guard, now) = (Guard::new(3), Instant::now());
        for second in 0..5 {
            for _ in 0..3 {
                assert!(guard.is_open(Message::Initiation, now + seconds(second)));
                assert!(guard.count(Message::Initiation, now + seconds(second)));
            }
        }
    }

    #[test]
    fn while_a_flood_lasts_nobody_is_taken_without_a_cookie() {
        let (mut guard, began) = (Guard::new(3), Instant::now());
        let taken = (0..1000).filter(|i| guard.count(Message::Initiation, began + seconds(1) * *i / 100));
        assert_eq!(taken.count(), 3, "those of the first second alone");
        let after = began + seconds(10) + LOADED_FOR;
        assert!(guard.is_open(Message::Initiation, after) && guard.count(Message::Initiation, after));
    }

    #[test]
    fn answers_are_counted_apart() {
        let (mut guard, now) = (Guard::new(1), Instant::now());
        while guard.count(Message::Initiation, now) {}
        assert!(!guard.is_open(Message::Initiation, now));
        assert!(guard.is_open(Message::Response(1), now) && guard.count(Message::Response(1), now));
        assert!(!guard.count(Message::Response(1), now));
        assert!(guard.is_open(Message::Response(1), now + seconds(1)));
    }

    #[test]
    fn what_the_kernel_has_not_judged_does_not_make_it_drop_more() {
        let (mut guard, now) = (Guard::new(0), Instant::now());
        let from = IpAddr::from([198, 51, 100, 1]);
        assert!(guard.shedding(now).is_none());
        for _ in 0..10 * STRANGERS_PER_SECOND {
            guard.take(Message::Initiation, &[0; 148], from, false, now);
        }
        assert!(guard.shedding(now + seconds(1)).is_none());
    }

    #[test]
    fn a_flood_of_strangers_is_shed_and_peers_are_known_while_it_lasts() {
        let (mut guard, mut now) = (Guard::new(0), Instant::now());
        let from = IpAddr::from([198, 51, 100, 1]);
        assert!(guard.shedding(now).is_none());
        for _ in 0..10 * STRANGERS_PER_SECOND {
            guard.take(Message::Initiation, &[0; 148], from, true, now);
        }
        assert!(guard.is_pressed());
        guard.know(HashSet::from([from]));
        now += seconds(1);
        let shedding = guard.shedding(now);
        assert_eq!((shedding.shares[0], &shedding.familiar[..]), (crate::shed::ALL / 10, &[from][..]));
        assert!(guard.is_pressed(), "where peers are matters as long as others are dropped");
        now += seconds(1);
        assert!(guard.shedding(now).is_none());
        assert!(!guard.is_pressed());
    }
}
