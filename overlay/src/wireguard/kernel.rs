//! WireGuard in the kernel, through its netlink API.
//!
//! Reading goes through `defguard_wireguard_rs`, which puts split answers together. Writing goes through the messages
//! themselves: that crate sets a private key only with `configure_interface`, which flushes addresses and peers, and
//! always rewrites a peer's AllowedIPs. Links are made and removed with rtnetlink: its `remove_interface` fails on
//! hosts without resolvconf.
//!
//! It needs a kernel with WireGuard (`CONFIG_WIREGUARD`) to run at all; the conformance suite names where that is
//! missing, and `make kernel-test` runs it on an emulated machine.

use std::io;
use std::time::{Duration, SystemTime};

use defguard_wireguard_rs::{Kernel as KernelApi, WGApi, WireguardInterfaceApi as _};
use ipnet::IpNet;
use mesh_keyring::{PrivateKey, PublicKey};
use netlink_packet_generic::GenlMessage;
use netlink_packet_generic::ctrl::{GenlCtrl, GenlCtrlCmd, nlas::GenlCtrlAttrs};
use netlink_packet_wireguard::{
    WireguardAddressFamily, WireguardAllowedIp, WireguardAllowedIpAttr, WireguardAttribute, WireguardCmd,
    WireguardMessage, WireguardPeer, WireguardPeerAttribute, WireguardPeerFlags,
};
use rtnetlink::sys::protocols::NETLINK_GENERIC;
use zeroize::Zeroizing;

use crate::backend::{BackendError, Ensured, WireguardBackend};
use crate::device::{DeviceChange, ObservedDevice, ObservedPeer};
use crate::local::InterfaceName;
use crate::netlink::{
    Link, RouteSocket, create_wireguard, delete_link, errno, exchange_now, find_link, mark_link,
};

/// Whether this kernel has WireGuard: its netlink family is there. Asking for it makes the kernel load the module.
pub fn available() -> bool {
    family().is_ok()
}

/// A device of the kernel.
pub struct Kernel {
    interface: InterfaceName,
    own: Option<PublicKey>,
    links: RouteSocket,
}

impl Kernel {
    /// `own` is this node's public key: a device that has it is ours also without our alias. Needs a tokio runtime.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new(interface: InterfaceName, own: Option<PublicKey>) -> Result<Self, BackendError> {
        let links = RouteSocket::new().map_err(|e| BackendError::failed("opening a netlink socket", e))?;
        Ok(Self { interface, own, links })
    }

    pub(crate) fn interface(&self) -> &InterfaceName {
        &self.interface
    }

    fn failed(&self, action: &str, reason: impl std::fmt::Display) -> BackendError {
        BackendError::failed(format!("{action} {}", self.interface), reason)
    }

    fn foreign(&self, what: String) -> BackendError {
        BackendError::ForeignInterface { name: self.interface.to_string(), what }
    }

    /// The link if it is ours: of the kind "wireguard", and with our alias, with our key or with nothing in it.
    async fn own_link(&mut self) -> Result<Option<Link>, BackendError> {
        let found = find_link(&mut self.links, self.interface.as_str()).await;
        let Some(link) = found.map_err(|e| self.failed("looking for", e))? else { return Ok(None) };
        if link.kind.as_deref() != Some("wireguard") {
            return Err(self.foreign(format!("its kind is {}", link.kind_text())));
        }
        if !link.is_marked()
            && let Err(what) = super::adoptable(&link, &self.read()?, self.own.as_ref())
        {
            return Err(self.foreign(what));
        }
        Ok(Some(link))
    }

    fn read(&self) -> Result<ObservedDevice, BackendError> {
        let failed = |error| self.failed("reading the device", error);
        let api = WGApi::<KernelApi>::new(self.interface.as_str()).map_err(failed)?;
        let host = api.read_interface_data().map_err(failed)?;
        let own = host.private_key.map(|key| Zeroizing::new(key.as_array()));
        let mut device = ObservedDevice {
            public_key: own.and_then(|key| PrivateKey::from_bytes(&key).ok()).map(|key| key.public()),
            listen_port: host.listen_port,
            ..ObservedDevice::default()
        };
        for (key, peer) in host.peers {
            let Ok(key) = PublicKey::from_bytes(key.as_array()) else { continue };
            let nets = peer.allowed_ips.iter().filter_map(|net| IpNet::new(net.address, net.cidr).ok());
            device.peers.insert(
                key,
                ObservedPeer {
                    endpoint: peer.endpoint,
                    allowed_ips: nets.map(|net| net.trunc()).collect(),
                    keepalive: peer.persistent_keepalive_interval.filter(|seconds| *seconds > 0),
                    last_handshake: peer.last_handshake.filter(|at| {
                        at.duration_since(SystemTime::UNIX_EPOCH).is_ok_and(|since| since > Duration::ZERO)
                    }),
                    rx_bytes: peer.rx_bytes,
                    tx_bytes: peer.tx_bytes,
                },
            );
        }
        Ok(device)
    }
}

impl WireguardBackend for Kernel {
    fn kind(&self) -> &'static str {
        "kernel"
    }

    async fn ensure(&mut self) -> Result<Ensured, BackendError> {
        let mut link = self.own_link().await?;
        let ensured = if link.is_some() { Ensured::Adopted } else { Ensured::Created };
        if link.is_none() {
            create_wireguard(&mut self.links, self.interface.as_str())
                .await
                .map_err(|e| self.failed("creating the WireGuard link", e))?;
            link = self.own_link().await?;
        }
        if let Some(link) = link.filter(|link| !link.is_marked()) {
            mark_link(&mut self.links, link.index).await.map_err(|e| self.failed("marking as ours", e))?;
        }
        Ok(ensured)
    }

    async fn observe(&mut self) -> Result<Option<ObservedDevice>, BackendError> {
        match self.own_link().await {
            Ok(Some(_)) => self.read().map(Some),
            Ok(None) | Err(BackendError::ForeignInterface { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn apply(&mut self, change: &DeviceChange, key: &PrivateKey) -> Result<(), BackendError> {
        match (set(message(&self.interface, change, key)), change) {
            (Ok(()), _) => Ok(()),
            (Err(e), DeviceChange::SetListenPort(port)) if e.raw_os_error() == Some(errno::EADDRINUSE) => {
                Err(BackendError::PortTaken(*port))
            }
            (Err(e), _) => Err(self.failed(&super::action(change), e)),
        }
    }

    async fn remove(&mut self) -> Result<(), BackendError> {
        match self.own_link().await {
            Ok(Some(link)) => {
                let result = delete_link(&mut self.links, link.index).await;
                result.map_err(|e| self.failed("removing the WireGuard link", e))
            }
            Ok(None) | Err(BackendError::ForeignInterface { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// One change as a `WG_CMD_SET_DEVICE` (include/uapi/linux/wireguard.h).
fn message(interface: &InterfaceName, change: &DeviceChange, key: &PrivateKey) -> WireguardMessage {
    let mut attributes = vec![WireguardAttribute::IfName(interface.to_string())];
    attributes.push(match change {
        DeviceChange::SetPrivateKey => WireguardAttribute::PrivateKey(*key.expose()),
        DeviceChange::SetListenPort(port) => WireguardAttribute::ListenPort(*port),
        DeviceChange::RemovePeer(peer) => WireguardAttribute::Peers(vec![WireguardPeer(vec![
            WireguardPeerAttribute::PublicKey(*peer.as_bytes()),
            WireguardPeerAttribute::Flags(WireguardPeerFlags::RemoveMe),
        ])]),
        DeviceChange::SetPeer { key: peer, new, endpoint, allowed_ips, keepalive } => {
            let mut flags = WireguardPeerFlags::empty();
            flags.set(WireguardPeerFlags::UpdateOnly, !new);
            flags.set(WireguardPeerFlags::ReplaceAllowedIps, allowed_ips.is_some());
            let mut peer = vec![
                WireguardPeerAttribute::PublicKey(*peer.as_bytes()),
                WireguardPeerAttribute::Flags(flags),
            ];
            peer.extend(endpoint.map(WireguardPeerAttribute::Endpoint));
            peer.extend(keepalive.map(WireguardPeerAttribute::PersistentKeepalive));
            peer.extend(
                allowed_ips
                    .as_ref()
                    .map(|nets| WireguardPeerAttribute::AllowedIps(nets.iter().map(allowed_ip).collect())),
            );
            WireguardAttribute::Peers(vec![WireguardPeer(peer)])
        }
    });
    WireguardMessage { cmd: WireguardCmd::SetDevice, attributes }
}

fn allowed_ip(net: &IpNet) -> WireguardAllowedIp {
    let family = match net {
        IpNet::V4(_) => WireguardAddressFamily::Ipv4,
        IpNet::V6(_) => WireguardAddressFamily::Ipv6,
    };
    WireguardAllowedIp(vec![
        WireguardAllowedIpAttr::Family(family),
        WireguardAllowedIpAttr::IpAddr(net.network()),
        WireguardAllowedIpAttr::Cidr(net.prefix_len()),
    ])
}

fn set(message: WireguardMessage) -> io::Result<()> {
    let mut message = GenlMessage::from_payload(message);
    message.set_resolved_family_id(family()?);
    exchange_now(NETLINK_GENERIC, message).map(|_| ())
}

fn family() -> io::Result<u16> {
    let name = GenlCtrlAttrs::FamilyName("wireguard".to_owned());
    let request = GenlMessage::from_payload(GenlCtrl { cmd: GenlCtrlCmd::GetFamily, nlas: vec![name] });
    let answers = exchange_now(NETLINK_GENERIC, request)?;
    (answers.iter().flat_map(|answer| &answer.payload.nlas))
        .find_map(|attribute| match attribute {
            GenlCtrlAttrs::FamilyId(id) => Some(*id),
            _ => None,
        })
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the kernel names no WireGuard family"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_alone_leaves_allowed_ips_alone_and_never_makes_a_peer() {
        let key = PrivateKey::from_bytes(&[3; 32]).unwrap();
        let change = DeviceChange::SetPeer {
            key: key.public(),
            new: false,
            endpoint: Some("192.0.2.1:51820".parse().unwrap()),
            allowed_ips: None,
            keepalive: None,
        };
        let message = message(&"sennit0".parse().unwrap(), &change, &key);
        let WireguardAttribute::Peers(peers) = &message.attributes[1] else { panic!("{message:?}") };
        assert_eq!(
            peers[0].0,
            [
                WireguardPeerAttribute::PublicKey(*key.public().as_bytes()),
                WireguardPeerAttribute::Flags(WireguardPeerFlags::UpdateOnly),
                WireguardPeerAttribute::Endpoint("192.0.2.1:51820".parse().unwrap()),
            ]
        );
    }

    #[test]
    fn asking_a_kernel_without_wireguard_is_an_answer() {
        // Whichever it is, it is answered at once and without touching a link.
        let _ = available();
    }
}
