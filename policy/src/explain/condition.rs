//! What a rule asks for, and what a flow is instead.

use super::who;
use crate::evaluate::Flow;
use crate::model::{
    Condition, Icmp, Namespaces, NetworkSelector, Peer, PodSelector, Port, PortMatch, Scope, Side, Sites,
};
use crate::object::Key;
use crate::protocol::{Family, Protocol};
use crate::world::World;

/// Why a condition does not hold for a flow.
pub(super) fn missing(world: &World, condition: &Condition, flow: &Flow) -> String {
    let listed = |side: &Side, peers: &mut dyn Iterator<Item = &Peer>| {
        (
            who(world, flow.address(*side)),
            peers.map(|peer| peer_text(world, peer)).collect::<Vec<_>>().join("; "),
        )
    };
    let port = |side: &Side| match (flow.protocol.has_ports(), side) {
        (false, _) => flow.protocol.to_string(),
        (true, Side::Destination) => format!("{} {}", flow.protocol, flow.port),
        (true, Side::Source) => format!("{} from port {}", flow.protocol, flow.source_port),
    };
    match condition {
        Condition::Family(family) => format!("it is no {family}"),
        Condition::Protocol(protocol) => format!("{} is not {protocol}", flow.protocol),
        Condition::NotProtocol(protocol) => format!("it is {protocol}"),
        Condition::Ports(side, ports) => {
            let all: Vec<String> = ports.iter().map(|port| port_text(*side, port)).collect();
            format!("{} is none of: {}", port(side), all.join("; "))
        }
        Condition::NotPorts(_, Some(protocol), _) if flow.protocol != *protocol => {
            format!("{} is not {protocol}", flow.protocol)
        }
        Condition::NotPorts(side, protocol, ports) => {
            let protocol = protocol.unwrap_or(flow.protocol);
            let port_of = |ports: &PortMatch| Port { protocol, ports: ports.clone() };
            let all: Vec<String> = ports.iter().map(|ports| port_text(*side, &port_of(ports))).collect();
            format!("{} is one of: {}", port(side), all.join("; "))
        }
        Condition::Icmp(icmp) => format!("{} is not {}", begun(flow), icmp_text(icmp)),
        Condition::NotIcmp(icmp) => format!("{} is {}, or none of it", begun(flow), icmp_text(icmp)),
        Condition::Serves(service) => {
            let who = who(world, flow.destination);
            format!(
                "{} of {who} is no endpoint of {}",
                port(&Side::Destination),
                service_text(world, service)
            )
        }
        Condition::Is(side, peers) => {
            let (who, all) = listed(side, &mut peers.iter());
            format!("{who} is none of: {all}")
        }
        Condition::IsNot(side, peers) => {
            let is = |peer: &&Peer| world.is_peer(peer, flow.address(*side));
            let (who, all) = listed(side, &mut peers.iter().filter(is));
            format!("{who} is one of: {all}")
        }
    }
}

fn begun(flow: &Flow) -> String {
    match flow.protocol {
        Protocol::ICMP | Protocol::ICMPV6 => {
            format!("{} of type {} and code {}", flow.protocol, flow.icmp.0, flow.icmp.1)
        }
        protocol => protocol.to_string(),
    }
}

fn icmp_text(icmp: &Icmp) -> String {
    let protocol = if icmp.family == Family::V4 { Protocol::ICMP } else { Protocol::ICMPV6 };
    let code = icmp.code.map(|code| format!(" and code {code}")).unwrap_or_default();
    format!("{protocol} of type {}{code}", icmp.kind)
}

fn port_text(side: Side, port: &Port) -> String {
    let from = if side == Side::Source { " from" } else { "" };
    match &port.ports {
        PortMatch::Any => format!("{}, any port", port.protocol),
        PortMatch::Range(first, last) if first == last => format!("{}{from} {first}", port.protocol),
        PortMatch::Range(first, last) => format!("{}{from} {first} to {last}", port.protocol),
        PortMatch::Named(name) => format!("{} port {name:?} of the {}", port.protocol, side.as_str()),
    }
}

fn namespaces_text(namespaces: &Namespaces) -> String {
    match namespaces {
        Namespaces::Named(name) => format!("namespace {name}"),
        Namespaces::Selected(selector) => format!("namespaces with {selector}"),
    }
}

fn service_text(world: &World, service: &Key) -> String {
    let known: usize = world.endpoints(service).map(|endpoints| endpoints.addresses.len()).sum();
    match known {
        0 => format!("Service {service}, which has no EndpointSlice with an address"),
        known => format!("Service {service}, which has {known}"),
    }
}

fn peer_text(world: &World, peer: &Peer) -> String {
    match peer {
        Peer::Pods(PodSelector { namespaces, pods, accounts }) => {
            let accounts = accounts.as_ref();
            let accounts =
                accounts.map(|accounts| format!(" of service accounts with {accounts}")).unwrap_or_default();
            format!("pods with {pods}{accounts} in {}", namespaces_text(namespaces))
        }
        Peer::Networks(NetworkSelector { scope, labels }) => {
            let scope = match scope {
                Scope::Any => String::new(),
                Scope::Global => " in no namespace".to_owned(),
                Scope::In(namespaces) => format!(" in {}", namespaces_text(namespaces)),
                Scope::InOrNone(namespaces) => {
                    format!(" in {}, and in no namespace", namespaces_text(namespaces))
                }
            };
            format!("network sets and host endpoints with {labels}{scope}")
        }
        Peer::Block(block) if block.except.is_empty() => block.net.to_string(),
        Peer::Block(block) => {
            let except: Vec<String> = block.except.iter().map(ToString::to_string).collect();
            format!("{} except {}", block.net, except.join(", "))
        }
        Peer::Domains(domains) => {
            let all: Vec<String> = domains.iter().map(ToString::to_string).collect();
            format!("what {} were seen to resolve to", all.join(", "))
        }
        Peer::Nodes(selector) => format!("nodes with {selector}"),
        Peer::Service(service) => format!("endpoints of {}", service_text(world, service)),
        Peer::Sites(Sites::Named(name)) => format!("site {name}"),
        Peer::Sites(Sites::Not(name)) => format!("every site but {name}"),
        Peer::Sites(Sites::Any) => "every site".to_owned(),
    }
}
