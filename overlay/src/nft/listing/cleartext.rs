//! The rules for what travels in clear, read back.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::{Object, element_nets, interface_names, links, members, of_kind, text};
use crate::guard::{Cleartext, Exempt, Slot};
use crate::local::InterfaceName;

/// One rule of the chains `egress` and `ingress`.
pub(super) enum Inside {
    /// From one set of addresses to another, until then.
    Passes(BTreeSet<InterfaceName>, Vec<IpNet>, Vec<IpNet>, i64),
    /// Probes within this prefix, of this port, until then.
    Probes(BTreeSet<InterfaceName>, ipnet::Ipv6Net, u16, i64),
    /// All else.
    Drops(BTreeSet<InterfaceName>),
}

/// `left OP right`, with the left side as nft lists it.
fn right<'a>(test: &'a Value, operator: &str, left: &Value) -> Option<&'a Value> {
    let test = test.get("match")?;
    (test.get("op")? == operator && test.get("left")? == left).then(|| test.get("right"))?
}

fn payload(protocol: &str, field: &str) -> Value {
    json!({"payload": {"protocol": protocol, "field": field}})
}

fn nets(right: &Value) -> Option<Vec<IpNet>> {
    let all: Option<Vec<_>> = members(right).iter().map(element_nets).collect();
    Some(IpNet::aggregate(&all?.concat()))
}

/// `meta time < T`, in seconds since 1970. nft speaks the zone that it was run in, which is UTC.
fn until(test: &Value) -> Option<i64> {
    let listed = right(test, "<", &json!({"meta": {"key": "time"}}))?.as_str()?;
    let at: Timestamp = format!("{}Z", listed.replacen(' ', "T", 1)).parse().ok()?;
    Some(at.as_second())
}

fn accepts(verdict: &Value) -> bool {
    *verdict == json!({"accept": null})
}

fn drops(verdict: &[Value]) -> bool {
    *verdict == [json!({"counter": "cleartext"}), json!({"drop": null})]
}

/// Reads a rule that may be one of ours for cleartext devices.
pub(super) fn inside(rule: &Map<String, Value>, interface: &str) -> Option<Inside> {
    let (on, rest) = rule.get("expr")?.as_array()?.split_first()?;
    let names = interface_names(on, interface)?;
    if drops(rest) {
        return Some(Inside::Drops(names));
    }
    let side = if interface == "oifname" { "sport" } else { "dport" };
    match rest {
        [from, to, time, verdict] if accepts(verdict) => {
            let of = |test: &Value, field: &str| {
                let all = ["ip", "ip6"].iter().find_map(|family| right(test, "==", &payload(family, field)));
                nets(all?)
            };
            Some(Inside::Passes(names, of(from, "saddr")?, of(to, "daddr")?, until(time)?))
        }
        [from, to, port, time, verdict] if accepts(verdict) => {
            let of = |test: &Value, field: &str| nets(right(test, "==", &payload("ip6", field))?);
            let (from, to) = (of(from, "saddr")?, of(to, "daddr")?);
            let ([IpNet::V6(prefix)], true) = (from.as_slice(), from == to) else { return None };
            let port = right(port, "==", &payload("udp", side))?.as_u64()?;
            Some(Inside::Probes(names, *prefix, u16::try_from(port).ok()?, until(time)?))
        }
        _ => None,
    }
}

/// Where a VXLAN header has its network identifier, behind that of UDP (RFC 7348, section 5).
fn vni_field() -> Value {
    json!({"payload": {"base": "th", "offset": 96, "len": 24}})
}

/// What the chain `outer` says: port, network identifier, the underlay's interfaces, and the underlay addresses that
/// are exempt, by the end.
pub(super) type Outer = (u16, u32, BTreeSet<u32>, Vec<(i64, Vec<IpNet>)>);

/// Reads the chain `outer`. `Ok(None)`: it is empty.
pub(super) fn outer(
    objects: &[Object],
    slot: Slot,
    index_of: &dyn Fn(&str) -> Option<u32>,
) -> Result<Option<Outer>, ()> {
    let chain = slot.chain("outer");
    let rules: Vec<_> = of_kind(objects, "rule").filter(|rule| text(rule, "chain") == chain).collect();
    if rules.is_empty() {
        return Ok(None);
    }
    read_outer(&rules, index_of).map(Some).ok_or(())
}

fn read_outer(rules: &[&Map<String, Value>], index_of: &dyn Fn(&str) -> Option<u32>) -> Option<Outer> {
    let [passing @ .., last, others, short, readable, unreadable] = rules else { return None };
    let vxlan = |tests: &[Value]| -> Option<(u16, u32, Vec<Value>)> {
        let [port, vni, rest @ ..] = tests else { return None };
        let port = right(port, "==", &payload("udp", "dport"))?.as_u64()?;
        let vni = right(vni, "==", &vni_field())?.as_u64()?;
        Some((u16::try_from(port).ok()?, u32::try_from(vni).ok()?, rest.to_vec()))
    };
    let (port, vni, verdict) = vxlan(last.get("expr")?.as_array()?)?;
    let udp = json!({"match": {"op": "==", "left": payload("udp", "dport"), "right": port}});
    let other = json!({"match": {"op": "!=", "left": vni_field(), "right": vni}});
    let fragment = json!({"match": {"op": "==", "left": {"exthdr": {"name": "frag"}}, "right": true}});
    let known = json!({"match": {"op": "!=", "left": {"meta": {"key": "l4proto"}}, "right": 255}});
    let tail = [
        json!([udp, other, {"accept": null}]),
        json!([udp, fragment, {"counter": "cleartext"}, {"drop": null}]),
        json!([known, {"accept": null}]),
        json!([fragment, {"counter": "cleartext"}, {"drop": null}]),
    ];
    let found = [others, short, readable, unreadable].map(|rule| rule.get("expr"));
    if !drops(&verdict) || found != tail.each_ref().map(Some) {
        return None;
    }
    let (mut exempt, mut by) = (Vec::new(), None);
    for rule in passing {
        let tests = rule.get("expr")?.as_array()?;
        let (links, tests) = match links(tests.first()?, "iif", index_of) {
            Some(links) => (links, &tests[1..]),
            None => (BTreeSet::new(), tests.as_slice()),
        };
        // All of them by the same.
        if by.get_or_insert_with(|| links.clone()) != &links {
            return None;
        }
        let (same_port, same_vni, rest) = vxlan(tests)?;
        let [from, time, verdict] = rest.as_slice() else { return None };
        if (same_port, same_vni) != (port, vni) || !accepts(verdict) {
            return None;
        }
        let from = ["ip", "ip6"].iter().find_map(|family| right(from, "==", &payload(family, "saddr")))?;
        exempt.push((until(time)?, nets(from)?));
    }
    Some((port, vni, by.unwrap_or_default(), exempt))
}

/// What was read of the chains `egress` or `ingress`, put together.
#[derive(Default)]
pub(super) struct Read {
    rules: Vec<Inside>,
}

impl Read {
    pub(super) fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    pub(super) fn push(&mut self, rule: Inside) {
        self.rules.push(rule);
    }

    /// The cleartext part of a guard, without what the chain `outer` says; `None` when these are not exactly the rules of one.
    pub(super) fn finish(self, leaving: bool) -> Option<Cleartext> {
        let mut rules = self.rules;
        let (Some(Inside::Drops(interfaces)), Some(Inside::Probes(on, prefix, port, last))) =
            (rules.pop(), rules.pop())
        else {
            return None;
        };
        let mut found = Cleartext {
            local: BTreeSet::new(),
            interfaces,
            prefix,
            port,
            vxlan_port: 0,
            vni: 0,
            underlay: BTreeSet::new(),
            exempt: [(last, Exempt::default())].into(),
        };
        if on != found.interfaces {
            return None;
        }
        for rule in rules {
            let Inside::Passes(on, from, to, until) = rule else { return None };
            let (ours, theirs) = if leaving { (from, to) } else { (to, from) };
            let v6 = theirs.first()?.addr().is_ipv6();
            let known: Vec<IpNet> =
                found.local.iter().filter(|net| net.addr().is_ipv6() == v6).copied().collect();
            let same = known.is_empty() || IpNet::aggregate(&known) == ours;
            if on != found.interfaces || !same || until > last {
                return None;
            }
            found.local.extend(ours);
            found.exempt.entry(until).or_default().prefixes.extend(theirs);
        }
        Some(found)
    }
}

/// Puts what the chain `outer` says to the rest. `None` when they do not go together.
pub(super) fn complete(inside: Option<Cleartext>, outer: Option<Outer>) -> Option<Option<Cleartext>> {
    let Some((vxlan_port, vni, underlay, remotes)) = outer else { return inside.is_none().then_some(None) };
    // Without an exemption the other fields make no rule.
    let empty = Cleartext {
        local: BTreeSet::new(),
        interfaces: BTreeSet::new(),
        prefix: ipnet::Ipv6Net::default(),
        port: 0,
        vxlan_port,
        vni,
        underlay: BTreeSet::new(),
        exempt: BTreeMap::new(),
    };
    let mut whole = Cleartext { vxlan_port, vni, underlay, ..inside.unwrap_or(empty) };
    for (until, nets) in remotes {
        whole.exempt.get_mut(&until)?.remotes.extend(nets);
    }
    Some(Some(whole))
}
