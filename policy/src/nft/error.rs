//! What can go wrong between us and nf_tables, and what to do about it.

use std::io;

use nix::errno::Errno;

use super::wire::{Message, Messages, kind};

/// The kernel, or the way to it, said no.
#[derive(Debug, thiserror::Error)]
pub enum NftError {
    /// There is no socket.
    #[error("{action}: {source}")]
    Socket {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The kernel refused a request; of a transaction nothing happened.
    #[error("{action}: {}{}{}", message.as_deref().map(|message| format!("{message}: ")).unwrap_or_default(), errno.desc(), remedy(*errno))]
    Refused {
        /// What was tried.
        action: &'static str,
        /// The message that it refused first, in words; `None` when it was the whole.
        message: Option<String>,
        /// The change that message was for, as an index into the list.
        change: Option<usize>,
        /// Why.
        errno: Errno,
    },
}

impl NftError {
    pub(crate) fn whole(action: &'static str, errno: Errno) -> Self {
        Self::Refused { action, message: None, change: None, errno }
    }

    /// Returns whether another ruleset may be taken: what was refused is in what was sent, not in how. Not for lack of memory, which
    /// may be somebody else's.
    pub(crate) fn is_about_contents(&self) -> bool {
        use Errno::{E2BIG, EINVAL, ELOOP, EMLINK, EMSGSIZE, ENFILE, ENOSPC, EOPNOTSUPP, EOVERFLOW, ERANGE};
        let Self::Refused { errno, .. } = self else { return false };
        matches!(
            errno,
            E2BIG | EINVAL | ELOOP | EMLINK | EMSGSIZE | ENFILE | ENOSPC | EOPNOTSUPP | EOVERFLOW | ERANGE
        )
    }
}

fn remedy(errno: Errno) -> &'static str {
    match errno {
        Errno::EPERM => {
            " (it takes CAP_NET_ADMIN, and no other process may own the table: see `nft list tables`)"
        }
        Errno::ENOENT => {
            " (something that it needs is gone: somebody else changed the table, or this kernel lacks the module nft_fib_inet, \
             which policy.checkSources needs)"
        }
        Errno::EEXIST => {
            " (it is there already: somebody else changed the table; write the whole ruleset anew)"
        }
        Errno::EBUSY => " (something leads there still that is not ours: delete the table and write it anew)",
        Errno::EOPNOTSUPP | Errno::EAFNOSUPPORT | Errno::EPROTONOSUPPORT => {
            " (this kernel lacks a part of nf_tables: CONFIG_NF_TABLES_INET, CONFIG_NFT_CT, CONFIG_NFT_LIMIT, \
             CONFIG_NFT_LOG)"
        }
        Errno::EMSGSIZE => {
            " (one transaction is larger than the socket may send: it takes CAP_NET_ADMIN or more of net.core.wmem_max)"
        }
        Errno::EMLINK | Errno::ELOOP => " (chains jump in a circle, or deeper than 16)",
        Errno::ENFILE | Errno::ENOMEM => " (the kernel is out of memory or room)",
        Errno::EINTR => " (others change nf_tables faster than it can be read; try again)",
        Errno::ETIMEDOUT => " (the kernel did not answer)",
        _ => "",
    }
}

/// The message with a sequence number, in words.
pub(super) fn describe(bytes: &[u8], sequence: u32) -> Option<String> {
    let message = Messages(bytes).find(|message| message.sequence == sequence)?;
    let (what, name) = match message.nft_kind()? {
        kind::NEWTABLE => ("adding the table", 1),
        kind::DELTABLE => ("deleting the table", 1),
        kind::NEWCHAIN => ("adding chain", 3),
        kind::DELCHAIN => ("deleting chain", 3),
        kind::NEWRULE => ("adding a rule to chain", 2),
        kind::DELRULE => ("flushing chain", 2),
        kind::NEWSET => ("adding set", 2),
        kind::DELSET => ("deleting set", 2),
        kind::NEWSETELEM => ("adding elements to set", 2),
        kind::DELSETELEM => ("removing elements from set", 2),
        kind::NEWOBJ => ("adding counter", 2),
        kind::DELOBJ => ("deleting counter", 2),
        _ => return None,
    };
    Some(format!("{what} {}", named(&message, name)))
}

fn named<'a>(message: &Message<'a>, attribute: u16) -> &'a str {
    message.attributes().text(attribute).unwrap_or("without a name")
}

#[cfg(test)]
mod tests {
    use super::super::object;
    use super::super::wire::Batch;
    use super::*;
    use crate::render::Slot;

    #[test]
    fn a_refused_message_is_named() {
        let mut batch = Batch::default();
        batch.begin(5);
        object::counter(&mut batch, "denied");
        object::chain(&mut batch, Slot::B, "x", None);
        batch.end();
        assert_eq!(describe(batch.bytes(), 7).as_deref(), Some("adding chain b_x"));
        assert_eq!(describe(batch.bytes(), 9), None);
    }

    #[test]
    fn an_error_says_what_it_was_about_and_what_to_do() {
        let error = NftError::Refused {
            action: "changing the policy",
            message: Some("adding chain a_x".to_owned()),
            change: Some(3),
            errno: Errno::EEXIST,
        };
        let said = error.to_string();
        assert!(
            said.starts_with("changing the policy: adding chain a_x: File exists (it is there"),
            "{said}"
        );
    }
}
