//! Receiving batches: several messages per system call, several datagrams per message.
#![allow(unsafe_code)]

use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::fd::{AsRawFd, BorrowedFd};

use super::address::{self, Storage};
use super::control::{self, Control};
use crate::peer::Endpoint;
use crate::sys::check;

const SLOTS: usize = 64;
// Bytes; no message is longer, joined or not.
const SLOT: usize = 1 << 16;

/// Buffers for receiving, allocated once.
///
/// The headers point to the other arrays from the beginning on and are put right after use only where the kernel has
/// changed them. Those arrays are neither resized nor written to here.
pub struct ReceiveBatch {
    slot: usize,
    buffers: Vec<u8>,
    addresses: Vec<Storage>,
    _controls: Vec<Control>,
    // These two are never read here, but pointed to.
    _vectors: Vec<libc::iovec>,
    headers: Vec<libc::mmsghdr>,
    received: Vec<Message>,
}

// SAFETY: the raw pointers are to memory that the batch owns.
unsafe impl Send for ReceiveBatch {}

struct Message {
    from: Endpoint,
    length: usize,
    segment: usize,
}

/// What one message brought: one datagram, or several of one length that came from one peer behind each other. The
/// last can be shorter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Train<'a> {
    /// Where they came from.
    pub from: &'a Endpoint,
    /// The datagrams, one directly behind the other. Nothing where a datagram was empty, cut, or not one to answer.
    pub bytes: &'a [u8],
    /// Bytes per datagram: at least 1, and no more than there are bytes.
    pub segment: usize,
}

impl<'a> Train<'a> {
    /// The datagrams.
    pub fn datagrams(&self) -> std::slice::Chunks<'a, u8> {
        self.bytes.chunks(self.segment)
    }
}

impl ReceiveBatch {
    /// The most messages that one call can bring.
    pub const MAX: usize = SLOTS;

    /// Buffers for [`ReceiveBatch::MAX`] messages of up to 64 KiB. Memory is used only as far as messages fill it.
    pub fn new() -> Self {
        Self::with_slots(SLOTS, SLOT)
    }

    fn with_slots(count: usize, slot: usize) -> Self {
        let mut buffers = vec![0; count * slot];
        let mut addresses = vec![address::zeroed(); count];
        let mut controls = vec![Control::default(); count];
        let mut vectors: Vec<libc::iovec> = buffers
            .chunks_exact_mut(slot)
            .map(|slot| libc::iovec { iov_base: slot.as_mut_ptr().cast(), iov_len: slot.len() })
            .collect();
        let headers = (0..count)
            .map(|i| {
                // SAFETY: an all-zero mmsghdr is valid.
                let mut header: libc::mmsghdr = unsafe { std::mem::zeroed() };
                header.msg_hdr.msg_name = (&raw mut addresses[i]).cast();
                header.msg_hdr.msg_iov = &raw mut vectors[i];
                header.msg_hdr.msg_iovlen = 1;
                header.msg_hdr.msg_control = (&raw mut controls[i]).cast();
                put_right(&mut header);
                header
            })
            .collect();
        let received = Vec::with_capacity(count);
        Self { slot, buffers, addresses, _controls: controls, _vectors: vectors, headers, received }
    }

    /// Receives what is there, up to `max` messages, without waiting. Returns how many were taken from the socket;
    /// `WouldBlock` when there was none.
    pub fn receive(&mut self, fd: BorrowedFd<'_>, max: usize) -> io::Result<usize> {
        for header in &mut self.headers[..self.received.len()] {
            put_right(header);
        }
        self.received.clear();
        let max = max.min(self.headers.len());
        // SAFETY: each header points to its own address, control space and buffer, which outlive the call.
        let count = check(unsafe {
            libc::recvmmsg(
                fd.as_raw_fd(),
                self.headers.as_mut_ptr(),
                max as libc::c_uint,
                libc::MSG_DONTWAIT as _,
                std::ptr::null_mut(),
            )
        })? as usize;
        for (header, address) in self.headers[..count].iter().zip(&self.addresses) {
            self.received.push(read(header, address));
        }
        Ok(count)
    }

    /// What the last [`ReceiveBatch::receive`] brought, in order.
    pub fn trains(&self) -> impl Iterator<Item = Train<'_>> {
        self.received.iter().zip(self.buffers.chunks_exact(self.slot)).map(|(message, slot)| Train {
            from: &message.from,
            bytes: &slot[..message.length],
            segment: message.segment,
        })
    }
}

impl Default for ReceiveBatch {
    fn default() -> Self {
        Self::new()
    }
}

// What the kernel overwrites in a header that it fills.
fn put_right(header: &mut libc::mmsghdr) {
    header.msg_hdr.msg_namelen = address::SIZE;
    header.msg_hdr.msg_controllen = size_of::<Control>() as _;
    header.msg_hdr.msg_flags = 0;
}

fn read(header: &libc::mmsghdr, address: &Storage) -> Message {
    // What cannot be answered or was cut, or has lost the word on where its datagrams end, keeps its place, with a
    // length that no message has.
    let whole = header.msg_hdr.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) == 0;
    let remote = if header.msg_hdr.msg_namelen == 0 { None } else { address::take(address) };
    let length = if whole && remote.is_some() { header.msg_len as usize } else { 0 };
    let remote = remote.unwrap_or(SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0)));
    let control = control::take(&header.msg_hdr);
    Message {
        from: Endpoint { remote, local: control.local },
        length,
        segment: segment(control.segment, length),
    }
}

fn segment(told: Option<libc::c_int>, length: usize) -> usize {
    let told = told.and_then(|told| usize::try_from(told).ok()).filter(|told| (1..=length).contains(told));
    told.unwrap_or(length.max(1))
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_segment_size_that_cannot_be_leaves_one_datagram() {
        for (told, length, expected) in [
            (None, 0, 1),
            (None, 9, 9),
            (Some(3), 9, 3),
            (Some(9), 9, 9),
            (Some(10), 9, 9),
            (Some(0), 9, 9),
            (Some(-1), 9, 9),
            (Some(libc::c_int::MIN), 0, 1),
            (Some(3), 0, 1),
        ] {
            assert_eq!(segment(told, length), expected, "{told:?} of {length}");
        }
    }

    #[test]
    fn a_message_that_was_cut_is_an_empty_train_and_the_slot_is_whole_again_after_it() {
        let receiver = UdpSocket::bind("127.0.0.1:0").unwrap();
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        sender.connect(receiver.local_addr().unwrap()).unwrap();
        let mut batch = ReceiveBatch::with_slots(3, 100);
        let from = Endpoint::from(sender.local_addr().unwrap());
        for _ in 0..2 {
            for length in [100, 101, 0, 7] {
                sender.send(&vec![length as u8; length]).unwrap();
            }
            let mut lengths = Vec::new();
            while let Ok(count) = batch.receive(receiver.as_fd(), 2) {
                assert_eq!(count, batch.trains().count());
                assert!(count <= 2);
                lengths.extend(batch.trains().map(|train| (*train.from, train.bytes.len())));
            }
            assert_eq!(lengths, [(from, 100), (from, 0), (from, 0), (from, 7)]);
            assert_eq!(batch.trains().count(), 0, "nothing is told twice");
        }
    }

    #[test]
    fn a_message_without_its_control_data_is_an_empty_train() {
        // SAFETY: an all-zero mmsghdr is valid and has no control data.
        let mut header: libc::mmsghdr = unsafe { std::mem::zeroed() };
        let mut address = address::zeroed();
        let remote: SocketAddr = "192.0.2.1:5".parse().unwrap();
        (header.msg_hdr.msg_namelen, header.msg_len) = (address::put(&mut address, &remote), 10);
        assert_eq!(read(&header, &address).length, 10);
        header.msg_hdr.msg_flags = libc::MSG_CTRUNC;
        assert_eq!(read(&header, &address).length, 0);
        (header.msg_hdr.msg_flags, header.msg_hdr.msg_namelen) = (0, 0);
        assert_eq!(read(&header, &address).length, 0);
    }
}
