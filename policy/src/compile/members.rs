//! Who is in a set.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use super::class::{Resolves, Source};
use super::union::Union;
use crate::model::{Namespaces, PodSelector};
use crate::object::Pod;
use crate::ruleset::{Element, Family};
use crate::world::World;

/// What a set has of an address, whose holder is known.
pub(super) fn of_address(
    world: &World,
    source: &Source,
    address: IpAddr,
    holder: Option<&Pod>,
) -> BTreeSet<Element> {
    let alone = |is_in: bool| is_in.then_some(Element::Address(address)).into_iter().collect();
    match source {
        Source::Ranges(_) | Source::Networks(_) | Source::Numbers(_) => BTreeSet::new(),
        Source::Pods(selectors) => {
            let selects = |pod| selectors.iter().any(|selector| world.selects(selector, pod));
            alone(holder.is_some_and(selects))
        }
        Source::Named(names) => {
            let ports = holder.into_iter().flat_map(|pod| pod.ports.iter()).chain(world.host_ports(address));
            let named = ports.filter(|port| {
                names.iter().any(|(name, protocol)| port.name == *name && port.protocol == *protocol)
            });
            named.map(|port| Element::Port(address, port.protocol.0, port.port)).collect()
        }
        Source::Domains(domains, Resolves::Now) => alone(world.names.has(domains, address)),
        // One that another of them has is no address of before.
        Source::Domains(domains, Resolves::Before) => {
            alone(world.names.had(domains, address) && !world.names.has(domains, address))
        }
        Source::Service(service) => alone(world.serves(service, address).next().is_some()),
        Source::Serves(service) => {
            let ports = world.serves(service, address).flatten();
            ports.map(|(protocol, port)| Element::Port(address, protocol.0, *port)).collect()
        }
    }
}

/// All pods by what new sets ask of them: each set looks at those only that it can have.
pub(super) struct Index<'a> {
    world: &'a World,
    pods: Vec<&'a Pod>,
    namespaces: HashMap<&'a str, Vec<usize>>,
    labels: HashMap<&'a str, HashMap<&'a str, Vec<usize>>>,
    ports: HashMap<&'a str, Vec<usize>>,
}

impl<'a> Index<'a> {
    /// For sets of these sources.
    pub(super) fn of(world: &'a World, sources: impl Iterator<Item = &'a Source>) -> Self {
        let pods = world.pods().map(|pod| &**pod).filter(|pod| !pod.host_network).collect();
        let (mut namespaces, mut labels, mut ports) = (HashMap::new(), HashMap::new(), HashMap::new());
        for source in sources {
            match source {
                Source::Ranges(_)
                | Source::Networks(_)
                | Source::Numbers(_)
                | Source::Domains(..)
                | Source::Service(_)
                | Source::Serves(_) => {}
                Source::Named(names) => {
                    for (name, _) in names {
                        ports.entry(name.as_str()).or_default();
                    }
                }
                Source::Pods(selectors) => {
                    for selector in selectors {
                        if let Namespaces::Named(name) = &selector.namespaces {
                            namespaces.entry(name.as_str()).or_default();
                        }
                        let keys = selector.pods.values_of_keys().map(|(key, _)| (key, HashMap::new()));
                        labels.extend(keys);
                    }
                }
            }
        }
        let mut index = Self { world, pods, namespaces, labels, ports };
        for (place, pod) in index.pods.iter().enumerate() {
            if let Some(list) = index.namespaces.get_mut(&*pod.key.namespace) {
                list.push(place);
            }
            for (key, value) in &*pod.labels {
                if let Some(values) = index.labels.get_mut(&**key) {
                    values.entry(value).or_default().push(place);
                }
            }
            for port in &*pod.ports {
                if let Some(list) = index.ports.get_mut(&*port.name) {
                    list.push(place);
                }
            }
        }
        index
    }

    /// Everything that belongs into a set.
    pub(super) fn members(&self, source: &Source, family: Family) -> BTreeSet<Element> {
        let of = |addresses: &mut dyn Iterator<Item = IpAddr>| -> BTreeSet<Element> {
            let addresses = addresses.filter(|address| Family::of(*address) == family);
            addresses.flat_map(|address| of_address(self.world, source, address, None)).collect()
        };
        let hosts = match source {
            Source::Named(..) => of(&mut self.world.with_host_ports()),
            _ => BTreeSet::new(),
        };
        let candidates: BTreeSet<usize> = match source {
            Source::Ranges(elements) | Source::Numbers(elements) => return elements.clone(),
            Source::Networks(selectors) => {
                return Union::of(self.world, selectors, family).elements().collect();
            }
            Source::Domains(domains, _) => return of(&mut self.world.names.addresses(domains)),
            Source::Service(service) | Source::Serves(service) => {
                let slices = self.world.endpoints(service);
                return of(&mut slices.flat_map(|endpoints| &endpoints.addresses).copied());
            }
            Source::Named(names) => {
                names.iter().filter_map(|(name, _)| self.ports.get(&**name)).flatten().copied().collect()
            }
            Source::Pods(selectors) => {
                selectors.iter().flat_map(|selector| self.candidates(selector)).collect()
            }
        };
        let mut members = hosts;
        for pod in candidates.into_iter().filter_map(|place| self.pods.get(place)) {
            let addresses = self.world.addresses(pod).filter(|address| Family::of(*address) == family);
            members.extend(addresses.flat_map(|address| of_address(self.world, source, address, Some(pod))));
        }
        members
    }

    /// Pods of which each that the selector selects is one: the fewest that one of its conditions leaves.
    fn candidates(&self, selector: &PodSelector) -> Vec<usize> {
        let values = selector.pods.values_of_keys().map(|(key, values)| {
            let known = self.labels.get(key);
            values.iter().filter_map(|value| known?.get(&**value)).collect::<Vec<_>>()
        });
        let named = match &selector.namespaces {
            Namespaces::Named(name) => Some(self.namespaces.get(&**name).into_iter().collect()),
            Namespaces::Selected(_) => None,
        };
        let fewest =
            values.chain(named).min_by_key(|lists| lists.iter().map(|list| list.len()).sum::<usize>());
        match fewest {
            Some(lists) => lists.into_iter().flatten().copied().collect(),
            None => (0..self.pods.len()).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::object::{Namespace, PodSpec, PodStatus};
    use crate::selector::LabelSelector;

    #[test]
    fn an_index_finds_what_asking_each_pod_finds() {
        let mut world = World::default();
        world.set_bounds(&BTreeSet::new(), true);
        for name in ["a", "b", "c"] {
            world.put_namespace(Namespace::new(name, [("team".to_owned(), name.to_owned())].into()));
        }
        for n in 0..60_u8 {
            let namespace = ["a", "b", "c", "undeclared"][usize::from(n) % 4];
            let metadata = json!({"name": format!("p{n}"), "namespace": namespace, "labels": {"app": format!("x{}", n % 7), "n": n.to_string()}});
            let spec = json!({"hostNetwork": n % 11 == 0, "containers": [{"ports": [{"name": if n % 2 == 0 { "http" } else { "dns" }, "containerPort": 80 + i32::from(n % 3)}]}]});
            // Some addresses are claimed twice.
            let status =
                json!({"podIPs": [{"ip": format!("10.0.0.{}", n % 50)}, {"ip": format!("fd00::{n:x}")}]});
            let pod = Pod::new(
                serde_json::from_value(metadata).unwrap(),
                serde_json::from_value::<PodSpec>(spec).unwrap(),
                serde_json::from_value::<PodStatus>(status).unwrap(),
            );
            world.put_pod(pod.unwrap());
        }
        let selector = |value| serde_json::from_value::<LabelSelector>(value).unwrap();
        let namespaces = [
            Namespaces::Named("a".to_owned()),
            Namespaces::Named("nowhere".to_owned()),
            Namespaces::Selected(selector(json!({}))),
            Namespaces::Selected(selector(json!({"matchLabels": {"team": "b"}}))),
            Namespaces::Selected(selector(
                json!({"matchExpressions": [{"key": "team", "operator": "DoesNotExist"}]}),
            )),
        ];
        let pods = [
            json!({}),
            json!({"matchLabels": {"app": "x1"}}),
            json!({"matchLabels": {"app": "x1", "n": "8"}}),
            json!({"matchLabels": {"app": "none"}}),
            json!({"matchExpressions": [{"key": "app", "operator": "In", "values": ["x2", "x3", "none"]}]}),
            json!({"matchExpressions": [{"key": "app", "operator": "NotIn", "values": ["x2"]}, {"key": "n", "operator": "Exists"}]}),
        ];
        let selectors = namespaces.iter().flat_map(|namespaces| {
            let namespaces = namespaces.clone();
            pods.iter().map(move |pods| PodSelector::new(namespaces.clone(), selector(pods.clone())))
        });
        let selectors: Vec<PodSelector> = selectors.collect();
        let pairs = selectors.windows(2).map(|pair| Source::Pods(pair.iter().cloned().collect()));
        let named = [
            Source::Named([("http".to_owned(), "TCP".parse().unwrap())].into()),
            Source::Named([("ftp".to_owned(), "TCP".parse().unwrap())].into()),
            Source::Named(["http", "dns"].map(|name| (name.to_owned(), "TCP".parse().unwrap())).into()),
        ];
        let sources: Vec<Source> = pairs.chain(named).collect();
        let (index, mut found) = (Index::of(&world, sources.iter()), 0);
        for source in &sources {
            for family in Family::BOTH {
                let addresses = world.pods().flat_map(|pod| world.addresses(pod));
                let addresses = addresses.filter(|address| Family::of(*address) == family);
                let asked: BTreeSet<Element> = addresses
                    .flat_map(|address| {
                        of_address(&world, source, address, world.holder(address).map(|pod| &**pod))
                    })
                    .collect();
                found += asked.len();
                assert_eq!(index.members(source, family), asked, "{source:?}");
            }
        }
        assert!(found > 500, "{found}");
    }
}
