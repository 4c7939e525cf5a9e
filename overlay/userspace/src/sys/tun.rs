//! The TUN device and what the kernel says about its link.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use super::check;
use crate::features::Features;
use crate::name::InterfaceName;
use crate::offload::virtio::VIRTIO_HEADER;

// RTMGRP_LINK, RTMGRP_IPV4_ROUTE, RTMGRP_IPV6_ROUTE (linux/rtnetlink.h)
const NETLINK_EVENTS: u32 = 0x1 | 0x40 | 0x400;

/// Why there is no TUN device.
#[derive(Debug, thiserror::Error)]
pub enum TunError {
    /// The kernel has no TUN support, or we may not use it.
    #[error("cannot open /dev/net/tun: {0}; load the tun module and run with CAP_NET_ADMIN")]
    Open(io::Error),
    /// There is such a link, and it is of another kind or attached to another process.
    #[error(
        "a link named {name} exists and cannot be attached to: {source}; delete it or choose another name"
    )]
    Taken {
        /// The link.
        name: InterfaceName,
        /// The system's answer.
        source: io::Error,
    },
    /// The kernel refuses.
    #[error("cannot create the TUN device {name}: {source}")]
    Create {
        /// The link.
        name: InterfaceName,
        /// The system's answer.
        source: io::Error,
    },
}

/// A TUN device; each read is one IP packet, and each write.
///
/// With [`Features::tun_tso`] each begins with [`VIRTIO_HEADER`] more bytes, and the packet behind them can be a super-packet
/// of up to 65,535 bytes or, for IPv6, 40 more.
#[derive(Debug)]
pub struct Tun {
    file: File,
    created: bool,
    features: Features,
}

/// What the device has to know of its link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its MTU in bytes; unknown while it is in another network namespace.
    pub mtu: Option<usize>,
    /// Whether it is administratively up.
    pub up: bool,
}

impl Tun {
    /// Attaches to the link of this name, creating it if there is none, with those of `tun-tso` and `tun-uso` that are
    /// wanted and that the kernel has.
    pub fn open(name: &InterfaceName, wanted: Features) -> Result<Self, TunError> {
        let existed = interface_index(name.as_str()).is_some();
        if wanted.tun_tso
            && let Ok(file) = attach(name, existed, libc::IFF_VNET_HDR)
            && set_header(&file).is_ok()
            && let Some(features) = negotiate(wanted, |offloads| set_offloads(&file, offloads))
        {
            return Ok(Self { file, created: !existed, features });
        }
        let file = attach(name, existed, 0)?;
        // A link that lives on without its process keeps what that had asked for.
        set_offloads(&file, 0).map_err(|source| TunError::Create { name: name.clone(), source })?;
        Ok(Self { file, created: !existed, features: Features::NONE })
    }

    /// Which of `tun-tso` and `tun-uso` are in force.
    pub fn features(&self) -> Features {
        self.features
    }

    /// Whether the link did not exist before.
    pub fn is_new(&self) -> bool {
        self.created
    }

    /// Reads one packet, cut to the buffer's length; `WouldBlock` when there is none.
    #[inline]
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        (&self.file).read(buffer)
    }

    /// Writes one packet.
    #[inline]
    pub fn write(&self, packet: &[u8]) -> io::Result<usize> {
        (&self.file).write(packet)
    }

    /// Whether the link is up, wherever it is. The driver looks at the IP version and then at the link
    /// (`tun_get_user`, drivers/net/tun.c); where that is up, IP drops a packet that has nothing but a version.
    fn probe(&self) -> io::Result<bool> {
        const PACKET: [u8; VIRTIO_HEADER + 1] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4 << 4];
        let header = if self.features.tun_tso { VIRTIO_HEADER } else { 0 };
        match self.write(&PACKET[VIRTIO_HEADER - header..]) {
            Ok(_) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::EIO) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// For watching.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// The link's name now; links can be renamed.
    fn name(&self) -> io::Result<String> {
        let mut request = request("");
        // SAFETY: the request is a valid ifreq that outlives the call.
        check(unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNGETIFF as _, &raw mut request) })?;
        // SAFETY: the kernel ends the name with a NUL within the array.
        let name = unsafe { CStr::from_ptr(request.ifr_name.as_ptr()) };
        Ok(name.to_string_lossy().into_owned())
    }
}

fn attach(name: &InterfaceName, existed: bool, flags: libc::c_int) -> Result<File, TunError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")
        .map_err(TunError::Open)?;
    let mut request = request(name.as_str());
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI | flags) as libc::c_short;
    // SAFETY: the request is a valid ifreq that outlives the call.
    match check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) }) {
        Ok(_) => Ok(file),
        Err(source) if existed => Err(TunError::Taken { name: name.clone(), source }),
        Err(source) => Err(TunError::Create { name: name.clone(), source }),
    }
}

// A link that existed may have been left with another header.
fn set_header(file: &File) -> io::Result<()> {
    let length = VIRTIO_HEADER as libc::c_int;
    let little_endian = libc::c_int::from(cfg!(target_endian = "little"));
    // SAFETY: both calls read one int, which outlives them.
    unsafe {
        check(libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ as _, &raw const length))?;
        check(libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETLE as _, &raw const little_endian))?;
    }
    Ok(())
}

fn set_offloads(file: &File, offloads: libc::c_uint) -> io::Result<()> {
    // SAFETY: the call takes a number and no pointer.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD as _, libc::c_ulong::from(offloads)) })?;
    Ok(())
}

/// Asks for as much as is wanted and the kernel has; none if that is nothing.
fn negotiate(
    wanted: Features,
    mut set_offloads: impl FnMut(libc::c_uint) -> io::Result<()>,
) -> Option<Features> {
    const TSO: libc::c_uint = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6;
    const USO: libc::c_uint = libc::TUN_F_USO4 | libc::TUN_F_USO6;
    let tso = Features { tun_tso: true, ..Features::NONE };
    if wanted.tun_tso && wanted.tun_uso && set_offloads(TSO | USO).is_ok() {
        return Some(Features { tun_uso: true, ..tso });
    }
    // The kernel takes all of what it is asked for or nothing, and UDP only since 6.2.
    (wanted.tun_tso && set_offloads(TSO).is_ok()).then_some(tso)
}

/// Asks about and listens to links in this network namespace.
#[derive(Debug)]
pub struct LinkWatch {
    query: OwnedFd,
    events: File,
}

impl LinkWatch {
    /// Begins to listen.
    pub fn new() -> io::Result<Self> {
        // SAFETY: takes no pointers; the returned descriptors are ours alone.
        let (query, events) = unsafe {
            let query = OwnedFd::from_raw_fd(check(libc::socket(
                libc::AF_INET,
                libc::SOCK_DGRAM | libc::SOCK_CLOEXEC,
                0,
            ))?);
            let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
            let events =
                OwnedFd::from_raw_fd(check(libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_ROUTE))?);
            (query, events)
        };
        // SAFETY: an all-zero sockaddr_nl is valid; it outlives the call, which is told its size.
        unsafe {
            let mut address: libc::sockaddr_nl = std::mem::zeroed();
            address.nl_family = libc::AF_NETLINK as libc::sa_family_t;
            address.nl_groups = NETLINK_EVENTS;
            check(libc::bind(
                events.as_raw_fd(),
                (&raw const address).cast(),
                size_of::<libc::sockaddr_nl>() as libc::socklen_t,
            ))?;
        }
        Ok(Self { query, events: events.into() })
    }

    /// For watching: readable means that some link or route has changed.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }

    /// Forgets pending events; their content does not matter, since [`LinkWatch::link`] asks for the whole.
    pub fn drain(&self) {
        let mut scratch = [0u8; 4096];
        loop {
            match (&self.events).read(&mut scratch) {
                Ok(0) => break,
                Ok(_) => {}
                // Events were lost; the next question makes up for it.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(_) => break,
            }
        }
    }

    /// The state of a TUN device's link; an error when it is gone.
    pub fn link(&self, tun: &Tun) -> io::Result<Link> {
        // A link that was moved to another network namespace is not known here by its name.
        self.ask(tun).or_else(|_| Ok(Link { mtu: None, up: tun.probe()? }))
    }

    fn ask(&self, tun: &Tun) -> io::Result<Link> {
        let mut request = request(&tun.name()?);
        // SAFETY: the request is a valid ifreq that outlives the calls, and each call fills the field read after.
        unsafe {
            check(libc::ioctl(self.query.as_raw_fd(), libc::SIOCGIFMTU as _, &raw mut request))?;
            let mtu = Some(request.ifr_ifru.ifru_mtu.max(0) as usize);
            check(libc::ioctl(self.query.as_raw_fd(), libc::SIOCGIFFLAGS as _, &raw mut request))?;
            let up = i32::from(request.ifr_ifru.ifru_flags) & libc::IFF_UP != 0;
            Ok(Link { mtu, up })
        }
    }

    /// Sets the link's MTU in bytes.
    pub fn set_mtu(&self, tun: &Tun, mtu: u16) -> io::Result<()> {
        let mut request = request(&tun.name()?);
        request.ifr_ifru.ifru_mtu = mtu.into();
        // SAFETY: the request is a valid ifreq that outlives the call.
        check(unsafe { libc::ioctl(self.query.as_raw_fd(), libc::SIOCSIFMTU as _, &raw mut request) })?;
        Ok(())
    }
}

/// The index of an interface in this network namespace.
pub fn interface_index(name: &str) -> Option<u32> {
    let name = CString::new(name).ok()?;
    // SAFETY: the name is a NUL-terminated string.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    (index != 0).then_some(index)
}

fn request(name: &str) -> libc::ifreq {
    // SAFETY: an all-zero ifreq is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays zero: the name must be terminated.
    let room = request.ifr_name.len() - 1;
    for (target, byte) in request.ifr_name[..room].iter_mut().zip(name.bytes()) {
        *target = byte as libc::c_char;
    }
    request
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_lacks_is_asked_for_no_more() {
        let features = |list| Features { udp_gso: false, udp_gro: false, ..Features::without(list).unwrap() };
        let (all, tso) = (features(""), features("tun-uso"));
        // The offloads that a kernel has, what is wanted of it, what comes of it, and in how many questions.
        for (has, wanted, expected, questions) in [
            (0x7f, Features::ALL, Some(all), 1),
            (0x1f, Features::ALL, Some(tso), 2),
            (0x01, Features::ALL, None, 2),
            (0x7f, tso, Some(tso), 1),
            (0x00, tso, None, 1),
            (0x7f, Features::NONE, None, 0),
            (0x7f, Features { tun_uso: true, ..Features::NONE }, None, 0),
        ] {
            let mut asked = 0;
            let found = negotiate(wanted, |offloads| {
                asked += 1;
                if offloads & !has == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EINVAL)) }
            });
            assert_eq!((found, asked), (expected, questions), "{wanted} of {has:#x}");
        }
    }
}
