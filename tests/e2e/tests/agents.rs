//! Agents that come and go, and the meshes of the examples.

mod mesh;

use mesh::Mesh;

fn example(name: &str) {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/examples").join(name);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    e2e::passes(name, &text);
}

#[test]
fn the_four_clouds_of_the_demo_become_one_mesh() {
    example("four-clouds.yaml");
}

#[test]
fn the_smallest_mesh_runs() {
    example("two-sites.yaml");
}

#[test]
fn agents_restart_under_traffic_without_a_loss() {
    example("restart-under-traffic.yaml");
}

#[test]
fn killing_an_agent_under_a_thousand_packets_a_second_loses_none() {
    let mut mesh = Mesh::new("killed-agent");
    mesh.sites("- {name: aws, nodes: 1}\n- {name: gcp, nodes: 1}").steps(
        r"- handshakes: all
- expect: {matrix: pods}
- traffic: {start: flow, from: aws-1-pod-1, to: gcp-1-pod-1, packetsPerSecond: 1000}
- kill: {nodes: aws-1, signal: KILL}
- start: aws-1
- status: {where: [{path: /ready, equals: true}]}
- kill: {nodes: all, signal: KILL}
- name: all agents are gone and the tunnels stay
  always: {for: 2s, step: {expect: {matrix: pods}}}
- start: all
- status: {where: [{path: /ready, equals: true}]}
- traffic: {stop: flow, maxLost: 0, minReceived: 1000}
",
    );
    mesh.passes();
}

#[test]
fn an_agent_that_is_restarted_writes_nothing() {
    let mut mesh = Mesh::new("no-write");
    mesh.sites("- {name: aws, nodes: 2}\n- {name: gcp, nodes: 1}").steps(
        r"- handshakes: all
- name: which path is taken is settled
  status: {nodes: aws-1, where: [{path: /peers/aws-2/path, equals: direct}, {path: /peers/gcp-1/path, equals: direct}]}
- status: {nodes: aws-2, where: [{path: /peers/aws-1/path, equals: direct}, {path: /peers/gcp-1/path, equals: direct}]}
- status: {nodes: gcp-1, where: [{path: /peers/aws-1/path, equals: direct}, {path: /peers/aws-2/path, equals: direct}]}
- restart: {nodes: all}
- handshakes: all
- status: {where: [{path: /ready, equals: true}, {path: /changes/0, equals: 0}, {path: /changes/1, equals: 0}]}
",
    );
    mesh.passes();
}

#[test]
fn cleanup_removes_all_that_the_agent_made_and_nothing_else() {
    let agent = e2e::programs().join("mesh-agent");
    let mut mesh = Mesh::new("cleanup");
    mesh.sites("- {name: aws, nodes: 2}\n- {name: gcp, nodes: 1}").steps(&format!(
        r#"- handshakes: all
- name: what belongs to others
  exec: {{on: aws-1, command: "nft add table inet theirs && ip rule add pref 77 lookup 77 && ip route add blackhole 203.0.113.0/24 table 5182 proto 99"}}
- name: cleanup refuses while the agent runs
  exec: {{on: aws-1, command: "{agent} cleanup --config /run/netlab/private/agent.yaml", exitCode: 1}}
- stop: aws-1
- exec: {{on: aws-1, command: "{agent} cleanup --config /run/netlab/private/agent.yaml"}}
- name: nothing of ours is left
  exec:
    on: aws-1
    command: >-
      ! ip link show sennit0 2>/dev/null && ! nft list table inet sennit 2>/dev/null && ! ip rule | grep 5182
      && ! ip -6 rule | grep 5182 && ! ip route show table 5182 proto 82 | grep . && ! ip -6 route show table 5182 | grep .
      && test ! -e /run/sennit && test ! -e /run/netlab/private/state && test ! -e /run/netlab/shared/registry/published/aws-1.yaml
      && ! ls /var/run/wireguard/* 2>/dev/null
- name: what belongs to others stays
  exec: {{on: aws-1, command: "nft list table inet theirs && ip rule && ip route show table 5182", contains: [theirs, "lookup 77", 203.0.113.0/24]}}
- name: the others let it go
  status: {{nodes: [aws-2, gcp-1], where: [{{path: /peers/aws-1, exists: false}}, {{path: /unpublished, contains: aws-1}}]}}
- expect: {{pairs: [{{from: pods@aws-2, to: pods@gcp}}]}}
- name: it joins again with a new key
  start: aws-1
- handshakes: all
- expect: {{matrix: pods}}
"#,
        agent = agent.display()
    ));
    mesh.passes();
}
