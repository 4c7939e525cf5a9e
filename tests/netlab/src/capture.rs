//! Frames on an interface: written, counted, searched.

use std::fs::File;
use std::io::{self, BufWriter, IoSliceMut};
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use memchr::memmem::Finder;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

use crate::frame::{self, Class};
use crate::pcap::{SNAPLEN, Writer};
use crate::{Error, Namespace, Result, sys};

/// Asked of the kernel for a capture's queue, in bytes.
const QUEUE: usize = 256 << 20;
/// A question about counters waits no longer than this for a lull of the traffic.
const LULL: Duration = Duration::from_secs(1);

/// What to do with the frames of an interface.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CaptureSpec {
    /// Byte strings to look for in every frame.
    pub markers: Vec<Vec<u8>>,
    /// Prefixes that should not show: frames are counted whose outermost IP source or destination lies in one
    /// of them, neighbour discovery excepted.
    pub watch: Vec<IpNet>,
    /// Classic pcap file to write (nanosecond timestamps, whole frames).
    pub pcap: Option<PathBuf>,
    /// UDP ports that count as WireGuard; empty: 51820.
    pub wireguard_ports: Vec<u16>,
    /// UDP ports that count as VXLAN; empty: 4789.
    pub vxlan_ports: Vec<u16>,
}

impl CaptureSpec {
    /// Counts only.
    pub fn new() -> CaptureSpec {
        CaptureSpec::default()
    }

    /// Looks for a marker.
    pub fn marker(mut self, marker: impl Into<Vec<u8>>) -> CaptureSpec {
        self.markers.push(marker.into());
        self
    }

    /// Watches for a prefix.
    pub fn watch(mut self, prefix: IpNet) -> CaptureSpec {
        self.watch.push(prefix);
        self
    }

    /// Writes a pcap file.
    pub fn pcap(mut self, file: impl Into<PathBuf>) -> CaptureSpec {
        self.pcap = Some(file.into());
        self
    }
}

/// Counters of a capture. A frame counts in exactly one class: `arp`, `icmp` (neighbour discovery included),
/// `wireguard`, `vxlan` or `other`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CaptureStats {
    /// Frames seen, both directions.
    pub packets: u64,
    /// Bytes of those frames, link header included.
    pub bytes: u64,
    /// UDP to or from a WireGuard port.
    pub wireguard: u64,
    /// UDP to or from a VXLAN port.
    pub vxlan: u64,
    /// ICMP and ICMPv6.
    pub icmp: u64,
    /// ARP.
    pub arp: u64,
    /// Everything else.
    pub other: u64,
    /// Frames that held each marker, in the order of [`CaptureSpec::markers`].
    pub marker_frames: Vec<u64>,
    /// Frames from or to a prefix of [`CaptureSpec::watch`].
    pub watched: u64,
    /// Frames the kernel dropped because the capture was too slow. Not zero: absence of a marker proves
    /// nothing.
    pub kernel_drops: u64,
}

/// The end of a capture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaptureReport {
    /// Namespace name.
    pub namespace: String,
    /// Interface name.
    pub interface: String,
    /// Final counters.
    pub stats: CaptureStats,
    /// The first frame that held a marker, if any, whole.
    pub first_marked_frame: Option<Vec<u8>>,
    /// The file written.
    pub pcap: Option<PathBuf>,
}

impl CaptureReport {
    /// Whether no marker and no watched prefix was seen and no frame was missed.
    pub fn is_clean(&self) -> bool {
        self.stats.kernel_drops == 0
            && self.stats.watched == 0
            && self.stats.marker_frames.iter().all(|n| *n == 0)
    }
}

/// A running capture; a thread. Dropping it stops it.
#[derive(Debug)]
pub struct Capture {
    questions: Sender<Question>,
    bell: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
enum Question {
    Stats(Sender<io::Result<CaptureStats>>),
    Stop(Sender<io::Result<CaptureReport>>),
}

impl Capture {
    /// Counters, exact: every frame that crossed the interface before the call is counted, and written to the
    /// pcap file if there is one.
    pub fn stats(&self) -> Result<CaptureStats> {
        self.ask(Question::Stats)
    }

    /// Drains what is queued, closes the file and reports.
    pub fn stop(self) -> Result<CaptureReport> {
        self.ask(Question::Stop)
    }

    fn ask<T>(&self, question: impl FnOnce(Sender<io::Result<T>>) -> Question) -> Result<T> {
        let (answer, answered) = channel();
        let died = || Error::Panicked { namespace: "capture".into() };
        self.questions.send(question(answer)).map_err(|_| died())?;
        let _ = self.bell.write(1);
        answered.recv().map_err(|_| died())?.map_err(Error::system("capture"))
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        let (answer, _) = channel();
        let _ = self.questions.send(Question::Stop(answer));
        let _ = self.bell.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Opens the socket in the namespace and starts the thread that serves it.
pub(crate) fn start(namespace: &Namespace, interface: &str, spec: CaptureSpec) -> Result<Capture> {
    let what = format!("capture on {interface} in namespace {}", namespace.name());
    let name = interface.to_owned();
    let (socket, hardware) = namespace
        .inline(move || -> io::Result<(OwnedFd, u16)> {
            sys::packet_socket(nix::net::if_::if_nametoindex(name.as_str())?, QUEUE)
        })?
        .map_err(Error::system(what.clone()))?;
    let ethernet = matches!(hardware, libc::ARPHRD_ETHER | libc::ARPHRD_LOOPBACK);
    let bell = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
        .map(Arc::new)
        .map_err(Error::errno(what.clone()))?;
    let pcap = match &spec.pcap {
        Some(path) => Some(
            Writer::create(path, ethernet)
                .map_err(Error::system(format!("{what}: write {}", path.display())))?,
        ),
        None => None,
    };
    let or = |ports: &[u16], default: u16| if ports.is_empty() { vec![default] } else { ports.to_vec() };
    let recorder = Recorder {
        socket,
        ethernet,
        wireguard: or(&spec.wireguard_ports, 51820),
        vxlan: or(&spec.vxlan_ports, 4789),
        finders: spec.markers.iter().map(|marker| Finder::new(marker).into_owned()).collect(),
        watch: spec.watch,
        pcap,
        buffer: vec![0; SNAPLEN as usize],
        report: CaptureReport {
            namespace: namespace.name().to_owned(),
            interface: interface.to_owned(),
            stats: CaptureStats { marker_frames: vec![0; spec.markers.len()], ..CaptureStats::default() },
            first_marked_frame: None,
            pcap: spec.pcap,
        },
    };
    let (questions, asked) = channel();
    let thread = {
        let bell = Arc::clone(&bell);
        std::thread::Builder::new()
            .name(format!("capture {interface}"))
            .spawn(move || recorder.serve(&bell, &asked))
            .map_err(Error::system(what))?
    };
    Ok(Capture { questions, bell, thread: Some(thread) })
}

struct Recorder {
    socket: OwnedFd,
    ethernet: bool,
    wireguard: Vec<u16>,
    vxlan: Vec<u16>,
    finders: Vec<Finder<'static>>,
    watch: Vec<IpNet>,
    pcap: Option<Writer<BufWriter<File>>>,
    buffer: Vec<u8>,
    report: CaptureReport,
}

impl Recorder {
    fn serve(mut self, bell: &EventFd, asked: &Receiver<Question>) {
        let mut failure: Option<io::Error> = None;
        loop {
            let mut ready = [
                PollFd::new(bell.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.socket.as_fd(), PollFlags::POLLIN),
            ];
            let watched = if failure.is_some() { &mut ready[..1] } else { &mut ready[..] };
            match poll(watched, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => failure = Some(errno.into()),
            }
            let _ = bell.read();
            // Questions before frames: what crossed before a question was asked is in its answer.
            let mut questions = Vec::new();
            let abandoned = loop {
                match asked.try_recv() {
                    Ok(question) => questions.push(question),
                    Err(end) => break end == TryRecvError::Disconnected,
                }
            };
            if failure.is_none() {
                failure = self.drain().err();
            }
            let result = || match &failure {
                Some(error) => Err(io::Error::new(error.kind(), error.to_string())),
                None => Ok(()),
            };
            for question in questions {
                match question {
                    Question::Stats(answer) => {
                        let flushed = self.pcap.as_mut().map_or(Ok(()), Writer::flush);
                        drop(answer.send(result().and(flushed).map(|()| self.report.stats.clone())));
                    }
                    Question::Stop(answer) => {
                        let flushed = self.pcap.as_mut().map_or(Ok(()), Writer::flush);
                        drop(answer.send(result().and(flushed).map(|()| self.report)));
                        return;
                    }
                }
            }
            if abandoned {
                return;
            }
        }
    }

    /// Takes all queued frames.
    fn drain(&mut self) -> io::Result<()> {
        let until = Instant::now() + LULL;
        let mut control = nix::cmsg_space!(nix::sys::time::TimeSpec);
        loop {
            let (length, time) = {
                let mut slices = [IoSliceMut::new(&mut self.buffer)];
                let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_TRUNC;
                let message = recvmsg::<()>(self.socket.as_raw_fd(), &mut slices, Some(&mut control), flags);
                let message = match message {
                    Ok(message) => message,
                    Err(Errno::EAGAIN) => break,
                    // The interface went down, or is gone; what comes later is still of interest.
                    Err(Errno::EINTR | Errno::ENETDOWN) => continue,
                    Err(errno) => return Err(errno.into()),
                };
                let stamp = message.cmsgs()?.find_map(|control| match control {
                    ControlMessageOwned::ScmTimestampns(stamp) => Some(Duration::from(stamp)),
                    _ => None,
                });
                (message.bytes, stamp.unwrap_or_default())
            };
            self.frame(length, time)?;
            if Instant::now() > until {
                break;
            }
        }
        self.report.stats.kernel_drops += sys::packet_drops(self.socket.as_fd())?;
        Ok(())
    }

    fn frame(&mut self, length: usize, time: Duration) -> io::Result<()> {
        let frame = &self.buffer[..length.min(self.buffer.len())];
        let stats = &mut self.report.stats;
        stats.packets += 1;
        stats.bytes += length as u64;
        let outermost = frame::read(frame, self.ethernet);
        let in_watched = |address: IpAddr| self.watch.iter().any(|prefix| prefix.contains(&address));
        if outermost.addresses.is_some_and(|(from, to)| in_watched(from) || in_watched(to)) {
            stats.watched += 1;
        }
        let class = match outermost.class {
            Class::Arp => &mut stats.arp,
            Class::Icmp => &mut stats.icmp,
            Class::Udp { source: a, destination: b } => {
                let to_or_from = |ports: &[u16]| ports.contains(&a) || ports.contains(&b);
                match (to_or_from(&self.wireguard), to_or_from(&self.vxlan)) {
                    (true, _) => &mut stats.wireguard,
                    (_, true) => &mut stats.vxlan,
                    (false, false) => &mut stats.other,
                }
            }
            Class::Other => &mut stats.other,
        };
        *class += 1;
        let mut marked = false;
        for (finder, frames) in self.finders.iter().zip(&mut stats.marker_frames) {
            if finder.find(frame).is_some() {
                *frames += 1;
                marked = true;
            }
        }
        if marked && self.report.first_marked_frame.is_none() {
            self.report.first_marked_frame = Some(frame.to_vec());
        }
        self.pcap.as_mut().map_or(Ok(()), |pcap| pcap.frame(time, frame, length))
    }
}
