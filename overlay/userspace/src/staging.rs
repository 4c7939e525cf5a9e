//! Packets that wait for a session: few for each peer, and not many for all of them together.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Packets kept for a peer while a handshake runs, as many as the Linux driver keeps.
pub const STAGED_PACKETS: usize = 128;
/// Bytes kept for a peer while a handshake runs.
pub const STAGED_BYTES: usize = 512 * 1024;
/// Bytes kept for all peers of a device together.
pub const STAGED_BYTES_OF_ALL: usize = 64 << 20;

// What a packet costs besides its bytes: its place in the queue and the allocator's header.
const OVERHEAD: usize = 48;

/// What all peers of a device share.
#[derive(Debug)]
pub struct Budget {
    used: AtomicUsize,
    limit: usize,
}

impl Budget {
    /// A budget of this many bytes.
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { used: AtomicUsize::new(0), limit })
    }

    fn take(&self, bytes: usize) -> bool {
        let add = |used: usize| used.checked_add(bytes).filter(|sum| *sum <= self.limit);
        self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add).is_ok()
    }

    fn give_back(&self, bytes: usize) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// One peer's waiting packets, oldest first.
#[derive(Debug)]
pub struct Queue {
    budget: Arc<Budget>,
    packets: VecDeque<Box<[u8]>>,
    bytes: usize,
}

impl Queue {
    /// An empty queue that draws on a budget.
    pub fn new(budget: Arc<Budget>) -> Self {
        Self { budget, packets: VecDeque::new(), bytes: 0 }
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.packets.is_empty()
    }

    /// Adds a packet. The peer's oldest make room for it; where the others have used up the budget, it is dropped.
    pub fn push(&mut self, packet: &[u8]) {
        while self.packets.len() >= STAGED_PACKETS || self.bytes + packet.len() > STAGED_BYTES {
            if self.pop().is_none() {
                return;
            }
        }
        while !self.budget.take(packet.len() + OVERHEAD) {
            if self.pop().is_none() {
                return;
            }
        }
        self.bytes += packet.len();
        self.packets.push_back(packet.into());
    }

    /// Takes the oldest packet.
    pub fn pop(&mut self) -> Option<Box<[u8]>> {
        let packet = self.packets.pop_front()?;
        self.bytes -= packet.len();
        self.budget.give_back(packet.len() + OVERHEAD);
        Some(packet)
    }

    /// Drops all.
    pub fn clear(&mut self) {
        while self.pop().is_some() {}
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_peers_together_stay_within_the_budget_and_give_back_what_they_used() {
        let budget = Budget::new(10 * (1000 + OVERHEAD));
        let mut queues: Vec<Queue> = (0..5).map(|_| Queue::new(Arc::clone(&budget))).collect();
        for queue in &mut queues {
            for _ in 0..4 {
                queue.push(&[0; 1000]);
            }
        }
        assert_eq!(queues.iter().map(|queue| queue.packets.len()).collect::<Vec<_>>(), [4, 4, 2, 0, 0]);
        queues[0].pop();
        queues[3].push(&[0; 1000]);
        assert_eq!(queues[3].packets.len(), 1);
        drop(queues);
        assert_eq!(budget.used.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_peer_that_finds_the_budget_used_up_keeps_its_newest() {
        let mut queue = Queue::new(Budget::new(2 * (10 + OVERHEAD)));
        for byte in 0..5 {
            queue.push(&[byte; 10]);
        }
        assert_eq!(queue.packets.iter().map(|packet| packet[0]).collect::<Vec<_>>(), [3, 4]);
    }

    #[test]
    fn a_packet_beyond_the_peers_limit_is_not_kept() {
        let mut queue = Queue::new(Budget::new(STAGED_BYTES_OF_ALL));
        queue.push(&vec![0; STAGED_BYTES + 1]);
        assert!(queue.is_empty());
    }
}
