//! Runs in the guest: carries out what comes over the control channel, and is an end of transfers.

use std::fs::{self, File};
use std::io::{BufReader, Read as _, Seek as _, SeekFrom, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use kernel_tests::channel::{self, Answer, HELLO, OUTPUT_MOST, PORT, Request};
use kernel_tests::transfer;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["serve"] => serve(),
        ["receive", at] => {
            let count = transfer::receive(&TcpListener::bind(at)?)?;
            writeln!(std::io::stdout(), "{count}")?;
            Ok(())
        }
        ["send", to, bytes] => {
            let took = transfer::send(to.parse()?, bytes.parse()?, Duration::from_secs(60))?;
            writeln!(std::io::stdout(), "{}", took.as_secs_f64())?;
            Ok(())
        }
        ["mark", count, to @ ..] => {
            let to = to.iter().map(|to| to.parse()).collect::<Result<Vec<SocketAddr>, _>>()?;
            mark(Path::new(count), &to)
        }
        _ => bail!(
            "usage: kernel-guest serve | receive ADDRESS:PORT | send ADDRESS:PORT BYTES | mark FILE ADDRESS:PORT..."
        ),
    }
}

/// Sends a marked packet to each of these a hundred times a second, whatever comes of it. The file tells how many
/// rounds there were.
fn mark(count: &Path, to: &[SocketAddr]) -> anyhow::Result<()> {
    let v4 = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    let v6 = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0));
    let new = count.with_extension("new");
    for round in 1_u64.. {
        for to in to {
            let socket = if to.is_ipv4() { Some(&v4) } else { v6.as_ref().ok() };
            // No interface, no route, the guard: that is what it is about.
            let _ = socket.map(|socket| socket.send_to(transfer::MARKER.as_bytes(), to));
        }
        fs::write(&new, round.to_string())?;
        fs::rename(&new, count)?;
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// The device of our port.
fn port() -> anyhow::Result<PathBuf> {
    for entry in fs::read_dir("/sys/class/virtio-ports")? {
        let entry = entry?;
        if fs::read_to_string(entry.path().join("name"))?.trim() == PORT {
            return Ok(PathBuf::from("/dev").join(entry.file_name()));
        }
    }
    bail!("no virtio-serial port {PORT}")
}

fn serve() -> anyhow::Result<()> {
    let path = port()?;
    let device = File::options().read(true).write(true).open(&path).context("opening the port")?;
    let answers = Arc::new(Mutex::new(device.try_clone()?));
    let answer = move |answers: &Mutex<File>, answer: &Answer| -> anyhow::Result<()> {
        let line = channel::line(answer)?;
        Ok(answers.lock().unwrap_or_else(PoisonError::into_inner).write_all(&line)?)
    };
    answer(&answers, &Answer { id: HELLO, code: Some(0), stdout: String::new(), stderr: String::new() })?;
    let mut requests = BufReader::new(device);
    while let Some(request) = channel::read::<Request>(&mut requests)? {
        let answers = Arc::clone(&answers);
        std::thread::spawn(move || {
            let done = carry_out(&request).unwrap_or_else(|error| Answer {
                id: request.id,
                code: None,
                stdout: String::new(),
                stderr: format!("{error:#}"),
            });
            let _ = answer(&answers, &done);
        });
    }
    Ok(())
}

fn carry_out(request: &Request) -> anyhow::Result<Answer> {
    // Files, not pipes: a daemon that keeps them open keeps nobody waiting.
    let (mut stdin, mut stdout, mut stderr) =
        (tempfile::tempfile()?, tempfile::tempfile()?, tempfile::tempfile()?);
    stdin.write_all(request.stdin.as_bytes())?;
    stdin.rewind()?;
    let mut child = Command::new("/bin/sh")
        .args(["-c", &request.script])
        .stdin(Stdio::from(stdin))
        .stdout(stdout.try_clone()?)
        .stderr(stderr.try_clone()?)
        .process_group(0)
        .spawn()?;
    let deadline = Instant::now() + Duration::from_secs(request.seconds);
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if Instant::now() >= deadline {
            let _ = killpg(Pid::from_raw(i32::try_from(child.id())?), Signal::SIGKILL);
            break child.wait()?;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    Ok(Answer { id: request.id, code: status.code(), stdout: tail(&mut stdout)?, stderr: tail(&mut stderr)? })
}

fn tail(file: &mut File) -> anyhow::Result<String> {
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(OUTPUT_MOST as u64)))?;
    let mut text = Vec::new();
    file.take(OUTPUT_MOST as u64).read_to_end(&mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}
