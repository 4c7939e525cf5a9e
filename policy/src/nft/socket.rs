//! One blocking netlink socket to nf_tables: transactions, and dumps that are complete or an error.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, getsockname, recv, send,
    setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike as _};

use super::wire::{Batch, Message, Messages, NLM_F_DUMP_INTR, NLMSG_DONE, NLMSG_ERROR};

/// A transaction goes to the kernel in one piece, which the socket has to have room for.
const SEND_BUFFER: usize = 64 << 20;
const RECEIVE_BUFFER: usize = 8 << 20;
/// An error comes with the message it is about: of at most 64 KiB of elements.
const DATAGRAM: usize = 128 << 10;
/// How long the kernel may take for the next part of an answer.
const PATIENCE_SECONDS: i64 = 10;
/// How often a dump is tried that changed under our hands.
const DUMP_TRIES: usize = 10;

/// Why a transaction failed.
#[derive(Debug)]
pub(super) struct Refusal {
    /// Of the message that the kernel refused first; `None` for the whole.
    pub(super) sequence: Option<u32>,
    pub(super) errno: Errno,
}

impl From<Errno> for Refusal {
    fn from(errno: Errno) -> Self {
        Self { sequence: None, errno }
    }
}

/// Opens a socket, in the network namespace of this thread.
pub(super) fn open(flags: SockFlag, groups: u32) -> Result<OwnedFd, Errno> {
    let fd = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        flags | SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkNetFilter,
    )?;
    // Beyond the limits of the system with CAP_NET_ADMIN, up to them without.
    if setsockopt(&fd, sockopt::RcvBufForce, &RECEIVE_BUFFER).is_err() {
        let _ = setsockopt(&fd, sockopt::RcvBuf, &RECEIVE_BUFFER);
    }
    bind(fd.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
    Ok(fd)
}

/// The socket of a table.
#[derive(Debug)]
pub(super) struct Socket {
    fd: OwnedFd,
    port_id: u32,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Socket {
    pub(super) fn new() -> io::Result<Self> {
        let fd = open(SockFlag::empty(), 0)?;
        if setsockopt(&fd, sockopt::SndBufForce, &SEND_BUFFER).is_err() {
            let _ = setsockopt(&fd, sockopt::SndBuf, &SEND_BUFFER);
        }
        setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::seconds(PATIENCE_SECONDS))?;
        let port_id = getsockname::<NetlinkAddr>(fd.as_raw_fd())?.pid();
        Ok(Self { fd, port_id, sequence: 1, buffer: vec![0; DATAGRAM] })
    }

    /// By which the kernel knows this socket.
    pub(super) fn port_id(&self) -> u32 {
        self.port_id
    }

    /// The sequence number for the next message.
    pub(super) fn sequence(&self) -> u32 {
        self.sequence
    }

    /// Makes a transaction happen, or nothing of it.
    pub(super) fn transact(&mut self, batch: &mut Batch) -> Result<(), Refusal> {
        let last = batch.end();
        self.send(batch)?;
        let first = batch.first_sequence();
        let mut refusal: Option<Refusal> = None;
        loop {
            let received = match self.receive() {
                Ok(received) => received,
                // Too many errors for our buffer: the first one is there.
                Err(Errno::ENOBUFS) => continue,
                Err(Errno::EAGAIN) => {
                    return Err(refusal.unwrap_or(Refusal { sequence: None, errno: Errno::ETIMEDOUT }));
                }
                Err(errno) => return Err(errno.into()),
            };
            for message in Messages(received).filter(|message| message.kind == NLMSG_ERROR) {
                // What is left of an earlier transaction is none of this one's.
                if message.sequence.wrapping_sub(first) > last.wrapping_sub(first) {
                    continue;
                }
                let errno = Errno::from_raw(message.errno());
                if message.errno() != 0 && refusal.is_none() {
                    let sequence = (message.sequence != first).then_some(message.sequence);
                    refusal = Some(Refusal { sequence, errno });
                }
                // An error of the beginning is one of the whole.
                if message.sequence == last || message.sequence == first {
                    return refusal.map_or(Ok(()), Err);
                }
            }
        }
    }

    /// Sends a request that is answered by one message or by many, and has each of them looked at.
    pub(super) fn ask(
        &mut self,
        batch: &mut Batch,
        mut each: impl FnMut(&Message<'_>),
    ) -> Result<Complete, Errno> {
        batch.end_request();
        self.send(batch)?;
        let sequence = batch.first_sequence();
        let mut complete = Complete::Yes;
        loop {
            let received = self.receive()?;
            for message in Messages(received).filter(|message| message.sequence == sequence) {
                if message.flags & NLM_F_DUMP_INTR != 0 {
                    complete = Complete::No;
                }
                match message.kind {
                    NLMSG_DONE | NLMSG_ERROR if message.errno() == 0 => return Ok(complete),
                    NLMSG_DONE | NLMSG_ERROR => return Err(Errno::from_raw(message.errno())),
                    _ => each(&message),
                }
            }
        }
    }

    /// Everything of a kind, as one consistent reading.
    pub(super) fn dump<T: Default>(
        &mut self,
        batch: &mut Batch,
        request: impl Fn(&mut Batch),
        mut each: impl FnMut(&mut T, &Message<'_>),
    ) -> Result<T, Errno> {
        for _ in 0..DUMP_TRIES {
            batch.clear(self.sequence);
            request(batch);
            let mut found = T::default();
            match self.ask(batch, |message| each(&mut found, message)) {
                Ok(Complete::Yes) => return Ok(found),
                // Our table may be untouched, but others' changes count as well.
                Ok(Complete::No) | Err(Errno::ENOBUFS | Errno::EINTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        Err(Errno::EINTR)
    }

    fn send(&mut self, batch: &Batch) -> Result<(), Errno> {
        self.sequence = batch.next_sequence();
        loop {
            match send(self.fd.as_raw_fd(), batch.bytes(), MsgFlags::empty()) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno),
            }
        }
    }

    fn receive(&mut self) -> Result<&[u8], Errno> {
        loop {
            match recv(self.fd.as_raw_fd(), &mut self.buffer, MsgFlags::empty()) {
                Ok(length) => return Ok(self.buffer.get(..length).unwrap_or_default()),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno),
            }
        }
    }
}

/// Whether an answer is one consistent reading.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Complete {
    Yes,
    No,
}
