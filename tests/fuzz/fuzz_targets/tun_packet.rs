//! Arbitrary bytes from the TUN device: no panic; and what arrives at the other end is what was sent, from an
//! address that the sender owns.
#![no_main]

mod wire;

use std::cell::RefCell;

use libfuzzer_sys::fuzz_target;
use mesh_wg::packet;
use wire::{Node, PING, connected, settle};

thread_local! {
    static NODES: RefCell<(Node, Node)> = RefCell::new(connected());
}

fuzz_target!(|bytes: &[u8]| {
    let bytes = &bytes[..bytes.len().min(65_535)];
    NODES.with_borrow_mut(|(a, b)| {
        a.send(bytes);
        settle(a, b);
        if let Some(arrived) = b.out.packets.pop_front() {
            let header = packet::parse(bytes).expect("only IP packets arrive");
            assert_eq!(arrived, &bytes[..header.length]);
            assert_eq!(header.source, std::net::IpAddr::from([10, 0, 0, 1]));
        }
        assert!(b.out.packets.is_empty());
        a.send(&PING);
        settle(a, b);
        assert_eq!(b.out.packets.pop_front().as_deref(), Some(&PING[..]), "the session broke");
    });
});
