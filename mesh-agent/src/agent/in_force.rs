//! Settings in force: agent.yaml's word before the Mesh's.

use std::collections::BTreeMap;
use std::sync::Arc;

use mesh_overlay::local::Vxlan;
use mesh_overlay::{Grants, exemption};

use super::Agent;
use crate::config::{KEEPALIVE, LISTEN_PORT, SiteStances};
use crate::registry::Host;
use crate::settings::Settings;

impl Agent {
    /// What the operator grants: agent.yaml's word before the Mesh's.
    pub fn grants(&self) -> Grants {
        let mut grants = self.config.grants.clone();
        if let Some(settings) = &self.last_good.settings {
            if grants.sites.is_empty() {
                grants.sites = settings.sites.clone();
            }
            grants.protected.extend(&settings.protected);
        }
        grants.protected.extend(&self.last_good.servers);
        if let Some(now) = self.today {
            grants.exemptions = exemption::in_force(self.exemptions(), now);
        }
        grants
    }

    /// What Node objects say.
    pub fn hosts(&self) -> Arc<BTreeMap<String, Host>> {
        self.snapshot.as_ref().map(|snapshot| Arc::clone(&snapshot.hosts)).unwrap_or_default()
    }

    /// What the Mesh says that sites may do to each other.
    pub fn stances(&self) -> SiteStances {
        self.last_good.settings.as_ref().map(|settings| settings.stances.clone()).unwrap_or_default()
    }

    /// Whether the registry has an object for each pod of this node, where it can tell now.
    pub fn pods_are_objects(&mut self, told: Option<bool>) {
        self.last_good.knows_pods = told.or(self.last_good.knows_pods);
    }

    /// Whether addresses of this node that no known pod has may speak, where nobody says: not before it is known that this is a host
    /// whose pods, if it has any, nobody knows.
    pub fn has_strangers(&self) -> bool {
        self.last_good.knows_pods == Some(false)
    }

    /// Whether nothing was denied before this agent started: by an agent of a version that knew no policy, or on a host without
    /// Kubernetes where there was none. An upgrade touches no traffic.
    pub fn was_unpoliced(&self) -> bool {
        match self.last_good.unpoliced {
            None => self.last_good.registered,
            Some(unpoliced) => unpoliced && self.has_strangers(),
        }
    }

    /// Whether there is no policy.
    pub fn unpoliced(&mut self, told: bool) {
        self.last_good.unpoliced = Some(told);
    }

    pub(super) fn setting<T>(&self, own: Option<T>, of: impl Fn(&Settings) -> Option<T>) -> Option<T> {
        own.or_else(|| self.last_good.settings.as_ref().and_then(of))
    }

    pub(super) fn listen_port(&self) -> u16 {
        self.setting(self.config.wireguard.listen_port, |mesh| mesh.listen_port).unwrap_or(LISTEN_PORT)
    }

    pub(super) fn vxlan(&self) -> Option<Vxlan> {
        let own = &self.config.vxlan;
        own.enabled.then(|| Vxlan {
            interface: own.interface,
            vni: self.setting(own.vni, |mesh| mesh.vxlan_vni).unwrap_or(Vxlan::VNI),
            port: self.setting(own.port, |mesh| mesh.vxlan_port).unwrap_or(Vxlan::PORT),
        })
    }

    pub(super) fn keepalive(&self) -> Option<u16> {
        let seconds =
            self.setting(self.config.wireguard.persistent_keepalive, |mesh| mesh.persistent_keepalive);
        Some(seconds.unwrap_or(KEEPALIVE)).filter(|seconds| *seconds > 0)
    }
}
