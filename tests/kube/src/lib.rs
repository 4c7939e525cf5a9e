//! The mesh over real Kubernetes APIs: etcd and kube-apiserver run in a host of a lab, agents in the others.
//!
//! [`programs`] finds what `binaries.sh` got, [`pki`] makes the certificates, [`cluster`] is a control plane, and [`mesh`] the
//! nodes of one mesh that register with it. `run.sh` is the way in: `make kube-test`.

pub mod cluster;
pub mod crowd;
pub mod images;
pub mod mesh;
pub mod node;
pub mod pki;
pub mod programs;
pub mod relay;
pub mod whole;

use std::time::{Duration, Instant};

/// What a control plane or a mesh may take for anything.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Waits for a condition, at most [`PATIENCE`].
///
/// # Errors
/// What the condition said last.
pub fn eventually<T>(what: &str, mut condition: impl FnMut() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let until = Instant::now() + PATIENCE;
    loop {
        match condition() {
            Ok(done) => return Ok(done),
            Err(error) if Instant::now() >= until => {
                return Err(error.context(format!("not within {} s: {what}", PATIENCE.as_secs())));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
    }
}
