//! Devices and interfaces that fail, are taken, or are attacked.

mod mesh;

use mesh::Mesh;

const BEGIN: &str = r"- capture: underlay
- handshakes: all
- expect: {matrix: pods}
";

const END: &str = r"- handshakes: all
  timeout: 60s
- expect: {matrix: pods}
- assertNoCleartext: {}
";

fn two_sites(test: &str, steps: &str) {
    let mut mesh = Mesh::new(test);
    mesh.sites("- {name: aws, nodes: 1}\n- {name: gcp, nodes: 1}\n- {name: azure, nodes: 1}");
    mesh.steps(BEGIN).steps(steps).steps(END).passes();
}

#[test]
fn a_taken_port_is_named_and_taken_back_when_it_is_free() {
    let mesh_wg = e2e::programs().join("mesh-wg");
    two_sites(
        "port-taken",
        &format!(
            r#"- traffic: {{start: others, from: aws-1-pod-1, to: azure-1-pod-1, packetsPerSecond: 100}}
- kill: {{nodes: gcp-1}}
- kill: {{nodes: gcp-1, target: device}}
- name: another program takes the port
  exec: {{on: gcp-1, command: "{} other0 && wg genkey > /run/key && wg set other0 listen-port 51820 private-key /run/key && ip link set other0 up"}}
- start: gcp-1
- status: {{nodes: gcp-1, where: [{{path: /errors, contains: "UDP port 51820 is in use"}}, {{path: /ready, equals: false}}]}}
- traffic: {{stop: others, maxLost: 0, minReceived: 10}}
- name: the port is free again
  exec: {{on: gcp-1, command: ip link del other0}}
- status: {{nodes: gcp-1, where: [{{path: /errors, count: 0}}, {{path: /ready, equals: true}}]}}
"#,
            mesh_wg.display()
        ),
    );
}

#[test]
fn an_interface_of_our_name_that_is_not_ours_is_left_alone() {
    two_sites(
        "foreign-interface",
        r#"- kill: {nodes: gcp-1}
- kill: {nodes: gcp-1, target: device}
- exec: {on: gcp-1, command: ip link add sennit0 type bridge && ip address add 192.0.2.77/32 dev sennit0}
- start: gcp-1
- status: {nodes: gcp-1, where: [{path: /errors, contains: interface sennit0 exists and is not ours}, {path: /ready, equals: false}]}
- name: it is as it was
  exec: {on: gcp-1, command: ip -d -br address show sennit0 && ip -d link show sennit0, contains: [192.0.2.77, bridge]}
- exec: {on: gcp-1, command: ip link del sennit0}
- status: {nodes: gcp-1, where: [{path: /errors, count: 0}, {path: /ready, equals: true}]}
"#,
    );
}

#[test]
fn a_killed_device_is_made_anew_and_nothing_goes_out_in_clear() {
    two_sites(
        "killed-device",
        r"- traffic: {start: flow, from: aws-1-pod-1, to: gcp-1-pod-1, packetsPerSecond: 500}
- traffic: {start: others, from: aws-1-pod-1, to: azure-1-pod-1, packetsPerSecond: 100}
- kill: {nodes: gcp-1, target: device}
- handshakes: all
- expect: {matrix: pods}
- traffic: {stop: flow, maxLost: 5000, minReceived: 10}
- traffic: {stop: others, maxLost: 0, minReceived: 10}
",
    );
}

#[test]
fn a_killed_device_with_no_agent_beside_it_lets_nothing_out_in_clear() {
    two_sites(
        "killed-device-no-agent",
        r"- traffic: {start: flow, from: aws-1-pod-1, to: gcp-1-pod-1, packetsPerSecond: 500}
- kill: {nodes: all}
- kill: {nodes: all, target: device}
- always:
    for: 2s
    step: {expect: {matrix: pods, verdict: deny}}
- start: all
- traffic: {stop: flow, maxLost: 1000000}
",
    );
}

#[test]
fn a_wedged_device_is_replaced() {
    two_sites(
        "wedged-device",
        r"- traffic: {start: others, from: aws-1-pod-1, to: azure-1-pod-1, packetsPerSecond: 100}
- kill: {nodes: gcp-1, target: device, signal: STOP}
- name: it is replaced and carries packets again
  timeout: 90s
  expect: {pairs: [{from: pods@aws, to: pods@gcp}, {from: pods@gcp, to: pods@azure}]}
- traffic: {stop: others, maxLost: 0, minReceived: 10}
",
    );
}

#[test]
fn the_guard_stops_what_a_wrong_route_sends_to_the_underlay() {
    two_sites(
        "wrong-route",
        r"- name: somebody routes another site's pods over the underlay
  exec: {on: aws-1, command: ip rule add pref 100 lookup main && ip route add 10.2.0.0/16 via 198.18.1.1}
- expect: {pairs: [{from: pods@aws, to: pods@gcp, family: ipv4, verdict: deny}]}
- name: the guard counts what it held back
  timeout: 40s
  status: {nodes: aws-1, where: [{path: /guard/egressDrops, atLeast: 1}]}
- exec: {on: aws-1, command: ip rule del pref 100 && ip route del 10.2.0.0/16}
",
    );
}

#[test]
fn random_bytes_on_the_udp_port_disturb_nobody() {
    two_sites(
        "random-datagrams",
        r#"- traffic: {start: flow, from: aws-1-pod-1, to: gcp-1-pod-1, packetsPerSecond: 200}
- name: noise from another node, as raw bytes and in the shape of each message type
  timeout: 60s
  exec:
    on: azure-1
    command:
      - bash
      - -c
      - |
        for i in $(seq 150); do
          head -c $((RANDOM % 1400 + 1)) /dev/urandom > /dev/udp/198.18.2.11/51820
          for type in 1 2 3 4; do
            { printf "\\x0$type\\0\\0\\0"; head -c $((RANDOM % 300)) /dev/urandom; } > /dev/udp/198.18.2.11/51820
          done
        done 2>/dev/null; true
- traffic: {stop: flow, maxLost: 0, minReceived: 10}
"#,
    );
}
