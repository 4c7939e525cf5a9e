//! Notifications of nf_tables: whether somebody else changed our table.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, SockFlag, recv};

use super::socket;
use super::wire::{Message, Messages, NFPROTO_INET, TABLE_ATTRIBUTE, kind};
use crate::ruleset::TABLE;

/// `NFNLGRP_NFTABLES` is group 7.
const GROUPS: u32 = 1 << 6;
const DATAGRAM: usize = 64 << 10;

/// A non-blocking socket that hears of every change of nf_tables in its network namespace. It becomes readable with one.
#[derive(Debug)]
pub struct Watch {
    fd: OwnedFd,
    buffer: Vec<u8>,
}

/// Whether somebody else has changed the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Foreign {
    /// Nobody has.
    No,
    /// Messages were lost, so that somebody may have; large changes of our own can be what was too much. [`super::Table::verify`] tells.
    Perhaps,
    /// Somebody has.
    Yes,
}

impl Watch {
    /// Begins to listen, in the network namespace of this thread.
    pub fn new() -> io::Result<Self> {
        let fd = socket::open(SockFlag::SOCK_NONBLOCK, GROUPS)?;
        Ok(Self { fd, buffer: vec![0; DATAGRAM] })
    }

    /// Whether since the last call anybody but `own_port_id` changed our table.
    pub fn foreign(&mut self, own_port_id: u32) -> io::Result<Foreign> {
        let mut foreign = Foreign::No;
        loop {
            match recv(self.fd.as_raw_fd(), &mut self.buffer, MsgFlags::empty()) {
                Ok(length) => {
                    let received = self.buffer.get(..length).unwrap_or_default();
                    if Messages(received).any(|message| is_foreign(&message, own_port_id)) {
                        foreign = Foreign::Yes;
                    }
                }
                Err(Errno::ENOBUFS) if foreign == Foreign::No => foreign = Foreign::Perhaps,
                Err(Errno::ENOBUFS) => {}
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(foreign),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Watch {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// A notification has the port id of the socket whose request it tells of, zero where it was nobody's.
fn is_foreign(message: &Message<'_>, own_port_id: u32) -> bool {
    let about_a_table = message.nft_kind().is_some_and(|kind| kind != kind::NEWGEN && kind != kind::TRACE);
    about_a_table
        && message.port_id != own_port_id
        && message.family() == Some(NFPROTO_INET)
        && message.attributes().text(TABLE_ATTRIBUTE) == Some(TABLE)
}

#[cfg(test)]
mod tests {
    use super::super::object;
    use super::super::wire::Batch;
    use super::*;

    fn notification(kind: u8, table: &str, port_id: u32) -> bool {
        let mut batch = Batch::default();
        batch.clear(1);
        if table == TABLE {
            object::message(&mut batch, kind, 0);
        } else {
            batch.message(kind, 0);
            batch.text(TABLE_ATTRIBUTE, table);
        }
        batch.end_request();
        let mut message = Messages(batch.bytes()).next().unwrap();
        message.port_id = port_id;
        is_foreign(&message, 7)
    }

    #[test]
    fn only_what_others_do_to_our_table_is_foreign() {
        assert!(notification(kind::NEWRULE, TABLE, 8));
        assert!(notification(kind::DELTABLE, TABLE, 0));
        assert!(!notification(kind::NEWRULE, TABLE, 7));
        assert!(!notification(kind::NEWRULE, "filter", 8));
        assert!(!notification(kind::NEWGEN, TABLE, 8));
    }
}
