//! Path probers of many nodes on a network that is only imagined, with a clock that is stepped: what takes half an hour in network
//! namespaces takes seconds, and the same seed gives the same run.

mod network;
mod random;

pub use network::{Network, NodeId, World};
pub use random::Random;
