//! Waiting: epoll, eventfd, signalfd.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use super::check;

/// An epoll instance, level-triggered, for reading.
#[derive(Debug)]
pub struct Poll {
    fd: OwnedFd,
}

impl Poll {
    /// A new instance that watches nothing.
    pub fn new() -> io::Result<Self> {
        // SAFETY: takes no pointers; the returned descriptor is ours alone.
        let fd = unsafe { OwnedFd::from_raw_fd(check(libc::epoll_create1(libc::EPOLL_CLOEXEC))?) };
        Ok(Self { fd })
    }

    /// Watches a descriptor; `token` names it in the results of [`Poll::wait`]. Closing it ends the watch. What
    /// is watched already stays so, under its first token.
    pub fn watch(&self, fd: BorrowedFd<'_>, token: u64) -> io::Result<()> {
        let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: token };
        // SAFETY: both descriptors are open and the event outlives the call.
        let added = check(unsafe {
            libc::epoll_ctl(self.fd.as_raw_fd(), libc::EPOLL_CTL_ADD, fd.as_raw_fd(), &raw mut event)
        });
        match added {
            Err(error) if error.raw_os_error() != Some(libc::EEXIST) => Err(error),
            _ => Ok(()),
        }
    }

    /// Ends the watch of a descriptor that stays open.
    pub fn unwatch(&self, fd: BorrowedFd<'_>) {
        // SAFETY: both descriptors are open; removal takes no event. It can only fail when there is no watch.
        unsafe {
            libc::epoll_ctl(self.fd.as_raw_fd(), libc::EPOLL_CTL_DEL, fd.as_raw_fd(), std::ptr::null_mut())
        };
    }

    /// Waits until something is readable or `timeout` is over, and calls `ready` with each token.
    pub fn wait(&self, timeout: Duration, mut ready: impl FnMut(u64)) -> io::Result<()> {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; 8];
        let milliseconds = timeout.as_micros().div_ceil(1000).try_into().unwrap_or(libc::c_int::MAX);
        // SAFETY: the array holds as many events as the call is told.
        let count = unsafe {
            libc::epoll_wait(
                self.fd.as_raw_fd(),
                events.as_mut_ptr(),
                events.len() as libc::c_int,
                milliseconds,
            )
        };
        match check(count) {
            Ok(count) => {
                for event in &events[..count as usize] {
                    ready(event.u64);
                }
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// Wakes a [`Poll`] from another thread.
#[derive(Debug)]
pub struct Waker {
    file: File,
}

impl Waker {
    /// A waker that is not set.
    pub fn new() -> io::Result<Self> {
        // SAFETY: takes no pointers; the returned descriptor is ours alone.
        let fd =
            unsafe { OwnedFd::from_raw_fd(check(libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK))?) };
        Ok(Self { file: fd.into() })
    }

    /// Sets it: whoever watches it wakes up.
    pub fn wake(&self) {
        // It can only fail when it is set already.
        let _ = (&self.file).write(&1u64.to_ne_bytes());
    }

    /// Resets it.
    pub fn reset(&self) {
        let _ = (&self.file).read(&mut [0u8; 8]);
    }

    /// For watching.
    pub fn fd(&self) -> BorrowedFd<'_> {
        std::os::fd::AsFd::as_fd(&self.file)
    }
}

/// SIGTERM, SIGINT and SIGHUP as something to wait for.
#[derive(Debug)]
pub struct Signals {
    fd: OwnedFd,
}

impl Signals {
    /// Catches the signals from now on, in this thread and those it starts.
    pub fn catch() -> io::Result<Self> {
        // SAFETY: the set is initialised by sigemptyset before it is used and outlives the calls.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
                libc::sigaddset(&raw mut set, signal);
            }
            let blocked = libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
            if blocked != 0 {
                return Err(io::Error::from_raw_os_error(blocked));
            }
            let fd: RawFd =
                check(libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK))?;
            Ok(Self { fd: OwnedFd::from_raw_fd(fd) })
        }
    }

    /// The number of a signal that came and was not yet taken.
    pub fn take(&self) -> Option<u32> {
        // SAFETY: an all-zero signalfd_siginfo is valid, and the call is told its size.
        unsafe {
            let mut info: libc::signalfd_siginfo = std::mem::zeroed();
            let size = size_of::<libc::signalfd_siginfo>();
            let length = libc::read(self.fd.as_raw_fd(), (&raw mut info).cast(), size);
            (length == size as isize).then_some(info.ssi_signo)
        }
    }

    /// For watching: readable means that a signal came.
    pub fn fd(&self) -> BorrowedFd<'_> {
        std::os::fd::AsFd::as_fd(&self.fd)
    }
}
