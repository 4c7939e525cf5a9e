//! What the lab reads from `mesh-agent status -o json`.

use serde::Deserialize;
use serde_json::Value;

/// One node's status; fields that the lab does not use are left to [`NodeStatus::document`].
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeStatus {
    /// The node's name.
    pub node: String,
    /// Whether the agent calls itself ready.
    #[serde(default)]
    pub ready: bool,
    /// The name of the WireGuard interface.
    #[serde(default)]
    pub interface: String,
    /// The node's addresses in the mesh.
    #[serde(default)]
    pub mesh_addresses: Vec<std::net::IpAddr>,
    /// The peers that it has.
    #[serde(default)]
    pub peers: Vec<PeerStatus>,
    /// The whole document, for `status` steps.
    #[serde(skip)]
    pub document: Value,
}

/// One peer as a node sees it.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PeerStatus {
    /// The peer's node name.
    pub name: String,
    /// `established`, `waiting` or `stale`.
    #[serde(default)]
    pub state: String,
    /// Whether the path to it is encrypted.
    #[serde(default)]
    pub encrypted: bool,
    /// `direct`, `vxlan` ...
    #[serde(default)]
    pub path: Option<String>,
    /// Seconds since the last handshake.
    #[serde(default)]
    pub handshake_age_seconds: Option<f64>,
    /// Bytes received through the tunnel.
    #[serde(default)]
    pub rx_bytes: u64,
    /// Bytes sent through the tunnel.
    #[serde(default)]
    pub tx_bytes: u64,
}

impl NodeStatus {
    /// Reads the JSON that the agent prints.
    ///
    /// # Errors
    /// A sentence when it is no JSON or not the agreed document.
    pub fn parse(text: &str) -> Result<Self, String> {
        let document: Value =
            serde_json::from_str(text).map_err(|error| format!("status is no JSON: {error}"))?;
        let mut status: Self =
            Self::deserialize(&document).map_err(|error| format!("status is not as agreed: {error}"))?;
        status.document = document;
        Ok(status)
    }

    /// The node's view of a peer.
    pub fn peer(&self, name: &str) -> Option<&PeerStatus> {
        self.peers.iter().find(|peer| peer.name == name)
    }

    /// Why this node has no live encrypted tunnel to the peer, if so.
    pub fn lacks_tunnel_to(&self, name: &str) -> Option<String> {
        match self.peer(name) {
            None => Some(format!("{} does not know {name}", self.node)),
            Some(peer) if peer.state != "established" || peer.handshake_age_seconds.is_none() => {
                Some(format!(
                    "{} -> {name} is {}",
                    self.node,
                    if peer.state.is_empty() { "unknown" } else { &peer.state }
                ))
            }
            Some(peer) if !peer.encrypted => Some(format!("{} -> {name} is not encrypted", self.node)),
            Some(_) => None,
        }
    }
}

/// The pairs of these nodes without a tunnel by the status of both ends, as sentences, and how many are fine.
/// `why` explains a missing tunnel, where that is known.
pub fn missing_handshakes(
    nodes: &[&str],
    statuses: &[Result<NodeStatus, String>],
    why: impl Fn(&str, &str) -> Option<&'static str>,
) -> (usize, Vec<String>) {
    let mut good = 0;
    let mut missing = Vec::new();
    let of = |name: &str| statuses.iter().flatten().find(|status| status.node == name);
    for (index, a) in nodes.iter().enumerate() {
        for b in &nodes[index + 1..] {
            let views = [(a, b), (b, a)].map(|(here, there)| match of(here) {
                Some(status) => status.lacks_tunnel_to(there),
                None => Some(format!("{here} gives no status")),
            });
            match views.into_iter().flatten().next() {
                None => good += 1,
                Some(sentence) => missing.push(match why(a, b) {
                    Some(reason) => format!("{sentence}: {reason}"),
                    None => sentence,
                }),
            }
        }
    }
    missing.extend(statuses.iter().filter_map(|status| status.as_ref().err().cloned()));
    missing.dedup();
    (good, missing)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(node: &str, peers: &[(&str, &str, bool)]) -> Result<NodeStatus, String> {
        let peers: Vec<Value> = peers
            .iter()
            .map(|(name, state, encrypted)| {
                serde_json::json!({"name": name, "state": state, "encrypted": encrypted, "handshakeAgeSeconds": 1,
                    "fieldOfTomorrow": 1})
            })
            .collect();
        NodeStatus::parse(&serde_json::json!({"node": node, "peers": peers}).to_string())
    }

    #[test]
    fn a_pair_counts_only_when_both_ends_say_so() {
        let statuses = [
            status("a", &[("b", "established", true), ("c", "established", true)]),
            status("b", &[("a", "established", true), ("c", "established", false)]),
            status("c", &[("a", "waiting", true), ("b", "established", true)]),
        ];
        let (good, missing) = missing_handshakes(&["a", "b", "c"], &statuses, |_, _| None);
        assert_eq!(good, 1);
        assert_eq!(missing, ["c -> a is waiting", "b -> c is not encrypted"]);
    }

    #[test]
    fn a_silent_agent_is_named() {
        let statuses = [status("a", &[("b", "established", true)]), Err("b: no answer".to_owned())];
        let (good, missing) = missing_handshakes(&["a", "b"], &statuses, |_, _| None);
        assert_eq!(good, 0);
        assert!(
            missing.contains(&"b gives no status".to_owned()) && missing.contains(&"b: no answer".to_owned())
        );
    }

    #[test]
    fn a_known_reason_follows_the_missing_tunnel() {
        let statuses = [status("a", &[("b", "waiting", true)]), status("b", &[("a", "waiting", true)])];
        let (_, missing) = missing_handshakes(&["a", "b"], &statuses, |_, _| Some("both are behind NAT"));
        assert_eq!(missing, ["a -> b is waiting: both are behind NAT"]);
    }

    #[test]
    fn a_document_that_is_not_as_agreed_is_refused() {
        assert!(NodeStatus::parse("{").is_err());
        assert!(NodeStatus::parse("{\"peers\": 3, \"node\": \"a\"}").unwrap_err().contains("not as agreed"));
    }
}
