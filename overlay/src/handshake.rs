//! The age of handshakes, on a host whose clock may be set.

use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime};

use mesh_keyring::PublicKey;

use crate::device::ObservedDevice;

#[derive(Debug, Clone, Copy)]
struct Seen {
    // What the device says, by the clock of that moment.
    told: SystemTime,
    // When it was, as far as can be told.
    at: Age,
}

/// A moment that lies this long before another one.
#[derive(Debug, Clone, Copy)]
struct Age {
    before: Duration,
    now: Instant,
}

impl Age {
    fn at(self, now: Instant) -> Duration {
        now.saturating_duration_since(self.now) + self.before
    }
}

/// The ages of handshakes, by a clock that nobody sets. A device tells the time of day at which a
/// handshake was: once that is set, it says nothing of the handshake's age.
#[derive(Debug, Clone, Default)]
pub struct Handshakes {
    seen: BTreeMap<PublicKey, Seen>,
    looked: Option<Instant>,
}

impl Handshakes {
    /// Replaces each handshake's time by the one at which it was by the time of day that is `wall` now.
    pub fn correct(&mut self, device: &mut ObservedDevice, now: Instant, wall: SystemTime) {
        let since = self.looked.map(|looked| now.saturating_duration_since(looked));
        self.seen.retain(|key, _| device.peers.contains_key(key));
        for (key, peer) in &mut device.peers {
            let Some(told) = peer.last_handshake else {
                self.seen.remove(key);
                continue;
            };
            let seen = match self.seen.get(key) {
                Some(seen) if seen.told == told => *seen,
                known => {
                    let by_clock = wall.duration_since(told).ok();
                    // What was not there at the last look came after it.
                    let most = since.filter(|_| known.is_some());
                    let before = match (by_clock, most) {
                        (Some(age), Some(most)) => age.min(most),
                        (Some(age), None) => age,
                        // By the clock it is yet to come.
                        (None, most) => most.unwrap_or_default(),
                    };
                    Seen { told, at: Age { before, now } }
                }
            };
            self.seen.insert(*key, seen);
            peer.last_handshake = Some(wall.checked_sub(seen.at.at(now)).unwrap_or(SystemTime::UNIX_EPOCH));
        }
        self.looked = Some(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::ObservedPeer;
    use crate::dial::is_fresh;
    use mesh_keyring::PrivateKey;

    const HOUR: Duration = Duration::from_secs(3600);
    const DECADES: Duration = Duration::from_secs(20 * 365 * 86_400);

    fn wall() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000)
    }

    struct Lab {
        handshakes: Handshakes,
        begun: Instant,
    }

    impl Lab {
        fn new() -> Self {
            Self { handshakes: Handshakes::default(), begun: Instant::now() }
        }

        /// Looks after so many seconds, at this time of day, at a device with this handshake.
        fn fresh(&mut self, seconds: u64, wall: SystemTime, handshake: SystemTime) -> bool {
            let key = PrivateKey::from_bytes(&[9; 32]).unwrap().public();
            let peer = ObservedPeer { last_handshake: Some(handshake), ..ObservedPeer::default() };
            let mut device = ObservedDevice { peers: [(key, peer)].into(), ..ObservedDevice::default() };
            let now = self.begun + Duration::from_secs(seconds);
            self.handshakes.correct(&mut device, now, wall);
            is_fresh(device.peers[&key].last_handshake, wall)
        }
    }

    #[test]
    fn a_clock_that_is_set_makes_no_tunnel_stale() {
        for step in [HOUR, DECADES] {
            for forward in [true, false] {
                let mut lab = Lab::new();
                let set = |to: SystemTime| if forward { to + step } else { to - step };
                assert!(lab.fresh(0, wall(), wall()));
                assert!(lab.fresh(10, set(wall()), wall()), "{step:?} {forward}");
                assert!(lab.fresh(170, set(wall()), wall()), "{step:?} {forward}");
                assert!(!lab.fresh(180, set(wall()), wall()), "it does get old");
                // The next handshake, by the clock of now.
                assert!(lab.fresh(181, set(wall()), set(wall())));
            }
        }
    }

    #[test]
    fn what_an_agent_finds_at_its_start_has_the_age_of_the_clock() {
        assert!(!Lab::new().fresh(0, wall() + HOUR, wall()));
        assert!(Lab::new().fresh(0, wall() + Duration::from_secs(100), wall()));
    }

    #[test]
    fn a_handshake_between_two_looks_is_no_older_than_the_first() {
        let mut lab = Lab::new();
        assert!(lab.fresh(0, wall(), wall()));
        // Shaken at the old time of day, seen at the new one.
        assert!(lab.fresh(10, wall() + HOUR, wall() + Duration::from_secs(9)));
    }
}
