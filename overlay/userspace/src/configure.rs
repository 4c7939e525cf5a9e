//! Changing and showing a device's configuration while traffic runs.

use std::sync::Arc;

use crate::config::{AllowedIpChange, DeviceSnapshot, DeviceUpdate, PeerSnapshot, PeerUpdate};
use crate::device::Device;
use crate::key::{PrivateKey, PublicKey};
use crate::noise::Identity;
use crate::peer::{self, Peer};
use crate::peer_table::{MAX_PEERS, PeerTable};

/// Why an update stopped half way. Everything that can be judged beforehand has been by then.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// There are too many peers.
    #[error("the device already has {MAX_PEERS} peers; remove some before adding others")]
    TooManyPeers,
    /// The system gave no random numbers for a tunnel's index.
    #[error("no random numbers for a peer's index: {0}")]
    Random(#[from] getrandom::Error),
}

impl Device {
    /// Applies an update, except for what concerns sockets (`listen_port`, `fwmark`). Peers change one by one,
    /// and traffic of the others goes on.
    pub fn apply(&self, update: &DeviceUpdate) -> Result<(), ApplyError> {
        let _one_at_a_time = self.configuring.lock();
        if let Some(private) = &update.private_key {
            self.set_private_key(private.as_ref())?;
        }
        if update.replace_peers {
            self.shared.write().table.clear();
        }
        for peer in &update.peers {
            self.apply_peer(peer)?;
        }
        Ok(())
    }

    /// The configuration and counters as they are now.
    pub fn snapshot(&self) -> DeviceSnapshot {
        let shared = self.shared.read();
        let peers = shared
            .table
            .listing()
            .into_iter()
            .map(|(peer, allowed)| {
                let state = peer.lock();
                let (tx_bytes, rx_bytes) = state.traffic();
                PeerSnapshot {
                    public_key: *peer.key(),
                    preshared_key: state.preshared().cloned(),
                    endpoint: state.endpoint().map(|endpoint| endpoint.remote),
                    last_handshake: state.last_handshake(),
                    tx_bytes,
                    rx_bytes,
                    persistent_keepalive: state.keepalive(),
                    allowed_ips: allowed.to_vec(),
                }
            })
            .collect();
        DeviceSnapshot {
            private_key: shared.identity.as_ref().map(|identity| identity.private().clone()),
            peers,
        }
    }

    fn set_private_key(&self, private: Option<&PrivateKey>) -> Result<(), ApplyError> {
        let unchanged = self.shared.read().identity.as_ref().map(|identity| identity.private()) == private;
        if unchanged {
            return Ok(());
        }
        let identity =
            private.map(|private| Arc::new(Identity::new(private.clone(), self.handshakes_per_second)));
        let peers: Vec<Arc<Peer>> = {
            let mut shared = self.shared.write();
            shared.identity.clone_from(&identity);
            if let Some(identity) = &identity {
                shared.table.remove(identity.public());
            }
            shared.table.peers().cloned().collect()
        };
        for peer in peers {
            let index = self.free_index()?;
            let preshared = peer.lock().preshared().cloned();
            let tunnel = peer::tunnel(private, peer.key(), preshared.as_ref(), index);
            let mut shared = self.shared.write();
            if tunnel.is_some() {
                shared.table.map_index(index, &peer);
            }
            for ended in peer.lock_awake().rekey(tunnel) {
                shared.table.unmap_index(ended);
            }
        }
        Ok(())
    }

    fn apply_peer(&self, update: &PeerUpdate) -> Result<(), ApplyError> {
        let (known, ourselves, full) = {
            let shared = self.shared.read();
            (
                shared.table.get(&update.public_key).cloned(),
                shared.identity.as_ref().is_some_and(|own| own.public() == &update.public_key),
                shared.table.len() >= MAX_PEERS,
            )
        };
        if update.remove {
            self.shared.write().table.remove(&update.public_key);
            return Ok(());
        }
        // As in the Linux driver, so that one list of peers can be given to all nodes.
        if ourselves || (known.is_none() && update.update_only) {
            return Ok(());
        }
        let peer = match known {
            Some(peer) => {
                self.change_preshared(&peer, update)?;
                peer
            }
            None if full => return Err(ApplyError::TooManyPeers),
            None => {
                let index = self.free_index()?;
                let private = self.private_key();
                let preshared = update.preshared_key.clone().flatten();
                let tunnel = peer::tunnel(private.as_ref(), &update.public_key, preshared.as_ref(), index);
                let (staging, roster) = (Arc::clone(&self.staging), Arc::clone(&self.roster));
                let peer = Arc::new(Peer::new(update.public_key, preshared, tunnel, staging, roster));
                self.shared.write().table.insert(Arc::clone(&peer));
                peer
            }
        };
        if update.endpoint.is_some() || update.persistent_keepalive.is_some() {
            // An endpoint alone gives the timers nothing to do.
            let keepalive = update.persistent_keepalive.is_some_and(|seconds| seconds != 0);
            let mut state = if keepalive { peer.lock_awake() } else { peer.lock() };
            if let Some(endpoint) = update.endpoint {
                state.set_endpoint(endpoint);
            }
            if let Some(seconds) = update.persistent_keepalive {
                state.set_keepalive(seconds);
            }
        }
        if update.replace_allowed_ips || !update.allowed_ips.is_empty() {
            change_allowed_ips(&mut self.shared.write().table, update);
        }
        Ok(())
    }

    fn change_preshared(&self, peer: &Arc<Peer>, update: &PeerUpdate) -> Result<(), ApplyError> {
        let Some(preshared) = &update.preshared_key else { return Ok(()) };
        if peer.lock().preshared() == preshared.as_ref() {
            return Ok(());
        }
        let index = self.free_index()?;
        let tunnel = peer::tunnel(self.private_key().as_ref(), peer.key(), preshared.as_ref(), index);
        let mut shared = self.shared.write();
        if tunnel.is_some() {
            shared.table.map_index(index, peer);
        }
        if let Some(ended) = peer.lock_awake().set_preshared(preshared.clone(), tunnel) {
            shared.table.unmap_index(ended);
        }
        Ok(())
    }

    fn private_key(&self) -> Option<PrivateKey> {
        self.shared.read().identity.as_ref().map(|identity| identity.private().clone())
    }

    // Only configuration maps indices, and it holds `configuring`, so the index stays free until it is used.
    fn free_index(&self) -> Result<u32, ApplyError> {
        let shared = self.shared.read();
        loop {
            let index = getrandom::u32()? >> 8;
            if shared.table.is_free(index) {
                return Ok(index);
            }
        }
    }
}

fn change_allowed_ips(table: &mut PeerTable, update: &PeerUpdate) {
    let key: &PublicKey = &update.public_key;
    if update.replace_allowed_ips {
        table.disallow_all(key);
    }
    for change in &update.allowed_ips {
        match change {
            AllowedIpChange::Add(prefix) => table.allow(key, *prefix),
            AllowedIpChange::Remove(prefix) => table.disallow(key, *prefix),
        }
    }
}
