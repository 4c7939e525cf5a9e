//! Who is behind an address: pods, namespaces, nodes and their sites.

mod claims;
mod networks;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::endpoints::{Endpoints, Slices};
use crate::failsafe::FailSafe;
use crate::interface::Interface;
use crate::model::{Labels, Namespaces, ObjectId, Peer, PodSelector, Sites, Subject};
use crate::names::Names;
use crate::object::{Account, Key, NamedPort, Namespace, Pod};
use crate::protocol::Protocol;
use crate::selector::LabelSelector;
use crate::unread::Unread;
use claims::{Claim, Refused};

/// A node or host of the mesh.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Node {
    /// Its site.
    pub site: Option<String>,
    /// The labels of its Node object, if it has one.
    pub labels: Option<Labels>,
    /// Its own addresses in the mesh.
    pub addresses: BTreeSet<IpAddr>,
    /// Those that its cluster knows it by: `status.addresses`.
    pub status_addresses: BTreeSet<IpAddr>,
    /// The prefixes that its pods live in.
    pub prefixes: BTreeSet<IpNet>,
}

impl Node {
    /// One of its addresses, those of the mesh first: by any of them policies know it.
    pub(crate) fn any_address(&self) -> Option<IpAddr> {
        self.addresses.iter().chain(&self.status_addresses).next().copied()
    }
}

/// Addresses that have labels: a network set, or a host endpoint.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Networks {
    /// Its labels.
    pub labels: Labels,
    /// The prefixes.
    pub nets: Arc<BTreeSet<IpNet>>,
    /// What it is beside that, of a host endpoint.
    pub host: Option<HostOf>,
    /// The parts that could not be read.
    pub unread: Unread,
}

/// What a host endpoint says of a node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostOf {
    /// The node.
    pub node: String,
    /// Its interface; `None`: all that have no host endpoint of their own.
    pub interface: Option<Interface>,
    /// Its profiles allow what no policy decides.
    pub open: bool,
    /// Its named ports.
    pub ports: BTreeSet<NamedPort>,
}

/// Who is judged: who has an address or, of a node, also by which interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Judged {
    /// The address.
    pub address: IpAddr,
    /// By which a node is spoken to, or speaks; `None`: one of which nothing is said.
    pub interface: Option<Interface>,
    /// For what it forwards.
    pub forwards: bool,
}

impl From<IpAddr> for Judged {
    fn from(address: IpAddr) -> Self {
        Self { address, interface: None, forwards: false }
    }
}

impl Networks {
    /// Reports whether an address is in one of these networks. A long list is looked up by prefix
    /// length.
    pub fn contains(&self, address: IpAddr) -> bool {
        let longest: u8 = if address.is_ipv4() { 32 } else { 128 };
        if self.nets.len() <= usize::from(longest) {
            return self.nets.iter().any(|net| net.contains(&address));
        }
        let mut around = (0..=longest).filter_map(|length| IpNet::new(address, length).ok());
        around.any(|net| self.nets.contains(&net.trunc()))
    }

    /// The addresses whose ports have names.
    fn with_ports(&self) -> impl Iterator<Item = IpAddr> {
        let named = self.host.as_ref().is_some_and(|host| !host.ports.is_empty());
        let single = self.nets.iter().filter(move |net| named && net.prefix_len() == net.max_prefix_len());
        single.map(IpNet::addr)
    }
}

/// All identities. No two pods have one address here, whatever their objects say.
#[derive(Debug, Clone, Default)]
pub struct World {
    pods: BTreeMap<Key, Arc<Pod>>,
    namespaces: BTreeMap<String, Labels>,
    accounts: BTreeMap<Key, Labels>,
    networks: BTreeMap<ObjectId, Networks>,
    // Those of which something could not be read.
    unread: BTreeSet<ObjectId>,
    // Those that are host endpoints, by node, and by address those that give a port of it a name.
    hosts: BTreeMap<String, BTreeSet<ObjectId>>,
    named: BTreeMap<IpAddr, BTreeSet<ObjectId>>,
    slices: Slices,
    nodes: BTreeMap<String, Node>,
    // Who claims an address, and who has it.
    claims: HashMap<IpAddr, Claim>,
    // The claims that do not count.
    refused: BTreeSet<(Key, IpAddr)>,
    // The nodes as they were said, and what of their status does not count.
    said: BTreeMap<String, Node>,
    refused_status: Vec<Refused>,
    mesh: BTreeSet<IpNet>,
    outside: bool,
    // The two above are others than when nodes were set.
    unbound: bool,
    // Whose prefix, and which lengths there are of each family.
    prefixes: BTreeMap<IpNet, String>,
    lengths: BTreeSet<(bool, u8)>,
    node_addresses: HashMap<IpAddr, String>,
    // All that claim one, whether the mesh or their cluster knows them by it.
    claimants: HashMap<IpAddr, Vec<String>>,
    /// What always reaches a protected node, and what it always reaches.
    pub failsafe: FailSafe,
    /// Names as they were seen to resolve.
    pub names: Names,
}

impl World {
    /// A pod is there, or is different now. Returns the addresses of whose holders something may be different.
    pub fn put_pod(&mut self, pod: Pod) -> BTreeSet<IpAddr> {
        if self.pods.get(&pod.key).is_some_and(|before| **before == pod) {
            return BTreeSet::new();
        }
        let mut touched = self.remove_pod(&pod.key);
        let pod = Arc::new(pod);
        self.pods.insert(pod.key.clone(), Arc::clone(&pod));
        // What a pod in the host's network has is its node's.
        for address in pod.addresses.iter().filter(|_| !pod.host_network) {
            touched.insert(*address);
            self.claims.entry(*address).or_default().keys.insert(pod.key.clone());
            self.settle(*address);
        }
        touched
    }

    /// A pod is gone. Returns the addresses of whose holders something may be different.
    pub fn remove_pod(&mut self, key: &Key) -> BTreeSet<IpAddr> {
        let Some(pod) = self.pods.remove(key) else { return BTreeSet::new() };
        if pod.host_network {
            return BTreeSet::new();
        }
        for address in &pod.addresses {
            self.refused.remove(&(key.clone(), *address));
            if let Some(claim) = self.claims.get_mut(address) {
                claim.keys.remove(key);
                if claim.keys.is_empty() {
                    self.claims.remove(address);
                }
                self.settle(*address);
            }
        }
        pod.addresses.clone()
    }

    /// A namespace is there, or is different now. Returns the addresses of whose holders something may be different.
    pub fn put_namespace(&mut self, namespace: Namespace) -> BTreeSet<IpAddr> {
        let Namespace { name, labels } = namespace;
        if self.namespaces.get(&name) == Some(&labels) {
            return BTreeSet::new();
        }
        let touched = self.addresses_in(&name);
        self.namespaces.insert(name, labels);
        touched
    }

    /// A namespace is gone. Returns the addresses of whose holders something may be different.
    pub fn remove_namespace(&mut self, name: &str) -> BTreeSet<IpAddr> {
        match self.namespaces.remove(name) {
            Some(_) => self.addresses_in(name),
            None => BTreeSet::new(),
        }
    }

    fn addresses_in(&self, namespace: &str) -> BTreeSet<IpAddr> {
        self.pods_of(namespace)
            .filter(|pod| !pod.host_network)
            .flat_map(|pod| pod.addresses.iter().copied())
            .collect()
    }

    /// Names of the namespaces that were declared.
    pub fn namespaces(&self) -> impl Iterator<Item = &String> {
        self.namespaces.keys()
    }

    /// A service account is there, or is different now. Returns the addresses of whose holders something may be different.
    pub fn put_account(&mut self, account: Account) -> BTreeSet<IpAddr> {
        if self.accounts.get(&account.key) == Some(&account.labels) {
            return BTreeSet::new();
        }
        let touched = self.addresses_as(&account.key);
        self.accounts.insert(account.key, account.labels);
        touched
    }

    /// A service account is gone. Returns the addresses of whose holders something may be different.
    pub fn remove_account(&mut self, key: &Key) -> BTreeSet<IpAddr> {
        match self.accounts.remove(key) {
            Some(_) => self.addresses_as(key),
            None => BTreeSet::new(),
        }
    }

    fn addresses_as(&self, account: &Key) -> BTreeSet<IpAddr> {
        let pods = self.pods_of(&account.namespace);
        let pods = pods.filter(|pod| !pod.host_network && pod.service_account == account.name);
        pods.flat_map(|pod| pod.addresses.iter().copied()).collect()
    }

    /// Endpoints of a Service are there, or are different now. Returns the addresses of which something is different.
    pub fn put_endpoints(&mut self, id: ObjectId, endpoints: Endpoints) -> BTreeSet<IpAddr> {
        self.slices.put(id, endpoints)
    }

    /// They are gone. Returns the addresses of which something is different.
    pub fn remove_endpoints(&mut self, id: &ObjectId) -> BTreeSet<IpAddr> {
        self.slices.remove(id)
    }

    /// The endpoints of a Service.
    pub fn endpoints<'a>(&'a self, service: &Key) -> impl Iterator<Item = &'a Endpoints> + use<'a> {
        self.slices.of(service)
    }

    /// What an address serves for a Service, set by set; nothing where it is none of its endpoints.
    pub fn serves<'a>(
        &'a self,
        service: &Key,
        address: IpAddr,
    ) -> impl Iterator<Item = &'a BTreeSet<(Protocol, u16)>> + use<'a> {
        self.slices.serves(service, address)
    }

    /// Whether a node is known by an address, in the mesh or in its cluster.
    pub fn is_known_by(&self, node: &str, address: IpAddr) -> bool {
        self.claimants(address).any(|claimant| claimant == node)
    }

    /// The host endpoint by which a node is judged: the one of the interface, or else the one of all, the first by name. A node that has
    /// the address in the mesh comes before those that only say so.
    pub fn host_at(&self, judged: Judged) -> Option<(&ObjectId, &Networks, &HostOf)> {
        if self.hosts.is_empty() {
            return None;
        }
        let own: BTreeSet<&ObjectId> = match self.node_at(judged.address) {
            Some(node) => self.hosts.get(node).into_iter().flatten().collect(),
            None => {
                self.claimants(judged.address).filter_map(|node| self.hosts.get(node)).flatten().collect()
            }
        };
        let own = own.into_iter().filter_map(|id| self.host(id));
        let (mut by_interface, mut of_all) = (None, None);
        for found in own {
            match found.2.interface {
                None => of_all = of_all.or(Some(found)),
                interface if interface == judged.interface => by_interface = by_interface.or(Some(found)),
                Some(_) => {}
            }
        }
        by_interface.or(of_all)
    }

    /// The host endpoint that denies what no policy decides of who is judged; what a node forwards needs no profile.
    pub fn closed_by(&self, judged: Judged) -> Option<&ObjectId> {
        let closes = |(_, _, host): &(&ObjectId, &Networks, &HostOf)| !host.open && !judged.forwards;
        self.host_at(judged).filter(closes).map(|(id, _, _)| id)
    }

    /// All host endpoints.
    pub fn hosts(&self) -> impl Iterator<Item = (&ObjectId, &Networks, &HostOf)> {
        self.hosts.values().flatten().filter_map(|id| self.host(id))
    }

    /// Those of a node.
    pub fn hosts_of(&self, node: &str) -> impl Iterator<Item = (&ObjectId, &Networks, &HostOf)> {
        self.hosts.get(node).into_iter().flatten().filter_map(|id| self.host(id))
    }

    fn host<'a>(&'a self, id: &'a ObjectId) -> Option<(&'a ObjectId, &'a Networks, &'a HostOf)> {
        let networks = self.networks.get(id)?;
        Some((id, networks, networks.host.as_ref()?))
    }

    /// The ports that host endpoints give names at an address that they say they have.
    pub fn host_ports(&self, address: IpAddr) -> impl Iterator<Item = &NamedPort> {
        let hosts = self.named.get(&address).into_iter().flatten();
        let hosts = hosts.filter_map(|id| self.networks.get(id)?.host.as_ref());
        hosts.flat_map(|host| &host.ports)
    }

    /// The addresses that have such ports.
    pub fn with_host_ports(&self) -> impl Iterator<Item = IpAddr> {
        self.named.keys().copied()
    }

    /// These are all nodes. If that changed anything, returns the addresses of pods that may have other holders by it.
    pub fn set_nodes(&mut self, nodes: BTreeMap<String, Node>) -> Option<BTreeSet<IpAddr>> {
        let unbound = std::mem::take(&mut self.unbound);
        if self.said == nodes && !unbound {
            return None;
        }
        self.said.clone_from(&nodes);
        let before = (std::mem::take(&mut self.node_addresses), std::mem::take(&mut self.prefixes));
        let all = || nodes.iter();
        self.prefixes = all()
            .flat_map(|(name, node)| node.prefixes.iter().map(|net| (net.trunc(), name.clone())))
            .collect();
        self.lengths = self.prefixes.keys().map(|net| (net.addr().is_ipv4(), net.prefix_len())).collect();
        self.node_addresses = all()
            .flat_map(|(name, node)| node.addresses.iter().map(|address| (*address, name.clone())))
            .collect();
        let mut nodes = nodes;
        self.refused_status = self.refuse_status(&mut nodes);
        self.claimants.clear();
        for (name, node) in &nodes {
            for address in node.addresses.union(&node.status_addresses) {
                self.claimants.entry(*address).or_default().push(name.clone());
            }
        }
        self.nodes = nodes;
        let same = (&before.0, &before.1) == (&self.node_addresses, &self.prefixes) && !unbound;
        Some(if same { BTreeSet::new() } else { self.settle_all() })
    }

    /// A pod by its key.
    pub fn pod(&self, key: &Key) -> Option<&Arc<Pod>> {
        self.pods.get(key)
    }

    /// All pods.
    pub fn pods(&self) -> impl Iterator<Item = &Arc<Pod>> {
        self.pods.values()
    }

    /// The pods of a namespace.
    pub fn pods_of(&self, namespace: &str) -> impl Iterator<Item = &Arc<Pod>> {
        let first = Key { namespace: namespace.to_owned(), name: String::new() };
        let namespace = namespace.to_owned();
        self.pods.range(first..).map(|(_, pod)| pod).take_while(move |pod| pod.key.namespace == namespace)
    }

    /// The pod that has an address, by the word of the node whose address it is.
    pub fn holder(&self, address: IpAddr) -> Option<&Arc<Pod>> {
        self.pods.get(self.claims.get(&address)?.holder.as_ref()?)
    }

    /// The addresses that this pod has, and no newer one.
    pub fn addresses<'a>(&'a self, pod: &'a Pod) -> impl Iterator<Item = IpAddr> + 'a {
        let own = pod.addresses.iter().copied().filter(|_| !pod.host_network);
        own.filter(|address| self.holder(*address).is_some_and(|holder| holder.key == pod.key))
    }

    /// All nodes.
    pub fn nodes(&self) -> &BTreeMap<String, Node> {
        &self.nodes
    }

    /// The node that has this address as its own.
    pub fn node_at(&self, address: IpAddr) -> Option<&str> {
        self.node_addresses.get(&address).map(String::as_str)
    }

    /// The node of whose addresses or prefixes this is one.
    pub fn node_of(&self, address: IpAddr) -> Option<&str> {
        let by_prefix = || {
            let lengths = self.lengths.iter().rev().filter(|(v4, _)| *v4 == address.is_ipv4());
            lengths
                .filter_map(|(_, length)| IpNet::new(address, *length).ok())
                .find_map(|net| self.prefixes.get(&net.trunc()))
        };
        self.node_at(address).or_else(|| by_prefix().map(String::as_str))
    }

    /// The site that an address is in.
    pub fn site_of(&self, address: IpAddr) -> Option<&str> {
        self.nodes.get(self.node_of(address)?)?.site.as_deref()
    }

    /// Whether these namespaces hold this one. One that nobody has declared has its name for a label.
    pub fn in_namespaces(&self, namespaces: &Namespaces, name: &str) -> bool {
        match namespaces {
            Namespaces::Named(named) => named == name,
            Namespaces::Selected(selector) => match self.namespaces.get(name) {
                Some(labels) => selector.matches(labels),
                None => selector.matches(&Namespace::new(name, Labels::new()).labels),
            },
        }
    }

    /// Whether a pod is selected.
    pub fn selects(&self, selector: &PodSelector, pod: &Pod) -> bool {
        !pod.host_network
            && selector.pods.matches(&pod.labels)
            && self.in_namespaces(&selector.namespaces, &pod.key.namespace)
            && selector.accounts.as_ref().is_none_or(|accounts| self.speaks_as(accounts, pod))
    }

    /// Whether the account that a pod speaks as has labels that match. Of one that nobody has declared only the name is known.
    fn speaks_as(&self, accounts: &LabelSelector, pod: &Pod) -> bool {
        let key = Key { namespace: pod.key.namespace.clone(), name: pod.service_account.clone() };
        match self.accounts.get(&key) {
            Some(labels) => accounts.matches(labels),
            None => accounts.matches(&Account::new(key, Labels::new()).labels),
        }
    }

    /// The nodes that an address is known by.
    fn claimants(&self, address: IpAddr) -> impl Iterator<Item = &String> {
        self.claimants.get(&address).into_iter().flatten()
    }

    /// Whether a node is known by this address.
    pub fn is_node_at(&self, address: IpAddr) -> bool {
        self.claimants.contains_key(&address)
    }

    fn is_node(&self, selector: &LabelSelector, address: IpAddr) -> bool {
        let mut labels = self.claimants(address).filter_map(|name| self.nodes.get(name)?.labels.as_ref());
        labels.any(|labels| selector.matches(labels))
    }

    fn in_sites(&self, sites: &Sites, address: IpAddr) -> bool {
        sites.contains(self.site_of(address))
    }

    /// Reports whether the subject selects the judged endpoint.
    pub fn is_subject(&self, subject: &Subject, judged: impl Into<Judged>) -> bool {
        let judged = judged.into();
        let address = judged.address;
        match subject {
            Subject::Pods(selector) => self.holder(address).is_some_and(|pod| self.selects(selector, pod)),
            Subject::Sites(sites) => self.in_sites(sites, address),
            Subject::Nodes(selector) => self.is_node(selector, address),
            Subject::Hosts(labels) => {
                self.host_at(judged).is_some_and(|(_, networks, _)| labels.matches(&networks.labels))
            }
            Subject::Any(subjects) => subjects.iter().any(|subject| self.is_subject(subject, judged)),
            Subject::All(subjects) => subjects.iter().all(|subject| self.is_subject(subject, judged)),
        }
    }

    /// Reports whether the subject selects anyone who is known.
    pub fn is_anybody(&self, subject: &Subject) -> bool {
        match subject {
            Subject::Pods(selector) => self.pods.values().any(|pod| self.selects(selector, pod)),
            Subject::Sites(sites) => self.nodes.values().any(|node| sites.contains(node.site.as_deref())),
            Subject::Nodes(selector) => self
                .nodes
                .values()
                .filter_map(|node| node.labels.as_ref())
                .any(|labels| selector.matches(labels)),
            Subject::Hosts(labels) => self.hosts().any(|(_, networks, _)| labels.matches(&networks.labels)),
            Subject::Any(subjects) => subjects.iter().any(|subject| self.is_anybody(subject)),
            Subject::All(_) => {
                let pods = self.pods.values().flat_map(|pod| &pod.addresses);
                let mut all = pods.chain(self.claimants.keys());
                all.any(|address| self.is_subject(subject, *address))
            }
        }
    }

    /// Whether who has this address is meant.
    pub fn is_peer(&self, peer: &Peer, address: IpAddr) -> bool {
        match peer {
            Peer::Pods(selector) => self.holder(address).is_some_and(|pod| self.selects(selector, pod)),
            Peer::Block(block) => block.contains(address),
            Peer::Nodes(selector) => self.is_node(selector, address),
            Peer::Networks(selector) => {
                self.networks(selector).any(|(_, networks)| networks.contains(address))
            }
            Peer::Domains(domains) => self.names.has(domains, address),
            Peer::Sites(sites) => self.in_sites(sites, address),
            Peer::Service(service) => self.serves(service, address).next().is_some(),
        }
    }
}
