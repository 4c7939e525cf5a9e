//! Arbitrary bytes as a UAPI conversation: no panic, and what was accepted is shown again as it was set.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_wg::config::DeviceUpdate;
use mesh_wg::device::Device;
use mesh_wg::uapi::{Operation, Reader, SocketSnapshot, parse_set, render_get};

fuzz_target!(|bytes: &[u8]| {
    let scope_of = |name: &str| (name == "v0").then_some(2);
    let mut reader = Reader::new(&scope_of);
    for line in bytes.split(|byte| *byte == b'\n') {
        if let Some(Ok(Operation::Set(update))) = reader.line(line) {
            check(&update);
        }
    }
});

fn check(update: &DeviceUpdate) {
    let device = Device::new();
    if device.apply(update).is_err() {
        return;
    }
    let shown = render_get(&device.snapshot(), SocketSnapshot::default());
    // The state, set on a fresh device, gives the same state: what is shown is what is there.
    let settable: String = shown
        .lines()
        .filter(|line| !["errno", "last_", "tx_", "rx_"].iter().any(|start| line.starts_with(start)))
        .flat_map(|line| [line, "\n"])
        .collect();
    let scope_of = |_: &str| None;
    let Ok(again) = parse_set(&settable, &scope_of) else { panic!("cannot set what was shown:\n{settable}") };
    let copy = Device::new();
    if copy.apply(&again).is_ok() {
        assert_eq!(render_get(&copy.snapshot(), SocketSnapshot::default()), shown);
    }
}
