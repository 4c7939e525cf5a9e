//! Any packet: what is learnt from it has a name as names are compared and addresses of which no name has too many.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_policy::dns;
use mesh_policy::names::{Names, Wanted, normal};

fuzz_target!(|data: &[u8]| {
    let Some(resolved) = dns::answer(data) else { return };
    assert_eq!(resolved.name, normal(&resolved.name));
    assert!(!resolved.addresses.is_empty());
    // Whoever wants the name gets the same.
    if let Ok(domain) = resolved.name.parse() {
        let mut wanted = Wanted::default();
        wanted.add(&domain);
        let told = dns::wanted(data, &wanted);
        assert!(told.is_none_or(|told| told == resolved));
    }
    let mut names = Names::default();
    let touched = names.learn(resolved.clone(), 1);
    assert!(touched.len() <= resolved.addresses.len());
    assert!(names.due().is_some() || touched.is_empty());
    names.pass(u64::MAX / 2);
    assert!(names.due().is_none());
});
