//! Checks that no lease narrows what is protected: a real DHCP server on the underlay's LAN, a real client on the
//! node, traffic with a marker, and every link of the underlay recorded. One test proves that a leak would be seen.

mod mesh;

use mesh::Mesh;
use meshlab::Options;

const SITES: &str = "- {name: aws, nodes: 1, underlay: dual}\n- {name: gcp, nodes: 1, underlay: dual}\n";
/// Leaves only what nodes hold to be known, and the underlay's MTU to what the interface has.
const NO_SITES: &str = "sites: null\nunderlay: {mtu: null}\n";
const WITH_SITES: &str = "underlay: {mtu: null}\n";

const BEGIN: &str = r"- capture: underlay
- handshakes: all
- expect: {matrix: pods}
- traffic: {start: out4, from: aws-1-pod-1, to: gcp-1-pod-1, family: ipv4, packetsPerSecond: 200}
- traffic: {start: out6, from: aws-1-pod-1, to: gcp-1-pod-1, family: ipv6, packetsPerSecond: 200}
- traffic: {start: back, from: gcp-1-pod-1, to: aws-1-pod-1, packetsPerSecond: 200}
";

const END: &str = r"- traffic: {stop: out4, maxLost: 1000000}
- traffic: {stop: out6, maxLost: 1000000}
- traffic: {stop: back, maxLost: 1000000}
- assertNoCleartext: {}
";

/// Agent and device die and come back while the lease is there.
const REBORN: &str = r"- kill: {nodes: aws}
- kill: {nodes: aws, target: device}
- always: {for: 1s, step: {expect: {matrix: pods, verdict: deny}}}
- start: aws
";

/// The client has taken its own routes back; the LAN's own ones may have gone with them.
const RELEASED: &str = r"- dhcp: {release: aws-1}
- name: the node has its way to the router
  exec:
    on: aws-1
    command: |
      ip link show eth0 | grep -q 'mtu 1500' || exit 1
      ip addr replace 2001:db8:1::b/64 dev eth0 nodad
      ip route replace default via 198.18.1.1 dev eth0
      ip -6 route replace default via 2001:db8:1::1 dev eth0
- status: {nodes: aws, where: [{path: /errors, notContains: an underlay address of this node}, {path: /errors, notContains: MTU of}]}
- handshakes: all
  timeout: 60s
- expect: {matrix: pods}
  timeout: 60s
";

fn told(address: &str, prefix: &str) -> String {
    let text = format!("{address} on eth0, an underlay address of this node, lies inside of {prefix}");
    format!("- status: {{nodes: aws, where: [{{path: /errors, contains: \"{text}\"}}]}}\n")
}

/// Addresses and routes of the other site's pods, by DHCP and DHCPv6.
fn leased(test: &str, config: &str) {
    let mut mesh = Mesh::new(test);
    mesh.sites(SITES)
        .config(config)
        .steps(BEGIN)
        .steps("- name: option 121\n  dhcp: {lease: aws-1, address: 10.2.0.77/24, routes: [10.2.0.0/25, 10.2.0.128/25, 10.0.0.0/8]}\n")
        .steps(&told("10.2.0.77", "10.2.0.0/"))
        .steps("- exec: {on: aws-1, command: ip route, contains: [\"10.2.0.0/25 via 10.2.0.1 dev eth0 proto dhcp\"]}\n")
        .steps("- dhcp: {lease: aws-1, address: \"fd00:2::77/64\"}\n")
        .steps(&told("fd00:2::77", "fd00:2::/"))
        .steps("- exec: {on: aws-1, command: ip -6 route, contains: [\"fd00:2::/64 dev eth0 proto ra\"]}\n")
        .steps("- always: {for: 2s, step: {expect: {matrix: pods}}}\n")
        .steps(REBORN)
        .steps("- handshakes: all\n  timeout: 60s\n- expect: {matrix: pods}\n  timeout: 30s\n")
        .steps(&told("10.2.0.77", "10.2.0.0/"))
        .steps(&told("fd00:2::77", "fd00:2::/"))
        .steps(RELEASED)
        .steps(END)
        .passes();
}

#[test]
fn leased_addresses_leak_nothing() {
    leased("lease-address", NO_SITES);
}

#[test]
fn leased_addresses_undo_no_grant() {
    leased("lease-granted", WITH_SITES);
}

/// The lease takes the tunnel's own way: it may break then, and is told.
fn takes_the_default(test: &str, lease: &str) {
    let mut mesh = Mesh::new(test);
    mesh.sites(SITES)
        .config(NO_SITES)
        .steps(BEGIN)
        .steps("- exec: {on: aws-1, command: ip route del default; ip -6 route del default}\n")
        .steps(&format!("- dhcp: {{lease: aws-1, address: 10.2.0.77/24, {lease}}}\n"))
        .steps(&told("10.2.0.77", "10.2.0.0/"))
        .steps("- dhcp: {lease: aws-1, address: \"fd00:2::77/64\", gateway: true}\n")
        .steps(&told("fd00:2::77", "fd00:2::/"))
        .steps("- exec: {on: aws-1, command: ip route; ip -6 route, contains: [default via 10.2.0.1 dev eth0, default via fe80]}\n")
        .steps(REBORN)
        .steps("- always: {for: 2s, step: {exec: {on: aws-1, command: nft list table inet sennit, contains: [10.2.0.0/24, \"fd00:2::/64\"]}}}\n")
        .steps(&told("10.2.0.77", "10.2.0.0/"))
        .steps(RELEASED)
        .steps(END)
        .passes();
}

#[test]
fn a_leased_gateway_leaks_nothing() {
    takes_the_default("lease-gateway", "gateway: true");
}

#[test]
fn a_leased_default_route_leaks_nothing() {
    takes_the_default("lease-default", "routes: [0.0.0.0/0]");
}

/// An MTU below what IPv6 needs takes the node's IPv6 away from `eth0`, and nothing from the guard.
fn narrow(test: &str, mtu: u16, steps: &str) {
    let mut mesh = Mesh::new(test);
    mesh.sites(SITES)
        .config(NO_SITES)
        .steps(BEGIN)
        .steps(&format!("- dhcp: {{lease: aws-1, address: 10.2.0.77/24, routes: [10.2.0.0/25], mtu: {mtu}}}\n"))
        .steps(&format!(
            "- exec: {{on: aws-1, command: ip link show dev eth0, contains: mtu {mtu}}}\n- status: {{nodes: aws, where: [{{path: /errors, contains: the underlay's MTU of {mtu} bytes}}]}}\n"
        ))
        .steps(steps)
        .steps("- always: {for: 1s, step: {exec: {on: aws-1, command: nft list table inet sennit, contains: [10.2.0.0/24, \"fd00:2::/64\"]}}}\n")
        .steps("- exec: {on: aws-1, command: ip route show table 5182; ip -6 route show table 5182, contains: [blackhole 10.2.0.0/24, \"blackhole fd00:2::/64\"]}\n")
        .steps(REBORN)
        .steps(RELEASED)
        .steps(END)
        .passes();
}

#[test]
fn a_small_leased_mtu_narrows_nothing() {
    narrow("lease-mtu", 576, "- expect: {matrix: pods}\n  timeout: 30s\n");
}

#[test]
fn the_smallest_leased_mtu_narrows_nothing() {
    narrow("lease-mtu-least", 68, "");
}

/// The LAN says that this node's own pods are on it: packets for one that is gone do not follow.
#[test]
fn a_lease_among_own_pods_leaks_nothing() {
    let gone = r"- exec: {on: gcp-1-pod-1, command: ping -c5 -i0.2 -W1 10.1.0.50; ping -c5 -i0.2 -W1 fd00:1::50; true}
- expect: {matrix: pods}
";
    let mut mesh = Mesh::new("lease-own");
    mesh.sites(SITES)
        .config(NO_SITES)
        .steps(BEGIN)
        .steps("- dhcp: {lease: aws-1, address: 10.1.0.99/24, server: 10.1.0.200, routes: [10.1.0.0/25]}\n")
        .steps(&told("10.1.0.99", "10.1.0.0/"))
        .steps("- dhcp: {lease: aws-1, address: \"fd00:1::99/64\", server: \"fd00:1::200\"}\n")
        .steps(&told("fd00:1::99", "fd00:1::/"))
        .steps(gone)
        .steps(REBORN)
        .steps("- handshakes: all\n  timeout: 60s\n- expect: {matrix: pods}\n  timeout: 30s\n")
        .steps(gone)
        .steps(RELEASED)
        .steps(END)
        .passes();
}

/// The mutation: without guard and routes of the mesh the packets follow the lease, and this suite sees them.
#[test]
fn a_lease_without_the_guard_is_seen() {
    if !e2e::can_run("a_lease_without_the_guard_is_seen") {
        return;
    }
    let mut mesh = Mesh::new("lease-mutation");
    mesh.sites(SITES)
        .config(NO_SITES)
        .steps(BEGIN)
        .steps("- dhcp: {lease: aws-1, address: 10.2.0.77/24, routes: [10.2.0.0/25]}\n")
        .steps("- dhcp: {lease: aws-1, address: \"fd00:2::77/64\"}\n")
        .steps("- always: {for: 1s, step: {expect: {matrix: pods}}}\n")
        .steps("- kill: {nodes: aws}\n")
        .steps("- exec: {on: aws-1, command: nft delete table inet sennit; ip route flush table 5182; ip -6 route flush table 5182}\n")
        .steps("- always: {for: 2s, step: {exec: {on: aws-1, command: \"true\"}}}\n")
        .steps(END);
    let options = Options { bin_dir: Some(e2e::programs()), ..Options::default() };
    let Some(report) =
        e2e::ran("a_lease_without_the_guard_is_seen", meshlab::run_text(&mesh.text(), options))
    else {
        return;
    };
    let text = report.to_text();
    let failed: Vec<_> = text.lines().skip_while(|line| !line.contains("FAILED")).take(4).collect();
    assert!(failed.iter().any(|line| line.contains("marker")), "no marker was seen:\n{text}");
}
