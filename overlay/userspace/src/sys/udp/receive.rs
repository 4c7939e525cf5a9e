//! Receiving datagrams in runs.
#![allow(unsafe_code)]

use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::fd::{AsRawFd, BorrowedFd};

use super::super::check;
use super::BATCH;
use super::address::from_storage;
use super::headers::{Headers, ancillary};
use crate::peer::Endpoint;

// The largest run of datagrams there can be.
const SLOT: usize = 65_536;

/// Datagrams that came together from one sender.
#[derive(Clone, Copy, Debug)]
pub struct Train<'a> {
    /// The sender.
    pub from: &'a Endpoint,
    /// The datagrams, one behind the other.
    pub bytes: &'a [u8],
    /// The length of each but for the last, which may be shorter; not 0.
    pub segment: usize,
}

/// Buffers for receiving, allocated once.
pub struct ReceiveBatch {
    buffers: Box<[u8]>,
    headers: Headers,
    received: Vec<Received>,
}

struct Received {
    from: Endpoint,
    length: usize,
    segment: usize,
}

impl ReceiveBatch {
    /// Buffers for [`BATCH`] runs. Memory is used only as far as they fill it.
    pub fn new() -> Self {
        Self {
            buffers: vec![0; BATCH * SLOT].into(),
            headers: Headers::new(),
            received: Vec::with_capacity(BATCH),
        }
    }

    /// Receives what is there, up to `most` runs of datagrams and no more than [`BATCH`], without waiting. Returns
    /// how many were taken from the socket.
    pub fn receive(&mut self, fd: BorrowedFd<'_>, most: usize) -> io::Result<usize> {
        let most = most.min(BATCH);
        self.received.clear();
        for (i, slot) in self.buffers.chunks_exact_mut(SLOT).take(most).enumerate() {
            self.headers.prepare(i, slot);
        }
        // SAFETY: each header points to its own address, control space and buffer, which outlive the call.
        let count = check(unsafe {
            libc::recvmmsg(
                fd.as_raw_fd(),
                self.headers.headers.as_mut_ptr(),
                most as libc::c_uint,
                libc::MSG_DONTWAIT as _,
                std::ptr::null_mut(),
            )
        })? as usize;
        for (header, address) in self.headers.headers[..count].iter().zip(&self.headers.addresses) {
            // What cannot be answered or was cut keeps its place, with a length that no message has.
            let whole = header.msg_hdr.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) == 0;
            let remote = from_storage(address);
            let length = if whole && remote.is_some() { (header.msg_len as usize).min(SLOT) } else { 0 };
            let remote = remote.unwrap_or(SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0)));
            let said = ancillary(&header.msg_hdr);
            let segment = said.segment.filter(|segment| *segment > 0).unwrap_or(length).max(1);
            self.received.push(Received { from: Endpoint { remote, local: said.local }, length, segment });
        }
        Ok(count)
    }

    /// What the last [`ReceiveBatch::receive`] brought.
    pub fn trains(&self) -> impl Iterator<Item = Train<'_>> {
        self.received.iter().zip(self.buffers.chunks_exact(SLOT)).map(|(received, slot)| Train {
            from: &received.from,
            bytes: &slot[..received.length],
            segment: received.segment,
        })
    }
}

impl Default for ReceiveBatch {
    fn default() -> Self {
        Self::new()
    }
}
