//! The cross-platform configuration protocol of WireGuard (<https://www.wireguard.com/xplatform/>): requests and
//! answers as text. Pure.

use std::fmt::Write as _;
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use mesh_keyring::{PrivateKey, PublicKey};
use zeroize::Zeroizing;

use crate::device::{DeviceChange, ObservedDevice, ObservedPeer};

/// The request that shows everything.
pub(crate) const GET: &str = "get=1\n\n";

/// The request, of mesh-wg's own, that tells what it uses of the kernel.
pub(crate) const FEATURES: &str = "features=1\n\n";

/// What the answer to [`FEATURES`] says; nothing if it is none.
pub(crate) fn parse_features(answer: &str) -> Vec<String> {
    match parse_result(answer) {
        Ok(()) => answer
            .lines()
            .filter(|line| line.contains('=') && !line.starts_with("errno="))
            .map(str::to_owned)
            .collect(),
        Err(_) => Vec::new(),
    }
}

/// One change as a request of its own. It may hold the private key, so it is wiped on drop.
pub(crate) fn render(change: &DeviceChange, key: &PrivateKey) -> Zeroizing<String> {
    // Room for the private key from the start: a string that grows leaves copies behind.
    let mut text = Zeroizing::new(String::with_capacity(256));
    text.push_str("set=1\n");
    match change {
        DeviceChange::SetPrivateKey => {
            text.push_str("private_key=");
            text.push_str(&key.to_hex());
            text.push('\n');
        }
        DeviceChange::SetListenPort(port) => line(&mut text, "listen_port", port),
        DeviceChange::RemovePeer(peer) => {
            line(&mut text, "public_key", peer.to_hex());
            line(&mut text, "remove", true);
        }
        DeviceChange::SetPeer { key: peer, new, endpoint, allowed_ips, keepalive } => {
            line(&mut text, "public_key", peer.to_hex());
            if !new {
                line(&mut text, "update_only", true);
            }
            if let Some(endpoint) = endpoint {
                line(&mut text, "endpoint", endpoint);
            }
            if let Some(seconds) = keepalive {
                line(&mut text, "persistent_keepalive_interval", seconds);
            }
            if let Some(nets) = allowed_ips {
                line(&mut text, "replace_allowed_ips", true);
                for net in nets {
                    line(&mut text, "allowed_ip", net);
                }
            }
        }
    }
    text.push('\n');
    text
}

fn line(text: &mut String, key: &str, value: impl std::fmt::Display) {
    let _ = writeln!(text, "{key}={value}");
}

/// An answer that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum AnswerError {
    /// The device refused, with the number of the error.
    #[error("{}", std::io::Error::from_raw_os_error(*.0))]
    Errno(i32),
    /// No answer of this protocol.
    #[error("the device's answer is no UAPI answer")]
    Garbled,
}

/// What the answer to a `set` says.
pub(crate) fn parse_result(answer: &str) -> Result<(), AnswerError> {
    let value = answer.lines().find_map(|line| line.strip_prefix("errno=")).ok_or(AnswerError::Garbled)?;
    match value.trim().parse::<i32>() {
        Ok(0) => Ok(()),
        // wireguard-go answers with negative numbers.
        Ok(number) => Err(AnswerError::Errno(number.saturating_abs())),
        Err(_) => Err(AnswerError::Garbled),
    }
}

/// The answer to a `get`. Lines that it does not know are skipped, and so is a peer whose key is none; a value
/// that does not parse counts as absent, so that the next pass writes it anew.
pub(crate) fn parse_device(answer: &str) -> Result<ObservedDevice, AnswerError> {
    parse_result(answer)?;
    let mut device = ObservedDevice::default();
    let mut current: Option<(PublicKey, ObservedPeer)> = None;
    let mut since_epoch = Duration::ZERO;
    let mut in_peers = false;
    for line in answer.lines() {
        let Some((name, value)) = line.split_once('=') else { continue };
        if name == "public_key" {
            device.peers.extend(current.take());
            current = hex_key(value)
                .and_then(|bytes| PublicKey::from_bytes(*bytes).ok())
                .map(|key| (key, ObservedPeer::default()));
            since_epoch = Duration::ZERO;
            in_peers = true;
            continue;
        }
        if !in_peers {
            match name {
                "private_key" => {
                    let key = hex_key(value).and_then(|bytes| PrivateKey::from_bytes(&bytes).ok());
                    device.public_key = key.map(|key| key.public());
                }
                "listen_port" => device.listen_port = value.parse().unwrap_or(0),
                _ => {}
            }
            continue;
        }
        let Some((_, peer)) = &mut current else { continue };
        match name {
            "endpoint" => peer.endpoint = value.parse().ok(),
            "allowed_ip" => peer.allowed_ips.extend(value.parse::<IpNet>().ok().map(|net| net.trunc())),
            "persistent_keepalive_interval" => {
                peer.keepalive = value.parse().ok().filter(|seconds| *seconds > 0);
            }
            "rx_bytes" => peer.rx_bytes = value.parse().unwrap_or(0),
            "tx_bytes" => peer.tx_bytes = value.parse().unwrap_or(0),
            "last_handshake_time_sec" => {
                since_epoch += Duration::from_secs(value.parse().unwrap_or(0));
                peer.last_handshake = handshake(since_epoch);
            }
            "last_handshake_time_nsec" => {
                let nanos: u32 = value.parse().unwrap_or(0);
                since_epoch = since_epoch.saturating_add(Duration::from_nanos(u64::from(nanos)));
                peer.last_handshake = handshake(since_epoch);
            }
            _ => {}
        }
    }
    device.peers.extend(current);
    Ok(device)
}

/// Zero means that there was none.
fn handshake(since_epoch: Duration) -> Option<SystemTime> {
    if since_epoch.is_zero() { None } else { SystemTime::UNIX_EPOCH.checked_add(since_epoch) }
}

fn hex_key(text: &str) -> Option<Zeroizing<[u8; 32]>> {
    let digits = text.as_bytes();
    if digits.len() != 64 {
        return None;
    }
    let mut key = Zeroizing::new([0; 32]);
    for (byte, pair) in key.iter_mut().zip(digits.chunks_exact(2)) {
        let nibble = |digit: u8| char::from(digit).to_digit(16).and_then(|value| u8::try_from(value).ok());
        *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
    }
    Some(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_told_by_those_who_know_the_question_alone() {
        let answer = "tun-tso=on\nudp-gso=off\nthreads=1\nerrno=0\n\n";
        assert_eq!(parse_features(answer), ["tun-tso=on", "udp-gso=off", "threads=1"]);
        for other in ["errno=-71\n\n", "", "errno=\n\n", "tun-tso=on\n"] {
            assert!(parse_features(other).is_empty(), "{other:?}");
        }
    }
    use proptest::prelude::*;

    fn key(n: u8) -> PrivateKey {
        PrivateKey::from_bytes(&[n; 32]).unwrap()
    }

    #[test]
    fn an_answer_is_read_with_all_that_it_tells_of_a_peer() {
        let (own, peer) = (key(1), key(2).public());
        let text = format!(
            "private_key={}\nlisten_port=51820\nfwmark=1\npublic_key={}\npreshared_key={}\nprotocol_version=1\n\
             endpoint=[2001:db8::1]:51820\nlast_handshake_time_sec=12\nlast_handshake_time_nsec=5\ntx_bytes=3\n\
             rx_bytes=4\npersistent_keepalive_interval=25\nallowed_ip=10.2.0.0/24\nallowed_ip=fd00::/64\nerrno=0\n\n",
            own.to_hex().as_str(),
            peer.to_hex(),
            "0".repeat(64),
        );
        let device = parse_device(&text).unwrap();
        assert_eq!(device.public_key, Some(own.public()));
        assert_eq!(device.listen_port, 51820);
        let found = &device.peers[&peer];
        assert_eq!(found.endpoint, Some("[2001:db8::1]:51820".parse().unwrap()));
        assert_eq!((found.tx_bytes, found.rx_bytes, found.keepalive), (3, 4, Some(25)));
        assert_eq!(found.allowed_ips.len(), 2);
        assert_eq!(found.last_handshake, Some(SystemTime::UNIX_EPOCH + Duration::new(12, 5)));
    }

    #[test]
    fn a_peer_without_handshake_has_none() {
        let text = format!(
            "public_key={}\nlast_handshake_time_sec=0\nlast_handshake_time_nsec=0\nerrno=0\n\n",
            key(2).public().to_hex()
        );
        assert_eq!(parse_device(&text).unwrap().peers[&key(2).public()], ObservedPeer::default());
    }

    #[test]
    fn an_endpoint_alone_leaves_allowed_ips_alone_and_never_makes_a_peer() {
        let change = DeviceChange::SetPeer {
            key: key(2).public(),
            new: false,
            endpoint: Some("192.0.2.1:51820".parse().unwrap()),
            allowed_ips: None,
            keepalive: None,
        };
        let text = render(&change, &key(1));
        assert!(text.contains("update_only=true\n") && text.contains("endpoint=192.0.2.1:51820\n"));
        assert!(!text.contains("replace_allowed_ips") && !text.contains("private_key"), "{}", *text);
        assert!(text.ends_with("\n\n"));
    }

    #[test]
    fn a_refusal_is_an_error_whatever_its_sign() {
        assert_eq!(parse_result("errno=0\n\n"), Ok(()));
        assert_eq!(parse_result("errno=98\n\n"), Err(AnswerError::Errno(98)));
        assert_eq!(parse_result("errno=-98\n\n"), Err(AnswerError::Errno(98)));
        assert_eq!(parse_result("errno=x\n\n"), Err(AnswerError::Garbled));
        assert_eq!(parse_result(""), Err(AnswerError::Garbled));
    }

    proptest! {
        #[test]
        fn any_answer_is_parsed_or_refused(text in "(([a-z_]{0,30}=)?[0-9a-f:./\\[\\]-]{0,70}\n){0,20}(errno=0\n)?") {
            let _ = parse_device(&text);
        }
    }
}
