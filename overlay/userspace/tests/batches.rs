//! The core in batches: trains of datagrams, and batches beside others.
#![allow(clippy::unwrap_used)]

mod wire;

use std::sync::atomic::Ordering;

use mesh_wg::offload::split::{Segments, TAIL};
use mesh_wg::peer::Order;
use wire::{Node, connected, packet, pair, settle};

fn datagrams(node: &mut Node) -> Vec<Vec<u8>> {
    node.out.datagrams.drain(..).map(|(_, datagram)| datagram).collect()
}

/// Sends a packet in a batch of this kind and tells whether it was done.
fn send_in(node: &mut Node, order: Order, packet: &[u8]) -> bool {
    let mut buffer = packet.to_vec();
    buffer.resize(packet.len() + TAIL, 0xaa);
    let mut packets = Segments::whole(&mut buffer, packet.len()).unwrap();
    node.device.batch_in(order, node.now).packets(&mut packets, &mut node.out)
}

#[test]
fn a_train_brings_what_its_datagrams_bring_one_by_one() {
    let (mut a, mut b) = connected();
    let sent: Vec<Vec<u8>> =
        (0..20u8).map(|i| packet("10.0.0.1", "10.0.0.2", if i < 19 { 200 } else { 60 })).collect();
    sent.iter().for_each(|packet| a.send(packet));
    let train = datagrams(&mut a).concat();
    b.device.batch(b.now).train(&a.address.into(), &train, 240, &mut b.out);
    assert_eq!(b.out.packets.drain(..).collect::<Vec<_>>(), sent);
    b.device.batch(b.now).train(&a.address.into(), &train, 240, &mut b.out);
    assert!(b.out.packets.is_empty(), "all of them are replays now");
    assert_eq!(b.device.counters().refused.load(Ordering::Relaxed), 20);
}

#[test]
fn what_is_wrong_in_a_train_costs_nothing_else_in_it() {
    let (mut a, mut b) = connected();
    let packets: Vec<Vec<u8>> = (1..=4).map(|i| packet("10.0.0.1", "10.0.0.2", 200 + i)).collect();
    packets.iter().for_each(|packet| a.send(packet));
    a.send(&packet("10.0.0.9", "10.0.0.2", 205));
    let mut parts = datagrams(&mut a);
    parts[1][100] ^= 1;
    // A session nobody has, a message nobody knows, and a handshake between data.
    let mut stranger = parts[0].clone();
    stranger[5] ^= 0xff;
    let mut handshake = vec![0u8; 240];
    handshake[0] = 1;
    let train = [parts.clone(), vec![stranger, handshake, vec![7; 240], vec![4; 20]]].concat().concat();
    b.device.batch(b.now).train(&a.address.into(), &train, 240, &mut b.out);
    let arrived: Vec<Vec<u8>> = b.out.packets.drain(..).collect();
    assert_eq!(arrived, [packets[0].clone(), packets[2].clone(), packets[3].clone()]);
    let counters = b.device.counters();
    assert_eq!(counters.refused.load(Ordering::Relaxed), 5);
    assert_eq!(counters.foreign_source.load(Ordering::Relaxed), 1);
}

#[test]
fn any_segment_length_of_a_train_is_survived() {
    let (mut a, mut b) = connected();
    for _ in 0..3 {
        a.send(&packet("10.0.0.1", "10.0.0.2", 200));
    }
    let train = datagrams(&mut a).concat();
    for segment in [0, 1, 3, 31, 32, 239, 241, 10_000, usize::MAX] {
        b.device.batch(b.now).train(&a.address.into(), &train, segment, &mut b.out);
    }
    b.device.batch(b.now).train(&a.address.into(), &[], 0, &mut b.out);
    assert_eq!(b.out.packets.len(), 0);
    b.device.batch(b.now).train(&a.address.into(), &train, 240, &mut b.out);
    assert_eq!(b.out.packets.len(), 3, "nothing of it had been taken for good");
}

#[test]
fn beside_others_only_what_needs_no_session_first_is_done() {
    let (mut a, mut b) = pair();
    let packets: Vec<Vec<u8>> = (0..4).map(|i| packet("10.0.0.1", "10.0.0.2", 100 + i)).collect();
    assert!(!send_in(&mut a, Order::Open, &packets[0]), "there is no session");
    assert!(a.out.datagrams.is_empty());
    assert!(send_in(&mut a, Order::Kept, &packets[0]));
    assert!(send_in(&mut a, Order::Kept, &packets[1]));
    b.receive(a.address, &datagrams(&mut a)[0]);

    // The answer comes in a batch beside others: what waits stays where it is, before all that comes later.
    let response = datagrams(&mut b).remove(0);
    let mut batch = a.device.batch_in(Order::Open, a.now);
    batch.datagram(&b.address.into(), &response, &mut a.out);
    let waiting = batch.into_waiting();
    assert_eq!(waiting.iter().map(|peer| *peer.key()).collect::<Vec<_>>(), [b.public]);
    assert!(!send_in(&mut a, Order::Open, &packets[2]), "others wait still");
    assert!(send_in(&mut a, Order::Kept, &packets[2]));
    assert!(send_in(&mut a, Order::Open, &packets[3]), "now nobody does");
    a.device.batch(a.now).send_staged(&waiting[0], &mut a.out);
    settle(&mut a, &mut b);
    assert_eq!(b.out.packets.drain(..).collect::<Vec<_>>(), packets);
}

#[test]
fn what_waited_is_released_by_whoever_keeps_order() {
    let (mut a, mut b) = pair();
    let first = packet("10.0.0.1", "10.0.0.2", 100);
    a.send(&first);
    b.receive(a.address, &datagrams(&mut a)[0]);
    let response = datagrams(&mut b).remove(0);
    let mut batch = a.device.batch_in(Order::Open, a.now);
    batch.datagram(&b.address.into(), &response, &mut a.out);
    let waiting = batch.into_waiting();
    settle(&mut a, &mut b);
    assert!(b.out.packets.is_empty());
    a.device.batch(a.now).send_staged(&waiting[0], &mut a.out);
    settle(&mut a, &mut b);
    assert_eq!(b.out.packets.drain(..).collect::<Vec<_>>(), [first]);
}
