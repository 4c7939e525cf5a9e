//! Metrics over HTTP, for Prometheus: `GET /metrics`.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::CONTENT_TYPE;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::Instant;

/// How long a connection may last: one that says nothing is hung up on.
const PATIENCE: Duration = Duration::from_secs(10);
/// The most connections at a time; more wait.
const CONNECTIONS_MOST: usize = 8;

/// Somebody who wants the metrics.
pub(super) type Asked = oneshot::Sender<String>;

/// How often an address that cannot be bound is tried again: it may not be up yet.
const BIND_AGAIN: Duration = Duration::from_secs(2);

/// Where metrics are asked for; nowhere, if nobody configured it.
pub(super) struct Server {
    listen: Option<SocketAddr>,
    receiver: Option<mpsc::Receiver<Asked>>,
    failure: Option<String>,
    again: Instant,
}

impl Server {
    /// Listens as soon as the address can be bound; one that cannot stops nothing else. Needs a `LocalSet`.
    pub(super) async fn new(listen: Option<SocketAddr>) -> Self {
        let mut server = Self { listen, receiver: None, failure: None, again: Instant::now() };
        server.bind().await;
        server
    }

    /// Returns why nobody can ask, if so.
    pub(super) fn failure(&self) -> Option<String> {
        self.failure.clone()
    }

    async fn bind(&mut self) {
        let Some(address) = self.listen else { return };
        match TcpListener::bind(address).await {
            Ok(listener) => {
                let (sender, receiver) = mpsc::channel(CONNECTIONS_MOST);
                tokio::task::spawn_local(accept(listener, sender));
                (self.receiver, self.failure) = (Some(receiver), None);
            }
            Err(e) => {
                self.failure = Some(format!(
                    "metrics.listen: binding {address}: {e}; no metrics are served, and it is tried again every {} s",
                    BIND_AGAIN.as_secs()
                ));
            }
        }
        self.again = Instant::now() + BIND_AGAIN;
    }

    /// Waits for somebody to ask. Safe to drop and call again.
    pub(super) async fn asked(&mut self) -> Asked {
        loop {
            if let Some(receiver) = &mut self.receiver {
                if let Some(asked) = receiver.recv().await {
                    return asked;
                }
                self.receiver = None;
            }
            if self.listen.is_none() {
                std::future::pending::<()>().await;
            }
            tokio::time::sleep_until(self.again).await;
            self.bind().await;
        }
    }
}

async fn accept(listener: TcpListener, sender: mpsc::Sender<Asked>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MOST));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let sender = sender.clone();
                tokio::task::spawn_local(async move {
                    let _ = tokio::time::timeout(PATIENCE, serve(stream, sender)).await;
                    drop(place);
                });
            }
            // Out of descriptors: others need the time more.
            Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
        }
    }
}

async fn serve(stream: TcpStream, sender: mpsc::Sender<Asked>) -> io::Result<()> {
    let service = service_fn(move |request| {
        let sender = sender.clone();
        async move { Ok::<_, Infallible>(answer(&request, &sender).await) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    connection.await.map_err(io::Error::other)
}

async fn answer(request: &Request<Incoming>, sender: &mpsc::Sender<Asked>) -> Response<Full<Bytes>> {
    let refusal = |status: StatusCode, text: &'static str| {
        let mut response = Response::new(Full::new(Bytes::from_static(text.as_bytes())));
        *response.status_mut() = status;
        response
    };
    if request.uri().path() != "/metrics" {
        return refusal(StatusCode::NOT_FOUND, "metrics are at /metrics\n");
    }
    if request.method() != Method::GET {
        return refusal(StatusCode::METHOD_NOT_ALLOWED, "GET is all that there is\n");
    }
    let (asked, told) = oneshot::channel();
    if sender.send(asked).await.is_err() {
        return refusal(StatusCode::SERVICE_UNAVAILABLE, "the agent is stopping\n");
    }
    let Ok(text) = told.await else {
        return refusal(StatusCode::SERVICE_UNAVAILABLE, "the agent is stopping\n");
    };
    let mut response = Response::new(Full::new(Bytes::from(text)));
    let kind = hyper::header::HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}
