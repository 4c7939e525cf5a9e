//! System calls that nix does not wrap. The only unsafe code of the crate.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt as _;

use nix::unistd::{ForkResult, Pid};

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Forks a child that is pid 1 of the PID namespace unshared by the calling thread just before. The child
/// reaps orphans, keeps nothing open but `lifeline`, and ends when the calling thread ends or the other end
/// of `lifeline` (a pipe) closes.
pub(crate) fn fork_init(lifeline: BorrowedFd<'_>) -> io::Result<Pid> {
    let lifeline = lifeline.as_raw_fd();
    // SAFETY: the child of this possibly multi-threaded process makes only async-signal-safe system calls
    // (see `init_main`), allocates nothing and never returns.
    match unsafe { nix::unistd::fork() }.map_err(io::Error::from)? {
        ForkResult::Parent { child } => Ok(child),
        ForkResult::Child => init_main(lifeline),
    }
}

fn init_main(lifeline: RawFd) -> ! {
    // SAFETY: plain system calls with valid arguments; `byte` outlives the read; descriptors closed here are
    // used by nobody in this process any more.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        libc::prctl(libc::PR_SET_NAME, c"netlab-init".as_ptr());
        // Ignored SIGCHLD makes the kernel reap the orphans that init inherits.
        libc::signal(libc::SIGCHLD, libc::SIG_IGN);
        for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT] {
            libc::signal(signal, libc::SIG_IGN);
        }
        libc::setpgid(0, 0);
        libc::chdir(c"/".as_ptr());
        let fd = lifeline as libc::c_uint;
        if fd > 0 {
            libc::syscall(libc::SYS_close_range, 0, fd - 1, 0);
        }
        libc::syscall(libc::SYS_close_range, fd + 1, libc::c_uint::MAX, 0);
        let mut byte = 0u8;
        loop {
            let n = libc::read(lifeline, (&raw mut byte).cast(), 1);
            if n == 0 || (n < 0 && *libc::__errno_location() != libc::EINTR) {
                libc::_exit(0);
            }
        }
    }
}

/// Whether a new user namespace could be made: tried in a child, so that nothing changes here.
pub(crate) fn try_user_namespace() -> io::Result<()> {
    // SAFETY: the child makes two async-signal-safe calls and ends.
    let child = match unsafe { nix::unistd::fork() }.map_err(io::Error::from)? {
        ForkResult::Parent { child } => child,
        ForkResult::Child => unsafe {
            let failed = libc::unshare(libc::CLONE_NEWUSER) != 0;
            libc::_exit(if failed { *libc::__errno_location() } else { 0 })
        },
    };
    match nix::sys::wait::waitpid(child, None).map_err(io::Error::from)? {
        nix::sys::wait::WaitStatus::Exited(_, 0) => Ok(()),
        nix::sys::wait::WaitStatus::Exited(_, errno) => Err(io::Error::from_raw_os_error(errno)),
        other => Err(io::Error::other(format!("{other:?}"))),
    }
}

/// A descriptor that becomes readable when the process ends (pidfd_open(2)).
pub(crate) fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers; a non-negative result is a new descriptor that nobody else owns.
    unsafe {
        let fd = libc::syscall(libc::SYS_pidfd_open, pid as libc::pid_t, 0);
        check(fd as libc::c_int).map(|fd| OwnedFd::from_raw_fd(fd))
    }
}

/// A non-blocking packet socket bound to an interface of the calling thread's network namespace, for all
/// protocols, with kernel timestamps. Also says the interface's hardware type (`ARPHRD_*`).
pub(crate) fn packet_socket(ifindex: u32, buffer: usize) -> io::Result<(OwnedFd, u16)> {
    let all = (libc::ETH_P_ALL as u16).to_be();
    // SAFETY: every pointer is to a live local of the size passed along; the descriptor is owned from the
    // moment it exists. Protocol 0 first, so that no frame of another interface slips in before the bind.
    unsafe {
        let fd = check(libc::socket(
            libc::AF_PACKET,
            libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
            0,
        ))?;
        let fd = OwnedFd::from_raw_fd(fd);
        set_int(fd.as_fd(), libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, buffer as libc::c_int)
            .or_else(|_| set_int(fd.as_fd(), libc::SOL_SOCKET, libc::SO_RCVBUF, buffer as libc::c_int))?;
        set_int(fd.as_fd(), libc::SOL_SOCKET, libc::SO_TIMESTAMPNS, 1)?;
        let mut address: libc::sockaddr_ll = zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = all;
        address.sll_ifindex = ifindex as libc::c_int;
        let mut length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        check(libc::bind(fd.as_raw_fd(), (&raw const address).cast(), length))?;
        check(libc::getsockname(fd.as_raw_fd(), (&raw mut address).cast(), &raw mut length))?;
        Ok((fd, address.sll_hatype))
    }
}

/// A TUN link of the calling thread's network namespace, without packet information, non-blocking.
pub(crate) fn open_tun(name: &str) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")?;
    // SAFETY: the request is a valid ifreq that outlives the call, and its name ends with a NUL.
    unsafe {
        let mut request: libc::ifreq = zeroed();
        if name.len() >= request.ifr_name.len() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
        check(libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request))?;
    }
    Ok(file)
}

/// Frames that the kernel dropped for this packet socket since the last call.
pub(crate) fn packet_drops(fd: BorrowedFd<'_>) -> io::Result<u64> {
    // SAFETY: `statistics` is a live local of the size passed along.
    unsafe {
        let mut statistics: libc::tpacket_stats = zeroed();
        let mut length = size_of::<libc::tpacket_stats>() as libc::socklen_t;
        check(libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_STATISTICS,
            (&raw mut statistics).cast(),
            &raw mut length,
        ))?;
        Ok(u64::from(statistics.tp_drops))
    }
}

/// Sets DF on what the socket sends and ignores what is known of the path MTU (`IP_PMTUDISC_PROBE`).
pub(crate) fn set_dont_fragment(fd: BorrowedFd<'_>, v6: bool) -> io::Result<()> {
    if v6 {
        set_int(fd, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_PROBE)
    } else {
        set_int(fd, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_PROBE)
    }
}

fn set_int(
    fd: BorrowedFd<'_>,
    level: libc::c_int,
    option: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    // SAFETY: `value` is a live local of the size passed along.
    unsafe {
        check(libc::setsockopt(
            fd.as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        ))
        .map(drop)
    }
}
