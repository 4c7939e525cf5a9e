//! The status for people.

use comfy_table::{Table, presets};

use std::collections::BTreeSet;

use mesh_keyring::NodeName;

use super::{PeerStatus, PolicyCounters, PolicyStatus, Status};
use crate::agent::ExemptionState;

fn names(all: &BTreeSet<NodeName>) -> String {
    all.iter().map(NodeName::as_str).collect::<Vec<_>>().join(", ")
}

fn age(seconds: u64) -> String {
    match seconds {
        0..=119 => format!("{seconds} s"),
        120..=7199 => format!("{} min", seconds / 60),
        _ => format!("{} h", seconds / 3600),
    }
}

fn bytes(count: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{count} B") } else { format!("{value:.1} {}", units[unit]) }
}

impl PolicyStatus {
    fn line(&self) -> String {
        let state = match (self.mode.as_str(), self.standing) {
            ("off", _) => return "policy: off\n".to_owned(),
            (_, false) => "NOT STANDING",
            ("audit", true) => "AUDIT, nothing is denied",
            (_, true) => "standing",
        };
        let PolicyCounters { egress, ingress, spoofed, unknown, invalid, midstream } = &self.dropped;
        let mut text = format!(
            "policy: {state}; {} policies, {} pods, {} local addresses; dropped: {egress} egress, {ingress} ingress, {spoofed} spoofed, {unknown} unknown, {} out of place\n",
            self.policies,
            self.pods,
            self.local_addresses,
            invalid + midstream,
        );
        for over in &self.over_budget {
            text.push_str(&format!(
                "policy: OVER BUDGET {}: {}; {} ({})\n",
                over.object, over.reason, over.remedy, over.code
            ));
        }
        let named = self.over_budget.len();
        if self.over_budget_total > named {
            text.push_str(&format!("policy: OVER BUDGET: and {} more\n", self.over_budget_total - named));
        }
        if let Some(seconds) = self.behind_seconds {
            text.push_str(&format!("policy: a change has been under way for {seconds:.1} s\n"));
        }
        for problem in self.problems.iter().chain(&self.stale) {
            text.push_str(&format!("policy: {problem}\n"));
        }
        text
    }
}

impl Status {
    /// The status for people.
    pub fn to_table(&self) -> String {
        let mut text = format!(
            "{} (site {}, mesh {}): {}, {} of {} peers reached, {} backend, MTU {}\n",
            self.node,
            self.site,
            self.mesh,
            if self.ready { "ready" } else { "NOT READY" },
            self.peers.iter().filter(|peer| peer.is_up()).count(),
            self.peers.len(),
            self.backend,
            self.mtu
        );
        let addresses: Vec<String> = self.mesh_addresses.iter().map(ToString::to_string).collect();
        text.push_str(&format!("{} {}\n\n", self.interface, addresses.join(" ")));
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        table.set_header([
            "PEER",
            "SITE",
            "PATH",
            "ENCRYPTED",
            "STATE",
            "RTT",
            "LOSS",
            "MTU",
            "HANDSHAKE",
            "ENDPOINT",
            "RX",
            "TX",
        ]);
        for peer in &self.peers {
            table.add_row([
                peer.name.to_string(),
                peer.site.to_string(),
                peer.path.clone(),
                if peer.encrypted { "yes" } else { "NO" }.to_owned(),
                format!("{:?}", peer.state).to_lowercase(),
                peer.probed
                    .as_ref()
                    .and_then(|line| line.rtt_ms)
                    .map_or("-".to_owned(), |ms| format!("{ms} ms")),
                peer.probed.as_ref().map_or("-".to_owned(), |line| format!("{:.0} %", line.loss * 100.0)),
                peer.mtu.to_string(),
                peer.handshake_age_seconds.map_or("never".to_owned(), age),
                peer.endpoint.map_or("-".to_owned(), |e| e.to_string()),
                bytes(peer.rx_bytes),
                bytes(peer.tx_bytes),
            ]);
        }
        text.push_str(&table.to_string());
        text.push('\n');
        if !self.features.is_empty() {
            text.push_str(&format!("\ndevice: {}", self.features.join(" ")));
        }
        let guard = &self.guard;
        text.push_str(&format!(
            "\nguard: {}; dropped in clear: {} leaving, {} arriving; dropped on VXLAN: {}; unexempted clear text: {}\n",
            if guard.standing { "standing" } else { "NOT STANDING" },
            guard.egress_drops,
            guard.ingress_drops,
            guard.carrier_drops,
            guard.cleartext_drops
        ));
        if guard.grants == 0 {
            text.push_str("guard: no site has a grant (`sites`): a prefix is guarded once this node has seen its holder, not before\n");
        }
        for kept in &guard.kept {
            text.push_str(&format!(
                "guard: {} stays guarded; {} held it last, {} ago: {}\n",
                kept.prefix,
                kept.holder,
                age(kept.absent_seconds),
                kept.release
            ));
        }
        text.push_str(&self.policy.line());
        for one in &self.exemptions {
            let (exemption, peers) = (&one.exemption, names(&one.peers));
            text.push_str(&match one.state {
                ExemptionState::InUse => format!(
                    "CLEARTEXT to {peers} until {}: {} is exempt: {}\n",
                    exemption.expires(),
                    exemption.between(),
                    exemption.reason()
                ),
                ExemptionState::Unused => format!(
                    "exemption of {} until {}: not needed by any peer of this node\n",
                    exemption.between(),
                    exemption.expires()
                ),
                ExemptionState::Ended => {
                    format!("exemption of {}: ended at {}\n", exemption.between(), exemption.expires())
                }
                ExemptionState::TooLong => {
                    format!("exemption of {}: not in force, its end is too far away\n", exemption.between())
                }
            });
        }
        for refused in &self.refused {
            let node = refused.node.as_ref().map_or("registry", |n| n.as_str());
            text.push_str(&format!("refused: {node}: {}\n", refused.reason));
        }
        for node in &self.unpublished {
            text.push_str(&format!("not published: {node}\n"));
        }
        for error in &self.errors {
            text.push_str(&format!("error: {error}\n"));
        }
        text
    }
}

impl PeerStatus {
    /// How this peer is reached and why, for people.
    pub fn to_trace(&self) -> String {
        let mut text = format!(
            "{} (site {}): path {}, state {} since {}\n",
            self.name,
            self.site,
            self.path,
            format!("{:?}", self.state).to_lowercase(),
            self.since
        );
        text.push_str(&format!(
            "sends to {}, route MTU {}, handshake {}\n",
            self.endpoint.map_or("nowhere".to_owned(), |at| at.to_string()),
            self.mtu,
            self.handshake_age_seconds.map_or("never".to_owned(), |seconds| format!("{} ago", age(seconds)))
        ));
        if let Some(exemption) = &self.exemption {
            text.push_str(&format!(
                "in CLEARTEXT until {}, by the exemption of {}: {}\n",
                exemption.expires(),
                exemption.between(),
                exemption.reason()
            ));
        }
        text.push_str("\ndecisions, the last one last:\n");
        if self.decisions.is_empty() {
            text.push_str("  none: no address of it has answered a probe yet\n");
        }
        for decision in &self.decisions {
            text.push_str(&format!("  {}  {}\n", decision.at, decision.text));
        }
        text.push('\n');
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        table.set_header([
            "",
            "ADDRESS",
            "CARRIER",
            "KNOWN BY",
            "STATE",
            "HEARD",
            "RTT",
            "LOSS",
            "MTU",
            "SEES US AS",
        ]);
        let none = || "-".to_owned();
        for line in &self.candidates {
            let used = self.probed.as_ref().is_some_and(|used| used.address == line.address);
            table.add_row([
                if used { "*" } else { "" }.to_owned(),
                line.address.to_string(),
                line.rung.as_str().to_owned(),
                format!("{:?}", line.origin).to_lowercase(),
                format!("{:?}", line.state).to_lowercase(),
                if line.heard { "yes" } else { "no" }.to_owned(),
                line.rtt_ms.map_or_else(none, |ms| format!("{ms} ms")),
                format!("{:.0} %", line.loss * 100.0),
                line.mtu.map_or_else(none, |mtu| mtu.to_string()),
                line.seen_as.map_or_else(none, |at| at.to_string()),
            ]);
        }
        text.push_str(&table.to_string());
        text.push_str("\n* in use; HEARD: probes of the peer arrive by it. Heard and dead: only our packets, or their answers, get lost.\n");
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_ages_are_short() {
        assert_eq!(
            (bytes(12), bytes(2048), bytes(5 << 30)),
            ("12 B".into(), "2.0 KiB".into(), "5.0 GiB".into())
        );
        assert_eq!((age(5), age(150), age(10_000)), ("5 s".into(), "2 min".into(), "2 h".into()));
    }
}
