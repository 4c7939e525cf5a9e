//! What every WireGuard backend does.

use std::time::{Duration, Instant, SystemTime};

use mesh_overlay::backend::{BackendError, Ensured, WireguardBackend as _};
use mesh_overlay::dial::Dialer;
use mesh_overlay::wireguard::{Choice, Kernel, Userspace, UserspaceConfig, Wireguard};
use mesh_overlay::{DeviceChange, DeviceConfig, DevicePeer};

use crate::lab::{AnyWireguard, Kind, Lab, config, eventually, key, name, net, nets, real, real_with_key};
use crate::namespace::sh;

pub(crate) async fn a_second_pass_writes_nothing(mut lab: Lab) {
    assert!(lab.pass().await > 10);
    if let Some(host) = &lab.fake {
        assert!(!host.take_writes().is_empty());
    }
    let before = (lab.device().await, lab.observe_net().await);
    assert_eq!(lab.pass().await, 0);
    assert_eq!((lab.device().await, lab.observe_net().await), before);
    if let Some(host) = &lab.fake {
        assert_eq!(host.take_writes(), []);
    }
}

pub(crate) async fn a_restarted_agent_adopts_what_it_finds(mut lab: Lab) {
    lab.pass().await;
    lab.restart();
    assert_eq!(lab.wireguard.ensure().await, Ok(Ensured::Adopted));
    assert_eq!(lab.pass().await, 0);
}

pub(crate) async fn adding_a_peer_touches_no_other(mut lab: Lab) {
    lab.start().await;
    lab.change(DeviceChange::SetListenPort(51820)).await.unwrap();
    lab.set_peer(2, true, Some(&["10.2.0.0/24"])).await;
    lab.handshake(51821).await;
    let before = lab.peer(&key(2).public()).await;
    lab.set_peer(3, true, Some(&["10.3.0.0/24"])).await;
    let after = lab.peer(&key(2).public()).await;
    assert_eq!(lab.device().await.peers.len(), 2);
    assert_eq!(after.last_handshake, before.last_handshake);
    assert_eq!((after.endpoint, &after.allowed_ips), (before.endpoint, &before.allowed_ips));
    assert!(after.rx_bytes >= before.rx_bytes && after.tx_bytes >= before.tx_bytes, "{after:?}");
}

pub(crate) async fn a_removed_peer_is_gone(mut lab: Lab) {
    lab.start().await;
    lab.set_peer(2, true, Some(&["10.2.0.0/24"])).await;
    lab.set_peer(3, true, Some(&["10.3.0.0/24"])).await;
    lab.change(DeviceChange::RemovePeer(key(2).public())).await.unwrap();
    let peers = lab.device().await.peers;
    assert_eq!(peers.keys().copied().collect::<Vec<_>>(), [key(3).public()]);
    // A change to a peer that went meanwhile never makes it anew.
    lab.set_peer(2, false, Some(&["10.2.0.0/24"])).await;
    assert_eq!(lab.device().await.peers.len(), 1);
}

pub(crate) async fn an_allowed_ip_moves_to_the_peer_that_is_given_it(mut lab: Lab) {
    lab.start().await;
    lab.set_peer(2, true, Some(&["10.2.0.0/24", "10.4.0.0/24"])).await;
    lab.set_peer(3, true, Some(&["10.3.0.0/24", "10.4.0.0/24"])).await;
    assert_eq!(lab.peer(&key(2).public()).await.allowed_ips, nets(&["10.2.0.0/24"]));
    assert_eq!(lab.peer(&key(3).public()).await.allowed_ips, nets(&["10.3.0.0/24", "10.4.0.0/24"]));
    // A set replaces: what is not in it is gone.
    lab.set_peer(3, false, Some(&["10.4.0.0/24"])).await;
    assert_eq!(lab.peer(&key(3).public()).await.allowed_ips, nets(&["10.4.0.0/24"]));
}

pub(crate) async fn a_roamed_endpoint_is_left_alone(mut lab: Lab) {
    lab.start().await;
    lab.change(DeviceChange::SetListenPort(51820)).await.unwrap();
    let published = "192.0.2.9:51820".parse().unwrap();
    let peer = DevicePeer {
        candidates: vec![published],
        chosen: None,
        probed: Default::default(),
        allowed_ips: nets(&["10.2.0.0/24"]),
        keepalive: None,
    };
    let mut config = DeviceConfig { listen_port: 51820, peers: [(key(2).public(), peer)].into() };
    let own = lab.key.public();
    for change in config.diff(&lab.device().await, &own, true, &mut Dialer::default(), SystemTime::now()) {
        lab.change(change).await.unwrap();
    }
    assert_eq!(lab.peer(&key(2).public()).await.endpoint, Some(published));
    let roamed = lab.handshake(51821).await;
    assert_eq!(lab.peer(&key(2).public()).await.endpoint, Some(roamed));
    config.peers.get_mut(&key(2).public()).unwrap().allowed_ips.insert(net("10.5.0.0/24"));
    let changes = config.diff(&lab.device().await, &own, true, &mut Dialer::default(), SystemTime::now());
    assert_eq!(changes.len(), 1, "{changes:?}");
    for change in changes {
        lab.change(change).await.unwrap();
    }
    let found = lab.peer(&key(2).public()).await;
    assert_eq!(found.endpoint, Some(roamed));
    assert!(found.last_handshake.is_some() && found.allowed_ips.len() == 2, "{found:?}");
}

pub(crate) async fn keepalive_zero_ends_it(mut lab: Lab) {
    lab.start().await;
    lab.set_peer(2, true, Some(&["10.2.0.0/24"])).await;
    let keepalive = |seconds| DeviceChange::SetPeer {
        key: key(2).public(),
        new: false,
        endpoint: None,
        allowed_ips: None,
        keepalive: Some(seconds),
    };
    lab.change(keepalive(25)).await.unwrap();
    assert_eq!(lab.peer(&key(2).public()).await.keepalive, Some(25));
    lab.change(keepalive(0)).await.unwrap();
    let found = lab.peer(&key(2).public()).await;
    assert_eq!((found.keepalive, found.allowed_ips), (None, nets(&["10.2.0.0/24"])));
}

pub(crate) async fn a_wedged_device_is_replaced(mut lab: Lab) {
    if lab.kind == Kind::Kernel {
        // The kernel has no process that could hang.
        return;
    }
    lab.pass().await;
    lab.wedge_device();
    // Its threads stop one after the other.
    eventually("no answer", async || {
        matches!(lab.wireguard.observe().await, Err(BackendError::Failed { .. }))
    })
    .await;
    let begun = Instant::now();
    let told = lab.wireguard.ensure().await.unwrap_err().to_string();
    assert!(told.contains("it will be replaced"), "{told}");
    eventually("a replacement", async || lab.wireguard.ensure().await == Ok(Ensured::Created)).await;
    // Of the six seconds the observation before may have taken the first two.
    assert!(lab.fake.is_some() || begun.elapsed() > Duration::from_millis(3_500), "{:?}", begun.elapsed());
    assert!(lab.pass().await > 0);
    assert_eq!(lab.pass().await, 0);
}

pub(crate) async fn a_device_that_stalls_a_moment_is_kept(mut lab: Lab) {
    if lab.kind.program().is_none() {
        // Only a process has moments.
        return;
    }
    lab.pass().await;
    let process = lab.device_process();
    let begun = Instant::now();
    // Longer than the patience in all, but with an answer in between.
    for _ in 0..2 {
        lab.wedge_device();
        eventually("no answer", async || lab.wireguard.observe().await.is_err()).await;
        assert!(lab.wireguard.ensure().await.is_err());
        lab.resume_device();
        assert_eq!(lab.wireguard.ensure().await, Ok(Ensured::Adopted));
    }
    assert!(begun.elapsed() > Duration::from_secs(6), "{:?}", begun.elapsed());
    assert_eq!(lab.device_process(), process);
    assert_eq!(lab.pass().await, 0);
}

pub(crate) async fn a_living_device_that_hangs_up_is_kept_a_while(mut lab: Lab) {
    if lab.kind.program().is_none() {
        return;
    }
    lab.pass().await;
    let process = lab.device_process();
    // Its own socket it would miss, and end.
    std::fs::create_dir("/run/other").unwrap();
    let listener = tokio::net::UnixListener::bind("/run/other/sennit0.sock").unwrap();
    let hang_up = tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            drop(stream);
        }
    });
    let mut asked_there = Userspace::new(config(lab.kind, "sennit0", "/run/other")).unwrap();
    let told = asked_there.ensure().await.unwrap_err().to_string();
    assert!(told.contains("it will be replaced"), "{told}");
    assert!(asked_there.observe().await.is_err());
    assert_eq!(lab.device_process(), process);
    assert_eq!(lab.pass().await, 0);
    // In the end it is, and the new one is another.
    let end = async || !matches!(asked_there.ensure().await, Err(BackendError::Failed { .. }));
    eventually("its end", end).await;
    hang_up.abort();
    assert_eq!(lab.wireguard.ensure().await, Ok(Ensured::Adopted));
    assert_ne!(lab.device_process(), process);
}

pub(crate) async fn a_device_without_our_mark_is_ours_by_its_key_alone(mut lab: Lab) {
    if lab.fake.is_some() {
        return;
    }
    let marked = || sh("ip link show sennit0").contains("alias sennit");
    let unmark = || drop(sh("ip link set sennit0 alias ''"));
    assert_eq!(lab.wireguard.ensure().await, Ok(Ensured::Created));
    assert!(marked(), "marked from the start");
    // Nobody misses an empty one.
    unmark();
    assert_eq!(lab.wireguard.ensure().await, Ok(Ensured::Adopted));
    assert!(marked());
    lab.change(DeviceChange::SetPrivateKey).await.unwrap();
    unmark();
    let kind = lab.kind;
    for own in [None, Some(key(9).public())] {
        let mut other = AnyWireguard::Real(real_with_key(kind, "sennit0", own));
        assert!(matches!(other.ensure().await, Err(BackendError::ForeignInterface { .. })), "{own:?}");
        assert_eq!(other.observe().await, Ok(None));
        other.remove().await.unwrap();
        assert!(!marked(), "{own:?}");
    }
    let mut ours = AnyWireguard::Real(real_with_key(kind, "sennit0", Some(lab.key.public())));
    assert_eq!(ours.ensure().await, Ok(Ensured::Adopted));
    assert!(marked());
    // By its mark anybody of us may remove it.
    lab.wireguard.remove().await.unwrap();
    assert_eq!(lab.observe_net().await.link, None);
}

pub(crate) async fn what_remains_of_the_other_kind_is_no_success(lab: Lab) {
    let kernel = Kernel::new(name(), None).unwrap();
    for (kind, made, mut backend) in [
        ("tun", "ip tuntap add dev sennit0 mode tun", Wireguard::Kernel(kernel)),
        ("bridge", "ip link add sennit0 type bridge", real(lab.kind, "sennit0")),
    ] {
        sh(made);
        // Somebody else's is none of our business.
        backend.remove().await.unwrap();
        sh("ip link set sennit0 alias sennit");
        let told = backend.remove().await.unwrap_err().to_string();
        assert!(told.contains(kind) && told.contains("sennit0"), "{told}");
        sh("ip link del sennit0");
        backend.remove().await.unwrap();
    }
}

pub(crate) async fn a_device_that_somebody_else_runs_is_waited_for_and_left_to_them(mut lab: Lab) {
    let config = UserspaceConfig { external: true, ..config(lab.kind, "sennit0", UserspaceConfig::UAPI_DIR) };
    let mut external = Wireguard::choose(Choice::Userspace, config).unwrap();
    let awaited = |told: Result<Ensured, BackendError>| {
        let told = told.unwrap_err().to_string();
        assert!(told.contains("waiting for sennit0") && told.contains("sennit-device"), "{told}");
    };
    awaited(external.ensure().await);
    external.remove().await.unwrap();
    // Somebody starts it.
    assert_eq!(lab.wireguard.ensure().await, Ok(Ensured::Created));
    let process = lab.device_process();
    assert_eq!(external.ensure().await, Ok(Ensured::Adopted));
    let told = external.remove().await.unwrap_err().to_string();
    assert!(told.contains("its process is not ours"), "{told}");
    lab.wedge_device();
    awaited(external.ensure().await);
    assert_eq!(lab.device_process(), process, "it is still there");
    lab.kill_device();
    eventually("the device is gone", async || lab.observe_net().await.link.is_none()).await;
    awaited(external.ensure().await);
}

pub(crate) async fn a_dead_device_is_made_again(mut lab: Lab) {
    if lab.kind == Kind::Kernel {
        sh("ip link del sennit0 2>/dev/null || true");
    }
    lab.pass().await;
    match lab.kind {
        Kind::Kernel => drop(sh("ip link del sennit0")),
        _ => lab.kill_device(),
    }
    // Without waiting: a process that is just dying is nobody else's.
    assert_eq!(lab.wireguard.ensure().await, Ok(Ensured::Created));
    assert!(lab.pass().await > 0);
    assert_eq!(lab.pass().await, 0);
}

pub(crate) async fn a_device_whose_link_was_deleted_is_made_again(mut lab: Lab) {
    lab.pass().await;
    match &lab.fake {
        Some(host) => host.kill_device(),
        None => drop(sh("ip link del sennit0")),
    }
    assert_eq!(lab.wireguard.ensure().await, Ok(Ensured::Created));
    lab.pass().await;
    assert_eq!(lab.pass().await, 0);
}

pub(crate) async fn a_foreign_interface_is_refused_and_left_alone(mut lab: Lab) {
    let kinds = match &lab.fake {
        Some(_) => ["bridge", "veth", "dummy"],
        None => ["bridge", "veth", "tun"],
    };
    for kind in kinds {
        let show = || sh("ip -d link show sennit0");
        let before = match &lab.fake {
            Some(host) => {
                host.make_foreign_link(kind);
                String::new()
            }
            None if kind == "tun" => {
                // One that outlives its process, so that it is nobody's.
                sh("ip tuntap add dev sennit0 mode tun");
                show()
            }
            None => {
                sh(&format!("ip link add sennit0 type {kind}"));
                show()
            }
        };
        let refused = lab.wireguard.ensure().await;
        let Err(BackendError::ForeignInterface { name, .. }) = &refused else {
            panic!("{kind}: {refused:?}")
        };
        assert_eq!(name, "sennit0");
        assert_eq!(lab.wireguard.observe().await, Ok(None), "{kind}");
        let _ = lab.wireguard.remove().await;
        match &lab.fake {
            Some(host) => assert_eq!(host.with(|host| host.net.link.clone()).unwrap().kind.unwrap(), kind),
            None => {
                assert_eq!(show(), before, "{kind}");
                sh("ip link del sennit0");
            }
        }
    }
}

pub(crate) async fn a_port_that_the_device_before_still_holds_is_waited_for(mut lab: Lab) {
    // As a process that dies does, which gives back its TUN first.
    let held = std::net::UdpSocket::bind(("0.0.0.0", 51820)).unwrap();
    assert_eq!(lab.wireguard.ensure().await, Ok(Ensured::Created));
    lab.change(DeviceChange::SetPrivateKey).await.unwrap();
    let dying = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(200));
        drop(held);
    });
    lab.change(DeviceChange::SetListenPort(51820)).await.unwrap();
    dying.join().unwrap();
}

pub(crate) async fn a_taken_port_is_named(mut lab: Lab) {
    lab.start().await;
    lab.change(DeviceChange::SetListenPort(51820)).await.unwrap();
    let held = lab.occupy(51999);
    assert_eq!(lab.change(DeviceChange::SetListenPort(51999)).await, Err(BackendError::PortTaken(51999)));
    drop(held);
}

pub(crate) async fn removing_takes_the_device_and_its_routes(mut lab: Lab) {
    lab.pass().await;
    lab.wireguard.remove().await.unwrap();
    assert_eq!(lab.wireguard.observe().await, Ok(None));
    assert_eq!(lab.observe_net().await.link, None);
    lab.wireguard.remove().await.unwrap();
    if lab.fake.is_none() {
        eventually("no socket", async || !std::path::Path::new("/run/wireguard/sennit0.sock").exists()).await;
    }
}

pub(crate) async fn a_thousand_peers_are_set_in_time(mut lab: Lab) {
    lab.start().await;
    let peers = (0..1000_u16).map(|n| {
        let [high, low] = n.to_be_bytes();
        let mut bytes = [7; 32];
        (bytes[1], bytes[2]) = (high, low);
        let public = mesh_keyring::PrivateKey::from_bytes(&bytes).unwrap().public();
        let peer = DevicePeer {
            candidates: vec![format!("192.0.2.1:{}", 10_000 + n).parse().unwrap()],
            chosen: None,
            probed: Default::default(),
            allowed_ips: nets(&[&format!("10.{high}.{low}.0/24"), &format!("fd00:{n:x}::/64")]),
            keepalive: None,
        };
        (public, peer)
    });
    let config = DeviceConfig { listen_port: 51820, peers: peers.collect() };
    let own = lab.key.public();
    let begun = Instant::now();
    for change in config.diff(&lab.device().await, &own, true, &mut Dialer::default(), SystemTime::now()) {
        lab.change(change).await.unwrap();
    }
    let found = lab.device().await;
    let taken = begun.elapsed();
    eprintln!("1,000 peers on {:?}: {taken:?}", lab.kind);
    assert!(taken < Duration::from_secs(20), "{taken:?}");
    assert_eq!(config.diff(&found, &own, true, &mut Dialer::default(), SystemTime::now()), []);
}
