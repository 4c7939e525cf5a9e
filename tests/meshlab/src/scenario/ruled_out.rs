//! What a scenario's network and configuration rule out, whatever its steps do.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use super::{Family, Nat, Scenario, Site};
use crate::layout::{Layout, NodeLayout, SiteLayout};
use crate::manifest;
use crate::selector::End;

/// The smallest underlay that agents take, in bytes: IPv6 inside of the mesh needs 1280, WireGuard adds 80.
const AGENTS_LEAST_MTU: u16 = 1360;
/// The agent configuration's top level.
const AGENT_KEYS: [&str; 17] = [
    "node",
    "site",
    "mesh",
    "guard",
    "stateDir",
    "runDir",
    "registry",
    "wireguard",
    "underlay",
    "sites",
    "protectedAddresses",
    "routing",
    "vxlan",
    "encryption",
    "metrics",
    "policy",
    "log",
];

/// An MTU that no agent would start with.
pub(super) fn mtu(scenario: &Scenario, site: &Site) -> Result<(), String> {
    if !scenario.agents || !too_small(site.mtu) {
        return Ok(());
    }
    Err(format!(
        "site `{}`: mtu {} is too small for agents; write {AGENTS_LEAST_MTU} to 9000, or `agents: false`",
        site.name, site.mtu
    ))
}

/// Whether an underlay MTU is too small for agents.
pub(super) fn too_small(mtu: u16) -> bool {
    mtu < AGENTS_LEAST_MTU
}

/// Fragments with keys that no agent knows.
pub(super) fn fragments(scenario: &Scenario) -> Vec<String> {
    let mesh = &scenario.mesh;
    let named = std::iter::once(("config".to_owned(), &mesh.config))
        .chain(mesh.per_site.iter().map(|(name, fragment)| (format!("perSite.{name}"), fragment)))
        .chain(mesh.per_node.iter().map(|(name, fragment)| (format!("perNode.{name}"), fragment)));
    named
        .flat_map(|(place, fragment)| fragment.keys().map(move |key| (place.clone(), key)))
        .filter(|(_, key)| !AGENT_KEYS.contains(&key.as_str()))
        .map(|(place, key)| {
            format!("mesh.{place}: an agent has no setting `{key}`; there are {}", AGENT_KEYS.join(", "))
        })
        .collect()
}

/// Families of a site's pods, where it has pods.
fn pod_families(site: &SiteLayout) -> Option<BTreeSet<Family>> {
    let first = site.nodes.iter().flat_map(|node| &node.pods).next()?;
    Some(first.addresses.iter().map(|address| Family::of(*address)).collect())
}

/// A pod matrix that would pass some pods over in silence.
pub(super) fn pod_matrix(layout: &Layout, families: Option<&[Family]>) -> Result<(), String> {
    let sites: Vec<(&SiteLayout, BTreeSet<Family>)> =
        layout.sites.iter().filter_map(|site| Some((site, pod_families(site)?))).collect();
    let label = |set: &BTreeSet<Family>| set.iter().map(|f| f.label()).collect::<Vec<_>>().join(" and ");
    if let Some(families) = families {
        // Families written down are wanted as they are; only a matrix of nothing is an error.
        let pods =
            layout.pods().filter(|pod| pod.addresses.iter().any(|a| families.contains(&Family::of(*a))));
        let mut having: BTreeMap<Family, usize> = BTreeMap::new();
        for address in pods.flat_map(|pod| &pod.addresses) {
            *having.entry(Family::of(*address)).or_default() += 1;
        }
        if families.iter().any(|family| having.get(family).is_some_and(|pods| *pods >= 2)) {
            return Ok(());
        }
        let have: Vec<String> =
            sites.iter().map(|(site, set)| format!("`{}` {}", site.name, label(set))).collect();
        return Err(format!("no two pods share a family of {}: {}", list(families), have.join(", ")));
    }
    for (index, (a, of_a)) in sites.iter().enumerate() {
        for (b, of_b) in &sites[index + 1..] {
            if of_a.is_disjoint(of_b) {
                return Err(format!(
                    "the pods of sites `{}` ({}) and `{}` ({}) share no address family; write `families` or `pairs`",
                    a.name,
                    label(of_a),
                    b.name,
                    label(of_b)
                ));
            }
        }
    }
    Ok(())
}

fn list(families: &[Family]) -> String {
    families.iter().map(|family| family.label()).collect::<Vec<_>>().join(", ")
}

/// A probe between ends of which the file tells that they share no family; nodes' mesh addresses it does not tell.
pub(super) fn pair(from: &End<'_>, to: &End<'_>, family: Option<Family>) -> Result<(), String> {
    let of = |end: &End<'_>| -> Option<BTreeSet<Family>> {
        match end {
            End::Pod(pod) => Some(pod.addresses.iter().map(|address| Family::of(*address)).collect()),
            End::Address(address) => Some(BTreeSet::from([Family::of(*address)])),
            End::Node(_) => None,
        }
    };
    let (Some(mut here), Some(there)) = (of(from), of(to)) else { return Ok(()) };
    here.retain(|own| there.contains(own) && family.is_none_or(|wanted| wanted == *own));
    if from != to && here.is_empty() {
        let what = family.map_or("no address family".to_owned(), |family| format!("no {}", family.label()));
        return Err(format!("{} and {} share {what}", from.name(), to.name()));
    }
    Ok(())
}

/// How a node stands to the other sites.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Standing {
    behind_nat: bool,
    /// Behind a NAT that shows everybody the same port.
    cone: bool,
    /// Families that it can dial in.
    speaks: BTreeSet<Family>,
    /// Families in which it says that others can dial it.
    listens: BTreeSet<Family>,
}

impl Standing {
    fn of(scenario: &Scenario, layout: &Layout, node: &NodeLayout) -> Self {
        let nat = layout.site(&node.site).map_or(Nat::None, |site| site.nat);
        let behind_nat = nat != Nat::None;
        let speaks: BTreeSet<Family> = node.lan.iter().map(|address| Family::of(*address)).collect();
        let listens = match manifest::outside_endpoints(scenario, layout, node) {
            // What an agent finds out by itself behind a NAT is an address of the LAN.
            None if behind_nat => BTreeSet::new(),
            None => speaks.clone(),
            Some(list) => list
                .iter()
                .flat_map(|endpoint| match endpoint.parse::<SocketAddr>() {
                    Ok(address) => vec![Family::of(address.ip())],
                    // A name may stand for both.
                    Err(_) => vec![Family::Ipv4, Family::Ipv6],
                })
                .collect(),
        };
        Self { behind_nat, cone: nat == Nat::Cone, speaks, listens }
    }

    /// Two nodes behind cones meet, if a third one tells both how they look from outside. Only IPv4 is translated.
    fn can_meet(&self, other: &Self, scenario: &Scenario, layout: &Layout) -> bool {
        let v4 = |one: &Self| one.cone && one.speaks.contains(&Family::Ipv4);
        let tells = |node: &NodeLayout| {
            let standing = Self::of(scenario, layout, node);
            !standing.behind_nat && standing.listens.contains(&Family::Ipv4)
        };
        v4(self) && v4(other) && layout.nodes().any(tells)
    }

    fn can_dial(&self, other: &Self) -> bool {
        !self.speaks.is_disjoint(&other.listens)
    }
}

/// Two sites of which no node can dial the other's.
pub(super) fn handshakes(scenario: &Scenario, layout: &Layout, nodes: &[&NodeLayout]) -> Result<(), String> {
    let mut sites: Vec<(&str, BTreeSet<Standing>)> = Vec::new();
    for node in nodes {
        let standing = Standing::of(scenario, layout, node);
        match sites.iter_mut().find(|(name, _)| *name == node.site) {
            Some((_, standings)) => drop(standings.insert(standing)),
            None => sites.push((&node.site, BTreeSet::from([standing]))),
        }
    }
    for (index, (a, of_a)) in sites.iter().enumerate() {
        for (b, of_b) in &sites[index + 1..] {
            let pairs = of_a.iter().flat_map(|x| of_b.iter().map(move |y| (x, y)));
            let mut cut_off =
                pairs.filter(|(x, y)| !x.can_dial(y) && !y.can_dial(x) && !x.can_meet(y, scenario, layout));
            if let Some((x, y)) = cut_off.next() {
                let reason =
                    obstacle(x, y, scenario, layout).unwrap_or("neither says where it can be dialled");
                return Err(format!("sites `{a}` and `{b}` cannot have a tunnel: {reason}"));
            }
        }
    }
    Ok(())
}

/// Why two nodes of different sites have, or may well have, no tunnel.
fn obstacle(a: &Standing, b: &Standing, scenario: &Scenario, layout: &Layout) -> Option<&'static str> {
    if a.behind_nat && b.behind_nat {
        let reason = "both are behind NAT, so that neither can dial the other; two cones meet, where a third node that can be dialled \
                      tells them how they look from outside";
        (!a.can_meet(b, scenario, layout)).then_some(reason)
    } else if a.speaks.is_disjoint(&b.speaks) {
        Some("their underlays share no address family")
    } else {
        None
    }
}

/// What of the network explains a tunnel that is not there.
pub(crate) fn why_no_tunnel(scenario: &Scenario, layout: &Layout, a: &str, b: &str) -> Option<&'static str> {
    let (a, b) = (layout.node(a)?, layout.node(b)?);
    if a.site == b.site {
        return None;
    }
    obstacle(&Standing::of(scenario, layout, a), &Standing::of(scenario, layout, b), scenario, layout)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(text: &str) -> String {
        Scenario::parse(text, "x").map_or_else(|error| error.to_string(), |_| String::new())
    }

    #[test]
    fn an_mtu_that_no_agent_takes_is_refused_at_its_site() {
        let text = "name: x\nsites:\n  - {name: a}\n  - {name: b, mtu: 1359}\n";
        assert!(
            problems(text).contains("x:4:") && problems(text).contains("1360 to 9000"),
            "{}",
            problems(text)
        );
        assert_eq!(problems(&text.replace("1359", "1360")), "");
        assert_eq!(problems(&format!("{text}agents: false\n")), "");
    }

    #[test]
    fn an_mtu_that_no_number_of_16_bits_holds_is_told_the_range() {
        for mtu in ["70000", "-1", "9001"] {
            let error = problems(&format!("name: x\nsites:\n  - {{name: a, mtu: {mtu}}}\n"));
            assert!(error.contains("9000") && error.contains("x:3:"), "{error}");
        }
    }

    #[test]
    fn fragments_with_keys_that_no_agent_knows_are_refused() {
        let text =
            "name: x\nsites: [{name: a}]\nmesh:\n  config: {logs: debug}\n  perNode: {a-1: {keepalive: 5}}\n";
        let error = problems(text);
        assert!(error.contains("mesh.config: an agent has no setting `logs`"), "{error}");
        assert!(error.contains("mesh.perNode.a-1: an agent has no setting `keepalive`"), "{error}");
        assert_eq!(
            problems("name: x\nsites: [{name: a}]\nmesh: {perSite: {a: {log: debug, routing: {}}}}\n"),
            ""
        );
    }

    #[test]
    fn a_matrix_that_passes_sites_over_is_refused() {
        let text = "name: x\nsites:\n  - {name: a, nodes: 2, families: [ipv4]}\n  - {name: b, families: [ipv6]}\n  \
                    - {name: c}\nsteps:\n  - expect: {matrix: pods}\n";
        let error = problems(text);
        assert!(
            error.contains("x:7:") && error.contains("sites `a` (IPv4) and `b` (IPv6) share no"),
            "{error}"
        );
        assert_eq!(problems(&text.replace("matrix: pods", "matrix: pods, families: [ipv4]")), "");
        let few =
            text.replace("  - {name: c}\n", "").replace("matrix: pods", "matrix: pods, families: [ipv6]");
        assert!(problems(&few).contains("no two pods share a family of IPv6"), "{}", problems(&few));
        let pairs = text.replace("{matrix: pods}", "{pairs: [{from: a-1-pod-1, to: b-1-pod-1}]}");
        assert!(
            problems(&pairs).contains("a-1-pod-1 and b-1-pod-1 share no address family"),
            "{}",
            problems(&pairs)
        );
        assert_eq!(problems(&pairs.replace("to: b-1", "to: c-1")), "");
        // An end that stands on both sides is not probed from itself.
        assert_eq!(problems(&pairs.replace("a-1-pod-1, to: b-1-pod-1", "pods@a, to: pods@a")), "");
    }

    #[test]
    fn handshakes_that_no_one_can_begin_are_refused_with_the_reason() {
        let text = "name: x\nsites:\n  - {name: a, nat: cone}\n  - {name: b, nat: symmetric}\n  - {name: c}\n\
                    steps:\n  - handshakes: all\n";
        let error = problems(text);
        assert!(
            error.contains("x:7:") && error.contains("sites `a` and `b` cannot have a tunnel: both"),
            "{error}"
        );
        assert_eq!(problems(&text.replace("handshakes: all", "handshakes: [a, c]")), "");
        let text6 = text.replace("nat: cone", "underlay: ipv6").replace("nat: symmetric", "underlay: dual");
        let error = problems(&text6);
        assert!(
            error.contains("sites `a` and `c` cannot have a tunnel: their underlays share no"),
            "{error}"
        );
        assert_eq!(problems(&text6.replace("handshakes: all", "handshakes: [a, b]")), "");
        // A hole that the configuration opens: someone says where it can be dialled.
        let told =
            format!("{text}mesh: {{perSite: {{a: {{underlay: {{endpoints: ['198.19.1.2:51820']}}}}}}}}\n");
        assert_eq!(problems(&told), "");
    }

    #[test]
    fn what_the_network_rules_out_is_known_at_run_time() {
        let text = "name: x\nsites: [{name: a, nat: cone, nodes: 2}, {name: b, nat: cone}, {name: c, underlay: ipv6}]\n";
        let (scenario, layout) = Scenario::parse(text, "x").unwrap();
        let why = |a, b| why_no_tunnel(&scenario, &layout, a, b);
        assert!(why("a-1", "b-1").unwrap().contains("behind NAT"));
        assert!(why("a-1", "c-1").unwrap().contains("share no address family"));
        assert_eq!((why("a-1", "a-2"), why("a-1", "mars")), (None, None));
    }
}
