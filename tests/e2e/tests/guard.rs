//! Checks that the guard outlasts registry, network and host: each step under traffic with a marker, with every
//! link of the underlay recorded. One test proves that a leak would be seen.

mod mesh;

use mesh::Mesh;
use meshlab::Options;

const SITES: &str = "- {name: aws, nodes: 1, underlay: dual}\n- {name: gcp, nodes: 1, underlay: dual}\n";
/// Leaves only what nodes hold to be known: the guard has no grants of sites to fall back on.
const NO_SITES: &str = "sites: null\n";

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

/// Replaces text in the operator's manifests, and leaves the first version beside them.
fn edit(script: &str) -> String {
    format!(
        "- exec: {{on: aws-1, command: \"cd /run/netlab/shared/registry && cp -n nodes.yaml ../before.yaml; {script} ../before.yaml > .new && mv .new nodes.yaml\"}}\n"
    )
}

fn agent(command: &str) -> String {
    format!(
        "{} {command} --config /run/netlab/private/agent.yaml",
        e2e::programs().join("mesh-agent").display()
    )
}

fn without_sites(test: &str) -> Mesh {
    let mut mesh = Mesh::new(test);
    mesh.sites(SITES).config(NO_SITES).steps(BEGIN);
    mesh
}

/// The Node object of gcp-1 is gone, its pods run on.
const DELETED: &str = r#"python3 -c 'import sys; print(chr(10).join(["---"]).join(d for d in open(sys.argv[1]).read().split("---") if "gcp-1" not in d))'"#;

fn deleted() -> String {
    let text = DELETED.replace('"', "\\\"");
    edit(&text) + "- status: {nodes: aws, where: [{path: /peers, count: 0}]}\n"
}

#[test]
fn a_deleted_node_leaks_nothing() {
    let release = agent("guard release gcp-1");
    without_sites("guard-deleted")
        .steps(&deleted())
        .steps("- always: {for: 2s, step: {expect: {pairs: [{from: aws-1-pod-1, to: gcp-1-pod-1, verdict: deny}]}}}\n")
        .steps("- status: {nodes: aws, where: [{path: /guard/kept, count: 2}, {path: /guard/kept/0/holder, equals: gcp-1}]}\n")
        .steps("- kill: {nodes: aws}\n- kill: {nodes: aws, target: device}\n- start: aws\n")
        .steps("- status: {nodes: aws, where: [{path: /guard/kept, count: 2}, {path: /synced, equals: true}]}\n")
        .steps(END)
        .steps(&format!("- exec: {{on: aws-1, command: \"{release}\", contains: 10.2.0.0/24}}\n"))
        .steps("- status: {nodes: aws, where: [{path: /guard/kept, count: 0}]}\n")
        .passes();
}

/// The mutation: what is released leaves in clear, and this suite sees it.
#[test]
fn a_released_prefix_is_seen() {
    if !e2e::can_run("a_released_prefix_is_seen") {
        return;
    }
    let mut mesh = without_sites("guard-mutation");
    let release = agent("guard release gcp-1");
    mesh.steps(&deleted())
        .steps("- status: {nodes: aws, where: [{path: /guard/kept, count: 2}]}\n")
        .steps(&format!("- exec: {{on: aws-1, command: \"{release}\"}}\n"))
        .steps("- status: {nodes: aws, where: [{path: /guard/kept, count: 0}]}\n")
        .steps("- always: {for: 2s, step: {exec: {on: aws-1, command: \"true\"}}}\n")
        .steps(END);
    let options = Options { bin_dir: Some(e2e::programs()), ..Options::default() };
    let text = meshlab::run_text(&mesh.text(), options).unwrap().to_text();
    let failed: Vec<_> = text.lines().skip_while(|line| !line.contains("FAILED")).take(4).collect();
    assert!(failed.iter().any(|line| line.contains("marker")), "no marker was seen:\n{text}");
}

#[test]
fn moved_prefixes_leak_nothing() {
    let many: Vec<String> = (0..17).map(|n| format!("10.77.{n}.0/24")).collect();
    without_sites("guard-moved")
        .steps(&edit("sed s#10.2.0.0/24#10.2.9.0/24#"))
        .steps("- status: {nodes: aws, where: [{path: /guard/kept, count: 1}]}\n")
        .steps(&edit(&format!("sed 's#10.2.0.0/24#{}#'", many.join(r#"\", \""#))))
        .steps("- status: {nodes: aws, where: [{path: /refused/0/reason, contains: 18 entries}]}\n")
        .steps("- exec: {on: aws-1, command: nft list table inet sennit, contains: 10.77.}\n")
        .steps(&edit("sed s#10.2.0.0/24#10.2.0.0/99#"))
        .steps("- always: {for: 2s, step: {expect: {pairs: [{from: aws-1-pod-1, to: gcp-1-pod-1, family: ipv4, verdict: deny}]}}}\n")
        .steps(END)
        .passes();
}

/// An address of the other site's pods on the underlay: by a lease, for good, and by a second LAN.
fn announced(test: &str, config: &str) {
    let mut mesh = Mesh::new(test);
    mesh.sites(SITES).config(config).steps(BEGIN);
    for (name, command) in [
        ("a lease", "ip addr add 10.2.0.77/24 dev eth0 valid_lft 600 preferred_lft 600"),
        ("an advertised prefix", "ip addr add fd00:2::77/64 dev eth0 valid_lft 600 preferred_lft 600"),
        (
            "a second LAN",
            "ip link add lan1 link eth0 type macvlan mode bridge && ip addr add 10.2.0.78/24 dev lan1 && ip link set lan1 up",
        ),
        ("a gateway there", "ip route replace default via 10.2.0.1 dev eth0 onlink metric 5"),
    ] {
        mesh.steps(&format!("- name: {name}\n  exec: {{on: aws-1, command: {command}}}\n")).steps(
            "- status: {nodes: aws, where: [{path: /errors, contains: an underlay address of this node}]}\n",
        );
    }
    // The last one takes the way to the router.
    mesh.steps("- exec: {on: aws-1, command: ip route del default via 10.2.0.1 dev eth0 metric 5}\n")
        .steps("- always: {for: 2s, step: {expect: {matrix: pods}}}\n")
        .steps("- kill: {nodes: aws}\n- kill: {nodes: aws, target: device}\n")
        .steps("- always: {for: 1s, step: {expect: {matrix: pods, verdict: deny}}}\n- start: aws\n")
        .steps("- handshakes: all\n  timeout: 60s\n- expect: {matrix: pods}\n  timeout: 30s\n")
        .steps(END)
        .passes();
}

#[test]
fn announced_addresses_leak_nothing() {
    announced("guard-announced", NO_SITES);
}

#[test]
fn announced_addresses_undo_no_grant() {
    announced("guard-granted", "");
}

/// All that a reboot takes away, and the unit that runs before the network is up.
fn reboot() -> String {
    let restore = agent("guard restore");
    format!(
        r#"- kill: {{nodes: aws}}
- kill: {{nodes: aws, target: device}}
- name: a reboot, and the early unit
  exec:
    on: aws-1
    command: |
      nft flush ruleset
      for family in -4 -6; do
        ip $family route flush table 5182
        for pref in 5182 5183 5184; do while ip $family rule del pref $pref; do :; done; done
      done
      ip link del sennitx4; ip link del sennitx6
      {restore}
    contains: changes
"#
    )
}

/// The unit that a pod installs on its host works with the host's own programs away.
#[test]
fn an_installed_unit_restores_the_guard() {
    let install = format!(
        "{} guard install --root /run/netlab/private/host",
        e2e::programs().join("mesh-agent").display()
    );
    let mut mesh = Mesh::new("guard-installed");
    mesh.sites(SITES).steps(&format!(
        r#"- exec: {{on: aws-1, command: "{install}", contains: files written}}
- kill: {{nodes: aws}}
- kill: {{nodes: aws, target: device}}
- exec:
    on: aws-1
    command: |
      nft flush ruleset
      cd /run/netlab/private
      unit=host/etc/systemd/system/sysinit.target.wants/sennit-guard.service
      value() {{ sed -n "s/^$1=//p" $unit | tr -d '"' | sed "s#/opt/#$PWD/host/opt/#g; s#/var/lib/sennit#$PWD/state#"; }}
      env -i "$(value Environment)" $(value ExecStart)
    contains: guard.json
- exec: {{on: aws-1, command: nft list table inet sennit, contains: sennit guard}}
- start: aws
- handshakes: all
"#
    ));
    mesh.passes();
}

/// Traffic that is lost, in streams of this number.
fn lost(n: usize) -> String {
    let stream = |family: u8| {
        format!(
            "- traffic: {{start: out{n}{family}, from: aws-1-pod-1, to: gcp-1-pod-1, family: ipv{family}, packetsPerSecond: 200}}\n"
        )
    };
    stream(4) + &stream(6) + "- always: {for: 500ms, step: {expect: {matrix: pods, verdict: deny}}}\n"
}

fn stopped(n: usize) -> String {
    [4, 6].map(|family| format!("- traffic: {{stop: out{n}{family}, maxLost: 1000000}}\n")).concat()
}

#[test]
fn reboots_with_broken_parts_leak_nothing() {
    let mut mesh = Mesh::new("guard-reboot");
    mesh.sites(SITES)
        .config(NO_SITES)
        .steps("- capture: underlay\n- handshakes: all\n- expect: {matrix: pods}\n");
    let config = "/run/netlab/private/agent.yaml";
    // Each: how it breaks, and what status says of it.
    for (n, (name, broken, told)) in [
        ("an unknown field", r#"sed -i '0,/{/s//{\"typo\": 1, /'"#, "typo"),
        ("a syntax error", r#"sed -i '1i ]['"#, "the last configuration that was fine"),
        (
            "metrics on an address that is not up",
            r#"sed -i '0,/{/s//{\"metrics\": {\"listen\": \"192.0.2.99:9\"}, /'"#,
            "metrics.listen",
        ),
        (
            "a backend that this kernel lacks",
            r#"sed -i 's/\"userspace\"/\"kernel\"/'"#,
            "this kernel has none",
        ),
    ]
    .into_iter()
    .enumerate()
    {
        mesh.steps(&reboot())
            .steps(&lost(n))
            .steps(&format!("- exec: {{on: aws-1, command: \"cp {config} /run/netlab/private/right.yaml\"}}\n"))
            .steps(&format!("- name: {name}\n  exec: {{on: aws-1, command: \"{} {config}\"}}\n", broken.replace('"', "\\\"").replace("\\\\\"", "\\\"")))
            .steps("- start: aws\n")
            .steps(&format!("- status: {{nodes: aws, where: [{{path: /errors, contains: {told:?}}}, {{path: /guard/standing, equals: true}}]}}\n"))
            .steps("- exec: {on: aws-1, command: nft list table inet sennit, contains: sennit guard}\n")
            .steps(&format!("- exec: {{on: aws-1, command: mv /run/netlab/private/right.yaml {config}}}\n"))
            .steps("- restart: {nodes: aws}\n- handshakes: all\n  timeout: 60s\n- expect: {matrix: pods}\n  timeout: 30s\n")
            .steps(&stopped(n));
    }
    mesh.steps("- assertNoCleartext: {}\n").passes();
}

#[test]
fn an_unreadable_kubeconfig_leaks_nothing() {
    let config = "/run/netlab/private/agent.yaml";
    let mut mesh = Mesh::new("guard-kubeconfig");
    mesh.sites(SITES)
        .config(NO_SITES)
        .steps("- capture: underlay\n- handshakes: all\n- expect: {matrix: pods}\n");
    mesh.steps(&reboot())
        .steps(&lost(0))
        .steps(&format!(
            r#"- exec:
    on: aws-1
    command: |
      cp {config} /run/netlab/private/right.yaml
      python3 - <<P
      import json
      config = json.load(open("{config}"))
      config["registry"] = {{"kube": {{"kubeconfig": "/nonexistent"}}}}
      json.dump(config, open("{config}", "w"))
      P
- start: aws
- status: {{nodes: aws, where: [{{path: /errors, contains: /nonexistent}}, {{path: /guard/standing, equals: true}}]}}
- name: what it remembers is encrypted all the same
  expect: {{matrix: pods}}
  timeout: 30s
- exec: {{on: aws-1, command: mv /run/netlab/private/right.yaml {config}}}
- restart: {{nodes: aws}}
- handshakes: all
  timeout: 60s
"#
        ))
        .steps(&stopped(0))
        .steps("- assertNoCleartext: {}\n")
        .passes();
}

/// A tunnel brings packets for a pod that is gone, whatever else leads there.
#[test]
fn gone_pods_leak_by_no_route() {
    let lan = |name: &str| {
        format!(
            "ip link add {name} link eth0 type macvlan mode bridge && ip addr add 198.18.1.5{}/24 dev {name} && ip link set {name} up",
            name.len()
        )
    };
    let mut mesh = Mesh::new("guard-gone-pods");
    mesh.sites(SITES).steps("- capture: underlay\n- handshakes: all\n- expect: {matrix: pods}\n");
    for (name, command) in [
        ("a company's route", format!("{} && ip route add 10.0.0.0/8 via 198.18.1.1 dev corp0", lan("corp0"))),
        ("halves", "ip route add 0.0.0.0/1 via 198.18.1.1 dev eth0 && ip route add 128.0.0.0/1 via 198.18.1.1 dev eth0".to_owned()),
        ("another table", "ip rule add pref 6000 lookup 77 && ip route add default via 198.18.1.1 dev eth0 table 77".to_owned()),
        ("a route as wide as the prefix", "ip route add 10.1.0.0/25 via 198.18.1.1 dev eth0".to_owned()),
        ("one by a new interface", format!("{} && ip route add 10.1.0.64/26 via 198.18.1.1 dev lan10", lan("lan10"))),
        ("a default route that moves", format!("{} && ip route replace default via 198.18.1.1 dev lte00a", lan("lte00a"))),
        (
            "a name that begins with a digit",
            "ip link set eth0 down && ip link set eth0 name 4g+wan && ip link set 4g+wan up && ip route replace default via 198.18.1.1 dev 4g+wan && ip route replace 10.1.0.0/25 via 198.18.1.1 dev 4g+wan".to_owned(),
        ),
    ] {
        mesh.steps(&format!("- name: {name}\n  exec: {{on: aws-1, command: \"{command}\"}}\n")).steps(
            "- expect: {matrix: pods}\n  timeout: 30s\n- exec: {on: gcp-1-pod-1, command: ping -c3 -i0.2 -W1 10.1.0.99; ping -c2 -i0.2 -W1 fd00:1::99; true}\n",
        );
    }
    mesh.steps("- assertNoCleartext: {}\n").passes();
}
