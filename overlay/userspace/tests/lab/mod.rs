//! Hosts for the real-process tests: each has network, mount and PID namespaces of its own, and
//! `/run/wireguard` to itself. Dropping a host kills everything that runs in it.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

pub const MESH_WG: &str = env!("CARGO_BIN_EXE_mesh-wg");

/// Whether the tests can run here; says loudly why not, and fails in CI.
pub fn usable(test: &str, tools: &[&str]) -> bool {
    let mut missing: Vec<String> = tools
        .iter()
        .filter(|tool| !run(Command::new("sh").args(["-c", &format!("command -v {tool}")])).status.success())
        .map(|tool| (*tool).to_owned())
        .collect();
    if !Path::new("/dev/net/tun").exists() {
        missing.push("/dev/net/tun".into());
    }
    if !run(Command::new("unshare").args(["-n", "-m", "-p", "--fork", "true"])).status.success() {
        missing.push("root (unshare of namespaces)".into());
    }
    if missing.is_empty() {
        return true;
    }
    let notice = format!("SKIPPED {test}: missing {}", missing.join(", "));
    // Not by a macro: libtest keeps what those print to itself when a test passes.
    let _ = writeln!(std::io::stderr(), "{notice}");
    assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "{notice}");
    false
}

/// Declares what a test needs, and leaves it if that is not there.
#[macro_export]
macro_rules! need {
    ($test:expr $(, $tool:expr)*) => {
        if !lab::usable($test, &["ip", "wg", "nsenter", "unshare" $(, $tool)*]) {
            return;
        }
    };
}

fn run(command: &mut Command) -> Output {
    command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{command:?}: {error}"))
}

/// Waits for a condition; panics with `what` when it does not come true in time.
pub fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

pub struct Host {
    // The holder ends when its standard input closes, and with it all processes of its PID namespace.
    holder: Child,
    pid: u32,
    pub files: tempfile::TempDir,
}

impl Host {
    pub fn new() -> Self {
        let script = "mount -t tmpfs tmpfs /run \
                      && ip link set lo up && read pid rest < /proc/self/stat && mount -t proc proc /proc \
                      && echo $pid && exec cat";
        let mut holder = Command::new("unshare")
            .args([
                "-n",
                "-m",
                "-p",
                "--fork",
                "--kill-child",
                "--propagation",
                "private",
                "sh",
                "-c",
                script,
            ])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(holder.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let pid = line.trim().parse().unwrap_or_else(|_| panic!("the host did not start: {line:?}"));
        Self { holder, pid, files: tempfile::tempdir().unwrap() }
    }

    /// A command to be run in this host.
    pub fn command(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["-t", &self.pid.to_string(), "-n", "-m", "-p", program]).args(arguments);
        command.stdin(Stdio::null());
        command
    }

    /// Runs a command line of words without quoting, and returns what came of it.
    pub fn try_run(&self, line: &str) -> Output {
        let words: Vec<&str> = line.split_whitespace().collect();
        run(&mut self.command(words[0], &words[1..]))
    }

    /// Runs a command line that must succeed and returns its output.
    pub fn run(&self, line: &str) -> String {
        let output = self.try_run(line);
        assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Starts a command that runs along.
    pub fn spawn(&self, line: &str) -> Child {
        let words: Vec<&str> = line.split_whitespace().collect();
        self.command(words[0], &words[1..]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    }

    /// Runs a closure on a thread in this host's network; the sockets and TUN devices that it makes stay there.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let network = std::fs::File::open(format!("/proc/{}/ns/net", self.pid)).unwrap();
        let enter = || {
            nix::sched::setns(&network, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            work()
        };
        std::thread::scope(|scope| scope.spawn(enter).join())
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Writes a file and returns its path.
    pub fn file(&self, name: &str, content: &str) -> String {
        let path = self.files.path().join(name);
        std::fs::write(&path, content).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// A path as this host sees it.
    pub fn path(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.pid))
    }

    /// Connects this host to another: `v0` on both ends, 192.0.2.`a` and 2001:db8::`a` here, `b` there.
    pub fn link(&self, other: &Host, interface: &str, a: u8, b: u8) {
        let net = |host: &Host, words: &str| {
            let mut command = Command::new("nsenter");
            command.args(["-t", &host.pid.to_string(), "-n", "ip"]).args(words.split_whitespace());
            let output = run(&mut command);
            assert!(output.status.success(), "ip {words}: {}", String::from_utf8_lossy(&output.stderr));
        };
        net(self, &format!("link add {interface} type veth peer name {interface} netns {}", other.pid));
        for (host, address) in [(self, a), (other, b)] {
            net(host, &format!("addr add 192.0.2.{address}/24 dev {interface}"));
            net(host, &format!("addr add 2001:db8::{address}/64 dev {interface} nodad"));
            net(host, &format!("link set {interface} up"));
        }
    }

    /// Sends a request to a UAPI socket and returns the answer.
    pub fn uapi(&self, interface: &str, request: &str) -> String {
        let mut stream = self.uapi_client(interface);
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        for line in BufReader::new(stream).lines() {
            let line = line.unwrap();
            answer += &line;
            answer.push('\n');
            if line.starts_with("errno=") {
                break;
            }
        }
        answer
    }

    /// A connection to a UAPI socket.
    pub fn uapi_client(&self, interface: &str) -> std::os::unix::net::UnixStream {
        let path = self.path(&format!("/run/wireguard/{interface}.sock"));
        let stream = std::os::unix::net::UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }

    /// Waits until the ping goes through.
    pub fn wait_ping(&self, address: &str) {
        wait_for(&format!("ping {address}"), || {
            self.try_run(&format!("ping -c 1 -W 1 {address}")).status.success()
        });
    }

    /// Whether an interface exists.
    pub fn has_link(&self, interface: &str) -> bool {
        self.try_run(&format!("ip link show {interface}")).status.success()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        drop(self.holder.stdin.take());
        let _ = self.holder.wait();
    }
}

/// A WireGuard implementation under test.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    MeshWg,
    WireguardGo,
}

/// A host with a WireGuard interface `wg0`.
pub struct Site {
    pub host: Host,
    pub public: String,
    pub kind: Kind,
}

impl Site {
    /// Starts a daemon in the background, the way wg-quick does, and gives it a key and 10.0.0.`n`, fd00::`n`.
    pub fn new(kind: Kind, n: u8) -> Self {
        Self::with(kind, n, "")
    }

    /// The same with settings in the daemon's environment, `NAME=VALUE`, separated by spaces.
    pub fn with(kind: Kind, n: u8, environment: &str) -> Self {
        let host = Host::new();
        match kind {
            Kind::MeshWg => host.run(&format!("env {environment} {MESH_WG} wg0")),
            Kind::WireguardGo => host.run(&format!("env {environment} wireguard-go wg0")),
        };
        let private = host.run("wg genkey");
        let key = host.file("private", &private);
        host.run(&format!("wg set wg0 private-key {key} listen-port 51820"));
        let public = host.run("wg show wg0 public-key").trim().to_owned();
        host.run(&format!("ip addr add 10.0.0.{n}/24 dev wg0"));
        host.run(&format!("ip addr add fd00::{n}/64 dev wg0 nodad"));
        host.run("ip link set wg0 mtu 1420 up");
        Self { host, public, kind }
    }

    /// Adds a peer with 10.0.0.`n` and fd00::`n`, and more words for `wg set`.
    pub fn peer(&self, other: &Site, n: u8, more: &str) {
        let peer = &other.public;
        self.host.run(&format!("wg set wg0 peer {peer} allowed-ips 10.0.0.{n}/32,fd00::{n}/128 {more}"));
    }

    /// One column of `wg show wg0 WHAT` for the only peer.
    pub fn show(&self, what: &str) -> String {
        self.host.run(&format!("wg show wg0 {what}")).split('\t').nth(1).unwrap_or_default().trim().to_owned()
    }
}

/// Two connected sites, 192.0.2.1 and 192.0.2.2 outside; only the first knows the other's endpoint.
pub fn pair(first: Kind, second: Kind, endpoint: &str, more: &str) -> (Site, Site) {
    join(Site::new(first, 1), Site::new(second, 2), endpoint, more)
}

/// Connects two sites as [`pair`] does.
pub fn join(a: Site, b: Site, endpoint: &str, more: &str) -> (Site, Site) {
    a.host.link(&b.host, "v0", 1, 2);
    b.peer(&a, 1, more);
    a.peer(&b, 2, &format!("endpoint {endpoint}:51820 {more}"));
    (a, b)
}

/// Megabits per second of one iperf3 run from `client` to the server at `address`.
pub fn iperf(client: &Host, server: &Host, address: &str, more: &str) -> f64 {
    let mut child = server.spawn(&format!("iperf3 -s -1 -B {address}"));
    let mut rate = None;
    wait_for("iperf3", || {
        let output = client.try_run(&format!("iperf3 -c {address} -J {more}"));
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let received = text.split("\"sum_received\"").nth(1);
        rate = received
            .and_then(|text| text.split("\"bits_per_second\":").nth(1))
            .and_then(|text| text.trim_start().split([',', '\n', '}']).next()?.trim().parse::<f64>().ok());
        rate.is_some_and(|rate| rate > 0.0)
    });
    let _ = child.wait();
    rate.unwrap_or_default() / 1e6
}

// Sends random bytes in writes of random sizes, or receives them; both print their hash.
const TRANSFER: &str = r"
import hashlib, random, socket, sys
role, address, port, size = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
family = socket.AF_INET6 if ':' in address else socket.AF_INET
digest, left = hashlib.sha256(), size
if role == 'receive':
    server = socket.create_server((address, port), family=family)
    print('ready', flush=True)
    stream, _ = server.accept()
    while left:
        data = stream.recv(1 << 18)
        if not data:
            break
        digest.update(data)
        left -= len(data)
else:
    stream = socket.create_connection((address, port), 20)
    while left:
        data = random.randbytes(min(left, random.choice([1, 7, 100, 1368, 1400, 5000, 65536, 200000])))
        digest.update(data)
        stream.sendall(data)
        left -= len(data)
print(size - left, digest.hexdigest())
";

/// Sends bytes by TCP from one host to the other at `address`, and tells whether all arrived as they were.
pub fn transfer(from: &Host, to: &Host, address: &str, bytes: usize) -> bool {
    let size = bytes.to_string();
    let (sender, receiver) = (from.file("transfer.py", TRANSFER), to.file("transfer.py", TRANSFER));
    let mut server = to
        .command("python3", &[&receiver, "receive", address, "9000", &size])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(server.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "ready");
    let sent = from.run(&format!("timeout 60 python3 {sender} send {address} 9000 {size}"));
    let received = lines.next().unwrap().unwrap();
    server.wait().unwrap();
    sent.trim() == received
}
