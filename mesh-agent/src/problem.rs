//! Problems as status tells them: a code that does not change, the object, the effect, the remedy, and since when.

use std::collections::BTreeMap;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::status::rfc3339;

/// The most problems of one code that are named one by one.
pub const NAMED_MOST: usize = 8;

/// Something that is wrong, or that somebody has to know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Problem {
    /// A short name that does not change.
    pub code: String,
    /// The thing that is wrong: a table, a rule, an interface.
    pub object: String,
    /// A description of the problem.
    pub text: String,
    /// The remedy.
    pub remedy: String,
    /// True if the problem keeps the agent from being ready.
    pub blocks: bool,
    /// Packets that it has taken past the mesh, where they can be counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub packets: Option<u64>,
    /// Since when it has been seen, RFC 3339.
    pub since: String,
}

impl Problem {
    /// A problem that blocks nothing. `object`: the thing; `text`: its effect; `remedy`: the way out.
    pub fn new(
        code: &str,
        object: impl Into<String>,
        text: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        let (object, text, remedy) = (object.into(), text.into(), remedy.into());
        Self {
            code: code.to_owned(),
            object,
            text,
            remedy,
            blocks: false,
            packets: None,
            since: String::new(),
        }
    }

    /// The same, and the agent is not ready because of it if `blocks`.
    pub fn blocking(self, blocks: bool) -> Self {
        Self { blocks, ..self }
    }
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { code, object, text, remedy, .. } = self;
        write!(f, "{code}: {object}: {text}; {remedy}")
    }
}

/// Keeps the first problems of each code, and says how many more there are.
pub fn bounded(found: Vec<Problem>) -> Vec<Problem> {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    let mut kept: Vec<Problem> = Vec::new();
    for problem in found {
        let count = counts.entry(problem.code.clone()).or_default();
        *count += 1;
        if *count <= NAMED_MOST {
            kept.push(problem);
        } else if let Some(last) = kept.iter_mut().rev().find(|last| last.code == problem.code) {
            last.blocks |= problem.blocks;
        }
    }
    for (code, count) in counts.into_iter().filter(|(_, count)| *count > NAMED_MOST) {
        if let Some(last) = kept.iter_mut().rev().find(|problem| problem.code == code) {
            last.text.push_str(&format!(" (and {} more of this kind)", count - NAMED_MOST));
        }
    }
    kept
}

/// Remembers since when each problem has been seen.
#[derive(Debug, Clone, Default)]
pub struct Since(BTreeMap<(String, String), SystemTime>);

impl Since {
    /// Writes into each problem since when it has been there, and forgets those that are gone.
    pub fn note(&mut self, problems: &mut [Problem], now: SystemTime) {
        let mut since = BTreeMap::new();
        for problem in problems {
            let key = (problem.code.clone(), problem.object.clone());
            let first = *self.0.get(&key).unwrap_or(&now);
            problem.since = rfc3339(first);
            since.insert(key, first);
        }
        self.0 = since;
    }
}
