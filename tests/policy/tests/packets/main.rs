//! What no public suite covers, with real packets through the kernel.

mod calico;
mod hosts;
mod live;
mod names;
mod places;
mod rules;
mod services;
mod sources;
mod tenants;

use std::net::IpAddr;

use policy_tests::{Packet, Rig};

/// A rig on a thread of its own. Without root the test is left out loudly; under `CI=true` it fails.
pub(crate) fn in_rig(name: &str, test: impl FnOnce(Rig) -> anyhow::Result<()> + Send + 'static) {
    with_settings(name, policy_tests::rig::settings(), test);
}

pub(crate) fn with_settings(
    name: &str,
    settings: mesh_policy::compile::Settings,
    test: impl FnOnce(Rig) -> anyhow::Result<()> + Send + 'static,
) {
    if !nix::unistd::geteuid().is_root() {
        assert!(std::env::var("CI").as_deref() != Ok("true"), "SKIPPED {name}: real packets need root");
        eprintln!("SKIPPED {name}: real packets need root");
        return;
    }
    let run = move || Rig::new(settings, Default::default()).and_then(test);
    let ended = std::thread::spawn(run).join();
    match ended {
        Ok(Ok(())) => {}
        Ok(Err(error)) => panic!("{error:?}"),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

pub(crate) fn address(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;

/// The first packet of a flow to port 80.
pub(crate) fn first(rig: &mut Rig, source: &str, destination: &str, protocol: u8) -> Packet {
    let number = rig.number();
    Packet::first(address(source), address(destination), protocol, 80, number)
}
