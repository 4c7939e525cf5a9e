//! Policies against real packets.
//!
//! ```text
//! Rig: a thread in a network namespace of its own
//!   pods0 (TUN)   <- packets of pods and of hosts beside the mesh ->  \
//!                                                                      forwarding, nftables: the ruleset under test
//!   sennit0 (TUN) <- packets that a tunnel has decrypted          ->  /
//! ```
//! A packet that is sent has been judged when the call returns: what passed waits at a TUN device, and nothing else ever comes. So
//! denials need no waiting.

pub mod networks;
pub mod objects;
pub mod oracle;
pub mod packet;
pub mod polprog;
pub mod rig;
pub mod selectors;
pub mod tenants;
pub mod upstream;

pub use packet::Packet;
pub use rig::{Link, Rig};
