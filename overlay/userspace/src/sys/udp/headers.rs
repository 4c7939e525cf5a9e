//! Message headers with their control messages: which address of ours, and how long each datagram of a run.
#![allow(unsafe_code)]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::BATCH;
use super::address::zeroed_storage;

// Room for an in6_pktinfo and an int with their headers, aligned as cmsghdr wants them.
const CONTROL_WORDS: usize = 12;

type Control = [u64; CONTROL_WORDS];

// What the system calls want around the buffers, so that none of it is zeroed per call.
pub(super) struct Headers {
    pub(super) addresses: Box<[libc::sockaddr_storage]>,
    controls: Box<[Control]>,
    vectors: Box<[libc::iovec]>,
    pub(super) headers: Box<[libc::mmsghdr]>,
}

impl Headers {
    pub(super) fn new() -> Self {
        // SAFETY: all-zero iovec and mmsghdr are valid.
        let (vector, header): (libc::iovec, libc::mmsghdr) =
            unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
        Self {
            addresses: vec![zeroed_storage(); BATCH].into(),
            controls: vec![[0; CONTROL_WORDS]; BATCH].into(),
            vectors: vec![vector; BATCH].into(),
            headers: vec![header; BATCH].into(),
        }
    }

    /// Points header `i` at a buffer, its address and its control space, and hands it out.
    pub(super) fn prepare(&mut self, i: usize, buffer: &mut [u8]) -> &mut libc::msghdr {
        self.vectors[i] = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
        let header = &mut self.headers[i].msg_hdr;
        header.msg_name = (&raw mut self.addresses[i]).cast();
        header.msg_namelen = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
        header.msg_iov = &raw mut self.vectors[i];
        header.msg_iovlen = 1;
        header.msg_control = (&raw mut self.controls[i]).cast();
        header.msg_controllen = size_of::<Control>() as _;
        header.msg_flags = 0;
        header
    }
}

/// What the kernel says of a message besides its bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Ancillary {
    /// The address of ours that it came to.
    pub(super) local: Option<IpAddr>,
    /// The length of each datagram of the run but for the last.
    pub(super) segment: Option<usize>,
}

/// Reads the control messages of a header that the kernel has filled.
pub(super) fn ancillary(header: &libc::msghdr) -> Ancillary {
    let mut found = Ancillary::default();
    // SAFETY: the header was filled by the kernel, so its control messages are well-formed; the type says what
    // is read, which may be unaligned.
    unsafe {
        let mut control = libc::CMSG_FIRSTHDR(header);
        while let Some(message) = control.as_ref() {
            let data = libc::CMSG_DATA(control);
            match (message.cmsg_level, message.cmsg_type) {
                (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                    let info: libc::in_pktinfo = data.cast::<libc::in_pktinfo>().read_unaligned();
                    let address = Ipv4Addr::from(info.ipi_spec_dst.s_addr.to_ne_bytes());
                    found.local = usable_source(address.into());
                }
                (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                    let info: libc::in6_pktinfo = data.cast::<libc::in6_pktinfo>().read_unaligned();
                    found.local = usable_source(Ipv6Addr::from(info.ipi6_addr.s6_addr).into());
                }
                (libc::SOL_UDP, libc::UDP_GRO) => {
                    let segment = data.cast::<libc::c_int>().read_unaligned();
                    found.segment = usize::try_from(segment).ok();
                }
                _ => {}
            }
            control = libc::CMSG_NXTHDR(header, control);
        }
    }
    found
}

// A datagram to a group has no address of ours to be answered from.
fn usable_source(address: IpAddr) -> Option<IpAddr> {
    (!address.is_multicast() && !address.is_unspecified()).then_some(address)
}

/// Writes control messages for a message of ours: the address to leave by, and the length of each datagram of a run.
pub(super) fn put_ancillary(header: &mut libc::msghdr, local: Option<IpAddr>, segment: Option<u16>) {
    // SAFETY: the control space is aligned and large enough for the larger address and the segment length together;
    // all-zero pktinfo structures are valid.
    unsafe {
        let mut control = libc::CMSG_FIRSTHDR(header);
        let mut used = 0;
        if let Some(local) = local {
            let length = match local {
                IpAddr::V4(v4) => {
                    let mut info: libc::in_pktinfo = std::mem::zeroed();
                    info.ipi_spec_dst.s_addr = u32::from_ne_bytes(v4.octets());
                    (*control).cmsg_level = libc::IPPROTO_IP;
                    (*control).cmsg_type = libc::IP_PKTINFO;
                    libc::CMSG_DATA(control).cast::<libc::in_pktinfo>().write_unaligned(info);
                    size_of::<libc::in_pktinfo>()
                }
                IpAddr::V6(v6) => {
                    let mut info: libc::in6_pktinfo = std::mem::zeroed();
                    info.ipi6_addr.s6_addr = v6.octets();
                    (*control).cmsg_level = libc::IPPROTO_IPV6;
                    (*control).cmsg_type = libc::IPV6_PKTINFO;
                    libc::CMSG_DATA(control).cast::<libc::in6_pktinfo>().write_unaligned(info);
                    size_of::<libc::in6_pktinfo>()
                }
            };
            (*control).cmsg_len = libc::CMSG_LEN(length as libc::c_uint) as _;
            used += libc::CMSG_SPACE(length as libc::c_uint) as usize;
            control = header.msg_control.cast::<u8>().add(used).cast();
        }
        if let Some(segment) = segment {
            (*control).cmsg_level = libc::SOL_UDP;
            (*control).cmsg_type = libc::UDP_SEGMENT;
            (*control).cmsg_len = libc::CMSG_LEN(size_of::<u16>() as libc::c_uint) as _;
            libc::CMSG_DATA(control).cast::<u16>().write_unaligned(segment);
            used += libc::CMSG_SPACE(size_of::<u16>() as libc::c_uint) as usize;
        }
        debug_assert!(used <= size_of::<Control>());
        header.msg_controllen = used as _;
        if used == 0 {
            header.msg_control = std::ptr::null_mut();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_leave_by_no_group_and_no_wildcard() {
        for address in ["224.0.0.1", "0.0.0.0", "ff02::1", "::"] {
            assert_eq!(usable_source(address.parse().unwrap()), None);
        }
        assert!(usable_source(Ipv4Addr::LOCALHOST.into()).is_some());
    }
}
