//! What the kernel's WireGuard does in a mesh, on an emulated machine that has it. `make kernel-test` runs it.
//!
//! One guest serves all tests, one after the other; each leaves the mesh as it found it.

// All of this is tests.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use kernel_tests::figures::{figure, from_environment};
use kernel_tests::guest::Image;
use kernel_tests::mesh::{
    GUEST, GUEST_ADDRESS, GUEST_POD, INTERFACE, LONG_FLOW_RATE, Mesh, OUTSIDE, PATIENCE, TAP, eventually,
};
use kernel_tests::transfer;
use netlab::flow::{self, FlowSpec};
use netlab::probe::{Kind, Probe};
use netlab::{CaptureSpec, IpNet, Ports, Protocol, Rule};

/// WireGuard begins a new session after so many seconds (REKEY_AFTER_TIME, section 6.1 of the WireGuard paper).
const REKEY_AFTER: u64 = 120;
const TRANSFER_BYTES: usize = 4 << 20;

/// The mesh, for one test at a time; none where this machine cannot have it.
fn mesh(test: &str) -> Option<MutexGuard<'static, Mesh>> {
    static MESH: OnceLock<Result<Mutex<Mesh>, String>> = OnceLock::new();
    let variables = ["SENNIT_KERNEL", "SENNIT_KERNEL_INITRAMFS", "SENNIT_KERNEL_PROGRAMS", "SENNIT_BIN_DIR"];
    let [kernel, base, programs, bin] = from_environment(test, variables)?;
    let mesh = MESH.get_or_init(|| {
        let image = Image { kernel, initramfs: vec![base, programs], disk: None, words: String::new() };
        let begun = Instant::now();
        let mesh = Mesh::start(&image, &bin).map_err(|error| format!("{error:#}"))?;
        let release = mesh.guest.run("uname -r").map_err(|error| format!("{error:#}"))?;
        let boot = mesh.guest.boot_time.as_secs_f64();
        let all = begun.elapsed().as_secs_f64();
        figure(&format!(
            "guest Linux {}: up in {boot:.1} s, the mesh of three stands after {all:.1} s",
            release.trim()
        ));
        Ok(Mutex::new(mesh))
    });
    Some(mesh.as_ref().unwrap().lock().unwrap_or_else(PoisonError::into_inner))
}

#[test]
fn the_plan_is_the_same_inside_and_outside() {
    let Some(mesh) = mesh("the_plan_is_the_same_inside_and_outside") else { return };
    let mut bytes = 0;
    for (node, _) in OUTSIDE.into_iter().chain([GUEST]) {
        for form in ["json", "wg", "routes", "dot"] {
            let (inside, outside) = mesh.plans(node, form).unwrap();
            assert!(inside.len() > 100, "{node}: {form}: {inside}");
            assert_eq!(inside, outside, "{node}: {form}");
            bytes += inside.len();
        }
    }
    figure(&format!("12 plans, {bytes} bytes, equal to the byte"));
}

/// The peers of a `wg` configuration: by key, their other lines; AllowedIPs in order.
fn peers(text: &str) -> BTreeMap<String, BTreeSet<String>> {
    let mut peers = BTreeMap::new();
    for section in text.split("[Peer]").skip(1) {
        let lines = section.lines().filter_map(|line| line.split_once(" = "));
        let fields: BTreeMap<&str, &str> = lines.map(|(name, value)| (name.trim(), value.trim())).collect();
        let rest = fields.iter().filter(|(name, _)| **name != "PublicKey").map(|(name, value)| {
            let values: BTreeSet<&str> = value.split(", ").collect();
            format!("{name} = {values:?}")
        });
        peers.insert(fields["PublicKey"].to_owned(), rest.collect());
    }
    peers
}

#[test]
fn the_kernel_device_holds_what_the_plan_says() {
    let Some(mesh) = mesh("the_kernel_device_holds_what_the_plan_says") else { return };
    let planned = peers(&mesh.plans(GUEST.0, "wg").unwrap().0);
    let held = peers(&mesh.guest.run(&format!("wg showconf {INTERFACE}")).unwrap());
    assert_eq!(planned.len(), OUTSIDE.len());
    assert!(planned.values().all(|fields| fields.len() == 3), "{planned:?}");
    assert_eq!(held, planned);
    let link =
        mesh.guest.run(&format!("ip -d link show {INTERFACE}; wg show {INTERFACE} listen-port")).unwrap();
    assert!(link.contains("mtu 1420") && link.contains("wireguard") && link.contains("51820"), "{link}");
    let status = mesh.status(GUEST.0).unwrap();
    assert_eq!(
        (&status["backend"], &status["guard"]["standing"]),
        (&"kernel".into(), &true.into()),
        "{status}"
    );
    // A pass follows the last of a peer's moves, and the next finds all as it should be.
    eventually("nothing is left to write", || {
        let status = mesh.status(GUEST.0)?;
        anyhow::ensure!(status["changes"][0] == 0, "{status}");
        Ok(())
    })
    .unwrap();
    figure(&format!("{} peers with endpoint, AllowedIPs and keepalive as planned", held.len()));
}

/// Both pass by the guard or policy, and the machine of the other suites has neither.
#[test]
fn flowtables_and_vrfs_of_others_are_named() {
    let Some(mesh) = mesh("flowtables_and_vrfs_of_others_are_named") else { return };
    for (what, make, undo, code) in [
        (
            "a flowtable",
            "nft 'add table inet other; add flowtable inet other fast { hook ingress priority 0; devices = { eth0, pod0 }; }'",
            "nft delete table inet other",
            "flowtable-foreign",
        ),
        (
            "a VRF",
            "ip link add vrf0 type vrf table 99 && ip link set vrf0 up && ip link set sennitx4 master vrf0",
            "ip link set sennitx4 nomaster && ip link del vrf0",
            "vrf-holds-interface",
        ),
    ] {
        mesh.guest.run(make).unwrap();
        eventually(&format!("{what} is named, and the node is not ready"), || {
            let status = mesh.status(GUEST.0)?;
            let named = status["problems"].as_array().into_iter().flatten().any(|one| one["code"] == code);
            anyhow::ensure!(named && status["ready"] == false, "{}", status["problems"]);
            Ok(())
        })
        .unwrap();
        mesh.guest.run(undo).unwrap();
        eventually(&format!("{what} is gone, and the node is ready"), || {
            let status = mesh.status(GUEST.0)?;
            anyhow::ensure!(status["ready"] == true, "{} {}", status["problems"], status["errors"]);
            Ok(())
        })
        .unwrap();
    }
}

#[test]
fn traffic_passes_both_ways_and_only_wireguard_is_on_the_wire() {
    let Some(mesh) = mesh("traffic_passes_both_ways_and_only_wireguard_is_on_the_wire") else { return };
    let guest_v6: IpAddr = "fd00:3:0:1::a".parse().unwrap();
    for (number, (node, _)) in OUTSIDE.into_iter().enumerate() {
        let pod = mesh.pod(node).unwrap();
        let address = mesh.pod_address(node).unwrap();
        for to in [IpAddr::from(GUEST_POD), guest_v6] {
            let probe = Probe::new(&pod, to, Kind::Icmp).deadline(PATIENCE).retry(Duration::from_secs(1));
            probe.payload(transfer::MARKER).ask().unwrap();
        }
        let v6 = format!("fd00:{}:0:1::a", number + 1);
        for to in [address.to_string(), v6] {
            mesh.guest.run(&format!("ip netns exec pod ping -c 3 -W 20 {to}")).unwrap();
        }

        let listener = pod.run(|| TcpListener::bind(("0.0.0.0", 9000))).unwrap().unwrap();
        let received = std::thread::spawn(move || transfer::receive(&listener));
        let send = format!("ip netns exec pod kernel-guest send {address}:9000 {TRANSFER_BYTES}");
        let out: f64 = mesh.guest.run(&send).unwrap().trim().parse().unwrap();
        assert_eq!(received.join().unwrap().unwrap(), TRANSFER_BYTES as u64);

        let port = 9001 + u16::try_from(number).unwrap();
        let receive = format!("ip netns exec pod kernel-guest receive 0.0.0.0:{port}");
        let back = std::thread::scope(|scope| {
            let receiving = scope.spawn(|| mesh.guest.run(&receive));
            let to = SocketAddr::from((GUEST_POD, port));
            let sent = pod.run(move || transfer::send(to, TRANSFER_BYTES, PATIENCE)).unwrap();
            assert_eq!(receiving.join().unwrap().unwrap().trim(), TRANSFER_BYTES.to_string());
            sent.unwrap()
        });
        let rate = |seconds: f64| TRANSFER_BYTES as f64 * 8.0 / 1e6 / seconds;
        figure(&format!(
            "{node}: {} MiB each way, digests equal: guest sends {:.1} Mbit/s, receives {:.1} Mbit/s",
            TRANSFER_BYTES >> 20,
            rate(out),
            rate(back.as_secs_f64())
        ));
    }

    let seen = mesh.capture.stats().unwrap();
    assert!(seen.wireguard > 4 * (TRANSFER_BYTES as u64 / 1420), "{seen:?}");
    assert_eq!(
        (seen.other, seen.watched, &seen.marker_frames[..], seen.kernel_drops),
        (0, 0, &[0][..], 0),
        "{seen:?}"
    );
    // The same search finds what really is in clear.
    let clear = "control in clear";
    let router = mesh.lab.site(GUEST.1).unwrap().namespace();
    let control = router.capture(TAP, CaptureSpec::new().marker(clear)).unwrap();
    let probe = Probe::new(router, GUEST_ADDRESS.into(), Kind::Icmp).payload(clear);
    probe.deadline(PATIENCE).retry(Duration::from_secs(1)).ask().unwrap();
    assert!(control.stop().unwrap().stats.marker_frames[0] >= 2);
    figure(&format!(
        "on the wire: {} WireGuard, {} ARP, {} ICMP frames, nothing else, marker in none",
        seen.wireguard, seen.arp, seen.icmp
    ));
}

/// Whether guest and others reach each other on this path.
fn paths(mesh: &Mesh, wanted: &str) -> anyhow::Result<()> {
    for (node, _) in OUTSIDE {
        let (guest, outside) = (mesh.status(GUEST.0)?, mesh.status(node)?);
        for (status, peer) in [(&guest, node), (&outside, GUEST.0)] {
            let peers = status["peers"].as_array().unwrap();
            let path = &peers.iter().find(|found| found["name"] == peer).unwrap()["path"];
            anyhow::ensure!(*path == wanted, "{} -> {peer}: {path}", status["node"]);
        }
    }
    Ok(())
}

// The last by its name: the flow that the rekeying is seen by must not lose anything.
#[test]
fn with_its_port_blocked_the_kernel_device_goes_on_inside_of_vxlan() {
    let Some(mesh) = mesh("with_its_port_blocked_the_kernel_device_goes_on_inside_of_vxlan") else { return };
    eventually("all paths are probed", || paths(&mesh, "direct")).unwrap();
    let router = mesh.lab.site(GUEST.1).unwrap().namespace();
    let ports = Some(Ports::Either(51820, 51820));
    let block = router.block(Rule { protocol: Some(Protocol::Udp), ports, ..Rule::any() }).unwrap();
    let begun = Instant::now();
    eventually("the paths are VXLAN", || paths(&mesh, "vxlan")).unwrap();
    let left = begun.elapsed();
    for (node, _) in OUTSIDE {
        let address = mesh.pod_address(node).unwrap();
        mesh.guest.run(&format!("ip netns exec pod ping -c 3 -W 20 {address}")).unwrap();
        let endpoint = mesh.kernel("endpoints", node).unwrap();
        assert!(endpoint.starts_with("[fd"), "the kernel sends to {endpoint}");
    }
    router.unblock(block).unwrap();
    let begun = Instant::now();
    eventually("the paths are direct again", || paths(&mesh, "direct")).unwrap();
    figure(&format!(
        "in VXLAN after {:.1} s, direct again after {:.1} s",
        left.as_secs_f64(),
        begun.elapsed().as_secs_f64()
    ));
}

#[test]
fn the_kernel_device_follows_a_peer_that_roams() {
    let Some(mesh) = mesh("the_kernel_device_follows_a_peer_that_roams") else { return };
    let host = mesh.host("east-1").unwrap();
    let pod = mesh.pod("east-1").unwrap();
    let session = mesh.handshake("east-1").unwrap();
    let (home, away) = ("172.16.1.10", "172.16.1.77");
    let endpoint = || mesh.kernel("endpoints", "east-1");
    assert_eq!(endpoint().unwrap(), format!("{home}:51820"));
    for (from, to) in [(home, away), (away, home)] {
        let begun = Instant::now();
        host.ip(&format!(
            "addr del {from}/24 dev eth0\naddr add {to}/24 dev eth0\nroute replace default via 172.16.1.1"
        ))
        .unwrap();
        let probe = Probe::new(&pod, GUEST_POD.into(), Kind::Icmp).retry(Duration::from_millis(500));
        probe.deadline(PATIENCE).ask().unwrap();
        eventually("the kernel sends to the new address", || {
            let at = endpoint()?;
            anyhow::ensure!(at == format!("{to}:51820"), "it sends to {at}");
            Ok(())
        })
        .unwrap();
        // And the other way, to where it has never sent before.
        let address = mesh.pod_address("east-1").unwrap();
        mesh.guest.run(&format!("ip netns exec pod ping -c 1 -W 20 {address}")).unwrap();
        figure(&format!("{from} -> {to}: followed within {:.1} s", begun.elapsed().as_secs_f64()));
    }
    if mesh.handshake("east-1").unwrap() == session {
        figure("within one session, without a new handshake");
    }
}

#[test]
fn a_foreign_inner_source_is_dropped_by_both_implementations() {
    let Some(mesh) = mesh("a_foreign_inner_source_is_dropped_by_both_implementations") else { return };
    // An address of west-1's, whom neither of the two speaks for.
    let foreign: IpAddr = "10.2.1.99".parse().unwrap();
    let (host, pod) = (mesh.host("east-1").unwrap(), mesh.pod("east-1").unwrap());
    let refused = || -> u64 {
        let path = format!("/sys/class/net/{INTERFACE}/statistics/rx_frame_errors");
        mesh.guest.run(&format!("cat {path}")).unwrap().trim().parse().unwrap()
    };
    let ask = |source: Option<IpAddr>, deadline| {
        let probe = Probe { source, ..Probe::new(&host, GUEST_POD.into(), Kind::Icmp) };
        probe.deadline(deadline).retry(Duration::from_millis(250)).ask()
    };
    ask(None, PATIENCE).unwrap();
    let before = refused();
    host.ip(&format!("addr add {foreign}/32 dev lo")).unwrap();
    ask(Some(foreign), Duration::from_secs(3)).unwrap_err();
    host.ip(&format!("addr del {foreign}/32 dev lo")).unwrap();
    let by_kernel = refused() - before;
    assert!(by_kernel >= 5, "{by_kernel}");
    ask(None, PATIENCE).unwrap();
    assert_eq!(refused() - before, by_kernel, "an honest source is not refused");

    let inside: IpNet = "10.3.1.0/24".parse().unwrap();
    let seen = pod.capture("eth0", CaptureSpec::new().watch(IpNet::from(foreign))).unwrap();
    let honest = pod.capture("eth0", CaptureSpec::new().watch(inside)).unwrap();
    let sent_to_east = || -> u64 {
        mesh.kernel("transfer", "east-1").unwrap().split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    let arrived_at_east = || -> u64 {
        let status = mesh.status("east-1").unwrap();
        let guest = status["peers"].as_array().unwrap().iter().find(|peer| peer["name"] == GUEST.0).unwrap();
        guest["rxBytes"].as_u64().unwrap()
    };
    let to = mesh.pod_address("east-1").unwrap();
    let (sent, arrived) = (sent_to_east(), arrived_at_east());
    let ping = format!(
        "ip addr add {foreign}/32 dev lo; ping -c 5 -i 0.3 -W 1 -s 400 -I {foreign} {to}; code=$?; \
         ip addr del {foreign}/32 dev lo; exit $code"
    );
    let answer = mesh.guest.ask(&ping, "", PATIENCE).unwrap();
    assert_eq!(answer.code, Some(1), "{answer:?}");
    let sent = sent_to_east() - sent;
    assert!(sent >= 5 * 400, "the kernel sent {sent} bytes only");
    mesh.guest.run(&format!("ip netns exec pod ping -c 3 -W 20 {to}")).unwrap();
    let arrived = arrived_at_east() - arrived;
    assert!(arrived >= sent, "of {sent} bytes only {arrived} came to mesh-wg, which was to refuse them");
    let (foreign, honest) = (seen.stop().unwrap().stats, honest.stop().unwrap().stats);
    assert!(honest.watched >= 6, "{honest:?}");
    assert_eq!(foreign.watched, 0, "{foreign:?}");
    figure(&format!(
        "the kernel refused {by_kernel} packets of mesh-wg's; of mesh-wg's pod saw 0 of 5 of the kernel's ({sent} bytes \
         sent, {arrived} counted there)"
    ));
}

#[test]
fn a_killed_agent_finds_its_device_again_and_writes_nothing() {
    let Some(mesh) = mesh("a_killed_agent_finds_its_device_again_and_writes_nothing") else { return };
    // A slow guest may have begun inside of VXLAN: what the device sends to changes once more then.
    eventually("all paths are direct", || paths(&mesh, "direct")).unwrap();
    let spec = FlowSpec { to: GUEST_POD.into(), kind: Kind::Icmp, rate: 20, payload: b"adoption".to_vec() };
    let flow = flow::start(&mesh.pod("east-1").unwrap(), spec).unwrap();
    // All that an agent writes, and nothing that traffic moves. Policy is written anew, beside what stands of it.
    let state = || {
        let show = format!(
            "cat /sys/class/net/{INTERFACE}/ifindex; wg showconf {INTERFACE} | grep -v PrivateKey; \
             wg show {INTERFACE} private-key | sha256sum; ip -o addr show {INTERFACE}; ip rule; ip -6 rule; \
             ip route show table all; nft -a list table inet sennit | sed 's/packets [0-9]* bytes [0-9]*//'"
        );
        mesh.guest.run(&show).unwrap()
    };
    let sessions = || OUTSIDE.map(|(node, _)| mesh.handshake(node).unwrap());
    let (before, handshakes) = (state(), sessions());
    mesh.guest
        .run("ip -t monitor link address route rule >/root/monitor 2>&1 & echo $! >/root/monitor.pid")
        .unwrap();
    mesh.guest.run("nft monitor >/root/nft-monitor 2>&1 & echo $! >/root/nft-monitor.pid").unwrap();
    // Each shows that it listens by what it tells of a probe.
    eventually("the monitors listen", || {
        let probe = "ip link add probe0 type dummy && ip link del probe0; nft add table inet probe && \
                     nft delete table inet probe; grep -c probe /root/monitor && grep -c probe /root/nft-monitor";
        mesh.guest.run(probe)
    })
    .unwrap();
    // A monitor without a reader tells at once; what came of the probes ends here.
    mesh.guest.run("cp /root/monitor /root/monitor.0; cp /root/nft-monitor /root/nft-monitor.0").unwrap();
    let killed = Instant::now();
    mesh.guest.run("kill -9 $(pidof mesh-agent); while pidof mesh-agent; do sleep 0.05; done").unwrap();
    assert!(mesh.status(GUEST.0).is_err(), "an agent answers although it was killed");
    let begun = Instant::now();
    mesh.start_agent().unwrap();
    eventually("the agent answers again", || mesh.status(GUEST.0)).unwrap();
    // Said at once: on a slow machine peers may have given the path up meanwhile.
    figure(&format!("away for {:.1} s", killed.elapsed().as_secs_f64()));
    let status = eventually("the agent is ready again", || {
        let status = mesh.status(GUEST.0)?;
        anyhow::ensure!(status["ready"] == true && status["synced"] == true, "{status}");
        Ok(status)
    })
    .unwrap();
    let took = begun.elapsed();
    assert_eq!(status["changes"], serde_json::json!([0, 0]), "{status}");
    assert_eq!(state(), before);
    let told = mesh
        .guest
        .run(
            "kill $(cat /root/monitor.pid) $(cat /root/nft-monitor.pid); \
             tail -c +$(($(wc -c </root/monitor.0) + 1)) /root/monitor; \
             tail -c +$(($(wc -c </root/nft-monitor.0) + 1)) /root/nft-monitor | grep -v 'inet sennit-policy' || true",
        )
        .unwrap();
    assert!(!told.contains(INTERFACE) && !told.contains("sennit") && !told.contains("5182"), "{told}");
    for (was, is) in handshakes.into_iter().zip(sessions()) {
        // A session may have ended meanwhile by its age, and by nothing else.
        assert!(is == was || is >= was + REKEY_AFTER, "{was} -> {is}");
    }
    let report = flow.stop(Duration::from_secs(10)).unwrap();
    assert!(report.received > 20 && report.lost == 0, "{report:?}");
    figure(&format!(
        "ready again after {:.1} s with 0 changes; interface and sessions stayed; of {} pings 0 lost",
        took.as_secs_f64(),
        report.sent
    ));
}

#[test]
fn the_device_of_a_cluster_waits_where_the_kernel_has_wireguard() {
    let Some(mesh) = mesh("the_device_of_a_cluster_waits_where_the_kernel_has_wireguard") else { return };
    // Until it says so, and then until it is told to end.
    let script = "mesh-agent device --interface spare0 >/root/device.log 2>&1 & device=$!; \
                  until grep -q 'no process is needed' /root/device.log; do kill -0 $device || break; sleep 0.1; done; \
                  mesh-agent device --interface spare0 --probe && echo probed; \
                  ip link show spare0 2>&1; kill $device; wait $device && echo ended; cat /root/device.log";
    let said = mesh.guest.run(script).unwrap();
    for wanted in ["probed", "no process is needed", "ended"] {
        assert!(said.contains(wanted), "{said}");
    }
    assert!(!said.contains("spare0: <"), "it made one: {said}");
    // As it is for an agent that uses the kernel's.
    mesh.guest.run(&format!("mesh-agent device --interface {INTERFACE} --probe")).unwrap();
}

#[test]
fn the_kernel_backend_passes_the_conformance_suite() {
    let Some(mesh) = mesh("the_kernel_backend_passes_the_conformance_suite") else { return };
    let list = mesh.guest.run("backends --list on_kernel").unwrap();
    let wanted = list.lines().filter(|line| line.ends_with(": test")).count();
    assert!(wanted >= 24, "{list}");
    let begun = Instant::now();
    let answer = mesh
        .guest
        .ask("CI=true backends on_kernel --test-threads=1 --nocapture 2>&1", "", Duration::from_secs(400))
        .unwrap();
    let said = &answer.stdout;
    assert_eq!(answer.code, Some(0), "{said}");
    assert!(!said.contains("SKIPPED"), "{said}");
    assert!(said.contains(&format!("test result: ok. {wanted} passed; 0 failed")), "{said}");
    let thousand =
        said.lines().find(|line| line.starts_with("1,000 peers")).unwrap_or("no time of 1,000 peers");
    figure(&format!("{wanted} of {wanted} passed in {:.0} s; {thousand}", begun.elapsed().as_secs_f64()));
}

#[test]
fn traffic_survives_the_rekeying_of_a_session_without_loss() {
    let Some(mut mesh) = mesh("traffic_survives_the_rekeying_of_a_session_without_loss") else { return };
    let first = mesh.first_handshake;
    let flow = mesh.long_flow.take().unwrap();
    let until = Instant::now() + Duration::from_secs(REKEY_AFTER) + PATIENCE;
    let next = loop {
        let newest = mesh.handshake("west-1").unwrap();
        // Both ends dial at the start, so that a second session seconds after the first is no rekeying.
        if newest >= first + REKEY_AFTER - 5 {
            break newest;
        }
        assert!(Instant::now() < until, "no new session {} s after the last", newest - first);
        std::thread::sleep(Duration::from_secs(1));
    };
    let log = "dmesg | grep -oE 'sennit0: [A-Za-z]+ handshake initiation [a-z]+ peer [0-9]+ \\(172.16.2.10' | tail -n 1";
    let begun_by = mesh.guest.run(log).unwrap();
    let seen = flow.snapshot().received;
    eventually("more answers in the new session", || {
        let more = flow.snapshot().received - seen;
        anyhow::ensure!(more > u64::from(3 * LONG_FLOW_RATE), "{more}");
        Ok(())
    })
    .unwrap();
    let report = flow.stop(Duration::from_secs(10)).unwrap();
    assert_eq!((report.lost, report.send_errors), (0, 0), "{report:?}");
    figure(&format!(
        "a new session {} s after the first (begun by {}); {} pings in {:.0} s, 0 lost, longest gap {:.2} s",
        next - first,
        match begun_by.split_whitespace().nth(1) {
            Some("Sending") => "the kernel",
            Some("Receiving") => "mesh-wg",
            _ => "the log does not say whom",
        },
        report.sent,
        report.elapsed.as_secs_f64(),
        report.max_gap.as_secs_f64()
    ));
}
