//! The mesh with the kernel's WireGuard: an emulated machine whose kernel has it, joined to a lab of network
//! namespaces where `mesh-wg` runs.
//!
//! ```text
//!  site east          site west           site kernel
//!  east-1 + pod       west-1 + pod        bridge `lan` -- tap0 -- QEMU: kernel-1 + pod
//!  mesh-wg            mesh-wg                               kernel WireGuard
//!       \________________ core ________________/
//! ```
//!
//! Commands go to the guest over a virtio-serial port ([`channel`]); [`mesh`] copies the registry's publications over
//! it. All of it lives in the lab's namespaces and ends with the test program.

pub mod channel;
pub mod figures;
pub mod guest;
pub mod host;
pub mod mesh;
pub mod transfer;
