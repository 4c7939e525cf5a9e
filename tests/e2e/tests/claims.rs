//! Hostile claims: each is refused by name, the other peers lose no packet, and nothing is sent in clear.

mod mesh;

use mesh::{Mesh, indent};

/// Two keys whose private halves nobody has.
const KEY_A: &str = "mfPXkW7SGHJuSxrZQOYUOtXjRBpMQ7GnWzgPa9b0sxY=";
const KEY_B: &str = "hBtnb0WgtbFVuu3PjGZlHGOFxBQkd4hYQzHrP4PBJ3s=";

fn operator(cidr: &str) -> String {
    format!(
        "- name: the operator has a node named evil\n  apply:\n    file: evil.yaml\n    manifest: {{apiVersion: v1, kind: Node, metadata: {{name: evil}}, spec: {{podCIDRs: [\"{cidr}\"]}}}}\n"
    )
}

fn claim(what: &str, key: &str, epoch: u64, endpoints: &str) -> String {
    format!(
        r#"- name: evil claims {what}
  apply:
    file: published/evil.yaml
    manifest:
      apiVersion: v1
      kind: Node
      metadata:
        name: evil
        annotations:
          sennit.dev/public-key: "{key}"
          sennit.dev/epoch: "{epoch}"
          sennit.dev/site: gcp
          sennit.dev/endpoints: "{endpoints}"
"#
    )
}

fn refused(reason: &str) -> String {
    format!(
        "- name: every agent refuses it and says why\n  status:\n    where:\n      - {{path: /refused/evil/reason, contains: \"{reason}\"}}\n      - {{path: /ready, equals: true}}\n"
    )
}

/// Runs these steps beside two flows that must lose nothing.
fn unharmed(test: &str, steps: &str) {
    let mut mesh = Mesh::new(test);
    mesh.sites("- {name: aws, nodes: 2}\n- {name: gcp, nodes: 1}");
    mesh.config("protectedAddresses: [10.2.99.1]");
    mesh.steps(
        r"- capture: underlay
- handshakes: all
- expect: {matrix: pods}
- traffic: {start: v4, from: aws-1-pod-1, to: gcp-1-pod-1, family: ipv4, packetsPerSecond: 100}
- traffic: {start: v6, from: gcp-1-pod-1, to: aws-2-pod-1, family: ipv6, packetsPerSecond: 100}
",
    );
    mesh.steps(&operator("10.2.200.0/24"));
    mesh.steps(steps);
    mesh.steps(
        r"- handshakes: [aws-1, aws-2, gcp-1]
- expect: {matrix: pods}
- traffic: {stop: v4, maxLost: 0, minReceived: 10}
- traffic: {stop: v6, maxLost: 0, minReceived: 10}
- assertNoCleartext: {}
",
    );
    mesh.passes();
}

#[test]
fn a_malformed_claim_harms_only_its_node() {
    unharmed(
        "malformed-claim",
        &(claim("something that is no key", "garbage", 1, "") + &refused("sennit.dev/public-key")),
    );
}

#[test]
fn an_oversized_claim_harms_only_its_node() {
    let endpoints = "192.0.2.1:51820,".repeat(300);
    unharmed("oversized-claim", &(claim("a long list", KEY_A, 1, &endpoints) + &refused("at most 2048")));
}

#[test]
fn a_rolled_back_claim_does_not_bring_an_old_key_back() {
    let steps = claim("its key", KEY_A, 200, "192.0.2.9:51820")
        + &format!(
            "- status: {{where: [{{path: /peers/evil/publicKey, equals: \"{KEY_A}\"}}, {{path: /refused, count: 0}}]}}\n"
        )
        + &claim("an older key", KEY_B, 100, "192.0.2.9:51820")
        + &refused("went back from 200 to 100")
        + &format!("- status: {{where: [{{path: /peers/evil/publicKey, equals: \"{KEY_A}\"}}]}}\n");
    unharmed("rolled-back-claim", &steps);
}

#[test]
fn a_node_that_copies_a_key_takes_nothing_from_its_holder() {
    let steps = "- name: evil copies the whole claim of aws-1\n  exec:\n    on: aws-1\n    command: sed s/aws-1/evil/ /run/netlab/shared/registry/published/aws-1.yaml > /run/netlab/shared/registry/published/evil.yaml\n"
        .to_owned()
        + &refused("belongs to node aws-1");
    unharmed("copied-key", &steps);
}

#[test]
fn two_unknown_nodes_with_one_key_get_neither() {
    let twin = "- name: the operator has a node named twin\n  apply:\n    file: twin.yaml\n    manifest: {apiVersion: v1, kind: Node, metadata: {name: twin}, spec: {podCIDRs: [10.2.201.0/24]}}\n";
    let both = format!(
        "- name: both come with one key at once\n  exec:\n    on: aws-1\n    command: |\n{}\n",
        indent(
            6,
            &format!(
                r"cd /run/netlab/shared/registry/published
for node in evil twin; do
cat > .new-$node <<END
apiVersion: v1
kind: Node
metadata:
  name: $node
  annotations: {{sennit.dev/public-key: '{KEY_A}', sennit.dev/epoch: '1', sennit.dev/site: gcp}}
END
done
cat .new-evil > .both; rm -f evil.yaml twin.yaml
mv .new-evil evil.yaml & mv .new-twin twin.yaml; wait"
            )
        )
    );
    // Whoever is seen first by some agent holds the key there; nobody ever gets both.
    let check = "- name: the key is in use once at most\n  status: {where: [{path: /refused, contains: public-key}, {path: /peers, atMost: 3}]}\n";
    unharmed("one-key-for-two", &format!("{twin}{both}{check}"));
}

#[test]
fn a_node_cannot_hold_the_default_route() {
    for wide in ["0.0.0.0/0", "::/0"] {
        unharmed(
            "default-route",
            &(operator(wide) + &claim("nothing else", KEY_A, 1, "") + &refused("wider than")),
        );
    }
}

#[test]
fn a_node_cannot_hold_anothers_prefix() {
    unharmed(
        "anothers-prefix",
        &(operator("10.2.0.0/24")
            + &claim("nothing else", KEY_A, 1, "")
            + "- name: gcp-1 keeps its prefix\n  status: {nodes: aws, where: [{path: /refused/evil/reason, contains: overlaps}, {path: /peers/gcp-1/prefixes, contains: 10.2.0.0/24}, {path: /peers/evil/prefixes, notContains: 10.2.0}]}\n"),
    );
}

#[test]
fn a_node_cannot_grant_itself_prefixes() {
    let steps = r#"- name: evil grants itself everything
  apply:
    file: published/evil.yaml
    manifest: {apiVersion: v1, kind: Node, metadata: {name: evil}, spec: {podCIDRs: ["0.0.0.0/0"]}}
"#;
    unharmed("self-granted", &(steps.to_owned() + &refused("come from the operator")));
}

#[test]
fn a_node_cannot_hold_the_api_servers_address() {
    unharmed(
        "protected-address",
        &(operator("10.2.99.0/24")
            + &claim("nothing else", KEY_A, 1, "")
            + &refused("protected address 10.2.99.1")),
    );
}

#[test]
fn an_endpoint_inside_of_the_mesh_is_not_dialled() {
    unharmed(
        "nested-endpoint",
        &(claim("its mesh address as endpoint", KEY_A, 1, "10.2.200.1:51820")
            + &refused("cannot run through itself")),
    );
}

#[test]
fn an_endpoint_that_does_not_resolve_is_named_and_holds_nobody_up() {
    unharmed(
        "unresolvable",
        &(claim("a name that nobody knows", KEY_A, 1, "nowhere.invalid:51820")
            + "- name: the name is told\n  timeout: 60s\n  status: {where: [{path: /errors, contains: nowhere.invalid}, {path: /ready, equals: true}]}\n"),
    );
}
