//! Asking a running device what wg(8) cannot ask.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use super::parse::MAX_LINE;
use crate::name::InterfaceName;

const ANSWER: Duration = Duration::from_secs(5);

/// What the device that serves `directory/interface.sock` uses of the kernel, as `name=value` lines.
pub fn ask_features(directory: &Path, interface: &InterfaceName) -> io::Result<String> {
    let mut stream = UnixStream::connect(directory.join(format!("{interface}.sock")))?;
    stream.set_read_timeout(Some(ANSWER))?;
    stream.set_write_timeout(Some(ANSWER))?;
    stream.write_all(b"features=1\n\n")?;
    let mut answer = Vec::new();
    let mut chunk = [0u8; MAX_LINE];
    while !answer.ends_with(b"\n\n") && answer.len() < 4 * MAX_LINE {
        match stream.read(&mut chunk)? {
            0 => break,
            length => answer.extend_from_slice(&chunk[..length]),
        }
    }
    let answer = String::from_utf8(answer).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
    match answer.split_once("errno=0\n") {
        Some((features, _)) => Ok(features.to_owned()),
        None => Err(io::Error::new(io::ErrorKind::Unsupported, "it is no mesh-wg, or an older one")),
    }
}
