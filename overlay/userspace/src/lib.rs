//! A userspace WireGuard device: a drop-in for wireguard-go that works with wg(8) and wg-quick(8).
//!
//! What flows:
//!
//! ```text
//! TUN --super-packet--> offload::split --> Batch::packets --route--> Peer --seal--> Output::datagram --> run --> UDP
//! UDP --run--> Batch::train --receiver index--> Peer --open, check source--> Output::packet --> offload::merge --> TUN
//! time --> Device::tick --> handshakes, keepalives
//! wg(8) --> uapi::Reader --> DeviceUpdate --> Device::apply;  Device::snapshot --> uapi::render_get --> wg(8)
//! ```
//!
//! [`device`], [`peer`], [`peer_table`], [`allowed_ips`], [`noise`], [`flood`], [`guard`], [`shed`], [`staging`], [`roster`], [`packet`] and
//! [`offload`] are the core: no I/O, the time is an argument (boringtun's own timers excepted, which read the boot-time
//! clock), and what comes out goes through [`peer::Output`]. [`event_loop`], [`worker`], [`lane`], [`pool`], [`network`]
//! and [`sys`] are the I/O; replacing them touches neither protocol nor configuration. [`uapi`] parses and renders as
//! pure functions and serves the socket on threads of its own.
//!
//! Locks are taken in one order, the timers' sweep before the peer table before a peer before the roster. Traffic reads
//! the table, configuration writes it, peer by peer. Nobody waits for a turn in a [`lane`] with any of them.
//!
//! What it never does: send a packet that is not encrypted; take a packet whose inner source is not among the
//! sender's allowed IPs; answer anyone who does not know our public key; change a peer's endpoint on anything but
//! an authentic message; allocate for a packet once a session is up; keep more than a bounded number of packets
//! without one; log a key that is not public; know of clusters, nodes or meshes.

pub mod allowed_ips;
pub mod config;
pub mod configure;
pub mod device;
pub mod event_loop;
pub mod features;
pub mod flood;
pub mod guard;
pub mod key;
pub mod lane;
pub mod name;
pub mod network;
pub mod noise;
pub mod offload;
pub mod packet;
pub mod peer;
pub mod peer_table;
pub mod pool;
pub mod roster;
pub mod shed;
pub mod staging;
pub mod start;
pub mod sys;
pub mod uapi;
pub mod worker;
