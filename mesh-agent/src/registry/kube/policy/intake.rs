//! The way of a kind into the feed.

use std::collections::{BTreeMap, BTreeSet};
use std::marker::PhantomData;
use std::time::Duration;

use kube::api::ObjectMeta;
use mesh_keyring::ClusterName;
use tokio::time::Instant;

use super::super::census::{Census, Judged, Place};
use super::super::listing::TooMany;
use super::super::watch::{RETRY_MOST, Sink};
use super::super::{cut, reason};
use super::report::Reporter;
use super::{Counted, Found, From, MISSED, MISSED_FIRST, REMEDY, Refusal, UNKNOWN};
use crate::registry::feed::Feed;

// A kind of which not everything is kept is listed again this long after the last time, once something has gone.
const RELIST: Duration = Duration::from_secs(60);
// Namespaces above the bound that are named.
const NAMED: usize = 8;
// Kinds that cannot be kept in part are not read beyond the bound; of others this many times as much is looked at.
const LOOKED_AT: usize = 10;

/// The way of a kind into the feed.
pub(super) struct Intake<T> {
    feed: Feed,
    cluster: Option<ClusterName>,
    // Who writes back what became of an object.
    reporter: Option<Reporter>,
    // Keys of those that the feed knows as refused.
    refused: BTreeSet<String>,
    // They were listed.
    known: bool,
    // The cluster does not know the kind, and the feed was told that there are none.
    unknown: bool,
    // How often in succession it did not.
    missed: u32,
    // The bound, in units.
    most: usize,
    census: Census,
    listed_at: Instant,
    partial: Partial<T>,
    kind: PhantomData<fn(T)>,
}

/// What was listed so far.
struct Partial<T> {
    census: Census,
    objects: BTreeMap<(String, String), T>,
    refused: Vec<Refusal>,
    looked_at: usize,
}

impl<T: Counted> Partial<T> {
    fn new(most: usize) -> Self {
        let census = Census::new(most, T::ENTIRE);
        Self { census, objects: BTreeMap::new(), refused: Vec::new(), looked_at: 0 }
    }
}

fn owned((namespace, name): (Option<&str>, &str)) -> (String, String) {
    (namespace.unwrap_or_default().to_owned(), name.to_owned())
}

fn namespaced((namespace, name): &(String, String)) -> (Option<&str>, &str) {
    (Some(namespace.as_str()).filter(|namespace| !namespace.is_empty()), name)
}

impl<T: Counted> Intake<T> {
    pub(super) fn new(from: &From, feed: &Feed, reporter: Option<Reporter>) -> Self {
        let most = from.reading.budget.objects;
        Self {
            feed: feed.clone(),
            cluster: from.cluster.clone(),
            reporter,
            refused: BTreeSet::new(),
            known: false,
            unknown: false,
            missed: 0,
            most,
            census: Census::new(most, T::ENTIRE),
            listed_at: Instant::now(),
            partial: Partial::new(most),
            kind: PhantomData,
        }
    }

    fn title((namespace, name): (Option<&str>, &str)) -> String {
        let namespace = namespace.map(|namespace| format!("{namespace}/")).unwrap_or_default();
        format!("{} {namespace}{name}", T::kind().as_str())
    }

    fn refuse(&mut self, title: String, reason: String) {
        // More than are named, nobody can read.
        if self.refused.len() < self.most {
            self.refused.insert(title.clone());
            self.feed.refuse(title, Some(cut(&reason)));
        }
    }

    fn report(&self, object: &T) {
        if let (Some(reporter), Some(seen)) = (&self.reporter, object.seen()) {
            reporter.saw(seen);
        }
    }

    fn mended(&mut self, key: (Option<&str>, &str)) {
        if !self.refused.is_empty() {
            let title = Self::title(key);
            self.refused.remove(&title);
            self.feed.refuse(title, None);
        }
    }

    /// Says whether not everything is kept, and of whom.
    fn tell(&self) {
        let over = self.census.over();
        let named: Vec<&str> = over.iter().take(NAMED).map(String::as_str).collect();
        let more = over.len().saturating_sub(NAMED);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        let whose = match &named[..] {
            [] => None,
            [""] => Some("not all of them count".to_owned()),
            all => Some(format!("not all objects of these namespaces count: {}{more}", all.join(", "))),
        };
        let told = whose.map(|whose| {
            format!("there are more objects than the {} that are kept, and {whose}: delete some", self.most)
        });
        self.feed.trouble(T::kind().as_str(), told);
    }

    /// Puts something in the place of the objects of a namespace that is above the bound now.
    fn replace(&self, namespace: &str) {
        if let Some(instead) = T::instead(namespace) {
            self.feed.push(instead.named(self.cluster.as_ref()).there());
        }
        self.tell();
    }
}

impl<T: Counted> Sink for Intake<T> {
    type Entry = Found<T>;

    fn begins(&mut self) {
        self.partial = Partial::new(self.most);
    }

    fn lists(&mut self, Found { read, weight }: Found<T>) -> Result<(), TooMany> {
        let Partial { census, objects, refused, looked_at } = &mut self.partial;
        *looked_at += 1;
        let too_many = Err(TooMany::of(self.most));
        if *looked_at > self.most.saturating_mul(LOOKED_AT) {
            return too_many;
        }
        match read {
            Ok(object) => {
                let key = owned(object.key());
                let (namespace, name) = namespaced(&key);
                let Judged { place, evicted } = census.there(namespace, name, weight);
                if !T::PARTS && !census.over().is_empty() {
                    return too_many;
                }
                for other in evicted {
                    objects.remove(&other);
                }
                if place == Place::Kept {
                    objects.insert(key, object);
                }
            }
            Err(refusal) if refused.len() < self.most => refused.push(refusal),
            Err(_) => {}
        }
        Ok(())
    }

    fn listed(&mut self) {
        let Partial { census, objects, refused, .. } =
            std::mem::replace(&mut self.partial, Partial::new(self.most));
        self.census = census;
        self.listed_at = Instant::now();
        let mut mended = std::mem::take(&mut self.refused);
        let mut all = Vec::with_capacity(objects.len());
        for object in objects.into_values() {
            self.report(&object);
            all.push(object.named(self.cluster.as_ref()));
        }
        let instead = self.census.over().iter().filter_map(|namespace| T::instead(namespace));
        all.extend(instead.map(|instead| instead.named(self.cluster.as_ref())));
        for Refusal { namespace, name, reason } in refused {
            let title = Self::title((namespace.as_deref(), &name));
            mended.remove(&title);
            self.refuse(title, reason);
        }
        for title in mended {
            self.feed.refuse(title, None);
        }
        (self.known, self.unknown, self.missed) = (true, false, 0);
        self.tell();
        self.feed.push(T::all(all));
    }

    fn connected(&mut self) {
        self.tell();
    }

    fn there(&mut self, Found { read, weight }: Found<T>) {
        match read {
            Ok(object) => {
                self.mended(object.key());
                let before = self.census.over().len();
                let key = owned(object.key());
                let (namespace, name) = namespaced(&key);
                let Judged { place, evicted } = self.census.there(namespace, name, weight);
                if !T::PARTS && place == Place::Over {
                    // What is known stays as it is until a list fits again.
                    return self.tell();
                }
                // What isolates comes before what it stands for is gone.
                if self.census.over().len() != before {
                    self.replace(evicted.first().map_or(namespace.unwrap_or_default(), |(loser, _)| loser));
                }
                for other in &evicted {
                    let (namespace, name) = namespaced(other);
                    self.feed.push(T::gone(namespace, name));
                }
                match place {
                    Place::Kept => {
                        self.report(&object);
                        self.feed.push(object.named(self.cluster.as_ref()).there());
                    }
                    // What it was before, it may be no longer.
                    Place::Over => self.feed.push(T::gone(namespace, name)),
                }
            }
            // What it was before, it may be no longer.
            Err(Refusal { namespace, name, reason }) => {
                self.refuse(Self::title((namespace.as_deref(), &name)), reason);
                self.census.gone(namespace.as_deref(), &name);
                self.feed.push(T::gone(namespace.as_deref(), &name));
            }
        }
    }

    fn gone(&mut self, object: &ObjectMeta) {
        let (namespace, name) = (object.namespace.as_deref(), object.name.as_deref().unwrap_or_default());
        self.mended((namespace, name));
        self.census.gone(namespace, name);
        self.feed.push(T::gone(namespace, name));
    }

    fn failed(&mut self, error: &kube::Error) {
        self.partial = Partial::new(self.most);
        if T::OPTIONAL && matches!(error, kube::Error::Api(status) if status.code == 404) {
            self.missed += 1;
            // One server may know less than another, for a moment.
            if self.known && self.missed < MISSED {
                let told = format!("the cluster does not know the kind any more: {}", reason(error));
                self.feed.trouble(T::kind().as_str(), Some(told));
            } else if !self.known && !self.unknown && self.missed < MISSED_FIRST {
                // Right after its start a server may not know yet what it will.
            } else if self.known || !self.unknown || self.feed.lost(T::kind()) {
                self.listed();
                (self.known, self.unknown) = (false, true);
            } else {
                self.feed.trouble(T::kind().as_str(), None);
            }
            return;
        }
        self.unknown = false;
        let told = match error {
            kube::Error::Api(status) if status.code == 403 => format!("{}; {REMEDY}", reason(error)),
            error => reason(error),
        };
        match error {
            kube::Error::Api(status) if [401, 403].contains(&status.code) => {
                self.feed.refusal(T::kind().as_str(), told);
            }
            _ => self.feed.trouble(T::kind().as_str(), Some(told)),
        }
    }

    fn whole(&self) -> bool {
        // Of a kind that is kept whole or not at all, what a watch brought too much only a list can judge.
        let parts = T::PARTS || self.census.over().is_empty();
        let room = self.census.has_room() && self.listed_at.elapsed() >= RELIST;
        self.missed == 0 && parts && !room && !self.feed.lost(T::kind())
    }

    fn count(&self) -> usize {
        self.census.units()
    }

    fn retry_most(&self) -> Duration {
        if self.unknown { UNKNOWN } else { RETRY_MOST }
    }
}
