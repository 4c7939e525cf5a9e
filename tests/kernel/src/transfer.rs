//! Bytes over TCP whose digest the receiver sends back.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::ensure;
use sha2::{Digest as _, Sha256};

/// Begins each block that is sent: what must not be seen between the nodes.
pub const MARKER: &str = "sennit kernel test in clear";
/// Bytes of a digest.
const DIGEST: usize = 32;
/// Without a byte for so long a connection is given up.
const SILENCE: Duration = Duration::from_secs(60);

/// Takes one connection and answers with the digest of all that came. Returns how many bytes came.
///
/// # Errors
/// What the socket says.
pub fn receive(listener: &TcpListener) -> std::io::Result<u64> {
    let (mut stream, _) = listener.accept()?;
    stream.set_read_timeout(Some(SILENCE))?;
    let (mut digest, mut buffer, mut count) = (Sha256::new(), vec![0; 64 << 10], 0);
    loop {
        let length = stream.read(&mut buffer)?;
        if length == 0 {
            break;
        }
        digest.update(&buffer[..length]);
        count += length as u64;
    }
    stream.write_all(&digest.finalize())?;
    Ok(count)
}

/// Sends that many bytes; how long it took until the right digest came back. Tries to connect until `deadline` passed.
///
/// # Errors
/// What the socket says; another digest.
pub fn send(to: SocketAddr, bytes: usize, deadline: Duration) -> anyhow::Result<Duration> {
    let until = Instant::now() + deadline;
    let mut stream = loop {
        match TcpStream::connect_timeout(&to, deadline) {
            Ok(stream) => break stream,
            Err(error) if Instant::now() >= until => return Err(error.into()),
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    };
    stream.set_read_timeout(Some(SILENCE))?;
    stream.set_write_timeout(Some(SILENCE))?;
    let begun = Instant::now();
    let (mut digest, mut left, mut number) = (Sha256::new(), bytes, 0_u64);
    while left > 0 {
        let mut block = format!("{MARKER} {number:016x} ").repeat(256).into_bytes();
        block.truncate(left);
        digest.update(&block);
        stream.write_all(&block)?;
        left -= block.len();
        number += 1;
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut answer = [0; DIGEST];
    stream.read_exact(&mut answer)?;
    ensure!(answer == *digest.finalize(), "the receiver's digest is another");
    Ok(begun.elapsed())
}
