//! One kind of object, listed once and then watched, for good.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use kube::Api;
use kube::api::{ListParams, ObjectMeta, WatchEvent, WatchParams};
use kube::core::{ObjectList, Request, Resource};
use serde::de::DeserializeOwned;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use super::budget::{Budget, PAGE_LEAST, Several, Size, is_exceeded};
use super::directory::Directory;
use super::listing::{Listing, Named, Partial, TooMany};
use super::{Shared, reason};

// For an answer to a list or the beginning of a watch.
const ANSWER: Duration = Duration::from_secs(30);
// For all pages of a list together.
const LIST: Duration = Duration::from_secs(600);
// Objects in one answer of a list, and by how much fewer are asked for when that is too large.
const PAGE: u32 = 500;
const FEWER: u32 = 10;
// Pages of one server that are read at the same time.
const PAGES_MOST: usize = 4;
// The server ends a watch after this many seconds, in which it need not have said anything; later the connection is dead.
const WATCH_SECONDS: u32 = 240;
// The same through a proxy, behind which no keepalive finds out who is dead.
const PROXIED_SECONDS: u32 = 25;
// So long after its time a watch has to have ended.
const LATE: Duration = Duration::from_secs(10);
// A watch that the server ends earlier by more than this was not ended by its time: the server itself goes.
const EARLY: Duration = Duration::from_secs(5);
// A kind with more objects than these is listed anew only where the server's version shows that it went back.
const ANEW_MOST: usize = 500;
// So often in succession may something in between end watches early before that tells nothing any more.
const HABIT: u32 = 3;
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

    /// A list begins: nothing of it counts before its end.
    fn begins(&mut self);
    /// One of the listed objects.
    ///
    /// # Errors
    /// [`TooMany`], and nothing of the list will count.
    fn lists(&mut self, entry: Self::Entry) -> Result<(), TooMany>;
    /// Those were all objects.
    fn listed(&mut self);
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
    /// Roughly how many objects there are.
    fn count(&self) -> usize;
    /// How long to wait at most after one failure among many.
    fn retry_most(&self) -> Duration {
        RETRY_MOST
    }
}

/// How much is read of one server, by all that watch it.
#[derive(Debug, Clone)]
pub(super) struct Reading {
    pub(super) budget: Budget,
    gate: Arc<Semaphore>,
    // Counts how often credentials were renewed.
    fresh: watch::Receiver<u64>,
    // How long a watch lasts, in seconds.
    lasts: u32,
}

impl Reading {
    pub(super) fn new(budget: Budget, fresh: watch::Receiver<u64>, is_proxied: bool) -> Self {
        let lasts = if is_proxied { PROXIED_SECONDS } else { WATCH_SECONDS };
        Self { budget, gate: Arc::new(Semaphore::new(PAGES_MOST)), fresh, lasts }
    }

    /// Waits as [`pause`] does, and no longer than until there are other credentials.
    async fn pause(&mut self, failures: &mut u32, most: Duration) {
        tokio::select! {
            () = pause(failures, most) => {}
            () = renewed(&mut self.fresh) => *failures = 0,
        }
    }
}

async fn renewed(fresh: &mut watch::Receiver<u64>) {
    if fresh.changed().await.is_err() {
        std::future::pending().await
    }
}

/// How a kind is watched.
pub(super) struct Watch<S> {
    /// How much is read.
    pub(super) reading: Reading,
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
    /// What was listed so far.
    pub(super) partial: Partial<T>,
    /// How much is kept.
    pub(super) budget: Budget,
}

impl<T: Named + Send + Sync + 'static> Sink for Shelf<T> {
    type Entry = T;

    fn begins(&mut self) {
        self.partial = Partial::new(self.budget);
    }

    fn lists(&mut self, entry: T) -> Result<(), TooMany> {
        self.partial.add(entry)
    }

    fn listed(&mut self) {
        let entries = std::mem::replace(&mut self.partial, Partial::new(self.budget)).into_entries();
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

    fn whole(&self) -> bool {
        (self.listing)(&mut self.shared.directory.lock()).whole()
    }

    fn count(&self) -> usize {
        (self.listing)(&mut self.shared.directory.lock()).entries.len()
    }

    fn failed(&mut self, error: &kube::Error) {
        self.partial = Partial::new(self.budget);
        self.shared.update(|directory| {
            let listing = (self.listing)(directory);
            match error {
                kube::Error::Api(status) if status.code == 404 && !self.known => listing.unknown(),
                kube::Error::Api(status) if status.code == 403 => listing.denied(reason(error)),
                kube::Error::Api(status) if status.code == 401 => listing.unauthorized(reason(error)),
                error => listing.trouble(reason(error)),
            }
        });
    }
}

// How a watch ended.
enum Ended {
    // All has to be listed: its version is too old, or not everything was kept.
    Relist,
    // It is to go on from where it was.
    Over,
    // The server ended it before its time, as one does that stops. What serves afterwards may be another one, with a
    // backup of some time ago. It takes a watch from a version that it never had, and stays silent.
    Early,
}

/// Reports whether the error is an answer of the same server. Refusals (401, 403, 429) are such
/// answers and are taken as temporary.
fn is_answer(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if [401, 403, 429].contains(&status.code))
}

impl<S: Sink> Watch<S> {
    /// Lists and watches from now on, beside the caller.
    pub(super) fn begin<K: Object + Into<S::Entry>>(self, api: Api<K>) -> JoinHandle<()> {
        tokio::spawn(self.run(api))
    }

    async fn run<K: Object + Into<S::Entry>>(mut self, api: Api<K>) {
        let mut failures = 0;
        // How often in succession a server that ended a watch was still the same, as far as that can be told.
        let mut unfounded = 0_u32;
        'list: loop {
            let mut version = match within(LIST, self.list(&api)).await {
                Ok(version) => {
                    self.sink.listed();
                    version
                }
                Err(error) => {
                    self.sink.failed(&error);
                    self.reading.pause(&mut failures, self.sink.retry_most()).await;
                    continue;
                }
            };
            // Whether what serves now may be another one than before.
            let mut doubted = false;
            loop {
                if doubted {
                    let by_version = unfounded >= HABIT || self.sink.count() > ANEW_MOST;
                    unfounded = unfounded.saturating_add(1);
                    if !by_version {
                        continue 'list;
                    }
                    match self.is_behind(&api, &version).await {
                        Ok(true) => {
                            unfounded = 0;
                            continue 'list;
                        }
                        Ok(false) => doubted = false,
                        Err(error) => {
                            self.sink.failed(&error);
                            self.reading.pause(&mut failures, RETRY_MOST).await;
                            continue;
                        }
                    }
                }
                let began = Instant::now();
                let ended = self.follow(&api, &mut version).await;
                // A server that ends what it has just begun is not asked without end.
                let brief = began.elapsed() < BRIEF;
                if !brief {
                    failures = 0;
                }
                match ended {
                    Ok(Ended::Relist) => {
                        if brief {
                            self.reading.pause(&mut failures, RETRY_MOST).await;
                        }
                        continue 'list;
                    }
                    Ok(ended) => {
                        doubted = matches!(ended, Ended::Early);
                        if !doubted {
                            unfounded = 0;
                        }
                        if brief || doubted {
                            self.reading.pause(&mut failures, RETRY_MOST).await;
                        }
                    }
                    Err(error) => {
                        if !brief {
                            tracing::warn!("the watch of {} broke: {}", api.resource_url(), reason(&error));
                        }
                        doubted |= !is_answer(&error);
                        self.sink.failed(&error);
                        self.reading.pause(&mut failures, RETRY_MOST).await;
                    }
                }
                if !self.sink.whole() {
                    continue 'list;
                }
            }
        }
    }

    /// Reports whether the server's state is older than this version. Versions that cannot be
    /// compared count as older.
    async fn is_behind<K: Object>(&self, api: &Api<K>, version: &str) -> Result<bool, kube::Error> {
        let parameters = ListParams::default().limit(1);
        let (page, _) = within(ANSWER, page(api, &parameters, 1)).await?;
        let now = page.metadata.resource_version.unwrap_or_default();
        let is_behind = match (now.parse::<u64>(), version.parse::<u64>()) {
            (Ok(now), Ok(before)) => now < before,
            // Versions that are no numbers cannot be compared.
            _ => true,
        };
        if is_behind {
            tracing::warn!("{} is at {now:?} after {version:?}: it is listed anew", api.resource_url());
        }
        Ok(is_behind)
    }

    async fn list<K: Object + Into<S::Entry>>(&mut self, api: &Api<K>) -> Result<String, kube::Error> {
        let Reading { budget, gate, .. } = self.reading.clone();
        self.sink.begins();
        let (mut size, mut token, mut read) = (PAGE, None::<String>, 0);
        loop {
            let mut parameters = ListParams::default().limit(size);
            parameters.field_selector = self.fields.map(str::to_owned);
            parameters.continue_token = token.clone();
            // Held until nothing of the page is left but what counts.
            let _turn = gate.acquire().await;
            let page = match within(ANSWER, page(api, &parameters, size)).await {
                Ok((page, bytes)) => {
                    read += bytes.max(PAGE_LEAST);
                    Some(page)
                }
                Err(error) if size > 1 && is_exceeded(&error) => {
                    read += budget.page;
                    None
                }
                Err(error) => return Err(error),
            };
            if read > budget.list {
                let why = format!("a list of more than {} is not read", Size(budget.list));
                return Err(kube::Error::Service(why.into()));
            }
            let Some(page) = page else {
                size = (size / FEWER).max(1);
                continue;
            };
            for object in page.items {
                self.sink.lists(object.into()).map_err(|e| kube::Error::Service(e.into()))?;
            }
            token = page.metadata.continue_.filter(|token| !token.is_empty());
            if token.is_none() {
                return Ok(page.metadata.resource_version.unwrap_or_default());
            }
            size = (size * FEWER).min(PAGE);
        }
    }

    async fn follow<K: Object + Into<S::Entry>>(
        &mut self,
        api: &Api<K>,
        version: &mut String,
    ) -> Result<Ended, kube::Error> {
        let lasts = self.reading.lasts;
        let mut parameters = WatchParams::default().timeout(lasts);
        parameters.field_selector = self.fields.map(str::to_owned);
        // What is asked now is asked with those of now.
        self.reading.fresh.mark_unchanged();
        let began = Instant::now();
        let events = match within(ANSWER, api.watch(&parameters, version)).await {
            Err(kube::Error::Api(status)) if status.code == 410 => return Ok(Ended::Relist),
            result => result?,
        };
        self.sink.connected();
        let mut events = std::pin::pin!(events);
        let lasts = Duration::from_secs(lasts.into());
        let late = Instant::now() + lasts + LATE;
        loop {
            let event = tokio::select! {
                event = events.next() => event,
                () = renewed(&mut self.reading.fresh) => return Ok(Ended::Over),
                () = tokio::time::sleep_until(late) => return Err(kube::Error::Service("a watch did not end at its time".into())),
            };
            match event {
                None if began.elapsed() + EARLY < lasts => return Ok(Ended::Early),
                None => return Ok(Ended::Over),
                Some(event) => match event? {
                    WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                        take_version(&object, version);
                        self.sink.there(object.into());
                    }
                    WatchEvent::Deleted(object) => {
                        take_version(&object, version);
                        self.sink.gone(object.meta());
                    }
                    WatchEvent::Bookmark(bookmark) => *version = bookmark.metadata.resource_version,
                    WatchEvent::Error(status) if status.code == 410 => return Ok(Ended::Relist),
                    WatchEvent::Error(status) => return Err(kube::Error::Api(status)),
                },
            }
            if !self.sink.whole() {
                return Ok(Ended::Relist);
            }
        }
    }
}

/// One page of a list, and how many bytes it had.
async fn page<K: Object>(
    api: &Api<K>,
    parameters: &ListParams,
    size: u32,
) -> Result<(ObjectList<K>, u64), kube::Error> {
    let mut request = Request::new(api.resource_url()).list(parameters).map_err(kube::Error::BuildRequest)?;
    if size > 1 {
        request.extensions_mut().insert(Several);
    }
    // Not `Api::list`, which logs an answer that it cannot read.
    let text = api.clone().into_client().request_text(request).await?;
    let page = serde_json::from_str(&text).map_err(kube::Error::SerdeError)?;
    Ok((page, text.len() as u64))
}

async fn within<T>(
    most: Duration,
    asked: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, kube::Error> {
    let silence = |_| kube::Error::Service(format!("no whole answer within {} s", most.as_secs()).into());
    timeout(most, asked).await.map_err(silence)?
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

#[cfg(test)]
#[path = "watch/tests.rs"]
mod tests;
