//! Any packet: what is learnt from it has a name as names are compared and addresses of which no name has too many.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_policy::dns;
use mesh_policy::names::{Names, normal};

fuzz_target!(|data: &[u8]| {
    let Some(resolved) = dns::answer(data) else { return };
    assert_eq!(resolved.name, normal(&resolved.name));
    assert!(!resolved.addresses.is_empty());
    let mut names = Names::default();
    let touched = names.learn(resolved.clone(), 1);
    assert!(touched.len() <= resolved.addresses.len());
    assert!(names.due().is_some());
    names.pass(u64::MAX / 2);
    assert!(names.due().is_none());
});
