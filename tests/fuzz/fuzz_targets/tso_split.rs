//! A read of the TUN device: a hostile virtio header before anything, against the reference.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_wg::offload::split::{Segments, TAIL};
use mesh_wg::offload::virtio::{VIRTIO_HEADER, VirtioHeader};
use mesh_wg::packet::padded_length;

#[path = "../../../overlay/userspace/tests/reference/mod.rs"]
mod reference;

fuzz_target!(|data: &[u8]| {
    let Some((header, packet)) = data.split_at_checked(VIRTIO_HEADER) else { return };
    let header = VirtioHeader::parse(header);
    let mut buffer = packet.to_vec();
    buffer.resize(packet.len() + TAIL, 0xaa);
    let Ok(mut segments) = Segments::new(&header, &mut buffer, packet.len()) else { return };
    let mut expected = reference::split(&header, packet).into_iter();
    while let Some(segment) = segments.next(1420) {
        let (bytes, padding) = segment.padded.split_at(segment.length);
        assert_eq!(Some(bytes), expected.next().as_deref());
        assert_eq!(segment.padded.len(), padded_length(segment.length, 1420));
        assert!(padding.iter().all(|byte| *byte == 0));
    }
    assert_eq!(expected.next(), None);
});
