//! Real processes in network namespaces: every way to move packets in bulk, and each of them switched off.
#![allow(clippy::unwrap_used)]

mod lab;

use lab::Kind::{MeshWg, WireguardGo};
use lab::{Host, MESH_WG, Site, join, transfer, wait_for};

const SIZE: usize = 4 << 20;

fn features(site: &Site) -> String {
    site.host.run(&format!("{MESH_WG} --features wg0"))
}

/// A counter of the kernel's, such as `TcpInCsumErrors`; 0 where it has counted nothing.
fn counter(host: &Host, name: &str) -> u64 {
    let all = host.run("nstat -asz");
    let line = all.lines().find(|line| line.split_whitespace().next() == Some(name));
    line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok()).unwrap_or_else(|| panic!("no {name}"))
}

fn both_ways(a: &Site, b: &Site, what: &str) {
    in_order([&a.host, &b.host], what, || {
        for (from, to, addresses) in [(a, b, ["10.0.0.2", "fd00::2"]), (b, a, ["10.0.0.1", "fd00::1"])] {
            for address in addresses {
                assert!(transfer(&from.host, &to.host, address, SIZE), "{what}, to {address}");
            }
        }
    });
    for host in [&a.host, &b.host] {
        for name in ["TcpInCsumErrors", "UdpInCsumErrors", "Udp6InCsumErrors"] {
            assert_eq!(counter(host, name), 0, "{what}: {name}");
        }
    }
}

/// What TCP has seen overtake other segments.
fn overtaken(hosts: [&Host; 2]) -> u64 {
    let names = ["TcpExtTCPSACKReorder", "TcpExtTCPRenoReorder", "TcpExtTCPTSReorder"];
    hosts.iter().flat_map(|host| names.map(|name| counter(host, name))).sum()
}

/// Nothing overtakes. Where much is lost at once TCP takes a segment for overtaken whose acknowledgement was lost, or had no room among
/// the four blocks of one (RFC 2018): then, and not if it does so each time, it is asked again.
fn in_order(hosts: [&Host; 2], what: &str, mut run: impl FnMut()) {
    for _ in 0..4 {
        let before = overtaken(hosts);
        run();
        if overtaken(hosts) == before {
            return;
        }
    }
    let counters = hosts.map(|host| host.run("nstat -as"));
    panic!("{what}: segments overtake others\n{}\n{}", counters[0], counters[1]);
}

#[test]
fn with_each_feature_switched_off_everything_arrives() {
    need!("with_each_feature_switched_off_everything_arrives", "python3", "ping", "nstat");
    for off in ["", "tun-uso", "tun-tso", "udp-gso", "udp-gro", "tun-tso,udp-gso,udp-gro"] {
        let environment = format!("MESH_WG_DISABLE={off}");
        let (a, b) = (Site::with(MeshWg, 1, &environment), Site::new(MeshWg, 2));
        let (a, b) = join(a, b, "192.0.2.2", "");
        a.host.wait_ping("10.0.0.2");
        let shown = features(&a);
        for name in ["tun-tso", "tun-uso", "udp-gso", "udp-gro"] {
            let wanted = !off.split(',').any(|word| word == name || (word == "tun-tso" && name == "tun-uso"));
            assert_eq!(shown.contains(&format!("{name}=on\n")), wanted, "without {off:?}: {shown}");
        }
        both_ways(&a, &b, &format!("without {off:?}"));
        for size in [0, 1, 1392, 1393, 5000, 60_000] {
            a.host.run(&format!("ping -c 1 -W 5 -s {size} 10.0.0.2"));
            b.host.run(&format!("ping -c 1 -W 5 -s {size} fd00::1"));
        }
    }
}

#[test]
fn in_bulk_it_talks_to_wireguard_go_without_an_error() {
    need!("in_bulk_it_talks_to_wireguard_go_without_an_error", "wireguard-go", "python3", "ping", "nstat");
    for endpoint in ["192.0.2.2", "[2001:db8::2]"] {
        let (a, b) = join(Site::new(MeshWg, 1), Site::new(WireguardGo, 2), endpoint, "");
        a.host.wait_ping("10.0.0.2");
        both_ways(&a, &b, endpoint);
    }
}

#[test]
fn threads_side_by_side_keep_every_flow_in_order() {
    need!("threads_side_by_side_keep_every_flow_in_order", "iperf3", "python3", "ping", "nstat");
    let threads = "MESH_WG_THREADS=4";
    let (a, b) = join(Site::with(MeshWg, 1, threads), Site::with(MeshWg, 2, threads), "192.0.2.2", "");
    a.host.wait_ping("10.0.0.2");
    assert!(features(&a).contains("threads=4\n"));
    both_ways(&a, &b, "four threads");
    let mut server = b.host.spawn("iperf3 -s -B 10.0.0.2");
    // Small and large datagrams of several flows, and TCP of several flows in both directions at once.
    for load in ["-u -b 0 -l 64 -t 2 -P 3", "-u -b 0 -l 1300 -t 2 -P 3", "-P 4 -n 64M", "-P 3 --bidir -n 32M"]
    {
        let mut report = String::new();
        in_order([&a.host, &b.host], load, || {
            wait_for("iperf3", || {
                let output = a.host.try_run(&format!("iperf3 -c 10.0.0.2 -J {load}"));
                report = String::from_utf8(output.stdout).unwrap();
                output.status.success()
            });
        });
        for count in report.split("\"out_of_order\":").skip(1) {
            assert_eq!(count.trim_start().split([',', '\n', '}']).next().unwrap().trim(), "0", "{load}");
        }
    }
    server.kill().unwrap();
    server.wait().unwrap();
}

#[test]
fn an_underlay_too_small_for_runs_of_datagrams_gets_single_ones() {
    need!("an_underlay_too_small_for_runs_of_datagrams_gets_single_ones", "python3", "ping", "nstat");
    let (a, b) = join(Site::new(MeshWg, 1), Site::new(MeshWg, 2), "192.0.2.2", "");
    a.host.wait_ping("10.0.0.2");
    for host in [&a.host, &b.host] {
        host.run("ip link set v0 mtu 1300");
    }
    both_ways(&a, &b, "underlay of 1300 bytes");
    assert!(counter(&a.host, "IpFragCreates") > 0, "the datagrams were too large");
    assert!(features(&a).contains("udp-gso=on\n"), "others may have a larger underlay");
    for host in [&a.host, &b.host] {
        host.run("ip link set v0 mtu 1500");
    }
    both_ways(&a, &b, "underlay of 1500 bytes again");
}

#[test]
fn an_underlay_without_offloads_carries_all_the_same() {
    need!("an_underlay_without_offloads_carries_all_the_same", "ethtool", "python3", "ping", "nstat");
    let (a, b) = join(Site::new(MeshWg, 1), Site::new(MeshWg, 2), "192.0.2.2", "");
    a.host.wait_ping("10.0.0.2");
    for host in [&a.host, &b.host] {
        host.run("ethtool -K v0 tx off gso off gro off tso off");
    }
    both_ways(&a, &b, "an underlay without offloads");
}
