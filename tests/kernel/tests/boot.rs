//! The early unit of deploy/systemd on a machine that boots: systemd, a disk, and a power that fails. `make
//! kernel-test` runs it.

// All of this is tests.
#![allow(clippy::unwrap_used)]

use std::sync::OnceLock;

use kernel_tests::figures::{figure, from_environment};
use kernel_tests::host::{AGENT, Boot, CONFIG, GUARD, Host, KUBELET, NETWORK, PRE, Seen, Template};
use kernel_tests::mesh::eventually;
use netlab::CaptureStats;

const TABLE: &str = "table inet sennit {";

/// A host whose agent ran once and whose power was cut off then; none where this machine cannot have it.
fn host(test: &str) -> Option<Host> {
    static JOINED: OnceLock<(Template, tempfile::TempDir)> = OnceLock::new();
    let [kernel, initramfs, disk] =
        from_environment(test, ["SENNIT_KERNEL", "SENNIT_HOST_INITRAMFS", "SENNIT_HOST_DISK"])?;
    let (template, _) = JOINED.get_or_init(|| joined(Template { kernel, initramfs, disk }));
    Some(Host::new(template).unwrap())
}

/// Boots a host that was never part of a mesh, and lets it join one.
fn joined(fresh: Template) -> (Template, tempfile::TempDir) {
    let host = Host::new(&fresh).unwrap();
    let boot = host.boot(&[]).unwrap();
    let boot_time = boot.guest.boot_time.as_secs_f64();
    let seen = watched(&boot);
    assert!(!seen.kubelet.contains(TABLE) && seen.wire.marker_frames[0] > 0, "{seen:?}");
    boot.join().unwrap();
    eventually("the agent runs, and the guard stands", || {
        boot.guest.run(&format!("systemctl is-active {AGENT} && nft list table inet sennit"))
    })
    .map_err(|error| error.context(boot.guest.console()))
    .unwrap();
    let before = boot.capture.stats().unwrap().marker_frames[0];
    assert_eq!(boot.cut_power().unwrap().marker_frames[0], before, "none with a guard");
    figure(&format!("a new host: up in {boot_time:.1} s, {before} markers on the wire until it joined"));
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    host.copy_disk(&disk).unwrap();
    (Template { disk, ..fresh }, dir)
}

fn watched(boot: &Boot) -> Seen {
    boot.seen().map_err(|error| error.context(boot.guest.console())).unwrap()
}

fn is_clean(wire: &CaptureStats) -> bool {
    (wire.kernel_drops, wire.watched, &wire.marker_frames[..]) == (0, 0, &[0][..])
}

/// Asserts that the guard came before network and kubelet, and that nothing left.
fn guarded(what: &str, seen: &Seen) {
    for stood in [&seen.kubelet, &seen.network] {
        assert!(stood.contains(TABLE), "{what}: {stood}");
        for blackhole in ["blackhole 10.2.0.0/16", "blackhole fd00:2::/48", "5182"] {
            assert!(stood.contains(blackhole), "{what}: no {blackhole}: {stood}");
        }
    }
    let at = |unit| *seen.active.get(unit).unwrap_or_else(|| panic!("{what}: {unit} never ran: {seen:?}"));
    assert!(at(GUARD) < at(PRE) && at(PRE) <= at(NETWORK) && at(GUARD) < at(KUBELET), "{what}: {seen:?}");
    assert!(is_clean(&seen.wire), "{what}: {:?}", seen.wire);
    let ms = |unit| at(unit) / 1000;
    figure(&format!(
        "{what}: guard at {} ms, {PRE} at {} ms, network at {} ms, kubelet at {} ms, 0 markers in {} frames",
        ms(GUARD),
        ms(PRE),
        ms(NETWORK),
        ms(KUBELET),
        seen.wire.packets
    ));
}

#[test]
fn the_early_unit_guards_before_the_network() {
    let Some(host) = host("the_early_unit_guards_before_the_network") else { return };
    let boot = host.boot(&[]).unwrap();
    guarded("after a power failure", &watched(&boot));
    eventually("the agent takes over", || boot.guest.run(&format!("systemctl is-active {AGENT}"))).unwrap();
    // All that may be wrong at once: an unknown field, nothing to fall back to, a disk without room, and a mount for
    // temporary files that fails.
    let config = boot.guest.run(&format!("cat {CONFIG}")).unwrap().replacen('{', "{\"nonsense\": 1,", 1);
    boot.guest.write(CONFIG, &config).unwrap();
    let mount =
        "[Unit]\nDefaultDependencies=no\n[Mount]\nWhat=none\nWhere=/var/tmp\nType=tmpfs\nOptions=none=such\n";
    boot.guest.write("/etc/systemd/system/var-tmp.mount", mount).unwrap();
    let spoil = "rm /var/lib/sennit/agent.last-good.yaml; n=0
         for size in 64M 16M 4M 1M 64k 4k; do while fallocate -l $size /root/full$n; do n=$((n + 1)); done; done
         sync; mkdir /var/tmp/room; code=$?; sync; exit $code";
    let answer = boot.guest.run(spoil).unwrap_err().to_string();
    assert!(answer.contains("No space left on device"), "{answer}");
    assert!(is_clean(&boot.cut_power().unwrap()));

    let boot = host.boot(&[]).unwrap();
    guarded("with a broken agent.yaml, /var/tmp and a full disk", &watched(&boot));
    assert_eq!(boot.show("var-tmp.mount", "Result").unwrap(), "exit-code");
    eventually("the agent failed, and again", || {
        let (result, restarts) = (boot.show(AGENT, "Result")?, boot.show(AGENT, "NRestarts")?);
        anyhow::ensure!(result != "success" && restarts.parse::<u32>()? > 1, "{result}, {restarts} restarts");
        Ok(())
    })
    .unwrap();
    boot.guest.run("nft list table inet sennit").unwrap();
    let wire = boot.cut_power().unwrap();
    assert!(is_clean(&wire), "{wire:?}");
}

#[test]
fn an_installed_unit_guards_the_next_boot() {
    let Some(host) = host("an_installed_unit_guards_the_next_boot") else { return };
    // A node of a cluster: the agent is a pod's, later, and nobody has installed the early unit.
    let boot = host.boot(&[GUARD, AGENT]).unwrap();
    let seen = watched(&boot);
    assert!(!seen.kubelet.contains(TABLE) && !seen.active.contains_key(GUARD), "{seen:?}");
    let leaked = seen.wire.marker_frames[0];
    assert!(leaked > 0, "the test sees no markers without the unit: {seen:?}");
    figure(&format!("without the unit: {leaked} markers on the wire"));
    // As the init container does; the image's programs are none of the host's.
    let install = format!(
        "rm /etc/systemd/system/sysinit.target.wants/{GUARD} /usr/lib/systemd/system/{GUARD}
         mkdir -p /opt/lab && mv /usr/bin/mesh-agent /usr/bin/nft /opt/lab/
         PATH=$PATH:/opt/lab mesh-agent guard install"
    );
    let said = boot.guest.run(&install).unwrap();
    assert!(said.contains("files written"), "{said}");
    boot.cut_power().unwrap();

    let boot = host.boot(&[AGENT]).unwrap();
    guarded("a unit that a pod installed", &watched(&boot));
    let command = boot.show(GUARD, "ExecStart").unwrap();
    assert!(command.contains("/opt/sennit/boot/lib/ld-"), "{command}");
    let wire = boot.cut_power().unwrap();
    assert!(is_clean(&wire), "{wire:?}");
}
