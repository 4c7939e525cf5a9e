//! The status as Prometheus reads it (text exposition format 0.0.4).

use std::collections::BTreeMap;
use std::fmt::Write as _;

use mesh_overlay::path::Reach;

use super::{PeerStatus, Status};
use crate::agent::{Exempted, ExemptionState};

/// A label's value.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

struct Page(String);

impl Page {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl std::fmt::Display) {
        let labels: Vec<_> =
            labels.iter().map(|(key, value)| format!("{key}=\"{}\"", escaped(value))).collect();
        let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
        let _ = writeln!(self.0, "{name}{labels} {value}");
    }

    fn one(&mut self, name: &str, kind: &str, help: &str, value: impl std::fmt::Display) {
        self.family(name, kind, help);
        self.sample(name, &[], value);
    }
}

impl Status {
    /// The status as metrics.
    pub fn to_metrics(&self) -> String {
        let mut page = Page(String::new());
        page.one(
            "sennit_ready",
            "gauge",
            "Whether the last pass brought all to where it should be.",
            u8::from(self.ready),
        );
        page.one("sennit_errors", "gauge", "What is wrong on this host, by count.", self.errors.len());
        page.one(
            "sennit_refused",
            "gauge",
            "What was refused of nodes' claims and manifests, by count.",
            self.refused.len(),
        );
        page.one(
            "sennit_guard_standing",
            "gauge",
            "Whether the guard stands.",
            u8::from(self.guard.standing),
        );
        page.one(
            "sennit_guard_kept_prefixes",
            "gauge",
            "Prefixes that nobody holds any more and that stay guarded.",
            self.guard.kept.len(),
        );
        let name = "sennit_guard_dropped_packets_total";
        page.family(name, "counter", "Packets that the guard dropped, by where.");
        for (place, count) in [
            ("egress", self.guard.egress_drops),
            ("ingress", self.guard.ingress_drops),
            ("carrier", self.guard.carrier_drops),
            ("cleartext", self.guard.cleartext_drops),
        ] {
            page.sample(name, &[("where", place)], count);
        }
        self.policy_metrics(&mut page);
        self.peer_metrics(&mut page);
        let name = "sennit_exemption_expires_seconds";
        page.family(name, "gauge", "When an exemption from encryption ends, in seconds since 1970.");
        // Of two that differ in their end alone the later one counts.
        let mut ends = BTreeMap::new();
        for Exempted { exemption, .. } in &self.exemptions {
            let end = ends.entry((exemption.between(), exemption.reason())).or_insert(exemption.expires());
            *end = exemption.expires().max(*end);
        }
        for ((between, reason), end) in ends {
            page.sample(name, &[("between", &between), ("reason", reason)], end.as_second());
        }
        let in_use = self.exemptions.iter().filter(|one| one.state == ExemptionState::InUse).count();
        page.one("sennit_exemptions_in_use", "gauge", "Exemptions by which packets travel in clear.", in_use);
        page.0
    }

    fn policy_metrics(&self, page: &mut Page) {
        let policy = &self.policy;
        page.one(
            "sennit_policy_standing",
            "gauge",
            "Whether the kernel has what policy says.",
            u8::from(policy.standing),
        );
        page.one(
            "sennit_policy_refused",
            "gauge",
            "Objects of policy that were refused, by count.",
            policy.problems.len(),
        );
        page.one(
            "sennit_policy_over_budget",
            "gauge",
            "Namespaces and policies that are closed since they are over a budget, by count.",
            policy.over_budget_total,
        );
        let name = "sennit_policy_objects";
        page.family(name, "gauge", "What policy is decided from, by kind.");
        for (kind, count) in
            [("policy", policy.policies), ("pod", policy.pods), ("local-address", policy.local_addresses)]
        {
            page.sample(name, &[("kind", kind)], count);
        }
        let name = "sennit_policy_dropped_packets_total";
        page.family(name, "counter", "Packets that policy dropped, or would have in audit, by where.");
        let dropped = &policy.dropped;
        for (place, count) in [
            ("egress", dropped.egress),
            ("ingress", dropped.ingress),
            ("spoofed", dropped.spoofed),
            ("unknown", dropped.unknown),
            ("invalid", dropped.invalid),
            ("midstream", dropped.midstream),
        ] {
            page.sample(name, &[("where", place)], count);
        }
        for (name, help, count) in [
            ("sennit_policy_transactions_total", "Transactions written to nftables.", policy.transactions),
            ("sennit_policy_flow_lines_total", "Lines written to the flow log.", policy.flows_written),
            ("sennit_policy_flow_lost_total", "What was lost on the way to the flow log.", policy.flows_lost),
        ] {
            page.one(name, "counter", help, count);
        }
    }

    fn peer_metrics(&self, page: &mut Page) {
        let name = "sennit_peer_path";
        page.family(
            name,
            "gauge",
            "1 for the path that carries packets to a peer, and whether they are encrypted.",
        );
        for peer in &self.peers {
            let (node, site) = (peer.name.as_str(), peer.site.as_str());
            let encrypted = if peer.encrypted { "true" } else { "false" };
            page.sample(
                name,
                &[("peer", node), ("site", site), ("path", &peer.path), ("encrypted", encrypted)],
                1,
            );
        }
        self.per_peer(
            page,
            "sennit_peer_up",
            "gauge",
            "Whether a peer is reached: a live handshake, or an exempt peer that answers.",
            |peer| Some(u8::from(peer.is_up())),
        );
        self.per_peer(
            page,
            "sennit_peer_reached",
            "gauge",
            "Whether packets go through the tunnel to a peer and back.",
            |peer| match peer.reach() {
                Reach::Unknown => None,
                reach => Some(u8::from(reach == Reach::Reached)),
            },
        );
        self.per_peer(page, "sennit_peer_mtu_bytes", "gauge", "The MTU of routes to a peer.", |peer| {
            Some(peer.mtu)
        });
        self.per_peer(
            page,
            "sennit_peer_rtt_seconds",
            "gauge",
            "Smoothed round-trip time of probes on the path in use.",
            |peer| Some(peer.probed.as_ref()?.rtt_ms? / 1000.0),
        );
        self.per_peer(
            page,
            "sennit_peer_loss_ratio",
            "gauge",
            "Share of probes lost on the path in use.",
            |peer| Some(peer.probed.as_ref()?.loss),
        );
        self.per_peer(
            page,
            "sennit_peer_receive_bytes_total",
            "counter",
            "Bytes received from a peer.",
            |peer| Some(peer.rx_bytes),
        );
        self.per_peer(page, "sennit_peer_transmit_bytes_total", "counter", "Bytes sent to a peer.", |peer| {
            Some(peer.tx_bytes)
        });
        self.per_peer(
            page,
            "sennit_peer_handshake_age_seconds",
            "gauge",
            "Seconds since the last handshake with a peer.",
            |peer| peer.handshake_age_seconds,
        );
    }

    /// A family with one sample for each peer of which there is something to tell.
    fn per_peer<T: std::fmt::Display>(
        &self,
        page: &mut Page,
        name: &str,
        kind: &str,
        help: &str,
        value: impl Fn(&PeerStatus) -> Option<T>,
    ) {
        page.family(name, kind, help);
        for peer in &self.peers {
            if let Some(value) = value(peer) {
                page.sample(name, &[("peer", peer.name.as_str()), ("site", peer.site.as_str())], value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_can_hold_anything() {
        let mut page = Page(String::new());
        page.sample("a", &[("b", "say \"x\\y\"\n")], 1);
        assert_eq!(page.0, "a{b=\"say \\\"x\\\\y\\\"\\n\"} 1\n");
    }
}
