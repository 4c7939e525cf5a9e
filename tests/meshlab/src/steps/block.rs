//! `block`, `unblock` and the sites' firewalls.

use ipnet::IpNet;
use netlab::{Namespace, Ports, Rule};

use super::{Trouble, Verdict};
use crate::report::count;
use crate::scenario::step::Block;
use crate::scenario::value::OneOrMany;
use crate::scenario::{Direction, FirewallRule, Protocol};
use crate::stage::{PlacedBlock, Stage};

const ROUTER_INTERFACE: &str = "uplink";
const NODE_INTERFACE: &str = "eth0";

/// The rules that a site's router gets from one line of the scenario's firewall.
pub(crate) fn firewall_rules(rule: &FirewallRule) -> Vec<Rule> {
    let ports = rule.port.map(|port| Ports::Destination(port, port));
    rules(rule.protocol, ports, rule.address.as_deref(), rule.direction, ROUTER_INTERFACE)
}

/// One rule, or two where the other end's address is the source one way and the destination the other way.
fn rules(
    protocol: Option<Protocol>,
    ports: Option<Ports>,
    address: Option<&str>,
    direction: Direction,
    interface: &str,
) -> Vec<Rule> {
    let plain = Rule {
        protocol: protocol.map(|protocol| match protocol {
            Protocol::Udp => netlab::Protocol::Udp,
            Protocol::Tcp => netlab::Protocol::Tcp,
            Protocol::Icmp => netlab::Protocol::Icmp,
        }),
        ports,
        interface: Some(interface.to_owned()),
        ..Rule::any()
    };
    // Checked when the scenario was read.
    let other: Option<IpNet> = address.and_then(|text| {
        text.parse().ok().or_else(|| Some(IpNet::from(text.parse::<std::net::IpAddr>().ok()?)))
    });
    let inward = || Rule { source: other, direction: netlab::Direction::In, ..plain.clone() };
    let outward = || Rule { destination: other, direction: netlab::Direction::Out, ..plain.clone() };
    match (direction, other) {
        (Direction::In, _) => vec![inward()],
        (Direction::Out, _) => vec![outward()],
        (Direction::Both, None) => vec![plain],
        (Direction::Both, Some(_)) => vec![inward(), outward()],
    }
}

/// Puts up a block at sites' routers and nodes.
pub(super) fn place(stage: &mut Stage, block: &Block) -> Verdict {
    let ports = block.port.map(|port| Ports::Either(port, port));
    let mut placed = Vec::new();
    for (at, namespace, interface) in places(stage, &block.at)? {
        for rule in rules(block.protocol, ports, block.address.as_deref(), block.direction, interface) {
            let id = namespace.block(rule)?;
            placed.push(PlacedBlock { at: at.clone(), namespace: namespace.clone(), id });
        }
    }
    let detail = format!("{} at {}", count(placed.len(), "rule"), block.at);
    stage.blocks.extend(placed);
    Ok(detail)
}

/// Takes away all blocks at these places.
pub(super) fn lift(stage: &mut Stage, at: &OneOrMany) -> Verdict {
    let named = |block: &PlacedBlock| at.iter().any(|name| name == "all" || name == block.at);
    let (lifted, kept): (Vec<_>, Vec<_>) = std::mem::take(&mut stage.blocks).into_iter().partition(named);
    stage.blocks = kept;
    if lifted.is_empty() {
        return Err(Trouble::failed(format!("no block stands at {at}")));
    }
    for block in &lifted {
        block.namespace.unblock(block.id)?;
    }
    Ok(format!("{} lifted", count(lifted.len(), "rule")))
}

/// Each word's namespace and the interface that the rule stands on; `all` means every site.
/// The routers forget their connections.
pub(super) fn forget_nat(stage: &mut Stage, sites: &OneOrMany) -> Verdict {
    let routers = places(stage, sites)?;
    for (_, router, _) in &routers {
        router.flush_connections()?;
    }
    Ok(count(routers.len(), "router"))
}

fn places(stage: &Stage, at: &OneOrMany) -> Result<Vec<(String, Namespace, &'static str)>, Trouble> {
    let mut found = Vec::new();
    for name in at.iter() {
        for site in stage.layout.sites.iter().filter(|site| name == "all" || site.name == name) {
            let router = stage.lab.site(&site.name)?;
            found.push((site.name.clone(), (**router).clone(), ROUTER_INTERFACE));
        }
        if stage.layout.node(name).is_some() {
            found.push((name.to_owned(), (**stage.lab.host(name)?).clone(), NODE_INTERFACE));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_the_source_inwards_and_the_destination_outwards() {
        let rule = FirewallRule { address: Some("10.0.0.1".into()), ..FirewallRule::default() };
        let rules = firewall_rules(&rule);
        assert_eq!(rules.len(), 2);
        assert_eq!((rules[0].source, rules[0].destination), ("10.0.0.1/32".parse().ok(), None));
        assert_eq!((rules[1].source, rules[1].destination), (None, "10.0.0.1/32".parse().ok()));
    }

    #[test]
    fn a_rule_stands_on_the_border_and_not_inside() {
        let rule =
            FirewallRule { protocol: Some(Protocol::Udp), port: Some(51820), ..FirewallRule::default() };
        let rules = firewall_rules(&rule);
        assert_eq!(rules.len(), 1);
        assert_eq!(rules[0].interface.as_deref(), Some("uplink"));
        assert_eq!(rules[0].ports, Some(Ports::Destination(51820, 51820)));
        assert_eq!(rules[0].direction, netlab::Direction::Both);
    }
}
