//! What a packet costs besides encryption: `cargo bench -p mesh-wg`.
#![allow(missing_docs, clippy::unwrap_used)]

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use mesh_wg::allowed_ips::AllowedIps;
use mesh_wg::key::PublicKey;
use mesh_wg::offload::checksum::Sum;
use mesh_wg::offload::merge::{Merger, Mode};
use mesh_wg::offload::split::{Segments, TAIL};
use mesh_wg::peer::Peer;
use mesh_wg::peer_table::PeerTable;
use mesh_wg::roster::Roster;
use mesh_wg::staging::Budget;

#[path = "../tests/reference/mod.rs"]
mod reference;

const PAYLOAD: usize = 1368;
const SEGMENTS: usize = 45;

fn flow() -> reference::Flow {
    let (options, sequence, id, flags) = (12, 1, 1, 0x10);
    reference::Flow { v4: true, tcp: true, port: 1, options, sequence, id, flags, window: 500, df: true }
}

fn split(c: &mut Criterion) {
    let packet = flow().packet(&vec![7; SEGMENTS * PAYLOAD]);
    let header = flow().virtio(PAYLOAD as u16);
    let mut group = c.benchmark_group("super-packet of 45 segments");
    group.throughput(Throughput::Elements(SEGMENTS as u64));
    group.bench_function("split, checksums included", |b| {
        let fresh = || [&packet[..], &[0; TAIL]].concat();
        b.iter_batched_ref(
            fresh,
            |buffer| {
                let mut segments = Segments::new(&header, buffer, packet.len()).unwrap();
                while let Some(segment) = segments.next(1420) {
                    black_box(segment.padded);
                }
            },
            BatchSize::SmallInput,
        );
    });
    let mut flow = flow();
    let packets: Vec<Vec<u8>> = (0..SEGMENTS).map(|_| flow.packet(&[7; PAYLOAD])).collect();
    let mut merger = Merger::new(Mode::Virtio { udp: true }, 1 << 20);
    // As long as decryption takes to copy, which is part of what is measured.
    group.bench_function("merge, checksums and one copy included", |b| {
        b.iter(|| {
            for packet in &packets {
                merger.space(packet.len() + 32)[..packet.len()].copy_from_slice(packet);
                merger.done(packet.len());
            }
            merger.close();
            while let Some(write) = merger.take() {
                black_box(write);
            }
        });
    });
    group.finish();
}

fn checksum(c: &mut Criterion) {
    let bytes = vec![7u8; 1420];
    let mut group = c.benchmark_group("checksum of 1420 bytes");
    group.throughput(Throughput::Bytes(1420));
    group.bench_function("widest registers", |b| {
        b.iter(|| Sum::default().bytes(black_box(&bytes)).checksum())
    });
    group.bench_function("portable", |b| b.iter(|| Sum::default().few(black_box(&bytes)).checksum()));
    group.finish();
}

fn lookup(c: &mut Criterion) {
    let mut table = AllowedIps::default();
    let addresses: Vec<IpAddr> =
        (0..5000u32).map(|i| Ipv4Addr::from(0x0a00_0001 + (i << 8)).into()).collect();
    for (i, address) in addresses.iter().enumerate() {
        table.insert(ipnet::IpNet::new(*address, 24).unwrap(), i);
    }
    let mut turn = addresses.iter().cycle();
    c.bench_function("longest prefix of 5,000", |b| {
        b.iter(|| turn.next().and_then(|address| table.lookup(black_box(*address))));
    });

    let mut table = PeerTable::default();
    let (budget, roster) = (Budget::new(0), Arc::new(Roster::default()));
    let indices: Vec<u32> = (1..=5000u32).map(|i| i.wrapping_mul(2_654_435_761) >> 8).collect();
    for (i, index) in (1u8..).cycle().zip(&indices) {
        let key = PublicKey::new([i; 32]);
        let peer = Arc::new(Peer::new(key, None, None, Arc::clone(&budget), Arc::clone(&roster)));
        table.map_index(*index, &peer);
    }
    let mut turn = indices.iter().cycle();
    c.bench_function("receiver index of 5,000", |b| {
        b.iter(|| turn.next().is_some_and(|index| table.by_index(black_box(*index)).is_some()));
    });
}

criterion_group!(benches, split, checksum, lookup);
criterion_main!(benches);
