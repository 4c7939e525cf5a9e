//! Which peer is meant: by public key, by receiver index, by inner address.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::allowed_ips::AllowedIps;
use crate::key::PublicKey;
use crate::peer::Peer;

/// The most peers a device takes, as in the Linux driver.
pub const MAX_PEERS: usize = 1 << 20;

/// The peers of a device.
#[derive(Default)]
pub struct PeerTable {
    by_key: HashMap<PublicKey, Entry>,
    by_index: HashMap<u32, Arc<Peer>, BuildHasherDefault<IndexHasher>>,
    routes: AllowedIps<Arc<Peer>>,
    added: u64,
}

struct Entry {
    peer: Arc<Peer>,
    allowed: Vec<IpNet>,
    // Listing order is the order of creation.
    order: u64,
}

impl PeerTable {
    /// How many peers there are.
    pub fn len(&self) -> usize {
        self.by_key.len()
    }

    /// Whether there is no peer.
    pub fn is_empty(&self) -> bool {
        self.by_key.is_empty()
    }

    /// The peer with this public key.
    pub fn get(&self, key: &PublicKey) -> Option<&Arc<Peer>> {
        self.by_key.get(key).map(|entry| &entry.peer)
    }

    /// The peer whose tunnel has this index (a receiver index without its lowest byte).
    #[inline]
    pub fn by_index(&self, index: u32) -> Option<&Arc<Peer>> {
        self.by_index.get(&index)
    }

    /// The peer to whom this inner address belongs.
    #[inline]
    pub fn route(&self, address: IpAddr) -> Option<&Arc<Peer>> {
        self.routes.lookup(address)
    }

    /// All peers, in no order.
    pub fn peers(&self) -> impl Iterator<Item = &Arc<Peer>> {
        self.by_key.values().map(|entry| &entry.peer)
    }

    /// All peers with their allowed IPs, oldest first.
    pub fn listing(&self) -> Vec<(&Arc<Peer>, &[IpNet])> {
        let mut entries: Vec<&Entry> = self.by_key.values().collect();
        entries.sort_unstable_by_key(|entry| entry.order);
        entries.into_iter().map(|entry| (&entry.peer, entry.allowed.as_slice())).collect()
    }

    /// Adds a peer, in place of one with the same key.
    pub fn insert(&mut self, peer: Arc<Peer>) {
        self.remove(peer.key());
        for index in peer.lock().indices() {
            self.by_index.insert(index, Arc::clone(&peer));
        }
        let entry = Entry { peer: Arc::clone(&peer), allowed: Vec::new(), order: self.added };
        self.added += 1;
        self.by_key.insert(*peer.key(), entry);
    }

    /// Removes a peer with all that leads to it.
    pub fn remove(&mut self, key: &PublicKey) {
        let Some(entry) = self.by_key.remove(key) else { return };
        for prefix in entry.allowed {
            self.routes.remove(prefix);
        }
        for index in entry.peer.lock().indices() {
            self.by_index.remove(&index);
        }
    }

    /// Removes all peers.
    pub fn clear(&mut self) {
        self.by_key.clear();
        self.by_index.clear();
        self.routes.clear();
    }

    /// Whether no tunnel has this index.
    pub fn is_free(&self, index: u32) -> bool {
        !self.by_index.contains_key(&index)
    }

    /// Makes an index lead to a peer.
    pub fn map_index(&mut self, index: u32, peer: &Arc<Peer>) {
        self.by_index.insert(index, Arc::clone(peer));
    }

    /// Makes an index lead nowhere.
    pub fn unmap_index(&mut self, index: u32) {
        self.by_index.remove(&index);
    }

    /// Gives a prefix to a peer of this table, taking it from whoever had it.
    pub fn allow(&mut self, key: &PublicKey, prefix: IpNet) {
        let prefix = prefix.trunc();
        let Some(entry) = self.by_key.get_mut(key) else { return };
        let previous = self.routes.insert(prefix, Arc::clone(&entry.peer));
        if previous.as_ref().is_some_and(|previous| previous.key() == key) {
            return;
        }
        entry.allowed.push(prefix);
        if let Some(loser) = previous.and_then(|previous| self.by_key.get_mut(previous.key())) {
            loser.allowed.retain(|held| *held != prefix);
        }
    }

    /// Takes a prefix from a peer, if it has it.
    pub fn disallow(&mut self, key: &PublicKey, prefix: IpNet) {
        let prefix = prefix.trunc();
        if self.routes.owner(prefix).is_some_and(|owner| owner.key() == key) {
            self.routes.remove(prefix);
            if let Some(entry) = self.by_key.get_mut(key) {
                entry.allowed.retain(|held| *held != prefix);
            }
        }
    }

    /// Takes all prefixes from a peer.
    pub fn disallow_all(&mut self, key: &PublicKey) {
        let Some(entry) = self.by_key.get_mut(key) else { return };
        for prefix in entry.allowed.drain(..) {
            self.routes.remove(prefix);
        }
    }
}

// The indices are our own random numbers, so nobody can aim at a bucket.
#[derive(Default)]
struct IndexHasher(u64);

impl Hasher for IndexHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u32(u32::from(*byte));
        }
    }

    fn write_u32(&mut self, value: u32) {
        self.0 = (self.0 ^ u64::from(value)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}
