//! Bounds on the answers of an API server: a server that never stops talking costs a known number of bytes.
//!
//! One layer around the client wraps every response body. Lists, single objects and error messages
//! have a budget of bytes for the whole body. A watch has one for each line.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use futures_util::future::BoxFuture;
use hyper::body::{Body, Bytes, Frame, SizeHint};
use hyper::{Request, Response};
use kube::Client;
use kube::client::{Body as KubeBody, ClientBuilder};
use tokio::sync::watch;
use tower::{BoxError, Layer, Service};

use super::access::Access;
use super::renew::Renewing;

/// How much is read and kept of one API server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// Bytes of a page that holds several objects. A page that is larger is asked for again with fewer.
    pub page: u64,
    /// Bytes of a page with one object, of any other answer, and of one line of a watch.
    pub answer: u64,
    /// Bytes of all pages of one list.
    pub list: u64,
    /// Objects of one kind that are kept.
    pub objects: usize,
    /// Bytes that are kept of the objects of one kind, as [`super::listing::Named::weight`] counts them.
    pub kept: usize,
}

/// The largest message that is read with a refusal, in bytes.
const REFUSAL_MOST: u64 = 64 << 10;

/// An empty page costs as much of a list's budget as this many bytes, so that pages cannot go on for ever.
pub(super) const PAGE_LEAST: u64 = 16 << 10;

impl Budget {
    /// For the cluster's own API. etcd takes objects of 1.5 MiB, which JSON can escape to six times that.
    pub const OWN: Self =
        Self { page: 4 << 20, answer: 16 << 20, list: 2 << 30, objects: 50_000, kept: 64 << 20 };
    /// For the API of another cluster, of which more nodes than these are not mirrored anyway.
    pub const REMOTE: Self =
        Self { page: 4 << 20, answer: 16 << 20, list: 512 << 20, objects: 20_000, kept: 32 << 20 };
}

/// An answer was larger than its budget. Nothing of it counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{what} of the API server is larger than the {} that are read: {}", Size(*.most), .what.remedy())]
pub struct Exceeded {
    what: Part,
    most: u64,
}

/// The part of a conversation that a budget is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Page,
    Answer,
    Line,
    Refusal,
}

impl Part {
    fn remedy(self) -> &'static str {
        match self {
            Self::Page | Self::Answer | Self::Line => {
                "look for an object of that size, or for a server that is no API server"
            }
            Self::Refusal => "check the server's address, or what stands in between",
        }
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Page => "a page",
            Self::Answer => "an answer",
            Self::Line => "a line of a watch",
            Self::Refusal => "an error message",
        })
    }
}

/// A number of bytes for people.
pub(super) struct Size(pub(super) u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            bytes if bytes >= 1 << 20 && bytes % (1 << 20) == 0 => write!(f, "{} MiB", bytes >> 20),
            bytes if bytes >= 1 << 10 && bytes % (1 << 10) == 0 => write!(f, "{} KiB", bytes >> 10),
            bytes => write!(f, "{bytes} bytes"),
        }
    }
}

/// Returns whether a request failed because its answer exceeded a budget.
pub(super) fn is_exceeded(error: &kube::Error) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if error.is::<Exceeded>() {
            return true;
        }
        cause = error.source();
    }
    false
}

/// A client whose answers are bounded.
pub struct Connected {
    /// The client.
    pub client: Client,
    /// The bytes that it has read.
    pub read: Arc<AtomicU64>,
    /// The number of times that its credentials were renewed.
    pub(super) fresh: watch::Receiver<u64>,
}

/// Makes a client whose answers are bounded. Needs a tokio runtime.
///
/// # Errors
/// Fails if the credentials cannot be used.
pub fn client(access: impl Into<Access>, budget: Budget) -> Result<Connected, kube::Error> {
    let access = access.into();
    let namespace = access.config().default_namespace.clone();
    let read = Arc::default();
    let layer = Bounds { budget, read: Arc::clone(&read) };
    let renewing = Renewing::new(access)?;
    let fresh = renewing.fresh();
    let client = ClientBuilder::new(renewing, namespace).with_layer(&layer).build();
    Ok(Connected { client, read, fresh })
}

/// Marks a request for a page of several objects.
#[derive(Debug, Clone, Copy)]
pub(super) struct Several;

/// The layer that bounds each body.
#[derive(Debug, Clone)]
struct Bounds {
    budget: Budget,
    read: Arc<AtomicU64>,
}

impl<S> Layer<S> for Bounds {
    type Service = Bounding<S>;

    fn layer(&self, inner: S) -> Bounding<S> {
        Bounding { bounds: self.clone(), inner }
    }
}

/// The service within that layer.
struct Bounding<S> {
    bounds: Bounds,
    inner: S,
}

impl<S, B> Service<Request<KubeBody>> for Bounding<S>
where
    S: Service<Request<KubeBody>, Response = Response<B>, Error = BoxError>,
    S::Future: Send + 'static,
    B: Body<Data = Bytes, Error = BoxError> + Unpin + 'static,
{
    type Response = Response<Bounded<B>>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Self::Response, BoxError>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<KubeBody>) -> Self::Future {
        let query = request.uri().query().unwrap_or_default();
        let budget = self.bounds.budget;
        let (what, most) = if query.split('&').any(|pair| pair == "watch=true") {
            (Part::Line, budget.answer)
        } else if request.extensions().get::<Several>().is_some() {
            (Part::Page, budget.page)
        } else {
            (Part::Answer, budget.answer)
        };
        let read = Arc::clone(&self.bounds.read);
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = answer.await?;
            // A refused watch answers with a message, not with lines.
            let limit = if answer.status().is_success() {
                Exceeded { what, most }
            } else {
                Exceeded { what: Part::Refusal, most: REFUSAL_MOST.min(most) }
            };
            Ok(answer.map(|inner| Bounded { inner, limit, used: 0, read }))
        })
    }
}

/// A body that fails as soon as it is larger than its budget.
struct Bounded<B> {
    inner: B,
    limit: Exceeded,
    // Of the body, or of the line that has not ended yet.
    used: u64,
    read: Arc<AtomicU64>,
}

impl<B> Bounded<B> {
    fn take(&mut self, data: &[u8]) -> Result<(), Exceeded> {
        self.read.fetch_add(data.len() as u64, Ordering::Relaxed);
        let mut rest = data;
        if self.limit.what == Part::Line {
            while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
                self.used += end as u64;
                if self.used > self.limit.most {
                    return Err(self.limit);
                }
                self.used = 0;
                rest = &rest[end + 1..];
            }
        }
        self.used += rest.len() as u64;
        if self.used > self.limit.most { Err(self.limit) } else { Ok(()) }
    }
}

impl<B: Body<Data = Bytes, Error = BoxError> + Unpin> Body for Bounded<B> {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let frame = ready!(Pin::new(&mut self.inner).poll_frame(cx));
        if let Some(Ok(frame)) = &frame
            && let Some(data) = frame.data_ref()
            && let Err(exceeded) = self.take(data)
        {
            return Poll::Ready(Some(Err(exceeded.into())));
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

#[cfg(test)]
#[path = "budget/tests.rs"]
mod tests;
