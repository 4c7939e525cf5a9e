//! A pair of UDP sockets on one port, and batches of datagrams through them.
//!
//! Both ways one system call carries several messages, and one message several datagrams of the same length: the
//! kernel splits what is sent (`UDP_SEGMENT`) and joins what arrives (`UDP_GRO`). Where it does not, or refuses, the
//! same datagrams travel one by one.

mod address;
mod control;
pub mod filter;
mod pair;
mod receive;
mod refusals;
mod runs;
mod send;

pub use pair::UdpPair;
pub use receive::{ReceiveBatch, Train};
pub use send::{SendBatch, SendReport};
