//! Calico's way of saying things (projectcalico.org/v3).

pub mod selector;
