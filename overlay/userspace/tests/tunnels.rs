//! Real processes in network namespaces: traffic between mesh-wg and wireguard-go, and itself.
#![allow(clippy::unwrap_used)]

mod lab;

use std::time::Instant;

use lab::Kind::{MeshWg, WireguardGo};
use lab::{iperf, pair, transfer, wait_for};

const AMOUNT: &str = "-n 16M";

#[test]
fn as_initiator_it_talks_to_wireguard_go_both_ways() {
    need!("as_initiator_it_talks_to_wireguard_go_both_ways", "wireguard-go", "iperf3", "ping");
    let (a, b) = pair(MeshWg, WireguardGo, "192.0.2.2", "");
    a.host.wait_ping("10.0.0.2");
    a.host.wait_ping("fd00::2");
    assert!(iperf(&a.host, &b.host, "10.0.0.2", AMOUNT) > 1.0);
    assert!(iperf(&a.host, &b.host, "10.0.0.2", &format!("{AMOUNT} -R")) > 1.0);
    assert_ne!(a.show("latest-handshakes"), "0");
    let (received, sent) = {
        let line = a.host.run("wg show wg0 transfer");
        let mut columns = line.split_whitespace().skip(1).map(|n| n.parse::<u64>().unwrap());
        (columns.next().unwrap(), columns.next().unwrap())
    };
    // iperf3 ends when it has written its 16 MB; what is still under way then may never leave.
    assert!(received > 8 << 20 && sent > 8 << 20, "{received} {sent}");
}

#[test]
fn as_responder_it_talks_to_wireguard_go_both_ways() {
    need!("as_responder_it_talks_to_wireguard_go_both_ways", "wireguard-go", "iperf3", "ping");
    let (a, b) = pair(WireguardGo, MeshWg, "192.0.2.2", "");
    a.host.wait_ping("10.0.0.2");
    a.host.wait_ping("fd00::2");
    assert!(iperf(&b.host, &a.host, "10.0.0.1", AMOUNT) > 1.0);
    assert!(iperf(&b.host, &a.host, "10.0.0.1", &format!("{AMOUNT} -R")) > 1.0);
    assert!(iperf(&a.host, &b.host, "fd00::2", AMOUNT) > 1.0);
    assert_ne!(b.show("latest-handshakes"), "0");
    assert_eq!(b.show("endpoints"), "192.0.2.1:51820", "learnt from the handshake");
}

#[test]
fn ipv6_outside_carries_both_families() {
    need!("ipv6_outside_carries_both_families", "wireguard-go", "iperf3", "ping");
    let (a, b) = pair(MeshWg, WireguardGo, "[2001:db8::2]", "");
    a.host.wait_ping("10.0.0.2");
    a.host.wait_ping("fd00::2");
    assert!(iperf(&a.host, &b.host, "fd00::2", "-n 4M") > 1.0);
    assert_eq!(a.show("endpoints"), "[2001:db8::2]:51820");
    assert_eq!(b.show("endpoints"), "[2001:db8::1]:51820");
}

#[test]
fn a_link_local_endpoint_with_its_scope_works() {
    need!("a_link_local_endpoint_with_its_scope_works", "ping");
    let (a, b) = pair(MeshWg, MeshWg, "192.0.2.2", "");
    let addresses = b.host.run("ip -o -6 addr show dev v0 scope link");
    let address = addresses.split_whitespace().nth(3).unwrap().split('/').next().unwrap();
    wait_for("duplicate address detection", || {
        !a.host.run("ip -o -6 addr show dev v0 scope link").contains("tentative")
            && !b.host.run("ip -o -6 addr show dev v0 scope link").contains("tentative")
    });
    a.host.run(&format!("wg set wg0 peer {} endpoint [{address}%v0]:51820", b.public));
    a.host.wait_ping("10.0.0.2");
    assert!(a.show("endpoints").starts_with(&format!("[{address}%")), "{}", a.show("endpoints"));
}

#[test]
fn large_packets_and_fragments_survive() {
    need!("large_packets_and_fragments_survive", "ping");
    let (a, _b) = pair(MeshWg, MeshWg, "192.0.2.2", "");
    a.host.wait_ping("10.0.0.2");
    for size in [1, 1391, 1392, 5000, 60_000] {
        a.host.run(&format!("ping -c 1 -W 5 -s {size} 10.0.0.2"));
    }
    // A link MTU far above the underlay's: the datagrams are fragmented outside.
    for host in [&a.host, &_b.host] {
        host.run("ip link set wg0 mtu 9000");
    }
    a.host.run("ping -c 1 -W 5 -M do -s 8900 10.0.0.2");
}

#[test]
fn preshared_keys_have_to_agree() {
    need!("preshared_keys_have_to_agree", "wireguard-go", "ping");
    let (a, b) = pair(MeshWg, WireguardGo, "192.0.2.2", "");
    let key = a.host.run("wg genpsk");
    let (at_a, at_b) = (a.host.file("psk", &key), b.host.file("psk", &key));
    a.host.run(&format!("wg set wg0 peer {} preshared-key {at_a}", b.public));
    assert!(!a.host.try_run("ping -c 1 -W 1 10.0.0.2").status.success(), "one side only");
    assert_eq!(a.show("latest-handshakes"), "0");
    b.host.run(&format!("wg set wg0 peer {} preshared-key {at_b}", a.public));
    a.host.wait_ping("10.0.0.2");
    assert_eq!(a.show("preshared-keys"), key.trim());
    // Off again, both sides, while the tunnel runs.
    for (site, other) in [(&a, &b), (&b, &a)] {
        site.host.run(&format!("wg set wg0 peer {} preshared-key /dev/null", other.public));
    }
    a.host.wait_ping("10.0.0.2");
    assert_eq!(a.show("preshared-keys"), "(none)");
}

#[test]
fn a_peer_that_moves_is_followed() {
    need!("a_peer_that_moves_is_followed", "wireguard-go", "ping");
    for kind in [MeshWg, WireguardGo] {
        let (a, b) = pair(kind, MeshWg, "192.0.2.2", "");
        a.host.wait_ping("10.0.0.2");
        assert_eq!(b.show("endpoints"), "192.0.2.1:51820");
        // A new address and a new port at the side that started.
        a.host.run("ip addr add 192.0.2.77/24 dev v0");
        a.host.run("ip addr del 192.0.2.1/24 dev v0");
        a.host.run("ip addr replace 192.0.2.77/24 dev v0");
        a.host.run("wg set wg0 listen-port 4242");
        a.host.wait_ping("10.0.0.2");
        wait_for("the new endpoint", || b.show("endpoints") == "192.0.2.77:4242");
        b.host.run("ping -c 1 -W 2 10.0.0.1");
    }
}

#[test]
fn answers_leave_by_the_address_that_was_asked() {
    need!("answers_leave_by_the_address_that_was_asked", "ping");
    let (a, b) = pair(MeshWg, MeshWg, "192.0.2.2", "");
    // Not the address that the routing table would choose.
    b.host.run("ip addr add 192.0.2.99/24 dev v0");
    a.host.run(&format!("wg set wg0 peer {} endpoint 192.0.2.99:51820", b.public));
    a.host.wait_ping("10.0.0.2");
    assert_eq!(a.show("endpoints"), "192.0.2.99:51820", "had it been answered from .2, this would be .2");
    // The address goes away: traffic from there goes on by the other one.
    b.host.run("ip addr del 192.0.2.99/24 dev v0");
    b.host.wait_ping("10.0.0.1");
    assert_eq!(a.show("endpoints"), "192.0.2.2:51820");
}

#[test]
fn a_keepalive_connects_without_traffic() {
    need!("a_keepalive_connects_without_traffic", "wireguard-go");
    for (first, second) in [(MeshWg, WireguardGo), (WireguardGo, MeshWg)] {
        let (a, b) = pair(first, second, "192.0.2.2", "");
        assert_eq!(a.show("latest-handshakes"), "0");
        a.host.run(&format!("wg set wg0 peer {} persistent-keepalive 1", b.public));
        wait_for("a handshake at both ends", || {
            a.show("latest-handshakes") != "0" && b.show("latest-handshakes") != "0"
        });
        let received = |site: &lab::Site| site.show("transfer").parse::<u64>().unwrap();
        let before = received(&b);
        wait_for("two more keepalives", || received(&b) >= before + 64);
    }
}

#[test]
fn garbage_on_the_port_does_not_disturb_a_tunnel() {
    need!("garbage_on_the_port_does_not_disturb_a_tunnel", "iperf3", "ping", "python3");
    let (a, b) = pair(MeshWg, MeshWg, "192.0.2.2", "");
    a.host.wait_ping("10.0.0.2");
    let script = a.host.file(
        "garbage.py",
        "import os, random, socket\n\
         s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n\
         while True:\n\
         \x20   kind = random.choice([b'', b'\\1\\0\\0\\0', b'\\2\\0\\0\\0', b'\\3\\0\\0\\0', b'\\4\\0\\0\\0'])\n\
         \x20   n = random.choice([0, 1, 16, 28, 60, 88, 144, 1400, 60000])\n\
         \x20   try: s.sendto(kind + os.urandom(n), ('192.0.2.2', 51820))\n\
         \x20   except OSError: pass\n",
    );
    let mut garbage = a.host.spawn(&format!("python3 {script}"));
    let rate = iperf(&a.host, &b.host, "10.0.0.2", "-n 8M");
    a.host.run("ping -c 1 -W 5 10.0.0.2");
    let _ = garbage.kill();
    let _ = garbage.wait();
    assert!(rate > 1.0, "{rate}");
    assert_eq!(b.show("endpoints"), "192.0.2.1:51820");
}

#[test]
fn clients_that_talk_nonsense_or_nothing_do_not_lock_out_wg() {
    need!("clients_that_talk_nonsense_or_nothing_do_not_lock_out_wg", "ping");
    use std::io::Write;
    let (a, _b) = pair(MeshWg, MeshWg, "192.0.2.2", "");
    a.host.wait_ping("10.0.0.2");
    let mut idle = Vec::new();
    for i in 0..100 {
        let mut client = a.host.uapi_client("wg0");
        let _ = match i % 4 {
            0 => Ok(()),
            1 => client.write_all(b"set=1\nprivate_key="),
            2 => client.write_all(&[0xff; 3000]),
            _ => client.write_all(b"get=1\n\nget=1\n\nwhat\n\n"),
        };
        idle.push(client);
    }
    let began = Instant::now();
    assert!(a.host.run("wg show wg0").contains("peer:"));
    assert!(began.elapsed().as_secs() < 5);
    a.host.run("ping -c 1 -W 2 10.0.0.2");
}

#[test]
fn it_runs_where_there_is_no_ipv6() {
    need!("it_runs_where_there_is_no_ipv6", "ping", "sysctl");
    let (a, b) = pair(MeshWg, MeshWg, "192.0.2.2", "");
    for host in [&a.host, &b.host] {
        host.run("sysctl -qw net.ipv6.conf.all.disable_ipv6=1");
        host.run("wg set wg0 listen-port 51821");
        host.run("wg set wg0 listen-port 51820");
    }
    a.host.wait_ping("10.0.0.2");
}

#[test]
fn lost_runs_of_datagrams_are_sent_again_and_nothing_is_damaged() {
    need!("lost_runs_of_datagrams_are_sent_again_and_nothing_is_damaged", "ping", "python3", "nft");
    let (a, b) = pair(MeshWg, MeshWg, "192.0.2.2", "");
    a.host.wait_ping("10.0.0.2");
    // What arrives joined is lost joined: one of a hundred, up to 64 datagrams at once.
    for host in [&a.host, &b.host] {
        let rules = host.file(
            "loss.nft",
            "table inet loss { chain input { type filter hook input priority 0;\n\
             udp dport 51820 numgen random mod 100 == 0 counter drop\n}\n}\n",
        );
        host.run(&format!("nft -f {rules}"));
    }
    for (from, to, address) in [(&a, &b, "10.0.0.2"), (&b, &a, "fd00::1")] {
        assert!(transfer(&from.host, &to.host, address, 100 << 20), "{address}");
    }
    let counter = b.host.run("nft list table inet loss");
    assert!(!counter.contains("packets 0 "), "nothing was lost: {counter}");
}
