//! What policies refer to beside pods and namespaces: tiers, network sets, host endpoints, service accounts, services.

use crate::endpoints::Endpoints;
use crate::field::Faults;
use crate::model::{ObjectId, Tier};
use crate::object::{Account, ObjectError};
use crate::refusal::{Outcome, Refusal};
use crate::world::Networks;

/// Something that policies refer to, and what is wrong with its object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Referent {
    /// The object.
    pub id: ObjectId,
    /// What it is; `None`: nothing of it is understood.
    pub what: Option<What>,
    /// What is wrong with it.
    pub fault: Option<ObjectError>,
    /// What else.
    pub more: Vec<ObjectError>,
    /// The object's effect until the faults are corrected.
    pub outcome: Outcome,
}

/// What it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// A tier.
    Tier(Tier),
    /// Addresses with labels.
    Networks(Networks),
    /// A service account.
    Account(Account),
    /// Endpoints of a Service.
    Endpoints(Endpoints),
}

impl Referent {
    pub(crate) fn of(id: ObjectId, what: Option<What>, faults: Faults) -> Self {
        let outcome = match &what {
            None => Outcome::Nothing,
            Some(What::Networks(networks)) if networks.unread.is_any() => Outcome::Listed,
            Some(What::Endpoints(endpoints)) if endpoints.unread => Outcome::Listed,
            Some(_) => Outcome::Rest,
        };
        Self { id, what, fault: faults.first, more: faults.more, outcome }
    }

    /// Returns the refused parts, if any.
    pub fn refusal(&self) -> Option<Refusal> {
        Refusal::of(self.fault.iter().chain(&self.more), self.outcome)
    }
}
