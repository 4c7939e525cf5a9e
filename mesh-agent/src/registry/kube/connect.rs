//! Connections to an API server: through a proxy where there is one, and closed when nobody answers any more.
//!
//! A watch may be silent for minutes, and TCP alone would never find out that its other end is gone. Keepalives of the
//! kernel find out. They end at a proxy, so that a watch through one is begun anew more often.

use std::path::PathBuf;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::future::BoxFuture;
use http_body_util::BodyExt as _;
use hyper::body::{Body, Bytes};
use hyper::header::{AUTHORIZATION, HeaderValue};
use hyper::rt::{Read, Write};
use hyper::{Request, Response, Uri};
use hyper_timeout::TimeoutConnector;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::proxy::{SocksV5, Tunnel};
use hyper_util::client::legacy::connect::{Connection, HttpConnector};
use hyper_util::rt::TokioExecutor;
use kube::client::{Body as KubeBody, ConfigExt as _};
use parking_lot::Mutex;
use tokio::time::timeout;
use tower::util::BoxCloneService;
use tower::{BoxError, Service, ServiceBuilder};

use super::access::Access;
use crate::atomic;

/// The limit of a TCP connection's making.
const TCP: Duration = Duration::from_secs(15);
/// The limit of all that comes before a request can be sent: TCP, the proxy, TLS.
const CONNECT: Duration = Duration::from_secs(40);
/// After so much silence the kernel asks whether the other end is there, and again after each interval.
const IDLE: Duration = Duration::from_secs(10);
const INTERVAL: Duration = Duration::from_secs(5);
const RETRIES: u32 = 3;
/// A connection is closed when so long nothing that was sent has been acknowledged.
const UNACKNOWLEDGED: Duration = Duration::from_secs(25);
/// The largest token that is read, in bytes.
const TOKEN_MOST: u64 = 64 << 10;

/// The body of an answer.
pub(super) type AnswerBody = Box<dyn Body<Data = Bytes, Error = BoxError> + Send + Unpin>;
/// Sends requests to one API server.
pub(super) type Sender = BoxCloneService<Request<KubeBody>, Response<AnswerBody>, BoxError>;

/// Makes connections within a limit of time.
#[derive(Debug, Clone)]
struct Limited<C> {
    inner: C,
    what: &'static str,
    most: Duration,
}

/// A connection took too long.
#[derive(Debug, thiserror::Error)]
#[error("{what} with {host} was not there within {} s", most.as_secs())]
struct TooSlow {
    what: &'static str,
    host: String,
    most: Duration,
}

impl<C> Service<Uri> for Limited<C>
where
    C: Service<Uri, Error: Into<BoxError>, Future: Send + 'static>,
{
    type Response = C::Response;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<C::Response, BoxError>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, to: Uri) -> Self::Future {
        let (what, most) = (self.what, self.most);
        let host = to.authority().map(|authority| authority.host().to_owned()).unwrap_or_default();
        let made = self.inner.call(to);
        Box::pin(async move {
            match timeout(most, made).await {
                Ok(made) => made.map_err(Into::into),
                Err(_) => Err(TooSlow { what, host, most }.into()),
            }
        })
    }
}

/// Puts the token of a file into each request, as it stands there then.
#[derive(Clone)]
struct Bearer<S> {
    inner: S,
    file: PathBuf,
    // For as long as the file cannot be read.
    last: Arc<Mutex<Option<HeaderValue>>>,
}

impl<S> Bearer<S> {
    fn token(&self) -> Result<HeaderValue, BoxError> {
        // A pipe would keep everything waiting.
        let is_file = std::fs::metadata(&self.file).and_then(|found| match found.is_file() {
            true => Ok(()),
            false => Err(std::io::Error::other("it is no regular file")),
        });
        let read = is_file.and_then(|()| std::fs::File::open(&self.file));
        let read = read.and_then(|file| atomic::read_at_most(file, TOKEN_MOST));
        let header = read.map_err(BoxError::from).and_then(|token| {
            let mut header = HeaderValue::from_bytes(&[b"Bearer ", token.trim_ascii()].concat())?;
            header.set_sensitive(true);
            Ok(header)
        });
        let mut last = self.last.lock();
        match header {
            Ok(header) => {
                *last = Some(header.clone());
                Ok(header)
            }
            Err(why) => {
                last.clone().ok_or_else(|| format!("token file {}: {why}", self.file.display()).into())
            }
        }
    }
}

impl<S> Service<Request<KubeBody>> for Bearer<S>
where
    S: Service<Request<KubeBody>, Error = BoxError, Future: Send + 'static>,
    S::Response: Send + 'static,
{
    type Response = S::Response;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<S::Response, BoxError>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<KubeBody>) -> Self::Future {
        match self.token() {
            Ok(token) => {
                request.headers_mut().insert(AUTHORIZATION, token);
                Box::pin(self.inner.call(request))
            }
            Err(why) => Box::pin(std::future::ready(Err(why))),
        }
    }
}

/// Makes what sends requests. It may run a program for the credentials, and then blocks.
///
/// # Errors
/// Fails if the credentials or the proxy's address cannot be used.
pub(super) fn sender(access: &Access) -> Result<Sender, kube::Error> {
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_keepalive(Some(IDLE));
    tcp.set_keepalive_interval(Some(INTERVAL));
    tcp.set_keepalive_retries(Some(RETRIES));
    tcp.set_tcp_user_timeout(Some(UNACKNOWLEDGED));
    let tcp = Limited { inner: tcp, what: "a TCP connection", most: TCP };
    let Some(proxy) = access.proxy() else { return finished(tcp, access) };
    let to = proxy.uri().clone();
    let authorized = |header: Option<&HeaderValue>| header.cloned();
    match to.scheme_str() {
        Some("https") => {
            let secure = access.config().rustls_https_connector_with_connector(tcp)?;
            let tunnel = Tunnel::new(to, secure);
            match authorized(proxy.basic_auth()) {
                Some(header) => finished(tunnel.with_auth(header), access),
                None => finished(tunnel, access),
            }
        }
        Some("http") => {
            let tunnel = Tunnel::new(to, tcp);
            match authorized(proxy.basic_auth()) {
                Some(header) => finished(tunnel.with_auth(header), access),
                None => finished(tunnel, access),
            }
        }
        Some(scheme @ ("socks5" | "socks5h")) => {
            let socks = SocksV5::new(to.clone(), tcp).local_dns(scheme == "socks5");
            match proxy.raw_auth() {
                Some((user, word)) => finished(socks.with_auth(user.to_owned(), word.to_owned()), access),
                None => finished(socks, access),
            }
        }
        _ => Err(kube::Error::Service(format!("the proxy {to} is none that can be used").into())),
    }
}

fn finished<C>(connector: C, access: &Access) -> Result<Sender, kube::Error>
where
    C: Service<Uri, Error: Into<BoxError>, Future: Send + 'static> + Clone + Send + Sync + 'static,
    C::Response: Read + Write + Connection + Unpin + Send + 'static,
{
    let mut config = access.config().clone();
    let user = &mut config.auth_info;
    let file = user.token_file.take_if(|_| user.token.is_none() && user.username.is_none());
    let secure = config.rustls_https_connector_with_connector(connector)?;
    let mut connector =
        TimeoutConnector::new(Limited { inner: secure, what: "a TLS connection", most: CONNECT });
    connector.set_read_timeout(config.read_timeout);
    connector.set_write_timeout(config.write_timeout);
    let client = Client::builder(TokioExecutor::new()).build::<_, KubeBody>(connector);
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(BoxError::from)
        .service(client);
    let service = ServiceBuilder::new().map_response(answer).map_err(BoxError::from).service(service);
    Ok(match file {
        Some(file) => {
            BoxCloneService::new(Bearer { inner: service, file: file.into(), last: Arc::default() })
        }
        None => BoxCloneService::new(service),
    })
}

fn answer<B>(answer: Response<B>) -> Response<AnswerBody>
where
    B: Body<Data = Bytes, Error: Into<BoxError>> + Send + Unpin + 'static,
{
    answer.map(|body| Box::new(body.map_err(Into::into)) as AnswerBody)
}
