//! Socket addresses as the system calls want them.
#![allow(unsafe_code)]

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};

pub(super) fn zeroed_storage() -> libc::sockaddr_storage {
    // SAFETY: an all-zero sockaddr_storage is valid.
    unsafe { std::mem::zeroed() }
}

pub(super) fn to_storage(address: &SocketAddr) -> (libc::sockaddr_storage, libc::socklen_t) {
    let mut storage = zeroed_storage();
    // SAFETY: sockaddr_storage is large enough and aligned for both kinds of address.
    let length = unsafe {
        match address {
            SocketAddr::V4(v4) => {
                let target: *mut libc::sockaddr_in = (&raw mut storage).cast();
                (*target).sin_family = libc::AF_INET as libc::sa_family_t;
                (*target).sin_port = v4.port().to_be();
                (*target).sin_addr.s_addr = u32::from_ne_bytes(v4.ip().octets());
                size_of::<libc::sockaddr_in>()
            }
            SocketAddr::V6(v6) => {
                let target: *mut libc::sockaddr_in6 = (&raw mut storage).cast();
                (*target).sin6_family = libc::AF_INET6 as libc::sa_family_t;
                (*target).sin6_port = v6.port().to_be();
                (*target).sin6_addr.s6_addr = v6.ip().octets();
                (*target).sin6_scope_id = v6.scope_id();
                size_of::<libc::sockaddr_in6>()
            }
        }
    };
    (storage, length as libc::socklen_t)
}

pub(super) fn from_storage(storage: &libc::sockaddr_storage) -> Option<SocketAddr> {
    // SAFETY: the family says which kind of address the storage, large enough for both, holds.
    unsafe {
        match libc::c_int::from(storage.ss_family) {
            libc::AF_INET => {
                let source: *const libc::sockaddr_in = std::ptr::from_ref(storage).cast();
                let ip = Ipv4Addr::from((*source).sin_addr.s_addr.to_ne_bytes());
                Some(SocketAddrV4::new(ip, u16::from_be((*source).sin_port)).into())
            }
            libc::AF_INET6 => {
                let source: *const libc::sockaddr_in6 = std::ptr::from_ref(storage).cast();
                let ip = Ipv6Addr::from((*source).sin6_addr.s6_addr);
                // Only link-local addresses depend on the interface; elsewhere a scope would look like roaming.
                let scope = if ip.is_unicast_link_local() { (*source).sin6_scope_id } else { 0 };
                Some(SocketAddrV6::new(ip, u16::from_be((*source).sin6_port), 0, scope).into())
            }
            _ => None,
        }
    }
}
