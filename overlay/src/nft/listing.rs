//! What `nft -j list table` says of the guard's table. Pure.

mod cleartext;

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Subnets, Ipv6Subnets};
use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};

use crate::guard::{CHAINS, COUNTERS, CROSSING, Carriers, Guard, LATE, MARK, Slot};
use crate::local::InterfaceName;

/// One listing of the table.
pub(super) struct Listing {
    /// The fingerprint in the rules' comments.
    pub(super) fingerprint: Option<String>,
    /// A digest of all that only a change of the ruleset changes: no handles, no counts.
    pub(super) digest: [u8; 32],
    /// The slots that are taken; `None` when the table holds anything that no guard makes.
    pub(super) slots: Option<Vec<Slot>>,
    /// The guard that this table is, if it is exactly one.
    pub(super) guard: Option<Guard>,
    /// Packets that the egress chain dropped.
    pub(super) egress_drops: u64,
    /// Packets that the ingress chain dropped.
    pub(super) ingress_drops: u64,
    /// Packets that were dropped on a VXLAN device.
    pub(super) carrier_drops: u64,
    /// Packets in clear that were dropped because nobody has exempted them.
    pub(super) cleartext_drops: u64,
    /// Packets on their way between the tunnel and pods, before any firewall judged them.
    pub(super) crossing: u64,
    /// The same behind all of them.
    pub(super) crossed: u64,
}

impl Listing {
    /// Reads what `nft -j` printed. It shows an interface's index as the name which that has now: `index_of`
    /// tells the index again.
    pub(super) fn read(json: Value, index_of: &dyn Fn(&str) -> Option<u32>) -> Self {
        let mut objects = Vec::new();
        let (mut egress_drops, mut ingress_drops, mut carrier_drops, mut cleartext_drops) = (0, 0, 0, 0);
        let (mut crossing, mut crossed) = (0, 0);
        let listed = json.get("nftables").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        for (kind, content) in listed.iter().filter_map(Value::as_object).flatten() {
            let Some(mut content) = content.as_object().cloned() else { continue };
            content.remove("handle");
            if kind == "metainfo" {
                continue;
            }
            if kind == "counter" {
                let packets = content.remove("packets").and_then(|count| count.as_u64()).unwrap_or(0);
                content.remove("bytes");
                match content.get("name").and_then(Value::as_str) {
                    Some("egress") => egress_drops = packets,
                    Some("ingress") => ingress_drops = packets,
                    Some("carrier") => carrier_drops = packets,
                    Some("cleartext") => cleartext_drops = packets,
                    Some("crossing") => crossing = packets,
                    Some("crossed") => crossed = packets,
                    _ => {}
                }
            }
            objects.push((kind.clone(), content));
        }
        let fingerprint = (objects.iter())
            .find_map(|(_, content)| content.get("comment")?.as_str()?.strip_prefix(MARK))
            .map(str::to_owned);
        let text = objects.iter().map(|(kind, content)| format!("{kind} {}\n", json!(content)));
        let digest = Sha256::digest(text.collect::<String>()).into();
        let slots = slots(&objects);
        let guard = match slots.as_deref() {
            Some([slot]) => guard(&objects, *slot, index_of),
            _ => None,
        };
        Self {
            fingerprint,
            digest,
            slots,
            guard,
            egress_drops,
            ingress_drops,
            carrier_drops,
            cleartext_drops,
            crossing,
            crossed,
        }
    }
}

type Object = (String, Map<String, Value>);

fn of_kind<'a>(objects: &'a [Object], kind: &'a str) -> impl Iterator<Item = &'a Map<String, Value>> {
    objects.iter().filter(move |(found, _)| found == kind).map(|(_, content)| content)
}

/// The slots whose chains stand, if the table holds those, our counters and nothing else.
fn slots(objects: &[Object]) -> Option<Vec<Slot>> {
    let known = ["table", "counter", "chain", "rule"];
    let counters: BTreeSet<&str> = of_kind(objects, "counter").map(|counter| text(counter, "name")).collect();
    if !objects.iter().all(|(kind, _)| known.contains(&kind.as_str()))
        || !counters.iter().all(|name| COUNTERS.contains(name))
    {
        return None;
    }
    let mut chains: BTreeSet<_> = of_kind(objects, "chain").map(chain_place).collect::<Option<_>>()?;
    let mut taken = Vec::new();
    for slot in Slot::ALL {
        let own = CHAINS.map(|(name, hook, priority)| (slot.chain(name), hook.to_owned(), priority));
        let (needed, late) = own.split_at(CHAINS.len() - LATE);
        let late = late.iter().filter(|place| chains.remove(*place)).count();
        match needed.iter().filter(|place| chains.remove(*place)).count() {
            0 if late == 0 => {}
            all if all == needed.len() => taken.push(slot),
            _ => return None,
        }
    }
    chains.is_empty().then_some(taken)
}

fn text<'a>(content: &'a Map<String, Value>, key: &str) -> &'a str {
    content.get(key).and_then(Value::as_str).unwrap_or_default()
}

/// A chain's name, hook and priority, if the rest of it is as ours.
fn chain_place(chain: &Map<String, Value>) -> Option<(String, String, i64)> {
    let right = text(chain, "type") == "filter" && text(chain, "policy") == "accept";
    let priority = chain.get("prio")?.as_i64()?;
    right.then(|| (text(chain, "name").to_owned(), text(chain, "hook").to_owned(), priority))
}

/// The guard that makes exactly these rules. Several may; which one of them it is does not matter.
fn guard(objects: &[Object], slot: Slot, index_of: &dyn Fn(&str) -> Option<u32>) -> Option<Guard> {
    let of_chain = |name: &str, interface: &str, address: &str| {
        let chain = slot.chain(name);
        let mut rules = of_kind(objects, "rule").filter(|rule| text(rule, "chain") == chain).peekable();
        let [encrypting, verdict] = rules.next()?.get("expr")?.as_array()?.as_slice() else { return None };
        if *verdict != json!({"accept": null}) {
            return None;
        }
        let mut guard = Guard {
            mesh: BTreeSet::new(),
            local: BTreeSet::new(),
            outside: BTreeSet::new(),
            interfaces: interface_names(encrypting, interface)?,
            pod_kinds: BTreeSet::new(),
            underlay: BTreeSet::new(),
            carriers: None,
            cleartext: None,
        };
        if let Some(carriers) = rules.peek().and_then(|rule| carriers(rule, interface)) {
            let drops = json!([{"counter": "carrier"}, {"drop": null}]);
            let [on, verdict @ ..] = rules.nth(1)?.get("expr")?.as_array()?.as_slice() else { return None };
            if interface_names(on, interface)? != carriers.interfaces
                || Some(verdict) != drops.as_array().map(Vec::as_slice)
            {
                return None;
            }
            guard.carriers = Some(carriers);
        }
        let mut clear = cleartext::Read::default();
        while let Some(rule) = rules.peek().and_then(|rule| cleartext::inside(rule, interface)) {
            clear.push(rule);
            rules.next();
        }
        let side = &interface[..3];
        let mut kept = BTreeSet::new();
        let mut last = 0;
        for rule in rules {
            let (test, verdict) = rule.get("expr")?.as_array()?.split_first()?;
            let (test, through, verdict) = match verdict {
                [address, verdict @ ..] if address.get("match").is_some() => {
                    (address, Some(through(test, side, index_of)?), verdict)
                }
                verdict => (test, None, verdict),
            };
            let accepts = *verdict == [json!({"accept": null})];
            if !accepts && *verdict != [json!({"counter": name}), json!({"drop": null})] {
                return None;
            }
            let test = test.get("match").filter(|test| test.get("op").is_some_and(|op| op == "=="))?;
            let on = |family: &str| json!({"payload": {"protocol": family, "field": address}});
            let v6 = *test.get("left")? == on("ip6");
            if !v6 && *test.get("left")? != on("ip") {
                return None;
            }
            // The order of `Guard::rules`, each family once.
            let step = match (accepts, &through) {
                (true, None) => 0,
                (false, Some(Through::Links(_))) => 1,
                (true, Some(Through::Kinds(_))) => 2,
                (false, None) => 3,
                _ => return None,
            };
            let place = 1 + step * 2 + usize::from(v6);
            if place <= last {
                return None;
            }
            last = place;
            match through {
                Some(Through::Links(links)) if guard.underlay.is_empty() || guard.underlay == links => {
                    guard.underlay = links;
                }
                Some(Through::Kinds(kinds)) if guard.pod_kinds.is_empty() || guard.pod_kinds == kinds => {
                    guard.pod_kinds = kinds;
                }
                None => {}
                Some(_) => return None,
            }
            let nets = match step {
                0 => &mut guard.outside,
                1 => &mut kept,
                2 => &mut guard.local,
                _ => &mut guard.mesh,
            };
            for element in members(test.get("right")?) {
                nets.extend(element_nets(element)?);
            }
        }
        if !clear.is_empty() {
            guard.cleartext = Some(clear.finish(name == "egress")?);
        }
        if guard.pod_kinds.is_empty() {
            guard.local.clone_from(&kept);
        }
        (guard.underlay.is_empty() || guard.local == kept).then_some(guard)
    };
    let mut egress = of_chain("egress", "oifname", "daddr")?;
    if of_chain("ingress", "iifname", "saddr")? != egress {
        return None;
    }
    egress.cleartext =
        cleartext::complete(egress.cleartext.take(), cleartext::outer(objects, slot, index_of).ok()?)?;
    let counts = CROSSING.iter().all(|(name, tests)| counts(objects, slot, name, tests, &egress.interfaces));
    // A guard of before counts nothing that crosses.
    let former = CROSSING.iter().all(|(name, _)| {
        let chain = slot.chain(name);
        !of_kind(objects, "rule").any(|rule| text(rule, "chain") == chain)
    });
    ((counts || former) && clamped(objects, slot)? == egress.clamped()).then_some(egress)
}

/// Reports whether a chain counts packets across the tunnel's interfaces and does nothing else.
fn counts(
    objects: &[Object],
    slot: Slot,
    name: &str,
    tests: &[(&str, &str); 2],
    tunnel: &BTreeSet<InterfaceName>,
) -> bool {
    let chain = slot.chain(name);
    let rules: Vec<_> = of_kind(objects, "rule").filter(|rule| text(rule, "chain") == chain).collect();
    let expected = if tunnel.is_empty() { &[][..] } else { &tests[..] };
    let arrived = json!({"match": {"op": "!=", "left": {"meta": {"key": "iif"}}, "right": "0"}});
    rules.len() == expected.len()
        && rules.iter().zip(expected).all(|(rule, (interface, before))| {
            let tests = rule.get("expr").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
            let tests = match (before.is_empty(), tests) {
                (false, [first, rest @ ..]) if *first == arrived => rest,
                (false, _) => return false,
                (true, all) => all,
            };
            let [on, counter] = tests else { return false };
            interface_names(on, interface).as_ref() == Some(tunnel) && *counter == json!({"counter": name})
        })
}

/// The interfaces that a rule about local prefixes is for.
enum Through {
    /// These, by index.
    Links(BTreeSet<u32>),
    /// Those of these kinds.
    Kinds(BTreeSet<String>),
}

/// The indexes of `iif { ... }`, or `oif`; one that is gone is shown as a number.
fn links(test: &Value, key: &str, index_of: &dyn Fn(&str) -> Option<u32>) -> Option<BTreeSet<u32>> {
    let test = test.get("match").filter(|test| test.get("op").is_some_and(|op| op == "=="))?;
    if test.get("left")? != &json!({"meta": {"key": key}}) {
        return None;
    }
    let index = |name: &Value| index_of(name.as_str()?).or_else(|| name.as_str()?.parse().ok());
    let links: BTreeSet<u32> = members(test.get("right")?).iter().map(index).collect::<Option<_>>()?;
    (!links.is_empty()).then_some(links)
}

fn through(test: &Value, side: &str, index_of: &dyn Fn(&str) -> Option<u32>) -> Option<Through> {
    if let Some(links) = links(test, side, index_of) {
        return Some(Through::Links(links));
    }
    let test = test.get("match").filter(|test| test.get("op").is_some_and(|op| op == "=="))?;
    if test.get("left")? != &json!({"meta": {"key": format!("{side}kind")}}) {
        return None;
    }
    let kinds = members(test.get("right")?).iter().map(|name| name.as_str().map(str::to_owned));
    let kinds: BTreeSet<String> = kinds.collect::<Option<_>>()?;
    (!kinds.is_empty()).then_some(Through::Kinds(kinds))
}

/// The rule that lets WireGuard pass on VXLAN devices.
fn carriers(rule: &Map<String, Value>, interface: &str) -> Option<Carriers> {
    let [on, from, to, udp, verdict] = rule.get("expr")?.as_array()?.as_slice() else { return None };
    let side = if interface == "oifname" { "sport" } else { "dport" };
    let of = |test: &Value, protocol: &str, field: &str| {
        let test = test.get("match").filter(|test| test.get("op").is_some_and(|op| op == "=="))?;
        let left = json!({"payload": {"protocol": protocol, "field": field}});
        (*test.get("left")? == left).then(|| test.get("right").cloned())?
    };
    let prefix = |test: &Value, field: &str| match element_nets(&of(test, "ip6", field)?)?.as_slice() {
        [IpNet::V6(net)] => Some(*net),
        _ => None,
    };
    let net = prefix(from, "saddr").filter(|net| prefix(to, "daddr") == Some(*net))?;
    let port = u16::try_from(of(udp, "udp", side)?.as_u64()?).ok()?;
    let interfaces = interface_names(on, interface)?;
    (*verdict == json!({"accept": null})).then_some(Carriers { interfaces, prefix: net, port })
}

/// The interfaces at which segment sizes are clamped, if that chain is as ours.
fn clamped(objects: &[Object], slot: Slot) -> Option<BTreeSet<InterfaceName>> {
    let chain = slot.chain("clamp");
    let rules: Vec<_> = of_kind(objects, "rule").filter(|rule| text(rule, "chain") == chain).collect();
    let syn = json!({"match": {
        "op": "in", "left": {"payload": {"protocol": "tcp", "field": "flags"}}, "right": "syn",
    }});
    let clamp = json!({"mangle": {
        "key": {"tcp option": {"name": "maxseg", "field": "size"}}, "value": {"rt": {"key": "mtu"}},
    }});
    let names = |rule: &Map<String, Value>, key: &str| {
        let [on, flags, mangle] = rule.get("expr")?.as_array()?.as_slice() else { return None };
        interface_names(on, key).filter(|_| *flags == syn && *mangle == clamp)
    };
    match rules.as_slice() {
        [] => Some(BTreeSet::new()),
        [entering, leaving] => {
            names(entering, "iifname").filter(|found| names(leaving, "oifname").as_ref() == Some(found))
        }
        _ => None,
    }
}

/// The members of an anonymous set; one of a single member is listed without the set.
fn members(right: &Value) -> &[Value] {
    right.get("set").and_then(Value::as_array).map_or(std::slice::from_ref(right), Vec::as_slice)
}

/// The interfaces of `oifname { ... }`, less `lo`.
fn interface_names(test: &Value, key: &str) -> Option<BTreeSet<InterfaceName>> {
    let test = test.get("match")?;
    if test.get("op")? != "==" || test.get("left")? != &json!({"meta": {"key": key}}) {
        return None;
    }
    let names = members(test.get("right")?).iter().map(Value::as_str);
    names.filter(|name| *name != Some("lo")).map(|name| name?.parse().ok()).collect()
}

fn element_nets(element: &Value) -> Option<Vec<IpNet>> {
    if let Some(address) = element.as_str() {
        return Some(vec![IpNet::from(address.parse::<IpAddr>().ok()?)]);
    }
    if let Some(prefix) = element.get("prefix") {
        let address = prefix.get("addr")?.as_str()?.parse::<IpAddr>().ok()?;
        let length = u8::try_from(prefix.get("len")?.as_u64()?).ok()?;
        return Some(vec![IpNet::new(address, length).ok()?]);
    }
    // Neighbouring prefixes may be listed as one range.
    let [first, last] = element.get("range")?.as_array()?.as_slice() else { return None };
    match (first.as_str()?.parse().ok()?, last.as_str()?.parse().ok()?) {
        (IpAddr::V4(first), IpAddr::V4(last)) => {
            Some(Ipv4Subnets::new(first, last, 0).map(IpNet::V4).collect())
        }
        (IpAddr::V6(first), IpAddr::V6(last)) => {
            Some(Ipv6Subnets::new(first, last, 0).map(IpNet::V6).collect())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listing_that_is_no_guard_is_none() {
        for text in ["{}", "[]", r#"{"nftables": 3}"#, r#"{"nftables": [{"table": {"name": "sennit"}}]}"#] {
            let listing = Listing::read(serde_json::from_str(text).unwrap(), &|_| None);
            assert_eq!((listing.guard, listing.fingerprint), (None, None), "{text}");
        }
    }

    #[test]
    fn counts_and_handles_do_not_count_as_a_change() {
        let with = |packets: u64, handle: u64| {
            Listing::read(
                json!({"nftables": [
                    {"counter": {"name": "egress", "packets": packets, "bytes": packets * 10, "handle": handle}},
                ]}),
                &|_| None,
            )
        };
        assert_eq!(with(0, 1).digest, with(7, 2).digest);
        assert_eq!(with(7, 2).egress_drops, 7);
    }

    #[test]
    fn elements_are_read_in_all_their_forms() {
        let nets =
            |value: Value| element_nets(&value).map(|nets| nets.iter().map(IpNet::to_string).collect());
        assert_eq!(nets(json!("10.0.0.1")), Some(vec!["10.0.0.1/32".to_owned()]));
        assert_eq!(nets(json!({"prefix": {"addr": "fd00::", "len": 8}})), Some(vec!["fd00::/8".to_owned()]));
        assert_eq!(
            nets(json!({"range": ["10.0.1.0", "10.0.2.255"]})),
            Some(vec!["10.0.1.0/24".to_owned(), "10.0.2.0/24".to_owned()])
        );
        assert_eq!(nets(json!({"prefix": {"addr": "fd00::", "len": 300}})), None::<Vec<String>>);
    }
}
