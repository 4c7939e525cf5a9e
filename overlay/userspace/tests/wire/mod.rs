//! Two devices without a network between them: what one puts out is carried to the other by hand.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};

use mesh_wg::config::{AllowedIpChange, DeviceUpdate, PeerUpdate};
use mesh_wg::device::Device;
use mesh_wg::key::{PresharedKey, PrivateKey, PublicKey};
use mesh_wg::peer::{Endpoint, Now, Output};

/// Collects what a device puts out.
pub struct Collected {
    pub datagrams: VecDeque<(Endpoint, Vec<u8>)>,
    pub packets: VecDeque<Vec<u8>>,
    datagram: Vec<u8>,
    packet: Vec<u8>,
}

impl Default for Collected {
    fn default() -> Self {
        Self {
            datagrams: VecDeque::new(),
            packets: VecDeque::new(),
            datagram: vec![0; 70_000],
            packet: vec![0; 70_000],
        }
    }
}

impl Output for Collected {
    fn datagram_space(&mut self, length: usize) -> &mut [u8] {
        &mut self.datagram[..length]
    }
    fn datagram_done(&mut self, to: &Endpoint, length: usize) {
        self.datagrams.push_back((*to, self.datagram[..length].to_vec()));
    }
    fn packet_space(&mut self, length: usize) -> &mut [u8] {
        &mut self.packet[..length]
    }
    fn packet_done(&mut self, length: usize) {
        self.packets.push_back(self.packet[..length].to_vec());
    }
}

/// A device with its address on the wire and what it has put out.
pub struct Node {
    pub device: Device,
    pub private: PrivateKey,
    pub public: PublicKey,
    pub address: SocketAddr,
    pub out: Collected,
    pub now: Now,
}

impl Node {
    pub fn new(seed: u8) -> Self {
        Self::with_limit(seed, u64::MAX)
    }

    pub fn with_limit(seed: u8, handshakes_per_second: u64) -> Self {
        let private = PrivateKey::new([seed; 32]).unwrap();
        let device = Device::with_handshake_limit(handshakes_per_second);
        device.set_mtu(1420);
        device.set_up(true);
        let update = DeviceUpdate { private_key: Some(Some(private.clone())), ..DeviceUpdate::default() };
        device.apply(&update).unwrap();
        let public = private.public();
        let address = SocketAddr::from(([192, 0, 2, seed], 51820));
        Self { device, private, public, address, out: Collected::default(), now: Now::read() }
    }

    pub fn apply(&self, peer: PeerUpdate) {
        self.device.apply(&DeviceUpdate { peers: vec![peer], ..DeviceUpdate::default() }).unwrap();
    }

    pub fn add(&self, peer: &Node, allowed: &[&str]) {
        self.apply(PeerUpdate {
            endpoint: Some(peer.address),
            allowed_ips: allowed.iter().map(|net| AllowedIpChange::Add(net.parse().unwrap())).collect(),
            ..PeerUpdate::new(peer.public)
        });
    }

    pub fn preshare(&self, peer: &Node, key: u8) {
        self.apply(PeerUpdate {
            preshared_key: Some(PresharedKey::new([key; 32])),
            ..PeerUpdate::new(peer.public)
        });
    }

    /// The operating system sends a packet into the tunnel.
    pub fn send(&mut self, packet: &[u8]) {
        let mut buffer = packet.to_vec();
        buffer.resize(packet.len() + 16, 0xaa);
        self.device.batch(self.now).packet(&mut buffer, packet.len(), &mut self.out);
    }

    /// A datagram arrives.
    pub fn receive(&mut self, from: SocketAddr, datagram: &[u8]) {
        self.device.batch(self.now).datagram(&from.into(), datagram, &mut self.out);
    }

    pub fn tick(&mut self) {
        while self.device.tick(self.now, &mut self.out) {}
    }

    pub fn traffic(&self, peer: &Node) -> (u64, u64) {
        self.device.batch(self.now).peer(&peer.public).unwrap().lock().traffic()
    }

    pub fn endpoint(&self, peer: &Node) -> SocketAddr {
        self.device.batch(self.now).peer(&peer.public).unwrap().lock().endpoint().unwrap().remote
    }

    pub fn handshaken(&self, peer: &Node) -> bool {
        self.device.batch(self.now).peer(&peer.public).unwrap().lock().last_handshake().is_some()
    }
}

/// Carries datagrams both ways until nothing moves.
pub fn settle(a: &mut Node, b: &mut Node) {
    loop {
        let mut moved = false;
        while let Some((_, datagram)) = a.out.datagrams.pop_front() {
            b.receive(a.address, &datagram);
            moved = true;
        }
        while let Some((_, datagram)) = b.out.datagrams.pop_front() {
            a.receive(b.address, &datagram);
            moved = true;
        }
        if !moved {
            break;
        }
    }
}

/// Two nodes that know each other: 10.0.0.1 and fd00::1 at the first, 10.0.0.2 and fd00::2 at the second.
pub fn pair() -> (Node, Node) {
    let (a, b) = (Node::new(1), Node::new(2));
    a.add(&b, &["10.0.0.2/32", "fd00::2/128"]);
    b.add(&a, &["10.0.0.1/32", "fd00::1/128"]);
    (a, b)
}

/// Two nodes with a session.
pub fn connected() -> (Node, Node) {
    let (mut a, mut b) = pair();
    a.send(&packet("10.0.0.1", "10.0.0.2", 20));
    settle(&mut a, &mut b);
    assert_eq!(b.out.packets.len(), 1, "the first packet came through");
    b.out.packets.clear();
    (a, b)
}

/// An IP packet of this many bytes in all.
pub fn packet(from: &str, to: &str, length: usize) -> Vec<u8> {
    let mut packet = vec![0x5a; length.max(40)];
    match (from.parse().unwrap(), to.parse().unwrap()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            packet.truncate(length.max(20));
            packet[0] = 0x45;
            let total = packet.len() as u16;
            packet[2..4].copy_from_slice(&total.to_be_bytes());
            packet[12..16].copy_from_slice(&from.octets());
            packet[16..20].copy_from_slice(&to.octets());
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            packet[0] = 0x60;
            let payload = (packet.len() - 40) as u16;
            packet[4..6].copy_from_slice(&payload.to_be_bytes());
            packet[8..24].copy_from_slice(&from.octets());
            packet[24..40].copy_from_slice(&to.octets());
        }
        _ => panic!("mixed families"),
    }
    packet
}
