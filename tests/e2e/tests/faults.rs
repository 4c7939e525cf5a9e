//! Checks that an agent lives, guards and says why where its own process lacks something: sockets, folders, file
//! descriptors.

mod mesh;

use mesh::Mesh;

const SITES: &str = "- {name: aws, nodes: 1, underlay: dual}\n- {name: gcp, nodes: 1, underlay: dual}\n";

const BEGIN: &str = r"- capture: underlay
- handshakes: all
- expect: {matrix: pods}
- traffic: {start: out4, from: aws-1-pod-1, to: gcp-1-pod-1, family: ipv4, packetsPerSecond: 200}
- traffic: {start: out6, from: aws-1-pod-1, to: gcp-1-pod-1, family: ipv6, packetsPerSecond: 200}
";

const END: &str = r"- traffic: {stop: out4, maxLost: 1000000}
- traffic: {stop: out6, maxLost: 1000000}
- assertNoCleartext: {}
";

/// An agent whose status may not answer: `start` would wait for it.
fn run(before: &str, limit: Option<u32>) -> String {
    let agent = e2e::programs().join("mesh-agent");
    let limit = limit.map(|most| format!("prlimit --nofile={most} ")).unwrap_or_default();
    format!(
        r"- kill: {{nodes: aws}}
- exec:
    on: aws-1
    command: |
      [ ! -e /run/pid ] || kill -9 $(cat /run/pid)
      {before}
      ({limit}{agent} run --config /run/netlab/private/agent.yaml > /run/second.log 2>&1 & echo $! > /run/pid)
",
        agent = agent.display()
    )
}

/// Returns steps that stop the agent and release its locks. A dead process that is not yet reaped
/// has no executable link.
fn ended(signal: &str) -> String {
    format!(
        r"- exec:
    on: aws-1
    command: |
      p=$(cat /run/pid); kill -s {signal} $p
      while readlink /proc/$p/exe > /dev/null; do sleep 0.05; done
      rm /run/pid
"
    )
}

/// The guard stands, and the log says these.
fn guards_and_says(texts: &str) -> String {
    format!(
        r"- eventually: {{deadline: 20s, step: {{exec: {{on: aws-1, command: nft list table inet sennit && cat /run/second.log, contains: [sennit guard, {texts}]}}}}}}
"
    )
}

/// All is well again without a restart.
const ANSWERS: &str = r"- status: {nodes: aws, where: [{path: /ready, equals: true}, {path: /errors, count: 0}]}
- expect: {matrix: pods}
";

#[test]
fn an_agent_lives_without_its_sockets() {
    let mut mesh = Mesh::new("no-sockets");
    mesh.sites(SITES).steps(BEGIN);
    for (broken, mended, told) in [
        (
            "rm -f /run/sennit/*.sock; mkdir -p /run/sennit/agent.sock/x /run/sennit/control.sock/x",
            "rm -r /run/sennit/agent.sock /run/sennit/control.sock",
            "\"/run/sennit/agent.sock: Is a directory\", \"/run/sennit/control.sock: Is a directory\", it is tried again",
        ),
        (
            "mv /run/sennit /run/away; echo > /run/sennit",
            "rm /run/sennit",
            "\"runDir: /run/sennit/agent.lock\", \"/run/sennit/agent.sock: Not a directory\", \"/run/sennit/control.sock: Not a directory\"",
        ),
        (
            "mount -t tmpfs -o ro none /run/sennit",
            "umount /run/sennit",
            "\"runDir: /run/sennit/agent.lock: Read-only file system\", \"/run/sennit/agent.sock: Read-only file system\"",
        ),
    ] {
        mesh.steps(&run(&format!("nft flush ruleset; {broken}"), None))
            .steps(&guards_and_says(told))
            .steps("- always: {for: 1s, step: {expect: {matrix: pods}}}\n")
            .steps(&format!("- exec: {{on: aws-1, command: {mended}}}\n"))
            .steps(ANSWERS);
        // The lab's own agent is the one to kill next.
        mesh.steps(&ended("TERM")).steps("- start: aws\n");
    }
    mesh.steps(END).passes();
}

#[test]
fn few_descriptors_are_named_and_guarded() {
    let mut mesh = Mesh::new("few-descriptors");
    mesh.sites(SITES).steps(BEGIN);
    for most in [12, 18, 22, 26] {
        mesh.steps(&run("true", Some(most)))
            .steps(&guards_and_says("RLIMIT_NOFILE, LimitNOFILE"))
            .steps("- exec: {on: aws-1, command: cat /run/second.log, notContains: [CAP_NET_RAW, does not forward, another group]}\n")
            .steps("- always: {for: 1s, step: {expect: {matrix: pods}}}\n")
            .steps(&ended("KILL"))
            .steps("- start: aws\n");
    }
    mesh.steps(&run("true", None))
        .steps(ANSWERS)
        .steps("- name: the limit falls under a running agent\n  exec: {on: aws-1, command: \"p=$(cat /run/pid) && prlimit --pid $p --nofile=$(($(ls /proc/$p/fd | wc -l) + 14)):\"}\n")
        .steps("- status: {nodes: aws, where: [{path: /errors, contains: few file descriptors}, {path: /guard/standing, equals: true}]}\n")
        .steps("- exec: {on: aws-1, command: \"prlimit --pid $(cat /run/pid) --nofile=1024:\"}\n")
        .steps(ANSWERS)
        .steps(END)
        .passes();
}
