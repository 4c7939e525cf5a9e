//! The device core, in memory: handshakes, data, and what hostile input does to it (nothing).
#![allow(clippy::unwrap_used)]

mod wire;

use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use mesh_wg::config::{AllowedIpChange, DeviceUpdate, PeerUpdate};
use mesh_wg::guard::STRANGERS_PER_SECOND;
use mesh_wg::key::{PresharedKey, PrivateKey, PublicKey};
use mesh_wg::noise::Message;
use mesh_wg::peer::Endpoint;
use proptest::prelude::*;
use wire::{Node, connected, packet, pair, settle};

#[test]
fn packets_staged_before_the_handshake_arrive_in_order_and_unpadded() {
    let (mut a, mut b) = pair();
    let lengths = [20, 21, 36, 100, 1419, 1420];
    for length in lengths {
        a.send(&packet("10.0.0.1", "10.0.0.2", length));
    }
    assert_eq!(a.out.datagrams.len(), 1, "one initiation for all of them");
    settle(&mut a, &mut b);
    assert_eq!(b.out.packets.iter().map(Vec::len).collect::<Vec<_>>(), lengths);
    assert!(a.handshaken(&b) && b.handshaken(&a));
}

#[test]
fn both_families_flow_both_ways() {
    let (mut a, mut b) = connected();
    for (from, to) in [("10.0.0.1", "10.0.0.2"), ("fd00::1", "fd00::2")] {
        let there = packet(from, to, 300);
        let back = packet(to, from, 301);
        a.send(&there);
        b.send(&back);
        settle(&mut a, &mut b);
        assert_eq!(b.out.packets.pop_front().unwrap(), there);
        assert_eq!(a.out.packets.pop_front().unwrap(), back);
    }
}

#[test]
fn plaintext_is_padded_but_not_beyond_the_mtu() {
    let (mut a, _) = connected();
    for (length, padded) in [(20, 32), (32, 32), (33, 48), (1409, 1420), (1420, 1420)] {
        a.send(&packet("10.0.0.1", "10.0.0.2", length));
        assert_eq!(a.out.datagrams.pop_back().unwrap().1.len(), padded + 32, "packet of {length}");
    }
    a.device.set_mtu(1410);
    a.send(&packet("10.0.0.1", "10.0.0.2", 1409));
    assert_eq!(a.out.datagrams.pop_back().unwrap().1.len(), 1410 + 32, "the MTU has changed");
}

#[test]
fn simultaneous_initiations_still_connect() {
    let (mut a, mut b) = pair();
    a.send(&packet("10.0.0.1", "10.0.0.2", 50));
    b.send(&packet("10.0.0.2", "10.0.0.1", 51));
    settle(&mut a, &mut b);
    assert_eq!(a.out.packets.len(), 1);
    assert_eq!(b.out.packets.len(), 1);
}

#[test]
fn a_source_that_is_not_the_senders_is_dropped_and_counted() {
    let (mut a, mut b) = connected();
    b.apply(PeerUpdate {
        allowed_ips: vec![AllowedIpChange::Add("10.9.0.0/16".parse().unwrap())],
        ..PeerUpdate::new(PublicKey::new([9; 32]))
    });
    for stolen in ["10.0.0.77", "10.9.1.1", "10.0.0.2"] {
        a.send(&packet(stolen, "10.0.0.2", 60));
    }
    settle(&mut a, &mut b);
    assert!(b.out.packets.is_empty());
    assert_eq!(b.device.counters().foreign_source.load(Ordering::Relaxed), 3);
}

#[test]
fn an_allowed_ip_moves_to_the_peer_that_got_it_last() {
    let (mut a, mut b) = connected();
    let other = PublicKey::new([9; 32]);
    let net = "10.0.0.1/32".parse().unwrap();
    b.apply(PeerUpdate { allowed_ips: vec![AllowedIpChange::Add(net)], ..PeerUpdate::new(other) });
    a.send(&packet("10.0.0.1", "10.0.0.2", 60));
    settle(&mut a, &mut b);
    assert!(b.out.packets.is_empty(), "the address is the other peer's now");
    let snapshot = b.device.snapshot();
    let allowed = |key| &snapshot.peers.iter().find(|peer| peer.public_key == key).unwrap().allowed_ips;
    assert_eq!(*allowed(other), [net]);
    assert_eq!(*allowed(a.public), ["fd00::1/128".parse().unwrap()]);
    // Taking away what another peer has does nothing.
    b.apply(PeerUpdate { allowed_ips: vec![AllowedIpChange::Remove(net)], ..PeerUpdate::new(a.public) });
    b.apply(PeerUpdate { remove: true, ..PeerUpdate::new(other) });
    a.send(&packet("10.0.0.1", "10.0.0.2", 60));
    settle(&mut a, &mut b);
    assert!(b.out.packets.is_empty(), "the prefix went with its owner");
}

#[test]
fn counters_hold_whole_udp_payloads_of_both_directions() {
    let (mut a, mut b) = connected();
    let before = (a.traffic(&b), b.traffic(&a));
    a.send(&packet("10.0.0.1", "10.0.0.2", 100));
    settle(&mut a, &mut b);
    assert_eq!(a.traffic(&b).0 - before.0.0, 112 + 32);
    assert_eq!(b.traffic(&a).1 - before.1.1, 112 + 32);
    assert_eq!(a.traffic(&b).0, b.traffic(&a).1, "all that one sent, the other received");
    assert_eq!(b.traffic(&a).0, a.traffic(&b).1);
}

#[test]
fn the_endpoint_follows_authentic_data_and_nothing_else() {
    let (mut a, mut b) = connected();
    let elsewhere = SocketAddr::from(([198, 51, 100, 7], 4242));
    a.send(&packet("10.0.0.1", "10.0.0.2", 100));
    let (_, mut datagram) = a.out.datagrams.pop_front().unwrap();
    let last = datagram.len() - 1;
    datagram[last] ^= 1;
    b.receive(elsewhere, &datagram);
    assert_eq!(b.endpoint(&a), a.address, "a forgery moves nothing");
    datagram[last] ^= 1;
    b.receive(elsewhere, &datagram);
    assert_eq!(b.endpoint(&a), elsewhere);
    b.receive(a.address, &datagram);
    assert_eq!(b.endpoint(&a), elsewhere, "a replay moves nothing");
    assert_eq!(b.out.packets.len(), 1);
}

#[test]
fn replayed_and_reordered_datagrams_are_told_apart() {
    let (mut a, mut b) = connected();
    let mut sent = Vec::new();
    for length in 20..40 {
        a.send(&packet("10.0.0.1", "10.0.0.2", length));
        sent.push(a.out.datagrams.pop_front().unwrap().1);
    }
    for datagram in sent.iter().rev().chain(&sent) {
        b.receive(a.address, datagram);
    }
    assert_eq!(b.out.packets.len(), 20);
}

#[test]
fn counters_near_the_end_of_their_range_are_refused_before_decryption() {
    let data = |counter: u64| {
        let mut datagram = vec![4, 0, 0, 0, 1, 2, 3, 4];
        datagram.extend_from_slice(&counter.to_le_bytes());
        datagram.extend_from_slice(&[0; 16]);
        Message::classify(&datagram)
    };
    assert_eq!(data(0), Some(Message::Data(0x0403_0201)));
    assert_eq!(data(u64::MAX - (1 << 13) - 1), Some(Message::Data(0x0403_0201)));
    assert_eq!(data(u64::MAX - (1 << 13)), None);
    assert_eq!(data(u64::MAX), None);
}

#[test]
fn different_preshared_keys_never_connect_and_equal_ones_do() {
    let (mut a, mut b) = pair();
    a.preshare(&b, 5);
    a.send(&packet("10.0.0.1", "10.0.0.2", 60));
    settle(&mut a, &mut b);
    assert!(b.out.packets.is_empty() && !a.handshaken(&b));
    let (mut a, mut b) = pair();
    a.preshare(&b, 5);
    b.preshare(&a, 5);
    a.send(&packet("10.0.0.1", "10.0.0.2", 60));
    settle(&mut a, &mut b);
    assert_eq!(b.out.packets.len(), 1);
}

#[test]
fn the_same_preshared_key_again_keeps_the_session() {
    let (mut a, mut b) = pair();
    a.preshare(&b, 5);
    b.preshare(&a, 5);
    a.send(&packet("10.0.0.1", "10.0.0.2", 60));
    settle(&mut a, &mut b);
    a.preshare(&b, 5);
    b.preshare(&a, 5);
    a.send(&packet("10.0.0.1", "10.0.0.2", 60));
    assert_eq!(a.out.datagrams.len(), 1);
    assert_eq!(a.out.datagrams[0].1[0], 4, "data, no handshake");
    settle(&mut a, &mut b);
    assert_eq!(b.out.packets.len(), 2);
}

#[test]
fn changing_the_preshared_key_on_one_side_after_the_other_loses_no_packet() {
    let (mut a, mut b) = connected();
    let exchange = |a: &mut Node, b: &mut Node, when: &str| {
        a.send(&packet("10.0.0.1", "10.0.0.2", 60));
        settle(a, b);
        assert!(b.out.packets.pop_front().is_some(), "there, {when}");
        b.send(&packet("10.0.0.2", "10.0.0.1", 60));
        settle(a, b);
        assert!(a.out.packets.pop_front().is_some(), "back, {when}");
    };
    a.preshare(&b, 5);
    exchange(&mut a, &mut b, "with one side changed");
    b.preshare(&a, 5);
    exchange(&mut a, &mut b, "with both sides changed");
    exchange(&mut a, &mut b, "afterwards");
}

#[test]
fn a_handshake_after_a_preshared_key_change_needs_the_new_key() {
    let (mut a, mut b) = connected();
    b.preshare(&a, 5);
    // A forgets its session and starts over without the key.
    let update = DeviceUpdate { private_key: Some(None), ..DeviceUpdate::default() };
    a.device.apply(&update).unwrap();
    let update = DeviceUpdate { private_key: Some(Some(a.private.clone())), ..DeviceUpdate::default() };
    a.device.apply(&update).unwrap();
    a.send(&packet("10.0.0.1", "10.0.0.2", 60));
    settle(&mut a, &mut b);
    assert!(b.out.packets.is_empty());
}

#[test]
fn without_a_private_key_nothing_is_sent_or_answered() {
    let (mut a, mut b) = connected();
    a.device.apply(&DeviceUpdate { private_key: Some(None), ..DeviceUpdate::default() }).unwrap();
    a.send(&packet("10.0.0.1", "10.0.0.2", 60));
    b.send(&packet("10.0.0.2", "10.0.0.1", 60));
    settle(&mut a, &mut b);
    assert!(a.out.packets.is_empty() && b.out.packets.is_empty());
    assert!(a.out.datagrams.is_empty());
}

#[test]
fn a_new_private_key_ends_sessions_and_drops_the_peer_that_has_become_ourselves() {
    let (a, b) = connected();
    let update = DeviceUpdate { private_key: Some(Some(b.private.clone())), ..DeviceUpdate::default() };
    a.device.apply(&update).unwrap();
    assert!(a.device.snapshot().peers.is_empty());
    a.apply(PeerUpdate::new(b.public));
    assert!(a.device.snapshot().peers.is_empty(), "our own key is skipped");
}

#[test]
fn update_only_creates_nothing_and_remove_removes() {
    let (a, b) = pair();
    a.apply(PeerUpdate { update_only: true, ..PeerUpdate::new(PublicKey::new([9; 32])) });
    assert_eq!(a.device.snapshot().peers.len(), 1);
    a.apply(PeerUpdate { remove: true, ..PeerUpdate::new(b.public) });
    assert!(a.device.snapshot().peers.is_empty());
}

#[test]
fn a_removed_peer_is_neither_sent_to_nor_listened_to() {
    let (mut a, mut b) = connected();
    a.apply(PeerUpdate { remove: true, ..PeerUpdate::new(b.public) });
    a.send(&packet("10.0.0.1", "10.0.0.2", 60));
    b.send(&packet("10.0.0.2", "10.0.0.1", 60));
    settle(&mut a, &mut b);
    assert!(a.out.packets.is_empty() && b.out.packets.is_empty());
    assert_eq!(a.device.counters().unroutable.load(Ordering::Relaxed), 1);
}

#[test]
fn a_peer_with_a_low_order_key_is_never_talked_to() {
    let (mut a, _) = pair();
    for key in [[0; 32], std::array::from_fn(|i| u8::from(i == 0))] {
        a.apply(PeerUpdate {
            endpoint: Some(SocketAddr::from(([192, 0, 2, 9], 1))),
            allowed_ips: vec![AllowedIpChange::Add("10.5.0.0/16".parse().unwrap())],
            persistent_keepalive: Some(1),
            ..PeerUpdate::new(PublicKey::new(key))
        });
        a.send(&packet("10.0.0.1", "10.5.0.1", 60));
        a.tick();
        assert!(a.out.datagrams.is_empty());
    }
    assert_eq!(a.device.counters().unreachable.load(Ordering::Relaxed), 2);
}

/// A server that answers nobody without a cookie, a client of its, and the client's first message.
fn besieged() -> (Node, Node, Vec<u8>) {
    let server = Node::with_limit(1, 0);
    let mut client = Node::new(2);
    server.add(&client, &["10.0.0.2/32"]);
    client.add(&server, &["10.0.0.1/32"]);
    client.send(&packet("10.0.0.2", "10.0.0.1", 60));
    let (_, initiation) = client.out.datagrams.pop_front().unwrap();
    (server, client, initiation)
}

#[test]
fn handshakes_beyond_the_limit_get_cookies_and_the_cookie_opens_the_door() {
    let (mut server, mut client, initiation) = besieged();
    server.receive(client.address, &initiation);
    let (to, cookie) = server.out.datagrams.pop_front().unwrap();
    assert_eq!((to.remote, cookie.len(), cookie[0]), (client.address, 64, 3));
    assert_eq!(server.device.counters().cookies.load(Ordering::Relaxed), 1);
    client.receive(SocketAddr::from(([198, 51, 100, 9], 9)), &cookie);
    assert!(client.out.datagrams.is_empty(), "a cookie is not answered");
    assert_eq!(client.endpoint(&server), server.address, "nor does it prove where its sender is");
    // The retry that carries the cookie comes after five seconds of boringtun's own clock.
    let deadline = Instant::now() + Duration::from_secs(15);
    while client.out.datagrams.is_empty() {
        assert!(Instant::now() < deadline, "no retry");
        std::thread::sleep(Duration::from_millis(20));
        client.tick();
    }
    let with_cookie = client.out.datagrams[0].1.clone();
    settle(&mut client, &mut server);
    // The client takes the response without asking back: only the server is under load.
    assert!(client.handshaken(&server) && server.handshaken(&client));
    assert_eq!(server.out.packets.len(), 1);
    // Nor does a cookie open it without limit: one more of a burst of five has been used.
    for _ in 0..100 {
        server.receive(client.address, &with_cookie);
    }
    assert_eq!(server.device.counters().limited.load(Ordering::Relaxed), 96);
    server.now.monotonic += Duration::from_millis(50);
    server.receive(client.address, &with_cookie);
    server.receive(client.address, &with_cookie);
    assert_eq!(server.device.counters().limited.load(Ordering::Relaxed), 97);
}

#[test]
fn a_flood_gets_no_more_cookies_than_are_worth_their_work_and_keeps_out_neither_peers_nor_cookies() {
    let (mut server, client, initiation) = besieged();
    let counters = |server: &Node| {
        let counters = server.device.counters();
        (counters.cookies.load(Ordering::Relaxed), counters.limited.load(Ordering::Relaxed))
    };
    for source in 0..STRANGERS_PER_SECOND as u32 + 10 {
        server.receive(SocketAddr::from((source.to_be_bytes(), 1)), &initiation);
    }
    assert_eq!(counters(&server), (STRANGERS_PER_SECOND, 10));
    // A wrong cookie is answered with a right one: there is room for those who may have one.
    let mut claiming = initiation.clone();
    claiming[147] = 1;
    server.receive(SocketAddr::from(([198, 51, 100, 1], 1)), &claiming);
    assert_eq!(counters(&server), (STRANGERS_PER_SECOND + 1, 10));
    // Peers are looked up when it matters, and then there is room for them.
    server.receive(client.address, &initiation);
    assert_eq!(counters(&server), (STRANGERS_PER_SECOND + 1, 11));
    server.tick();
    server.receive(client.address, &initiation);
    server.receive(SocketAddr::from(([198, 51, 100, 1], 1)), &initiation);
    assert_eq!(counters(&server), (STRANGERS_PER_SECOND + 2, 12));
    server.now.monotonic += Duration::from_secs(1);
    server.receive(SocketAddr::from(([198, 51, 100, 1], 1)), &initiation);
    assert_eq!(counters(&server), (STRANGERS_PER_SECOND + 3, 12), "the next second brings more");
}

#[test]
fn a_stolen_cookie_is_worth_nothing_elsewhere() {
    let (mut server, _, initiation) = besieged();
    server.receive(SocketAddr::from(([198, 51, 100, 1], 1)), &initiation);
    let (to, cookie) = server.out.datagrams.pop_front().unwrap();
    assert_eq!(to.remote.ip().to_string(), "198.51.100.1");
    // Bound to the message it answers: it does not open for another client.
    let mut other = Node::new(3);
    other.add(&server, &["10.0.0.1/32"]);
    other.send(&packet("10.0.0.3", "10.0.0.1", 60));
    other.receive(server.address, &cookie);
    assert_eq!(other.device.counters().refused.load(Ordering::Relaxed), 1);
}

#[test]
fn a_keepalive_is_sent_at_once_when_turned_on_and_then_after_silence() {
    let (mut a, mut b) = connected();
    let key = b.public;
    let every = |seconds| PeerUpdate { persistent_keepalive: Some(seconds), ..PeerUpdate::new(key) };
    a.apply(every(25));
    a.tick();
    assert_eq!(a.out.datagrams.len(), 1, "at once");
    assert_eq!(a.out.datagrams[0].1.len(), 32);
    a.out.datagrams.clear();
    a.now.monotonic += Duration::from_secs(24);
    a.tick();
    assert!(a.out.datagrams.is_empty(), "not yet");
    a.apply(every(20));
    a.tick();
    assert_eq!(a.out.datagrams.len(), 1, "a shorter interval counts from the last traffic");
    settle(&mut a, &mut b);
    a.apply(every(0));
    a.now.monotonic += Duration::from_secs(1000);
    a.tick();
    assert!(a.out.datagrams.is_empty(), "off");
}

#[test]
fn a_keepalive_without_a_session_starts_a_handshake() {
    let (mut a, mut b) = pair();
    a.apply(PeerUpdate { persistent_keepalive: Some(25), ..PeerUpdate::new(b.public) });
    a.tick();
    settle(&mut a, &mut b);
    assert!(a.handshaken(&b) && b.handshaken(&a));
}

#[test]
fn while_the_link_is_down_nothing_moves() {
    let (mut a, mut b) = connected();
    a.device.set_up(false);
    a.send(&packet("10.0.0.1", "10.0.0.2", 60));
    b.send(&packet("10.0.0.2", "10.0.0.1", 60));
    a.apply(PeerUpdate { persistent_keepalive: Some(1), ..PeerUpdate::new(b.public) });
    a.tick();
    settle(&mut a, &mut b);
    assert!(a.out.packets.is_empty() && b.out.packets.is_empty());
    a.device.set_up(true);
    a.send(&packet("10.0.0.1", "10.0.0.2", 60));
    settle(&mut a, &mut b);
    assert_eq!(a.out.packets.len() + b.out.packets.len(), 1, "a new session takes over");
}

#[test]
fn going_down_ends_sessions_and_drops_what_waits() {
    let (mut a, mut b) = connected();
    a.send(&packet("10.0.0.1", "10.0.0.2", 60));
    let (_, late) = a.out.datagrams.pop_front().unwrap();
    b.send(&packet("10.0.0.2", "10.0.0.1", 60));
    let (_, old) = b.out.datagrams.pop_front().unwrap();
    for node in [&a, &b] {
        node.device.set_up(false);
        node.device.set_up(true);
    }
    a.receive(b.address, &old);
    b.receive(a.address, &late);
    assert!(a.out.packets.is_empty() && b.out.packets.is_empty(), "the keys are gone");
    a.send(&packet("10.0.0.1", "10.0.0.2", 61));
    assert_eq!(a.out.datagrams[0].1[0], 1, "a handshake comes first");
    settle(&mut a, &mut b);
    assert_eq!(b.out.packets.len(), 1);
    // A handshake that was under way is begun again at once, and nothing staged survives.
    let (mut c, mut d) = pair();
    c.send(&packet("10.0.0.1", "10.0.0.2", 60));
    c.out.datagrams.clear();
    c.device.set_up(false);
    c.device.set_up(true);
    c.send(&packet("10.0.0.1", "10.0.0.2", 62));
    settle(&mut c, &mut d);
    assert_eq!(d.out.packets.iter().map(Vec::len).collect::<Vec<_>>(), [62]);
}

#[test]
fn a_keepalive_begins_anew_when_the_link_comes_up() {
    let (mut a, mut b) = connected();
    a.apply(PeerUpdate { persistent_keepalive: Some(25), ..PeerUpdate::new(b.public) });
    a.tick();
    settle(&mut a, &mut b);
    a.device.set_up(false);
    a.tick();
    a.device.set_up(true);
    a.tick();
    assert_eq!(a.out.datagrams.len(), 1);
    assert_eq!(a.out.datagrams[0].1[0], 1, "with a handshake, for the session is gone");
}

/// The first initiation of a node that has forgotten all it was doing.
fn fresh_initiation(node: &mut Node) -> Vec<u8> {
    for private in [None, Some(node.private.clone())] {
        let update = DeviceUpdate { private_key: Some(private), ..DeviceUpdate::default() };
        node.device.apply(&update).unwrap();
    }
    node.send(&packet("10.0.0.1", "10.0.0.2", 60));
    node.out.datagrams.pop_back().unwrap().1
}

#[test]
fn nothing_is_sent_in_a_session_that_the_initiator_has_not_confirmed() {
    let (mut a, mut b) = pair();
    for round in 1..=20 {
        let initiation = fresh_initiation(&mut a);
        b.receive(a.address, &initiation);
        assert_eq!(b.out.datagrams.pop_front().unwrap().1[0], 2, "answered, and the answer is lost");
        let ready = b.device.batch(b.now).peer(&a.public).unwrap().lock().is_ready();
        assert!(!ready, "after {round} initiations");
    }
    b.send(&packet("10.0.0.2", "10.0.0.1", 60));
    assert_eq!(b.out.datagrams[0].1[0], 1, "the packet waits for a handshake");
    settle(&mut a, &mut b);
    assert_eq!(a.out.packets.len(), 1);
}

#[test]
fn a_running_session_is_used_until_a_new_one_is_confirmed() {
    let (mut a, mut b) = connected();
    let mut arrived = 0;
    for _ in 0..30 {
        // A rekeys: a new session at B, in which B says nothing before it has heard A in it.
        let initiation = fresh_initiation(&mut a);
        b.receive(a.address, &initiation);
        let (_, response) = b.out.datagrams.pop_front().unwrap();
        b.send(&packet("10.0.0.2", "10.0.0.1", 60));
        let early = b.out.datagrams.pop_front().unwrap().1;
        assert_ne!((early[0], early[4..8].to_vec()), (4, initiation[4..8].to_vec()));
        a.receive(b.address, &response);
        settle(&mut a, &mut b);
        a.out.packets.clear();
        b.send(&packet("10.0.0.2", "10.0.0.1", 60));
        assert_eq!(b.out.datagrams[0].1[4..8], initiation[4..8], "the confirmed one is used");
        settle(&mut a, &mut b);
        arrived += a.out.packets.len();
    }
    assert_eq!(arrived, 30);
}

#[test]
fn an_initiation_replayed_after_a_preshared_key_change_does_not_move_the_endpoint() {
    let (mut a, mut b) = pair();
    a.send(&packet("10.0.0.1", "10.0.0.2", 60));
    let recorded = a.out.datagrams[0].1.clone();
    settle(&mut a, &mut b);
    b.preshare(&a, 5);
    let elsewhere = SocketAddr::from(([198, 51, 100, 7], 4242));
    b.receive(elsewhere, &recorded);
    let (to, response) = b.out.datagrams.pop_front().unwrap();
    assert_eq!((to.remote, response[0]), (elsewhere, 2), "it is answered where it came from");
    assert_eq!(b.endpoint(&a), a.address);
    // Who completes the handshake from elsewhere is followed there.
    a.preshare(&b, 5);
    let initiation = fresh_initiation(&mut a);
    b.receive(elsewhere, &initiation);
    let (_, response) = b.out.datagrams.pop_front().unwrap();
    assert_eq!(b.endpoint(&a), a.address);
    a.receive(b.address, &response);
    let (_, confirmation) = a.out.datagrams.pop_front().unwrap();
    b.receive(elsewhere, &confirmation);
    assert_eq!(b.endpoint(&a), elsewhere);
}

#[test]
fn answers_to_our_own_initiations_are_not_starved_by_those_of_others() {
    let mut server = Node::with_limit(1, 1);
    let mut client = Node::new(2);
    server.add(&client, &["10.0.0.2/32"]);
    client.add(&server, &["10.0.0.1/32"]);
    let mut stranger = Node::new(3);
    stranger.add(&server, &["10.0.0.1/32"]);
    stranger.send(&packet("10.0.0.3", "10.0.0.1", 60));
    let (_, initiation) = stranger.out.datagrams.pop_front().unwrap();
    for _ in 0..3 {
        server.receive(stranger.address, &initiation);
    }
    assert_eq!(server.device.counters().cookies.load(Ordering::Relaxed), 2, "the budget is used up");
    server.out.datagrams.clear();
    server.send(&packet("10.0.0.1", "10.0.0.2", 60));
    settle(&mut server, &mut client);
    assert_eq!(client.out.packets.len(), 1);
}

#[test]
fn a_herd_of_silent_peers_is_called_a_few_at_a_time() {
    let mut node = Node::new(1);
    let peers = (0..100u8)
        .map(|i| PeerUpdate {
            endpoint: Some(SocketAddr::from(([192, 0, 2, 9], 1000))),
            persistent_keepalive: Some(25),
            ..PeerUpdate::new(PrivateKey::new([100 + i; 32]).unwrap().public())
        })
        .collect();
    node.device.apply(&DeviceUpdate { peers, ..DeviceUpdate::default() }).unwrap();
    let mut passes = Vec::new();
    while node.device.tick(node.now, &mut node.out) {
        passes.push(std::mem::take(&mut node.out.datagrams).len());
    }
    passes.push(node.out.datagrams.len());
    assert!(passes.iter().all(|pass| *pass <= 16), "{passes:?}");
    assert_eq!(passes.iter().sum::<usize>(), 100, "and none is forgotten");
    // Who is removed in the middle of a sweep is not called.
    let node = Node::new(1);
    let keys: Vec<_> = (0..40u8).map(|i| PrivateKey::new([100 + i; 32]).unwrap().public()).collect();
    for key in &keys {
        node.apply(PeerUpdate {
            endpoint: Some(SocketAddr::from(([192, 0, 2, 9], 1000))),
            persistent_keepalive: Some(25),
            ..PeerUpdate::new(*key)
        });
    }
    let mut out = wire::Collected::default();
    assert!(node.device.tick(node.now, &mut out));
    node.device.apply(&DeviceUpdate { replace_peers: true, ..DeviceUpdate::default() }).unwrap();
    out.datagrams.clear();
    while node.device.tick(node.now, &mut out) {}
    assert!(out.datagrams.is_empty());
}

#[test]
fn only_the_answers_by_a_lost_address_change_their_way() {
    let (mut a, mut b) = connected();
    let local = "192.0.2.2".parse().unwrap();
    a.send(&packet("10.0.0.1", "10.0.0.2", 60));
    let (_, datagram) = a.out.datagrams.pop_front().unwrap();
    let from = Endpoint { remote: a.address, local: Some(local) };
    b.device.batch(b.now).datagram(&from, &datagram, &mut b.out);
    let used = |b: &Node| b.device.batch(b.now).peer(&a.public).unwrap().lock().endpoint().unwrap().local;
    b.device.forget_local_address("192.0.2.3".parse().unwrap());
    assert_eq!(used(&b), Some(local), "another address");
    b.device.forget_local_address(local);
    assert_eq!(used(&b), None);
}

#[test]
fn staging_is_bounded_and_keeps_the_newest() {
    let (mut a, mut b) = pair();
    for length in 0..1000 {
        a.send(&packet("10.0.0.1", "10.0.0.2", 20 + length));
    }
    settle(&mut a, &mut b);
    assert_eq!(b.out.packets.len(), mesh_wg::peer::STAGED_PACKETS);
    assert_eq!(b.out.packets.back().unwrap().len(), 1019);
}

#[test]
fn nothing_is_answered_that_was_not_made_for_our_key() {
    let (mut a, mut b) = pair();
    let mut stranger = Node::new(3);
    stranger.add(&b, &["0.0.0.0/0"]);
    stranger.send(&packet("10.0.0.3", "10.0.0.2", 60));
    let (_, initiation) = stranger.out.datagrams.pop_front().unwrap();
    b.receive(stranger.address, &initiation);
    a.receive(stranger.address, &initiation);
    assert!(a.out.datagrams.is_empty(), "the MAC is for another key");
    assert!(b.out.datagrams.is_empty(), "a stranger, though the MAC is right");
}

#[test]
fn inner_packets_that_lie_about_themselves_are_dropped_after_decryption() {
    let (mut a, mut b) = connected();
    // A peer of ours is free to encrypt whatever it likes; this one's own checks are bypassed.
    let lies: Vec<Vec<u8>> = {
        let good = packet("10.0.0.1", "10.0.0.2", 64);
        let with = |at: usize, value: u8| {
            let mut lie = good.clone();
            lie[at] = value;
            lie
        };
        let mut long_header = packet("10.0.0.1", "10.0.0.2", 48);
        long_header[0] = 0x4f;
        vec![
            with(0, 0x44),
            long_header,
            with(2, 0xff),
            with(3, 19),
            with(3, 0),
            with(0, 0x15),
            vec![0x45; 10],
        ]
    };
    let before = b.device.counters().malformed.load(Ordering::Relaxed);
    for mut lie in lies.clone() {
        lie.resize(lie.len().next_multiple_of(16), 0);
        let device = &a.device;
        let batch = device.batch(a.now);
        let peer = batch.peer(&b.public).unwrap().clone();
        let mut state = peer.lock();
        let to = *state.endpoint().unwrap();
        assert!(state.seal(&lie, &to, a.now, &mut a.out));
    }
    settle(&mut a, &mut b);
    assert!(b.out.packets.is_empty());
    let malformed = b.device.counters().malformed.load(Ordering::Relaxed) - before;
    assert_eq!(malformed, lies.len() as u64);
}

#[test]
fn five_thousand_peers_are_applied_listed_and_swept_quickly() {
    let node = Node::new(1);
    let peers = (0..5000u32)
        .map(|i| {
            let mut key = [7u8; 32];
            key[..4].copy_from_slice(&i.to_be_bytes());
            PeerUpdate {
                preshared_key: Some(PresharedKey::new([1; 32])),
                allowed_ips: vec![AllowedIpChange::Add(
                    format!("10.{}.{}.0/24", i / 250, i % 250).parse().unwrap(),
                )],
                ..PeerUpdate::new(PrivateKey::new(key).unwrap().public())
            }
        })
        .collect();
    node.device.apply(&DeviceUpdate { peers, ..DeviceUpdate::default() }).unwrap();
    assert_eq!(node.device.snapshot().peers.len(), 5000);
    let began = Instant::now();
    node.device.tick(node.now, &mut wire::Collected::default());
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn no_datagram_disturbs_a_session(
        junk in proptest::collection::vec((0u8..6, proptest::collection::vec(any::<u8>(), 0..200)), 1..40),
        keep_index in any::<bool>(),
    ) {
        let (mut a, mut b) = connected();
        a.send(&packet("10.0.0.1", "10.0.0.2", 60));
        let (_, real) = a.out.datagrams.pop_front().unwrap();
        for (kind, mut bytes) in junk {
            if bytes.len() >= 4 {
                bytes[..4].copy_from_slice(&[kind, 0, 0, 0]);
            }
            if keep_index && bytes.len() >= 8 {
                bytes[4..8].copy_from_slice(&real[4..8]);
            }
            // Lengths that are taken seriously.
            let length = match kind { 1 => 148, 2 => 92, 3 => 64, _ => bytes.len() };
            bytes.resize(length, 0);
            b.receive(a.address, &bytes);
        }
        prop_assert!(b.out.packets.is_empty());
        b.receive(a.address, &real);
        prop_assert_eq!(b.out.packets.len(), 1);
    }

    #[test]
    fn a_damaged_handshake_is_refused_and_a_whole_one_still_works(at in 0usize..148, bit in 0u8..8) {
        let (mut a, mut b) = pair();
        a.send(&packet("10.0.0.1", "10.0.0.2", 60));
        let (_, initiation) = a.out.datagrams.pop_front().unwrap();
        let mut damaged = initiation.clone();
        damaged[at] ^= 1 << bit;
        b.receive(a.address, &damaged);
        // The last 16 bytes are the second MAC, which counts only under load.
        prop_assert_eq!(b.out.datagrams.is_empty(), at < 132);
        b.out.datagrams.clear();
        if at < 132 {
            b.receive(a.address, &initiation);
            settle(&mut a, &mut b);
            prop_assert_eq!(b.out.packets.len(), 1);
        }
    }

    #[test]
    fn no_packet_from_the_link_disturbs_the_device(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
        let (mut a, mut b) = connected();
        a.send(&bytes);
        settle(&mut a, &mut b);
        a.send(&packet("10.0.0.1", "10.0.0.2", 60));
        settle(&mut a, &mut b);
        prop_assert!(b.out.packets.back().is_some_and(|last| last.len() == 60));
    }
}
