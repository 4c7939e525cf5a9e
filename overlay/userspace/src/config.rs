//! What the device is told and what it tells: the UAPI's content without its syntax.

use std::net::SocketAddr;
use std::time::SystemTime;

use ipnet::IpNet;

use crate::key::{PresharedKey, PrivateKey, PublicKey};

/// One `set` operation, already validated.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DeviceUpdate {
    /// A new private key, or `Some(None)` to take the key away.
    pub private_key: Option<Option<PrivateKey>>,
    /// A new UDP port; 0 asks for any free one.
    pub listen_port: Option<u16>,
    /// A new firewall mark for outgoing datagrams; 0 removes it.
    pub fwmark: Option<u32>,
    /// Whether all peers go before `peers` are applied.
    pub replace_peers: bool,
    /// Changes to peers, in order.
    pub peers: Vec<PeerUpdate>,
}

/// Changes to one peer.
#[derive(Clone, Debug, PartialEq)]
pub struct PeerUpdate {
    /// Whose peer.
    pub public_key: PublicKey,
    /// Whether the peer goes.
    pub remove: bool,
    /// Whether to do nothing when there is no such peer yet.
    pub update_only: bool,
    /// A new preshared key, or `Some(None)` for none.
    pub preshared_key: Option<Option<PresharedKey>>,
    /// A new endpoint.
    pub endpoint: Option<SocketAddr>,
    /// A new persistent keepalive interval in seconds; 0 turns it off.
    pub persistent_keepalive: Option<u16>,
    /// Whether the peer's allowed IPs go before `allowed_ips` are applied.
    pub replace_allowed_ips: bool,
    /// Changes to the peer's allowed IPs, in order.
    pub allowed_ips: Vec<AllowedIpChange>,
}

impl PeerUpdate {
    /// An update that makes sure the peer exists and changes nothing else.
    pub fn new(public_key: PublicKey) -> Self {
        Self {
            public_key,
            remove: false,
            update_only: false,
            preshared_key: None,
            endpoint: None,
            persistent_keepalive: None,
            replace_allowed_ips: false,
            allowed_ips: Vec::new(),
        }
    }
}

/// A change to a peer's allowed IPs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AllowedIpChange {
    /// The peer gets the prefix, whoever has it now.
    Add(IpNet),
    /// The peer loses the prefix, if it has it.
    Remove(IpNet),
}

/// What a `get` operation shows of the device.
#[derive(Clone, Debug, Default)]
pub struct DeviceSnapshot {
    /// Our private key.
    pub private_key: Option<PrivateKey>,
    /// The peers, oldest first.
    pub peers: Vec<PeerSnapshot>,
}

/// What a `get` operation shows of one peer.
#[derive(Clone, Debug)]
pub struct PeerSnapshot {
    /// Whose peer.
    pub public_key: PublicKey,
    /// The preshared key, if any.
    pub preshared_key: Option<PresharedKey>,
    /// Where its last authentic message came from, or what was configured.
    pub endpoint: Option<SocketAddr>,
    /// When the last handshake was completed.
    pub last_handshake: Option<SystemTime>,
    /// Bytes of UDP payload sent.
    pub tx_bytes: u64,
    /// Bytes of authentic UDP payload received.
    pub rx_bytes: u64,
    /// The persistent keepalive interval in seconds; 0 for off.
    pub persistent_keepalive: u16,
    /// Its allowed IPs.
    pub allowed_ips: Vec<IpNet>,
}
