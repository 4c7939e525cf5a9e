//! WireGuard implementations: in the kernel, or as a process of its own.

pub mod kernel;
mod process;
mod uapi;
pub mod userspace;

use mesh_keyring::PrivateKey;

pub use kernel::Kernel;
pub use userspace::{Userspace, UserspaceConfig};

use crate::backend::{BackendError, Ensured, WireguardBackend};
use crate::device::{DeviceChange, ObservedDevice};

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
}

/// Either implementation.
pub enum Wireguard {
    /// In the kernel.
    Kernel(Kernel),
    /// A process.
    Userspace(Userspace),
}

impl Wireguard {
    /// Chooses. With [`Choice::Auto`] a kernel that has WireGuard wins. Needs a tokio runtime.
    ///
    /// # Errors
    /// What the kernel says; [`Choice::Kernel`] on a kernel without WireGuard.
    pub fn choose(choice: Choice, config: UserspaceConfig) -> Result<Self, BackendError> {
        match choice {
            Choice::Userspace => Userspace::new(config).map(Self::Userspace),
            Choice::Auto if !kernel::available() => Userspace::new(config).map(Self::Userspace),
            Choice::Kernel if !kernel::available() => Err(BackendError::failed(
                "using the kernel's WireGuard",
                "this kernel has none: load the module `wireguard`, or set `wireguard.backend` to userspace",
            )),
            Choice::Auto | Choice::Kernel => Kernel::new(config.interface).map(Self::Kernel),
        }
    }
}

impl WireguardBackend for Wireguard {
    fn kind(&self) -> &'static str {
        match self {
            Self::Kernel(device) => device.kind(),
            Self::Userspace(device) => device.kind(),
        }
    }

    async fn ensure(&mut self) -> Result<Ensured, BackendError> {
        match self {
            Self::Kernel(device) => device.ensure().await,
            Self::Userspace(device) => device.ensure().await,
        }
    }

    async fn observe(&mut self) -> Result<Option<ObservedDevice>, BackendError> {
        match self {
            Self::Kernel(device) => device.observe().await,
            Self::Userspace(device) => device.observe().await,
        }
    }

    async fn apply(&mut self, change: &DeviceChange, key: &PrivateKey) -> Result<(), BackendError> {
        match self {
            Self::Kernel(device) => device.apply(change, key).await,
            Self::Userspace(device) => device.apply(change, key).await,
        }
    }

    async fn remove(&mut self) -> Result<(), BackendError> {
        match self {
            Self::Kernel(device) => device.remove().await,
            Self::Userspace(device) => device.remove().await,
        }
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
