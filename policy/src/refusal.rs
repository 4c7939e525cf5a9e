//! The report about an object that was refused, wholly or in part.

use std::fmt;

use crate::model::ObjectId;
use crate::object::ObjectError;

/// The most faults of one object that are told in one line.
const TOLD_MOST: usize = 8;

/// The effect of an object until its faults are corrected. If several apply, the last one is
/// reported, since it is the widest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Outcome {
    /// The fault affects nothing else in the object.
    #[default]
    Rest,
    /// It is staged.
    Staged,
    /// Single rules were refused.
    Rules,
    /// All rules were refused together, as the API requires.
    Isolates,
    /// The policy's order or tier was refused.
    First,
    /// The selector was refused. The policy applies to its whole namespace.
    Namespace,
    /// The selector was refused. The policy applies to nobody, since it could mean anybody.
    Nobody,
    /// A part of what it lists was refused, of something that policies refer to.
    Listed,
    /// By which interface a host is protected was refused.
    Unprotected,
    /// All of something that policies refer to was refused.
    Nothing,
}

impl Outcome {
    /// It, in words.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Rest => "the rest of it counts",
            Self::Staged => "what it would do is not told in full",
            Self::Rules => "such a rule accepts nothing, or denies all",
            Self::Isolates => "it isolates what it selects and allows nothing",
            Self::First => "it comes first in its tier and allows nothing",
            Self::Namespace => "it isolates its whole namespace and allows nothing",
            Self::Nobody => "it counts for nothing: what it denies is not denied",
            Self::Listed => {
                "rules that deny or pass what it lists deny everybody, and rules that allow all others allow nobody"
            }
            Self::Unprotected => "it protects no interface; rules that refer to it know its addresses alone",
            Self::Nothing => "it counts for nothing",
        }
    }
}

/// The refused parts of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Why, fault by fault.
    pub faults: Vec<ObjectError>,
    /// The object's effect until the faults are corrected.
    pub outcome: Outcome,
}

impl Refusal {
    /// Of these faults; `None`: there are none.
    pub(crate) fn of<'a>(faults: impl Iterator<Item = &'a ObjectError>, outcome: Outcome) -> Option<Self> {
        let faults: Vec<ObjectError> = faults.cloned().collect();
        (!faults.is_empty()).then_some(Self { faults, outcome })
    }

    /// It, for people.
    pub fn told(&self, id: &ObjectId) -> String {
        format!("{id}: {self}")
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for fault in self.faults.iter().take(TOLD_MOST) {
            write!(f, "{fault}; ")?;
        }
        if let Some(more) = self.faults.len().checked_sub(TOLD_MOST).filter(|more| *more > 0) {
            write!(f, "{more} more faults; ")?;
        }
        let them = if self.faults.len() > 1 { "they are" } else { "it is" };
        write!(f, "until {them} mended, {}", self.outcome.as_str())
    }
}
