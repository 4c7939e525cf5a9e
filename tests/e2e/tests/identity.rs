//! One identity in two places, generations, and what comes back to a node that is refused.
//!
//! `aws-2` is the original and `aws-3` the host that gets its state. A flow to a pod of the original runs all
//! the while: a copy takes nothing from it.

mod mesh;

use mesh::Mesh;

const SITES: &str = "- {name: aws, nodes: 3}\n- {name: gcp}";
const STATE: &str = "/run/netlab/private/state";
const FLOW: &str = "- traffic: {start: flow, from: gcp-1-pod-1, to: aws-2-pod-1, packetsPerSecond: 200}\n";
const NOTHING_LOST: &str =
    "- name: the original lost nothing\n  traffic: {stop: flow, minReceived: 500, maxLost: 0}\n";

fn agent(command: &str) -> String {
    let agent = e2e::programs().join("mesh-agent");
    let (verb, rest) = command.split_once(' ').unwrap_or((command, ""));
    format!("{} {verb} {rest} --config /run/netlab/private/agent.yaml", agent.display())
}

/// Ends `aws-3` and its device and gives it the state of `aws-2`.
fn cloned() -> String {
    format!(
        r"- handshakes: all
- expect: {{matrix: pods}}
- stop: aws-3
- kill: {{nodes: aws-3, target: device}}
- exec: {{on: aws-2, command: cp -a {STATE} /run/netlab/shared/image}}
- exec: {{on: aws-3, command: rm -rf {STATE} && cp -a /run/netlab/shared/image {STATE}}}
"
    )
}

/// Makes `aws-3` the same host as `aws-2` but for its address on the underlay.
const TWIN: &str = r#"- exec: {on: aws-2, command: cat /run/netlab/private/agent.yaml > /run/netlab/shared/twin.yaml}
- name: the twin has a configuration and an address of its own
  exec:
    on: aws-3
    command: |
      own=$(sed -n 's/.*\(198\.18\.[0-9.]*\):.*/\1/p' /run/netlab/private/agent.yaml | head -1)
      theirs=$(sed -n 's/.*\(198\.18\.[0-9.]*\):.*/\1/p' /run/netlab/shared/twin.yaml | head -1)
      test -n "$own" && test -n "$theirs"
      sed "s/$theirs/$own/" /run/netlab/shared/twin.yaml > /run/netlab/private/agent.yaml
"#;

/// Counts how often a publication is written within five seconds.
fn written_at_most(times: usize) -> String {
    format!(
        r"- name: the publication is written a few times at most
  exec:
    on: gcp-1
    command: |
      python3 -c '
      import os, time
      seen, end = set(), time.time() + 5
      while time.time() < end:
          try: seen.add(os.stat(`/run/netlab/shared/registry/published/aws-2.yaml`).st_mtime_ns)
          except OSError: pass
          time.sleep(0.005)
      print(len(seen), `writes in 5 s`)
      raise SystemExit(len(seen) > {times})'
  timeout: 20s
"
    )
    .replace('`', "\"")
}

fn passes(test: &str, steps: &[&str]) {
    let mut mesh = Mesh::new(test);
    mesh.sites(SITES);
    let agent = e2e::programs().join("mesh-agent");
    for part in steps {
        mesh.steps(&part.replace("mesh-agent status", &format!("{} status", agent.display())));
    }
    mesh.passes();
}

#[test]
fn a_copy_beside_its_original_makes_its_own_key() {
    passes(
        "copy-beside",
        &[
            &cloned(),
            FLOW,
            r"- start: aws-3
- name: it says what it is
  status: {nodes: aws-3, where: [{path: /errors, contains: the key was made for node aws-2}, {path: /problems, contains: identity-copied}]}
- name: and joins with a key of its own
  handshakes: all
- expect: {matrix: pods}
- name: nobody has refused anything
  status: {nodes: [aws-1, aws-2, gcp-1], where: [{path: /refused, count: 0}, {path: /problems, notContains: identity}]}
",
            NOTHING_LOST,
        ],
    );
}

#[test]
fn a_copy_that_is_told_to_wait_brings_up_nothing() {
    passes(
        "copy-waits",
        &[
            &cloned(),
            FLOW,
            &format!(
                r#"- exec:
    on: aws-3
    command: |
      sed -i '1s/{{/{{"identity": {{"onCopy": "wait"}},/' /run/netlab/private/agent.yaml
- start: aws-3
- status: {{nodes: aws-3, where: [{{path: /ready, equals: false}}, {{path: /problems, contains: mesh-agent rekey}}, {{path: /peers, count: 0}}]}}
- always: {{for: 3s, step: {{status: {{nodes: aws-3, where: [{{path: /peers, count: 0}}]}}}}}}
- exec: {{on: aws-3, command: "{}", contains: new key}}
- name: then it joins
  handshakes: all
- status: {{nodes: aws-3, where: [{{path: /ready, equals: true}}]}}
"#,
                agent("rekey")
            ),
            NOTHING_LOST,
        ],
    );
}

#[test]
fn a_twin_beside_its_original_waits() {
    passes(
        "twin-beside",
        &[
            &cloned(),
            TWIN,
            FLOW,
            "- start: aws-3\n",
            &written_at_most(10),
            r"- name: both say so
  exec:
    on: aws-2
    command: |
      mesh-agent status -o json | grep -q identity-elsewhere
- exec:
    on: aws-3
    command: |
      mesh-agent status -o json > /run/status && grep -q identity-elsewhere /run/status && grep -q '.ready.: false' /run/status
- always: {for: 4s, step: {expect: {pairs: [{from: pods@gcp, to: aws-2-pod-1}]}}}
",
            NOTHING_LOST,
            r"- name: once the original is gone the twin takes its place
  stop: aws-2
- kill: {nodes: aws-2, target: device}
- exec:
    on: aws-3
    command: |
      until mesh-agent status -o json | grep -q '.ready.: true'; do sleep 1; done
  timeout: 120s
",
        ],
    );
}

#[test]
fn an_original_that_starts_after_its_twin_waits_for_it() {
    passes(
        "twin-first",
        &[
            &cloned(),
            TWIN,
            r"- stop: aws-2
- kill: {nodes: aws-2, target: device}
- start: aws-3
- exec:
    on: aws-3
    command: |
      until mesh-agent status -o json | grep -q '.ready.: true'; do sleep 1; done
  timeout: 60s
- start: aws-2
",
            &written_at_most(10),
            r"- name: one of them waits and says why
  exec:
    on: aws-2
    command: |
      until mesh-agent status -o json | grep -q 'this one brings up no tunnel'; do sleep 1; done
  timeout: 30s
",
        ],
    );
}

#[test]
fn another_host_with_a_taken_name_takes_nothing() {
    passes(
        "taken-name",
        &[
            "- handshakes: all\n- expect: {matrix: pods}\n- stop: aws-3\n- kill: {nodes: aws-3, target: device}\n",
            &format!("- exec: {{on: aws-3, command: rm -rf {STATE}}}\n"),
            TWIN,
            &format!(
                "- name: install-check says so before\n  exec: {{on: aws-3, command: \"{}\", exitCode: 1, contains: publishes as aws-2}}\n",
                agent("install-check")
            ),
            FLOW,
            "- start: aws-3\n",
            &written_at_most(10),
            r"- exec:
    on: aws-3
    command: |
      until mesh-agent status -o json | grep -q 'another agent publishes as aws-2'; do sleep 1; done
  timeout: 20s
- status: {nodes: [aws-1, gcp-1], where: [{path: /refused, count: 0}]}
- stop: aws-3
- name: the original goes on, also after a restart
  restart: {nodes: aws-2}
- status: {nodes: aws-2, where: [{path: /ready, equals: true}]}
",
            NOTHING_LOST,
        ],
    );
}

#[test]
fn a_name_is_taken_back_once_the_impostor_is_gone() {
    passes(
        "impostor-gone",
        &[
            "- handshakes: all\n- expect: {matrix: pods}\n",
            r#"- name: an impostor of an earlier version, which asks nobody
  exec:
    on: aws-3
    command: |
      cd /run/netlab/shared/registry/published
      sed -e "s|sennit.dev/public-key: .*|sennit.dev/public-key: mfPXkW7SGHJuSxrZQOYUOtXjRBpMQ7GnWzgPa9b0sxY=|" -e "s|sennit.dev/epoch: .*|sennit.dev/epoch: '4102444800000'|" \
        -e /instance/d aws-2.yaml > .impostor
      for n in 1 2 3 4 5; do cp .impostor .next && mv .next aws-2.yaml; sleep 0.3; done
  timeout: 20s
- name: peers take the original back
  status: {nodes: [aws-1, gcp-1], where: [{path: /refused, count: 0}, {path: /peers/aws-2/state, equals: established}]}
  timeout: 40s
- name: and it has said so
  status: {nodes: aws-2, where: [{path: /problems, contains: identity-elsewhere}]}
- expect: {matrix: pods}
"#,
        ],
    );
}

/// `aws-1` as an installation that was made while the clock was ten years ahead.
fn ahead() -> String {
    format!(
        r#"- handshakes: all
- stop: aws-1
- exec: {{on: aws-1, command: "sed -i 's/\"generation\": [0-9]*/\"generation\": 4102444800000/' {STATE}/keys/identity.json && grep 4102444800000 {STATE}/keys/identity.json"}}
- start: aws-1
- expect: {{matrix: pods}}
- status: {{where: [{{path: /refused, count: 0}}]}}
- stop: aws-1
- kill: {{nodes: aws-1, target: device}}
- exec: {{on: aws-1, command: rm -rf {STATE}}}
"#
    )
}

#[test]
fn a_node_installed_with_a_wrong_clock_joins_again() {
    passes("wrong-clock", &[&ahead(), "- start: aws-1\n- handshakes: all\n- expect: {matrix: pods}\n"]);
}

#[test]
fn a_node_that_is_refused_says_so_and_names_the_way_out() {
    passes(
        "refused-back",
        &[
            &ahead(),
            &format!(
                r#"- name: nothing tells it what was before
  exec: {{on: aws-1, command: rm /run/netlab/shared/registry/published/aws-1.yaml}}
- start: aws-1
- name: it says itself that nobody wants it
  status: {{nodes: aws-1, where: [{{path: /ready, equals: false}}, {{path: /problems, contains: refused-by-peers}}, {{path: /problems, contains: mesh-agent rekey --after 4102444800000}}]}}
- exec: {{on: aws-1, command: "{}", contains: generation 4102444800001}}
- handshakes: all
- expect: {{matrix: pods}}
- status: {{nodes: aws-1, where: [{{path: /ready, equals: true}}, {{path: /problems, count: 0}}]}}
"#,
                agent("rekey --after 4102444800000")
            ),
        ],
    );
}

#[test]
fn a_peer_that_forgets_takes_what_comes_next() {
    passes(
        "forget",
        &[
            &ahead(),
            &format!(
                r#"- exec: {{on: aws-1, command: rm /run/netlab/shared/registry/published/aws-1.yaml}}
- start: aws-1
- status: {{nodes: gcp-1, where: [{{path: /refused/aws-1/reason, contains: mesh-agent rekey}}]}}
- exec: {{on: gcp-1, command: "nft list table inet sennit > /run/before; {}; nft list table inet sennit > /run/after; grep -c 10.1 /run/before /run/after", contains: aws-1 is forgotten}}
- status: {{nodes: gcp-1, where: [{{path: /refused/aws-1, exists: false}}, {{path: /peers/aws-1/state, equals: established}}]}}
- exec: {{on: gcp-1, command: "{}", exitCode: 1}}
"#,
                agent("forget aws-1"),
                agent("forget nobody")
            ),
        ],
    );
}

#[test]
fn state_with_other_dates_is_the_same_node() {
    passes(
        "other-dates",
        &[
            &format!(
                r"- handshakes: all
- stop: aws-1
- exec: {{on: aws-1, command: touch -d 2020-01-01 {STATE}/keys/private.key}}
- start: aws-1
"
            ),
            "- always: {for: 3s, step: {status: {nodes: gcp-1, where: [{path: /refused, count: 0}]}}}\n- expect: {matrix: pods}\n",
        ],
    );
}

#[test]
fn a_new_key_costs_a_handshake() {
    passes(
        "rekey",
        &[
            "- handshakes: all\n- expect: {matrix: pods}\n- capture: underlay\n",
            FLOW,
            &format!("- exec: {{on: aws-2, command: \"{}\", contains: new key}}\n", agent("rekey")),
            r"- handshakes: all
- expect: {matrix: pods}
- status: {where: [{path: /ready, equals: true}, {path: /refused, count: 0}]}
- traffic: {stop: flow, minReceived: 100, maxLost: 1200, maxGap: 6s}
- assertNoCleartext: {}
",
        ],
    );
}

#[test]
fn a_backup_restored_on_another_machine_is_told_apart() {
    passes(
        "restored-elsewhere",
        &[
            &cloned(),
            TWIN,
            r"- name: the machine is another one
  exec: {on: aws-3, command: echo 0123456789abcdef0123456789abcdef > /run/machine-id && mount --bind /run/machine-id /etc/machine-id}
",
            FLOW,
            r"- start: aws-3
- name: beside the living original it waits
  exec:
    on: aws-3
    command: |
      until mesh-agent status -o json > /run/status && grep -q 'identity-copied' /run/status && grep -q 'this one brings up no tunnel' /run/status; do sleep 1; done
  timeout: 20s
",
            NOTHING_LOST,
            r"- stop: aws-2
- kill: {nodes: aws-2, target: device}
- name: alone it takes its place
  exec:
    on: aws-3
    command: |
      until mesh-agent status -o json | grep -q '.ready.: true'; do sleep 1; done
  timeout: 120s
- status: {nodes: [aws-1, gcp-1], where: [{path: /refused, count: 0}]}
",
        ],
    );
}

#[test]
fn peers_of_another_mesh_are_told() {
    passes(
        "another-mesh",
        &[r#"- handshakes: all
- exec:
    on: gcp-1
    command: |
      sed -i 's/"mesh": *"[^"]*"/"mesh": "acmee"/' /run/netlab/private/agent.yaml
- restart: {nodes: gcp-1}
- status: {nodes: aws, where: [{path: /problems, contains: another-mesh}, {path: /problems, contains: acmee}]}
- status: {nodes: gcp-1, where: [{path: /problems, contains: another-mesh}, {path: /ready, equals: false}]}
"#],
    );
}
