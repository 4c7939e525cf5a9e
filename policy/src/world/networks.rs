//! Network sets and host endpoints: which of them rules mean.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::{Networks, World};
use crate::model::{NetworkSelector, ObjectId, Scope};
use crate::object::Key;

impl World {
    /// Addresses with labels are there, or are different now. If that changed anything, returns the addresses of which a port has, or
    /// had, a name.
    pub fn put_networks(&mut self, id: ObjectId, networks: Networks) -> Option<BTreeSet<IpAddr>> {
        if self.networks.get(&id) == Some(&networks) {
            return None;
        }
        let mut touched = self.remove_networks(&id).unwrap_or_default();
        if let Some(host) = &networks.host {
            self.hosts.entry(host.node.clone()).or_default().insert(id.clone());
        }
        if networks.unread.is_any() {
            self.unread.insert(id.clone());
        }
        for address in networks.with_ports() {
            self.named.entry(address).or_default().insert(id.clone());
            touched.insert(address);
        }
        self.networks.insert(id, networks);
        Some(touched)
    }

    /// They are gone. If that changed anything, returns the addresses of which a port had a name.
    pub fn remove_networks(&mut self, id: &ObjectId) -> Option<BTreeSet<IpAddr>> {
        let before = self.networks.remove(id)?;
        self.unread.remove(id);
        if let Some(host) = &before.host
            && let Some(hosts) = self.hosts.get_mut(&host.node)
        {
            hosts.remove(id);
            if hosts.is_empty() {
                self.hosts.remove(&host.node);
            }
        }
        let addresses: BTreeSet<IpAddr> = before.with_ports().collect();
        for address in &addresses {
            if let Some(named) = self.named.get_mut(address) {
                named.remove(id);
                if named.is_empty() {
                    self.named.remove(address);
                }
            }
        }
        Some(addresses)
    }

    /// One of the network sets and host endpoints.
    pub fn networks_of(&self, id: &ObjectId) -> Option<&Networks> {
        self.networks.get(id)
    }

    /// The network sets of a namespace.
    pub fn networks_in(&self, namespace: &str) -> impl Iterator<Item = &ObjectId> {
        self.networks.keys().filter(move |id| id.namespace.as_deref() == Some(namespace))
    }

    /// Reports whether any object that rules refer to was not read in full.
    pub(crate) fn has_unread(&self) -> bool {
        !self.unread.is_empty() || self.slices.has_unread()
    }

    /// Reports whether the selector may match more than is known.
    pub(crate) fn may_lack(&self, selector: &NetworkSelector) -> bool {
        let unread = self.unread.iter().filter_map(|id| Some((id, self.networks.get(id)?)));
        let mut meant = unread.filter(|(id, _)| self.in_scope(&selector.scope, id));
        meant.any(|(_, Networks { labels, unread, .. })| {
            unread.may_be_selected(&selector.labels) || unread.nets && selector.labels.matches(labels)
        })
    }

    /// Reports whether some endpoints of a Service could not be read.
    pub(crate) fn lacks_endpoints(&self, service: &Key) -> bool {
        self.endpoints(service).any(|endpoints| endpoints.unread)
    }

    /// Reports whether some named ports of hosts could not be read.
    pub(crate) fn lacks_ports(&self) -> bool {
        let mut unread = self.unread.iter().filter_map(|id| self.networks.get(id));
        unread.any(|networks| networks.unread.ports)
    }

    fn in_scope(&self, scope: &Scope, id: &ObjectId) -> bool {
        match (scope, id.namespace.as_deref()) {
            (Scope::Any, _) => true,
            (Scope::Global, namespace) => namespace.is_none(),
            (Scope::In(namespaces), Some(namespace)) => self.in_namespaces(namespaces, namespace),
            (Scope::In(_), None) => false,
            (Scope::InOrNone(namespaces), namespace) => {
                namespace.is_none_or(|namespace| self.in_namespaces(namespaces, namespace))
            }
        }
    }

    /// Reports whether the selector matches this network set or host endpoint.
    pub fn selects_networks(&self, selector: &NetworkSelector, id: &ObjectId, networks: &Networks) -> bool {
        selector.labels.matches(&networks.labels) && self.in_scope(&selector.scope, id)
    }

    /// The network sets and host endpoints that are selected.
    pub fn networks<'a>(
        &'a self,
        selector: &'a NetworkSelector,
    ) -> impl Iterator<Item = (&'a ObjectId, &'a Networks)> {
        self.networks.iter().filter(move |(id, networks)| self.selects_networks(selector, id, networks))
    }
}
