//! A registry that is broken, full or away: what was known stays in force, in clear goes nothing.

mod mesh;

use mesh::Mesh;

const BEGIN: &str = r"- capture: underlay
- handshakes: all
- expect: {matrix: pods}
- traffic: {start: flow, from: aws-1-pod-1, to: gcp-1-pod-1, packetsPerSecond: 100}
";

const END: &str = r"- handshakes: all
- expect: {matrix: pods}
- traffic: {stop: flow, maxLost: 0, minReceived: 10}
- assertNoCleartext: {}
";

fn unharmed(test: &str, steps: &str) {
    let mut mesh = Mesh::new(test);
    mesh.sites("- {name: aws, nodes: 2}\n- {name: gcp, nodes: 1}")
        .steps(BEGIN)
        .steps(steps)
        .steps(END)
        .passes();
}

#[test]
fn truncated_and_binary_manifests_are_named_and_change_nothing() {
    unharmed(
        "broken-manifests",
        r#"- apply: {file: half.yaml, raw: "apiVersion: v1\nkind: Node\nmetadata: {name: aws-1"}
- apply: {file: bytes.yaml, base64: AP8A/w==}
- apply: {file: nodes-too.json, raw: "{\"apiVersion\": \"v1\", \"kind\": "}
- status: {where: [{path: /refused, contains: half.yaml}, {path: /refused, contains: bytes.yaml}, {path: /refused, contains: nodes-too.json}, {path: /ready, equals: true}, {path: /peers, count: 2}]}
- name: the operator's own file is cut in the middle
  exec: {on: aws-1, command: "cd /run/netlab/shared/registry; cp nodes.yaml /run/whole; head -c 200 /run/whole > .half; mv .half nodes.yaml"}
- status: {where: [{path: /refused, contains: what it held before stays in force}, {path: /peers, count: 2}]}
- exec: {on: aws-1, command: "cd /run/netlab/shared/registry; cp /run/whole .whole; mv .whole nodes.yaml; rm half.yaml bytes.yaml nodes-too.json"}
- status: {where: [{path: /refused, count: 0}]}
"#,
    );
}

#[test]
fn a_registry_that_vanishes_and_returns_prunes_nobody() {
    unharmed(
        "registry-away",
        r#"- exec: {on: aws-1, command: mv /run/netlab/shared/registry /run/netlab/shared/away}
- status: {where: [{path: /errors, contains: registry directory}, {path: /peers, count: 2}]}
- name: agents that start without a registry boot from what they knew last
  restart: {nodes: all}
- status: {where: [{path: /synced, equals: false}, {path: /peers, count: 2}]}
- expect: {matrix: pods}
- name: it returns empty first
  exec: {on: aws-1, command: mkdir /run/netlab/shared/registry}
- status: {where: [{path: /errors, contains: counts as incomplete}, {path: /peers, count: 2}]}
- name: then whole
  exec: {on: aws-1, command: cd /run/netlab/shared && mv registry emptied && mv -T away registry}
- status: {where: [{path: /errors, count: 0}, {path: /synced, equals: true}, {path: /ready, equals: true}]}
"#,
    );
}

#[test]
fn a_full_disk_leaves_the_old_publication_in_force() {
    unharmed(
        "full-disk",
        r#"- name: aws-1 sees the registry on a disk that is full
  exec:
    on: aws-1
    command: >-
      mkdir /run/full && mount -t tmpfs -o size=256k tmpfs /run/full && cp -a /run/netlab/shared/registry/. /run/full/
      && (head -c 300k /dev/zero > /run/full/.fill || true)
      && mount --bind /run/full /run/netlab/shared/registry
- name: and has something new to publish
  exec: {on: aws-1, command: "sed -i 's/\"mtu\": *1500/\"mtu\": 1400/; s/mtu: 1500/mtu: 1400/' /run/netlab/private/agent.yaml && grep -q 1400 /run/netlab/private/agent.yaml"}
- restart: {nodes: aws-1}
- status: {nodes: aws-1, where: [{path: /errors, contains: No space left}, {path: /errors, contains: published/aws-1.yaml}, {path: /peers, count: 2}]}
- expect: {matrix: pods}
- name: the old publication is whole
  exec: {on: aws-1, command: "grep -c sennit.dev/public-key /run/full/published/aws-1.yaml", contains: "1"}
- name: room is made
  exec: {on: aws-1, command: rm /run/full/.fill}
- status: {nodes: aws-1, where: [{path: /errors, count: 0}, {path: /ready, equals: true}]}
- exec: {on: aws-1, command: "grep 1400 /run/full/published/aws-1.yaml", contains: mtu}
- name: the disk of all is back
  exec: {on: aws-1, command: umount /run/netlab/shared/registry}
"#,
    );
}

#[test]
fn a_revoked_node_loses_its_tunnels_and_established_flows() {
    let mut mesh = Mesh::new("revoked-node");
    mesh.sites("- {name: aws, nodes: 2}\n- {name: gcp, nodes: 1}").steps(BEGIN).steps(
        r#"- traffic: {start: doomed, from: aws-1-pod-1, to: aws-2-pod-1, packetsPerSecond: 50}
- name: the operator takes aws-2 out of the registry
  exec: {on: aws-1, command: "cd /run/netlab/shared/registry; sed '/\"name\": *\"aws-2\"/,/^---/{s/\"name\": *\"aws-2\"/\"name\": \"gone\"/}' nodes.yaml > .new && mv .new nodes.yaml"}
- status: {nodes: [aws-1, gcp-1], where: [{path: /peers/aws-2, exists: false}]}
- expect: {pairs: [{from: pods@aws-1, to: pods@aws-2, verdict: deny}, {from: pods@gcp, to: pods@aws-2, verdict: deny}, {from: pods@aws-1, to: pods@gcp}]}
- traffic: {stop: doomed, maxLost: 1000000}
- traffic: {stop: flow, maxLost: 0, minReceived: 10}
- assertNoCleartext: {}
"#,
    );
    mesh.passes();
}
