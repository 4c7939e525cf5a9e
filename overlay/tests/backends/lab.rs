//! One host under test, pretended or real, behind the same handle.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant, SystemTime};

use ipnet::IpNet;
use mesh_keyring::{PrivateKey, PublicKey};
use mesh_overlay::backend::{
    BackendError, Ensured, NetBackend, NftBackend, ObservedGuard, ObservedNet, WireguardBackend,
};
use mesh_overlay::dial::Dialer;
use mesh_overlay::fake::{FakeHost, FakeNet, FakeNft, FakeWireguard};
use mesh_overlay::guard::Carriers;
use mesh_overlay::link::{LinkChange, LinkConfig};
use mesh_overlay::local::{InterfaceName, Routing};
use mesh_overlay::netlink::Netlink;
use mesh_overlay::nft::Nft;
use mesh_overlay::vxlan::{ObservedVxlan, VxlanChange, VxlanConfig};
use mesh_overlay::wireguard::{Choice, UserspaceConfig, Wireguard};
use mesh_overlay::{DeviceChange, DeviceConfig, DevicePeer, Guard, ObservedDevice, ObservedPeer};
use mesh_overlay::{Route, RouteChange, RouteKind, RouteTable};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::namespace::{find, sh};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Fake,
    WireguardGo,
    MeshWg,
    Kernel,
}

impl Kind {
    pub(crate) fn program(self) -> Option<&'static str> {
        match self {
            Self::Fake | Self::Kernel => None,
            Self::WireguardGo => Some("wireguard-go"),
            Self::MeshWg => Some("mesh-wg"),
        }
    }
}

pub(crate) enum AnyWireguard {
    Fake(FakeWireguard),
    Real(Wireguard),
}

pub(crate) enum AnyNet {
    Fake(FakeNet),
    Real(Netlink),
}

pub(crate) enum AnyNft {
    Fake(FakeNft),
    Real(Nft),
}

macro_rules! on_both {
    ($self:ident, $backend:ident => $call:expr) => {
        match $self {
            Self::Fake($backend) => $call.await,
            Self::Real($backend) => $call.await,
        }
    };
}

impl AnyWireguard {
    pub(crate) async fn ensure(&mut self) -> Result<Ensured, BackendError> {
        on_both!(self, b => b.ensure())
    }
    pub(crate) async fn observe(&mut self) -> Result<Option<ObservedDevice>, BackendError> {
        on_both!(self, b => b.observe())
    }
    pub(crate) async fn apply(
        &mut self,
        change: &DeviceChange,
        key: &PrivateKey,
    ) -> Result<(), BackendError> {
        on_both!(self, b => b.apply(change, key))
    }
    pub(crate) async fn remove(&mut self) -> Result<(), BackendError> {
        on_both!(self, b => b.remove())
    }
}

impl AnyNet {
    pub(crate) async fn observe(&mut self, routing: &Routing) -> ObservedNet {
        let name = name();
        let found: Result<_, BackendError> = on_both!(self, b => b.observe(&name, routing));
        found.unwrap()
    }
    pub(crate) async fn apply_link(&mut self, change: &LinkChange) -> Result<(), BackendError> {
        let name = name();
        on_both!(self, b => b.apply_link(&name, change))
    }
    pub(crate) async fn apply_route(
        &mut self,
        routing: &Routing,
        change: &RouteChange,
    ) -> Result<(), BackendError> {
        let name = name();
        on_both!(self, b => b.apply_route(&name, routing, change))
    }
    pub(crate) async fn observe_vxlan(
        &mut self,
        name: &InterfaceName,
    ) -> Result<Option<ObservedVxlan>, BackendError> {
        on_both!(self, b => b.observe_vxlan(name))
    }
    pub(crate) async fn apply_vxlan(
        &mut self,
        config: &VxlanConfig,
        change: &VxlanChange,
    ) -> Result<(), BackendError> {
        on_both!(self, b => b.apply_vxlan(config, change))
    }
    pub(crate) async fn own_vxlan(&mut self) -> Result<Vec<InterfaceName>, BackendError> {
        on_both!(self, b => b.own_vxlan())
    }
    pub(crate) async fn remove_vxlan(&mut self, name: &InterfaceName) -> Result<(), BackendError> {
        on_both!(self, b => b.remove_vxlan(name))
    }
    pub(crate) async fn remove_all(&mut self, routing: &Routing) -> Result<(), BackendError> {
        on_both!(self, b => b.remove_all(routing))
    }
}

impl AnyNft {
    pub(crate) async fn observe(&mut self) -> ObservedGuard {
        let found: Result<_, BackendError> = on_both!(self, b => b.observe());
        found.unwrap()
    }
    pub(crate) async fn apply(&mut self, guard: &Guard) -> Result<(), BackendError> {
        on_both!(self, b => b.apply(guard))
    }
    pub(crate) async fn remove(&mut self) -> Result<(), BackendError> {
        on_both!(self, b => b.remove())
    }
}

pub(crate) struct Lab {
    pub(crate) kind: Kind,
    pub(crate) fake: Option<FakeHost>,
    pub(crate) wireguard: AnyWireguard,
    pub(crate) net: AnyNet,
    pub(crate) nft: AnyNft,
    pub(crate) routing: Routing,
    pub(crate) key: PrivateKey,
}

pub(crate) fn name() -> InterfaceName {
    "sennit0".parse().unwrap()
}

pub(crate) fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

pub(crate) fn nets(texts: &[&str]) -> BTreeSet<IpNet> {
    texts.iter().map(|text| net(text)).collect()
}

pub(crate) fn key(n: u8) -> PrivateKey {
    PrivateKey::from_bytes(&[n; 32]).unwrap()
}

/// Waits for a condition, at most ten seconds.
pub(crate) async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !condition().await {
        assert!(Instant::now() < deadline, "not within 10 s: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn is_stopped(process: Pid) -> bool {
    let threads = std::fs::read_dir(format!("/proc/{process}/task")).unwrap();
    threads.flatten().all(|thread| {
        let status = std::fs::read_to_string(thread.path().join("status")).unwrap_or_default();
        status.lines().any(|line| line.starts_with("State:") && line.contains("(stopped)"))
    })
}

/// A real WireGuard backend of an interface.
pub(crate) fn real(kind: Kind, interface: &str) -> Wireguard {
    real_with_key(kind, interface, None)
}

/// One that knows its node's key.
pub(crate) fn real_with_key(kind: Kind, interface: &str, own: Option<PublicKey>) -> Wireguard {
    let choice = if kind == Kind::Kernel { Choice::Kernel } else { Choice::Userspace };
    let config = UserspaceConfig { own, ..config(kind, interface, UserspaceConfig::UAPI_DIR) };
    Wireguard::choose(choice, config).unwrap()
}

pub(crate) fn config(kind: Kind, interface: &str, uapi_dir: &str) -> UserspaceConfig {
    UserspaceConfig {
        interface: interface.parse().unwrap(),
        binary: kind.program().map(|name| find(name).unwrap()).unwrap_or_default(),
        run_dir: "/run/sennit".into(),
        uapi_dir: uapi_dir.into(),
        own: None,
        external: false,
    }
}

impl Lab {
    pub(crate) fn new(kind: Kind) -> Self {
        let fake = (kind == Kind::Fake).then(FakeHost::new);
        let (wireguard, net, nft) = match &fake {
            Some(host) => (
                AnyWireguard::Fake(host.wireguard(name())),
                AnyNet::Fake(host.net()),
                AnyNft::Fake(host.nft()),
            ),
            None => (
                AnyWireguard::Real(real(kind, "sennit0")),
                AnyNet::Real(Netlink::new().unwrap()),
                AnyNft::Real(Nft::new()),
            ),
        };
        Self { kind, fake, wireguard, net, nft, routing: Routing::default(), key: key(1) }
    }

    /// What a restarted agent does: new objects on the same host.
    pub(crate) fn restart(&mut self) {
        match &self.fake {
            Some(host) => {
                self.wireguard = AnyWireguard::Fake(host.wireguard(name()));
                self.net = AnyNet::Fake(host.net());
                self.nft = AnyNft::Fake(host.nft());
            }
            None => {
                self.wireguard = AnyWireguard::Real(real(self.kind, "sennit0"));
                self.net = AnyNet::Real(Netlink::new().unwrap());
                self.nft = AnyNft::Real(Nft::new());
            }
        }
    }

    pub(crate) async fn device(&mut self) -> ObservedDevice {
        self.wireguard.observe().await.unwrap().unwrap()
    }

    pub(crate) async fn peer(&mut self, key: &PublicKey) -> ObservedPeer {
        self.device().await.peers[key].clone()
    }

    pub(crate) async fn change(&mut self, change: DeviceChange) -> Result<(), BackendError> {
        self.wireguard.apply(&change, &self.key).await
    }

    pub(crate) async fn set_peer(&mut self, n: u8, new: bool, allowed: Option<&[&str]>) {
        let change = DeviceChange::SetPeer {
            key: key(n).public(),
            new,
            endpoint: None,
            allowed_ips: allowed.map(nets),
            keepalive: None,
        };
        self.change(change).await.unwrap();
    }

    pub(crate) async fn observe_net(&mut self) -> ObservedNet {
        let routing = self.routing;
        self.net.observe(&routing).await
    }

    pub(crate) async fn route(&mut self, change: RouteChange) -> Result<(), BackendError> {
        let routing = self.routing;
        self.net.apply_route(&routing, &change).await
    }

    /// Device, link and routes as a plan would have them.
    pub(crate) fn plan(&self) -> (DeviceConfig, LinkConfig, RouteTable, Guard) {
        let peer = |n: u8| DevicePeer {
            candidates: vec![SocketAddr::from(([192, 0, 2, n], 51820))],
            chosen: None,
            probed: BTreeSet::new(),
            allowed_ips: nets(&[&format!("10.{n}.0.0/24"), &format!("fd00:{n}::/64")]),
            keepalive: Some(25),
        };
        let device = DeviceConfig {
            listen_port: 51820,
            peers: BTreeMap::from([(key(2).public(), peer(2)), (key(3).public(), peer(3))]),
        };
        let link = LinkConfig { name: name(), mtu: 1380, addresses: nets(&["10.1.0.1/32", "fd00:1::1/128"]) };
        let mut routes = BTreeSet::from([
            Route::new(net("10.1.0.0/24"), RouteKind::Throw),
            Route::new(net("fd00:1::/64"), RouteKind::Throw),
        ]);
        for to in device.peers.values().flat_map(|peer| peer.allowed_ips.iter()) {
            routes.insert(Route::new(*to, RouteKind::Mesh { mtu: 1380 }));
            routes.insert(Route::new(*to, RouteKind::Blackhole));
        }
        let table = RouteTable {
            routing: self.routing,
            interface: name(),
            routes,
            own: nets(&["10.1.0.0/24", "fd00:1::/64"]),
        };
        let guard = Guard {
            mesh: nets(&["10.2.0.0/24", "10.3.0.0/24", "fd00:2::/64", "fd00:3::/64"]),
            local: nets(&["10.1.0.0/24", "fd00:1::/64"]),
            outside: nets(&["10.2.0.9/32"]),
            interfaces: BTreeSet::from([name()]),
            pod_kinds: ["bridge", "veth"].map(str::to_owned).into(),
            underlay: BTreeSet::from([4_000]),
            carriers: Some(Carriers {
                interfaces: BTreeSet::from(["sennitx4".parse().unwrap(), "sennitx6".parse().unwrap()]),
                prefix: "fd53:1:2::/63".parse().unwrap(),
                port: 51820,
            }),
            cleartext: None,
        };
        (device, link, table, guard)
    }

    /// One pass of a reconcile loop. Returns how many changes it applied.
    pub(crate) async fn pass(&mut self) -> usize {
        let (device, link, table, guard) = self.plan();
        let mut count = 0;
        if self.nft.observe().await.fingerprint != Some(guard.fingerprint()) {
            self.nft.apply(&guard).await.unwrap();
            count += 1;
        }
        count += usize::from(self.wireguard.ensure().await.unwrap() == Ensured::Created);
        let found = self.device().await;
        let own = self.key.public();
        for change in device.diff(&found, &own, true, &mut Dialer::default(), SystemTime::now()) {
            self.change(change).await.unwrap();
            count += 1;
        }
        let found = self.observe_net().await;
        for change in link.diff(&found.link.unwrap()) {
            self.net.apply_link(&change).await.unwrap();
            count += 1;
        }
        for change in table.diff(&found.routes, true) {
            self.route(change).await.unwrap();
            count += 1;
        }
        count
    }

    /// Makes the device, gives it its key and brings its link up.
    pub(crate) async fn start(&mut self) {
        assert_eq!(self.wireguard.ensure().await, Ok(Ensured::Created));
        self.change(DeviceChange::SetPrivateKey).await.unwrap();
        self.net.apply_link(&LinkChange::SetUp).await.unwrap();
    }

    /// The process of the device.
    pub(crate) fn device_process(&self) -> Pid {
        let program = self.kind.program().unwrap();
        let short: String = program.chars().take(15).collect();
        let mut found = std::fs::read_dir("/proc").unwrap().filter_map(|entry| {
            let pid: i32 = entry.unwrap().file_name().to_str()?.parse().ok()?;
            let read =
                |file: &str| std::fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
            let dead = read("stat").contains(") Z ");
            (read("comm").trim_end() == short && !dead && read("cmdline").contains("sennit0")).then_some(pid)
        });
        Pid::from_raw(found.next().expect("no process of the device"))
    }

    pub(crate) fn kill_device(&self) {
        match &self.fake {
            Some(host) => host.kill_device(),
            None => kill(self.device_process(), Signal::SIGKILL).unwrap(),
        }
    }

    pub(crate) fn wedge_device(&self) {
        match &self.fake {
            Some(host) => host.with(|host| host.wedged = true),
            None => {
                let process = self.device_process();
                kill(process, Signal::SIGSTOP).unwrap();
                // One of its threads may be about to answer still.
                let deadline = Instant::now() + Duration::from_secs(10);
                while !is_stopped(process) {
                    assert!(Instant::now() < deadline, "{process} does not stop");
                    std::thread::yield_now();
                }
            }
        }
    }

    /// It goes on where it stood.
    pub(crate) fn resume_device(&self) {
        match &self.fake {
            Some(host) => host.with(|host| host.wedged = false),
            None => kill(self.device_process(), Signal::SIGCONT).unwrap(),
        }
    }

    /// Has a process hold a UDP port.
    pub(crate) fn occupy(&self, port: u16) -> Option<UdpSocket> {
        match &self.fake {
            Some(host) => {
                host.with(|host| host.ports_in_use.insert(port));
                None
            }
            None => Some(UdpSocket::bind(("0.0.0.0", port)).unwrap()),
        }
    }

    /// Peer 2 becomes a real device in this namespace that dials ours and completes a handshake. Returns where it
    /// dials from.
    pub(crate) async fn handshake(&mut self, port: u16) -> SocketAddr {
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let peer = key(2).public();
        match &self.fake {
            Some(host) => host.with(|host| {
                let peer = host.device.as_mut().unwrap().peers.get_mut(&peer).unwrap();
                peer.endpoint = Some(address);
                peer.last_handshake = Some(SystemTime::now());
                (peer.rx_bytes, peer.tx_bytes) = (148, 92);
            }),
            None => {
                let own_port = self.device().await.listen_port;
                let mut other = real(self.kind, "other0");
                let secret = key(2);
                other.ensure().await.unwrap();
                let dial = DeviceChange::SetPeer {
                    key: self.key.public(),
                    new: true,
                    endpoint: Some(SocketAddr::from(([127, 0, 0, 1], own_port))),
                    allowed_ips: Some(nets(&["10.1.0.0/24"])),
                    keepalive: Some(1),
                };
                for change in [DeviceChange::SetPrivateKey, DeviceChange::SetListenPort(port)] {
                    other.apply(&change, &secret).await.unwrap();
                }
                sh("ip link set other0 up");
                other.apply(&dial, &secret).await.unwrap();
                eventually("a handshake", async || {
                    let found = self.peer(&peer).await;
                    found.last_handshake.is_some() && found.rx_bytes > 0
                })
                .await;
            }
        }
        address
    }
}
