//! Two devices with a session between them, and nothing but memory in between.

use std::collections::VecDeque;
use std::net::SocketAddr;

use mesh_wg::config::{AllowedIpChange, DeviceUpdate, PeerUpdate};
use mesh_wg::device::Device;
use mesh_wg::key::{PrivateKey, PublicKey};
use mesh_wg::peer::{Endpoint, Now, Output};

pub struct Collected {
    pub datagrams: VecDeque<Vec<u8>>,
    pub packets: VecDeque<Vec<u8>>,
    datagram: Vec<u8>,
    packet: Vec<u8>,
}

impl Output for Collected {
    fn datagram_space(&mut self, length: usize) -> &mut [u8] {
        &mut self.datagram[..length]
    }
    fn datagram_done(&mut self, _: &Endpoint, length: usize) {
        self.datagrams.push_back(self.datagram[..length].to_vec());
    }
    fn packet_space(&mut self, length: usize) -> &mut [u8] {
        &mut self.packet[..length]
    }
    fn packet_done(&mut self, length: usize) {
        self.packets.push_back(self.packet[..length].to_vec());
    }
}

pub struct Node {
    pub device: Device,
    pub address: SocketAddr,
    pub out: Collected,
    pub public: PublicKey,
}

impl Node {
    fn new(seed: u8) -> Self {
        let private = PrivateKey::new([seed; 32]).expect("not zero");
        let public = private.public();
        let device = Device::with_handshake_limit(u64::MAX);
        device.set_mtu(1420);
        device.set_up(true);
        let update = DeviceUpdate { private_key: Some(Some(private)), ..DeviceUpdate::default() };
        device.apply(&update).expect("a key");
        let out = Collected {
            datagrams: VecDeque::new(),
            packets: VecDeque::new(),
            datagram: vec![0; 70_000],
            packet: vec![0; 70_000],
        };
        Self { device, address: SocketAddr::from(([192, 0, 2, seed], 51820)), out, public }
    }

    fn add(&self, other: &Node, allowed: &str) {
        let peer = PeerUpdate {
            endpoint: Some(other.address),
            allowed_ips: vec![AllowedIpChange::Add(allowed.parse().expect("a prefix"))],
            ..PeerUpdate::new(other.public)
        };
        self.device.apply(&DeviceUpdate { peers: vec![peer], ..DeviceUpdate::default() }).expect("a peer");
    }

    pub fn send(&mut self, packet: &[u8]) {
        let mut buffer = packet.to_vec();
        buffer.resize(packet.len() + 16, 0);
        self.device.batch(Now::read()).packet(&mut buffer, packet.len(), &mut self.out);
    }

    pub fn receive(&mut self, from: SocketAddr, datagram: &[u8]) {
        self.device.batch(Now::read()).datagram(&from.into(), datagram, &mut self.out);
    }
}

/// 10.0.0.1 and 10.0.0.2; all that is in flight is delivered.
pub fn settle(a: &mut Node, b: &mut Node) {
    loop {
        if let Some(datagram) = a.out.datagrams.pop_front() {
            b.receive(a.address, &datagram);
        } else if let Some(datagram) = b.out.datagrams.pop_front() {
            a.receive(b.address, &datagram);
        } else {
            return;
        }
    }
}

/// The nodes, connected.
pub fn connected() -> (Node, Node) {
    let (mut a, mut b) = (Node::new(1), Node::new(2));
    a.add(&b, "10.0.0.0/8");
    b.add(&a, "10.0.0.1/32");
    a.send(&PING);
    settle(&mut a, &mut b);
    assert_eq!(b.out.packets.pop_front().as_deref(), Some(&PING[..]));
    (a, b)
}

/// The smallest packet from 10.0.0.1 to 10.0.0.2.
pub const PING: [u8; 20] = [0x45, 0, 0, 20, 0, 0, 0, 0, 64, 1, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
