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

/// A TUN device; each read is one IP packet, and each write. With `tun-tso` a virtio header goes before it, and it may
/// be a super-packet.
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
    /// Attaches to the link of this name, creating it if there is none. Of the features wanted it uses those that
    /// the kernel has.
    pub fn open(name: &InterfaceName, wanted: Features) -> Result<Self, TunError> {
        let existed = interface_index(name.as_str()).is_some();
        let attach = |virtio| {
            attach(name, virtio).map_err(|error| match error {
                AttachError::Open(source) => TunError::Open(source),
                AttachError::Attach(source) if existed => TunError::Taken { name: name.clone(), source },
                AttachError::Attach(source) => TunError::Create { name: name.clone(), source },
            })
        };
        let file = attach(wanted.tun_tso)?;
        let mut features = Features { tun_uso: false, tun_tso: false, ..wanted };
        if wanted.tun_tso {
            let tso = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6;
            let uso = libc::TUN_F_USO4 | libc::TUN_F_USO6;
            if wanted.tun_uso && set_offload(&file, tso | uso).is_ok() {
                (features.tun_tso, features.tun_uso) = (true, true);
            } else if set_offload(&file, tso).is_ok() {
                features.tun_tso = true;
            }
            if !features.tun_tso {
                // Without the offloads the header before each packet would be for nothing.
                drop(file);
                return Ok(Self { file: attach(false)?, created: !existed, features });
            }
        }
        Ok(Self { file, created: !existed, features })
    }

    /// What is in force; what concerns UDP sockets is as it was wanted.
    pub fn features(&self) -> Features {
        self.features
    }

    /// Whether the link did not exist before.
    pub fn is_new(&self) -> bool {
        self.created
    }

    /// Reads one packet; `WouldBlock` when there is none.
    #[inline]
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        (&self.file).read(buffer)
    }

    /// Writes one packet.
    #[inline]
    pub fn write(&self, packet: &[u8]) -> io::Result<usize> {
        (&self.file).write(packet)
    }

    /// Whether the link is up, wherever it is: the driver looks at the link before it looks at the packet, and
    /// no packet is empty.
    fn probe(&self) -> io::Result<bool> {
        match (&self.file).write(&[]) {
            Ok(0..) => Ok(true),
            Err(error) => match error.raw_os_error() {
                Some(libc::EINVAL) => Ok(true),
                Some(libc::EIO) => Ok(false),
                _ => Err(error),
            },
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

enum AttachError {
    Open(io::Error),
    Attach(io::Error),
}

fn attach(name: &InterfaceName, virtio: bool) -> Result<File, AttachError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")
        .map_err(AttachError::Open)?;
    let mut request = request(name.as_str());
    let header = if virtio { libc::IFF_VNET_HDR } else { 0 };
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI | header) as libc::c_short;
    // SAFETY: the request is a valid ifreq that outlives the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) })
        .map_err(AttachError::Attach)?;
    if virtio {
        let size = VIRTIO_HEADER as libc::c_int;
        // SAFETY: the size outlives the call, which reads an int.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ as _, &raw const size) })
            .map_err(AttachError::Attach)?;
    }
    // A device that persists keeps what the last process asked for.
    let _ = set_offload(&file, 0);
    Ok(file)
}

fn set_offload(file: &File, offload: libc::c_uint) -> io::Result<()> {
    // SAFETY: takes no pointer.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD as _, libc::c_ulong::from(offload)) })?;
    Ok(())
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
