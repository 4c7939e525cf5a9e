//! What goes over the control channel: one JSON document a line, answers in any order.

use std::io::{BufRead, Read as _};

use anyhow::{Context as _, ensure};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Name of the virtio-serial port.
pub const PORT: &str = "sennit.control";
/// The longest line, in bytes.
pub const LINE_MOST: u64 = 16 << 20;
/// The most of each output that is sent back, in bytes: the end of it.
pub const OUTPUT_MOST: usize = 1 << 20;
/// The id of the guest's first word.
pub const HELLO: u64 = 0;

/// A command for the guest.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Request {
    /// Comes back in the answer.
    pub id: u64,
    /// For `sh -c`.
    pub script: String,
    /// Its standard input.
    pub stdin: String,
    /// Seconds until its process group is killed.
    pub seconds: u64,
}

/// How a command ended.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Answer {
    /// The request's.
    pub id: u64,
    /// Exit code; none when a signal ended it or the deadline did.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// Reads a line; none at the end.
///
/// # Errors
/// What reading says; a line that is too long or no document of this kind.
pub fn read<T: DeserializeOwned>(from: &mut impl BufRead) -> anyhow::Result<Option<T>> {
    let mut line = Vec::new();
    let length = from.take(LINE_MOST).read_until(b'\n', &mut line)?;
    if length == 0 {
        return Ok(None);
    }
    ensure!(line.ends_with(b"\n"), "a line of the control channel is cut off after {length} bytes");
    serde_json::from_slice(&line).context("a line of the control channel").map(Some)
}

/// A document as a line.
///
/// # Errors
/// None for the types above.
pub fn line<T: Serialize>(document: &T) -> anyhow::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(document)?;
    line.push(b'\n');
    Ok(line)
}
