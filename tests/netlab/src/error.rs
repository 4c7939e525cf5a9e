use std::io;

use crate::capability::Feature;

/// What went wrong, on which object, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// This kernel, its configuration or this user's rights do not offer a feature.
    #[error("{feature} is not available: {why}")]
    Unsupported {
        /// The feature asked for.
        feature: Feature,
        /// What is missing and how to get it.
        why: String,
    },
    /// The description of the lab contradicts itself.
    #[error("lab description: {object}: {why}")]
    Spec {
        /// Site, host or pod, by name.
        object: String,
        /// What is wrong with it.
        why: String,
    },
    /// No namespace, site, host or pod of that name in the lab.
    #[error("the lab has no {kind} named {name:?}")]
    Unknown {
        /// `site`, `host`, `pod` or `namespace`.
        kind: &'static str,
        /// The name asked for.
        name: String,
    },
    /// A system call failed.
    #[error("{action}: {source}")]
    System {
        /// What was attempted, naming its object.
        action: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// `ip`, `tc` or `nft` refused a script.
    #[error("{tool} in namespace {namespace}: {message}")]
    Tool {
        /// Binary name.
        tool: &'static str,
        /// Namespace it ran in.
        namespace: String,
        /// Its stderr, and the script's text where short.
        message: String,
    },
    /// The lab was torn down while a handle to it lived on.
    #[error("namespace {namespace} is gone: its lab was torn down")]
    Gone {
        /// Namespace name.
        namespace: String,
    },
    /// A closure run in a namespace panicked.
    #[error("a closure panicked in namespace {namespace}")]
    Panicked {
        /// Namespace name.
        namespace: String,
    },
    /// The id names no rule that is in force in that namespace.
    #[error("namespace {namespace} has no block {id}")]
    UnknownBlock {
        /// Namespace name.
        namespace: String,
        /// The id's number.
        id: u64,
    },
}

impl Error {
    pub(crate) fn system(action: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
        let action = action.into();
        move |source| Error::System { action, source }
    }

    pub(crate) fn errno(action: impl Into<String>) -> impl FnOnce(nix::errno::Errno) -> Error {
        let action = action.into();
        move |errno| Error::System { action, source: errno.into() }
    }

    pub(crate) fn spec(object: impl Into<String>, why: impl Into<String>) -> Error {
        Error::Spec { object: object.into(), why: why.into() }
    }
}
