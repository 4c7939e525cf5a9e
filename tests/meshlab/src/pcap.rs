//! Looks for pod addresses outside tunnels in recorded frames.

use std::io::{BufReader, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use ipnet::IpNet;

/// Larger records than any link's frame mean a broken file.
const LARGEST_RECORD: u32 = 1 << 18;

/// How many frames of a classic pcap file have an outermost IP source or destination in these prefixes.
///
/// # Errors
/// A sentence when the file cannot be read or is no pcap file. A record cut off at the end is passed over.
pub(crate) fn count_addresses(file: &Path, prefixes: &[IpNet]) -> Result<u64, String> {
    let opened = std::fs::File::open(file).map_err(|error| format!("{}: {error}", file.display()))?;
    let mut hits = 0;
    each_frame(BufReader::new(opened), |frame| {
        let inside = |address: &IpAddr| prefixes.iter().any(|prefix| prefix.contains(address));
        if addresses(frame).is_some_and(|(from, to)| inside(&from) || inside(&to)) {
            hits += 1;
        }
    })?;
    Ok(hits)
}

fn each_frame(mut input: impl Read, mut see: impl FnMut(&[u8])) -> Result<(), String> {
    let mut header = [0u8; 24];
    input.read_exact(&mut header).map_err(|error| format!("no pcap header: {error}"))?;
    // Micro- or nanosecond timestamps, in either byte order.
    let big = match header[..4] {
        [0xd4, 0xc3, 0xb2, 0xa1] | [0x4d, 0x3c, 0xb2, 0xa1] => false,
        [0xa1, 0xb2, 0xc3, 0xd4] | [0xa1, 0xb2, 0x3c, 0x4d] => true,
        _ => return Err("not a pcap file".to_owned()),
    };
    let mut record = [0u8; 16];
    let mut frame = Vec::new();
    while input.read_exact(&mut record).is_ok() {
        let length = [record[8], record[9], record[10], record[11]];
        let length = if big { u32::from_be_bytes(length) } else { u32::from_le_bytes(length) };
        if length > LARGEST_RECORD {
            return Err(format!("a record of {length} bytes: the file is broken"));
        }
        frame.resize(length as usize, 0);
        if input.read_exact(&mut frame).is_err() {
            break;
        }
        see(&frame);
    }
    Ok(())
}

/// Source and destination of an Ethernet frame's outermost IP header.
fn addresses(frame: &[u8]) -> Option<(IpAddr, IpAddr)> {
    let mut at = 12;
    // One or two VLAN tags may stand before the protocol.
    while matches!(frame.get(at..at + 2)?, [0x81, 0x00] | [0x88, 0xa8]) {
        at += 4;
    }
    let packet = frame.get(at + 2..)?;
    match frame.get(at..at + 2)? {
        [0x08, 0x00] => {
            let v4 = |at: usize| {
                Some(IpAddr::V4(Ipv4Addr::from(<[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?)))
            };
            Some((v4(12)?, v4(16)?))
        }
        [0x86, 0xdd] => {
            let v6 = |at: usize| {
                Some(IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(packet.get(at..at + 16)?).ok()?)))
            };
            Some((v6(8)?, v6(24)?))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v4_frame(from: [u8; 4], to: [u8; 4], tagged: bool) -> Vec<u8> {
        let mut frame = vec![0; 12];
        if tagged {
            frame.extend([0x81, 0, 0, 7]);
        }
        frame.extend([8, 0]);
        frame.extend([0; 12]);
        frame.extend(from);
        frame.extend(to);
        frame
    }

    fn pcap(frames: &[Vec<u8>]) -> Vec<u8> {
        let mut file = vec![0x4d, 0x3c, 0xb2, 0xa1];
        file.extend([0; 20]);
        for frame in frames {
            file.extend([0; 8]);
            file.extend((frame.len() as u32).to_le_bytes());
            file.extend((frame.len() as u32).to_le_bytes());
            file.extend(frame);
        }
        file
    }

    fn count(file: &[u8]) -> Result<u64, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.pcap");
        std::fs::write(&path, file).unwrap();
        count_addresses(&path, &["10.1.0.0/16".parse().unwrap()])
    }

    #[test]
    fn pod_addresses_are_found_only_in_the_outermost_header() {
        let mut tunnelled = v4_frame([198, 18, 1, 2], [198, 18, 2, 2], false);
        tunnelled.extend(v4_frame([10, 1, 0, 2], [10, 1, 0, 3], false));
        let file = pcap(&[
            tunnelled,
            v4_frame([10, 1, 0, 2], [198, 18, 2, 2], false),
            v4_frame([198, 18, 2, 2], [10, 1, 9, 9], true),
            vec![1, 2, 3],
        ]);
        assert_eq!(count(&file), Ok(2));
    }

    #[test]
    fn broken_files_are_refused_and_cut_ones_read_as_far_as_they_go() {
        assert!(count(b"").is_err());
        assert!(count(&[7; 40]).unwrap_err().contains("not a pcap"));
        let whole = pcap(&[
            v4_frame([10, 1, 0, 2], [1, 1, 1, 1], false),
            v4_frame([10, 1, 0, 2], [1, 1, 1, 1], false),
        ]);
        assert_eq!(count(&whole[..whole.len() - 3]), Ok(1));
        let mut huge = pcap(&[]);
        huge.extend([0xff; 16]);
        assert!(count(&huge).unwrap_err().contains("broken"));
    }
}
