//! One pass over the host: observe, compare, apply. Guard first, link last.

mod crash;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Instant, SystemTime};

use ipnet::IpNet;
use mesh_keyring::PrivateKey;
use mesh_overlay::backend::{
    BackendError, Ensured, NetBackend, NftBackend, ObservedGuard, ObservedNet, WireguardBackend,
};
use mesh_overlay::dial::Dialer;
use mesh_overlay::handshake::Handshakes;
use mesh_overlay::link::LinkChange;
use mesh_overlay::local::{InterfaceName, Routing};
use mesh_overlay::vxlan::Foreign;
use mesh_overlay::{DeviceChange, DeviceConfig, ObservedDevice, Route, RouteChange, RouteKind};

use crate::agent::Desired;

/// After this many failed changes to the device in a row a pass gives up.
const FAILURES_MOST: u32 = 3;

/// The host, behind its three seams.
pub struct Reconciler<W, N, F> {
    /// The tunnel device.
    pub wireguard: W,
    /// Links and routes.
    pub net: N,
    /// The guard.
    pub nft: F,
    key: PrivateKey,
    dialer: Dialer,
    handshakes: Handshakes,
    /// The fingerprint of the guard that stands first, from the last good state.
    restored: Option<String>,
}

/// What a pass saw and did.
#[derive(Debug, Clone, Default)]
pub struct Pass {
    /// How many changes were made; 0 in a pass that found all as it should be.
    pub changes: usize,
    /// What went wrong; the pass did all that does not depend on it.
    pub errors: Vec<BackendError>,
    /// What went wrong and leaves a way to peers missing, but not the mesh.
    pub hindered: Vec<BackendError>,
    /// The device after the pass.
    pub device: Option<ObservedDevice>,
    /// The guard as it was found.
    pub guard: ObservedGuard,
    /// Links and routes as they were found.
    pub net: ObservedNet,
    /// Whether the device was made new in this pass.
    pub created: bool,
}

impl Pass {
    fn note<T>(&mut self, result: Result<T, BackendError>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                self.errors.push(error);
                None
            }
        }
    }

    fn did(&mut self, result: Result<(), BackendError>) -> bool {
        let done = self.note(result).is_some();
        if done {
            self.wrote();
        }
        done
    }

    fn wrote(&mut self) {
        self.changes += 1;
        crash::after_write();
    }
}

impl<W: WireguardBackend, N: NetBackend, F: NftBackend> Reconciler<W, N, F> {
    /// A reconciler for this host; `key` is the node's.
    pub fn new(wireguard: W, net: N, nft: F, key: PrivateKey) -> Self {
        let (dialer, handshakes) = Default::default();
        Self { wireguard, net, nft, key, dialer, handshakes, restored: None }
    }

    /// Tells the fingerprint of the guard that was put up from the last good state: it may be replaced at once.
    pub fn replaces(&mut self, restored: Option<String>) {
        self.restored = restored;
    }

    /// Brings the host to what is desired. Without a standing guard nothing is brought up; peers that were revoked are
    /// removed all the same. Without [`Desired::prune`] nothing is taken away.
    pub async fn pass(&mut self, desired: &Desired, now: SystemTime) -> Pass {
        let mut pass = Pass::default();
        let plan = &desired.plan;
        // Before the guard forgets them.
        self.leave_carriers(desired, &mut pass).await;
        let guarded = self.guard(desired, &mut pass).await;
        self.close_what_is_revoked(desired, &mut pass, now).await;
        if !guarded || !desired.judged {
            self.revoke(desired, &mut pass).await;
            return pass;
        }
        let (interface, routing) = (&desired.link.name, &plan.routes.routing);
        let Some(net) = pass.note(self.net.observe(interface, routing).await) else { return pass };
        pass.net = net;
        // Blackholes before there is anything that could carry a packet past them.
        let mut held = true;
        for change in routes(desired, &pass, false) {
            held &= pass.did(self.net.apply_route(interface, routing, &change).await);
        }
        if !held {
            self.revoke(desired, &mut pass).await;
            return pass;
        }
        if plan.encrypts && !self.device(desired, &mut pass, now).await {
            return pass;
        }
        if !plan.encrypts {
            pass.device = pass.note(self.observe(now).await).flatten();
        }
        let carriers = self.carriers(desired, &mut pass).await;
        self.links(desired, &carriers, &mut pass).await;
        pass
    }

    /// The WireGuard device and its peers; whether it is there.
    async fn device(&mut self, desired: &Desired, pass: &mut Pass, now: SystemTime) -> bool {
        let plan = &desired.plan;
        let public_key = self.key.public();
        match pass.note(self.wireguard.ensure().await) {
            Some(Ensured::Adopted) => {}
            Some(Ensured::Created) => {
                pass.wrote();
                pass.created = true;
            }
            None => return false,
        }
        let Some(Some(device)) = pass.note(self.observe(now).await) else { return false };
        // A handshake that the other end cannot know yet is lost, and WireGuard repeats it after five seconds only:
        // a new device listens, is published, and dials in the next pass.
        let listening = DeviceConfig { listen_port: plan.device.listen_port, peers: BTreeMap::new() };
        let dials = desired.announced || !device.peers.is_empty();
        let wanted = if dials { &plan.device } else { &listening };
        let changes = wanted.diff(&device, &public_key, desired.prune, &mut self.dialer, now);
        let changed = !changes.is_empty();
        let mut failures = 0;
        for change in changes {
            let result = self.wireguard.apply(&change, &self.key).await;
            let done = pass.did(result);
            failures = if done { 0 } else { failures + 1 };
            // Peers without our key could only fail, one by one; and a device that does not answer any more would take
            // its time for each of them.
            if !done && change == DeviceChange::SetPrivateKey || failures == FAILURES_MOST {
                return false;
            }
        }
        pass.device = if changed { pass.note(self.observe(now).await).flatten() } else { Some(device) };
        true
    }

    /// Removes VXLAN devices of ours that the plan does not have: of another name, or of before.
    async fn leave_carriers(&mut self, desired: &Desired, pass: &mut Pass) {
        self.remove_vxlan(|name| desired.plan.vxlan.iter().all(|device| device.name != *name), pass).await;
    }

    /// Removes those VXLAN devices of ours that are not wanted.
    async fn remove_vxlan(&mut self, unwanted: impl Fn(&InterfaceName) -> bool, pass: &mut Pass) {
        let ours = match self.net.own_vxlan().await {
            Ok(ours) => ours,
            Err(error) => return pass.hindered.push(error),
        };
        for name in ours.iter().filter(|name| unwanted(name)) {
            match self.net.remove_vxlan(name).await {
                Ok(()) => pass.wrote(),
                Err(error) => pass.hindered.push(error),
            }
        }
    }

    /// A guard that stays until the first full read, or because the next one cannot be had, may let more travel in clear than is
    /// exempt now: then nothing does.
    async fn close_what_is_revoked(&mut self, desired: &Desired, pass: &mut Pass, now: SystemTime) {
        let exempt: Vec<(IpNet, i64)> = desired.plan.guard.exempt().collect();
        let covered =
            |net: &IpNet, until: i64| exempt.iter().any(|(wide, end)| wide.contains(net) && *end >= until);
        let seconds = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        let over = |until: i64| u64::try_from(until).unwrap_or_default() <= seconds;
        let revoked = |(net, until): &(IpNet, i64)| !over(*until) && !covered(net, *until);
        let same = pass.guard.fingerprint.as_ref() == Some(&desired.plan.guard.fingerprint());
        if same || !pass.guard.exempt.iter().any(revoked) {
            return;
        }
        let Some(clear) = &desired.plan.guard.cleartext else { return };
        self.remove_vxlan(|name| clear.interfaces.contains(name), pass).await;
    }

    /// The VXLAN devices; answers which stand. Where one cannot be had, its rung is missing and all else goes on.
    async fn carriers(&mut self, desired: &Desired, pass: &mut Pass) -> BTreeSet<InterfaceName> {
        let mut standing = BTreeSet::new();
        // The guard that stands has to know them: VXLAN lets in whatever anybody sends.
        if pass.guard.fingerprint.as_ref() != Some(&desired.plan.guard.fingerprint()) {
            return standing;
        }
        for config in &desired.plan.vxlan {
            let found = match self.net.observe_vxlan(&config.name).await {
                Ok(found) => found,
                Err(error) => {
                    pass.hindered.push(error);
                    continue;
                }
            };
            let changes = match config.diff(found.as_ref(), desired.prune) {
                Ok(changes) => changes,
                Err(Foreign(what)) => {
                    let reason = format!(
                        "it is not ours ({what}): remove it, or set `vxlan.interface` to another name"
                    );
                    pass.hindered.push(BackendError::failed(format!("using {}", config.name), reason));
                    continue;
                }
            };
            let mut whole = true;
            for change in changes {
                match self.net.apply_vxlan(config, &change).await {
                    Ok(()) => pass.wrote(),
                    Err(error) => {
                        pass.hindered.push(error);
                        whole = false;
                        break;
                    }
                }
            }
            if whole {
                standing.insert(config.name);
            }
        }
        standing
    }

    /// Removes what was revoked, and does nothing else: what is desired would cut this host off.
    pub async fn revoke_only(&mut self, desired: &Desired, now: SystemTime) -> Pass {
        let mut pass = self.look(&desired.link.name, &desired.plan.routes.routing).await;
        if let Some(guard) = pass.note(self.nft.observe().await) {
            pass.guard = guard;
        }
        self.close_what_is_revoked(desired, &mut pass, now).await;
        self.revoke(desired, &mut pass).await;
        pass.device = pass.note(self.observe(now).await).flatten();
        pass
    }

    /// Only looks at links and routes.
    pub async fn look(&mut self, interface: &InterfaceName, routing: &Routing) -> Pass {
        let mut pass = Pass::default();
        if let Some(net) = pass.note(self.net.observe(interface, routing).await) {
            pass.net = net;
        }
        pass
    }

    async fn guard(&mut self, desired: &Desired, pass: &mut Pass) -> bool {
        let Some(observed) = pass.note(self.nft.observe().await) else { return false };
        pass.guard = observed;
        let wanted = desired.plan.guard.fingerprint();
        let standing = pass.guard.fingerprint.as_ref();
        // Before the first full read a guard that stands may protect more than this agent knows of; but not the one that
        // this agent's own state has put up at boot, which lacks what the host looks like now.
        let knows = desired.synced || standing.is_some() && standing == self.restored.as_ref();
        if standing == Some(&wanted) || (standing.is_some() && !knows) {
            return true;
        }
        let done = self.nft.apply(&desired.plan.guard).await;
        let stands = pass.did(done);
        if stands {
            pass.guard.fingerprint = Some(wanted);
        }
        stands
    }

    /// Removes the peers that are not wanted any more and nothing else: what a failing guard must not put off.
    async fn revoke(&mut self, desired: &Desired, pass: &mut Pass) {
        let Ok(Some(device)) = self.wireguard.observe().await else { return };
        if !desired.prune {
            return;
        }
        for key in device.peers.keys().filter(|key| !desired.plan.device.peers.contains_key(key)) {
            let removed = self.wireguard.apply(&DeviceChange::RemovePeer(*key), &self.key).await;
            if !pass.did(removed) {
                return;
            }
        }
    }

    /// The mesh interface, and the routes through it and through those of `carriers` that carry packets in clear.
    async fn links(&mut self, desired: &Desired, carriers: &BTreeSet<InterfaceName>, pass: &mut Pass) {
        let (interface, routing) = (&desired.link.name, &desired.plan.routes.routing);
        let mut missing = BTreeSet::new();
        if desired.plan.encrypts && !self.link(desired, pass, &mut missing).await {
            return;
        }
        for change in routes(desired, pass, true) {
            // Without an address of their family routes could only fail, one by one.
            if let RouteChange::Set(Route { to, kind: RouteKind::Mesh { .. }, .. }) = &change
                && missing.contains(&to.addr().is_ipv6())
            {
                continue;
            }
            if let RouteChange::Set(Route { kind: RouteKind::Cleartext { device, .. }, .. }) = &change
                && !carriers.contains(device)
            {
                continue;
            }
            pass.did(self.net.apply_route(interface, routing, &change).await);
        }
    }

    /// Brings up the mesh interface, and reports whether it is. `missing`: the families of which it could get no address, true for
    /// IPv6. The other one goes on.
    async fn link(&mut self, desired: &Desired, pass: &mut Pass, missing: &mut BTreeSet<bool>) -> bool {
        let (interface, routing) = (&desired.link.name, &desired.plan.routes.routing);
        if pass.created || pass.net.link.is_none() {
            let Some(net) = pass.note(self.net.observe(interface, routing).await) else { return false };
            pass.net = net;
        }
        let Some(link) = pass.net.link.clone() else { return false };
        let mut up = true;
        for change in desired.link.diff(&link) {
            let done = self.net.apply_link(interface, &change).await;
            let LinkChange::AddAddress(net) = change else {
                up &= pass.did(done);
                continue;
            };
            let v6 = net.addr().is_ipv6();
            let holds = desired.last_good.prefixes.iter().any(|own| own.addr().is_ipv6() == v6);
            match done {
                // A node without pods of this family needs no address of it.
                Err(error) if !holds => {
                    missing.insert(v6);
                    pass.hindered.push(error);
                }
                done => {
                    if !pass.did(done) {
                        missing.insert(v6);
                    }
                }
            }
        }
        up
    }

    /// The device as it is now, for status.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn look_at_device(&mut self) -> Result<Option<ObservedDevice>, BackendError> {
        self.observe(SystemTime::now()).await
    }

    /// The device, with handshakes of the age that they have, whatever was done to the clock.
    async fn observe(&mut self, now: SystemTime) -> Result<Option<ObservedDevice>, BackendError> {
        let mut device = self.wireguard.observe().await?;
        if let Some(device) = &mut device {
            self.handshakes.correct(device, Instant::now(), now);
        }
        Ok(device)
    }

    /// When the dialer wants to try another endpoint.
    pub fn wake_at(&self) -> Option<SystemTime> {
        self.dialer.wake_at()
    }
}

fn routes(desired: &Desired, pass: &Pass, up: bool) -> Vec<RouteChange> {
    let mut changes = desired.plan.routes.diff(&pass.net.routes, up);
    // An exemption that has ended needs no registry to tell so.
    changes.retain(|change| match change {
        RouteChange::Remove(route) => desired.prune || matches!(route.kind, RouteKind::Cleartext { .. }),
        _ => true,
    });
    changes
}

#[cfg(test)]
#[path = "reconcile/tests.rs"]
mod tests;
