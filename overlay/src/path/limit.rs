//! What a peer, or whoever pretends to be it, may make us do.

use std::time::Instant;

use super::wire::NONCE;

/// Tokens that come back at a rate.
#[derive(Debug, Clone)]
pub(super) struct Bucket {
    tokens: f64,
    at: Instant,
}

impl Bucket {
    /// A full one; its burst is the second number.
    pub(super) fn new(now: Instant, (_, burst): (f64, f64)) -> Self {
        Self { tokens: burst, at: now }
    }

    /// Takes a token, if there is one; rate a second, and burst.
    pub(super) fn take(&mut self, now: Instant, limit: (f64, f64)) -> bool {
        let takes = self.has(now, limit);
        self.tokens -= f64::from(u8::from(takes));
        takes
    }

    /// Whether there is a token.
    pub(super) fn has(&mut self, now: Instant, (rate, burst): (f64, f64)) -> bool {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.tokens = (self.tokens + passed * rate).min(burst);
        self.at = now;
        self.tokens >= 1.0
    }
}

/// How far ahead of the last a nonce goes on with a boot: the sender counts for all of its peers together.
const AHEAD: u64 = 1 << 32;
/// How far a nonce may lie behind the highest of its boot.
const BEHIND: u64 = 64;
/// Nonces of other boots that are remembered: of a peer that has just restarted, or of recordings.
const OTHERS_MOST: usize = 64;

/// The nonces that a peer has used: a boot's random bytes and a count.
#[derive(Debug, Clone, Default)]
pub(super) struct Window {
    boot: Option<[u8; 16]>,
    top: u64,
    // Bit n: the count `top - n` was seen.
    seen: u64,
    others: std::collections::VecDeque<[u8; NONCE]>,
}

fn split(nonce: &[u8; NONCE]) -> ([u8; 16], u64) {
    let (mut boot, mut count) = ([0; 16], [0; 8]);
    boot.copy_from_slice(&nonce[..16]);
    count.copy_from_slice(&nonce[16..]);
    (boot, u64::from_be_bytes(count))
}

impl Window {
    /// Whether a nonce was used already, or is too old to tell.
    pub(super) fn knows(&self, nonce: &[u8; NONCE]) -> bool {
        let (boot, count) = split(nonce);
        if self.boot != Some(boot) {
            return self.others.contains(nonce);
        }
        match self.top.checked_sub(count) {
            None => false,
            Some(behind) => behind >= BEHIND || self.seen & (1 << behind) != 0,
        }
    }

    /// Whether a nonce is of the boot that the peer was last seen to be in, by an answer to a question of ours.
    pub(super) fn is_present(&self, nonce: &[u8; NONCE]) -> bool {
        self.boot == Some(split(nonce).0)
    }

    /// Whether a nonce that is not known is one that the peer may use next. Whoever sees the peer's datagrams can make such a one; nobody
    /// else can.
    pub(super) fn continues(&self, nonce: &[u8; NONCE]) -> bool {
        self.is_present(nonce) && split(nonce).1 <= self.top.saturating_add(AHEAD)
    }

    /// A nonce was used. `answer` says that it answered a question of ours: the boot is the peer's present one then.
    pub(super) fn note(&mut self, nonce: &[u8; NONCE], answer: bool) {
        let (boot, count) = split(nonce);
        if self.boot != Some(boot) {
            if answer {
                *self = Self { boot: Some(boot), top: count, seen: 1, ..Self::default() };
            } else {
                if self.others.len() == OTHERS_MOST {
                    self.others.pop_front();
                }
                self.others.push_back(*nonce);
            }
            return;
        }
        match count.checked_sub(self.top) {
            Some(ahead) if ahead > 0 => {
                self.seen = if ahead < BEHIND { self.seen << ahead | 1 } else { 1 };
                self.top = count;
            }
            _ => {
                let behind = self.top - count;
                if behind < BEHIND {
                    self.seen |= 1 << behind;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nonce(boot: u8, count: u64) -> [u8; NONCE] {
        let mut nonce = [boot; NONCE];
        nonce[16..].copy_from_slice(&count.to_be_bytes());
        nonce
    }

    #[test]
    fn of_the_present_boot_every_nonce_counts_once_and_old_ones_never() {
        let mut window = Window::default();
        window.note(&nonce(1, 10), true);
        for count in [11, 9, 80, 79, 500] {
            assert!(!window.knows(&nonce(1, count)), "{count}");
            window.note(&nonce(1, count), false);
            assert!(window.knows(&nonce(1, count)), "{count}");
        }
        for count in [0, 10, 12, 80, 436] {
            assert!(window.knows(&nonce(1, count)), "{count} is older than anything honest");
        }
        assert!(!window.knows(&nonce(1, 450)));
    }

    #[test]
    fn another_boot_is_the_present_one_once_it_has_answered() {
        let mut window = Window::default();
        window.note(&nonce(1, 1000), true);
        window.note(&nonce(2, 5), false);
        assert!(window.knows(&nonce(2, 5)) && window.knows(&nonce(1, 1000)) && window.knows(&nonce(1, 3)));
        window.note(&nonce(2, 6), true);
        assert!(window.knows(&nonce(2, 6)) && !window.knows(&nonce(2, 7)));
    }
}
