use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::sys;

/// A TUN link of the calling thread's network namespace: what is sent here comes into the namespace by the link, and what the
/// namespace sends out of the link is received here. The link is gone with it.
#[derive(Debug)]
pub struct Tun {
    file: File,
}

impl Tun {
    /// Makes the link; it is down.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn open(name: &str) -> io::Result<Self> {
        Ok(Self { file: sys::open_tun(name)? })
    }

    /// Sends one IP packet into the namespace. It has gone as far as it goes when this returns, unless it waits in a queue.
    ///
    /// # Errors
    /// What the kernel says; `EIO` while the link is down.
    pub fn send(&self, packet: &[u8]) -> io::Result<()> {
        (&self.file).write(packet).map(drop)
    }

    /// Receives one IP packet; `None`: there was none until the deadline.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn receive(&self, buffer: &mut [u8], deadline: Instant) -> io::Result<Option<usize>> {
        loop {
            match (&self.file).read(buffer) {
                Ok(length) => return Ok(Some(length)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            let timeout =
                PollTimeout::try_from(left.max(Duration::from_millis(1))).unwrap_or(PollTimeout::MAX);
            poll(&mut [PollFd::new(self.file.as_fd(), PollFlags::POLLIN)], timeout)?;
        }
    }
}

impl AsFd for Tun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
