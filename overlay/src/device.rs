//! What the WireGuard device has to hold, and the single changes that get it there.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::SystemTime;

use ipnet::IpNet;
use mesh_keyring::PublicKey;
use serde::Serialize;

use crate::dial::Dialer;

/// A peer as the device should hold it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct DevicePeer {
    /// Where to dial it, best first.
    pub candidates: Vec<SocketAddr>,
    /// What the path prober has chosen, if it answers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chosen: Option<SocketAddr>,
    /// All addresses that the prober looks after: one that the device has roamed to and that is none of them is newer than its choice.
    #[serde(skip)]
    pub probed: BTreeSet<SocketAddr>,
    /// All it may send from and be sent to.
    pub allowed_ips: BTreeSet<IpNet>,
    /// Seconds between keepalives.
    pub keepalive: Option<u16>,
}

/// The device as it should be. The private key is not part of it: it goes from key store to backend.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct DeviceConfig {
    /// UDP port.
    pub listen_port: u16,
    /// Peers by key.
    pub peers: BTreeMap<PublicKey, DevicePeer>,
}

/// A peer as the device holds it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ObservedPeer {
    /// Where it sends to now: dialled or learned.
    pub endpoint: Option<SocketAddr>,
    /// Its AllowedIPs.
    pub allowed_ips: BTreeSet<IpNet>,
    /// Seconds between keepalives.
    pub keepalive: Option<u16>,
    /// When the last handshake was completed.
    pub last_handshake: Option<SystemTime>,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
}

/// The device as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ObservedDevice {
    /// The public half of its private key, if it has one.
    pub public_key: Option<PublicKey>,
    /// UDP port; 0 when none is bound.
    pub listen_port: u16,
    /// Peers by key.
    pub peers: BTreeMap<PublicKey, ObservedPeer>,
}

/// One change to a live device. None of them touches another peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceChange {
    /// Give the device the node's private key.
    SetPrivateKey,
    /// Bind another UDP port.
    SetListenPort(u16),
    /// Remove a peer and its sessions.
    RemovePeer(PublicKey),
    /// Add a peer, or change what is `Some`.
    SetPeer {
        /// Which peer.
        key: PublicKey,
        /// Whether the device does not hold it yet.
        new: bool,
        /// Dial it here.
        endpoint: Option<SocketAddr>,
        /// Replace its AllowedIPs by these.
        allowed_ips: Option<BTreeSet<IpNet>>,
        /// Set its keepalive, in seconds; 0 ends it.
        keepalive: Option<u16>,
    },
}

impl DeviceConfig {
    /// The changes from `observed` to this configuration, removals first, so that an AllowedIP is free before
    /// another peer takes it. `public_key` is the node's own. Without `prune` no peer is removed.
    ///
    /// An endpoint is written only where the dialer says so: one learned from a fresh handshake is left alone.
    pub fn diff(
        &self,
        observed: &ObservedDevice,
        public_key: &PublicKey,
        prune: bool,
        dialer: &mut Dialer,
        now: SystemTime,
    ) -> Vec<DeviceChange> {
        let mut changes = Vec::new();
        if observed.public_key.as_ref() != Some(public_key) {
            changes.push(DeviceChange::SetPrivateKey);
        }
        if observed.listen_port != self.listen_port {
            changes.push(DeviceChange::SetListenPort(self.listen_port));
        }
        let surplus = observed.peers.keys().filter(|key| prune && !self.peers.contains_key(key));
        changes.extend(surplus.map(|key| DeviceChange::RemovePeer(*key)));
        dialer.retain(|key| self.peers.contains_key(key));
        for (key, wanted) in &self.peers {
            let found = observed.peers.get(key);
            let endpoint = match wanted.chosen {
                Some(chosen) => dialer.follow(key, chosen, &wanted.probed, found, now),
                None => dialer.choose(key, &wanted.candidates, wanted.keepalive.is_some(), found, now),
            };
            let allowed = found.is_none_or(|f| f.allowed_ips != wanted.allowed_ips);
            let keepalive = found.map_or(wanted.keepalive.is_some(), |f| f.keepalive != wanted.keepalive);
            if found.is_none() || endpoint.is_some() || allowed || keepalive {
                changes.push(DeviceChange::SetPeer {
                    key: *key,
                    new: found.is_none(),
                    endpoint,
                    allowed_ips: allowed.then(|| wanted.allowed_ips.clone()),
                    keepalive: keepalive.then(|| wanted.keepalive.unwrap_or(0)),
                });
            }
        }
        changes
    }
}

#[cfg(test)]
#[path = "device/tests.rs"]
mod tests;
