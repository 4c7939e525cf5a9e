//! Zero-trust policy: what may talk to what, decided from labels and addresses.
//!
//! So far this crate owns the selection of objects by their labels ([`LabelSelector`]); nothing in it enforces
//! anything yet. It never sees the overlay, and touches no kernel.

mod selector;

pub use selector::{LabelSelector, Requirement, SelectorError};
