//! What becomes of the operator's exemptions.

use std::collections::BTreeSet;

use jiff::Timestamp;
use mesh_keyring::NodeName;
use mesh_overlay::exemption::{DAYS_MOST, Standing};
use mesh_overlay::{Exemption, MeshPlan};
use serde::{Deserialize, Serialize};

use super::Agent;

/// Whether packets travel in clear by an exemption.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum ExemptionState {
    /// They do.
    InUse,
    /// It is in force, but all peers of this node that it names can do WireGuard.
    Unused,
    /// It has ended, and whom it was for is reached no more.
    Ended,
    /// Its end is too far away for an end: it is not in force.
    TooLong,
}

/// An exemption, as this node sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Exempted {
    /// What the operator has written.
    #[serde(flatten)]
    pub exemption: Exemption,
    /// What becomes of it.
    pub state: ExemptionState,
    /// The peers to which packets travel in clear by it.
    pub peers: BTreeSet<NodeName>,
}

impl Exempted {
    pub(super) fn of(exemption: Exemption, now: Option<Timestamp>, plan: &MeshPlan) -> Self {
        let by_it = plan.peers.iter().filter(|(_, peer)| peer.exemption.as_ref() == Some(&exemption));
        let peers: BTreeSet<NodeName> = by_it.map(|(name, _)| name.clone()).collect();
        let state = match now.map(|now| exemption.standing(now)) {
            Some(Standing::Ended) => ExemptionState::Ended,
            Some(Standing::TooLong) => ExemptionState::TooLong,
            _ if peers.is_empty() => ExemptionState::Unused,
            _ => ExemptionState::InUse,
        };
        Self { exemption, state, peers }
    }
}

impl Agent {
    /// All exemptions that the operator has written, in force or not: agent.yaml's and the Mesh's.
    pub(super) fn exemptions(&self) -> impl Iterator<Item = &Exemption> {
        let of_mesh = self.last_good.settings.iter().flat_map(|mesh| &mesh.exemptions);
        self.config.encryption.exemptions.iter().chain(of_mesh)
    }

    /// When the next exemption ends.
    pub fn exempt_until(&self) -> Option<Timestamp> {
        let now = self.today?;
        self.exemptions().map(Exemption::expires).filter(|until| *until > now).min()
    }

    /// Words on exemptions whose end is too far away.
    pub fn endless(&self) -> impl Iterator<Item = String> {
        let too_long =
            |one: &&Exemption| self.today.is_some_and(|now| one.standing(now) == Standing::TooLong);
        self.exemptions().filter(too_long).map(|one| {
            format!(
                "the exemption of {} ends at {}: more than {DAYS_MOST} days from now is no end, so it is not in force",
                one.between(),
                one.expires()
            )
        })
    }
}
