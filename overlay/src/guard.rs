//! The fail-closed guard: mesh prefixes enter and leave this node through mesh interfaces only.
//!
//! It is an nftables table that outlives the agent. It stands before any link comes up and judges packets by
//! address and interface alone, so that no crash, restart or half-done pass puts a mesh packet on the underlay.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use ipnet::IpNet;
use serde::Serialize;
use sha2::{Digest as _, Sha256};

use crate::local::InterfaceName;

/// The one nftables table that is ours, family `inet`.
pub const TABLE: &str = "sennit";

/// What the guard protects.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Guard {
    /// All prefixes of the mesh, aggregated.
    pub mesh: BTreeSet<IpNet>,
    /// Those of them that live on this node.
    pub local: BTreeSet<IpNet>,
    /// The interfaces that encrypt.
    pub interfaces: BTreeSet<InterfaceName>,
}

impl Guard {
    /// A short digest of what the guard protects; part of the table's comment, so that a restarted agent knows its
    /// own work.
    pub fn fingerprint(&self) -> String {
        let digest = Sha256::digest(self.rules());
        digest.iter().take(8).fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
    }

    /// The table as `nft -f` takes it. One transaction: there is no moment without a guard.
    pub fn render(&self) -> String {
        let mark = self.fingerprint();
        format!(
            "add table inet {TABLE}\ndelete table inet {TABLE}\ntable inet {TABLE} {{\n\tcomment \"sennit guard {mark}\"\n{}}}\n",
            self.rules()
        )
    }

    fn rules(&self) -> String {
        let mut text = String::new();
        for (name, nets) in [("mesh", &self.mesh), ("local", &self.local)] {
            for (family, v6) in [("4", false), ("6", true)] {
                let members: Vec<String> =
                    nets.iter().filter(|n| matches!(n, IpNet::V6(_)) == v6).map(IpNet::to_string).collect();
                let kind = if v6 { "ipv6_addr" } else { "ipv4_addr" };
                let _ = writeln!(text, "\tset {name}{family} {{\n\t\ttype {kind}\n\t\tflags interval");
                if !members.is_empty() {
                    let _ = writeln!(text, "\t\telements = {{ {} }}", members.join(", "));
                }
                text.push_str("\t}\n");
            }
        }
        let interfaces: Vec<String> = self.interfaces.iter().map(|i| format!("\"{i}\"")).collect();
        let interfaces = interfaces.join(", ");
        text.push_str("\tcounter egress {\n\t}\n\tcounter ingress {\n\t}\n");
        // After source NAT's priority nothing changes the packet any more; before conntrack's -200 nothing has yet.
        let _ = write!(
            text,
            "\tchain egress {{
\t\ttype filter hook postrouting priority 300; policy accept;
\t\toifname {{ {interfaces}, \"lo\" }} accept
\t\tip daddr @local4 accept
\t\tip6 daddr @local6 accept
\t\tip daddr @mesh4 counter name egress drop
\t\tip6 daddr @mesh6 counter name egress drop
\t}}
\tchain ingress {{
\t\ttype filter hook prerouting priority -300; policy accept;
\t\tiifname {{ {interfaces}, \"lo\" }} accept
\t\tip saddr @local4 accept
\t\tip6 saddr @local6 accept
\t\tip saddr @mesh4 counter name ingress drop
\t\tip6 saddr @mesh6 counter name ingress drop
\t}}
"
        );
        text
    }
}

/// The nft command that removes our table, and nothing else.
pub fn render_removal() -> String {
    format!("add table inet {TABLE}\ndelete table inet {TABLE}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guard(mesh: &[&str]) -> Guard {
        Guard {
            mesh: mesh.iter().map(|n| n.parse().unwrap()).collect(),
            local: BTreeSet::from(["10.1.1.0/24".parse().unwrap()]),
            interfaces: BTreeSet::from(["sennit0".parse().unwrap()]),
        }
    }

    #[test]
    fn the_ruleset_replaces_our_table_alone_in_one_transaction() {
        let text = guard(&["10.0.0.0/8", "fd00::/16"]).render();
        assert!(
            text.starts_with("add table inet sennit\ndelete table inet sennit\ntable inet sennit {"),
            "{text}"
        );
        assert!(!text.contains("flush"), "{text}");
        assert_eq!(text.matches("drop").count(), 4, "{text}");
        assert!(
            text.contains("elements = { 10.0.0.0/8 }") && text.contains("elements = { fd00::/16 }"),
            "{text}"
        );
    }

    #[test]
    fn another_prefix_gives_another_fingerprint() {
        assert_eq!(guard(&["10.0.0.0/8"]).fingerprint(), guard(&["10.0.0.0/8"]).fingerprint());
        assert_ne!(guard(&["10.0.0.0/8"]).fingerprint(), guard(&["10.0.0.0/9"]).fingerprint());
    }
}
