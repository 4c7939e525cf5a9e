//! Tells people what changed, in the log and in Events, and answers with the whole status.

use std::collections::{BTreeMap, BTreeSet};
use std::time::SystemTime;

use mesh_keyring::NodeName;
use mesh_overlay::Exemption;
use mesh_overlay::backend::WireguardBackend as _;

use super::Running;
use crate::problem::Problem;
use crate::registry::Notice;
use crate::status::{GuardStatus, KeptStatus, RefusedStatus, Status, rfc3339};

impl Running {
    /// Looks at what is wrong between this node and the registry, and says what is new.
    pub(super) fn estrangement(&mut self) {
        let mut found = self.registry.problems(&self.config.node);
        found.extend(self.agent.mesh_refused().map(|why| {
            let object = format!("Mesh {}", self.config.grants.mesh);
            Problem::new("mesh-refused", object, why, "mend it; what it said before stays in force here")
                .blocking(true)
        }));
        self.estranged_since.note(&mut found, SystemTime::now());
        let known = |problem: &Problem| {
            self.estranged.iter().any(|old| (&old.code, &old.text) == (&problem.code, &problem.text))
        };
        for problem in found.iter().filter(|problem| !known(problem)) {
            tracing::warn!("{problem}");
        }
        let refused = |all: &[Problem]| all.iter().find(|one| one.code == "mesh-refused").cloned();
        if let Some(problem) = refused(&found)
            .filter(|problem| refused(&self.estranged).is_none_or(|old| old.text != problem.text))
        {
            let notice = Notice { warning: true, reason: "MeshRefused", note: problem.to_string() };
            self.registry.tell(&self.config.node, notice);
        }
        let endless = self.agent.endless().next();
        if self.agent.is_synced() {
            self.registry.tell_mesh(&self.config.node, self.agent.mesh_refused().or(endless.as_deref()));
        }
        self.estranged = found;
    }

    pub(super) fn tell_refusals(&mut self) {
        let all = self.desired.refused.iter();
        let all: Vec<RefusedStatus> =
            all.map(|p| RefusedStatus { node: p.node.clone(), reason: p.text.clone() }).collect();
        let told: BTreeSet<&RefusedStatus> = self.refused.iter().collect();
        for fresh in all.iter().filter(|r| !told.contains(r)) {
            tracing::warn!(
                node = fresh.node.as_ref().map(tracing::field::display),
                "refused: {}",
                fresh.reason
            );
        }
        self.refused = all;
    }

    /// Says when a prefix that nobody holds any more stays guarded, and when it does no longer.
    pub(super) fn tell_kept(&mut self) {
        for (net, kept) in self.desired.kept.iter().filter(|(net, _)| !self.kept.contains(*net)) {
            tracing::warn!(
                %net,
                holder = kept.holder,
                "nobody holds this prefix any more: it stays guarded until `mesh-agent guard release {net}`"
            );
        }
        self.kept = self.desired.kept.keys().copied().collect();
    }

    /// Says when packets begin to travel in clear, and when they do no more.
    pub(super) fn tell_exemptions(&mut self) {
        let planned = self.desired.plan.peers.iter();
        let now: BTreeMap<NodeName, Exemption> =
            planned.filter_map(|(name, peer)| Some((name.clone(), peer.exemption.clone()?))).collect();
        for (peer, exemption) in now.iter().filter(|(peer, one)| self.in_clear.get(*peer) != Some(*one)) {
            let (until, reason) = (exemption.expires(), exemption.reason());
            tracing::warn!(%peer, %until, reason, "CLEARTEXT: packets to this peer are not encrypted");
            let note = format!(
                "Packets between this node and {peer} are not encrypted until {until}, by the exemption of {}: {reason}",
                exemption.between()
            );
            self.registry.tell(&self.config.node, Notice { warning: true, reason: "CleartextBegins", note });
        }
        for peer in self.in_clear.keys().filter(|peer| !now.contains_key(*peer)) {
            tracing::warn!(%peer, "no more clear text to this peer");
            let note = format!("Packets between this node and {peer} do not travel in clear text any more");
            self.registry.tell(&self.config.node, Notice { warning: false, reason: "CleartextEnds", note });
        }
        self.in_clear = now;
    }

    pub(super) async fn status(&mut self) -> Status {
        let mut errors = self.errors.now.clone();
        let device = match self.reconciler.look_at_device().await {
            Ok(device) => device,
            Err(e) => {
                errors.push(e.to_string());
                None
            }
        };
        let now = SystemTime::now();
        let reports = self.probing.report();
        self.health.observe(&self.desired.plan, device.as_ref(), &reports, now);
        let guard = &self.pass.guard;
        let wanted = self.desired.plan.guard.fingerprint();
        Status {
            node: self.config.node.clone(),
            site: self.config.site.clone(),
            mesh: self.config.grants.mesh.to_string(),
            public_key: self.public_key,
            interface: self.config.wireguard.interface.to_string(),
            backend: self.reconciler.wireguard.kind().to_owned(),
            features: self.reconciler.wireguard.features().await,
            mtu: self.desired.plan.mtu,
            ready: self.ready,
            synced: self.agent.is_synced(),
            observed_at: rfc3339(now),
            changes: (self.pass.changes, self.changes),
            mesh_addresses: self.desired.plan.addresses.iter().map(|net| net.addr()).collect(),
            peers: self.health.peers(&self.desired.plan, device.as_ref(), &reports, now),
            exemptions: self.desired.exemptions.clone(),
            refused: self.refused.clone(),
            unpublished: self.desired.unpublished.iter().cloned().collect(),
            errors,
            problems: [
                self.bypass.problems(),
                self.reach.problems(),
                self.identity.problems(),
                &self.estranged,
            ]
            .concat(),
            guard: GuardStatus {
                standing: guard.fingerprint.as_ref() == Some(&wanted),
                egress_drops: guard.egress_drops,
                ingress_drops: guard.ingress_drops,
                carrier_drops: guard.carrier_drops,
                cleartext_drops: guard.cleartext_drops,
                kept: self.desired.kept.iter().map(|(net, kept)| KeptStatus::of(*net, kept)).collect(),
                grants: self.agent.grants().sites.values().map(Vec::len).sum(),
            },
            policy: self.policing.status().await,
        }
    }
}
