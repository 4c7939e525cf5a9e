//! Credentials that change while they are used: files are looked at, and a program is run again when it is refused.

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::future::BoxFuture;
use hyper::{Request, Response, StatusCode};
use kube::client::Body as KubeBody;
use parking_lot::Mutex;
use tokio::sync::{OwnedMutexGuard, watch};
use tokio::time::Instant;
use tower::{BoxError, Service, ServiceExt as _};

use super::access::Access;
use super::connect::{AnswerBody, Sender, sender};

/// The interval between checks of the credential files.
const LOOK: Duration = Duration::from_secs(2);
/// A program for credentials is run no more often than this.
const BREATH: Duration = Duration::from_secs(5);

struct Renewal {
    access: Mutex<Access>,
    // None: not made yet, because a program has to be run for it.
    sender: Mutex<Option<Sender>>,
    made: Mutex<Option<Instant>>,
    // One at a time makes a sender, and a program that hangs keeps the turn.
    turn: Arc<tokio::sync::Mutex<()>>,
    fresh: watch::Sender<u64>,
}

/// Sends requests with the credentials of the moment. Clones share them.
#[derive(Clone)]
pub(super) struct Renewing(Arc<Renewal>);

impl Renewing {
    /// Begins with these. Needs a tokio runtime.
    ///
    /// # Errors
    /// Fails if the credentials cannot be used. Credentials from a program fail at the first
    /// request instead.
    pub(super) fn new(access: Access) -> Result<Self, kube::Error> {
        let first = if access.runs_a_program() { None } else { Some(sender(&access)?) };
        let stamps = access.stamps();
        let renewal = Arc::new(Renewal {
            access: Mutex::new(access),
            sender: Mutex::new(first),
            made: Mutex::new(None),
            turn: Arc::default(),
            fresh: watch::Sender::new(0),
        });
        if !stamps.is_empty() {
            let weak = Arc::downgrade(&renewal);
            tokio::spawn(async move {
                let mut seen = stamps;
                loop {
                    tokio::time::sleep(LOOK).await;
                    let Some(renewal) = weak.upgrade() else { return };
                    let now = renewal.access.lock().stamps();
                    if now == seen {
                        continue;
                    }
                    match renewal.read_again().await {
                        Ok(()) => seen = renewal.access.lock().stamps(),
                        // Perhaps it is being written.
                        Err(why) => tracing::warn!("credentials that have changed: {why}"),
                    }
                }
            });
        }
        Ok(Self(renewal))
    }

    /// Follows how often credentials were renewed.
    pub(super) fn fresh(&self) -> watch::Receiver<u64> {
        self.0.fresh.subscribe()
    }
}

impl Renewal {
    async fn read_again(&self) -> Result<(), BoxError> {
        let access = self.access.lock().clone();
        let access = access.again().await?;
        let turn = Arc::clone(&self.turn).lock_owned().await;
        self.make(&access, turn).await?;
        *self.access.lock() = access;
        tracing::info!("credentials were read again");
        Ok(())
    }

    async fn make(&self, access: &Access, turn: OwnedMutexGuard<()>) -> Result<Sender, BoxError> {
        let access = access.clone();
        let (made, _turn) = tokio::task::spawn_blocking(move || (sender(&access), turn)).await?;
        let made = made?;
        *self.made.lock() = Some(Instant::now());
        *self.sender.lock() = Some(made.clone());
        self.fresh.send_modify(|count| *count += 1);
        Ok(made)
    }

    async fn current(&self) -> Result<Sender, BoxError> {
        if let Some(sender) = &*self.sender.lock() {
            return Ok(sender.clone());
        }
        let turn = Arc::clone(&self.turn).lock_owned().await;
        if let Some(sender) = &*self.sender.lock() {
            return Ok(sender.clone());
        }
        let access = self.access.lock().clone();
        self.make(&access, turn).await
    }

    /// Runs the program for credentials again, after they were refused. Returns whether it was.
    async fn run_again(&self) -> bool {
        let access = self.access.lock().clone();
        let turn = Arc::clone(&self.turn).lock_owned().await;
        let lately = self.made.lock().is_some_and(|made| made.elapsed() < BREATH);
        access.runs_a_program() && !lately && self.make(&access, turn).await.is_ok()
    }
}

fn copy(request: &Request<KubeBody>) -> Option<Request<KubeBody>> {
    let mut copy = Request::new(request.body().try_clone()?);
    *copy.method_mut() = request.method().clone();
    *copy.uri_mut() = request.uri().clone();
    *copy.headers_mut() = request.headers().clone();
    *copy.extensions_mut() = request.extensions().clone();
    Some(copy)
}

impl Service<Request<KubeBody>> for Renewing {
    type Response = Response<AnswerBody>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Self::Response, BoxError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<KubeBody>) -> Self::Future {
        let renewal = Arc::clone(&self.0);
        Box::pin(async move {
            let spare = copy(&request);
            let answer = renewal.current().await?.oneshot(request).await?;
            if answer.status() != StatusCode::UNAUTHORIZED {
                return Ok(answer);
            }
            let Some(spare) = spare else { return Ok(answer) };
            if !renewal.run_again().await {
                return Ok(answer);
            }
            renewal.current().await?.oneshot(spare).await
        })
    }
}
