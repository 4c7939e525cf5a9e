//! Many datagrams by one system call.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::socket::{
    ControlMessage, MsgFlags, MultiHeaders, SockaddrStorage, recvmmsg, sendmmsg, setsockopt, sockopt,
};

/// Datagrams by one call at most.
pub(crate) const BATCH: usize = 64;
const BUFFER_BYTES: usize = 8 << 20;

/// Gives a socket large buffers, with or without the right to exceed the system's limits.
pub(crate) fn enlarge(socket: &impl AsFd) {
    let _ = setsockopt(socket, sockopt::RcvBufForce, &BUFFER_BYTES)
        .or_else(|_| setsockopt(socket, sockopt::RcvBuf, &BUFFER_BYTES));
    let _ = setsockopt(socket, sockopt::SndBufForce, &BUFFER_BYTES)
        .or_else(|_| setsockopt(socket, sockopt::SndBuf, &BUFFER_BYTES));
}

/// Sends datagrams of any socket in batches.
pub(crate) struct Sender {
    headers: MultiHeaders<SockaddrStorage>,
}

impl Sender {
    pub(crate) fn new() -> Sender {
        Sender { headers: MultiHeaders::preallocate(BATCH, None) }
    }

    /// Sends up to [`BATCH`] datagrams, each to its address, and returns how many the kernel took. What it has no
    /// room for is not an error.
    pub(crate) fn send(
        &mut self,
        socket: &impl AsRawFd,
        datagrams: &[(&[u8], Option<SockaddrStorage>)],
    ) -> io::Result<usize> {
        let slices: Vec<[IoSlice<'_>; 1]> =
            datagrams.iter().map(|(bytes, _)| [IoSlice::new(bytes)]).collect();
        let addresses: Vec<Option<SockaddrStorage>> = datagrams.iter().map(|(_, to)| *to).collect();
        let none: [ControlMessage<'_>; 0] = [];
        let sent = sendmmsg(
            socket.as_raw_fd(),
            &mut self.headers,
            slices.iter(),
            &addresses,
            none,
            MsgFlags::empty(),
        );
        match sent {
            Ok(results) => Ok(results.count()),
            Err(Errno::ENOBUFS | Errno::EAGAIN | Errno::EINTR | Errno::ECONNREFUSED) => Ok(0),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// Counts what arrives at a UDP socket of the calling thread's namespace.
pub(crate) struct Sink {
    socket: UdpSocket,
    count: Arc<AtomicU64>,
    end: Arc<AtomicBool>,
}

impl Sink {
    /// Binds it. The counter goes on while [`Sink::run`] runs, and that ends soon after `end` is set.
    pub(crate) fn bind(at: SocketAddr, count: Arc<AtomicU64>, end: Arc<AtomicBool>) -> Result<Sink> {
        let socket = UdpSocket::bind(at).with_context(|| format!("bind {at}"))?;
        enlarge(&socket);
        socket.set_read_timeout(Some(Duration::from_millis(50))).context("set a timeout")?;
        Ok(Sink { socket, count, end })
    }

    /// Reads until the end.
    pub(crate) fn run(&self) -> Result<()> {
        let mut buffers = vec![[0u8; 2048]; BATCH];
        let mut headers: MultiHeaders<()> = MultiHeaders::preallocate(BATCH, None);
        while !self.end.load(Ordering::Relaxed) {
            let mut slices: Vec<[IoSliceMut<'_>; 1]> =
                buffers.iter_mut().map(|buffer| [IoSliceMut::new(buffer)]).collect();
            let read = recvmmsg(
                self.socket.as_raw_fd(),
                &mut headers,
                slices.iter_mut(),
                MsgFlags::MSG_WAITFORONE,
                None,
            );
            match read {
                Ok(messages) => {
                    self.count.fetch_add(messages.count() as u64, Ordering::Relaxed);
                }
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                Err(errno) => return Err(errno).context("read a UDP socket"),
            }
        }
        Ok(())
    }
}
