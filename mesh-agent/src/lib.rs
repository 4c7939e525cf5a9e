//! The node agent: it publishes this node, watches the others, and keeps the host as the plan says.
//!
//! ```text
//! registry snapshot, underlay, names --> agent (pure) --> Desired --> reconcile: observe, diff, apply
//! ```
//!
//! `agent` decides and touches nothing; `reconcile` is the only place that awaits the host; `run` joins them to
//! signals, timers and the status socket.

pub mod agent;
pub mod atomic;
pub mod boot;
pub mod bypass;
pub mod cli;
pub mod commands;
pub mod config;
pub mod descriptors;
pub mod federate;
pub mod identity;
pub mod manifest;
pub mod notify;
pub mod policing;
pub mod probing;
pub mod problem;
pub mod reach;
pub mod reconcile;
pub mod registry;
pub mod resolve;
pub mod run;
pub mod settings;
pub mod state;
pub mod status;
