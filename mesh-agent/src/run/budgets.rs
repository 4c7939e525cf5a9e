//! Tells people what is over a budget: once, and not again and again where it comes and goes.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::registry::Notice;
use crate::status::OverBudgetStatus;

/// Reasons of Events: codes of what is closed.
const EXCEEDED: &str = "PolicyBudgetExceeded";
const REFUSED: &str = "PolicyRefusedByKernel";
/// Of the same object nothing is told again before this has passed.
const QUIET: Duration = Duration::from_secs(600);
/// The most objects that are told of within that time: each is an Event in a cluster.
const TOLD_MOST: usize = 64;

/// What was told, and when.
#[derive(Debug, Default)]
pub(super) struct Told {
    at: BTreeMap<String, Instant>,
    now: Vec<String>,
}

impl Told {
    /// Returns what has to be told of what is over its budget now.
    pub(super) fn fresh(&mut self, over: &[OverBudgetStatus], now: Instant) -> Vec<Notice> {
        let mut notices = Vec::new();
        let before = std::mem::take(&mut self.now);
        self.at.retain(|object, at| before.contains(object) || now.duration_since(*at) < QUIET);
        for one in over {
            self.now.push(one.object.clone());
            if self.at.contains_key(&one.object) || self.at.len() >= TOLD_MOST {
                continue;
            }
            self.at.insert(one.object.clone(), now);
            let note = format!("{}: {}; {}", one.object, one.reason, one.remedy);
            let reason = if one.code == REFUSED { REFUSED } else { EXCEEDED };
            notices.push(Notice { warning: true, reason, note });
        }
        notices
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn over(object: &str) -> OverBudgetStatus {
        OverBudgetStatus { object: object.to_owned(), ..OverBudgetStatus::default() }
    }

    #[test]
    fn each_object_is_told_once_while_it_comes_and_goes() {
        let (mut told, start) = (Told::default(), Instant::now());
        assert_eq!(told.fresh(&[over("Namespace a")], start).len(), 1);
        for turn in 0..50 {
            let all: &[OverBudgetStatus] = if turn % 2 == 0 { &[] } else { &[over("Namespace a")] };
            assert!(told.fresh(all, start + Duration::from_secs(turn)).is_empty());
        }
        assert!(told.fresh(&[], start + QUIET * 2).is_empty());
        assert!(told.fresh(&[], start + QUIET * 2).is_empty());
        assert_eq!(told.fresh(&[over("Namespace a")], start + QUIET * 2).len(), 1);
    }

    #[test]
    fn many_objects_are_not_many_events() {
        let (mut told, start) = (Told::default(), Instant::now());
        let all: Vec<OverBudgetStatus> = (0..1000).map(|n| over(&format!("Namespace {n}"))).collect();
        assert_eq!(told.fresh(&all, start).len(), TOLD_MOST);
        assert!(told.fresh(&all, start).is_empty());
    }
}
