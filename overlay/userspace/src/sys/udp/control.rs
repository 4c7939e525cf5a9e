//! Control messages: by which of our addresses a datagram came or leaves, and how long the datagrams of a train are.
#![allow(unsafe_code)]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

const fn space_of<T>() -> usize {
    // SAFETY: plain arithmetic.
    unsafe { libc::CMSG_SPACE(size_of::<T>() as libc::c_uint) as usize }
}

// The largest that is sent or received: an IPv6 address and a segment size.
const BYTES: usize = space_of::<libc::in6_pktinfo>() + space_of::<libc::c_int>();

/// Room for the control messages of one message, aligned as `cmsghdr` wants it.
pub(super) type Control = [u64; BYTES.div_ceil(size_of::<u64>())];

/// What the control messages of a received message say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Received {
    /// Our address, where it is one that answers can leave by.
    pub(super) local: Option<IpAddr>,
    /// Bytes per datagram where the kernel has joined some; as it came, so perhaps nonsense.
    pub(super) segment: Option<libc::c_int>,
}

/// Reads the control messages of a message that the kernel filled in.
pub(super) fn take(header: &libc::msghdr) -> Received {
    let mut received = Received::default();
    // SAFETY: the header was filled by the kernel, so its control messages are well-formed; the type says what
    // is read, which may be unaligned.
    unsafe {
        let mut control = libc::CMSG_FIRSTHDR(header);
        while let Some(message) = control.as_ref() {
            let data = libc::CMSG_DATA(control);
            match (message.cmsg_level, message.cmsg_type) {
                (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                    let info = data.cast::<libc::in_pktinfo>().read_unaligned();
                    let address = Ipv4Addr::from(info.ipi_spec_dst.s_addr.to_ne_bytes());
                    received.local = usable_source(address.into());
                }
                (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                    let info = data.cast::<libc::in6_pktinfo>().read_unaligned();
                    received.local = usable_source(Ipv6Addr::from(info.ipi6_addr.s6_addr).into());
                }
                (libc::SOL_UDP, libc::UDP_GRO) => {
                    received.segment = Some(data.cast::<libc::c_int>().read_unaligned());
                }
                _ => {}
            }
            control = libc::CMSG_NXTHDR(header, control);
        }
    }
    received
}

/// Writes the address to leave by and the bytes per datagram, where given, and returns the length in bytes: 0 for
/// neither.
pub(super) fn put(control: &mut Control, local: Option<IpAddr>, segment: Option<u16>) -> usize {
    let mut at = 0;
    // SAFETY: all-zero pktinfo structures are valid.
    let (mut v4, mut v6): (libc::in_pktinfo, libc::in6_pktinfo) =
        unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
    match local {
        Some(IpAddr::V4(address)) => {
            v4.ipi_spec_dst.s_addr = u32::from_ne_bytes(address.octets());
            at += put_one(control, at, libc::IPPROTO_IP, libc::IP_PKTINFO, v4);
        }
        Some(IpAddr::V6(address)) => {
            v6.ipi6_addr.s6_addr = address.octets();
            at += put_one(control, at, libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, v6);
        }
        None => {}
    }
    if let Some(segment) = segment {
        at += put_one(control, at, libc::SOL_UDP, libc::UDP_SEGMENT, segment);
    }
    at
}

fn put_one<T>(control: &mut Control, at: usize, level: libc::c_int, kind: libc::c_int, value: T) -> usize {
    let space = space_of::<T>();
    assert!(at + space <= size_of::<Control>(), "there is room for what is ever put");
    let start: *mut u8 = control.as_mut_ptr().cast();
    // SAFETY: the message lies within the control space, as was just checked; each begins where the one before
    // ended, padded to the alignment of cmsghdr; the value is written unaligned.
    unsafe {
        let message: *mut libc::cmsghdr = start.add(at).cast();
        (*message).cmsg_level = level;
        (*message).cmsg_type = kind;
        (*message).cmsg_len = libc::CMSG_LEN(size_of::<T>() as libc::c_uint) as _;
        libc::CMSG_DATA(message).cast::<T>().write_unaligned(value);
    }
    space
}

// A datagram to a group has no address of ours to be answered from.
fn usable_source(address: IpAddr) -> Option<IpAddr> {
    (!address.is_multicast() && !address.is_unspecified()).then_some(address)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// What the control messages of a message to be sent say.
    pub(in super::super) fn sent(header: &libc::msghdr) -> (Option<IpAddr>, Option<u16>) {
        let mut segment = None;
        // SAFETY: the header is one that `put` filled.
        unsafe {
            let mut control = libc::CMSG_FIRSTHDR(header);
            while let Some(message) = control.as_ref() {
                if (message.cmsg_level, message.cmsg_type) == (libc::SOL_UDP, libc::UDP_SEGMENT) {
                    segment = Some(libc::CMSG_DATA(control).cast::<u16>().read_unaligned());
                }
                control = libc::CMSG_NXTHDR(header, control);
            }
        }
        (take(header).local, segment)
    }

    #[test]
    fn both_messages_fit_and_are_read_back() {
        let addresses = [None, Some(IpAddr::from([192, 0, 2, 1])), Some("2001:db8::1".parse().unwrap())];
        for (local, segment) in addresses.into_iter().flat_map(|a| [(a, None), (a, Some(1452))]) {
            let mut control = Control::default();
            let length = put(&mut control, local, segment);
            assert_eq!(length == 0, local.is_none() && segment.is_none());
            assert_eq!(sent(&header(&mut control, length)), (local, segment));
        }
    }

    fn header(control: &mut Control, length: usize) -> libc::msghdr {
        // SAFETY: an all-zero msghdr is valid.
        let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
        header.msg_control = control.as_mut_ptr().cast();
        header.msg_controllen = length as _;
        header
    }

    #[test]
    fn what_is_received_is_found_in_any_order_and_among_other_messages() {
        type Put = fn(&mut Control, usize) -> usize;
        let info: Put = |control, at| {
            // SAFETY: an all-zero in_pktinfo is valid.
            let mut info: libc::in_pktinfo = unsafe { std::mem::zeroed() };
            info.ipi_spec_dst.s_addr = u32::from_ne_bytes([192, 0, 2, 1]);
            put_one(control, at, libc::IPPROTO_IP, libc::IP_PKTINFO, info)
        };
        let gro: Put = |control, at| put_one(control, at, libc::SOL_UDP, libc::UDP_GRO, 1452 as libc::c_int);
        let other: Put = |control, at| put_one(control, at, libc::SOL_SOCKET, 77, 0u32);
        let both = Received { local: Some([192, 0, 2, 1].into()), segment: Some(1452) };
        let address = Received { segment: None, ..both };
        for (messages, expected) in [
            (vec![info, gro], both),
            (vec![gro, info], both),
            (vec![other, info], address),
            (vec![], Received::default()),
        ] {
            let mut control = Control::default();
            let length = messages.into_iter().fold(0, |at, put| at + put(&mut control, at));
            assert_eq!(take(&header(&mut control, length)), expected);
        }
    }

    #[test]
    fn answers_leave_by_no_group_and_no_wildcard() {
        for address in ["224.0.0.1", "0.0.0.0", "ff02::1", "::"] {
            assert_eq!(usable_source(address.parse().unwrap()), None);
        }
        assert!(usable_source(Ipv4Addr::LOCALHOST.into()).is_some());
    }
}
