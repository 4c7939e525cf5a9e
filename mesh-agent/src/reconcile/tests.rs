use std::time::Instant;

use mesh_overlay::fake::{FakeHost, FakeNet, FakeNft, FakeWireguard, Write};
use mesh_overlay::link::{LinkChange, ObservedUnderlay};
use mesh_overlay::{Advertisement, NodeRecord, RouteChange, RouteKind};

use super::*;
use crate::agent::Agent;
use crate::config::Config;
use crate::registry::Snapshot;
use crate::state::LastGood;

fn key(n: u8) -> PrivateKey {
    PrivateKey::from_bytes(&[n; 32]).unwrap()
}

fn record(name: &str, key_of: u8, cidr: &str) -> NodeRecord {
    let claim = Advertisement {
        public_key: key(key_of).public(),
        epoch: 1,
        site: "gcp".parse().unwrap(),
        endpoints: vec![format!("192.0.2.{key_of}:51820").parse().unwrap()],
        internal_endpoints: Vec::new(),
        mtu: None,
        reflexive_endpoints: Vec::new(),
        paths: Default::default(),
        encrypts: true,
    };
    NodeRecord {
        name: name.parse().unwrap(),
        site_label: None,
        pod_cidrs: vec![cidr.to_owned()],
        annotations: if key_of == 1 { BTreeMap::new() } else { claim.to_annotations() },
    }
}

/// Desired by a node whose publication stands in the registry.
fn desired(peers: &[(&str, u8, &str)]) -> Desired {
    let text = "node: me\nsite: aws\nmesh: test\nregistry: {file: {dir: /r}}\n";
    let config = Config::parse("test", text, None).unwrap();
    let mut agent = Agent::new(config, key(1).public(), 1, LastGood::default());
    agent.underlay(ObservedUnderlay { forwarding: (true, true), ..ObservedUnderlay::default() });
    let mut nodes = vec![record("me", 1, "10.1.1.0/24")];
    nodes.extend(peers.iter().map(|(name, key, cidr)| record(name, *key, cidr)));
    let now = Instant::now();
    agent.snapshot(Snapshot { nodes, ..Snapshot::default() }, now).unwrap();
    Desired { announced: true, ..agent.desired(now) }
}

fn two() -> Desired {
    desired(&[("a", 2, "10.2.1.0/24"), ("b", 3, "10.2.2.0/24")])
}

type Fakes = Reconciler<FakeWireguard, FakeNet, FakeNft>;

fn host() -> (FakeHost, Fakes) {
    let host = FakeHost::new();
    let fakes = reconciler(&host);
    (host, fakes)
}

fn reconciler(host: &FakeHost) -> Fakes {
    Reconciler::new(host.wireguard("sennit0".parse().unwrap()), host.net(), host.nft(), key(1))
}

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000)
}

#[tokio::test]
async fn the_guard_and_the_blackholes_stand_before_any_link_comes_up() {
    let (host, mut reconciler) = host();
    let pass = reconciler.pass(&two(), now()).await;
    assert_eq!(pass.errors, []);
    let writes = host.take_writes();
    let at = |wanted: &dyn Fn(&Write) -> bool| writes.iter().position(wanted).expect("was not written");
    let guard = at(&|w| matches!(w, Write::Guard(_)));
    let last_hole = writes
        .iter()
        .rposition(|w| matches!(w, Write::Route(RouteChange::Set(r)) if r.kind == RouteKind::Blackhole))
        .unwrap();
    let device = at(&|w| matches!(w, Write::CreateDevice));
    let up = at(&|w| matches!(w, Write::Link(LinkChange::SetUp)));
    let mesh =
        at(&|w| matches!(w, Write::Route(RouteChange::Set(r)) if matches!(r.kind, RouteKind::Mesh { .. })));
    assert!(guard < last_hole && last_hole < device && device < up && up < mesh, "{writes:?}");
}

#[tokio::test]
async fn a_new_device_dials_nobody_before_others_can_know_its_key() {
    let (host, mut reconciler) = host();
    let unknown = Desired { announced: false, ..two() };
    assert_eq!(reconciler.pass(&unknown, now()).await.device.unwrap().peers.len(), 0);
    assert_eq!(host.with(|h| h.device.as_ref().unwrap().listen_port), 51820, "it listens all the same");
    assert_eq!(reconciler.pass(&two(), now()).await.device.unwrap().peers.len(), 2);
    assert_eq!(reconciler.pass(&unknown, now()).await.changes, 0, "a standing device keeps its peers");
}

#[tokio::test]
async fn a_second_pass_writes_nothing() {
    let (host, mut reconciler) = host();
    assert!(reconciler.pass(&two(), now()).await.changes > 0);
    host.take_writes();
    for _ in 0..3 {
        assert_eq!(reconciler.pass(&two(), now()).await.changes, 0);
        assert_eq!(host.take_writes(), []);
    }
}

#[tokio::test]
async fn a_restarted_agent_adopts_what_stands_and_writes_nothing() {
    let (host, mut first) = host();
    first.pass(&two(), now()).await;
    host.take_writes();
    let pass = reconciler(&host).pass(&two(), now()).await;
    assert_eq!((pass.changes, host.take_writes()), (0, vec![]));
}

#[tokio::test]
async fn without_a_guard_nothing_is_brought_up() {
    let (host, mut reconciler) = host();
    host.with(|h| h.nft_error = Some(BackendError::failed("nft", "no such program")));
    let pass = reconciler.pass(&two(), now()).await;
    assert_eq!(pass.errors.len(), 1);
    assert_eq!(host.take_writes(), [], "a mesh that cannot be guarded is not brought up");
    host.with(|h| h.nft_error = None);
    assert_eq!(reconciler.pass(&two(), now()).await.errors, []);
}

#[tokio::test]
async fn without_blackholes_no_device_is_made() {
    let (host, mut reconciler) = host();
    host.with(|h| h.net_error = Some(BackendError::failed("route", "no")));
    assert!(!reconciler.pass(&two(), now()).await.errors.is_empty());
    assert!(!host.take_writes().contains(&Write::CreateDevice));
}

#[tokio::test]
async fn a_dead_device_is_made_anew_with_all_its_peers() {
    let (host, mut reconciler) = host();
    reconciler.pass(&two(), now()).await;
    host.kill_device();
    host.take_writes();
    let pass = reconciler.pass(&two(), now()).await;
    assert!(pass.created);
    assert_eq!(pass.device.unwrap().peers.len(), 2);
    assert!(
        !host.take_writes().iter().any(|w| matches!(w, Write::Guard(_))),
        "the guard stood all the while"
    );
    assert_eq!(reconciler.pass(&two(), now()).await.changes, 0);
}

#[tokio::test]
async fn a_revoked_peer_loses_its_device_entry_and_routes_and_no_other_is_touched() {
    let (host, mut reconciler) = host();
    reconciler.pass(&two(), now()).await;
    host.take_writes();
    reconciler.pass(&desired(&[("a", 2, "10.2.1.0/24")]), now()).await;
    let writes = host.take_writes();
    let kept = key(2).public();
    assert!(writes.contains(&Write::Device(DeviceChange::RemovePeer(key(3).public()))));
    assert!(
        !writes.iter().any(|w| matches!(w, Write::Device(DeviceChange::SetPeer { key, .. }) if *key == kept))
    );
    assert!(
        writes
            .iter()
            .any(|w| matches!(w, Write::Route(RouteChange::Remove(r)) if r.to.to_string() == "10.2.2.0/24"))
    );
}

#[tokio::test]
async fn a_taken_port_is_named_and_the_peers_are_set_all_the_same() {
    let (host, mut reconciler) = host();
    host.with(|h| h.ports_in_use.insert(51820));
    let pass = reconciler.pass(&two(), now()).await;
    assert_eq!(pass.errors, [BackendError::PortTaken(51820)]);
    assert_eq!(host.with(|h| h.device.as_ref().map(|d| d.peers.len())), Some(2));
    host.with(|h| h.ports_in_use.clear());
    assert_eq!(reconciler.pass(&two(), now()).await.errors, []);
}

#[tokio::test]
async fn an_interface_that_is_not_ours_is_left_alone() {
    let (host, mut reconciler) = host();
    host.make_foreign_link("bridge");
    let pass = reconciler.pass(&two(), now()).await;
    assert!(matches!(pass.errors.as_slice(), [BackendError::ForeignInterface { .. }]), "{:?}", pass.errors);
    let writes = host.take_writes();
    assert!(
        !writes.iter().any(|w| matches!(w, Write::Link(_) | Write::RemoveDevice | Write::Device(_))),
        "{writes:?}"
    );
}

#[tokio::test]
async fn a_guard_that_somebody_changed_is_put_back() {
    let (host, mut reconciler) = host();
    reconciler.pass(&two(), now()).await;
    host.take_writes();
    host.with(|h| h.guard_tampered = true);
    reconciler.pass(&two(), now()).await;
    assert!(matches!(host.take_writes().as_slice(), [Write::Guard(_)]));
}

#[tokio::test]
async fn without_leave_to_prune_no_peer_route_or_guard_is_taken_away() {
    let (host, mut reconciler) = host();
    reconciler.pass(&two(), now()).await;
    host.take_writes();
    let unsynced = Desired { prune: false, synced: false, ..desired(&[]) };
    let pass = reconciler.pass(&unsynced, now()).await;
    assert_eq!((pass.errors, host.take_writes()), (vec![], vec![]));
}

#[tokio::test]
async fn a_revoked_peer_is_removed_although_the_guard_cannot_be_written() {
    let (host, mut reconciler) = host();
    reconciler.pass(&two(), now()).await;
    host.take_writes();
    host.with(|h| h.nft_error = Some(BackendError::failed("nft", "no such program")));
    reconciler.pass(&desired(&[("a", 2, "10.2.1.0/24")]), now()).await;
    assert_eq!(host.take_writes(), [Write::Device(DeviceChange::RemovePeer(key(3).public()))]);
}

#[tokio::test]
async fn a_device_that_fails_change_after_change_is_given_up_for_this_pass() {
    let (host, mut reconciler) = host();
    let many: Vec<(String, u8, String)> =
        (2..40).map(|n| (format!("n{n}"), n, format!("10.2.{n}.0/24"))).collect();
    let many: Vec<(&str, u8, &str)> =
        many.iter().map(|(name, n, net)| (name.as_str(), *n, net.as_str())).collect();
    reconciler.pass(&desired(&[]), now()).await;
    host.with(|h| h.wireguard_error = Some(BackendError::failed("setting", "it does not answer")));
    let pass = reconciler.pass(&desired(&many), now()).await;
    assert!(pass.errors.len() <= 3, "{}", pass.errors.len());
}

/// Desired with a peer that cannot encrypt and this exemption of it, if any.
fn in_clear(expires: Option<&str>) -> Desired {
    let exemptions =
        expires.map(|expires| format!("{{between: [{{node: a}}], reason: no TUN, expires: '{expires}'}}"));
    let text = format!(
        "node: me\nsite: aws\nmesh: test\nregistry: {{file: {{dir: /r}}}}\nencryption: {{exemptions: [{}]}}\n",
        exemptions.unwrap_or_default()
    );
    let mut agent =
        Agent::new(Config::parse("test", &text, None).unwrap(), key(1).public(), 1, LastGood::default());
    agent.underlay(ObservedUnderlay {
        forwarding: (true, true),
        default_route_addresses: vec!["192.0.2.1".parse().unwrap()],
        ..ObservedUnderlay::default()
    });
    agent.today("2027-01-01T00:00:00Z".parse().unwrap());
    let mut a = record("a", 2, "10.2.1.0/24");
    a.annotations.insert("sennit.dev/wireguard".to_owned(), "none".to_owned());
    let nodes = vec![record("me", 1, "10.1.1.0/24"), a, record("b", 3, "10.2.2.0/24")];
    let now = Instant::now();
    agent.snapshot(Snapshot { nodes, ..Snapshot::default() }, now).unwrap();
    Desired { announced: true, ..agent.desired(now) }
}

fn clear_devices(host: &FakeHost) -> Vec<String> {
    let all = host.with(|h| h.vxlan.keys().map(ToString::to_string).collect::<Vec<_>>());
    all.into_iter().filter(|name| name.contains('c')).collect()
}

#[tokio::test]
async fn what_travels_in_clear_comes_after_its_guard_and_goes_with_its_exemption() {
    let (host, mut reconciler) = host();
    let exempt = in_clear(Some("2027-01-31T00:00:00Z"));
    assert_eq!(reconciler.pass(&exempt, now()).await.errors, []);
    let writes = host.take_writes();
    let at = |wanted: &dyn Fn(&Write) -> bool| writes.iter().position(wanted).expect("was not written");
    let guard = at(&|w| matches!(w, Write::Guard(_)));
    let device = at(&|w| matches!(w, Write::Vxlan(name, _) if name.as_str() == "sennitxc4"));
    let clear = |w: &Write| matches!(w, Write::Route(RouteChange::Set(r)) if matches!(r.kind, RouteKind::Cleartext { .. }));
    assert!(guard < device && device < at(&clear), "{writes:?}");
    assert_eq!(reconciler.pass(&exempt, now()).await.changes, 0);
    reconciler.pass(&in_clear(None), now()).await;
    assert!(clear_devices(&host).is_empty());
    let routes = host.with(|h| h.net.routes.routes.clone());
    assert!(!routes.iter().any(|route| matches!(route.kind, RouteKind::Cleartext { .. })), "{routes:?}");
}

#[tokio::test]
async fn an_exemption_that_was_shortened_is_closed_before_the_registry_is_read() {
    let (host, mut reconciler) = host();
    reconciler.pass(&in_clear(Some("2027-01-31T00:00:00Z")), now()).await;
    let unsynced = |expires| Desired { synced: false, prune: false, ..in_clear(Some(expires)) };
    // One that lasts longer now changes nothing yet: the guard that stands says less.
    reconciler.pass(&unsynced("2027-02-28T00:00:00Z"), now()).await;
    assert_eq!(clear_devices(&host), ["sennitxc4"]);
    reconciler.pass(&unsynced("2027-01-15T00:00:00Z"), now()).await;
    assert!(clear_devices(&host).is_empty());
}
