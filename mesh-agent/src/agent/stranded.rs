//! Grants that would cut this host or its pods off.

use std::collections::BTreeSet;

use ipnet::IpNet;
use mesh_overlay::{Grants, LocalNode};

use super::{Agent, own_prefixes};
use crate::registry::Snapshot;

impl Agent {
    /// Reports whether the current grants give this node at least one prefix.
    pub(super) fn holds(&self, snapshot: &Snapshot) -> bool {
        let own = snapshot.nodes.iter().find(|record| record.name == self.config.node);
        let own = own.map(|own| own_prefixes(&self.grants(), &self.config.site, own, &mut Vec::new()));
        own.is_some_and(|own| !own.is_empty())
    }

    /// Returns the reason why the grants would leave this node without a prefix, if they would. Its
    /// pods would then be cut off. Other nodes apply such grants nevertheless.
    pub(super) fn strands(&self, snapshot: &Snapshot) -> Option<String> {
        if self.holds(snapshot) {
            return None;
        }
        let all = || {
            format!(
                "sites: this node would hold nothing any more, because no prefix of its own is granted to site {}: \
                 grant it, or take this node out of the mesh by `mesh-agent cleanup`",
                self.config.site
            )
        };
        Some(self.lacks().unwrap_or_else(all))
    }

    /// Returns the reason if the grants name sites but not this node's own site.
    pub(super) fn lacks(&self) -> Option<String> {
        let (grants, site) = (self.grants(), &self.config.site);
        let lacks = !grants.sites.is_empty() && !grants.sites.contains_key(site);
        lacks.then(|| {
            format!(
                "sites: the Mesh {} has no site {site}, where this node stands, so that it would hold nothing: add the \
                 site, or correct `site` in this node's configuration",
                grants.mesh
            )
        })
    }

    /// Returns why the Mesh does not count, where it does not.
    pub fn mesh_refused(&self) -> Option<&str> {
        self.mesh_refused.as_deref()
    }
}

/// A grant around our own underlay would black-hole the gateway, the API server and whoever is logged in. It is
/// judged once, when it is new: an address that this host gets later is the network's word, not the operator's.
pub(super) fn harmful(local: &LocalNode, grants: &Grants, accepted: &BTreeSet<IpNet>) -> Option<String> {
    let all = grants.sites.iter().flat_map(|(site, nets)| nets.iter().map(move |net| (site, net)));
    let all = all.filter(|(_, net)| !accepted.iter().any(|wide| wide.contains(*net)));
    let around = |net: &IpNet| local.underlay_addresses.iter().find(|ip| net.contains(*ip));
    let (site, net, ip) = all.filter_map(|(site, net)| Some((site, net, around(net)?))).next()?;
    Some(format!(
        "sites: {net} of {site} holds {ip}, an underlay address of this node: the mesh would cut this host off, so \
         nothing is done; grant pod prefixes only"
    ))
}
