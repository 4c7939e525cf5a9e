//! WireGuard implementations: in the kernel, or as a process of its own.

pub mod kernel;
mod process;
mod uapi;
pub mod userspace;

use mesh_keyring::{PrivateKey, PublicKey};

pub use kernel::Kernel;
pub use userspace::{Userspace, UserspaceConfig};

use crate::backend::{BackendError, Ensured, WireguardBackend};
use crate::device::{DeviceChange, ObservedDevice};
use crate::local::InterfaceName;
use crate::netlink::{Link, find_link_now};

/// Which implementation to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Choice {
    /// The kernel's where it has one, a process elsewhere.
    #[default]
    Auto,
    /// The kernel's.
    Kernel,
    /// A process.
    Userspace,
    /// None: this host cannot do WireGuard. It reaches those peers that the operator has exempted, in clear, and no other.
    None,
}

/// Either implementation.
pub enum Wireguard {
    /// In the kernel.
    Kernel(Kernel),
    /// A process.
    Userspace(Userspace),
    /// None, under the name that it would have.
    None(InterfaceName),
    /// The one that is configured cannot be had now, and why. Everything that needs no device goes on.
    Missing(InterfaceName, BackendError),
}

impl Wireguard {
    /// Chooses. [`Choice::None`] is never chosen but by the operator. With [`Choice::Auto`] a device of ours that is there keeps its implementation; else a kernel that
    /// has WireGuard wins. Needs a tokio runtime.
    ///
    /// # Errors
    /// What the kernel says; [`Choice::Kernel`] on a kernel without WireGuard.
    pub fn choose(choice: Choice, config: UserspaceConfig) -> Result<Self, BackendError> {
        let found = marked_link(&config.interface)?;
        match (prefer(choice, found.as_ref(), kernel::available), choice) {
            (Choice::None, _) if found.is_some() => Err(BackendError::failed(
                format!("doing without {}", config.interface),
                "a device of ours stands: run `mesh-agent cleanup --keep-key` with the backend that it was made by, or unset \
                 `wireguard.backend: none`",
            )),
            (Choice::None, _) => Ok(Self::None(config.interface)),
            (Choice::Userspace, _) => Userspace::new(config).map(Self::Userspace),
            (_, Choice::Kernel) if !kernel::available() => Err(BackendError::failed(
                "using the kernel's WireGuard",
                "this kernel has none: load the module `wireguard`, or set `wireguard.backend` to userspace",
            )),
            _ => Kernel::new(config.interface, config.own).map(Self::Kernel),
        }
    }

    fn interface(&self) -> &InterfaceName {
        match self {
            Self::Kernel(device) => device.interface(),
            Self::Userspace(device) => device.interface(),
            Self::None(interface) | Self::Missing(interface, _) => interface,
        }
    }
}

/// What to use, never [`Choice::Auto`]. To go from one implementation to the other is for the operator to decide: it
/// breaks every session.
fn prefer(choice: Choice, found: Option<&Link>, kernel: impl FnOnce() -> bool) -> Choice {
    match (choice, found.and_then(|link| link.kind.as_deref())) {
        (Choice::Auto, Some("tun")) => Choice::Userspace,
        (Choice::Auto, Some("wireguard")) => Choice::Kernel,
        (Choice::Auto, _) => {
            if kernel() {
                Choice::Kernel
            } else {
                Choice::Userspace
            }
        }
        (choice, _) => choice,
    }
}

/// The link of this name, if it has our alias.
fn marked_link(interface: &InterfaceName) -> Result<Option<Link>, BackendError> {
    let found = find_link_now(interface.as_str());
    let found = found.map_err(|e| BackendError::failed(format!("looking for {interface}"), e))?;
    Ok(found.filter(Link::is_marked))
}

/// Whether a device without our alias may be taken for ours, or what it is instead: nobody misses one that is empty,
/// and nobody else has our key.
fn adoptable(link: &Link, device: &ObservedDevice, own: Option<&PublicKey>) -> Result<(), String> {
    if let Some(alias) = link.alias.as_deref().filter(|alias| !alias.is_empty()) {
        return Err(format!("its alias is {alias:?}"));
    }
    let ours = device.public_key.is_some() && device.public_key.as_ref() == own;
    if ours || (device.public_key.is_none() && device.peers.is_empty()) {
        Ok(())
    } else {
        Err("a WireGuard device that somebody else configured".to_owned())
    }
}

impl WireguardBackend for Wireguard {
    fn kind(&self) -> &'static str {
        match self {
            Self::Kernel(device) => device.kind(),
            Self::Userspace(device) => device.kind(),
            Self::None(_) => "none",
            Self::Missing(..) => "missing",
        }
    }

    async fn ensure(&mut self) -> Result<Ensured, BackendError> {
        match self {
            Self::Kernel(device) => device.ensure().await,
            Self::Userspace(device) => device.ensure().await,
            Self::None(_) => Ok(Ensured::Adopted),
            Self::Missing(_, why) => Err(why.clone()),
        }
    }

    async fn observe(&mut self) -> Result<Option<ObservedDevice>, BackendError> {
        match self {
            Self::Kernel(device) => device.observe().await,
            Self::Userspace(device) => device.observe().await,
            Self::None(_) => Ok(Some(ObservedDevice::default())),
            Self::Missing(..) => Ok(None),
        }
    }

    async fn features(&mut self) -> Vec<String> {
        match self {
            Self::Kernel(device) => device.features().await,
            Self::Userspace(device) => device.features().await,
            Self::None(_) | Self::Missing(..) => Vec::new(),
        }
    }

    async fn apply(&mut self, change: &DeviceChange, key: &PrivateKey) -> Result<(), BackendError> {
        match self {
            Self::Kernel(device) => device.apply(change, key).await,
            Self::Userspace(device) => device.apply(change, key).await,
            Self::None(interface) => {
                let action = format!("{} {interface}", action(change));
                Err(BackendError::failed(action, "this host has no WireGuard (`wireguard.backend: none`)"))
            }
            Self::Missing(_, why) => Err(why.clone()),
        }
    }

    async fn remove(&mut self) -> Result<(), BackendError> {
        match self {
            Self::Kernel(device) => device.remove().await,
            Self::Userspace(device) => device.remove().await,
            Self::None(_) | Self::Missing(..) => Ok(()),
        }?;
        let Some(link) = marked_link(self.interface())? else { return Ok(()) };
        let reason = format!(
            "a device of ours of the kind {} remains: set `wireguard.backend` to the other implementation, or remove \
             the link by hand",
            link.kind_text()
        );
        Err(BackendError::failed(format!("removing {}", self.interface()), reason))
    }
}

/// What a change does, for an error's text; the interface's name follows.
fn action(change: &DeviceChange) -> String {
    match change {
        DeviceChange::SetPrivateKey => "setting the private key of".to_owned(),
        DeviceChange::SetListenPort(port) => format!("binding UDP port {port} for"),
        DeviceChange::RemovePeer(peer) => format!("removing peer {peer} from"),
        DeviceChange::SetPeer { key, new: true, .. } => format!("adding peer {key} to"),
        DeviceChange::SetPeer { key, .. } => format!("changing peer {key} of"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::ObservedPeer;
    use crate::link::ALIAS;

    fn link(kind: &str, alias: Option<&str>) -> Link {
        Link {
            name: "sennit0".to_owned(),
            index: 7,
            up: true,
            mtu: 1420,
            kind: Some(kind.to_owned()),
            alias: alias.map(str::to_owned),
        }
    }

    #[test]
    fn a_device_that_is_there_keeps_its_implementation() {
        let (tun, wireguard) = (link("tun", Some(ALIAS)), link("wireguard", Some(ALIAS)));
        for kernel in [false, true] {
            assert_eq!(prefer(Choice::Auto, Some(&tun), || kernel), Choice::Userspace);
            assert_eq!(prefer(Choice::Auto, Some(&wireguard), || kernel), Choice::Kernel);
            // Who sets it wants it.
            assert_eq!(prefer(Choice::Kernel, Some(&tun), || kernel), Choice::Kernel);
            assert_eq!(prefer(Choice::Userspace, Some(&wireguard), || kernel), Choice::Userspace);
        }
        assert_eq!(prefer(Choice::Auto, None, || true), Choice::Kernel);
        assert_eq!(prefer(Choice::Auto, None, || false), Choice::Userspace);
    }

    #[test]
    fn a_device_without_our_alias_is_ours_when_empty_or_with_our_key() {
        let key = |n: u8| PrivateKey::from_bytes(&[n; 32]).unwrap().public();
        let own = key(1);
        let bare = link("tun", None);
        let with = |public_key: Option<PublicKey>, peers: &[u8]| ObservedDevice {
            public_key,
            peers: peers.iter().map(|n| (key(*n), ObservedPeer::default())).collect(),
            ..ObservedDevice::default()
        };
        assert_eq!(adoptable(&bare, &with(None, &[]), Some(&own)), Ok(()));
        assert_eq!(adoptable(&link("tun", Some("")), &with(Some(own), &[2]), Some(&own)), Ok(()));
        for device in [with(Some(key(3)), &[]), with(None, &[2]), with(Some(key(3)), &[2])] {
            assert!(adoptable(&bare, &device, Some(&own)).is_err(), "{device:?}");
            assert!(adoptable(&bare, &device, None).is_err(), "{device:?}");
        }
        assert!(adoptable(&bare, &with(Some(own), &[]), None).is_err());
        assert!(adoptable(&link("tun", Some("other")), &with(None, &[]), Some(&own)).is_err());
    }
}
