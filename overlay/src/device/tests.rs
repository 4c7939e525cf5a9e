use super::*;
use mesh_keyring::PrivateKey;
use proptest::prelude::*;

fn key(n: u8) -> PublicKey {
    PrivateKey::from_bytes(&[n; 32]).unwrap().public()
}

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000)
}

fn wanted(nets: &[&str]) -> DevicePeer {
    DevicePeer {
        candidates: vec![SocketAddr::from(([192, 0, 2, 1], 51820))],
        chosen: None,
        probed: BTreeSet::new(),
        allowed_ips: nets.iter().map(|n| n.parse().unwrap()).collect(),
        keepalive: Some(25),
    }
}

fn config(peers: &[(u8, DevicePeer)]) -> DeviceConfig {
    DeviceConfig { listen_port: 51820, peers: peers.iter().map(|(n, p)| (key(*n), p.clone())).collect() }
}

/// What a device does with a change; the behaviour of the real ones is checked by the backends' suite.
fn apply(device: &mut ObservedDevice, change: &DeviceChange, own: PublicKey) {
    match change {
        DeviceChange::SetPrivateKey => device.public_key = Some(own),
        DeviceChange::SetListenPort(port) => device.listen_port = *port,
        DeviceChange::RemovePeer(key) => {
            device.peers.remove(key);
        }
        DeviceChange::SetPeer { key, endpoint, allowed_ips, keepalive, .. } => {
            if let Some(nets) = allowed_ips {
                for (_, other) in device.peers.iter_mut().filter(|(k, _)| *k != key) {
                    other.allowed_ips.retain(|n| !nets.contains(n));
                }
            }
            let peer = device.peers.entry(*key).or_default();
            peer.endpoint = endpoint.or(peer.endpoint);
            if let Some(nets) = allowed_ips {
                peer.allowed_ips = nets.clone();
            }
            if let Some(seconds) = keepalive {
                peer.keepalive = (*seconds > 0).then_some(*seconds);
            }
        }
    }
}

fn settle(config: &DeviceConfig, device: &mut ObservedDevice) -> usize {
    let changes = config.diff(device, &key(1), true, &mut Dialer::default(), now());
    changes.iter().for_each(|change| apply(device, change, key(1)));
    changes.len()
}

#[test]
fn a_second_pass_changes_nothing() {
    let config = config(&[(2, wanted(&["10.2.0.0/24"])), (3, wanted(&["10.3.0.0/24"]))]);
    let mut device = ObservedDevice::default();
    assert_eq!(settle(&config, &mut device), 4);
    assert_eq!(settle(&config, &mut device), 0);
}

#[test]
fn adding_a_peer_touches_no_other() {
    let mut device = ObservedDevice::default();
    settle(&config(&[(2, wanted(&["10.2.0.0/24"]))]), &mut device);
    let both = config(&[(2, wanted(&["10.2.0.0/24"])), (3, wanted(&["10.3.0.0/24"]))]);
    let changes = both.diff(&device, &key(1), true, &mut Dialer::default(), now());
    assert!(matches!(changes.as_slice(), [DeviceChange::SetPeer { key: k, new: true, .. }] if *k == key(3)));
}

#[test]
fn without_pruning_a_peer_that_is_not_wanted_stays() {
    let mut device = ObservedDevice::default();
    settle(&config(&[(2, wanted(&["10.2.0.0/24"]))]), &mut device);
    let changes = config(&[]).diff(&device, &key(1), false, &mut Dialer::default(), now());
    assert_eq!(changes, []);
}

#[test]
fn a_revoked_peer_is_removed_before_anybody_takes_its_prefix() {
    let mut device = ObservedDevice::default();
    settle(&config(&[(2, wanted(&["10.2.0.0/24"]))]), &mut device);
    let moved = config(&[(3, wanted(&["10.2.0.0/24"]))]);
    let changes = moved.diff(&device, &key(1), true, &mut Dialer::default(), now());
    assert_eq!(changes[0], DeviceChange::RemovePeer(key(2)));
    settle(&moved, &mut device);
    assert_eq!(settle(&moved, &mut device), 0);
}

proptest! {
    #[test]
    fn any_device_reaches_its_configuration(
        before in prop::collection::btree_map(2u8..8, (0u8..20, any::<bool>()), 0..5),
        after in prop::collection::btree_map(2u8..8, (0u8..20, any::<bool>()), 0..5),
    ) {
        let build = |peers: &std::collections::BTreeMap<u8, (u8, bool)>| {
            let mut taken = BTreeSet::new();
            let all: Vec<_> = peers
                .iter()
                .map(|(n, (net, keepalive))| {
                    let nets: Vec<String> = taken.insert(*net).then(|| format!("10.0.{net}.0/24")).into_iter().collect();
                    let mut peer = wanted(&nets.iter().map(String::as_str).collect::<Vec<_>>());
                    peer.keepalive = keepalive.then_some(25);
                    (*n, peer)
                })
                .collect();
            config(&all)
        };
        let mut device = ObservedDevice::default();
        settle(&build(&before), &mut device);
        let target = build(&after);
        // A prefix that moves between peers may take a second pass, never a third.
        settle(&target, &mut device);
        settle(&target, &mut device);
        prop_assert_eq!(settle(&target, &mut device), 0);
    }
}
