//! UAPI requests as pure functions: lines to an [`Operation`].

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};

use ipnet::IpNet;
use zeroize::Zeroize;

use crate::config::{AllowedIpChange, DeviceUpdate, PeerUpdate};
use crate::key::{PresharedKey, PrivateKey, PublicKey, parse_hex};

/// The longest line in bytes, far beyond the longest meaningful one.
pub const MAX_LINE: usize = 1024;
/// The longest request in bytes; 5,000 peers with ten prefixes each take about 3 MB.
pub const MAX_REQUEST: usize = 64 << 20;

/// A complete request.
#[derive(Clone, Debug, PartialEq)]
pub enum Operation {
    /// Show everything.
    Get,
    /// Change something.
    Set(DeviceUpdate),
    /// Tell what is in force of what the kernel offers: an operation of ours, which wg(8) does not know.
    Features,
}

/// Why a request is refused. Nothing of it has been applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// A value does not fit its key, or the key is unknown or out of place.
    #[error("line {line} of the request has an unknown key or a bad value")]
    Invalid {
        /// The line's number, from 1.
        line: usize,
    },
    /// The line is not `key=value`, or the request does not begin with an operation.
    #[error("line {line} of the request is no part of the UAPI protocol")]
    Protocol {
        /// The line's number, from 1.
        line: usize,
    },
    /// A line or the whole request is too long.
    #[error("line {line} of the request exceeds the size limit")]
    TooLong {
        /// The line's number, from 1.
        line: usize,
    },
}

impl RequestError {
    /// The number for the `errno=` line.
    pub fn errno(self) -> i32 {
        match self {
            Self::Invalid { .. } => libc::EINVAL,
            Self::Protocol { .. } => libc::EPROTO,
            Self::TooLong { .. } => libc::E2BIG,
        }
    }
}

/// Names of network interfaces to their indices, for the scope in `[fe80::1%eth0]:51820`.
pub type ScopeOf<'a> = &'a dyn Fn(&str) -> Option<u32>;

/// Builds an [`Operation`] from lines as they arrive, so that nothing but the result is kept.
///
/// After an error it swallows lines up to the empty one that ends the request, and reports the error there.
pub struct Reader<'a> {
    scope_of: ScopeOf<'a>,
    state: State,
    failed: Option<RequestError>,
    line: usize,
    bytes: usize,
}

enum State {
    Start,
    Get,
    Features,
    Device(DeviceUpdate),
    Peer(DeviceUpdate, PeerUpdate),
}

impl<'a> Reader<'a> {
    /// A reader at the beginning of a request.
    pub fn new(scope_of: ScopeOf<'a>) -> Self {
        Self { scope_of, state: State::Start, failed: None, line: 0, bytes: 0 }
    }

    /// Whether no line of a request has been seen.
    pub fn is_fresh(&self) -> bool {
        self.line == 0
    }

    /// Takes one line without its line feed. `Some` when the line ended the request; the reader is fresh then.
    pub fn line(&mut self, line: &[u8]) -> Option<Result<Operation, RequestError>> {
        self.line += 1;
        self.bytes += line.len() + 1;
        if line.is_empty() {
            let state = std::mem::replace(&mut self.state, State::Start);
            let result = match (self.failed.take(), state) {
                (Some(error), _) => Err(error),
                (None, State::Start) => Err(RequestError::Protocol { line: self.line }),
                (None, State::Get) => Ok(Operation::Get),
                (None, State::Features) => Ok(Operation::Features),
                (None, State::Device(update)) => Ok(Operation::Set(update)),
                (None, State::Peer(mut update, peer)) => {
                    update.peers.push(peer);
                    Ok(Operation::Set(update))
                }
            };
            (self.line, self.bytes) = (0, 0);
            return Some(result);
        }
        if self.failed.is_none()
            && let Err(error) = self.step(line)
        {
            self.failed = Some(error);
            self.state = State::Start;
        }
        None
    }

    fn step(&mut self, line: &[u8]) -> Result<(), RequestError> {
        let number = self.line;
        if line.len() > MAX_LINE || self.bytes > MAX_REQUEST {
            return Err(RequestError::TooLong { line: number });
        }
        let protocol = RequestError::Protocol { line: number };
        let text = std::str::from_utf8(line).map_err(|_| protocol)?;
        let (key, value) = text.split_once('=').ok_or(protocol)?;
        let invalid = RequestError::Invalid { line: number };
        match &mut self.state {
            State::Start => {
                self.state = match (key, value) {
                    ("get", "1") => State::Get,
                    ("features", "1") => State::Features,
                    ("set", "1") => State::Device(DeviceUpdate::default()),
                    _ => return Err(protocol),
                };
                Ok(())
            }
            State::Get | State::Features => Err(protocol),
            State::Device(_) | State::Peer(..) if key == "public_key" => {
                let next = PeerUpdate::new(PublicKey::new(parse_hex(value).ok_or(invalid)?));
                self.state = match std::mem::replace(&mut self.state, State::Start) {
                    State::Device(update) => State::Peer(update, next),
                    State::Peer(mut update, peer) => {
                        update.peers.push(peer);
                        State::Peer(update, next)
                    }
                    other => other,
                };
                Ok(())
            }
            State::Device(update) => device_line(update, key, value).ok_or(invalid),
            State::Peer(_, peer) => peer_line(peer, key, value, self.scope_of).ok_or(invalid),
        }
    }
}

fn device_line(update: &mut DeviceUpdate, key: &str, value: &str) -> Option<()> {
    match key {
        "private_key" => {
            let mut bytes = parse_hex(value)?;
            update.private_key = Some(PrivateKey::new(bytes));
            bytes.zeroize();
        }
        "listen_port" => update.listen_port = Some(number(value)?),
        "fwmark" => update.fwmark = Some(number(value)?),
        "replace_peers" => {
            truth(value)?;
            update.replace_peers = true;
        }
        _ => return None,
    }
    Some(())
}

fn peer_line(peer: &mut PeerUpdate, key: &str, value: &str, scope_of: ScopeOf<'_>) -> Option<()> {
    match key {
        "remove" => {
            truth(value)?;
            peer.remove = true;
        }
        "update_only" => {
            truth(value)?;
            peer.update_only = true;
        }
        "preshared_key" => {
            let mut bytes = parse_hex(value)?;
            peer.preshared_key = Some(PresharedKey::new(bytes));
            bytes.zeroize();
        }
        "endpoint" => peer.endpoint = Some(endpoint(value, scope_of)?),
        "persistent_keepalive_interval" => peer.persistent_keepalive = Some(number(value)?),
        "replace_allowed_ips" => {
            truth(value)?;
            peer.replace_allowed_ips = true;
            peer.allowed_ips.clear();
        }
        "allowed_ip" => {
            let change = match value.strip_prefix('-') {
                Some(prefix) => AllowedIpChange::Remove(prefix_of(prefix)?),
                None => AllowedIpChange::Add(prefix_of(value.strip_prefix('+').unwrap_or(value))?),
            };
            peer.allowed_ips.push(change);
        }
        "protocol_version" => {
            if value != "1" {
                return None;
            }
        }
        _ => return None,
    }
    Some(())
}

fn truth(value: &str) -> Option<()> {
    (value == "true").then_some(())
}

// Unlike `str::parse`, this takes no leading plus sign.
fn number<T: std::str::FromStr>(value: &str) -> Option<T> {
    value.bytes().all(|byte| byte.is_ascii_digit()).then(|| value.parse().ok())?
}

fn prefix_of(value: &str) -> Option<IpNet> {
    let net = match value.split_once('/') {
        Some((address, length)) => IpNet::new(address.parse().ok()?, number(length)?).ok()?,
        None => IpNet::from(value.parse::<IpAddr>().ok()?),
    };
    Some(net.trunc())
}

fn endpoint(value: &str, scope_of: ScopeOf<'_>) -> Option<SocketAddr> {
    let (host, port) = value.rsplit_once(':')?;
    let port: u16 = number(port)?;
    let endpoint = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        Some(host) => {
            let (address, scope) = match host.split_once('%') {
                Some((address, scope)) => (address, number(scope).or_else(|| scope_of(scope))?),
                None => (host, 0),
            };
            let address: Ipv6Addr = address.parse().ok()?;
            match address.to_ipv4_mapped() {
                // An IPv6-only socket cannot send to a mapped address.
                Some(v4) => SocketAddr::V4(SocketAddrV4::new(v4, port)),
                None => SocketAddr::V6(SocketAddrV6::new(address, port, 0, scope)),
            }
        }
        None => SocketAddr::V4(SocketAddrV4::new(host.parse::<Ipv4Addr>().ok()?, port)),
    };
    Some(endpoint)
}

/// Parses the lines of one whole `set` request that follow `set=1`, without the empty line at the end.
pub fn parse_set(lines: &str, scope_of: ScopeOf<'_>) -> Result<DeviceUpdate, RequestError> {
    let mut reader = Reader::new(scope_of);
    reader.line(b"set=1");
    for line in lines.lines().filter(|line| !line.is_empty()) {
        reader.line(line.as_bytes());
    }
    match reader.line(b"") {
        Some(Ok(Operation::Set(update))) => Ok(update),
        Some(Err(error)) => Err(error),
        Some(Ok(Operation::Get | Operation::Features)) | None => Err(RequestError::Protocol { line: 1 }),
    }
}
