//! The system calls. Nothing outside these files is unsafe.

pub mod checksum;
pub mod daemon;
pub mod event;
pub mod tun;
pub mod udp;

use std::io;

/// Turns the `-1` of a system call into the error it stands for.
fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
