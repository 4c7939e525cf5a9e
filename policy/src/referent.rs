//! What policies refer to beside pods and namespaces: tiers, network sets, host endpoints, service accounts, services.

use crate::endpoints::Endpoints;
use crate::model::{ObjectId, Tier};
use crate::object::{Account, ObjectError};
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
    /// What people are told of it if a part of it was refused.
    pub fn refusal(&self) -> Option<String> {
        self.fault.as_ref().map(|fault| refusal(&self.id, fault, self.what.is_some()))
    }
}

/// What people are told of an object that was refused, as a whole or in part.
pub(crate) fn refusal(id: &ObjectId, fault: &ObjectError, counts: bool) -> String {
    format!("{id}: {fault}; until it is mended, {}", meanwhile(counts))
}

pub(crate) fn meanwhile(counts: bool) -> &'static str {
    if counts { "the rest of it counts" } else { "it counts for nothing" }
}
