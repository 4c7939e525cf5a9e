//! Where a WireGuard peer may be dialled.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Why a text is not an endpoint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EndpointError {
    /// No `host:port`.
    #[error("endpoint {0:?}: write 192.0.2.1:51820, [2001:db8::1]:51820 or host.example:51820")]
    Syntax(String),
    /// Port 0 or above 65535.
    #[error("endpoint {0:?}: the port has to be 1 to 65535")]
    Port(String),
    /// An address that no other host can reach.
    #[error("endpoint {0:?}: {1} addresses cannot be dialled by another host")]
    Scope(String, &'static str),
}

/// An endpoint as claimed: an address, or a name still to be resolved.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Endpoint {
    /// A literal address.
    Address(SocketAddr),
    /// A DNS name and a port.
    Name(String, u16),
}

fn scope_error(ip: IpAddr) -> Option<&'static str> {
    match ip {
        IpAddr::V4(ip) if ip.is_unspecified() || ip.octets()[0] == 0 => Some("unspecified"),
        IpAddr::V4(ip) if ip.is_loopback() => Some("loopback"),
        IpAddr::V4(ip) if ip.is_multicast() => Some("multicast"),
        IpAddr::V4(ip) if ip.octets()[0] >= 240 => Some("reserved and broadcast"),
        IpAddr::V4(ip) if ip.is_link_local() => Some("link-local"),
        IpAddr::V6(ip) if ip.is_unspecified() => Some("unspecified"),
        IpAddr::V6(ip) if ip.is_loopback() => Some("loopback"),
        IpAddr::V6(ip) if ip.is_multicast() => Some("multicast"),
        IpAddr::V6(ip) if ip.is_unicast_link_local() => Some("link-local"),
        IpAddr::V6(ip) if ip.to_ipv4_mapped().is_some() => Some("IPv4-mapped"),
        _ => None,
    }
}

/// Whether other hosts could reach this address at all.
pub fn is_dialable(ip: IpAddr) -> bool {
    scope_error(ip).is_none()
}

fn host_name_ok(host: &str) -> bool {
    host.len() <= 253
        // A name of digits and dots only is a mistyped address.
        && host.bytes().any(|c| c.is_ascii_alphabetic())
        && host.split('.').all(|label| {
            !label.is_empty()
                && label.len() <= 63
                && label.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-')
                && !label.starts_with('-')
                && !label.ends_with('-')
        })
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        let shown = || text.chars().take(80).collect::<String>();
        let (host, port) = text.rsplit_once(':').ok_or_else(|| EndpointError::Syntax(shown()))?;
        let digits = !port.is_empty() && port.bytes().all(|c| c.is_ascii_digit());
        let port: u16 = match port.parse() {
            Ok(port) if port > 0 && digits => port,
            _ if digits => return Err(EndpointError::Port(shown())),
            _ => return Err(EndpointError::Syntax(shown())),
        };
        let ip = match host.strip_prefix('[').and_then(|h| h.strip_suffix(']')) {
            Some(inner) => {
                Some(IpAddr::V6(inner.parse::<Ipv6Addr>().map_err(|_| EndpointError::Syntax(shown()))?))
            }
            None => host.parse::<Ipv4Addr>().ok().map(IpAddr::V4),
        };
        match ip {
            Some(ip) => match scope_error(ip) {
                Some(scope) => Err(EndpointError::Scope(shown(), scope)),
                None => Ok(Self::Address(SocketAddr::new(ip, port))),
            },
            None if host_name_ok(host) => Ok(Self::Name(host.to_ascii_lowercase(), port)),
            None => Err(EndpointError::Syntax(shown())),
        }
    }
}

impl TryFrom<String> for Endpoint {
    type Error = EndpointError;
    fn try_from(text: String) -> Result<Self, EndpointError> {
        text.parse()
    }
}

impl From<Endpoint> for String {
    fn from(endpoint: Endpoint) -> String {
        endpoint.to_string()
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Name(host, port) => write!(f, "{host}:{port}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn addresses_and_names_are_parsed() {
        for text in ["192.0.2.1:51820", "[2001:db8::1]:1", "gw.example.org:65535", "node-1:51820"] {
            assert_eq!(text.parse::<Endpoint>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_cannot_be_dialled_is_refused() {
        for text in [
            "",
            ":",
            "1.2.3.4",
            "1.2.3.4:",
            "1.2.3.4:0",
            "1.2.3.4:65536",
            "1.2.3.4:+5",
            "2001:db8::1:51820",
            "[2001:db8::1%eth0]:5",
            "[::]:5",
            "0.0.0.0:5",
            "127.0.0.1:5",
            "[::1]:5",
            "224.0.0.1:5",
            "[ff02::1]:5",
            "255.255.255.255:5",
            "[fe80::1]:5",
            "169.254.1.1:5",
            "[::ffff:1.2.3.4]:5",
            "1.2.3.4.5:6",
            "300.1.1.1:5",
            "a b:5",
            "-a.b:5",
            "a..b:5",
            "évil:5",
            "a:b:5",
        ] {
            assert!(text.parse::<Endpoint>().is_err(), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused(text in "\\PC{0,90}") {
            if let Ok(endpoint) = text.parse::<Endpoint>() {
                prop_assert_eq!(endpoint.to_string().parse::<Endpoint>(), Ok(endpoint));
            }
        }
    }
}
