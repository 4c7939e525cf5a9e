//! Arbitrary datagrams, and damaged real ones, against a device with a session: no panic, nothing delivered,
//! and the session lives on.
#![no_main]

mod wire;

use std::cell::RefCell;

use libfuzzer_sys::fuzz_target;
use wire::{Node, PING, connected, settle};

thread_local! {
    static NODES: RefCell<(Node, Node)> = RefCell::new(connected());
}

fuzz_target!(|bytes: &[u8]| {
    let Some((how, bytes)) = bytes.split_first() else { return };
    NODES.with_borrow_mut(|(a, b)| {
        a.send(&PING);
        let real = a.out.datagrams.pop_front().expect("a session");
        let junk = if how & 1 == 0 {
            bytes.to_vec()
        } else {
            // A real datagram with other bytes over a part of it, cut or extended.
            let mut junk = real.clone();
            let at = usize::from(*how) / 2 % junk.len();
            for (target, byte) in junk[at..].iter_mut().zip(bytes) {
                *target ^= *byte;
            }
            if how & 64 != 0 {
                junk.truncate(bytes.len());
            } else if how & 32 != 0 {
                junk.extend_from_slice(bytes);
            }
            junk
        };
        let harmless = junk != real;
        if harmless {
            b.receive(a.address, &junk);
            assert!(b.out.packets.is_empty(), "a forgery came through");
        }
        b.out.datagrams.clear();
        b.receive(a.address, &real);
        assert_eq!(b.out.packets.pop_front().as_deref(), Some(&PING[..]), "the session broke");
        settle(a, b);
        a.out.datagrams.clear();
        b.out.datagrams.clear();
    });
});
