//! Endpoints of Services (`discovery.k8s.io/v1` EndpointSlice): addresses, and the ports on which they serve.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use serde_json::Value;

use crate::field::{Faults, Result, list, number, shown};
use crate::model::ObjectId;
use crate::object::{Key, ObjectError};
use crate::protocol::Protocol;
use crate::referent::{Referent, What};

/// The kind.
pub const KIND: &str = "EndpointSlice";
/// Group and version.
pub const API_VERSION: &str = "discovery.k8s.io/v1";
/// The label that says whose endpoints they are.
const SERVICE: &str = "kubernetes.io/service-name";

/// Some endpoints of a Service. Whether they are ready does not matter to who may be reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoints {
    /// The Service.
    pub service: Key,
    /// Their addresses.
    pub addresses: BTreeSet<IpAddr>,
    /// On which all of them serve.
    pub ports: BTreeSet<(Protocol, u16)>,
    /// Some of that could not be read.
    pub unread: bool,
}

/// Reads an EndpointSlice. One that belongs to no Service counts for nothing, and nothing is wrong with it.
pub fn read(manifest: &Value) -> Referent {
    let text = |pointer: &str| manifest.pointer(pointer).and_then(Value::as_str);
    let namespace = Key::new(text("/metadata/namespace"), "").namespace;
    let name = text("/metadata/name").unwrap_or("(unnamed)").to_owned();
    let id = ObjectId { kind: KIND, namespace: Some(namespace.clone()), name };
    let service = manifest.pointer("/metadata/labels").and_then(|labels| labels.get(SERVICE)?.as_str());
    let mut faults = Faults::default();
    let what = service.filter(|service| !service.is_empty()).map(|service| {
        // Names of hosts are nothing that a packet bears.
        let is_of_names = text("/addressType") == Some("FQDN");
        let endpoints = faults.keep(list("endpoints", manifest.get("endpoints"))).unwrap_or_default();
        let endpoints = endpoints.iter().filter(|_| !is_of_names).enumerate();
        let mut addresses = BTreeSet::new();
        for (index, endpoint) in endpoints {
            let at = format!("endpoints[{index}].addresses");
            for address in faults.keep(list(&at, endpoint.get("addresses"))).unwrap_or_default() {
                // One that is wrong takes no other with it.
                addresses.extend(faults.keep(self::address(&at, address)));
            }
        }
        let ports = faults.keep(list("ports", manifest.get("ports"))).unwrap_or_default();
        let ports = ports.iter().enumerate();
        let ports =
            ports.filter_map(|(index, port)| faults.keep(self::port(&format!("ports[{index}]"), port)));
        let ports = ports.flatten().collect();
        let unread = faults.seen() > 0;
        let service = Key { namespace, name: service.to_owned() };
        What::Endpoints(Endpoints { service, addresses, ports, unread })
    });
    Referent::of(id, what, faults)
}

fn address(at: &str, value: &Value) -> Result<IpAddr> {
    let address: Option<IpAddr> = value.as_str().and_then(|text| text.parse().ok());
    let address = address.map(|address| address.to_canonical());
    address.ok_or_else(|| ObjectError::new(at, format!("{:?} is no IP address", shown(value))))
}

/// One without a number is none.
fn port(at: &str, value: &Value) -> Result<Option<(Protocol, u16)>> {
    let port = match value.get("port") {
        None | Some(Value::Null) => return Ok(None),
        Some(port) => number(&format!("{at}.port"), port)?,
    };
    let protocol = value.get("protocol").and_then(Value::as_str).unwrap_or("TCP");
    let protocol = protocol.parse().map_err(|_| {
        let shown: String = protocol.chars().take(64).collect();
        ObjectError::new(format!("{at}.protocol"), format!("{shown:?}; use TCP, UDP or SCTP"))
    })?;
    Ok(Some((protocol, port)))
}

/// All endpoints, slice by slice.
#[derive(Debug, Clone, Default)]
pub(crate) struct Slices {
    all: BTreeMap<ObjectId, Endpoints>,
    of: BTreeMap<Key, BTreeSet<ObjectId>>,
    // How many were not read whole.
    unread: usize,
}

impl Slices {
    /// A slice is there, or is different now. Returns the addresses of which something is different.
    pub(crate) fn put(&mut self, id: ObjectId, endpoints: Endpoints) -> BTreeSet<IpAddr> {
        if self.all.get(&id) == Some(&endpoints) {
            return BTreeSet::new();
        }
        // Those that were in it and still are mean something different only where what they serve is another thing.
        let same =
            |before: &Endpoints| before.service == endpoints.service && before.ports == endpoints.ports;
        let kept = self.all.get(&id).filter(|before| same(before)).map(|before| before.addresses.clone());
        let before = self.remove(&id);
        let touched = match &kept {
            Some(kept) => kept.symmetric_difference(&endpoints.addresses).copied().collect(),
            None => before.union(&endpoints.addresses).copied().collect(),
        };
        self.of.entry(endpoints.service.clone()).or_default().insert(id.clone());
        self.unread += usize::from(endpoints.unread);
        self.all.insert(id, endpoints);
        touched
    }

    /// Reports whether some of them could not be read.
    pub(crate) fn has_unread(&self) -> bool {
        self.unread > 0
    }

    /// It is gone. Returns the addresses of which something is different.
    pub(crate) fn remove(&mut self, id: &ObjectId) -> BTreeSet<IpAddr> {
        let Some(endpoints) = self.all.remove(id) else { return BTreeSet::new() };
        self.unread -= usize::from(endpoints.unread);
        if let Some(slices) = self.of.get_mut(&endpoints.service) {
            slices.remove(id);
            if slices.is_empty() {
                self.of.remove(&endpoints.service);
            }
        }
        endpoints.addresses
    }

    /// A Service's.
    pub(crate) fn of<'a>(&'a self, service: &Key) -> impl Iterator<Item = &'a Endpoints> + use<'a> {
        self.of.get(service).into_iter().flatten().filter_map(|id| self.all.get(id))
    }

    /// What an address serves for a Service; nothing where it is none of its endpoints.
    pub(crate) fn serves<'a>(
        &'a self,
        service: &Key,
        address: IpAddr,
    ) -> impl Iterator<Item = &'a BTreeSet<(Protocol, u16)>> + use<'a> {
        self.of(service)
            .filter(move |endpoints| endpoints.addresses.contains(&address))
            .map(|endpoints| &endpoints.ports)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn slice(name: &str, rest: Value) -> Referent {
        let mut manifest = json!({"metadata": {"name": name, "namespace": "x", "labels": {SERVICE: "web"}}, "addressType": "IPv4"});
        manifest.as_object_mut().unwrap().extend(rest.as_object().unwrap().clone());
        read(&manifest)
    }

    fn endpoints(referent: Referent) -> Endpoints {
        match referent.what {
            Some(What::Endpoints(endpoints)) => endpoints,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_wrong_in_a_slice_takes_nothing_else_with_it() {
        let read = slice(
            "s",
            json!({
                "endpoints": [{"addresses": ["10.0.0.1", "nonsense"]}, {"addresses": 5}, {"addresses": ["::ffff:10.0.0.2"]}],
                "ports": [{"port": 80}, {"port": 0}, {"port": null}, {"port": 53, "protocol": "UDP"}, {"port": 1, "protocol": "X"}],
            }),
        );
        let faults: Vec<String> =
            read.fault.iter().chain(&read.more).map(|fault| fault.field.clone()).collect();
        assert_eq!(
            faults,
            ["endpoints[0].addresses", "endpoints[1].addresses", "ports[1].port", "ports[4].protocol"]
        );
        let endpoints = endpoints(read);
        assert_eq!(endpoints.addresses, ["10.0.0.1", "10.0.0.2"].map(|text| text.parse().unwrap()).into());
        assert_eq!(endpoints.ports, [(Protocol::TCP, 80), (Protocol::UDP, 53)].into());
        assert_eq!(endpoints.service, Key::new(Some("x"), "web"));
    }

    #[test]
    fn a_slice_of_nobody_or_of_names_has_no_addresses() {
        let nobody = read(&json!({"metadata": {"name": "s"}, "endpoints": [{"addresses": ["10.0.0.1"]}]}));
        assert_eq!((nobody.what, nobody.fault), (None, None));
        let names =
            slice("s", json!({"addressType": "FQDN", "endpoints": [{"addresses": ["a.example.com"]}]}));
        assert!(names.fault.is_none() && endpoints(names).addresses.is_empty());
    }

    #[test]
    fn a_service_is_what_its_slices_are_together() {
        let mut slices = Slices::default();
        let id = |name: &str| slice(name, json!({})).id;
        let of = |addresses: &[&str], port: u16| {
            endpoints(slice("s", json!({"endpoints": [{"addresses": addresses}], "ports": [{"port": port}]})))
        };
        let addresses =
            |all: &[&str]| -> BTreeSet<IpAddr> { all.iter().map(|text| text.parse().unwrap()).collect() };
        assert_eq!(
            slices.put(id("a"), of(&["10.0.0.1", "10.0.0.2"], 80)),
            addresses(&["10.0.0.1", "10.0.0.2"])
        );
        assert!(slices.put(id("a"), of(&["10.0.0.1", "10.0.0.2"], 80)).is_empty());
        assert_eq!(slices.put(id("a"), of(&["10.0.0.1"], 80)), addresses(&["10.0.0.2"]));
        assert_eq!(slices.put(id("a"), of(&["10.0.0.1", "10.0.0.2"], 80)), addresses(&["10.0.0.2"]));
        slices.put(id("b"), of(&["10.0.0.2"], 81));
        let web = Key::new(Some("x"), "web");
        let served = |slices: &Slices, address: &str| {
            slices.serves(&web, address.parse().unwrap()).flatten().map(|(_, port)| *port).collect::<Vec<_>>()
        };
        assert_eq!(served(&slices, "10.0.0.2"), [80, 81]);
        assert_eq!(
            slices.put(id("a"), of(&["10.0.0.3"], 80)),
            addresses(&["10.0.0.1", "10.0.0.2", "10.0.0.3"])
        );
        assert_eq!((served(&slices, "10.0.0.2"), served(&slices, "10.0.0.1")), (vec![81], vec![]));
        slices.remove(&id("a"));
        assert_eq!(slices.remove(&id("b")), addresses(&["10.0.0.2"]));
        assert!(slices.of.is_empty() && slices.all.is_empty());
    }
}
