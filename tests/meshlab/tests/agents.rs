//! Scenarios with real agents. They need `mesh-agent` and `mesh-wg`, built before:
//! `cargo build -p mesh-agent -p mesh-wg`.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use meshlab::agents::Binaries;
use meshlab::{Options, Report, run_file, run_text};

/// False, loudly, where agents cannot be run; in CI that is a failure.
fn agents_possible(test: &str) -> bool {
    use netlab::Feature::{
        MountNamespaces, Nat, NetNamespaces, Nftables, PidNamespaces, Privilege, Tun, Veth,
    };
    let needed = [Privilege, NetNamespaces, MountNamespaces, PidNamespaces, Veth, Nftables, Nat, Tun];
    let lab = netlab::capabilities().require(&needed).map_err(|error| error.to_string());
    match lab.and_then(|()| Binaries::find(None)) {
        Ok(_) => true,
        Err(missing) => {
            assert!(std::env::var_os("CI").is_none(), "{test}: {missing}");
            // Not eprintln: the test harness would swallow it.
            let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {missing}");
            false
        }
    }
}

fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/examples").join(name)
}

fn options(folder: &Path) -> Options {
    Options { dump_dir: Some(folder.to_path_buf()), ..Options::default() }
}

fn assert_passed(report: &Report) {
    assert!(report.passed(), "{}", report.to_text());
}

#[test]
fn two_sites_become_one_encrypted_network() {
    if !agents_possible("two_sites_become_one_encrypted_network") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let report = run_file(&example("two-sites.yaml"), options(folder.path())).unwrap();
    assert_passed(&report);
    assert_eq!(report.picture.handshake_pairs(), (1, 1));
    assert!(report.picture.encrypted_bytes > 0);
    assert_eq!(report.picture.links.len(), 4);
}

#[test]
fn agents_come_and_go_without_a_lost_packet() {
    if !agents_possible("agents_come_and_go_without_a_lost_packet") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let report = run_file(&example("restart-under-traffic.yaml"), options(folder.path())).unwrap();
    assert_passed(&report);
    assert_eq!(report.picture.streams.len(), 2);
    assert!(report.picture.streams.iter().all(|stream| stream.lost == 0));
}

#[test]
fn a_node_without_agent_and_device_sends_nothing_in_clear() {
    if !agents_possible("a_node_without_agent_and_device_sends_nothing_in_clear") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    assert_passed(&run_file(&example("fails-closed.yaml"), options(folder.path())).unwrap());
}

#[test]
fn a_dead_device_and_a_cut_path_come_back_behind_nat() {
    if !agents_possible("a_dead_device_and_a_cut_path_come_back_behind_nat") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let text = "
name: comes-back
sites: [{name: aws, nodes: 2}, {name: lab, nat: cone, mtu: 1400}]
mesh: {config: {wireguard: {persistentKeepalive: 1}}}
steps:
  - capture: underlay
  - handshakes: all
  - expect: {matrix: pods}
  - expect: {matrix: nodes, protocol: icmp}
  - name: the device behind the NAT dies, its agent brings up another, and that one dials again
    restart: {nodes: lab-1, target: device, signal: KILL}
  - handshakes: all
  - expect: {matrix: pods, protocol: tcp}
  - name: no WireGuard through the router of lab
    block: {at: lab, protocol: udp, port: 51820}
  - expect: {pairs: [{from: pods@aws, to: pods@lab, verdict: deny}, {from: pods@aws-1, to: pods@aws-2}]}
  - unblock: lab
  - expect: {matrix: pods}
    timeout: 60s
  - stop: lab
  - name: the tunnels outlive their agent
    expect: {matrix: pods}
  - start: lab
  - handshakes: all
  - status:
      nodes: lab-1
      where: [{path: '/peers/*/encrypted', equals: true}, {path: /peers, count: 2}]
  - assertNoCleartext: {}
";
    assert_passed(&run_text(text, options(folder.path())).unwrap());
}

#[test]
fn an_agent_that_cannot_start_is_named_with_its_last_words() {
    if !agents_possible("an_agent_that_cannot_start_is_named_with_its_last_words") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let text = "
name: refuses
sites: [{name: aws, nodes: 2}]
mesh: {perNode: {aws-2: {wireguard: {noSuchField: 1}}}}
steps:
  - handshakes: all
";
    let report = run_text(text, options(folder.path())).unwrap();
    assert_eq!(report.exit_code(), 1);
    let failures = report.steps[1].failures.join("\n");
    assert!(failures.contains("aws-2: mesh-agent ended") && failures.contains("noSuchField"), "{failures}");
    assert!(folder.path().join("aws-2/agent.log").exists());
}

#[test]
fn the_traces_of_a_failure_hold_no_private_key() {
    if !agents_possible("the_traces_of_a_failure_hold_no_private_key") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let keys = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&keys);
    let hold: meshlab::Hold = Box::new(move |stage, _| {
        for host in stage.lab().hosts() {
            let file = host.private_dir().join("state/keys/private.key");
            let key = std::fs::read_to_string(file).unwrap_or_default();
            seen.lock().unwrap().push(key.trim().to_owned());
        }
    });
    let text = "
name: traces
sites: [{name: aws}, {name: gcp}]
steps:
  - handshakes: all
  - exec: {on: aws-1, command: 'false'}
";
    let report = run_text(text, Options { hold: Some(hold), ..options(folder.path()) }).unwrap();
    assert_eq!(report.exit_code(), 1);
    let keys = keys.lock().unwrap();
    assert!(
        keys.len() == 2 && keys.iter().all(|key| key.len() >= 32),
        "the keys were not found where they are kept"
    );
    let mut files = 0;
    let mut folders = vec![folder.path().to_path_buf()];
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            files += 1;
            let text = String::from_utf8_lossy(&std::fs::read(&path).unwrap()).into_owned();
            assert!(
                !keys.iter().any(|key| text.contains(key.as_str())),
                "{} holds a private key",
                path.display()
            );
        }
    }
    assert!(files > 20, "{files} files");
}
