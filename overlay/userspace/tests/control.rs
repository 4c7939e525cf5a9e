//! Real processes: starting, ending, and what wg(8) and wg-quick(8) do with it.
#![allow(clippy::unwrap_used)]

mod lab;

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;

use lab::Kind::MeshWg;
use lab::{Host, MESH_WG, Site, pair, wait_for};

const SOCKET: &str = "/run/wireguard/wg0.sock";

fn stderr(output: &std::process::Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn when_the_command_returns_the_device_is_ready_and_in_the_background() {
    need!("when_the_command_returns_the_device_is_ready_and_in_the_background");
    let host = Host::new();
    let output = host.try_run(&format!("{MESH_WG} wg0"));
    assert!(output.status.success() && output.stdout.is_empty() && output.stderr.is_empty(), "{output:?}");
    assert!(host.has_link("wg0"));
    assert!(host.run("ip link show wg0").contains("mtu 1420"));
    assert_eq!(host.run("wg show interfaces").trim(), "wg0");
    let mode = |path: &str| host.path(path).metadata().unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(SOCKET), 0o600);
    assert_eq!(mode("/run/wireguard"), 0o700);
}

#[test]
fn the_socket_names_the_process_that_stays() {
    need!("the_socket_names_the_process_that_stays", "python3");
    let host = Host::new();
    host.run(&format!("{MESH_WG} wg0"));
    let script = host.file(
        "peer.py",
        &format!(
            "import socket, struct\ns = socket.socket(socket.AF_UNIX)\ns.connect('{SOCKET}')\n\
             print(struct.unpack('iII', s.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])\n"
        ),
    );
    let pid = host.run(&format!("python3 {script}"));
    host.run(&format!("kill -TERM {}", pid.trim()));
    wait_for("the end of the process", || !host.has_link("wg0"));
    assert!(!host.path(SOCKET).exists(), "the socket is gone first");
}

#[test]
fn the_daemon_holds_neither_terminal_nor_directory() {
    need!("the_daemon_holds_neither_terminal_nor_directory");
    let host = Host::new();
    // `output` waits until all holders of the pipe have closed it, so its return says that the daemon has.
    let output = host.try_run(&format!("{MESH_WG} wg0"));
    assert!(output.status.success());
    let name = std::path::Path::new(MESH_WG).file_name().unwrap();
    let daemon = std::fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .find(|path| {
            std::fs::read_to_string(path.join("comm")).is_ok_and(|comm| comm.trim() == name)
                && std::fs::read_link(path.join("ns/net")).ok()
                    == std::fs::read_link(host.path("/").parent().unwrap().join("ns/net")).ok()
        })
        .unwrap();
    assert_eq!(std::fs::read_link(daemon.join("cwd")).unwrap().to_str(), Some("/"));
    for stream in ["0", "1", "2"] {
        assert_eq!(std::fs::read_link(daemon.join("fd").join(stream)).unwrap().to_str(), Some("/dev/null"));
    }
    let status = std::fs::read_to_string(daemon.join("stat")).unwrap();
    let fields: Vec<&str> = status.rsplit(')').next().unwrap().split_whitespace().collect();
    assert_eq!(fields[4], "0", "no controlling terminal");
}

#[test]
fn the_log_file_is_private_and_knows_no_keys() {
    need!("the_log_file_is_private_and_knows_no_keys", "env", "ping");
    let host = Host::new();
    let log = host.files.path().join("log").to_str().unwrap().to_owned();
    host.run(&format!("env LOG_LEVEL=verbose MESH_WG_LOG_FILE={log} {MESH_WG} wg0"));
    let private = host.run("wg genkey");
    let preshared = host.run("wg genpsk");
    let (key, psk) = (host.file("key", &private), host.file("psk", &preshared));
    let peer = Site::new(MeshWg, 2);
    host.link(&peer.host, "v0", 1, 2);
    host.run(&format!("wg set wg0 private-key {key} listen-port 51820"));
    host.run(&format!(
        "wg set wg0 peer {} preshared-key {psk} endpoint 192.0.2.2:51820 allowed-ips 10.0.0.2/32",
        peer.public
    ));
    host.uapi("wg0", "set=1\nprivate_key=zz\n\n");
    host.run("ip addr add 10.0.0.1/24 dev wg0");
    host.run("ip link set wg0 up");
    assert!(!host.try_run("ping -c 1 -W 1 10.0.0.2").status.success());
    let shown = host.uapi("wg0", "get=1\n\n");
    let text = std::fs::read_to_string(&log).unwrap();
    assert!(text.contains("link is up") && text.len() > 300, "{text}");
    for secret in [private.trim(), preshared.trim()] {
        assert!(!text.contains(&secret[..20]));
    }
    let hex = |name: &str| {
        shown.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim_start_matches('=').to_owned()
    };
    for secret in [hex("private_key"), hex("preshared_key")] {
        assert!(secret.len() == 64 && !text.to_lowercase().contains(&secret[..16]));
        // Debug output of byte arrays, as a careless dependency would write it.
        let bytes: Vec<String> =
            (0..6).map(|i| u8::from_str_radix(&secret[2 * i..2 * i + 2], 16).unwrap().to_string()).collect();
        assert!(!text.contains(&bytes.join(", ")));
    }
    assert_eq!(std::fs::metadata(&log).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn what_cannot_start_says_why_and_fails() {
    need!("what_cannot_start_says_why_and_fails");
    let host = Host::new();
    for arguments in ["", "a/b", "sixteen-bytes-xx", "wg0 wg1", "--nonsense", ".."] {
        let output = host.try_run(&format!("{MESH_WG} {arguments}"));
        assert!(!output.status.success() && stderr(&output).starts_with("mesh-wg: "), "{arguments}");
    }
    let empty = host.command(MESH_WG, &[""]).output().unwrap();
    assert!(!empty.status.success());
    host.run("ip link add taken type veth peer name other");
    for foreground in ["", "-f"] {
        let output = host.try_run(&format!("{MESH_WG} {foreground} taken"));
        assert!(!output.status.success());
        assert!(stderr(&output).contains("taken exists"), "{}", stderr(&output));
    }
    assert!(!host.path("/run/wireguard/taken.sock").exists());
    assert!(host.has_link("taken"));
    let log = host.try_run(&format!("env MESH_WG_LOG_FILE=/nonexistent/x {MESH_WG} wg0"));
    assert!(!log.status.success());
    assert!(!host.has_link("wg0"), "nothing is left of it");
    assert!(!host.path(SOCKET).exists());
}

#[test]
fn version_and_help_are_printed() {
    let output = std::process::Command::new(MESH_WG).arg("--version").output().unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), format!("mesh-wg {}\n", env!("CARGO_PKG_VERSION")));
    let output = std::process::Command::new(MESH_WG).arg("--help").output().unwrap();
    assert!(output.status.success() && String::from_utf8(output.stdout).unwrap().contains("Usage:"));
}

#[test]
fn a_dead_processs_socket_is_replaced_and_a_live_ones_is_not() {
    need!("a_dead_processs_socket_is_replaced_and_a_live_ones_is_not");
    let host = Host::new();
    host.run(&format!("{MESH_WG} wg0"));
    let second = host.try_run(&format!("{MESH_WG} wg0"));
    assert!(!second.status.success() && stderr(&second).contains("wg0"), "{}", stderr(&second));
    assert!(host.run("wg show wg0").contains("wg0"), "the first one still answers");
    let pid = host.run("pidof mesh-wg");
    host.run(&format!("kill -KILL {}", pid.trim()));
    wait_for("the link's end", || !host.has_link("wg0"));
    assert!(host.path(SOCKET).exists(), "nobody cleaned up");
    host.run(&format!("{MESH_WG} wg0"));
    assert!(host.run("wg show wg0").contains("interface: wg0"));
    // Another interface name whose socket someone else serves.
    let listener = std::os::unix::net::UnixListener::bind(host.path("/run/wireguard/wg1.sock")).unwrap();
    let output = host.try_run(&format!("{MESH_WG} wg1"));
    assert!(!output.status.success() && stderr(&output).contains("running process"), "{}", stderr(&output));
    assert!(!host.has_link("wg1"));
    drop(listener);
}

#[test]
fn deleting_the_link_or_the_socket_ends_the_process() {
    need!("deleting_the_link_or_the_socket_ends_the_process");
    let host = Host::new();
    host.run(&format!("{MESH_WG} wg0"));
    host.run("ip link set wg0 up");
    host.run("ip link del wg0");
    wait_for("the socket's removal", || !host.path(SOCKET).exists());
    host.run(&format!("{MESH_WG} wg0"));
    std::fs::remove_file(host.path(SOCKET)).unwrap();
    wait_for("the link's end", || !host.has_link("wg0"));
    wait_for("the process's end", || !host.try_run("pidof mesh-wg").status.success());
}

#[test]
fn a_signal_ends_it_in_order_and_with_success() {
    need!("a_signal_ends_it_in_order_and_with_success");
    for signal in ["TERM", "INT"] {
        let host = Host::new();
        let mut child = host.spawn(&format!("{MESH_WG} --foreground wg0"));
        wait_for("the socket", || host.path(SOCKET).exists() && host.try_run("wg show wg0").status.success());
        host.run(&format!("kill -{signal} {}", host.run("pidof mesh-wg").trim()));
        assert!(child.wait().unwrap().success());
        assert!(!host.path(SOCKET).exists() && !host.has_link("wg0"));
    }
}

#[test]
fn what_wg_sets_wg_shows() {
    need!("what_wg_sets_wg_shows");
    let site = Site::new(MeshWg, 1);
    let host = &site.host;
    let peer = host.run("wg genkey");
    let peer = {
        let path = host.file("other", &peer);
        host.run(&format!("wg set wg0 private-key {path}"));
        let public = host.run("wg show wg0 public-key").trim().to_owned();
        let own = host.files.path().join("private");
        host.run(&format!("wg set wg0 private-key {}", own.display()));
        public
    };
    assert_eq!(host.run("wg show wg0 public-key").trim(), site.public);
    let psk = host.run("wg genpsk");
    let psk_file = host.file("psk", &psk);
    host.run(&format!(
        "wg set wg0 listen-port 4444 fwmark 0x77 peer {peer} preshared-key {psk_file} \
         endpoint [2001:db8::7]:99 persistent-keepalive 25 allowed-ips 10.1.0.0/16,fd01::/48,10.2.3.4/32"
    ));
    assert_eq!(host.run("wg show wg0 listen-port").trim(), "4444");
    assert_eq!(host.run("wg show wg0 fwmark").trim(), "0x77");
    assert_eq!(site.show("endpoints"), "[2001:db8::7]:99");
    assert_eq!(site.show("persistent-keepalive"), "25");
    assert_eq!(site.show("preshared-keys"), psk.trim());
    assert_eq!(site.show("allowed-ips"), "10.1.0.0/16 fd01::/48 10.2.3.4/32");
    assert!(host.run("wg show wg0 dump").lines().count() == 2);
    host.run(&format!("wg set wg0 fwmark off peer {peer} persistent-keepalive off allowed-ips 10.9.0.0/24"));
    assert_eq!(host.run("wg show wg0 fwmark").trim(), "off");
    assert_eq!(site.show("persistent-keepalive"), "off");
    assert_eq!(site.show("allowed-ips"), "10.9.0.0/24");
    host.run(&format!("wg set wg0 peer {peer} remove"));
    assert_eq!(host.run("wg show wg0 peers"), "");
}

#[test]
fn configuration_files_go_in_and_come_out() {
    need!("configuration_files_go_in_and_come_out", "ping");
    let (a, b) = pair(MeshWg, MeshWg, "192.0.2.2", "");
    a.host.wait_ping("10.0.0.2");
    let shown = a.host.run("wg showconf wg0");
    assert!(shown.contains("PrivateKey = ") && shown.contains("Endpoint = 192.0.2.2:51820"), "{shown}");
    // The same once more by syncconf: nothing changes, and the session stays.
    let handshake = a.show("latest-handshakes");
    let same = a.host.file("same.conf", &shown);
    a.host.run(&format!("wg syncconf wg0 {same}"));
    assert_eq!(a.host.run("wg showconf wg0"), shown);
    a.host.run("ping -c 1 -W 2 10.0.0.2");
    assert_eq!(a.show("latest-handshakes"), handshake);
    // Another peer besides it by syncconf: the first one's session stays, too.
    let other = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE=";
    let more = a
        .host
        .file("more.conf", &format!("{shown}\n[Peer]\nPublicKey = {other}\nAllowedIPs = 10.5.0.0/16\n"));
    a.host.run(&format!("wg syncconf wg0 {more}"));
    assert_eq!(a.host.run("wg show wg0 peers").lines().count(), 2);
    assert!(a.host.run("wg show wg0 latest-handshakes").contains(&handshake));
    // setconf replaces all.
    a.host.run(&format!("wg setconf wg0 {same}"));
    assert_eq!(a.host.run("wg show wg0 peers").trim(), b.public);
    a.host.wait_ping("10.0.0.2");
}

#[test]
fn a_taken_port_is_refused_and_the_old_one_stays() {
    need!("a_taken_port_is_refused_and_the_old_one_stays", "python3", "ping");
    let (a, b) = pair(MeshWg, MeshWg, "192.0.2.2", "");
    a.host.wait_ping("10.0.0.2");
    for family in ["AF_INET", "AF_INET6"] {
        let script = a.host.file(
            "take.py",
            &format!(
                "import socket, time\ns = socket.socket(socket.{family}, socket.SOCK_DGRAM)\n\
                 if socket.{family} == socket.AF_INET6: s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)\n\
                 s.bind(('', 7777))\nprint('bound', flush=True)\ntime.sleep(60)\n"
            ),
        );
        let mut command = a.host.command("python3", &[&script]);
        let mut taker = command.stdout(std::process::Stdio::piped()).spawn().unwrap();
        taker.stdout.as_mut().unwrap().read_exact(&mut [0; 5]).unwrap();
        let output = a.host.try_run("wg set wg0 listen-port 7777");
        assert!(!output.status.success());
        assert!(stderr(&output).contains("Address already in use"), "{}", stderr(&output));
        // Nothing else of a request with such a port is applied.
        let answer = a.host.uapi("wg0", "set=1\nlisten_port=7777\nfwmark=5\nreplace_peers=true\n\n");
        assert_eq!(answer, format!("errno=-{}\n", libc::EADDRINUSE));
        let shown = a.host.run("wg show wg0");
        assert!(shown.contains("51820") && shown.contains(&b.public) && !shown.contains("fwmark"), "{shown}");
        a.host.run("ping -c 1 -W 2 10.0.0.2");
        // The shell that holds it is killed with its namespace; the socket is free when it is gone.
        let _ = a.host.try_run(&format!("pkill -f {script}"));
        let _ = taker.wait();
    }
    a.host.run("wg set wg0 listen-port 7777");
    a.host.wait_ping("10.0.0.2");
    wait_for("the new port", || b.show("endpoints") == "192.0.2.1:7777");
}

#[test]
fn port_zero_means_any_and_is_shown() {
    need!("port_zero_means_any_and_is_shown");
    let host = Host::new();
    host.run(&format!("{MESH_WG} wg0"));
    assert_eq!(host.run("wg show wg0 listen-port").trim(), "0", "none while the link is down");
    host.run("ip link set wg0 up");
    wait_for("a port", || host.run("wg show wg0 listen-port").trim() != "0");
    let first = host.run("wg show wg0 listen-port");
    host.run("wg set wg0 listen-port 0");
    assert_ne!(host.run("wg show wg0 listen-port"), first);
}

#[test]
fn a_link_that_was_down_has_its_port_and_a_new_session_when_it_is_up_again() {
    need!("a_link_that_was_down_has_its_port_and_a_new_session_when_it_is_up_again", "ping");
    let (a, b) = pair(MeshWg, MeshWg, "192.0.2.2", "");
    a.host.wait_ping("10.0.0.2");
    a.host.run("ip link set wg0 down");
    assert!(!b.host.try_run("ping -c 1 -W 1 10.0.0.1").status.success());
    a.host.run("ip link set wg0 up");
    a.host.wait_ping("10.0.0.2");
    assert_eq!(a.host.run("wg show wg0 listen-port").trim(), "51820");
}

#[test]
fn ports_that_are_all_taken_when_the_link_comes_up_are_tried_again_and_reported_once() {
    need!(
        "ports_that_are_all_taken_when_the_link_comes_up_are_tried_again_and_reported_once",
        "env",
        "python3",
        "sysctl"
    );
    let host = Host::new();
    let log = host.files.path().join("log").to_str().unwrap().to_owned();
    host.run(&format!("env MESH_WG_LOG_FILE={log} {MESH_WG} wg0"));
    // One port to choose from, and that one is taken until the taker's standard input is closed.
    // Set from within the host's namespace: what is under /proc/sys/net belongs to whoever opens it.
    let range = ["-qw", "net.ipv4.ip_local_port_range=40000 40000"];
    assert!(host.command("sysctl", &range).status().unwrap().success());
    let script = host.file(
        "take.py",
        "import socket, sys\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n\
         s.bind(('', 40000))\nprint('bound', flush=True)\nsys.stdin.read()\n",
    );
    let mut command = host.command("python3", &[&script]);
    command.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
    let mut taker = command.spawn().unwrap();
    taker.stdout.as_mut().unwrap().read_exact(&mut [0; 5]).unwrap();
    host.run("ip link set wg0 up");
    let reports = || std::fs::read_to_string(&log).unwrap().matches("cannot open UDP sockets").count();
    wait_for("the report", || reports() == 1);
    // Events do not make it try, nor report, more often.
    for metric in 1..200 {
        host.run(&format!("ip route add 10.99.0.0/16 dev wg0 metric {metric}"));
    }
    assert_eq!(host.run("wg show wg0 listen-port").trim(), "0");
    assert_eq!(reports(), 1);
    drop(taker.stdin.take());
    taker.wait().unwrap();
    wait_for("the port", || host.run("wg show wg0 listen-port").trim() == "40000");
    assert_eq!(reports(), 1);
}

#[test]
fn ports_changed_back_and_forth_without_a_pause_leave_the_device_alive() {
    need!("ports_changed_back_and_forth_without_a_pause_leave_the_device_alive", "ping");
    let (a, b) = pair(MeshWg, MeshWg, "192.0.2.2", "");
    a.host.wait_ping("10.0.0.2");
    let sets: String = (0..300)
        .map(|i| format!("set=1\nlisten_port={}\n\n", [7001, 7002, 7001, 7003, 7004][i % 5]))
        .collect();
    for _ in 0..10 {
        let mut client = a.host.uapi_client("wg0");
        client.write_all(sets.as_bytes()).unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answers = String::new();
        client.read_to_string(&mut answers).unwrap();
        assert_eq!(answers, "errno=0\n\n".repeat(300));
    }
    a.host.run("wg set wg0 listen-port 7002");
    a.host.wait_ping("10.0.0.2");
    wait_for("the last port", || {
        a.host.run("ping -c 1 -W 2 10.0.0.2");
        b.show("endpoints") == "192.0.2.1:7002"
    });
}

#[test]
fn a_link_moved_to_another_namespace_before_it_comes_up_works_there() {
    need!("a_link_moved_to_another_namespace_before_it_comes_up_works_there", "ping");
    let (a, b) = pair(MeshWg, MeshWg, "192.0.2.2", "");
    a.host.run("ip netns add inner");
    a.host.run("ip link set wg0 netns inner");
    a.host.run("ip -n inner addr add 10.0.0.1/24 dev wg0");
    a.host.run("ip -n inner link set wg0 up");
    wait_for("ping from there", || {
        a.host.try_run("ip netns exec inner ping -c 1 -W 1 10.0.0.2").status.success()
    });
    assert_eq!(b.show("endpoints"), "192.0.2.1:51820", "the datagrams stay in the first one");
    // Also with a link that never was up before it was moved, and that goes down again.
    a.host.run(&format!("{MESH_WG} wg1"));
    a.host.run("ip link set wg1 netns inner");
    a.host.run("ip -n inner link set wg1 up");
    wait_for("a port", || a.host.run("wg show wg1 listen-port").trim() != "0");
}

#[test]
fn the_daemon_inherits_no_open_files() {
    need!("the_daemon_inherits_no_open_files");
    let host = Host::new();
    let extra = host.file("extra", "");
    let script = format!("exec 7<{extra} && exec {MESH_WG} wg0");
    let output = host.command("sh", &["-c", &script]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let open = host.run(&format!("ls -l /proc/{}/fd", host.run("pidof mesh-wg").trim()));
    assert!(open.contains("/dev/net/tun") && !open.contains(&extra), "{open}");
}

#[test]
fn uapi_answers_over_the_real_socket() {
    need!("uapi_answers_over_the_real_socket");
    let site = Site::new(MeshWg, 1);
    let shown = site.host.uapi("wg0", "get=1\n\n");
    assert!(shown.starts_with("private_key=") && shown.ends_with("errno=0\n"), "{shown}");
    assert_eq!(site.host.uapi("wg0", "set=1\nwhat=1\n\n"), format!("errno=-{}\n", libc::EINVAL));
    assert_eq!(site.host.uapi("wg0", "what\n\n"), format!("errno=-{}\n", libc::EPROTO));
    let mut client = site.host.uapi_client("wg0");
    client.write_all(b"set=1\nfwmark=1\n\nset=1\nfwmark=0\n\nget=1\n\n").unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answers = String::new();
    client.read_to_string(&mut answers).unwrap();
    assert_eq!(answers.matches("errno=0\n\n").count(), 3, "{answers}");
}

#[test]
fn wg_quick_brings_it_up_and_takes_it_down() {
    need!("wg_quick_brings_it_up_and_takes_it_down", "wg-quick", "ping", "env");
    let host = Host::new();
    if std::path::Path::new("/sys/module/wireguard").exists() {
        let notice =
            "SKIPPED wg_quick_brings_it_up_and_takes_it_down: the kernel has WireGuard, wg-quick prefers it";
        let _ = writeln!(std::io::stderr(), "{notice}");
        return;
    }
    let peer = Site::new(MeshWg, 2);
    host.link(&peer.host, "v0", 1, 2);
    let private = host.run("wg genkey");
    let config = host.file(
        "wg0.conf",
        &format!(
            "[Interface]\nPrivateKey = {}\nAddress = 10.0.0.1/24, fd00::1/64\nListenPort = 51820\nMTU = 1380\n\
             [Peer]\nPublicKey = {}\nEndpoint = 192.0.2.2:51820\nAllowedIPs = 10.0.0.2/32, fd00::2/128, 10.7.0.0/16\n\
             PersistentKeepalive = 25\n",
            private.trim(),
            peer.public
        ),
    );
    let up = format!("env WG_QUICK_USERSPACE_IMPLEMENTATION={MESH_WG} wg-quick up {config}");
    host.run(&up);
    let public = host.run("wg show wg0 public-key");
    peer.host.run(&format!("wg set wg0 peer {} allowed-ips 10.0.0.1/32,fd00::1/128", public.trim()));
    host.wait_ping("10.0.0.2");
    host.wait_ping("fd00::2");
    assert!(host.run("ip link show wg0").contains("mtu 1380"));
    assert!(host.run("ip route show 10.7.0.0/16").contains("wg0"));
    assert!(!host.try_run(&up).status.success(), "it is up already");
    host.run(&format!("wg-quick down {config}"));
    assert!(!host.has_link("wg0"));
    wait_for("the socket's removal", || !host.path(SOCKET).exists());
    host.run(&up);
    host.wait_ping("10.0.0.2");
    host.run(&format!("wg-quick down {config}"));
}
