//! Judges what a pass has seen: whether packets get where they are to, and whether a problem keeps the agent from being ready.

use std::time::{Instant, SystemTime};

use super::Running;
use crate::config::Mode;
use crate::reach::{self, Forwarding};
use crate::status::Reports;

impl Running {
    /// Judges whether packets get where they are to.
    pub(super) async fn look_at_reach(&mut self, reports: &Reports, wall: SystemTime) {
        let denied = if self.reach.misses(&self.pass.guard) {
            let dropped = self.policing.status().await.dropped;
            // In audit it counts what passes.
            let audit = self.config.policy.mode == Mode::Audit;
            let all = dropped.egress + dropped.ingress + dropped.spoofed + dropped.unknown;
            self.denied = if audit { 0 } else { all + dropped.invalid + dropped.midstream };
            self.denied
        } else {
            self.denied
        };
        let seen = reach::Seen {
            plan: &self.desired.plan,
            own: &self.desired.last_good.prefixes,
            reports,
            guard: &self.pass.guard,
            forwarding: Forwarding::read(self.agent.forwarding(), self.config.wireguard.interface.as_str()),
            closed: self.bypass.closed(),
        };
        self.reach.look(&seen, denied, (Instant::now(), wall));
        self.probing.cut_off(self.reach.cuts_pods_off());
    }

    /// Reports whether a problem keeps the agent from being ready.
    pub(super) fn blocked(&self) -> bool {
        self.bypass.blocks()
            || self.reach.blocks()
            || self.identity.blocks()
            || self.estranged.iter().any(|problem| problem.blocks)
    }
}
