//! Looks for pod addresses and the marker outside tunnels in recorded frames.

use std::collections::BTreeSet;
use std::io::{BufReader, Read};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use ipnet::IpNet;

/// Larger records than any link's frame mean a broken file.
const LARGEST_RECORD: u32 = 1 << 18;

/// What a recording holds that should not be there.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Found {
    /// Frames with an outermost IP source or destination in the prefixes.
    pub(crate) inner_addresses: u64,
    /// The first of them.
    pub(crate) first_inner: Option<String>,
    /// The first frame that holds the marker.
    pub(crate) first_marked: Option<String>,
}

/// Looks through a classic pcap file for addresses of the prefixes in the outermost IP header, and for the marker.
/// `lent`: addresses that the LAN itself has given out of the prefixes, which no pod has.
///
/// # Errors
/// A sentence when the file cannot be read or is no pcap file. A record cut off at the end is passed over.
pub(crate) fn search(
    file: &Path,
    prefixes: &[IpNet],
    lent: &BTreeSet<IpAddr>,
    marker: &[u8],
) -> Result<Found, String> {
    let opened = std::fs::File::open(file).map_err(|error| format!("{}: {error}", file.display()))?;
    let mut found = Found::default();
    let mut number = 0;
    each_frame(BufReader::new(opened), |time, frame| {
        number += 1;
        let describe = || format!("frame {number} at {}: {}", clock(time), describe(frame));
        let inside = |address: &IpAddr| {
            !lent.contains(address) && prefixes.iter().any(|prefix| prefix.contains(address))
        };
        if packet(frame).is_some_and(|packet| inside(&packet.from) || inside(&packet.to)) {
            found.inner_addresses += 1;
            found.first_inner.get_or_insert_with(describe);
        }
        if found.first_marked.is_none() && frame.windows(marker.len()).any(|window| window == marker) {
            found.first_marked = Some(describe());
        }
    })?;
    Ok(found)
}

/// The time of day of a time since 1970, in UTC.
fn clock(time: Duration) -> String {
    let seconds = time.as_secs() % 86_400;
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    format!("{hour:02}:{minute:02}:{second:02}.{:03} UTC", time.subsec_millis())
}

fn each_frame(mut input: impl Read, mut see: impl FnMut(Duration, &[u8])) -> Result<(), String> {
    let mut header = [0u8; 24];
    input.read_exact(&mut header).map_err(|error| format!("no pcap header: {error}"))?;
    // Micro- or nanosecond timestamps, in either byte order.
    let (big, tick) = match header[..4] {
        [0xd4, 0xc3, 0xb2, 0xa1] => (false, 1000),
        [0x4d, 0x3c, 0xb2, 0xa1] => (false, 1),
        [0xa1, 0xb2, 0xc3, 0xd4] => (true, 1000),
        [0xa1, 0xb2, 0x3c, 0x4d] => (true, 1),
        _ => return Err("not a pcap file".to_owned()),
    };
    let mut record = [0u8; 16];
    let mut frame = Vec::new();
    while input.read_exact(&mut record).is_ok() {
        let field = |at: usize| {
            let bytes = [record[at], record[at + 1], record[at + 2], record[at + 3]];
            if big { u32::from_be_bytes(bytes) } else { u32::from_le_bytes(bytes) }
        };
        let time = Duration::from_secs(field(0).into()) + Duration::from_nanos(u64::from(field(4)) * tick);
        let length = field(8);
        if length > LARGEST_RECORD {
            return Err(format!("a record of {length} bytes: the file is broken"));
        }
        frame.resize(length as usize, 0);
        if input.read_exact(&mut frame).is_err() {
            break;
        }
        see(time, &frame);
    }
    Ok(())
}

/// The outermost IP packet of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Packet<'a> {
    from: IpAddr,
    to: IpAddr,
    /// The number that IANA gave to what is inside; in IPv6 that of the first extension header, if any.
    protocol: u8,
    /// What follows the header.
    segment: &'a [u8],
}

/// Reads an Ethernet frame as far as the outermost IP header; none where there is none.
fn packet(frame: &[u8]) -> Option<Packet<'_>> {
    let mut at = 12;
    // One or two VLAN tags may stand before the protocol.
    while matches!(frame.get(at..at + 2)?, [0x81, 0x00] | [0x88, 0xa8]) {
        at += 4;
    }
    let packet = frame.get(at + 2..)?;
    match frame.get(at..at + 2)? {
        [0x08, 0x00] => {
            let v4 = |at: usize| Some(IpAddr::from(*packet.get(at..)?.first_chunk::<4>()?));
            let (from, to) = (v4(12)?, v4(16)?);
            let later_fragment = packet[6] & 0x1f != 0 || packet[7] != 0;
            let header = usize::from(packet.first()? & 0x0f) * 4;
            let segment = if later_fragment { None } else { packet.get(header..) };
            Some(Packet { from, to, protocol: packet[9], segment: segment.unwrap_or_default() })
        }
        [0x86, 0xdd] => {
            let v6 = |at: usize| Some(IpAddr::from(*packet.get(at..)?.first_chunk::<16>()?));
            let (from, to) = (v6(8)?, v6(24)?);
            let segment = packet.get(40..).unwrap_or_default();
            Some(Packet { from, to, protocol: packet[6], segment })
        }
        _ => None,
    }
}

/// `udp 10.1.0.2:4000 -> 10.2.0.2:7777`
fn describe(frame: &[u8]) -> String {
    let Some(Packet { from, to, protocol, segment }) = packet(frame) else {
        return "no IP packet".to_owned();
    };
    let name = match protocol {
        1 => "icmp".to_owned(),
        6 => "tcp".to_owned(),
        17 => "udp".to_owned(),
        58 => "icmpv6".to_owned(),
        other => format!("IP protocol {other}"),
    };
    match (protocol, segment) {
        (6 | 17, [a, b, c, d, ..]) => {
            let (source, destination) = (u16::from_be_bytes([*a, *b]), u16::from_be_bytes([*c, *d]));
            format!("{name} {} -> {}", SocketAddr::new(from, source), SocketAddr::new(to, destination))
        }
        _ => format!("{name} {from} -> {to}"),
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

    fn found(file: &[u8]) -> Result<Found, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.pcap");
        std::fs::write(&path, file).unwrap();
        let lent = BTreeSet::from(["10.1.0.77".parse().unwrap()]);
        search(&path, &["10.1.0.0/16".parse().unwrap()], &lent, b"mark")
    }

    fn count(file: &[u8]) -> Result<u64, String> {
        found(file).map(|found| found.inner_addresses)
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
    fn what_a_lan_lends_is_no_pods() {
        let file = pcap(&[
            v4_frame([10, 1, 0, 77], [198, 18, 2, 2], false),
            v4_frame([10, 1, 0, 2], [10, 1, 0, 77], false),
        ]);
        assert_eq!(count(&file), Ok(1));
    }

    #[test]
    fn the_first_offending_frame_is_named_with_time_addresses_and_protocol() {
        let mut probe = v4_frame([10, 1, 0, 2], [198, 51, 100, 7], false);
        (probe[14], probe[23]) = (0x45, 17);
        probe.extend([0x10, 0, 0x1e, 0x61]);
        probe.extend(b"mark");
        let mut file = pcap(&[v4_frame([1, 1, 1, 1], [2, 2, 2, 2], false), probe]);
        // 01:02:03.5 of some day, in the second record.
        let second = 24 + 16 + 34;
        file[second..second + 8]
            .copy_from_slice(&[(86_400u32 * 9 + 3723).to_le_bytes(), 500_000_000u32.to_le_bytes()].concat());
        let found = found(&file).unwrap();
        let sentence = "frame 2 at 01:02:03.500 UTC: udp 10.1.0.2:4096 -> 198.51.100.7:7777";
        assert_eq!(found.first_inner.as_deref(), Some(sentence));
        assert_eq!(found.first_marked.as_deref(), Some(sentence));
        assert_eq!(describe(&[0; 14]), "no IP packet");
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
