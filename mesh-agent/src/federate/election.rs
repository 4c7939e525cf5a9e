//! Which of several federators writes: the holder of a Lease (coordination.k8s.io), and it only while it is sure to hold it.
//!
//! Time is our own monotonic clock's: a holder counts as gone when its Lease has not changed for a whole term as we saw
//! it, whatever the clocks say. And we stop before our term is over as others may see it, so that two never write.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use kube::api::{ObjectMeta, PostParams};
use kube::core::{ApiResource, NotUsed, Object};
use kube::{Api, Client};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};

use crate::registry::kube::reason;
use crate::status::rfc3339;

/// The Lease's name.
pub const LEASE: &str = "sennit-federate";

/// A term. After one without a sign of life somebody else takes over.
const TERM: Duration = Duration::from_secs(15);
/// We write no later than this after the last renewal was begun.
const SURE: Duration = Duration::from_secs(10);
const RENEW: Duration = Duration::from_secs(3);
const ANSWER: Duration = Duration::from_secs(3);

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct LeaseSpec {
    holder_identity: Option<String>,
    lease_duration_seconds: Option<u32>,
    acquire_time: Option<String>,
    renew_time: Option<String>,
    lease_transitions: Option<u32>,
}

type Lease = Object<LeaseSpec, NotUsed>;

/// Until when we may write. Read by those who write, renewed by the [`Election`] beside them.
#[derive(Debug, Default)]
pub struct Term(Mutex<Option<Instant>>);

impl Term {
    /// Whether we may write now.
    pub fn is_ours(&self) -> bool {
        self.0.lock().is_some_and(|until| Instant::now() < until)
    }

    fn set(&self, until: Option<Instant>) {
        *self.0.lock() = until;
    }
}

/// Our part in the election.
#[derive(Debug)]
pub struct Election {
    api: Api<Lease>,
    resource: ApiResource,
    identity: String,
    term: Arc<Term>,
    // The Lease as another one held it, and since when we have seen it so.
    seen: Option<(LeaseSpec, Instant)>,
    trouble: Option<String>,
}

impl Election {
    /// An election among those who use this Lease of this namespace; `identity` is nobody else's.
    pub fn new(client: Client, namespace: &str, identity: String) -> Self {
        let resource = ApiResource {
            group: "coordination.k8s.io".into(),
            version: "v1".into(),
            api_version: "coordination.k8s.io/v1".into(),
            kind: "Lease".into(),
            plural: "leases".into(),
        };
        let api = Api::namespaced_with(client, namespace, &resource);
        Self { api, resource, identity, term: Arc::default(), seen: None, trouble: None }
    }

    /// What it decides.
    pub fn term(&self) -> Arc<Term> {
        Arc::clone(&self.term)
    }

    /// Takes part until `stop` is rung, then gives the Lease back. Rings `bell` when we have won or lost.
    pub async fn run(mut self, stop: Arc<Notify>, bell: Arc<Notify>) {
        loop {
            let (began, led) = (Instant::now(), self.term.is_ours());
            self.step().await;
            if self.term.is_ours() != led {
                tracing::info!(leads = !led, "election");
                bell.notify_one();
            }
            tokio::select! {
                () = tokio::time::sleep_until(began + RENEW) => {}
                () = stop.notified() => break,
            }
        }
        self.resign().await;
    }

    /// Renews, takes or watches the Lease.
    async fn step(&mut self) {
        let began = Instant::now();
        let trouble = match timeout(ANSWER, self.ask()).await {
            Ok(Ok(ours)) => {
                self.term.set(ours.then_some(began + SURE));
                None
            }
            Ok(Err(e)) => Some(reason(&e)),
            Err(_) => Some(format!("no answer within {} s", ANSWER.as_secs())),
        };
        if let Some(why) = trouble.as_ref().filter(|_| trouble != self.trouble) {
            tracing::warn!("Lease {LEASE}: {why}");
        }
        self.trouble = trouble;
    }

    async fn ask(&mut self) -> Result<bool, kube::Error> {
        let Some(mut lease) = self.api.get_opt(LEASE).await? else {
            let mut lease = Lease::new(LEASE, &self.resource, self.spec(0));
            lease.spec.acquire_time.clone_from(&lease.spec.renew_time);
            return took(self.api.create(&PostParams::default(), &lease).await);
        };
        // After the answer: a Lease is not older to us than we have seen it.
        let now = Instant::now();
        let holder = lease.spec.holder_identity.clone().unwrap_or_default();
        let transitions = lease.spec.lease_transitions.unwrap_or_default();
        if holder == self.identity {
            let acquired = lease.spec.acquire_time.take();
            lease.spec = LeaseSpec { acquire_time: acquired, ..self.spec(transitions) };
        } else {
            let since = match &self.seen {
                Some((spec, since)) if *spec == lease.spec => *since,
                _ => {
                    self.seen = Some((lease.spec.clone(), now));
                    now
                }
            };
            if !holder.is_empty() && now.saturating_duration_since(since) < TERM {
                return Ok(false);
            }
            lease.spec = self.spec(transitions.saturating_add(1));
            lease.spec.acquire_time.clone_from(&lease.spec.renew_time);
        }
        lease.metadata = ObjectMeta { managed_fields: None, ..lease.metadata };
        // With the version that was read: of two who try, one gets a conflict.
        took(self.api.replace(LEASE, &PostParams::default(), &lease).await)
    }

    fn spec(&self, transitions: u32) -> LeaseSpec {
        // For people to read; nobody here judges by it. The API wants microseconds.
        let now = rfc3339(SystemTime::now()).replace('Z', ".000000Z");
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: Some(TERM.as_secs() as u32),
            acquire_time: None,
            renew_time: Some(now),
            lease_transitions: Some(transitions),
        }
    }

    // So that the next one need not wait for the term to end.
    async fn resign(&mut self) {
        if !self.term.is_ours() {
            return;
        }
        self.term.set(None);
        let give = async {
            let mut lease = self.api.get(LEASE).await?;
            if lease.spec.holder_identity.as_deref() == Some(&self.identity) {
                lease.spec.holder_identity = None;
                self.api.replace(LEASE, &PostParams::default(), &lease).await?;
            }
            Ok::<(), kube::Error>(())
        };
        let _ = timeout(ANSWER, give).await;
    }
}

fn took(answer: Result<Lease, kube::Error>) -> Result<bool, kube::Error> {
    match answer {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
        Err(e) => Err(e),
    }
}
