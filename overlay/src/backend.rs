//! The seams to the kernel: each observes and applies, so that one conformance suite runs on the fakes and on the
//! real ones.

use std::future::Future;

use ipnet::IpNet;
use mesh_keyring::PrivateKey;

use crate::device::{DeviceChange, ObservedDevice};
use crate::guard::Guard;
use crate::link::{LinkChange, ObservedLink, ObservedUnderlay};
use crate::local::{InterfaceName, Routing};
use crate::route::{ObservedRoutes, RouteChange};
use crate::vxlan::{ObservedVxlan, VxlanChange, VxlanConfig};

/// Why the host refused something. The text names object and remedy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BackendError {
    /// An interface of our name that somebody else made. It is never touched.
    #[error(
        "interface {name} exists and is not ours ({what}): remove it, or set `wireguard.interface` to another name"
    )]
    ForeignInterface {
        /// Its name.
        name: String,
        /// What it is.
        what: String,
    },
    /// The UDP port is in use.
    #[error("UDP port {0} is in use by another process: free it, or set `wireguard.listenPort` to another")]
    PortTaken(u16),
    /// A program that is needed is not there.
    #[error("{program}: {reason}; install the package {package}")]
    MissingProgram {
        /// Its name.
        program: String,
        /// What the system said.
        reason: String,
        /// Where it comes from.
        package: &'static str,
    },
    /// Anything else the host said.
    #[error("{action}: {reason}")]
    Failed {
        /// What was tried, with the object's name.
        action: String,
        /// The host's answer.
        reason: String,
    },
}

impl BackendError {
    /// A failure of `action`.
    pub fn failed(action: impl Into<String>, reason: impl std::fmt::Display) -> Self {
        Self::Failed { action: action.into(), reason: reason.to_string() }
    }
}

/// How the device came to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ensured {
    /// It was there and is ours.
    Adopted,
    /// It was made now.
    Created,
}

/// A WireGuard implementation.
pub trait WireguardBackend {
    /// "kernel", "userspace", "none" or "fake".
    fn kind(&self) -> &'static str;

    /// Makes sure that the device exists: adopts one of ours, creates one where there is none, replaces one of
    /// ours that is dead or does not answer.
    ///
    /// # Errors
    /// [`BackendError::ForeignInterface`] without touching it, or what the host says.
    fn ensure(&mut self) -> impl Future<Output = Result<Ensured, BackendError>>;

    /// The device as it is; `None` when there is none of ours.
    ///
    /// # Errors
    /// When it exists and does not answer.
    fn observe(&mut self) -> impl Future<Output = Result<Option<ObservedDevice>, BackendError>>;

    /// Applies one change. `key` is used by [`DeviceChange::SetPrivateKey`] alone.
    ///
    /// # Errors
    /// What the device answers; nothing else was changed.
    fn apply(
        &mut self,
        change: &DeviceChange,
        key: &PrivateKey,
    ) -> impl Future<Output = Result<(), BackendError>>;

    /// What the device uses of what the kernel offers a userspace device, by name (`udp-gso=on`). Empty where there
    /// is nothing to tell.
    fn features(&mut self) -> impl Future<Output = Vec<String>> {
        std::future::ready(Vec::new())
    }

    /// Removes the device and all that belongs to it, if it is ours.
    ///
    /// # Errors
    /// What the host says. No device is no error.
    fn remove(&mut self) -> impl Future<Output = Result<(), BackendError>>;
}

/// All that is read of links, addresses and routes in one pass.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ObservedNet {
    /// The mesh interface, if there is a link of its name.
    pub link: Option<ObservedLink>,
    /// Our routing table.
    pub routes: ObservedRoutes,
    /// What is around.
    pub underlay: ObservedUnderlay,
}

/// Links, addresses, routes and rules.
pub trait NetBackend {
    /// Reads everything. Writes nothing.
    ///
    /// # Errors
    /// What the kernel says.
    fn observe(
        &mut self,
        interface: &InterfaceName,
        routing: &Routing,
    ) -> impl Future<Output = Result<ObservedNet, BackendError>>;

    /// Changes the mesh link.
    ///
    /// # Errors
    /// What the kernel says.
    fn apply_link(
        &mut self,
        interface: &InterfaceName,
        change: &LinkChange,
    ) -> impl Future<Output = Result<(), BackendError>>;

    /// Changes our routing table.
    ///
    /// # Errors
    /// What the kernel says.
    fn apply_route(
        &mut self,
        interface: &InterfaceName,
        routing: &Routing,
        change: &RouteChange,
    ) -> impl Future<Output = Result<(), BackendError>>;

    /// Reads the VXLAN device of that name; `None` where there is no link. Writes nothing.
    ///
    /// # Errors
    /// What the kernel says.
    fn observe_vxlan(
        &mut self,
        name: &InterfaceName,
    ) -> impl Future<Output = Result<Option<ObservedVxlan>, BackendError>>;

    /// The names of all VXLAN devices that bear our alias. Writes nothing.
    ///
    /// # Errors
    /// What the kernel says.
    fn own_vxlan(&mut self) -> impl Future<Output = Result<Vec<InterfaceName>, BackendError>>;

    /// Changes a VXLAN device.
    ///
    /// # Errors
    /// What the kernel says.
    fn apply_vxlan(
        &mut self,
        config: &VxlanConfig,
        change: &VxlanChange,
    ) -> impl Future<Output = Result<(), BackendError>>;

    /// Removes the VXLAN device of that name, if it is ours. None is no error.
    ///
    /// # Errors
    /// What the kernel says.
    fn remove_vxlan(&mut self, name: &InterfaceName) -> impl Future<Output = Result<(), BackendError>>;

    /// Removes our rules and every route of our protocol in our table.
    ///
    /// # Errors
    /// What the kernel says.
    fn remove_all(&mut self, routing: &Routing) -> impl Future<Output = Result<(), BackendError>>;
}

/// The guard as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ObservedGuard {
    /// The fingerprint in the table's comment; `None` when there is no table of ours or its content was changed.
    pub fingerprint: Option<String>,
    /// Packets that were about to leave in clear and were dropped.
    pub egress_drops: u64,
    /// Packets that came in clear and were dropped.
    pub ingress_drops: u64,
    /// Packets on a VXLAN device that were no WireGuard of the mesh and were dropped, both ways.
    pub carrier_drops: u64,
    /// What may travel in clear by the guard that stands, and until when (seconds since 1970).
    pub exempt: Vec<(IpNet, i64)>,
    /// Packets in clear inside of VXLAN that no exemption allows and that were dropped, both ways.
    pub cleartext_drops: u64,
    /// Packets on their way between the tunnel and pods, before any firewall of this host judged what it forwards.
    pub crossing: u64,
    /// The same behind all of them.
    pub crossed: u64,
}

/// The nftables table that is ours.
pub trait NftBackend {
    /// Reads the table. Writes nothing.
    ///
    /// # Errors
    /// When nft is missing or fails.
    fn observe(&mut self) -> impl Future<Output = Result<ObservedGuard, BackendError>>;

    /// Replaces the guard. The new one stands before the old one goes.
    ///
    /// # Errors
    /// When nft is missing or refuses; the guard that stood still stands.
    fn apply(&mut self, guard: &Guard) -> impl Future<Output = Result<(), BackendError>>;

    /// Removes the table. No table is no error.
    ///
    /// # Errors
    /// What nft says.
    fn remove(&mut self) -> impl Future<Output = Result<(), BackendError>>;
}
