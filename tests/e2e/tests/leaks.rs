//! Nothing leaves in clear, whatever happens to agent, device and host: each step of their lives under traffic with a marker, while every
//! link of the underlay is recorded. And the proof that this would be seen: with the guard taken away, it is.

mod mesh;

use mesh::Mesh;
use meshlab::Options;

const SITES: &str = "- {name: aws, nodes: 1, underlay: dual}\n- {name: gcp, nodes: 1, underlay: dual}\n";

const BEGIN: &str = r"- capture: underlay
- handshakes: all
- expect: {matrix: pods}
- traffic: {start: out4, from: aws-1-pod-1, to: gcp-1-pod-1, family: ipv4, packetsPerSecond: 500}
- traffic: {start: out6, from: aws-1-pod-1, to: gcp-1-pod-1, family: ipv6, packetsPerSecond: 500}
- traffic: {start: back, from: gcp-1-pod-1, to: aws-1-pod-1, packetsPerSecond: 500}
- name: it runs before anything happens
  always: {for: 500ms, step: {expect: {matrix: pods}}}
";

const END: &str = r"- traffic: {stop: out4, maxLost: 1000000}
- traffic: {stop: out6, maxLost: 1000000}
- traffic: {stop: back, maxLost: 1000000}
- assertNoCleartext: {}
";

/// All is well again.
const WELL: &str = r"- handshakes: all
  timeout: 60s
- expect: {matrix: pods}
  timeout: 30s
";

fn life(test: &str, steps: &str, well: bool) {
    let mut mesh = Mesh::new(test);
    mesh.sites(SITES).steps(BEGIN).steps(steps).steps(if well { WELL } else { "" }).steps(END).passes();
}

/// A mesh agent's command on a node.
fn agent(command: &str) -> String {
    format!(
        "{} {command} --config /run/netlab/private/agent.yaml",
        e2e::programs().join("mesh-agent").display()
    )
}

/// Puts out the node's own routes and sends everything by the default route, as a routing daemon gone wrong does.
const WRONG_ROUTES: &str = r"- name: somebody routes the other site's pods over the underlay
  exec: {on: aws-1, command: ip rule add pref 100 lookup main && ip -6 rule add pref 100 lookup main}
- always: {for: 2s, step: {expect: {pairs: [{from: aws-1-pod-1, to: gcp-1-pod-1, family: ipv4, verdict: deny}]}}}
";

#[test]
fn an_agent_that_dies_after_each_of_its_first_writes() {
    dies_after("leak-crash-first", 1..=15);
}

#[test]
fn an_agent_that_dies_after_each_of_its_later_writes() {
    dies_after("leak-crash-later", (16..=30).chain([40, 60]));
}

fn dies_after(test: &str, writes: impl Iterator<Item = u32>) {
    let mut mesh = Mesh::new(test);
    mesh.sites(SITES).steps("- capture: underlay\n- handshakes: all\n- expect: {matrix: pods}\n");
    for writes in writes {
        let command = format!(
            "{} --keep-key >/dev/null 2>&1; SENNIT_CRASH_AFTER={writes} timeout 5 {} >/dev/null 2>&1; nft list table inet sennit >/dev/null",
            agent("cleanup"),
            agent("run")
        );
        mesh.steps(&format!(
            r#"- stop: aws
- name: an agent dies after write {writes}
  exec: {{on: aws-1, command: "{command}"}}
- traffic: {{start: out{writes}, from: aws-1-pod-1, to: gcp-1-pod-1, family: ipv4, packetsPerSecond: 500}}
- traffic: {{start: six{writes}, from: aws-1-pod-1, to: gcp-1-pod-1, family: ipv6, packetsPerSecond: 500}}
- always: {{for: 200ms, step: {{exec: {{on: aws-1, command: "true"}}}}}}
- start: aws
- traffic: {{stop: out{writes}, maxLost: 100000}}
- traffic: {{stop: six{writes}, maxLost: 100000}}
"#
        ));
    }
    mesh.steps(WELL).steps("- assertNoCleartext: {}\n").passes();
}

#[test]
fn an_agent_that_starts_with_a_configuration_that_is_none() {
    let run = agent("run");
    life(
        "leak-broken-config",
        &format!(
            r#"- kill: {{nodes: aws}}
- kill: {{nodes: aws, target: device}}
- name: without one that was fine it does not start
  exec: {{on: aws-1, command: "cd /run/netlab/private && cp agent.yaml right.yaml && rm state/agent.last-good.yaml && echo 'site: [' > agent.yaml && ! {run} 2>/dev/null"}}
- always: {{for: 2s, step: {{expect: {{matrix: pods, verdict: deny}}}}}}
- exec: {{on: aws-1, command: mv /run/netlab/private/right.yaml /run/netlab/private/agent.yaml}}
- start: aws
"#
        ),
        true,
    );
}

#[test]
fn a_key_that_is_gone() {
    life(
        "leak-key",
        r"- exec: {on: aws-1, command: rm /run/netlab/private/state/keys/private.key}
- restart: {nodes: aws}
",
        true,
    );
}

#[test]
fn a_last_good_state_that_is_gone_with_the_registry() {
    life(
        "leak-state",
        r"- kill: {nodes: aws}
- exec: {on: aws-1, command: rm /run/netlab/private/state/last-good.json && mv /run/netlab/shared/registry /run/netlab/shared/away}
- start: aws
- always: {for: 2s, step: {exec: {on: aws-1, command: nft list table inet sennit, contains: sennit guard}}}
- exec: {on: aws-1, command: mv /run/netlab/shared/away /run/netlab/shared/registry}
",
        true,
    );
}

#[test]
fn a_peer_that_is_revoked() {
    life(
        "leak-revoked",
        r"- exec: {on: aws-1, command: cp /run/netlab/shared/registry/nodes.yaml /run/netlab/private/nodes.yaml}
- name: the operator takes gcp-1 out
  exec:
    on: aws-1
    command: cd /run/netlab/shared/registry && sed s/gcp-1/gone-1/ /run/netlab/private/nodes.yaml > .new && mv .new nodes.yaml
- status: {nodes: aws, where: [{path: /peers, count: 0}]}
- always: {for: 2s, step: {expect: {pairs: [{from: aws-1-pod-1, to: gcp-1-pod-1, verdict: deny}]}}}
- exec: {on: aws-1, command: cd /run/netlab/shared/registry && cp /run/netlab/private/nodes.yaml .new && mv .new nodes.yaml}
",
        true,
    );
}

#[test]
fn a_device_that_dies_with_and_without_its_agent() {
    life(
        "leak-device",
        r"- kill: {nodes: aws, target: device}
- handshakes: all
- kill: {nodes: all}
- kill: {nodes: all, target: device}
- always: {for: 2s, step: {expect: {matrix: pods, verdict: deny}}}
- start: all
",
        true,
    );
}

#[test]
fn a_path_that_changes_its_carrier() {
    life(
        "leak-fallback",
        r#"- block: {at: aws, protocol: udp, port: 51820}
- status: {where: [{path: "/peers/*/path", equals: vxlan}]}
- block: {at: aws, protocol: udp, port: 4789}
- status: {where: [{path: "/peers/*/path", equals: blocked}]}
- unblock: aws
- status: {where: [{path: "/peers/*/path", equals: direct}]}
"#,
        true,
    );
}

#[test]
fn an_interface_that_is_renamed_and_one_that_is_deleted() {
    life(
        "leak-renamed",
        r"- exec: {on: aws-1, command: ip link set sennit0 down && ip link set sennit0 name other0 && ip link set other0 up}
- always: {for: 2s, step: {exec: {on: aws-1, command: nft list table inet sennit, contains: sennit guard}}}
- exec: {on: aws-1, command: ip link set other0 down; ip link del other0; ip link del sennitx4; true}
",
        true,
    );
}

#[test]
fn a_stranger_who_flushes_every_rule() {
    life(
        "leak-flush",
        r"- exec: {on: aws-1, command: nft flush ruleset}
- always: {for: 2s, step: {expect: {matrix: pods}}}
- exec: {on: aws-1, command: nft flush ruleset && ip link del sennit0}
- eventually: {deadline: 5s, step: {exec: {on: aws-1, command: nft list table inet sennit, contains: sennit guard}}}
",
        true,
    );
}

#[test]
fn routes_of_somebody_else() {
    life("leak-routes", WRONG_ROUTES, false);
}

#[test]
fn our_rules_and_routes_taken_away() {
    life(
        "leak-unrouted",
        r"- exec: {on: aws-1, command: ip rule del pref 5182; ip -6 rule del pref 5182; ip route flush table 5182; ip -6 route flush table 5182; true}
",
        true,
    );
}

#[test]
fn an_ipv6_router_advertisement() {
    let advertise = r#"
import socket, struct, time
s = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, socket.if_nametoindex('lan'))
prefix = lambda net: struct.pack('!BBBBIII', 3, 4, 64, 0xc0, 3600, 3600, 0) + socket.inet_pton(socket.AF_INET6, net)
route = lambda net: struct.pack('!BBBBI', 24, 3, 48, 0x08, 3600) + socket.inet_pton(socket.AF_INET6, net)
for _ in range(10):
    s.sendto(struct.pack('!BBHBBHII', 134, 0, 0, 64, 0, 1800, 0, 0) + prefix('fd00:2::') + route('fd00:2::'), ('ff02::1', 0))
    time.sleep(0.1)
"#;
    let advertise = advertise.lines().map(|line| format!("          {line}\n")).collect::<String>();
    life(
        "leak-advertisement",
        &format!(
            r"- exec: {{on: aws-1, command: sysctl -qw net.ipv6.conf.eth0.accept_ra=2 net.ipv6.conf.eth0.accept_ra_rt_info_max_plen=64}}
- name: a router says that the other site's pods are on this LAN
  exec:
    on: router@aws
    command:
      - python3
      - -c
      - |
{advertise}- name: the host has believed it
  exec: {{on: aws-1, command: ip -6 route show fd00:2::/64, contains: eth0}}
- always: {{for: 2s, step: {{expect: {{matrix: pods}}}}}}
- kill: {{nodes: aws}}
- kill: {{nodes: aws, target: device}}
- always: {{for: 2s, step: {{expect: {{matrix: pods, verdict: deny}}}}}}
- start: aws
- name: an underlay address among the other site's pods changes nothing, and is told
  status: {{nodes: aws, where: [{{path: /errors, contains: an underlay address of this node}}]}}
- expect: {{matrix: pods}}
  timeout: 30s
- always: {{for: 2s, step: {{expect: {{matrix: pods}}}}}}
- exec: {{on: aws-1, command: sysctl -qw net.ipv6.conf.eth0.accept_ra=0 && ip -6 address flush dev eth0 to fd00:2::/64 && ip -6 route flush dev eth0 root fd00:2::/16}}
"
        ),
        true,
    );
}

const EXEMPT: &str = r#"encryption:
  exemptions: [{between: [{node: gcp-1}], reason: no TUN, expires: "2000-01-01T00:00:00Z"}]
"#;

/// Exempts the pair for so many seconds, under traffic.
fn exempted(test: &str, seconds: u32, steps: &str) -> Mesh {
    let config = "/run/netlab/private/agent.yaml";
    let edit =
        |node: &str, what: &str| format!("- exec: {{on: {node}, command: \"sed -i {what} {config}\"}}\n");
    let until = "s/2000-01-01T00:00:00Z/$(cat /run/netlab/shared/until)/";
    let mut mesh = Mesh::new(test);
    mesh.sites(SITES).config(EXEMPT).steps(&format!(
        "- exec: {{on: aws-1, command: date -u -d '+{seconds} seconds' +%FT%TZ > /run/netlab/shared/until}}\n"
    ));
    // It had a device: without one it is another node.
    mesh.steps("- kill: {nodes: gcp}\n");
    mesh.steps(&format!("- exec: {{on: gcp-1, command: {} --keep-key}}\n", agent("cleanup")));
    mesh.steps(&edit("gcp-1", "'s/\\\"backend\\\": *\\\"[a-z]*\\\"/\\\"backend\\\": \\\"none\\\"/'"));
    for node in ["aws-1", "gcp-1"] {
        mesh.steps(&edit(node, until));
    }
    mesh.steps("- restart: {nodes: aws}\n- start: gcp\n")
        .steps("- expect: {matrix: pods}\n  timeout: 20s\n")
        .steps("- capture: underlay\n")
        .steps("- traffic: {start: out, from: aws-1-pod-1, to: gcp-1-pod-1, family: ipv4, packetsPerSecond: 500}\n")
        .steps("- traffic: {start: back, from: gcp-1-pod-1, to: aws-1-pod-1, family: ipv6, packetsPerSecond: 500}\n")
        .steps(steps)
        .steps("- traffic: {stop: out, maxLost: 1000000}\n- traffic: {stop: back, maxLost: 1000000}\n")
        .steps("- assertNoCleartext: {minEncrypted: 0}\n");
    mesh
}

#[test]
fn an_exemption_that_ends_under_traffic_with_all_agents_dead() {
    let ended = r#"- kill: {nodes: all}
- name: the end, which no agent sees
  eventually: {deadline: 90s, step: {exec: {on: aws-1, command: "test ! $(date -u +%FT%TZ) '<' $(cat /run/netlab/shared/until)"}}}
- capture: underlay
- always: {for: 3s, step: {expect: {matrix: pods, verdict: deny}}}
- name: device and route are there still
  exec: {on: aws-1, command: ip route show table 5182, contains: sennitxc4}
- name: and the guard holds back what comes
  exec:
    on: aws-1
    command: >-
      test $(nft -j list counter inet sennit cleartext | grep -o '"packets": [0-9]*' | grep -o '[0-9]*$') -gt 500
"#;
    exempted("leak-exemption", 45, ended).passes();
}

/// As long as it lasts, the pair speaks in clear, and this suite sees it.
#[test]
fn an_exemption_is_seen() {
    if !e2e::can_run("an_exemption_is_seen") {
        return;
    }
    let mesh = exempted("leak-exempt", 120, "- always: {for: 1s, step: {expect: {matrix: pods}}}\n");
    let options = Options { bin_dir: Some(e2e::programs()), ..Options::default() };
    let report = meshlab::run_text(&mesh.text(), options).unwrap();
    let text = report.to_text();
    assert!(!report.passed(), "packets of an exempt pair are not seen in clear:\n{text}");
    let failed: Vec<_> = text.lines().skip_while(|line| !line.contains("FAILED")).take(4).collect();
    assert!(failed.iter().any(|line| line.contains("marker")), "it fails for another reason:\n{text}");
}

/// The mutation: what a node does without the guard. The routes alone do not hold against routes of somebody else.
#[test]
fn without_the_guard_it_is_seen() {
    if !e2e::can_run("without_the_guard_it_is_seen") {
        return;
    }
    let removing = "while true; do nft delete table inet sennit 2>/dev/null; done";
    let mut mesh = Mesh::new("leak-mutation");
    mesh.sites(SITES)
        .steps(BEGIN)
        .steps(&format!(
            "- name: the guard is taken away, again and again\n  exec: {{on: aws-1, command: \"({removing}) > /dev/null 2>&1 &\"}}\n"
        ))
        .steps(WRONG_ROUTES)
        .steps(END);
    let options = Options { bin_dir: Some(e2e::programs()), ..Options::default() };
    let report = meshlab::run_text(&mesh.text(), options).unwrap();
    let text = report.to_text();
    assert!(!report.passed(), "the suite does not see what the guard holds back:\n{text}");
    let failed =
        text.lines().skip_while(|line| !line.contains("FAILED")).take(4).collect::<Vec<_>>().join("\n");
    assert!(failed.contains("marker"), "it fails for another reason:\n{text}");
    println!("without the guard:\n{failed}");
}
