//! Two hosts joined by a veth pair, and a WireGuard device on one or both.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use boringtun::x25519::{PublicKey, StaticSecret};
use netlab::{Lab, LabSpec, Namespace, Output, Process};

use crate::iperf;
use crate::proc;
use crate::program::Program;
use crate::stop::Stop;

/// The WireGuard interface of each host.
pub(crate) const INTERFACE: &str = "wg0";
/// The UDP port of each device.
pub(crate) const PORT: u16 = 51820;
/// TCP congestion control of all streams, whatever the machine's own default is.
pub(crate) const CONGESTION_CONTROL: &str = "cubic";

// What sockets have until iperf3 gives them another one. A socket that has begun with BBR is paced by a timer ever after
// (`sk_pacing_status`, include/net/sock.h), which costs the quickest program most. Every kernel has this one, and
// lets every namespace choose it.
const FIRST_CONGESTION_CONTROL: &str = "reno";
const IPERF_PORT: u16 = 5201;

/// Address family of the tunnel, inside and outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    V4,
    V6,
}

/// One end of the veth pair, counted from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    A,
    B,
}

impl End {
    fn number(self) -> u16 {
        match self {
            End::A => 1,
            End::B => 2,
        }
    }

    fn other(self) -> End {
        match self {
            End::A => End::B,
            End::B => End::A,
        }
    }
}

impl Family {
    /// A host's address on the veth pair.
    pub(crate) fn outer(self, end: End) -> IpAddr {
        match self {
            Family::V4 => IpAddr::from([192, 0, 2, end.number() as u8]),
            Family::V6 => IpAddr::from([0x2001, 0xdb8, 0xffff, 0xff, 0, 0, 0, end.number()]),
        }
    }

    /// A host's address in the tunnel.
    pub(crate) fn inner(self, end: End) -> IpAddr {
        match self {
            Family::V4 => IpAddr::from([10, 99, 0, end.number() as u8]),
            Family::V6 => IpAddr::from([0xfd99, 0, 0, 0, 0, 0, 0, end.number()]),
        }
    }

    fn link_bits(self) -> u8 {
        match self {
            Family::V4 => 24,
            Family::V6 => 64,
        }
    }

    fn host_bits(self) -> u8 {
        match self {
            Family::V4 => 32,
            Family::V6 => 128,
        }
    }
}

/// A key pair.
pub(crate) struct Key {
    pub(crate) secret: StaticSecret,
    pub(crate) public: PublicKey,
}

impl Key {
    /// A random one.
    pub(crate) fn random() -> Result<Key> {
        let mut bytes = [0; 32];
        getrandom::fill(&mut bytes).map_err(|error| anyhow!("no randomness: {error}"))?;
        let secret = StaticSecret::from(bytes);
        Ok(Key { public: PublicKey::from(&secret), secret })
    }

    /// As `wg genkey` prints it.
    pub(crate) fn secret_base64(&self) -> String {
        BASE64.encode(self.secret.to_bytes())
    }

    /// As `wg pubkey` prints it.
    pub(crate) fn public_base64(&self) -> String {
        BASE64.encode(self.public.as_bytes())
    }
}

/// A configuration for `wg setconf`: a key, and peers by public key and inner address.
pub(crate) fn configuration(key: &Key, peers: impl Iterator<Item = (String, IpAddr)>) -> String {
    let mut text = format!("[Interface]\nPrivateKey = {}\nListenPort = {PORT}\n", key.secret_base64());
    for (public, inner) in peers {
        text += &format!("[Peer]\nPublicKey = {public}\nAllowedIPs = {inner}\n");
    }
    text
}

/// Two hosts joined by a veth pair of MTU 1500, and nothing else on the way.
pub(crate) struct Wire {
    lab: Lab,
    logs: PathBuf,
    stop: Stop,
}

const HOSTS: [(&str, End); 2] = [("s1-h1", End::A), ("s1-h2", End::B)];

impl Wire {
    /// Makes the hosts and joins them.
    pub(crate) fn new(stop: &Stop) -> Result<Wire> {
        let lab = Lab::build(&LabSpec::grid(1, 2, 0))?;
        // From the core, the only place where this process's threads have their paths.
        let [a, b] = [lab.host("s1-h1")?.paths().net, lab.host("s1-h2")?.paths().net];
        lab.core().ip(&format!(
            "link add under netns {} type veth peer name under netns {}",
            a.display(),
            b.display()
        ))?;
        for (name, end) in HOSTS {
            let (v4, v6) = (Family::V4.outer(end), Family::V6.outer(end));
            let host = lab.host(name)?;
            host.namespace().sysctl("ipv4/tcp_congestion_control", FIRST_CONGESTION_CONTROL)?;
            host.ip(&format!(
                "address add {v4}/24 dev under\naddress add {v6}/64 dev under nodad\nlink set under up\n"
            ))?;
        }
        let logs = lab.shared_dir().to_owned();
        Ok(Wire { lab, logs, stop: stop.clone() })
    }

    /// The namespace of a host.
    pub(crate) fn namespace(&self, end: End) -> Result<&Namespace> {
        let (name, _) = HOSTS[usize::from(end.number() - 1)];
        Ok(self.lab.host(name)?.namespace())
    }

    /// Runs a command to its end; it is killed after `deadline` and when the user interrupts. One that fails without
    /// a word on its standard output is an error; what it said there is for the caller to read.
    pub(crate) fn run(&self, end: End, line: &[&str], input: &str, deadline: Duration) -> Result<Output> {
        let command = self.namespace(end)?.command(line[0]).args(line[1..].iter().copied()).stdin(input);
        let process = command.spawn()?;
        let until = Instant::now() + deadline;
        let status = loop {
            self.stop.check()?;
            if let Some(status) = process.wait(Duration::from_millis(200))? {
                break status;
            }
            if Instant::now() > until {
                process.kill()?;
                bail!("{} did not end within {} s", line[0], deadline.as_secs());
            }
        };
        let output = Output { status: Some(status), stdout: process.stdout(), stderr: process.stderr() };
        if !output.success() && output.stdout.is_empty() {
            bail!("{} failed: {}", line.join(" "), output.stderr_text().trim());
        }
        Ok(output)
    }

    fn quick(&self, end: End, line: &[&str], input: &str) -> Result<Output> {
        let output = self.run(end, line, input, Duration::from_secs(30))?;
        if output.success() {
            return Ok(output);
        }
        bail!("{} failed: {} {}", line.join(" "), output.stdout_text().trim(), output.stderr_text().trim())
    }

    /// Starts a device's program and waits until it can be configured.
    pub(crate) fn start(&self, end: End, program: &Program) -> Result<Daemon> {
        let log = self.logs.join(format!("{}-{}.log", program.name.replace('/', "_"), end.number()));
        let line = program.command_for(INTERFACE);
        let process = self
            .namespace(end)?
            .command(&line[0])
            .args(&line[1..])
            .env("LOG_LEVEL", "error")
            .env("WG_LOG_LEVEL", "error")
            .log_to(&log)
            .spawn()?;
        let daemon = Daemon { process, log };
        wait_until(&self.stop, &format!("{} serves wg(8)", program.name), || {
            if daemon.process.try_wait()?.is_some() {
                bail!("{} ended: {}", program.name, daemon.last_words());
            }
            // Not by asking: wg(8) removes a socket that nobody listens on yet.
            Ok(proc::serves(daemon.pid(), &format!("/{INTERFACE}.sock")))
        })?;
        Ok(daemon)
    }

    /// `wg SUBCOMMAND wg0 ARGUMENTS` on a host.
    pub(crate) fn wg(&self, end: End, line: &[&str], input: &str) -> Result<()> {
        let line: Vec<&str> = std::iter::once("wg").chain(line.iter().copied()).collect();
        self.quick(end, &line, input).map(drop)
    }

    /// `ip` commands on a host, one a line.
    pub(crate) fn ip(&self, end: End, script: &str) -> Result<()> {
        Ok(self.namespace(end)?.ip(script)?)
    }

    /// Runs ping(8) and returns its summary.
    pub(crate) fn ping(&self, end: End, to: IpAddr, count: u64, every: Duration) -> Result<String> {
        let (count, every, to) = (count.to_string(), every.as_secs_f64().to_string(), to.to_string());
        let line = ["ping", "-q", "-n", "-c", &count, "-i", &every, "-W", "2", &to];
        Ok(self.run(end, &line, "", Duration::from_secs(60))?.stdout_text())
    }
}

/// A running device.
pub(crate) struct Daemon {
    process: Process,
    log: PathBuf,
}

impl Daemon {
    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.process.pid()
    }

    fn last_words(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let last: Vec<&str> = text.lines().rev().take(3).collect();
        if last.is_empty() {
            "it said nothing".into()
        } else {
            last.into_iter().rev().collect::<Vec<_>>().join("; ")
        }
    }
}

/// A tunnel between two devices of the same kind.
pub(crate) struct Pair {
    pub(crate) wire: Wire,
    pub(crate) family: Family,
    pub(crate) keys: [Key; 2],
    daemons: [Daemon; 2],
}

impl Pair {
    /// Starts both devices, configures them with wg(8), and sees a ping through.
    pub(crate) fn new(stop: &Stop, program: &Program, family: Family, mtu: u32) -> Result<Pair> {
        let wire = Wire::new(stop)?;
        let keys = [Key::random()?, Key::random()?];
        let daemons = [wire.start(End::A, program)?, wire.start(End::B, program)?];
        for end in [End::A, End::B] {
            let (own, peer) = (usize::from(end.number() - 1), usize::from(end.other().number() - 1));
            let allowed = format!("{}/{}", family.inner(end.other()), family.host_bits());
            let endpoint = SocketAddr::new(family.outer(end.other()), PORT).to_string();
            let public = keys[peer].public_base64();
            let port = PORT.to_string();
            wire.wg(
                end,
                &[
                    "set",
                    INTERFACE,
                    "private-key",
                    "/dev/stdin",
                    "listen-port",
                    &port,
                    "peer",
                    &public,
                    "allowed-ips",
                    &allowed,
                    "endpoint",
                    &endpoint,
                ],
                &keys[own].secret_base64(),
            )?;
            wire.ip(
                end,
                &format!(
                    "address add {}/{} dev {INTERFACE}{}\nlink set {INTERFACE} mtu {mtu} up\n",
                    family.inner(end),
                    family.link_bits(),
                    if family == Family::V6 { " nodad" } else { "" }
                ),
            )?;
        }
        let pair = Pair { wire, family, keys, daemons };
        pair.wake()?;
        Ok(pair)
    }

    /// Makes sure that there is a session, and that no measurement pays for its handshake.
    pub(crate) fn wake(&self) -> Result<()> {
        wait_until(&self.wire.stop, "a ping passes the tunnel", || {
            let text = self.wire.ping(End::A, self.family.inner(End::B), 1, Duration::from_secs(1))?;
            Ok(crate::ping::parse(&text).is_ok())
        })
        .with_context(|| self.daemons.each_ref().map(Daemon::last_words).join(" / "))
    }

    /// The process ids of both devices.
    pub(crate) fn pids(&self) -> [u32; 2] {
        self.daemons.each_ref().map(Daemon::pid)
    }

    /// A TCP run of iperf3 from A to B.
    pub(crate) fn tcp(&self, seconds: u64, arguments: &[&str]) -> Result<iperf::Tcp> {
        let arguments = [&["-C", CONGESTION_CONTROL], arguments].concat();
        iperf::tcp(&self.iperf(seconds, &arguments)?)
    }

    /// A UDP run of iperf3 from A to B, as fast as it can, `size` bytes each.
    pub(crate) fn udp_flood(&self, seconds: u64, size: &str) -> Result<iperf::Udp> {
        iperf::udp(&self.iperf(seconds, &["-u", "-b", "0", "-l", size])?)
    }

    fn iperf(&self, seconds: u64, arguments: &[&str]) -> Result<String> {
        let port = IPERF_PORT.to_string();
        // A server for one test: a flood can leave one behind that waits for the end of a lost connection.
        let server =
            self.wire.namespace(End::B)?.command("iperf3").args(["-s", "-1", "-p", &port]).spawn()?;
        wait_until(&self.wire.stop, "iperf3 listens", || {
            if server.try_wait()?.is_some() {
                bail!("iperf3 -s ended: {}", String::from_utf8_lossy(&server.stderr()).trim());
            }
            Ok(proc::listens(server.pid(), IPERF_PORT))
        })?;
        let (to, time) = (self.family.inner(End::B).to_string(), seconds.to_string());
        let mut line = vec!["iperf3", "-c", &to, "-p", &port, "-J", "-t", &time];
        line.extend(arguments);
        let output = self.wire.run(End::A, &line, "", Duration::from_secs(seconds + 20));
        server.kill()?;
        Ok(output?.stdout_text())
    }
}

/// Waits until `condition` holds, 15 s at most.
pub(crate) fn wait_until(stop: &Stop, what: &str, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    let until = Instant::now() + Duration::from_secs(15);
    while !condition()? {
        stop.check()?;
        if Instant::now() > until {
            bail!("waited 15 s in vain: {what}");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
