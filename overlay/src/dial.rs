//! Which of a peer's candidate endpoints to dial, and when to leave the endpoint alone.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use mesh_keyring::PublicKey;

use crate::device::ObservedPeer;

/// A handshake older than this is dead (WireGuard paper, section 6.1: Reject-After-Time).
pub const HANDSHAKE_LIFETIME: Duration = Duration::from_secs(180);
/// How long one candidate is tried: three handshake attempts of five seconds (Rekey-Timeout) each.
pub const TRY_FOR: Duration = Duration::from_secs(15);
/// The time that a peer may stay at an unprobed address while the chosen path answers.
pub const ROAM_FOR: Duration = Duration::from_secs(5);

/// Whether the peer's last handshake still carries traffic. A clock that was set back a little leaves it fresh; one
/// that lies further in the future than its lifetime tells nothing any more.
pub fn is_fresh(last_handshake: Option<SystemTime>, now: SystemTime) -> bool {
    last_handshake.is_some_and(|at| {
        let apart = now.duration_since(at).unwrap_or_else(|future| future.duration());
        apart < HANDSHAKE_LIFETIME
    })
}

/// Whether there ever was a handshake: then its endpoint was the right one once.
fn was_up(peer: &ObservedPeer) -> bool {
    peer.last_handshake.is_some()
}

#[derive(Debug, Clone)]
struct Attempt {
    candidates: Vec<SocketAddr>,
    index: usize,
    since: SystemTime,
}

/// Where a peer is now that was dialled at a port that it published and publishes no longer.
fn moved(current: SocketAddr, before: &[SocketAddr], candidates: &[SocketAddr]) -> Option<SocketAddr> {
    let was_offered = before.contains(&current) && !candidates.contains(&current);
    candidates.iter().copied().find(|to| was_offered && to.ip() == current.ip())
}

/// The attempts that are under way, by peer.
#[derive(Debug, Clone, Default)]
pub struct Dialer {
    attempts: BTreeMap<PublicKey, Attempt>,
    /// Where each peer was when a handshake was last fresh.
    learned: BTreeMap<PublicKey, SocketAddr>,
    /// What each peer published when it was looked at last.
    offered: BTreeMap<PublicKey, Vec<SocketAddr>>,
    /// The unprobed addresses that peers roamed to, and the times.
    roamed: BTreeMap<PublicKey, (SocketAddr, SystemTime)>,
}

impl Dialer {
    /// The endpoint to write now, if any. A fresh handshake is never disturbed: whatever address it came from is
    /// newer than anything published; but for the port of a peer that has published that it listens on another one now. Without one, and where `persistent` keepalives ask for an answer, the candidates
    /// are tried in turn, among them where the peer was last: behind a NAT it can be nowhere else. A tunnel that is
    /// merely idle is left alone.
    pub fn choose(
        &mut self,
        key: &PublicKey,
        candidates: &[SocketAddr],
        persistent: bool,
        observed: Option<&ObservedPeer>,
        now: SystemTime,
    ) -> Option<SocketAddr> {
        // Until the device is seen to have it, in case that it could not be written.
        let before = self.offered.get(key).map_or(&[][..], Vec::as_slice);
        if let Some(moved) =
            observed.and_then(|peer| peer.endpoint).and_then(|to| moved(to, before, candidates))
        {
            self.attempts.remove(key);
            self.learned.insert(*key, moved);
            return Some(moved);
        }
        if before != candidates {
            self.offered.insert(*key, candidates.to_vec());
        }
        if let Some(peer) = observed.filter(|peer| is_fresh(peer.last_handshake, now)) {
            self.attempts.remove(key);
            if let Some(endpoint) = peer.endpoint {
                self.learned.insert(*key, endpoint);
            }
            return None;
        }
        let current = observed.and_then(|peer| peer.endpoint);
        let learned = self.learned.get(key).copied().or(current.filter(|_| observed.is_some_and(was_up)));
        let mut all: Vec<SocketAddr> = learned.into_iter().collect();
        all.extend(candidates.iter().filter(|to| Some(**to) != learned));
        if all.is_empty() || (current.is_some() && !persistent) {
            self.attempts.remove(key);
            return None;
        }
        let attempt = self.attempts.entry(*key).or_insert_with(|| Attempt {
            // After a restart of the agent: go on where the device stands.
            index: current.and_then(|c| all.iter().position(|&x| x == c)).unwrap_or(0),
            candidates: all.clone(),
            since: now,
        });
        if attempt.candidates != all {
            *attempt = Attempt { index: 0, candidates: all.clone(), since: now };
        } else if now.duration_since(attempt.since).unwrap_or(TRY_FOR) >= TRY_FOR {
            attempt.index = (attempt.index + 1) % all.len();
            attempt.since = now;
        }
        let wanted = all[attempt.index];
        (current != Some(wanted)).then_some(wanted)
    }

    /// The endpoint to write now, if any, where the prober knows one that answers. One that the device
    /// has roamed to came with an authentic packet: it stays until the prober knows it. A prober that does
    /// not take it up, while its own choice answers, is right: a copy of the peer may have sent that packet.
    pub fn follow(
        &mut self,
        key: &PublicKey,
        chosen: SocketAddr,
        probed: &BTreeSet<SocketAddr>,
        observed: Option<&ObservedPeer>,
        now: SystemTime,
    ) -> Option<SocketAddr> {
        self.attempts.remove(key);
        self.learned.insert(*key, chosen);
        let current = observed.and_then(|peer| peer.endpoint);
        let news = current.filter(|at| observed.is_some_and(was_up) && !probed.contains(at));
        let Some(news) = news else {
            self.roamed.remove(key);
            return (current != Some(chosen)).then_some(chosen);
        };
        let since = match self.roamed.get(key) {
            Some((at, since)) if *at == news => *since,
            _ => now,
        };
        self.roamed.insert(*key, (news, since));
        // After the clock was set back nothing is known of the time that has passed.
        let stays = now.duration_since(since).is_ok_and(|stayed| stayed < ROAM_FOR);
        (!stays).then_some(chosen)
    }

    /// When the next candidate of some peer is due; only peers with more than one have one.
    pub fn wake_at(&self) -> Option<SystemTime> {
        let tried = self.attempts.values().filter(|a| a.candidates.len() > 1).map(|a| a.since + TRY_FOR);
        tried.chain(self.roamed.values().map(|(_, since)| *since + ROAM_FOR)).min()
    }

    /// Forgets the peers for which `keep` is false.
    pub fn retain(&mut self, keep: impl Fn(&PublicKey) -> bool) {
        self.attempts.retain(|key, _| keep(key));
        self.learned.retain(|key, _| keep(key));
        self.offered.retain(|key, _| keep(key));
        self.roamed.retain(|key, _| keep(key));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_keyring::PrivateKey;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000 + seconds)
    }

    fn key() -> PublicKey {
        PrivateKey::from_bytes(&[9; 32]).unwrap().public()
    }

    fn address(n: u8) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, n], 51820))
    }

    fn holding(endpoint: Option<SocketAddr>, handshake: Option<u64>) -> ObservedPeer {
        ObservedPeer { endpoint, last_handshake: handshake.map(at), ..ObservedPeer::default() }
    }

    fn choose(
        dialer: &mut Dialer,
        to: &[SocketAddr],
        observed: Option<&ObservedPeer>,
        seconds: u64,
    ) -> Option<SocketAddr> {
        dialer.choose(&key(), to, true, observed, at(seconds))
    }

    #[test]
    fn a_peer_that_publishes_another_port_is_dialled_there_at_once() {
        let other = SocketAddr::new(address(1).ip(), 4000);
        for persistent in [true, false] {
            let mut dialer = Dialer::default();
            let peer = holding(Some(address(1)), Some(0));
            assert_eq!(dialer.choose(&key(), &[address(1)], persistent, Some(&peer), at(1)), None);
            // Also when it could not be written the first time.
            for _ in 0..2 {
                assert_eq!(dialer.choose(&key(), &[other], persistent, Some(&peer), at(2)), Some(other));
            }
            let there = holding(Some(other), Some(0));
            assert_eq!(dialer.choose(&key(), &[other], persistent, Some(&there), at(3)), None);
        }
        // One that has roamed to where it never published stays there, and another address is no other port.
        let mut dialer = Dialer::default();
        let roamed = holding(Some(SocketAddr::new(address(1).ip(), 9)), Some(0));
        assert_eq!(choose(&mut dialer, &[address(1)], Some(&roamed), 1), None);
        assert_eq!(choose(&mut dialer, &[other], Some(&roamed), 2), None);
        let peer = holding(Some(address(1)), Some(0));
        assert_eq!(choose(&mut dialer, &[address(1)], Some(&peer), 3), None);
        assert_eq!(choose(&mut dialer, &[address(2)], Some(&peer), 4), None);
    }

    #[test]
    fn an_endpoint_learned_from_a_fresh_handshake_is_never_overwritten() {
        let mut dialer = Dialer::default();
        let roamed = holding(Some(address(99)), Some(0));
        assert_eq!(choose(&mut dialer, &[address(1)], Some(&roamed), 179), None);
        assert_eq!(
            choose(&mut dialer, &[address(1)], Some(&roamed), 180),
            None,
            "it is tried once more first"
        );
        assert_eq!(choose(&mut dialer, &[address(1)], Some(&roamed), 196), Some(address(1)));
        let published = holding(Some(address(1)), Some(0));
        assert_eq!(
            choose(&mut dialer, &[address(1)], Some(&published), 212),
            Some(address(99)),
            "and then in turn"
        );
    }

    #[test]
    fn what_the_prober_has_chosen_is_followed() {
        let mut dialer = Dialer::default();
        let probed = BTreeSet::from([address(1), address(2)]);
        let mut follow =
            |observed: Option<&ObservedPeer>| dialer.follow(&key(), address(2), &probed, observed, at(0));
        assert_eq!(follow(None), Some(address(2)));
        assert_eq!(follow(Some(&holding(Some(address(1)), Some(0)))), Some(address(2)));
        assert_eq!(follow(Some(&holding(Some(address(2)), Some(0)))), None);
        assert_eq!(follow(Some(&holding(Some(address(9)), Some(0)))), None, "it has roamed there");
        assert_eq!(follow(Some(&holding(Some(address(9)), None))), Some(address(2)), "it never was there");
    }

    #[test]
    fn a_roamed_endpoint_that_nobody_probes_is_taken_back() {
        let mut dialer = Dialer::default();
        let probed = BTreeSet::from([address(2)]);
        let mut follow = |to: u8, seconds| {
            let peer = holding(Some(address(to)), Some(0));
            dialer.follow(&key(), address(2), &probed, Some(&peer), at(seconds))
        };
        assert_eq!(follow(9, 0), None);
        assert_eq!(follow(9, 4), None);
        assert_eq!(follow(9, 5), Some(address(2)), "the chosen path has answered all the while");
        assert_eq!(follow(9, 6), Some(address(2)), "also when it could not be written");
        assert_eq!(follow(2, 7), None);
        assert_eq!(follow(9, 8), None, "it has roamed anew");
        assert_eq!(follow(8, 12), None, "and to another one");
        assert_eq!(follow(8, 17), Some(address(2)));
        assert_eq!(dialer.wake_at(), Some(at(17)));
    }

    #[test]
    fn candidates_are_tried_in_turn_until_one_answers() {
        let mut dialer = Dialer::default();
        let two = [address(1), address(2)];
        assert_eq!(choose(&mut dialer, &two, None, 0), Some(address(1)));
        let dialled = holding(Some(address(1)), None);
        assert_eq!(choose(&mut dialer, &two, Some(&dialled), 14), None);
        assert_eq!(dialer.wake_at(), Some(at(15)));
        assert_eq!(choose(&mut dialer, &two, Some(&dialled), 15), Some(address(2)));
        let second = holding(Some(address(2)), None);
        assert_eq!(choose(&mut dialer, &two, Some(&second), 31), Some(address(1)));
        assert_eq!(choose(&mut dialer, &two, Some(&holding(Some(address(1)), Some(32))), 33), None);
        assert_eq!(dialer.wake_at(), None);
    }

    #[test]
    fn a_tunnel_that_is_merely_idle_is_left_alone() {
        let mut dialer = Dialer::default();
        let idle = holding(Some(address(99)), Some(0));
        for seconds in [200, 300, 4000] {
            assert_eq!(
                dialer.choose(&key(), &[address(1), address(2)], false, Some(&idle), at(seconds)),
                None
            );
        }
        assert_eq!(dialer.wake_at(), None);
        assert_eq!(dialer.choose(&key(), &[address(1)], false, None, at(0)), Some(address(1)));
    }

    #[test]
    fn a_restarted_agent_goes_on_with_the_endpoint_in_use() {
        let mut dialer = Dialer::default();
        let second = holding(Some(address(2)), None);
        assert_eq!(choose(&mut dialer, &[address(1), address(2)], Some(&second), 0), None);
    }

    #[test]
    fn a_device_made_anew_dials_a_peer_behind_nat_where_it_was_last() {
        let mut dialer = Dialer::default();
        let behind_nat = holding(Some(address(99)), Some(0));
        assert_eq!(choose(&mut dialer, &[], Some(&behind_nat), 10), None);
        assert_eq!(choose(&mut dialer, &[], None, 20), Some(address(99)));
        assert_eq!(choose(&mut dialer, &[], Some(&holding(Some(address(99)), None)), 21), None);
        dialer.retain(|_| false);
        assert_eq!(choose(&mut dialer, &[], None, 30), None, "a revoked peer is forgotten");
    }

    #[test]
    fn a_clock_that_went_back_a_little_disturbs_nothing_and_one_that_went_far_does_not_hold_for_ever() {
        let mut dialer = Dialer::default();
        let future = |seconds| holding(Some(address(1)), Some(seconds));
        assert_eq!(choose(&mut dialer, &[address(1), address(2)], Some(&future(60)), 0), None);
        assert_eq!(choose(&mut dialer, &[address(1), address(2)], Some(&future(5000)), 1), None);
        assert_eq!(choose(&mut dialer, &[address(1), address(2)], Some(&future(5000)), 17), Some(address(2)));
    }
}
