//! The emulated machine: QEMU in a namespace of the lab, and the commands that it is given.

use std::collections::BTreeMap;
use std::io::{BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use netlab::{Namespace, Process};

use crate::channel::{self, Answer, HELLO, PORT, Request};

/// From power on to the first word; emulation on a busy machine is slow.
const BOOT: Duration = Duration::from_secs(120);
/// For a command that names no deadline of its own.
const COMMAND: Duration = Duration::from_secs(60);
/// What the way there and back may take beyond a command's own deadline.
const WAY: Duration = Duration::from_secs(20);

/// What the guest boots from.
#[derive(Debug, Clone)]
pub struct Image {
    /// The kernel.
    pub kernel: PathBuf,
    /// Archives, unpacked one after the other into the initramfs.
    pub initramfs: Vec<PathBuf>,
    /// A disk, which the guest has as `/dev/vda` and writes to.
    pub disk: Option<PathBuf>,
    /// More words for the kernel and for what it starts.
    pub words: String,
}

/// Who waits for which answer; none once the channel is closed.
type Waiting = Arc<Mutex<Option<BTreeMap<u64, Sender<Answer>>>>>;

/// A running guest. It ends with the lab.
#[derive(Debug)]
pub struct Guest {
    process: Process,
    requests: Mutex<UnixStream>,
    waiting: Waiting,
    last: AtomicU64,
    console: PathBuf,
    /// From power on to the first word.
    pub boot_time: Duration,
}

impl Guest {
    /// Boots a guest whose `eth0` is a TAP interface of this namespace; sockets and the console's log go to `dir`.
    ///
    /// # Errors
    /// QEMU's own words and the console's end when it does not come up within two minutes.
    pub fn boot(image: &Image, namespace: &Namespace, tap: &str, dir: &Path) -> anyhow::Result<Self> {
        let (socket, console, both) =
            (dir.join("control.sock"), dir.join("console.log"), dir.join("initramfs"));
        // The kernel unpacks archives one after the other, whatever the number of files they came in.
        let mut joined = std::fs::File::create(&both)?;
        for part in &image.initramfs {
            let mut part = std::fs::File::open(part).with_context(|| part.display().to_string())?;
            std::io::copy(&mut part, &mut joined)?;
        }
        let begun = Instant::now();
        let words = format!("console=ttyS0 quiet panic=-1 random.trust_cpu=on {}", image.words);
        let mut command = namespace
            .command("qemu-system-x86_64")
            .args(["-accel", "tcg", "-cpu", "max", "-smp", "1", "-m", "512"])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .arg("-kernel")
            .arg(&image.kernel)
            .arg("-initrd")
            .arg(&both)
            .args(["-append", &words])
            .args(["-serial", &format!("file:{}", console.display())])
            .args(["-netdev", &format!("tap,id=n0,ifname={tap},script=no,downscript=no")])
            .args(["-device", "virtio-net-pci,netdev=n0,mac=52:54:00:00:03:0a,romfile="])
            .args(["-device", "virtio-rng-pci"])
            .args(["-chardev", &format!("socket,id=c0,path={},server=on,wait=on", socket.display())])
            .args(["-device", "virtio-serial-pci"])
            .args(["-device", &format!("virtserialport,chardev=c0,name={PORT}")]);
        if let Some(disk) = &image.disk {
            let drive = format!("file={},format=raw,if=none,id=d0", disk.display());
            command = command.args(["-drive", &drive]).args(["-device", "virtio-blk-pci,drive=d0"]);
        }
        let process = command.spawn()?;
        let stream = loop {
            match UnixStream::connect(&socket) {
                Ok(stream) => break stream,
                Err(_) if process.try_wait()?.is_none() && begun.elapsed() < BOOT => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                Err(error) => bail!("QEMU: {error}: {}", String::from_utf8_lossy(&process.stderr())),
            }
        };
        let (hello, said_hello) = channel();
        let waiting: Waiting = Arc::new(Mutex::new(Some(BTreeMap::from([(HELLO, hello)]))));
        listen(stream.try_clone()?, Arc::clone(&waiting));
        let mut guest = Self {
            process,
            requests: Mutex::new(stream),
            waiting,
            last: AtomicU64::new(HELLO),
            console,
            boot_time: Duration::ZERO,
        };
        guest.receive(&said_hello, BOOT).context("booting the guest")?;
        std::fs::remove_file(&both)?;
        guest.boot_time = begun.elapsed();
        Ok(guest)
    }

    fn receive(&self, answers: &Receiver<Answer>, deadline: Duration) -> anyhow::Result<Answer> {
        answers.recv_timeout(deadline).map_err(|error| {
            let said = String::from_utf8_lossy(&self.process.stderr()).into_owned();
            anyhow::anyhow!("no answer of the guest: {error}; QEMU: {said}; console: {}", self.console())
        })
    }

    /// Runs a script and waits for its end. Calls from several threads run side by side.
    ///
    /// # Errors
    /// When the guest is gone or does not answer. A script that fails is no error.
    pub fn ask(&self, script: &str, stdin: &str, deadline: Duration) -> anyhow::Result<Answer> {
        let id = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        let (answer, answered) = channel();
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.as_mut().context("the guest has ended")?.insert(id, answer);
        drop(waiting);
        let request =
            Request { id, script: script.to_owned(), stdin: stdin.to_owned(), seconds: deadline.as_secs() };
        let line = channel::line(&request)?;
        self.requests.lock().unwrap_or_else(PoisonError::into_inner).write_all(&line)?;
        self.receive(&answered, deadline + WAY).with_context(|| format!("guest: {script}"))
    }

    /// Runs a script that has to succeed; what it printed.
    ///
    /// # Errors
    /// As [`Guest::ask`], and what a failing script said.
    pub fn run(&self, script: &str) -> anyhow::Result<String> {
        let answer = self.ask(script, "", COMMAND)?;
        let Answer { code, stdout, stderr, .. } = answer;
        ensure!(code == Some(0), "guest: {script}: exit {code:?}: {stderr}{stdout}");
        Ok(stdout)
    }

    /// Writes a file, whole or not at all.
    ///
    /// # Errors
    /// As [`Guest::run`].
    pub fn write(&self, path: &str, content: &str) -> anyhow::Result<()> {
        let script = format!("mkdir -p \"$(dirname {path})\" /root && cat >/root/new && mv /root/new {path}");
        let answer = self.ask(&script, content, COMMAND)?;
        ensure!(answer.code == Some(0), "guest: writing {path}: {}", answer.stderr);
        Ok(())
    }

    /// Cuts its power off: nothing in it is told, and nothing is written any more.
    ///
    /// # Errors
    /// Returns the system's error.
    pub fn cut_power(self) -> anyhow::Result<()> {
        Ok(self.process.kill()?)
    }

    /// The end of what the guest's kernel and first program said.
    pub fn console(&self) -> String {
        let text = std::fs::read(&self.console).unwrap_or_default();
        String::from_utf8_lossy(&text[text.len().saturating_sub(4_000)..]).into_owned()
    }
}

/// Hands each answer to who waits for it.
fn listen(stream: UnixStream, waiting: Waiting) {
    std::thread::spawn(move || {
        let mut lines = BufReader::new(stream);
        while let Ok(Some(answer)) = channel::read::<Answer>(&mut lines) {
            let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
            // Who gave up waiting misses nothing.
            let asked = waiting.as_mut().and_then(|waiting| waiting.remove(&answer.id));
            let _ = asked.map(|sender| sender.send(answer));
        }
        *waiting.lock().unwrap_or_else(PoisonError::into_inner) = None;
    });
}
