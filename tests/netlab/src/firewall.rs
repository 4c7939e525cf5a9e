use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::{Error, Result};

/// Transport or network protocol of a [`Rule`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// UDP.
    Udp,
    /// TCP.
    Tcp,
    /// ICMP and ICMPv6, neighbour discovery excepted.
    Icmp,
    /// Any other, by IP protocol number.
    Number(u8),
}

/// Ports of a [`Rule`], inclusive ranges.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ports {
    /// Destination port in the range.
    Destination(u16, u16),
    /// Source port in the range.
    Source(u16, u16),
    /// Source or destination port in the range.
    Either(u16, u16),
}

/// Which way a packet crosses the border of the namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Direction {
    /// Entering or leaving.
    #[default]
    Both,
    /// Entering, before any address translation and before connection tracking.
    In,
    /// Leaving, after any address translation. What the namespace's own sockets send fails with EPERM.
    Out,
}

/// IP packets to drop; every field that is set must match. The default matches everything but loopback.
/// ARP, neighbour discovery and multicast listener reports always pass. Later fragments of a datagram have no ports and match no port.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Rule {
    /// Protocol.
    pub protocol: Option<Protocol>,
    /// Ports; needs a protocol with ports.
    pub ports: Option<Ports>,
    /// Source prefix.
    pub source: Option<IpNet>,
    /// Destination prefix.
    pub destination: Option<IpNet>,
    /// Interface entered or left by.
    pub interface: Option<String>,
    /// Direction.
    pub direction: Direction,
    /// Share of the matching packets to drop, 0.0 to 1.0, chosen at random. `None`: all.
    pub share: Option<f64>,
}

impl Rule {
    /// Drops everything that is not loopback.
    pub fn any() -> Rule {
        Rule::default()
    }

    /// Drops UDP with this source or destination port.
    pub fn udp_port(port: u16) -> Rule {
        Rule { protocol: Some(Protocol::Udp), ports: Some(Ports::Either(port, port)), ..Rule::default() }
    }

    /// Drops TCP with this source or destination port.
    pub fn tcp_port(port: u16) -> Rule {
        Rule { protocol: Some(Protocol::Tcp), ports: Some(Ports::Either(port, port)), ..Rule::default() }
    }

    /// Drops a whole protocol.
    pub fn protocol(protocol: Protocol) -> Rule {
        Rule { protocol: Some(protocol), ..Rule::default() }
    }

    /// Drops what crosses an interface.
    pub fn interface(name: impl Into<String>) -> Rule {
        Rule { interface: Some(name.into()), ..Rule::default() }
    }

    /// Refuses a rule that can match nothing.
    pub(crate) fn validate(&self) -> Result<()> {
        let refuse = |why: &str| Err(Error::spec("block rule", why));
        let ports = match self.ports {
            Some(Ports::Destination(a, b) | Ports::Source(a, b) | Ports::Either(a, b)) => Some((a, b)),
            None => None,
        };
        if ports.is_some_and(|(first, last)| first > last) {
            return refuse("the port range ends before it begins");
        }
        if ports.is_some() && matches!(self.protocol, Some(Protocol::Icmp | Protocol::Number(_))) {
            return refuse("ports need UDP, TCP or no protocol");
        }
        if let (Some(source), Some(destination)) = (self.source, self.destination)
            && source.addr().is_ipv4() != destination.addr().is_ipv4()
        {
            return refuse("source and destination are of different families");
        }
        if self.share.is_some_and(|share| !(0.0..=1.0).contains(&share)) {
            return refuse("the share is outside 0.0 to 1.0");
        }
        let good = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if self.interface.as_ref().is_some_and(|name| name.is_empty() || !name.chars().all(good)) {
            return refuse("the interface name holds more than letters, digits, `-`, `_` and `.`");
        }
        Ok(())
    }

    /// The nftables matches of this rule for one hook; a packet is dropped when any of them holds.
    fn matches(&self, interface_key: &str) -> Vec<String> {
        let mut head = match &self.interface {
            Some(name) => format!("{interface_key} \"{name}\""),
            None => format!("{interface_key} != \"lo\""),
        };
        for (key, net) in [("saddr", self.source), ("daddr", self.destination)] {
            if let Some(net) = net {
                let family = if net.addr().is_ipv4() { "ip" } else { "ip6" };
                let _ = write!(head, " {family} {key} {}", net.trunc());
            }
        }
        let protocol = match self.protocol {
            Some(Protocol::Udp) => " meta l4proto udp".to_owned(),
            Some(Protocol::Tcp) => " meta l4proto tcp".to_owned(),
            Some(Protocol::Icmp) => " meta l4proto { icmp, ipv6-icmp }".to_owned(),
            Some(Protocol::Number(number)) => format!(" meta l4proto {number}"),
            None if self.ports.is_some() => " meta l4proto { tcp, udp }".to_owned(),
            None => String::new(),
        };
        let ports: Vec<String> = match self.ports {
            None => vec![String::new()],
            Some(Ports::Destination(first, last)) => vec![format!(" th dport {first}-{last}")],
            Some(Ports::Source(first, last)) => vec![format!(" th sport {first}-{last}")],
            Some(Ports::Either(first, last)) => vec![
                format!(" th dport {first}-{last}"),
                // Only what the first did not match, so that a share is drawn once per packet.
                format!(" th dport != {first}-{last} th sport {first}-{last}"),
            ],
        };
        let share = match self.share {
            Some(share) => {
                format!(" numgen random mod {SHARE_STEPS} < {}", (share * f64::from(SHARE_STEPS)).round())
            }
            None => String::new(),
        };
        ports.iter().map(|ports| format!("{head}{protocol}{ports}{share}")).collect()
    }

    /// Narrows to a source prefix.
    pub fn from(mut self, source: impl Into<IpNet>) -> Rule {
        self.source = Some(source.into());
        self
    }

    /// Narrows to a destination prefix.
    pub fn to(mut self, destination: impl Into<IpNet>) -> Rule {
        self.destination = Some(destination.into());
        self
    }

    /// Narrows to a source address.
    pub fn from_address(self, source: IpAddr) -> Rule {
        self.from(IpNet::from(source))
    }

    /// Narrows to a destination address.
    pub fn to_address(self, destination: IpAddr) -> Rule {
        self.to(IpNet::from(destination))
    }

    /// Narrows to a direction.
    pub fn direction(mut self, direction: Direction) -> Rule {
        self.direction = direction;
        self
    }

    /// Drops only this share of the packets (0.0 to 1.0), at random.
    pub fn share(mut self, share: f64) -> Rule {
        self.share = Some(share);
        self
    }
}

/// Names a rule in force; from [`crate::Namespace::block`], for [`crate::Namespace::unblock`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId(pub(crate) u64);

const SHARE_STEPS: u32 = 100_000;

/// The transaction that leaves exactly `rules` in force, keeping their counters, and forgets `removed`.
pub(crate) fn render(rules: &BTreeMap<u64, Rule>, removed: Option<u64>) -> String {
    let mut script = "add table inet netlab\n".to_owned();
    let hooks = [
        ("block_in", "prerouting priority -300", "iifname", Direction::Out),
        ("block_out", "postrouting priority 300", "oifname", Direction::In),
    ];
    for id in rules.keys() {
        let _ = writeln!(script, "add counter inet netlab block{id}");
    }
    for (chain, hook, interface_key, not) in hooks {
        let _ =
            writeln!(script, "add chain inet netlab {chain} {{ type filter hook {hook}; policy accept; }}");
        let _ = writeln!(script, "flush chain inet netlab {chain}");
        let _ = writeln!(script, "add rule inet netlab {chain} icmpv6 type {{ 130-137, 143 }} accept");
        for (id, rule) in rules.iter().filter(|(_, rule)| rule.direction != not) {
            for matches in rule.matches(interface_key) {
                let _ = writeln!(
                    script,
                    "add rule inet netlab {chain} {matches} counter name \"block{id}\" drop"
                );
            }
        }
    }
    if let Some(id) = removed {
        let _ = writeln!(script, "delete counter inet netlab block{id}");
    }
    script
}

/// The command that prints a block's counter.
pub(crate) fn list_counter(id: u64) -> String {
    format!("list counter inet netlab block{id}\n")
}

/// Reads what [`list_counter`] printed.
pub(crate) fn packets(listing: &str) -> Option<u64> {
    let mut words = listing.split_whitespace().skip_while(|word| *word != "packets");
    words.nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_rule_drops_both_ways_and_counts() {
        let rules = BTreeMap::from([(3, Rule::udp_port(51820).direction(Direction::Out))]);
        let script = render(&rules, Some(2));
        let rule = r#"add rule inet netlab block_out oifname != "lo" meta l4proto udp th dport 51820-51820 counter name "block3" drop"#;
        assert!(script.contains(rule), "{script}");
        assert!(!script.contains("block_in iifname"), "{script}");
        assert!(script.ends_with("delete counter inet netlab block2\n"), "{script}");
    }

    #[test]
    fn rules_that_match_nothing_are_refused() {
        let net = |text: &str| text.parse::<IpNet>().unwrap();
        assert!(Rule::any().from(net("10.0.0.0/8")).to(net("fd00::/8")).validate().is_err());
        assert!(Rule { ports: Some(Ports::Source(2, 1)), ..Rule::any() }.validate().is_err());
        assert!(
            Rule { ports: Some(Ports::Source(1, 1)), ..Rule::protocol(Protocol::Icmp) }.validate().is_err()
        );
        assert!(Rule::any().share(1.5).validate().is_err());
        assert!(Rule::interface("x\" drop").validate().is_err());
        assert!(Rule::interface("eth0").share(0.5).validate().is_ok());
    }

    #[test]
    fn counters_are_read() {
        let listing = "table inet netlab {\n\tcounter block1 {\n\t\tpackets 17 bytes 900\n\t}\n}\n";
        assert_eq!(packets(listing), Some(17));
        assert_eq!(packets(""), None);
    }
}
