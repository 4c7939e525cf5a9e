//! UAPI answers as pure functions.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::time::UNIX_EPOCH;

use crate::config::{DeviceSnapshot, PeerSnapshot};
use crate::features::Features;
use crate::key::push_hex;

/// What a `get` operation shows of the sockets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketSnapshot {
    /// The UDP port; 0 while there is none.
    pub listen_port: u16,
    /// The firewall mark; 0 for none.
    pub fwmark: u32,
}

/// The answer to `get=1`, from its first line to the empty one at its end. It holds secret keys.
pub fn render_get(device: &DeviceSnapshot, sockets: SocketSnapshot) -> String {
    let mut out = String::with_capacity(256 + device.peers.len() * 512);
    if let Some(key) = &device.private_key {
        push_key(&mut out, "private_key", key.expose());
    }
    if sockets.listen_port != 0 {
        push(&mut out, "listen_port", sockets.listen_port);
    }
    if sockets.fwmark != 0 {
        push(&mut out, "fwmark", sockets.fwmark);
    }
    for peer in &device.peers {
        push_peer(&mut out, peer);
    }
    out.push_str("errno=0\n\n");
    out
}

/// The answer to `features=1`: a line for each feature, `on` or `off`, and the number of threads.
pub fn render_features(features: Features, threads: usize) -> String {
    let mut out = String::new();
    for (name, on) in features.iter() {
        push(&mut out, name, if on { "on" } else { "off" });
    }
    push(&mut out, "threads", threads);
    out.push_str("errno=0\n\n");
    out
}

/// An answer that is nothing but a result: 0 for success, else an `errno` value, which wg(8) and wireguard-go
/// write with a minus sign.
pub fn render_errno(errno: i32) -> String {
    format!("errno={}\n\n", -errno.abs())
}

fn push_peer(out: &mut String, peer: &PeerSnapshot) {
    push_key(out, "public_key", peer.public_key.as_bytes());
    push_key(out, "preshared_key", peer.preshared_key.as_ref().map_or(&[0; 32], |key| key.expose()));
    push(out, "protocol_version", 1);
    match peer.endpoint {
        Some(SocketAddr::V6(v6)) if v6.scope_id() != 0 => {
            let _ = writeln!(out, "endpoint=[{}%{}]:{}", v6.ip(), v6.scope_id(), v6.port());
        }
        Some(endpoint) => push(out, "endpoint", endpoint),
        None => {}
    }
    let handshake = peer.last_handshake.and_then(|at| at.duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
    push(out, "last_handshake_time_sec", handshake.as_secs());
    push(out, "last_handshake_time_nsec", handshake.subsec_nanos());
    push(out, "tx_bytes", peer.tx_bytes);
    push(out, "rx_bytes", peer.rx_bytes);
    push(out, "persistent_keepalive_interval", peer.persistent_keepalive);
    for prefix in &peer.allowed_ips {
        push(out, "allowed_ip", prefix);
    }
}

fn push(out: &mut String, key: &str, value: impl std::fmt::Display) {
    // Writing to a String cannot fail.
    let _ = writeln!(out, "{key}={value}");
}

fn push_key(out: &mut String, key: &str, bytes: &[u8; 32]) {
    out.push_str(key);
    out.push('=');
    push_hex(out, bytes);
    out.push('\n');
}
