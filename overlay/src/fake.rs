//! Backends that keep their state in memory and behave as the real ones do, for tests of what is built on them.
//!
//! They share one [`Host`]: a device that goes takes its link, addresses and routes with it.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use ipnet::IpNet;
use mesh_keyring::{PrivateKey, PublicKey};

use crate::backend::{
    BackendError, Ensured, NetBackend, NftBackend, ObservedGuard, ObservedNet, WireguardBackend,
};
use crate::device::{DeviceChange, ObservedDevice, ObservedPeer};
use crate::guard::Guard;
use crate::link::{ALIAS, LinkChange, ObservedLink};
use crate::local::{InterfaceName, Routing};
use crate::route::{Route, RouteChange, RouteKind};
use crate::vxlan::{ObservedVxlan, VxlanChange, VxlanConfig};

/// One change that was applied, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Write {
    /// A device was made.
    CreateDevice,
    /// A device was removed.
    RemoveDevice,
    /// A change to the device.
    Device(DeviceChange),
    /// A change to the link.
    Link(LinkChange),
    /// A change to the routing table.
    Route(RouteChange),
    /// A change to a VXLAN device.
    Vxlan(InterfaceName, VxlanChange),
    /// The routing table and its rules were removed.
    RemoveRoutes,
    /// The guard was written, with this fingerprint.
    Guard(String),
    /// The guard was removed.
    RemoveGuard,
}

/// The state of a host that the fakes pretend to be. Tests set its fields to what they need.
#[derive(Debug, Clone, Default)]
pub struct Host {
    /// The device; `None` while there is none.
    pub device: Option<ObservedDevice>,
    /// The device does not answer any more.
    pub wedged: bool,
    /// Links, routes and underlay.
    pub net: ObservedNet,
    /// VXLAN devices.
    pub vxlan: BTreeMap<InterfaceName, ObservedVxlan>,
    /// The guard as it stands.
    pub guard: Option<Guard>,
    /// Somebody changed the guard's table.
    pub guard_tampered: bool,
    /// What the guard dropped on egress and ingress.
    pub drops: (u64, u64),
    /// UDP ports that other processes hold.
    pub ports_in_use: BTreeSet<u16>,
    /// Every write of the WireGuard backend fails with this.
    pub wireguard_error: Option<BackendError>,
    /// Every write of the net backend fails with this.
    pub net_error: Option<BackendError>,
    /// Every call of the nft backend fails with this.
    pub nft_error: Option<BackendError>,
    /// Everything that was applied.
    pub writes: Vec<Write>,
}

/// A host that its fakes share.
#[derive(Debug, Clone, Default)]
pub struct FakeHost(Rc<RefCell<Host>>);

impl FakeHost {
    /// A host with nothing of ours on it.
    pub fn new() -> Self {
        Self::default()
    }

    /// Reads or changes its state.
    pub fn with<T>(&self, look: impl FnOnce(&mut Host) -> T) -> T {
        look(&mut self.0.borrow_mut())
    }

    /// What was applied since the last call.
    pub fn take_writes(&self) -> Vec<Write> {
        self.with(|host| std::mem::take(&mut host.writes))
    }

    /// The device's process dies, and its interface with it.
    pub fn kill_device(&self) {
        self.with(Host::drop_device);
    }

    /// Somebody else makes an interface of this kind under our name.
    pub fn make_foreign_link(&self, kind: &str) {
        self.with(|host| host.net.link = Some(link(kind)));
    }

    /// Its WireGuard.
    pub fn wireguard(&self, interface: InterfaceName) -> FakeWireguard {
        FakeWireguard { host: self.clone(), interface, silent: false }
    }

    /// Its links and routes.
    pub fn net(&self) -> FakeNet {
        FakeNet { host: self.clone() }
    }

    /// Its nftables.
    pub fn nft(&self) -> FakeNft {
        FakeNft { host: self.clone() }
    }
}

fn link(kind: &str) -> ObservedLink {
    ObservedLink {
        index: 7,
        up: false,
        mtu: 1420,
        kind: Some(kind.to_owned()),
        alias: None,
        addresses: BTreeSet::new(),
    }
}

impl Host {
    fn drop_device(&mut self) {
        self.device = None;
        self.wedged = false;
        self.net.link = None;
        self.net.routes.routes.retain(|route| !matches!(route.kind, RouteKind::Mesh { .. }));
    }

    fn foreign(&self) -> Option<String> {
        let link = self.net.link.as_ref().filter(|_| self.device.is_none())?;
        Some(format!("its kind is {}", link.kind.as_deref().unwrap_or("a hardware link")))
    }

    fn set_peer(
        &mut self,
        key: PublicKey,
        new: bool,
        change: impl FnOnce(&mut ObservedPeer),
        allowed: Option<&BTreeSet<IpNet>>,
    ) {
        let Some(device) = &mut self.device else { return };
        if !new && !device.peers.contains_key(&key) {
            return;
        }
        if let Some(nets) = allowed {
            for other in device.peers.values_mut() {
                other.allowed_ips.retain(|net| !nets.contains(net));
            }
        }
        let peer = device.peers.entry(key).or_default();
        change(peer);
        if let Some(nets) = allowed {
            peer.allowed_ips.clone_from(nets);
        }
    }
}

/// WireGuard in memory.
#[derive(Debug, Clone)]
pub struct FakeWireguard {
    host: FakeHost,
    interface: InterfaceName,
    /// A wedged device was told of once; the next time it is replaced.
    silent: bool,
}

impl WireguardBackend for FakeWireguard {
    fn kind(&self) -> &'static str {
        "fake"
    }

    async fn ensure(&mut self) -> Result<Ensured, BackendError> {
        self.host.with(|host| {
            if let Some(what) = host.foreign() {
                return Err(BackendError::ForeignInterface { name: self.interface.to_string(), what });
            }
            if host.wedged && !std::mem::replace(&mut self.silent, true) {
                let action = format!("asking the device {}", self.interface);
                return Err(BackendError::failed(action, "it does not answer; it will be replaced"));
            }
            self.silent = false;
            if host.wedged {
                host.drop_device();
            }
            if host.device.is_some() {
                return Ok(Ensured::Adopted);
            }
            if let Some(error) = &host.wireguard_error {
                return Err(error.clone());
            }
            host.device = Some(ObservedDevice::default());
            host.net.link = Some(ObservedLink { alias: Some(ALIAS.to_owned()), ..link("tun") });
            host.writes.push(Write::CreateDevice);
            Ok(Ensured::Created)
        })
    }

    async fn observe(&mut self) -> Result<Option<ObservedDevice>, BackendError> {
        self.host.with(|host| {
            if host.wedged {
                let action = format!("asking the device {}", self.interface);
                return Err(BackendError::failed(action, "it does not answer within 2 s"));
            }
            Ok(host.device.clone())
        })
    }

    async fn apply(&mut self, change: &DeviceChange, key: &PrivateKey) -> Result<(), BackendError> {
        self.host.with(|host| {
            if let Some(error) = &host.wireguard_error {
                return Err(error.clone());
            }
            let Some(device) = host.device.as_mut().filter(|_| !host.wedged) else {
                return Err(BackendError::failed(
                    format!("changing {}", self.interface),
                    "no device answers",
                ));
            };
            match change {
                DeviceChange::SetPrivateKey => device.public_key = Some(key.public()),
                DeviceChange::SetListenPort(port) => {
                    if host.ports_in_use.contains(port) {
                        return Err(BackendError::PortTaken(*port));
                    }
                    device.listen_port = *port;
                }
                DeviceChange::RemovePeer(key) => {
                    device.peers.remove(key);
                }
                DeviceChange::SetPeer { key, new, endpoint, allowed_ips, keepalive } => {
                    let set = |peer: &mut ObservedPeer| {
                        peer.endpoint = endpoint.or(peer.endpoint);
                        if let Some(seconds) = keepalive {
                            peer.keepalive = Some(*seconds).filter(|seconds| *seconds > 0);
                        }
                    };
                    host.set_peer(*key, *new, set, allowed_ips.as_ref());
                }
            }
            host.writes.push(Write::Device(change.clone()));
            Ok(())
        })
    }

    async fn remove(&mut self) -> Result<(), BackendError> {
        self.host.with(|host| {
            if let Some(error) = &host.wireguard_error {
                return Err(error.clone());
            }
            if host.device.is_some() {
                host.drop_device();
                host.writes.push(Write::RemoveDevice);
            }
            Ok(())
        })
    }
}

/// Links, addresses, routes and rules in memory.
#[derive(Debug, Clone)]
pub struct FakeNet {
    host: FakeHost,
}

impl NetBackend for FakeNet {
    async fn observe(
        &mut self,
        _interface: &InterfaceName,
        _routing: &Routing,
    ) -> Result<ObservedNet, BackendError> {
        Ok(self.host.with(|host| host.net.clone()))
    }

    async fn apply_link(
        &mut self,
        interface: &InterfaceName,
        change: &LinkChange,
    ) -> Result<(), BackendError> {
        self.host.with(|host| {
            if let Some(error) = &host.net_error {
                return Err(error.clone());
            }
            let Some(link) = &mut host.net.link else {
                let reason = format!("there is no interface {interface}");
                return Err(BackendError::failed(format!("changing {interface}"), reason));
            };
            match change {
                LinkChange::SetAlias => link.alias = Some(ALIAS.to_owned()),
                LinkChange::SetMtu(mtu) => link.mtu = u32::from(*mtu),
                LinkChange::AddAddress(net) => {
                    link.addresses.insert(*net);
                }
                LinkChange::RemoveAddress(net) => {
                    link.addresses.remove(net);
                }
                LinkChange::SetUp => link.up = true,
            }
            host.writes.push(Write::Link(*change));
            Ok(())
        })
    }

    async fn apply_route(
        &mut self,
        interface: &InterfaceName,
        _routing: &Routing,
        change: &RouteChange,
    ) -> Result<(), BackendError> {
        self.host.with(|host| {
            if let Some(error) = &host.net_error {
                return Err(error.clone());
            }
            let up = host.net.link.as_ref().is_some_and(|link| link.up);
            let routes = &mut host.net.routes;
            match change {
                RouteChange::AddRule { v6: false } => routes.rule_v4 = true,
                RouteChange::AddRule { v6: true } => routes.rule_v6 = true,
                RouteChange::AddOwn(rule) => {
                    routes.own.insert(*rule);
                }
                RouteChange::RemoveOwn(rule) => {
                    routes.own.remove(rule);
                }
                RouteChange::Set(Route { to, kind: RouteKind::Mesh { .. } }) if !up => {
                    let reason = format!("{interface} is not up");
                    return Err(BackendError::failed(format!("setting route {to}"), reason));
                }
                RouteChange::Set(Route { to, kind: RouteKind::Cleartext { device, .. } })
                    if !host.vxlan.get(device).is_some_and(|device| device.up) =>
                {
                    let reason = format!("{device} is not up");
                    return Err(BackendError::failed(format!("setting route {to}"), reason));
                }
                RouteChange::Set(route) => {
                    routes
                        .routes
                        .retain(|other| other.to != route.to || other.kind.metric() != route.kind.metric());
                    routes.routes.insert(*route);
                }
                RouteChange::Remove(route) => {
                    let metric = route.kind.metric();
                    routes.routes.retain(|other| other.to != route.to || other.kind.metric() != metric);
                }
                RouteChange::RemoveStray(stray) => {
                    routes.strays.remove(stray);
                }
            }
            host.writes.push(Write::Route(*change));
            Ok(())
        })
    }

    async fn observe_vxlan(&mut self, name: &InterfaceName) -> Result<Option<ObservedVxlan>, BackendError> {
        Ok(self.host.with(|host| host.vxlan.get(name).cloned()))
    }

    async fn own_vxlan(&mut self) -> Result<Vec<InterfaceName>, BackendError> {
        let ours = |device: &ObservedVxlan| device.alias.as_deref() == Some(ALIAS);
        Ok(self.host.with(|host| {
            host.vxlan.iter().filter(|(_, device)| ours(device)).map(|(name, _)| *name).collect()
        }))
    }

    async fn apply_vxlan(&mut self, config: &VxlanConfig, change: &VxlanChange) -> Result<(), BackendError> {
        self.host.with(|host| {
            if let Some(error) = &host.net_error {
                return Err(error.clone());
            }
            let name = &config.name;
            if *change == VxlanChange::Create {
                let device = ObservedVxlan {
                    index: 9,
                    mtu: 1450,
                    kind: Some("vxlan".to_owned()),
                    vni: config.vni,
                    port: config.port,
                    sources: (config.port, config.port.saturating_add(1)),
                    mac: Some(config.mac),
                    ..ObservedVxlan::default()
                };
                if host.vxlan.contains_key(name) {
                    return Err(BackendError::failed(format!("making {name}"), "it exists"));
                }
                host.vxlan.insert(*name, device);
            }
            let Some(device) = host.vxlan.get_mut(name) else {
                let reason = format!("there is no interface {name}");
                return Err(BackendError::failed(format!("changing {name}"), reason));
            };
            match change {
                VxlanChange::Create => {}
                VxlanChange::Remove => {
                    host.vxlan.remove(name);
                }
                VxlanChange::SetAlias => device.alias = Some(ALIAS.to_owned()),
                VxlanChange::SetMtu(mtu) => device.mtu = u32::from(*mtu),
                VxlanChange::AddAddress(net) => {
                    device.addresses.insert(*net);
                }
                VxlanChange::RemoveAddress(net) => {
                    device.addresses.remove(net);
                }
                VxlanChange::SetRemote(mac, remote) => {
                    device.remotes.insert(*mac, BTreeSet::from([*remote]));
                }
                VxlanChange::RemoveRemote(mac, remote) => {
                    if let Some(remotes) = device.remotes.get_mut(mac) {
                        remotes.remove(remote);
                    }
                    device.remotes.retain(|_, remotes| !remotes.is_empty());
                }
                VxlanChange::SetNeighbour(address, mac) => {
                    device.neighbours.insert(*address, *mac);
                }
                VxlanChange::RemoveNeighbour(address) => {
                    device.neighbours.remove(address);
                }
                VxlanChange::SetUp => device.up = true,
            }
            host.writes.push(Write::Vxlan(*name, *change));
            Ok(())
        })
    }

    async fn remove_vxlan(&mut self, name: &InterfaceName) -> Result<(), BackendError> {
        self.host.with(|host| {
            if let Some(error) = &host.net_error {
                return Err(error.clone());
            }
            let ours = |device: &ObservedVxlan| device.alias.as_deref() == Some(ALIAS);
            if host.vxlan.get(name).is_some_and(ours) {
                host.vxlan.remove(name);
                host.writes.push(Write::Vxlan(*name, VxlanChange::Remove));
            }
            Ok(())
        })
    }

    async fn remove_all(&mut self, _routing: &Routing) -> Result<(), BackendError> {
        self.host.with(|host| {
            if let Some(error) = &host.net_error {
                return Err(error.clone());
            }
            host.net.routes = Default::default();
            host.writes.push(Write::RemoveRoutes);
            Ok(())
        })
    }
}

/// The guard's table in memory.
#[derive(Debug, Clone)]
pub struct FakeNft {
    host: FakeHost,
}

impl NftBackend for FakeNft {
    async fn observe(&mut self) -> Result<ObservedGuard, BackendError> {
        self.host.with(|host| {
            if let Some(error) = &host.nft_error {
                return Err(error.clone());
            }
            let untouched = host.guard.as_ref().filter(|_| !host.guard_tampered);
            Ok(ObservedGuard {
                fingerprint: untouched.map(Guard::fingerprint),
                egress_drops: host.drops.0,
                ingress_drops: host.drops.1,
                carrier_drops: 0,
                exempt: host.guard.iter().flat_map(Guard::exempt).collect(),
                cleartext_drops: 0,
                crossing: 0,
                crossed: 0,
            })
        })
    }

    async fn apply(&mut self, guard: &Guard) -> Result<(), BackendError> {
        self.host.with(|host| {
            if let Some(error) = &host.nft_error {
                return Err(error.clone());
            }
            host.guard = Some(guard.clone());
            host.guard_tampered = false;
            host.drops = (0, 0);
            host.writes.push(Write::Guard(guard.fingerprint()));
            Ok(())
        })
    }

    async fn remove(&mut self) -> Result<(), BackendError> {
        self.host.with(|host| {
            if let Some(error) = &host.nft_error {
                return Err(error.clone());
            }
            host.guard = None;
            host.guard_tampered = false;
            host.drops = (0, 0);
            host.writes.push(Write::RemoveGuard);
            Ok(())
        })
    }
}
