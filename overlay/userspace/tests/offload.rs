//! Segmentation and coalescing against a slow, obvious reference.
#![allow(clippy::unwrap_used)]

mod reference;

use mesh_wg::offload::merge::{Merger, Mode};
use mesh_wg::offload::split::{Segments, TAIL};
use mesh_wg::offload::virtio::{GSO_ECN, GSO_NONE, VIRTIO_HEADER, VirtioHeader};
use mesh_wg::packet::padded_length;
use proptest::prelude::*;
use proptest::sample::Index;
use reference::{Flow, seen, split, written};

fn any_flow() -> impl Strategy<Value = Flow> {
    (any::<[bool; 3]>(), 0u16..3, 0usize..=10, any::<u32>(), any::<u16>(), 0u8..=255).prop_map(
        |([v4, tcp, df], port, options, sequence, id, flags)| Flow {
            v4,
            tcp,
            port,
            options: options * 4,
            sequence,
            id,
            flags,
            window: 500,
            df,
        },
    )
}

fn bulk(v4: bool, tcp: bool) -> Flow {
    Flow {
        v4,
        tcp,
        port: 1,
        options: 12,
        sequence: u32::MAX - 2000,
        id: 65_530,
        flags: 0x10,
        window: 500,
        df: true,
    }
}

/// All segments, and that each is padded with zeros as it should be.
fn segments(header: &VirtioHeader, packet: &[u8], mtu: usize) -> Vec<Vec<u8>> {
    let mut buffer = packet.to_vec();
    buffer.resize(packet.len() + TAIL, 0xaa);
    let mut segments = Segments::new(header, &mut buffer, packet.len()).unwrap();
    let mut all = Vec::new();
    while let Some(segment) = segments.next(mtu) {
        let (bytes, padding) = segment.padded.split_at(segment.length);
        assert_eq!(segment.padded.len(), padded_length(segment.length, mtu));
        assert!(padding.iter().all(|byte| *byte == 0));
        all.push(bytes.to_vec());
        assert!(all.len() <= 65_536);
    }
    assert_eq!(segments.remaining(), 0);
    all
}

/// Gathers packets, each after something else was tried in its place, and gives what is written.
fn merged(mode: Mode, packets: &[Vec<u8>], taken_early: bool) -> Vec<Vec<u8>> {
    let mut merger = Merger::new(mode, 1 << 20);
    let mut writes = Vec::new();
    for (i, packet) in packets.iter().enumerate() {
        let space = packet.len() + 32;
        if !merger.has_room(space) {
            merger.close();
            writes.extend(std::iter::from_fn(|| merger.take().map(<[u8]>::to_vec)));
        }
        // What fails authentication leaves anything behind in its space.
        if i % 3 == 0 {
            merger.space(space).fill(0x99);
        }
        if i % 7 == 5 {
            merger.space(space).fill(0x77);
            merger.close();
        }
        merger.space(space)[..packet.len()].copy_from_slice(packet);
        merger.space(space)[packet.len()..].fill(0x55);
        merger.done(packet.len());
        if taken_early {
            writes.extend(std::iter::from_fn(|| merger.take().map(<[u8]>::to_vec)));
        }
    }
    merger.space(1500).fill(0x33);
    merger.close();
    writes.extend(std::iter::from_fn(|| merger.take().map(<[u8]>::to_vec)));
    writes
}

const VIRTIO: Mode = Mode::Virtio { udp: true };

fn assert_same(writes: &[Vec<u8>], packets: &[Vec<u8>]) {
    let came: Vec<Vec<u8>> =
        writes.iter().flat_map(|write| written(write)).map(|packet| seen(&packet)).collect();
    let went: Vec<Vec<u8>> = packets.iter().map(|packet| seen(packet)).collect();
    assert_eq!(came.len(), went.len());
    for (i, (came, went)) in came.iter().zip(&went).enumerate() {
        assert!(came == went, "packet {i}: {came:02x?} is not {went:02x?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn a_super_packet_comes_apart_as_the_reference_has_it(
        mut flow in any_flow(),
        payload in proptest::collection::vec(any::<u8>(), 0..9000),
        size in prop_oneof![1u16..80, 500u16..1500],
        ecn: bool,
        mtu in prop_oneof![Just(0usize), Just(1420), 100usize..3000],
    ) {
        let packet = flow.packet(&payload);
        let mut header = flow.virtio(size);
        if ecn && flow.tcp {
            header.gso_type |= GSO_ECN;
        }
        prop_assert_eq!(segments(&header, &packet, mtu), split(&header, &packet));
    }

    #[test]
    fn an_unfinished_checksum_is_finished(mut flow in any_flow(), payload in proptest::collection::vec(any::<u8>(), 0..2000)) {
        let packet = flow.packet(&payload);
        let mut unfinished = packet.clone();
        let header = VirtioHeader { gso_type: GSO_NONE, gso_size: 0, ..flow.virtio(1) };
        let field = usize::from(header.csum_start + header.csum_offset);
        // As the kernel leaves it: the folded sum of the pseudo header alone.
        let addresses = if flow.v4 { &packet[12..20] } else { &packet[8..40] };
        let length = (packet.len() - flow.l4()) as u32;
        let sum = !reference::checksum(&[addresses, &length.to_be_bytes(), &[0, 0, 0, flow.protocol()]]);
        unfinished[field..field + 2].copy_from_slice(&sum.to_be_bytes());
        prop_assert_eq!(segments(&header, &unfinished, 1420), [packet]);
    }

    #[test]
    fn whatever_is_read_is_refused_or_comes_apart(
        header in any::<[u8; VIRTIO_HEADER]>(),
        flow in any_flow(),
        payload in proptest::collection::vec(any::<u8>(), 0..300),
        changes in proptest::collection::vec((any::<Index>(), any::<u8>()), 0..6),
        keep in 0u16..1024,
    ) {
        let mut packet = flow.clone().packet(&payload);
        for (at, byte) in changes {
            let at = at.index(packet.len());
            packet[at] = byte;
        }
        // Some fields as they should be, others anything.
        let (mut bytes, good) = (header, flow.virtio(100).render());
        for (i, byte) in bytes.iter_mut().enumerate() {
            if keep & (1 << i) != 0 {
                *byte = good[i];
            }
        }
        let length = packet.len();
        let header = VirtioHeader::parse(&bytes);
        let mut buffer = packet;
        buffer.resize(length + TAIL, 0);
        if let Ok(mut segments) = Segments::new(&header, &mut buffer, length) {
            let (mut payload, expected) = (0, segments.remaining());
            let mut count = 0;
            while let Some(segment) = segments.next(1420) {
                payload += segment.length;
                count += 1;
            }
            prop_assert_eq!(count, expected);
            prop_assert!(payload >= length);
        }
    }

    #[test]
    fn what_was_put_together_comes_apart_into_what_it_was(
        mut flows in proptest::collection::vec(any_flow(), 1..4),
        steps in proptest::collection::vec(
            (any::<Index>(), prop_oneof![4 => Just(200usize), 1 => 0usize..260], 0u8..12, any::<Index>(), any::<u8>(), 1usize..30),
            1..30,
        ),
        taken_early: bool,
        udp: bool,
    ) {
        for flow in &mut flows {
            flow.flags = if flow.flags < 200 { 0x10 } else { flow.flags };
        }
        let mut packets = Vec::new();
        for (which, payload, change, at, byte, repeat) in steps {
            let which = which.index(flows.len());
            let flow = &mut flows[which];
            for i in 0..repeat {
                // The last one of a run now and then differs in what must not differ.
                let odd = i + 1 == repeat;
                match change {
                    0 if odd => flow.window ^= 1,
                    1 if odd => flow.sequence = flow.sequence.wrapping_add(1),
                    2 if odd => flow.id = flow.id.wrapping_add(7),
                    _ => {}
                }
                let flags = flow.flags;
                if change == 3 && odd {
                    flow.flags |= 0x08;
                }
                let length = if change == 4 && odd { payload / 2 } else { payload };
                let mut packet = flow.packet(&vec![byte.wrapping_add(i as u8); length]);
                flow.flags = flags;
                if change == 5 && odd {
                    let at = at.index(packet.len());
                    // Its lengths are the caller's to check.
                    if !(2..6).contains(&at) && at != 0 {
                        packet[at] ^= byte;
                    }
                }
                packets.push(packet);
            }
        }
        assert_same(&merged(Mode::Virtio { udp }, &packets, taken_early), &packets);
        prop_assert_eq!(merged(Mode::Plain, &packets, taken_early), packets);
    }

    #[test]
    fn any_bytes_go_through_the_merger_as_they_are(
        packets in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..100), 1..50),
    ) {
        for write in merged(VIRTIO, &packets, false) {
            prop_assert_eq!(&write[..VIRTIO_HEADER], [0; VIRTIO_HEADER]);
        }
        assert_same(&merged(VIRTIO, &packets, false), &packets);
    }
}

#[test]
fn bulk_becomes_one_write_and_every_limit_holds() {
    for (v4, tcp) in [(true, true), (false, true), (true, false), (false, false)] {
        let mut flow = bulk(v4, tcp);
        let packets: Vec<Vec<u8>> = (0..200u8).map(|i| flow.packet(&[i; 1300])).collect();
        let writes = merged(VIRTIO, &packets, true);
        assert_same(&writes, &packets);
        let fits = if tcp { (65_535 - flow.headers()) / 1300 } else { 65_535 / 1300 };
        // A packet in seven is preceded by a close.
        assert!(writes.len() <= 200 / 7 + 2 + 200 / fits.min(64), "{} writes", writes.len());
        assert!(writes.iter().all(|write| write.len() <= VIRTIO_HEADER + 65_535));
    }
    let mut flow = bulk(true, false);
    let small: Vec<Vec<u8>> = (0..300u16).map(|i| flow.packet(&i.to_be_bytes())).collect();
    for write in merged(VIRTIO, &small, false) {
        assert!(written(&write).len() <= 64, "the kernel takes no more datagrams");
    }
    assert_same(&merged(VIRTIO, &small, false), &small);
}

#[test]
fn a_push_and_a_short_segment_end_a_super_packet() {
    let mut flow = bulk(true, true);
    let mut merger = Merger::new(VIRTIO, 1 << 20);
    let mut put = |merger: &mut Merger, payload: usize, flags: u8| {
        flow.flags = flags;
        let packet = flow.packet(&vec![1; payload]);
        merger.space(packet.len() + 32)[..packet.len()].copy_from_slice(&packet);
        merger.done(packet.len());
        merger.take().map(<[u8]>::len)
    };
    assert_eq!(put(&mut merger, 100, 0x10), None);
    assert_eq!(put(&mut merger, 100, 0x18), Some(10 + 52 + 200));
    assert_eq!(put(&mut merger, 100, 0x10), None);
    assert_eq!(put(&mut merger, 99, 0x10), Some(10 + 52 + 199));
    assert_eq!(put(&mut merger, 100, 0x18), Some(10 + 52 + 100), "alone");
    assert_eq!(put(&mut merger, 0, 0x10), Some(10 + 52), "an acknowledgement");
}

#[test]
fn a_corrupt_packet_goes_on_alone_and_as_it_is() {
    let mut flow = bulk(true, true);
    for bad in 0..4 {
        let mut packets: Vec<Vec<u8>> = (0..4).map(|_| flow.packet(&[7; 500])).collect();
        packets[bad][300] ^= 1;
        let writes = merged(VIRTIO, &packets, false);
        let alone = writes.iter().filter(|write| write[VIRTIO_HEADER..] == packets[bad]).count();
        assert_eq!(alone, 1, "packet {bad}");
        assert_same(&writes, &packets);
    }
}

#[test]
fn a_merger_without_room_loses_packets_and_nothing_else() {
    let mut flow = bulk(true, true);
    let mut merger = Merger::new(VIRTIO, 1000);
    for _ in 0..10 {
        let packet = flow.packet(&[7; 400]);
        let space = merger.space(packet.len() + 32);
        let length = packet.len().min(space.len());
        space[..length].copy_from_slice(&packet[..length]);
        if length == packet.len() {
            merger.done(length);
        }
        assert!(merger.take().is_none_or(|write| write.len() <= 1000));
    }
}

#[test]
fn super_packets_that_were_not_asked_for_are_refused() {
    let mut flow = bulk(true, true);
    let packet = flow.packet(&[0; 3000]);
    let good = flow.virtio(1000);
    let refused = |header: VirtioHeader| {
        let mut buffer = packet.clone();
        buffer.resize(packet.len() + TAIL, 0);
        Segments::new(&header, &mut buffer, packet.len()).is_err()
    };
    assert!(!refused(good));
    for (what, header) in [
        ("UFO", VirtioHeader { gso_type: 3, ..good }),
        ("IPv6 in IPv4", VirtioHeader { gso_type: 4, ..good }),
        ("UDP in TCP", VirtioHeader { gso_type: 5, ..good }),
        ("no size", VirtioHeader { gso_size: 0, ..good }),
        ("headers elsewhere", VirtioHeader { csum_start: 24, ..good }),
        ("a checksum beyond the end", VirtioHeader { gso_type: 0, csum_start: 3045, ..good }),
        ("a checksum in the IP header", VirtioHeader { gso_type: 0, csum_start: 2, ..good }),
    ] {
        assert!(refused(header), "{what}");
    }
    assert!(!refused(VirtioHeader { flags: 0, ..good }), "checksums are made whether asked for or not");
}
