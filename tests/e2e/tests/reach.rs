//! The status matrix: each fault of a host, and what both ends say of it. Handshakes and probes go on in all of them.

mod mesh;

use mesh::Mesh;

const BEGIN: &str = "- handshakes: all\n- expect: {matrix: pods}\n\
                     - status: {nodes: all, where: [{path: /ready, equals: true}, {path: /problems, count: 0}]}\n";

/// A fault of aws-1: the commands that make it and take it away, and what the two ends say of it.
struct Fault {
    name: &'static str,
    make: &'static str,
    undo: &'static str,
    here: &'static str,
    there: &'static str,
    ready: bool,
}

const UNREACHED: &str = "peer-unreached";

fn matrix(test: &str, faults: &[Fault]) {
    let mut mesh = Mesh::new(test);
    mesh.sites("- {name: aws, nodes: 1, underlay: dual}\n- {name: gcp, nodes: 1, underlay: dual}\n")
        .steps(BEGIN);
    // Packets of pods, both ways: some faults show by them alone.
    mesh.steps(
        "- traffic: {start: pods, from: gcp-1-pod-1, to: aws-1-pod-1, family: ipv4, packetsPerSecond: 20}\n",
    );
    for Fault { name, make, undo, here, there, ready } in faults {
        let exec = |what: &str, command: &str| {
            format!("- name: {name}, {what}\n  exec: {{on: aws-1, command: \"{command}\"}}\n")
        };
        let says = |node: &str, code: &str| {
            format!(
                "- status: {{nodes: {node}, where: [{{path: /errors, contains: \"{code}: \"}}]}}\n  timeout: 30s\n"
            )
        };
        mesh.steps(&exec("made", make)).steps(&says("aws-1", here)).steps(&says("gcp-1", there));
        if *there == UNREACHED {
            let state = "- status: {nodes: gcp-1, where: [{path: /peers/0/state, equals: unreached}]}\n";
            mesh.steps(state);
        }
        mesh.steps(&format!("- status: {{nodes: aws-1, where: [{{path: /ready, equals: {ready}}}]}}\n"));
        mesh.steps(&exec("undone", undo)).steps("- expect: {matrix: pods}\n  timeout: 30s\n");
        mesh.steps(
            "- status: {nodes: all, where: [{path: /ready, equals: true}, {path: /problems, count: 0}]}\n  timeout: 90s\n",
        );
    }
    mesh.steps("- traffic: {stop: pods, maxLost: 1000000}\n").passes();
}

#[test]
fn what_takes_packets_is_told_at_both_ends() {
    matrix(
        "reach-taken",
        &[
            Fault {
                name: "a rule of others ahead of ours",
                make: "ip route add default via $(ip route show default | awk '{print $3; exit}') dev eth0 table 51820 && ip rule add not fwmark 51820 table 51820",
                undo: "ip rule del not fwmark 51820 table 51820 && ip route flush table 51820",
                here: "routing-rule-ahead",
                there: UNREACHED,
                ready: false,
            },
            Fault {
                name: "a firewall on what the host sends",
                make: "nft 'add table inet hostile; add chain inet hostile o { type filter hook output priority 0; }; add rule inet hostile o oifname sennit0 drop'",
                undo: "nft delete table inet hostile",
                here: UNREACHED,
                there: UNREACHED,
                ready: false,
            },
        ],
    );
}

#[test]
fn pods_that_are_cut_off_are_told() {
    matrix(
        "reach-forwarding",
        &[
            Fault {
                name: "no forwarding",
                make: "sysctl -qw net.ipv4.ip_forward=0",
                undo: "sysctl -qw net.ipv4.ip_forward=1",
                here: "forwarding-off",
                there: "peer-pods-cut-off",
                ready: false,
            },
            Fault {
                name: "no forwarding by the mesh interface",
                make: "sysctl -qw net.ipv4.conf.sennit0.forwarding=0",
                undo: "sysctl -qw net.ipv4.conf.sennit0.forwarding=1",
                here: "forwarding-off",
                there: "peer-pods-cut-off",
                ready: false,
            },
            Fault {
                name: "a firewall on what the host forwards",
                make: "nft 'add table ip filter; add chain ip filter FORWARD { type filter hook forward priority 0; policy drop; }'",
                undo: "nft delete table ip filter",
                here: "forwarding-dropped",
                there: "peer-pods-cut-off",
                ready: false,
            },
        ],
    );
}

/// A host that lets nothing in by the mesh interface forwards pods' packets all the same.
#[test]
fn a_closed_host_raises_no_alarm() {
    let mut mesh = Mesh::new("reach-closed");
    mesh.sites("- {name: aws, nodes: 1, underlay: dual}\n- {name: gcp, nodes: 1, underlay: dual}\n")
        .steps(BEGIN)
        .steps("- exec: {on: aws-1, command: \"nft 'add table inet host; add chain inet host i { type filter hook input priority 0; }; add rule inet host i iifname sennit0 drop'\"}\n")
        .steps("- always: {for: 20s, step: {status: {nodes: all, where: [{path: /ready, equals: true}, {path: /problems, count: 0}]}}}\n")
        .steps("- expect: {matrix: pods}\n")
        .passes();
}

/// Hosts without IPv6: for all interfaces, or for those that are made new.
#[test]
fn hosts_without_ipv6_speak_ipv4() {
    for switch in ["all", "default"] {
        let mut mesh = Mesh::new(&format!("reach-no-ipv6-{switch}"));
        let check = format!(
            "{} install-check --config /run/netlab/private/agent.yaml || true",
            e2e::programs().join("mesh-agent").display()
        );
        mesh.sites(
            "- {name: aws, families: [ipv4], prefixes: [10.1.0.0/16]}\n- {name: gcp, families: [ipv4], prefixes: [10.2.0.0/16]}\n",
        )
        .steps("- handshakes: all\n- expect: {matrix: pods}\n- stop: aws-1\n- kill: {nodes: aws-1, target: device}\n")
        .steps(&format!("- exec: {{on: aws-1, command: sysctl -qw net.ipv6.conf.all.forwarding=0 net.ipv6.conf.{switch}.disable_ipv6=1}}\n"))
        .steps(&format!("- exec: {{on: aws-1, command: \"{check}\", contains: net.ipv6.conf.{switch}.disable_ipv6}}\n"))
        .steps("- start: aws-1\n- expect: {matrix: pods}\n  timeout: 30s\n")
        .steps("- status: {nodes: aws-1, where: [{path: /ready, equals: true}, {path: /errors, contains: disable_ipv6}]}\n  timeout: 30s\n")
        .steps("- status: {nodes: gcp-1, where: [{path: /ready, equals: true}, {path: /peers/0/state, equals: established}]}\n")
        .passes();
    }
}
