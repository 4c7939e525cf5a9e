//! Scenarios without agents in real namespaces: the lab itself, its checks, and what a failure leaves.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use meshlab::{Event, Options, Outcome, Report, run_text};

/// False, loudly, where no lab can be built; in CI that is a failure.
fn lab_possible(test: &str) -> bool {
    use netlab::Feature::{MountNamespaces, NetNamespaces, Nftables, PidNamespaces, Privilege, Veth};
    let needed = [Privilege, NetNamespaces, MountNamespaces, PidNamespaces, Veth, Nftables];
    match netlab::capabilities().require(&needed) {
        Ok(()) => true,
        Err(missing) => {
            assert!(std::env::var_os("CI").is_none(), "{test}: {missing}");
            // Not eprintln: the test harness would swallow it.
            let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {missing}");
            false
        }
    }
}

fn run(text: &str, dump: &Path) -> Report {
    let options = Options { dump_dir: Some(dump.to_path_buf()), ..Options::default() };
    run_text(text, options).unwrap_or_else(|error| panic!("{error}"))
}

fn outcomes(report: &Report) -> Vec<Outcome> {
    report.steps.iter().map(|step| step.outcome).collect()
}

#[test]
fn hosts_of_a_lan_reach_each_other_and_pods_without_a_mesh_do_not() {
    if !lab_possible("hosts_of_a_lan_reach_each_other_and_pods_without_a_mesh_do_not") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let report = run(
        "
name: lan
agents: false
sites:
  - {name: a, nodes: 2, podsPerNode: 2, underlay: dual}
  - {name: b, nodes: 1, underlay: dual, firewall: [{protocol: tcp, port: 8080, direction: in}]}
steps:
  - name: nodes over IPv4 and IPv6
    expect: {matrix: nodes}
  - name: ICMP and TCP
    expect:
      pairs:
        - {from: nodes@a, to: nodes, protocol: icmp}
        - {from: a-1, to: a-2, protocol: tcp, port: 8080}
        - {from: b-1, to: a-2, protocol: tcp, port: 8080}
  - name: the firewall drops what comes in and nothing else
    expect: {pairs: [{from: a-1, to: b-1, protocol: tcp, port: 8080, verdict: deny}, {from: a-1, to: b-1}]}
  - name: pods of one node
    expect: {pairs: [{from: pods@a-1, to: pods@a-1}]}
  - name: pods of two nodes
    always:
      for: 200ms
      step: {expect: {pairs: [{from: a-1-pod-1, to: a-2-pod-1, verdict: deny}]}}
  - name: commands
    exec: {on: a-1-pod-1, command: ip -br address, contains: [10.1.0.2, 'fd00:1::2'], notContains: 10.1.0.3}
  - name: an expected failure of a command
    exec: {on: router@a, command: [sh, -c, exit 3], exitCode: 3}
",
        folder.path(),
    );
    assert!(report.passed(), "{}", report.to_text());
    assert!(report.dump.is_none());
}

#[test]
fn a_failed_expectation_ends_the_run_and_leaves_traces() {
    if !lab_possible("a_failed_expectation_ends_the_run_and_leaves_traces") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let dump = folder.path().join("dump");
    let report = run(
        "
name: fails
agents: false
sites: [{name: a, nodes: 2}]
steps:
  - capture: underlay
  - name: no mesh, no pods
    timeout: 0s
    expect: {matrix: pods}
  - name: never tried
    exec: {on: a-1, command: 'true'}
",
        &dump,
    );
    assert_eq!(report.verdict, Outcome::Failed);
    assert_eq!(report.exit_code(), 1);
    assert_eq!(outcomes(&report)[1..], [Outcome::Passed, Outcome::Failed, Outcome::Skipped]);
    let failures = report.steps[2].failures.join("\n");
    assert!(
        failures.contains("a-1-pod-1 -> a-2-pod-1 (IPv4, udp 7777, 10.1.1.2): should pass"),
        "{failures}"
    );
    assert_eq!(report.dump.as_deref(), Some(dump.as_path()));
    let read =
        |name: &str| std::fs::read_to_string(dump.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
    assert!(read("a-1/addresses.txt").contains("198.18.1.11"));
    assert!(read("a-1/routes4.txt").contains("default"));
    assert!(dump.join("a-2/nftables.txt").exists() && dump.join("router-a/routes4.txt").exists());
    let pcaps: Vec<PathBuf> =
        std::fs::read_dir(dump.join("recordings")).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(pcaps.len(), 3, "{pcaps:?}");
    assert!(report.to_junit().contains("failures=\"1\""));
}

#[test]
fn cleartext_on_the_underlay_is_found() {
    if !lab_possible("cleartext_on_the_underlay_is_found") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let report = run(
        "
name: leak
agents: false
routedPods: true
sites: [{name: a, underlay: dual}, {name: b, underlay: dual}]
steps:
  - capture: underlay
  - name: the underlay carries the pods
    expect: {matrix: pods}
  - name: and everyone can read it
    assertNoCleartext: {}
",
        folder.path(),
    );
    assert_eq!(
        outcomes(&report)[1..],
        [Outcome::Passed, Outcome::Passed, Outcome::Failed],
        "{}",
        report.to_text()
    );
    let failures = report.steps[3].failures.join("\n");
    for expected in [
        "a uplink: ",
        "carry the marker in clear; the first is frame ",
        "carry a pod address outside any tunnel; the first is frame ",
        " UTC: udp 10.1.0.2:",
        " -> 10.2.0.2:7777",
        "only 0 encrypted",
    ] {
        assert!(failures.contains(expected), "{failures}");
    }
    assert!(report.picture.links.iter().all(|link| link.marker_hits > 0), "{:?}", report.picture.links);
}

#[test]
fn a_block_cuts_and_its_removal_heals() {
    if !lab_possible("a_block_cuts_and_its_removal_heals") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let report = run(
        "
name: blocks
agents: false
sites: [{name: a, nodes: 2}, {name: b}]
steps:
  - expect: {matrix: nodes}
  - name: the site is cut off, its LAN is not
    block: {at: b}
  - block: {at: a-2, protocol: icmp, address: 198.18.1.11}
  - expect:
      pairs:
        - {from: a-1, to: b-1, verdict: deny}
        - {from: a-1, to: a-2}
        - {from: a-1, to: a-2, protocol: icmp, verdict: deny}
  - unblock: all
  - expect: {matrix: nodes, protocol: icmp}
  - traffic: {start: flow, from: a-1, to: b-1, packetsPerSecond: 200}
  - expect: {matrix: nodes}
  - traffic: {stop: flow, maxLost: 0, minReceived: 1}
",
        folder.path(),
    );
    assert!(report.passed(), "{}", report.to_text());
    assert_eq!(report.picture.streams.len(), 1);
}

#[test]
fn lost_packets_of_a_stream_are_counted() {
    if !lab_possible("lost_packets_of_a_stream_are_counted") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let report = run(
        "
name: losses
agents: false
sites: [{name: a}, {name: b}]
steps:
  - expect: {matrix: nodes}
  - traffic: {start: flow, from: a-1, to: b-1, packetsPerSecond: 200}
  - block: {at: b}
  - expect: {pairs: [{from: a-1, to: b-1, verdict: deny}]}
  - unblock: b
  - expect: {matrix: nodes}
  - traffic: {stop: flow}
",
        folder.path(),
    );
    assert_eq!(report.verdict, Outcome::Failed);
    let last = report.steps.last().unwrap();
    assert!(last.failures[0].contains("at most 0 may be lost"), "{}", report.to_text());
    assert!(report.picture.streams[0].lost >= 100, "{:?}", report.picture.streams);
}

#[test]
fn an_interrupted_run_tears_down_and_says_so() {
    if !lab_possible("an_interrupted_run_tears_down_and_says_so") {
        return;
    }
    let interrupt = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&interrupt);
    let observer: meshlab::Observer = Arc::new(move |event| {
        if matches!(event, Event::Begin(_, _, name) if *name == "waits for what never comes") {
            flag.store(true, Ordering::SeqCst);
        }
    });
    let text = "
name: interrupted
agents: false
sites: [{name: a}]
steps:
  - name: waits for what never comes
    timeout: 1h
    eventually: {deadline: 1h, step: {exec: {on: a-1, command: 'false'}}}
";
    let report = run_text(text, Options { interrupt, observer, ..Options::default() }).unwrap();
    assert_eq!((report.verdict, report.exit_code()), (Outcome::Interrupted, 130));
}

#[test]
fn a_signal_ends_the_program_with_a_sentence_and_130() {
    use std::io::{BufRead, BufReader};
    if !lab_possible("a_signal_ends_the_program_with_a_sentence_and_130") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let sleeper = format!("sleep 3{}", std::process::id());
    let text = format!(
        "name: x\nagents: false\nsites: [{{name: a}}]\nsteps:\n  - exec: {{on: a-1, command: '{sleeper} & echo'}}\n  \
         - name: endless\n    eventually: {{deadline: 1h, step: {{exec: {{on: a-1, command: 'false'}}}}}}\n"
    );
    std::fs::write(folder.path().join("x.yaml"), text).unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_meshlab"))
        .args(["run", "x.yaml"])
        .current_dir(folder.path())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("endless")), "the step never began");
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    let rest: Vec<String> = lines.map(Result::unwrap).collect();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(rest.iter().any(|line| line.contains("interrupted; the lab is torn down")), "{rest:?}");
    let left = std::fs::read_dir("/proc").unwrap().flatten().any(|entry| {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).replace('\0', " ").trim_end() == sleeper
    });
    assert!(!left, "a process of the lab outlived it");
}

#[test]
fn a_command_is_killed_when_its_time_is_over() {
    if !lab_possible("a_command_is_killed_when_its_time_is_over") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for step in [
        "{timeout: 1s, exec: {on: a-1-pod-1, command: sleep 100}}",
        "{eventually: {deadline: 1s, step: {exec: {on: a-1-pod-1, command: sleep 100}}}}",
        "{always: {for: 1s, step: {timeout: 1s, exec: {on: a-1-pod-1, command: sleep 100}}}}",
    ] {
        let text = format!("name: slow\nagents: false\nsites: [{{name: a}}]\nsteps:\n  - {step}\n");
        let report = run(&text, folder.path());
        let last = report.steps.last().unwrap();
        assert_eq!(last.outcome, Outcome::Failed, "{step}");
        let failures = last.failures.join("\n");
        assert!(failures.contains("did not end within 1s"), "{step}: {failures}");
        // Two tries at most, of one second each.
        assert!(last.duration < std::time::Duration::from_secs(6), "{step}: {:?}", last.duration);
    }
}

#[test]
fn a_signal_during_any_wait_is_an_interruption_without_traces() {
    if !lab_possible("a_signal_during_any_wait_is_an_interruption_without_traces") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for (earlier, step) in [
        (
            "{traffic: {start: t, from: a-1-pod-1, to: a-2-pod-1}}",
            "{timeout: 1h, traffic: {stop: t, minReceived: 10}}",
        ),
        ("{exec: {on: a-1, command: 'true'}}", "{timeout: 1h, exec: {on: a-1, command: sleep 4000}}"),
    ] {
        let interrupt = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&interrupt);
        let observer: meshlab::Observer = Arc::new(move |event| {
            if matches!(event, Event::Begin(3, ..)) {
                // So late that the step waits; what has to come of it is the same in either case.
                let flag = Arc::clone(&flag);
                std::thread::spawn(move || {
                    std::thread::sleep(std::time::Duration::from_millis(300));
                    flag.store(true, Ordering::SeqCst);
                });
            }
        });
        let text = format!(
            "name: cut\nagents: false\nsites: [{{name: a, nodes: 2}}]\nsteps:\n  - {earlier}\n  - {step}\n"
        );
        let dump_dir = Some(folder.path().join("dump"));
        let report =
            run_text(&text, Options { interrupt, observer, dump_dir, ..Options::default() }).unwrap();
        assert_eq!((report.verdict, report.exit_code()), (Outcome::Interrupted, 130), "{step}");
        assert_eq!(outcomes(&report)[2], Outcome::Interrupted, "{step}");
        assert_eq!(report.steps[2].failures, ["interrupted by a signal"], "{step}");
        assert!(report.dump.is_none() && !folder.path().join("dump").exists(), "{step}");
    }
}

fn meshlab(arguments: &[&str], folder: &Path) -> (Option<i32>, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_meshlab"))
        .args(arguments)
        .current_dir(folder)
        .env("MESHLAB_RUNTIME_DIR", folder.join("runtime"))
        .output()
        .unwrap_or_else(|error| panic!("cannot run meshlab: {error}"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

#[test]
fn the_program_tells_wrong_scenarios_from_failed_ones() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    write("unknown.yaml", "name: x\nsites:\n  - {name: a, colour: blue}\n");
    let (code, _, stderr) = meshlab(&["run", "unknown.yaml"], folder.path());
    assert_eq!(code, Some(2));
    assert!(stderr.contains("unknown.yaml:3:") && stderr.contains("colour"), "{stderr}");
    let (code, _, stderr) = meshlab(&["check", "missing.yaml"], folder.path());
    assert_eq!(code, Some(2), "{stderr}");

    write("agents.yaml", "name: x\nsites: [{name: a}]\n");
    write(
        "fails.yaml",
        "name: x\nagents: false\nsites: [{name: a}]\nsteps: [{exec: {on: a-1, command: exit 7}}]\n",
    );
    if !lab_possible("the_program_tells_wrong_scenarios_from_failed_ones") {
        return;
    }
    let (code, stdout, _) =
        meshlab(&["run", "fails.yaml", "--junit", "out/junit.xml", "-o", "json"], folder.path());
    assert_eq!(code, Some(1), "{stdout}");
    let report: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(report["verdict"], "failed");
    assert_eq!(report["dump"], "reports/x-1");
    assert!(folder.path().join("reports/x-1/a-1/addresses.txt").exists());
    assert!(std::fs::read_to_string(folder.path().join("out/junit.xml")).unwrap().contains("exit code 7"));
}

/// Runs a scenario with `--keep`; answers standard output up to the first line with `last` and the process.
fn keep(folder: &Path, step: &str, last: &str) -> (Vec<String>, std::process::Child) {
    use std::io::{BufRead, BufReader};
    let start = || -> std::io::Result<std::process::Child> {
        let text = format!("name: kept\nagents: false\nsites: [{{name: a}}]\nsteps: [{step}]\n");
        std::fs::write(folder.join("kept.yaml"), text)?;
        Command::new(env!("CARGO_BIN_EXE_meshlab"))
            .args(["run", "--keep", "--junit", "junit.xml", "kept.yaml"])
            .current_dir(folder)
            .env("MESHLAB_RUNTIME_DIR", folder.join("runtime"))
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::null())
            .spawn()
    };
    let mut child = start().unwrap_or_else(|error| panic!("cannot run meshlab: {error}"));
    let mut seen = Vec::new();
    for line in
        child.stdout.take().into_iter().flat_map(|out| BufReader::new(out).lines()).map_while(Result::ok)
    {
        let enough = line.contains(last);
        seen.push(line);
        if enough {
            break;
        }
    }
    (seen, child)
}

#[test]
fn a_kept_lab_reports_first_and_ends_with_the_verdict() {
    if !lab_possible("a_kept_lab_reports_first_and_ends_with_the_verdict") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let passes = "{exec: {on: a-1, command: 'true'}}";
    let up = || {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while meshlab(&["status"], folder.path()).0 != Some(0) {
            assert!(std::time::Instant::now() < deadline, "the lab is not held");
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
    };

    let (seen, mut child) = keep(folder.path(), passes, "kept: passed");
    assert!(seen.last().is_some_and(|line| line.contains("kept: passed")), "{seen:?}");
    up();
    assert!(folder.path().join("junit.xml").exists());
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0), "Ctrl-C after all steps passed");

    let (_, mut child) = keep(folder.path(), passes, "kept: passed");
    up();
    assert_eq!(meshlab(&["down"], folder.path()).0, Some(0));
    assert_eq!(child.wait().unwrap().code(), Some(0), "`down` after all steps passed");

    let (_, mut child) = keep(folder.path(), "{exec: {on: a-1, command: 'false'}}", "kept: FAILED");
    up();
    assert_eq!(meshlab(&["down", "kept"], folder.path()).0, Some(0));
    assert_eq!(child.wait().unwrap().code(), Some(1), "`down` after a step failed");
}

#[test]
fn where_progress_and_report_are_one_stream_each_step_stands_there_once() {
    if !lab_possible("where_progress_and_report_are_one_stream_each_step_stands_there_once") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let text = "name: x\nagents: false\nsites: [{name: a, nodes: 2}]\nsteps:\n  - name: the only step\n    \
                expect: {pairs: [{from: a-1, to: a-2}]}\n";
    std::fs::write(folder.path().join("x.yaml"), text).unwrap();
    let log = std::fs::File::options().create(true).append(true).open(folder.path().join("log")).unwrap();
    let status = Command::new(env!("CARGO_BIN_EXE_meshlab"))
        .args(["run", "x.yaml"])
        .current_dir(folder.path())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .status()
        .unwrap();
    let log = std::fs::read_to_string(folder.path().join("log")).unwrap();
    assert_eq!(status.code(), Some(0), "{log}");
    assert_eq!(log.matches("the only step").count(), 1, "{log}");
    assert!(log.contains("1 probe as expected") && log.contains("1 site, 2 nodes, 2 pods"), "{log}");
    assert!(log.contains("x: passed"), "{log}");
    let (_, stdout, stderr) = meshlab(&["run", "x.yaml"], folder.path());
    assert!(stdout.contains("the only step") && stderr.contains("the only step"), "{stdout}{stderr}");
}

#[test]
fn a_held_lab_answers_and_goes_down() {
    if !lab_possible("a_held_lab_answers_and_goes_down") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("up.yaml"), "name: held\nagents: false\nsites: [{name: a}]\n").unwrap();
    let mut holder = Command::new(env!("CARGO_BIN_EXE_meshlab"))
        .args(["up", "up.yaml"])
        .current_dir(folder.path())
        .env("MESHLAB_RUNTIME_DIR", folder.path().join("runtime"))
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while meshlab(&["status"], folder.path()).0 != Some(0) {
        assert!(std::time::Instant::now() < deadline, "the lab does not come up");
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    let (code, stdout, stderr) = meshlab(&["exec", "a-1-pod-1", "--", "ip", "-br", "address"], folder.path());
    assert!(code == Some(0) && stdout.contains("10.1.0.2"), "{stdout}{stderr}");
    assert_eq!(meshlab(&["exec", "a-1", "--", "sh", "-c", "exit 9"], folder.path()).0, Some(9));
    let (code, _, stderr) = meshlab(&["exec", "mars", "--", "true"], folder.path());
    assert!(code == Some(1) && stderr.contains("there is no `mars`"), "{stderr}");
    let (code, stdout, _) = meshlab(&["status", "-o", "json"], folder.path());
    assert!(code == Some(0) && stdout.contains("\"held\"") && stdout.contains("a-1-pod-1"), "{stdout}");
    assert_eq!(meshlab(&["up", "up.yaml"], folder.path()).0, Some(1), "a second lab of the name");
    assert_eq!(meshlab(&["down"], folder.path()).0, Some(0));
    assert_eq!(holder.wait().unwrap().code(), Some(0));
}

#[test]
fn leases_come_and_go() {
    if !lab_possible("leases_come_and_go") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let text = "
name: leases
agents: false
sites: [{name: a, nodes: 2, underlay: dual}]
steps:
  - dhcp: {lease: a-1, address: 10.9.0.7/24, routes: [10.8.0.0/16], mtu: 1400}
  - dhcp: {lease: a-2, address: 10.9.0.8/24, gateway: true}
  - dhcp: {lease: a-1, address: 'fd09::7/64', gateway: true}
  - exec:
      on: a-1
      command: ip addr show dev eth0; ip route; ip -6 route
      contains: [10.9.0.7/24, 'fd09::7/', mtu 1400, 10.8.0.0/16 via 10.9.0.1 dev eth0, default via fe80]
      notContains: 10.9.0.8
  - exec: {on: a-2, command: ip addr show dev eth0; ip route, contains: [10.9.0.8/24, default via 10.9.0.1], notContains: 10.9.0.7}
  - name: another of the same family replaces it
    dhcp: {lease: a-1, address: 10.9.0.17/24}
  - exec: {on: a-1, command: ip addr show dev eth0, contains: [10.9.0.17/24, mtu 1500], notContains: 10.9.0.7/24}
  - dhcp: {release: a-1}
  - exec: {on: a-1, command: ip addr show dev eth0; ip route; ip -6 route, notContains: [10.9.0, 'fd09::7', 10.8.0.0]}
  - dhcp: {release: a-2}
  - expect: {matrix: nodes}
";
    let resolv = || std::fs::read("/etc/resolv.conf").unwrap_or_default();
    let before = resolv();
    let options = Options { dump_dir: Some(folder.path().to_path_buf()), ..Options::default() };
    match run_text(text, options) {
        Ok(report) => assert!(report.passed(), "{}", report.to_text()),
        Err(meshlab::RunError::Missing(missing)) => {
            assert!(std::env::var_os("CI").is_none(), "leases_come_and_go: {missing}");
            let _ = writeln!(std::io::stderr(), "SKIPPED leases_come_and_go: {missing}");
        }
        Err(error) => panic!("{error}"),
    }
    assert_eq!(resolv(), before, "resolv.conf has changed");
}
