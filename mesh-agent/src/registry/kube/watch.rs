//! One kind of object, listed once and then watched, for good.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use kube::Api;
use kube::api::{ListParams, ObjectMeta, WatchEvent, WatchParams};
use kube::core::Resource;
use serde::de::DeserializeOwned;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use super::directory::Directory;
use super::listing::{Listing, Named};
use super::{Shared, reason};

// The most objects of a kind that are read.
const OBJECTS_MOST: usize = 50_000;
// For an answer to a list or the beginning of a watch.
const ANSWER: Duration = Duration::from_secs(30);
// Objects in one answer of a list.
const PAGE: u32 = 500;
// The server ends a watch after this many seconds, in which it need not have said anything; later the connection is dead.
const WATCH_SECONDS: u32 = 240;
// The first wait after a failure, and the longest.
const RETRY: Duration = Duration::from_millis(500);
pub(super) const RETRY_MOST: Duration = Duration::from_secs(30);
// A watch that lasts less did not last.
const BRIEF: Duration = Duration::from_secs(1);

/// What an API sends.
pub(super) trait Object:
    Clone + DeserializeOwned + std::fmt::Debug + Resource + Send + Sync + 'static
{
}
impl<K: Clone + DeserializeOwned + std::fmt::Debug + Resource + Send + Sync + 'static> Object for K {}

/// Where goes what a watch brings.
pub(super) trait Sink: Send + Sync + 'static {
    /// What counts of an object.
    type Entry: Send;

    /// These are all objects.
    fn listed(&mut self, entries: Vec<Self::Entry>);
    /// They can be watched.
    fn connected(&mut self);
    /// One is there, or is different now.
    fn there(&mut self, entry: Self::Entry);
    /// One is gone.
    fn gone(&mut self, object: &ObjectMeta);
    /// They cannot be listed or watched now.
    fn failed(&mut self, error: &kube::Error);
    /// Whether everything is still known that was brought; otherwise all has to be listed anew.
    fn whole(&self) -> bool {
        true
    }
    /// How long to wait at most after one failure among many.
    fn retry_most(&self) -> Duration {
        RETRY_MOST
    }
}

/// How a kind is watched.
pub(super) struct Watch<S> {
    /// Which of the kind's objects, by their fields; absent: all.
    pub(super) fields: Option<&'static str>,
    /// Where they go.
    pub(super) sink: S,
}

/// The place of a kind in the directory.
pub(super) struct Shelf<T> {
    /// Every cluster knows the kind; where it is one of ours, it may be missing.
    pub(super) known: bool,
    /// Which place.
    pub(super) listing: fn(&mut Directory) -> &mut Listing<T>,
    /// The directory.
    pub(super) shared: Arc<Shared>,
}

impl<T: Named + Send + 'static> Sink for Shelf<T> {
    type Entry = T;

    fn listed(&mut self, entries: Vec<T>) {
        self.shared.update(|directory| (self.listing)(directory).replace(entries));
    }

    fn connected(&mut self) {
        self.shared.update(|directory| (self.listing)(directory).connected());
    }

    fn there(&mut self, entry: T) {
        self.shared.update(|directory| (self.listing)(directory).apply(entry));
    }

    fn gone(&mut self, object: &ObjectMeta) {
        let name = object.name.as_deref().unwrap_or_default();
        self.shared.update(|directory| (self.listing)(directory).delete(name));
    }

    fn failed(&mut self, error: &kube::Error) {
        self.shared.update(|directory| {
            let listing = (self.listing)(directory);
            match error {
                kube::Error::Api(status) if status.code == 404 && !self.known => listing.unknown(),
                kube::Error::Api(status) if status.code == 403 => listing.denied(reason(error)),
                error => listing.trouble(reason(error)),
            }
        });
    }
}

// Why a watch has to begin anew.
enum Again {
    // From a list: its version is too old.
    List,
    // From where it was.
    Watch,
}

impl<S: Sink> Watch<S> {
    /// Lists and watches from now on, beside the caller.
    pub(super) fn begin<K: Object + Into<S::Entry>>(self, api: Api<K>) -> JoinHandle<()> {
        tokio::spawn(self.run(api))
    }

    async fn run<K: Object + Into<S::Entry>>(mut self, api: Api<K>) {
        let mut failures = 0;
        'list: loop {
            let mut version = match self.list(&api).await {
                Ok((entries, version)) => {
                    self.sink.listed(entries);
                    version
                }
                Err(error) => {
                    self.sink.failed(&error);
                    pause(&mut failures, self.sink.retry_most()).await;
                    continue;
                }
            };
            loop {
                let began = Instant::now();
                let ended = self.follow(&api, &mut version).await;
                // A server that ends what it has just begun is not asked without end.
                let brief = began.elapsed() < BRIEF;
                if !brief {
                    failures = 0;
                }
                match ended {
                    Ok(again) => {
                        if brief {
                            pause(&mut failures, RETRY_MOST).await;
                        }
                        if let Again::List = again {
                            continue 'list;
                        }
                    }
                    Err(error) => {
                        self.sink.failed(&error);
                        pause(&mut failures, RETRY_MOST).await;
                        if !self.sink.whole() {
                            continue 'list;
                        }
                    }
                }
            }
        }
    }

    async fn list<K: Object + Into<S::Entry>>(
        &self,
        api: &Api<K>,
    ) -> Result<(Vec<S::Entry>, String), kube::Error> {
        let mut entries = Vec::new();
        let mut parameters = ListParams::default().limit(PAGE);
        parameters.field_selector = self.fields.map(str::to_owned);
        loop {
            let page = answered(api.list(&parameters)).await?;
            if entries.len() + page.items.len() > OBJECTS_MOST {
                return Err(kube::Error::Service(format!("it has more than {OBJECTS_MOST} objects").into()));
            }
            entries.extend(page.items.into_iter().map(Into::into));
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => parameters = parameters.continue_token(&token),
                None => return Ok((entries, page.metadata.resource_version.unwrap_or_default())),
            }
        }
    }

    async fn follow<K: Object + Into<S::Entry>>(
        &mut self,
        api: &Api<K>,
        version: &mut String,
    ) -> Result<Again, kube::Error> {
        let mut parameters = WatchParams::default().timeout(WATCH_SECONDS);
        parameters.field_selector = self.fields.map(str::to_owned);
        let events = match answered(api.watch(&parameters, version)).await {
            Err(kube::Error::Api(status)) if status.code == 410 => return Ok(Again::List),
            result => result?,
        };
        self.sink.connected();
        let mut events = std::pin::pin!(events);
        while let Some(event) = events.next().await {
            match event? {
                WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                    take_version(&object, version);
                    self.sink.there(object.into());
                }
                WatchEvent::Deleted(object) => {
                    take_version(&object, version);
                    self.sink.gone(object.meta());
                }
                WatchEvent::Bookmark(bookmark) => *version = bookmark.metadata.resource_version,
                WatchEvent::Error(status) if status.code == 410 => return Ok(Again::List),
                WatchEvent::Error(status) => return Err(kube::Error::Api(status)),
            }
            if !self.sink.whole() {
                return Ok(Again::List);
            }
        }
        Ok(Again::Watch)
    }
}

async fn answered<T>(asked: impl Future<Output = Result<T, kube::Error>>) -> Result<T, kube::Error> {
    let silence = |_| kube::Error::Service(format!("no answer within {} s", ANSWER.as_secs()).into());
    timeout(ANSWER, asked).await.map_err(silence)?
}

fn take_version<K: Resource>(object: &K, version: &mut String) {
    if let Some(newer) = &object.meta().resource_version {
        version.clone_from(newer);
    }
}

// Doubling, and by chance between half and all of it, so that a thousand agents do not come back at once.
pub(super) async fn pause(failures: &mut u32, most: Duration) {
    let most = RETRY.saturating_mul(2u32.saturating_pow((*failures).min(16))).min(most);
    *failures = failures.saturating_add(1);
    let chance = getrandom::u32().unwrap_or(0);
    tokio::time::sleep(most / 2 + most.mul_f64(f64::from(chance) / f64::from(u32::MAX) / 2.0)).await;
}
