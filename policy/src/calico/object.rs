//! Tiers, network sets and host endpoints.

use std::collections::BTreeSet;
use std::sync::Arc;

use ipnet::IpNet;
use serde_json::Value;

use super::{GLOBAL_NETWORK_SET, HOST_ENDPOINT, NETWORK_SET, TIER};
use crate::field::{self, Faults, Result, shown};
use crate::interface::{Interface, InterfaceError};
use crate::model::{End, Labels, ObjectId, Order, Tier};
use crate::object::{Key, NAMESPACE, NamedPort, ObjectError};
use crate::protocol::Protocol;
use crate::referent::{Referent, What};
use crate::refusal::Outcome;
use crate::unread::Unread;
use crate::world::{HostOf, Networks};

/// The profile of host endpoints that allow what no policy decides.
const OPEN: &str = "projectcalico-default-allow";

/// Of an object that has no namespace.
fn id(kind: &'static str, manifest: &Value, faults: &mut Faults) -> ObjectId {
    ObjectId { kind, namespace: None, name: name(manifest, faults) }
}

pub(super) fn name(manifest: &Value, faults: &mut Faults) -> String {
    let name = manifest.pointer("/metadata/name").and_then(Value::as_str).filter(|name| !name.is_empty());
    if name.is_none() {
        faults.note(ObjectError::new("metadata.name", "it needs one"));
    }
    name.unwrap_or("(unnamed)").to_owned()
}

pub(super) fn namespace(manifest: &Value) -> String {
    let namespace = manifest.pointer("/metadata/namespace").and_then(Value::as_str);
    Key::new(namespace, "").namespace
}

/// Those that can be read: one that is wrong takes no other with it.
fn labels(manifest: &Value, unread: &mut Unread, faults: &mut Faults) -> Labels {
    let mut labels = Labels::new();
    match manifest.pointer("/metadata/labels") {
        None | Some(Value::Null) => {}
        Some(Value::Object(all)) => {
            for (key, value) in all {
                match value.as_str() {
                    Some(value) => drop(labels.insert(key.clone(), value.to_owned())),
                    None => {
                        let at = format!("metadata.labels.{}", key.chars().take(64).collect::<String>());
                        faults.note(ObjectError::new(at, "is no text"));
                        unread.labels.insert(key.clone());
                    }
                }
            }
        }
        Some(_) => {
            faults.note(ObjectError::new("metadata.labels", "is no object of texts"));
            unread.all_labels = true;
        }
    }
    labels
}

fn spec<'a>(
    manifest: &'a Value,
    fields: &[&str],
    faults: &mut Faults,
) -> Option<&'a serde_json::Map<String, Value>> {
    let spec = manifest.get("spec").and_then(Value::as_object);
    if spec.is_none() {
        faults.note(ObjectError::new("spec", "is no object"));
    }
    faults.known("spec", spec?, fields);
    spec
}

/// Reads an order: a number, or nothing.
pub(super) fn order(value: Option<&Value>) -> Result<Order> {
    match value {
        None | Some(Value::Null) => Ok(Order::LAST),
        Some(value) => match value.as_f64().filter(|order| order.is_finite()) {
            // Minus zero is zero.
            Some(order) => Ok(Order(order + 0.0)),
            None => Err(ObjectError::new("spec.order", format!("{:?} is no number", shown(value)))),
        },
    }
}

/// Reads a Tier.
pub fn tier(manifest: &Value) -> Referent {
    let mut faults = Faults::default();
    let id = id(TIER, manifest, &mut faults);
    let what = spec(manifest, &["order", "defaultAction"], &mut faults).map(|spec| {
        // Of one that cannot be read the place is the last, as of one of which nobody says.
        let order = faults.keep(order(spec.get("order"))).unwrap_or(Order::LAST);
        let end = match spec.get("defaultAction").map(|value| (value, value.as_str())) {
            None | Some((Value::Null, _)) | Some((_, Some("Deny"))) => End::Deny,
            Some((_, Some("Pass"))) => End::Pass,
            Some((value, _)) => {
                let reason = format!("{:?}; use Deny or Pass", shown(value));
                faults.note(ObjectError::new("spec.defaultAction", reason));
                End::Deny
            }
        };
        let known = Tier::named(&id.name);
        // Those that everybody has stay where they are, and end as they do.
        let (order, end) = match known.order == Order::LAST {
            true => (order, end),
            false => {
                let says_end = spec.get("defaultAction").is_some_and(|value| !value.is_null());
                if says_end && end != known.end {
                    let reason = format!("tier {} ends as it always does", known.name);
                    faults.note(ObjectError::new("spec.defaultAction", reason));
                }
                (known.order, known.end)
            }
        };
        What::Tier(Tier { order, name: id.name.clone(), end })
    });
    Referent::of(id, what, faults)
}

/// Those that can be read: one that is wrong takes no other with it.
fn nets(spec: &serde_json::Map<String, Value>, field: &str, faults: &mut Faults) -> BTreeSet<IpNet> {
    let nets = faults
        .each(&format!("spec.{field}"), spec.get(field), |faults, at, entry| faults.keep(net(at, entry)));
    nets.into_iter().collect()
}

/// A prefix, or an address alone.
fn net(at: &str, value: &Value) -> Result<IpNet> {
    let address: Option<std::net::IpAddr> = value.as_str().and_then(|text| text.parse().ok());
    match address {
        Some(address) => Ok(IpNet::from(address.to_canonical())),
        None => field::net(at, value),
    }
}

fn set(id: ObjectId, manifest: &Value, mut faults: Faults) -> Referent {
    let mut unread = Unread::default();
    let mut labels = labels(manifest, &mut unread, &mut faults);
    if let Some(namespace) = &id.namespace {
        labels.insert(NAMESPACE.to_owned(), namespace.clone());
    }
    let before = faults.seen();
    let spec = spec(manifest, &["nets"], &mut faults);
    let nets = spec.map(|spec| nets(spec, "nets", &mut faults)).unwrap_or_default();
    // A field that is not known may list more of them.
    unread.nets = faults.seen() > before;
    let what = What::Networks(Networks { labels, nets: Arc::new(nets), host: None, unread });
    Referent::of(id, Some(what), faults)
}

/// Reads a GlobalNetworkSet.
pub fn global_network_set(manifest: &Value) -> Referent {
    let mut faults = Faults::default();
    let id = id(GLOBAL_NETWORK_SET, manifest, &mut faults);
    set(id, manifest, faults)
}

/// Reads a NetworkSet.
pub fn network_set(manifest: &Value) -> Referent {
    let mut faults = Faults::default();
    let id = ObjectId { namespace: Some(namespace(manifest)), ..id(NETWORK_SET, manifest, &mut faults) };
    set(id, manifest, faults)
}

/// A port of a host that has a name.
fn named_port(at: &str, value: &Value) -> Result<NamedPort> {
    let port = field::object(at, value, &["name", "protocol", "port"])?;
    let of = |field: &str| port.get(field).unwrap_or(&Value::Null);
    let name = field::port_name(&format!("{at}.name"), of("name").as_str().unwrap_or_default())?;
    let number = field::number(&format!("{at}.port"), of("port"))?;
    let protocol: Option<Protocol> = of("protocol").as_str().and_then(|protocol| protocol.parse().ok());
    let protocol = protocol.filter(|protocol| protocol.has_ports()).ok_or_else(|| {
        ObjectError::new(
            format!("{at}.protocol"),
            format!("{:?}; use TCP, UDP or SCTP", shown(of("protocol"))),
        )
    })?;
    Ok(NamedPort { name, protocol, port: number })
}

/// Reads a HostEndpoint.
pub fn host_endpoint(manifest: &Value) -> Referent {
    let mut faults = Faults::default();
    let id = id(HOST_ENDPOINT, manifest, &mut faults);
    let fields = ["node", "interfaceName", "expectedIPs", "profiles", "ports"];
    let mut unread = Unread::default();
    let labels = labels(manifest, &mut unread, &mut faults);
    let nothing = serde_json::Map::new();
    let spec = spec(manifest, &fields, &mut faults);
    unread.nets = spec.is_none();
    let spec = spec.unwrap_or(&nothing);
    let node = spec.get("node").and_then(Value::as_str).filter(|node| !node.is_empty());
    if node.is_none() {
        faults.note(ObjectError::new("spec.node", "a host endpoint needs one"));
    }
    let interface = match spec.get("interfaceName").and_then(Value::as_str).unwrap_or_default() {
        "*" => Some(None),
        "" => {
            let reason = "it is needed: of which interface a host has an address nobody looks up";
            faults.note(ObjectError::new("spec.interfaceName", reason));
            None
        }
        name => {
            let wrong = |error: InterfaceError| ObjectError::new("spec.interfaceName", error.to_string());
            faults.keep(name.parse::<Interface>().map_err(wrong)).map(Some)
        }
    };
    let before = faults.seen();
    let nets = nets(spec, "expectedIPs", &mut faults);
    unread.nets |= faults.seen() > before;
    let before = faults.seen();
    let ports =
        faults.each("spec.ports", spec.get("ports"), |faults, at, port| faults.keep(named_port(at, port)));
    unread.ports = faults.seen() > before;
    let mut open = false;
    faults.each("spec.profiles", spec.get("profiles"), |faults, at, profile| {
        match profile.as_str() {
            Some(OPEN) => open = true,
            _ => {
                let reason = format!("{:?}; only {OPEN} is known: say the rest by policies", shown(profile));
                faults.note(ObjectError::new(at, reason));
            }
        }
        Some(())
    });
    // Others know its addresses, whether it protects an interface or not.
    let host = node.zip(interface).map(|(node, interface)| HostOf {
        node: node.to_owned(),
        interface,
        open,
        ports: ports.into_iter().collect(),
    });
    let unprotected = host.is_none();
    let what = What::Networks(Networks { labels, nets: Arc::new(nets), host, unread });
    let referent = Referent::of(id, Some(what), faults);
    match unprotected && referent.outcome == Outcome::Rest {
        true => Referent { outcome: Outcome::Unprotected, ..referent },
        false => referent,
    }
}
