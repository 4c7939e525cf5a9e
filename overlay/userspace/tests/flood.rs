//! A real device in a flood of handshake initiations from a stranger.
#![allow(clippy::unwrap_used)]

mod lab;

use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, Ordering};

use base64::Engine as _;
use lab::Kind::MeshWg;
use lab::{Site, join, wait_for};
use mesh_wg::key::{PrivateKey, PublicKey};
use mesh_wg::noise::{HANDSHAKE_SPACE, Tunnel};

/// An initiation that a device with this key looks at: its first MAC is right.
fn initiation(public: &str) -> Vec<u8> {
    let key: [u8; 32] = base64::engine::general_purpose::STANDARD.decode(public).unwrap().try_into().unwrap();
    let stranger = PrivateKey::new([9; 32]).unwrap();
    let mut message = vec![0; HANDSHAKE_SPACE];
    let mut tunnel = Tunnel::new(&stranger, &PublicKey::new(key), None, 1).unwrap();
    assert_eq!(tunnel.initiate(&mut message), Some(HANDSHAKE_SPACE));
    message
}

#[test]
fn in_a_flood_the_kernel_drops_strangers_and_tunnels_and_peers_get_through() {
    need!("in_a_flood_the_kernel_drops_strangers_and_tunnels_and_peers_get_through", "ping");
    let site = |n| Site::with(MeshWg, n, "LOG_LEVEL=info MESH_WG_LOG_FILE=/run/log");
    let (a, b) = join(site(1), site(2), "192.0.2.2", "");
    a.host.wait_ping("10.0.0.2");
    a.host.run("ip addr add 192.0.2.77/24 dev v0");
    let log = || std::fs::read_to_string(b.host.path("/run/log")).unwrap();
    let (message, over) = (initiation(&b.public), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            a.host.inside(|| {
                let socket = UdpSocket::bind("192.0.2.77:7").unwrap();
                while !over.load(Ordering::Relaxed) {
                    // Answers find nobody; what that says about the socket does not matter.
                    let _ = socket.send_to(&message, "192.0.2.2:51820");
                }
            });
        });
        // Also when something in between fails, so that the test ends.
        let verdict = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            wait_for("the kernel drops", || log().contains("that the kernel lets through"));
            let pings = a.host.run("ping -c 20 -i 0.05 -W 2 10.0.0.2");
            assert!(pings.contains(" 0% packet loss"), "{pings}");
            a.host.run(&format!("wg set wg0 peer {} remove", b.public));
            a.peer(&b, 2, "endpoint 192.0.2.2:51820");
            a.host.wait_ping("10.0.0.2");
        }));
        over.store(true, Ordering::Relaxed);
        verdict.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
    let all = "shares=[65536, 65536, 65536]";
    wait_for("the kernel lets all through again", || log().lines().last().is_some_and(|l| l.contains(all)));
}
