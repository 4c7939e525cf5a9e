//! Datagrams that wait for being sent, and which of them can leave as one message.

use std::ops::Range;

use crate::peer::Endpoint;

// Bytes for the datagrams of a batch.
const ARENA: usize = 256 << 10;
// What keeps a batch of the smallest datagrams bounded.
const MAX_RUNS: usize = 512;
/// What every kernel with `UDP_SEGMENT` takes (`UDP_MAX_SEGMENTS`, net/ipv4/udp.c; later ones take 128).
pub(super) const MAX_SEGMENTS: usize = 64;
/// Bytes of datagrams: 65,535 without an IPv6 and a UDP header.
pub(super) const MAX_LENGTH: usize = 65_535 - 40 - 8;

/// Datagrams to one endpoint, one directly behind the other, all of one length but perhaps the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) to: Endpoint,
    /// How many datagrams; at least 1.
    pub(super) count: usize,
    /// Bytes per datagram; the last can be shorter, but is never empty beside others.
    pub(super) segment: usize,
    start: usize,
    length: usize,
    open: bool,
}

impl Run {
    fn takes(&self, to: &Endpoint, length: usize) -> bool {
        self.open
            && self.count < MAX_SEGMENTS
            && (1..=self.segment).contains(&length)
            && self.length + length <= MAX_LENGTH
            && self.to == *to
    }

    /// Where `count` datagrams beginning with number `first` lie among the bytes.
    pub(super) fn range(&self, first: usize, count: usize) -> Range<usize> {
        let end = self.start + self.length;
        let at = |datagram: usize| (self.start + datagram * self.segment).min(end);
        at(first)..at(first + count)
    }
}

/// The datagrams in the order in which they came, in memory allocated once.
#[derive(Debug)]
pub(super) struct Runs {
    bytes: Vec<u8>,
    used: usize,
    runs: Vec<Run>,
}

impl Runs {
    pub(super) fn new() -> Self {
        Self { bytes: vec![0; ARENA], used: 0, runs: Vec::with_capacity(MAX_RUNS) }
    }

    pub(super) fn has_room(&self, length: usize) -> bool {
        self.runs.len() < MAX_RUNS && length <= self.bytes.len() - self.used
    }

    pub(super) fn space(&mut self, length: usize) -> &mut [u8] {
        let end = self.bytes.len().min(self.used.saturating_add(length));
        &mut self.bytes[self.used..end]
    }

    pub(super) fn push(&mut self, to: &Endpoint, length: usize) {
        if length > self.bytes.len() - self.used {
            return;
        }
        if let Some(run) = self.runs.last_mut().filter(|run| run.takes(to, length)) {
            run.count += 1;
            run.length += length;
            run.open = length == run.segment;
        } else if self.runs.len() < MAX_RUNS {
            let run = Run { to: *to, count: 1, segment: length, start: self.used, length, open: true };
            self.runs.push(run);
        } else {
            return;
        }
        self.used += length;
    }

    pub(super) fn clear(&mut self) {
        self.runs.clear();
        self.used = 0;
    }

    pub(super) fn runs(&self) -> &[Run] {
        &self.runs
    }

    pub(super) fn bytes(&self, range: Range<usize>) -> &[u8] {
        &self.bytes[range]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn endpoint(port: u16) -> Endpoint {
        Endpoint::from(std::net::SocketAddr::from(([192, 0, 2, 1], port)))
    }

    fn shape(runs: &Runs) -> Vec<(usize, usize, usize)> {
        runs.runs().iter().map(|run| (run.count, run.segment, run.length)).collect()
    }

    fn push_all(lengths: impl IntoIterator<Item = usize>) -> Runs {
        let mut runs = Runs::new();
        for length in lengths {
            runs.push(&endpoint(1), length);
        }
        runs
    }

    #[test]
    fn a_run_takes_one_length_and_ends_with_a_shorter_one() {
        assert_eq!(shape(&push_all([100, 100, 40, 40, 100])), [(3, 100, 240), (1, 40, 40), (1, 100, 100)]);
        assert_eq!(shape(&push_all([100, 101])), [(1, 100, 100), (1, 101, 101)]);
        assert_eq!(shape(&push_all([0, 0, 9, 0])), [(1, 0, 0), (1, 0, 0), (1, 9, 9), (1, 0, 0)]);
    }

    #[test]
    fn a_run_has_no_more_segments_and_bytes_than_a_message_can() {
        assert_eq!(shape(&push_all([32; 65])), [(64, 32, 2048), (1, 32, 32)]);
        assert_eq!(shape(&push_all([1452; 46])), [(45, 1452, 65_340), (1, 1452, 1452)]);
        assert_eq!(shape(&push_all([65_000, 487, 1])), [(2, 65_000, 65_487), (1, 1, 1)]);
        assert_eq!(shape(&push_all([65_000, 488])), [(1, 65_000, 65_000), (1, 488, 488)]);
        assert_eq!(shape(&push_all([65_507, 1])), [(1, 65_507, 65_507), (1, 1, 1)]);
    }

    #[test]
    fn another_endpoint_begins_another_run() {
        let mut runs = Runs::new();
        let ours = Endpoint { local: Some([192, 0, 2, 9].into()), ..endpoint(1) };
        for to in [endpoint(1), endpoint(1), endpoint(2), endpoint(1), ours, ours] {
            runs.push(&to, 10);
        }
        assert_eq!(shape(&runs), [(2, 10, 20), (1, 10, 10), (1, 10, 10), (2, 10, 20)]);
    }

    #[test]
    fn a_batch_is_bounded_in_bytes_and_runs() {
        let mut runs = Runs::new();
        assert!(runs.has_room(ARENA) && !runs.has_room(ARENA + 1) && !runs.has_room(usize::MAX));
        assert_eq!(runs.space(usize::MAX).len(), ARENA);
        runs.push(&endpoint(1), ARENA + 1);
        assert!(runs.runs().is_empty());
        for _ in 0..MAX_RUNS {
            assert!(runs.has_room(0));
            runs.push(&endpoint(1), 0);
        }
        assert!(!runs.has_room(0));
        runs.push(&endpoint(1), 0);
        assert_eq!(runs.runs().len(), MAX_RUNS);
        runs.clear();
        assert!(runs.has_room(ARENA));
    }

    proptest! {
        #[test]
        fn the_runs_give_back_the_datagrams_in_order(
            datagrams in prop::collection::vec((0u16..3, prop_oneof![Just(100usize), 0usize..300, Just(40_000)]), 0..200)
        ) {
            let (mut runs, mut expected) = (Runs::new(), Vec::new());
            for (i, (port, length)) in datagrams.into_iter().enumerate() {
                if !runs.has_room(length) {
                    break;
                }
                runs.space(length).fill(i as u8);
                runs.push(&endpoint(port), length);
                expected.push((endpoint(port), vec![i as u8; length]));
            }
            let mut found = Vec::new();
            for run in runs.runs() {
                prop_assert!(run.count <= MAX_SEGMENTS && (run.count == 1 || run.length <= MAX_LENGTH));
                prop_assert_eq!(run.range(0, run.count), run.start..run.start + run.length);
                let datagrams = (0..run.count).map(|i| (run.to, runs.bytes(run.range(i, 1)).to_vec()));
                found.extend(datagrams);
            }
            prop_assert_eq!(found, expected);
        }
    }
}
