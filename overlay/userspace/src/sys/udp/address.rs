//! Socket addresses as the system calls want them.
#![allow(unsafe_code)]

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};

/// An address of either family: the IPv6 kind is the larger one, and both begin with their family.
pub(super) type Storage = libc::sockaddr_in6;

pub(super) const SIZE: libc::socklen_t = size_of::<Storage>() as libc::socklen_t;

pub(super) fn zeroed() -> Storage {
    // SAFETY: an all-zero sockaddr_in6 is valid.
    unsafe { std::mem::zeroed() }
}

/// Writes an address and returns its length in bytes.
pub(super) fn put(storage: &mut Storage, address: &SocketAddr) -> libc::socklen_t {
    let length = match address {
        SocketAddr::V4(v4) => {
            let target: *mut libc::sockaddr_in = std::ptr::from_mut(storage).cast();
            let value = libc::sockaddr_in {
                sin_family: libc::AF_INET as libc::sa_family_t,
                sin_port: v4.port().to_be(),
                sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(v4.ip().octets()) },
                sin_zero: [0; 8],
            };
            // SAFETY: a sockaddr_in6 is larger than a sockaddr_in and aligned no less.
            unsafe { target.write(value) };
            size_of::<libc::sockaddr_in>()
        }
        SocketAddr::V6(v6) => {
            storage.sin6_family = libc::AF_INET6 as libc::sa_family_t;
            storage.sin6_port = v6.port().to_be();
            storage.sin6_flowinfo = 0;
            storage.sin6_addr.s6_addr = v6.ip().octets();
            storage.sin6_scope_id = v6.scope_id();
            size_of::<libc::sockaddr_in6>()
        }
    };
    length as libc::socklen_t
}

/// Reads an address that the kernel wrote; none if it is of another family.
pub(super) fn take(storage: &Storage) -> Option<SocketAddr> {
    match libc::c_int::from(storage.sin6_family) {
        libc::AF_INET => {
            // SAFETY: the family says that there is a sockaddr_in, for which there is room and alignment.
            let source = unsafe { &*std::ptr::from_ref(storage).cast::<libc::sockaddr_in>() };
            let ip = Ipv4Addr::from(source.sin_addr.s_addr.to_ne_bytes());
            Some(SocketAddrV4::new(ip, u16::from_be(source.sin_port)).into())
        }
        libc::AF_INET6 => {
            let ip = Ipv6Addr::from(storage.sin6_addr.s6_addr);
            // Only link-local addresses depend on the interface; elsewhere a scope would look like roaming.
            let scope = if ip.is_unicast_link_local() { storage.sin6_scope_id } else { 0 };
            Some(SocketAddrV6::new(ip, u16::from_be(storage.sin6_port), 0, scope).into())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_comes_back_as_it_was_put_whatever_was_there_before() {
        let mut storage = zeroed();
        for address in ["[fe80::1%7]:65535", "192.0.2.1:1", "[2001:db8::1]:51820", "[fe80::2]:2"] {
            let address: SocketAddr = address.parse().unwrap();
            assert!(put(&mut storage, &address) <= SIZE);
            assert_eq!(take(&storage), Some(address));
        }
        storage.sin6_family = 0;
        assert_eq!(take(&storage), None);
    }

    #[test]
    fn only_link_local_addresses_keep_their_scope() {
        let mut storage = zeroed();
        put(&mut storage, &"[2001:db8::1%3]:9".parse().unwrap());
        assert_eq!(take(&storage), Some("[2001:db8::1]:9".parse().unwrap()));
    }
}
