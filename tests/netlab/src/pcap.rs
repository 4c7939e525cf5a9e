use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::time::Duration;

/// Longest frame written; longer ones do not exist on a veth.
pub(crate) const SNAPLEN: u32 = 262_144;

/// Writes a classic pcap file with nanosecond timestamps (draft-ietf-opsawg-pcap), in host byte order.
pub(crate) struct Writer<W: Write> {
    out: W,
}

impl Writer<BufWriter<File>> {
    pub(crate) fn create(path: &Path, ethernet: bool) -> io::Result<Self> {
        Writer::new(BufWriter::new(File::create(path)?), ethernet)
    }
}

impl<W: Write> Writer<W> {
    pub(crate) fn new(mut out: W, ethernet: bool) -> io::Result<Writer<W>> {
        const LINKTYPE_ETHERNET: u32 = 1;
        const LINKTYPE_RAW: u32 = 101;
        out.write_all(&0xa1b2_3c4d_u32.to_ne_bytes())?;
        out.write_all(&2u16.to_ne_bytes())?;
        out.write_all(&4u16.to_ne_bytes())?;
        out.write_all(&[0; 8])?;
        out.write_all(&SNAPLEN.to_ne_bytes())?;
        out.write_all(&(if ethernet { LINKTYPE_ETHERNET } else { LINKTYPE_RAW }).to_ne_bytes())?;
        Ok(Writer { out })
    }

    /// Writes a frame seen at `time` since the Unix epoch; `length` is its length on the wire.
    pub(crate) fn frame(&mut self, time: Duration, frame: &[u8], length: usize) -> io::Result<()> {
        let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX).to_ne_bytes();
        // Seconds wrap in 2106, as the format does.
        self.out.write_all(&(time.as_secs() as u32).to_ne_bytes())?;
        self.out.write_all(&time.subsec_nanos().to_ne_bytes())?;
        self.out.write_all(&number(frame.len()))?;
        self.out.write_all(&number(length))?;
        self.out.write_all(frame)
    }

    pub(crate) fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_and_record_have_the_lengths_of_the_format() {
        let mut bytes = Vec::new();
        let mut writer = Writer::new(&mut bytes, false).unwrap();
        writer.frame(Duration::new(7, 9), b"abc", 3).unwrap();
        assert_eq!(bytes.len(), 24 + 16 + 3);
        assert_eq!(bytes[20..24], 101u32.to_ne_bytes());
        assert_eq!(bytes[24..28], 7u32.to_ne_bytes());
        assert_eq!(bytes[32..36], 3u32.to_ne_bytes());
    }
}
