//! Packets out of the tunnel: what is written to the TUN device stands for what went in, whatever that is.
#![no_main]

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use mesh_wg::offload::merge::{Merger, Mode};

#[path = "../../../overlay/userspace/tests/reference/mod.rs"]
mod reference;

use reference::Flow;

#[derive(Arbitrary, Debug)]
enum Step {
    Bulk { flow: u8, length: u8, repeat: u8 },
    Flags { flow: u8, flags: u8 },
    Jump { flow: u8, by: u8 },
    Change { flow: u8, at: u8, bits: u8 },
    Raw(Vec<u8>),
    Abandon(u8),
    Close,
    Take,
}

#[derive(Arbitrary, Debug)]
struct Input {
    kinds: [u8; 3],
    udp: bool,
    steps: Vec<Step>,
}

fuzz_target!(|input: Input| {
    let mut flows = input.kinds.map(|kind| Flow {
        v4: kind & 1 != 0,
        tcp: kind & 2 != 0,
        port: u16::from(kind >> 6),
        options: usize::from(kind >> 2 & 3) * 4,
        sequence: u32::MAX - 500,
        id: 65_000,
        flags: 0x10,
        window: 500,
        df: kind & 16 != 0,
    });
    let mut merger = Merger::new(Mode::Virtio { udp: input.udp }, 1 << 18);
    let (mut went, mut came) = (Vec::new(), Vec::new());
    for step in input.steps.into_iter().take(200) {
        let mut put = Vec::new();
        match step {
            Step::Bulk { flow, length, repeat } => {
                let flow = &mut flows[usize::from(flow % 3)];
                put.extend((0..repeat % 40).map(|i| flow.packet(&vec![i; usize::from(length) * 6])));
            }
            Step::Flags { flow, flags } => flows[usize::from(flow % 3)].flags = flags,
            Step::Jump { flow, by } => {
                let flow = &mut flows[usize::from(flow % 3)];
                flow.sequence = flow.sequence.wrapping_add(by.into());
                flow.id = flow.id.wrapping_add(by.into());
            }
            Step::Change { flow, at, bits } => {
                let mut packet = flows[usize::from(flow % 3)].packet(&[9; 120]);
                let at = usize::from(at) % packet.len();
                // Version and length are the caller's to check.
                if at != 0 && !(2..6).contains(&at) {
                    packet[at] ^= bits;
                }
                put.push(packet);
            }
            Step::Raw(bytes) => put.push(bytes),
            Step::Abandon(length) => merger.space(usize::from(length)).fill(length),
            Step::Close => merger.close(),
            Step::Take => came.extend(merger.take().map(<[u8]>::to_vec)),
        }
        for packet in put.into_iter().filter(|packet| !packet.is_empty()) {
            if !merger.has_room(packet.len() + 32) {
                merger.close();
                came.extend(std::iter::from_fn(|| merger.take().map(<[u8]>::to_vec)));
            }
            let space = merger.space(packet.len() + 32);
            space[..packet.len()].copy_from_slice(&packet);
            space[packet.len()..].fill(0x55);
            merger.done(packet.len());
            went.push(packet);
        }
    }
    merger.close();
    came.extend(std::iter::from_fn(|| merger.take().map(<[u8]>::to_vec)));
    let came: Vec<Vec<u8>> = came.iter().flat_map(|write| reference::written(write)).collect();
    let see = |packets: &[Vec<u8>]| packets.iter().map(|packet| reference::seen(packet)).collect::<Vec<_>>();
    assert_eq!(see(&came), see(&went));
});
