//! Zero-trust policy: what may talk to what, decided from labels and addresses, and enforced by nftables.
//!
//! ```text
//! manifests -> networkpolicy, clusternetworkpolicy -> Policy \
//! Pod, Namespace, nodes -------------> World  > State -> evaluate (one flow, the oracle)
//!                                              \-> compile -> Ruleset, changes -> nft (netlink) | render (text)
//! NFLOG -> flowlog -> JSON lines
//! ```
//! Everything but [`nft`] and the socket of [`flowlog`] is pure. It never sees the overlay.

pub mod budget;
pub mod calico;
pub mod clusternetworkpolicy;
pub mod compile;
pub mod dns;
pub mod endpoints;
pub mod enforce;
pub mod evaluate;
pub mod explain;
pub mod failsafe;
mod field;
pub mod flowlog;
pub mod interface;
pub mod kind;
pub mod meshpolicy;
pub mod model;
pub mod names;
pub mod networkpolicy;
pub mod nft;
pub mod object;
pub mod probe;
pub mod protocol;
pub mod referent;
pub mod refusal;
pub mod render;
pub mod ruleset;
mod selector;
pub mod state;
pub mod tiers;
pub mod unread;
pub mod world;

pub use compile::{Compiler, Delta};
pub use enforce::Enforcer;
pub use evaluate::{Decision, Flow, Judgement, Reason, evaluate};
pub use protocol::Protocol;
pub use selector::{LabelSelector, Requirement, SelectorError};
pub use state::{Event, State, Touched};
pub use tiers::PolicySet;
pub use world::World;

pub use kind::{Kind, Said};
