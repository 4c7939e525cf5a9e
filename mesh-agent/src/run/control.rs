//! The control socket: one line of JSON asks, one line of JSON answers.

use std::io;
use std::path::Path;
use std::time::Duration;

use mesh_keyring::{NodeName, PublicKey};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};

use super::server::Listener;

/// How long a client may take to ask and to read.
const PATIENCE: Duration = Duration::from_secs(5);
/// The longest request, in bytes.
const REQUEST_MOST: u64 = 4_096;
/// The most requests that wait for the loop.
const WAITING_MOST: usize = 16;

/// A request to a running agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub enum Request {
    /// Takes a prefix that nobody holds out of the guard, or all that a node or `site NAME` held last.
    Release(String),
    /// Forgets what is remembered of another node.
    Forget(NodeName),
    /// Makes a new key, later than the generation given.
    Rekey(Option<u64>),
}

/// The agent's answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Answer {
    /// What was released.
    Released(Vec<String>),
    /// True if anything was remembered of the node.
    Forgotten(bool),
    /// The new key and its generation.
    Rekeyed(PublicKey, u64),
    /// Why nothing was done.
    Refused(String),
}

/// A request with the place for its answer.
pub(super) struct Asked {
    pub(super) request: Request,
    pub(super) answer: oneshot::Sender<Answer>,
}

/// The listening socket, mode 0600, with the requests that came in by it.
pub(super) struct Server {
    listener: Listener,
    sender: mpsc::Sender<Asked>,
    receiver: mpsc::Receiver<Asked>,
}

impl Server {
    /// Listens as soon as the socket can be bound.
    pub(super) fn new(path: &Path) -> Self {
        let (sender, receiver) = mpsc::channel(WAITING_MOST);
        Self { listener: Listener::new(path), sender, receiver }
    }

    /// Returns why nobody can ask, if so.
    pub(super) fn failure(&self) -> Option<String> {
        self.listener.failure()
    }

    /// Waits for a request. Safe to drop and call again.
    pub(super) async fn asked(&mut self) -> Asked {
        loop {
            tokio::select! {
                Some(asked) = self.receiver.recv() => return asked,
                stream = self.listener.accept() => {
                    let sender = self.sender.clone();
                    tokio::task::spawn_local(async move {
                        let _ = tokio::time::timeout(PATIENCE, serve(stream, sender)).await;
                    });
                }
            }
        }
    }
}

async fn serve(stream: UnixStream, sender: mpsc::Sender<Asked>) -> io::Result<()> {
    let (reader, mut writer) = stream.into_split();
    let mut line = String::new();
    BufReader::new(reader.take(REQUEST_MOST)).read_line(&mut line).await?;
    let answer = match serde_json::from_str(&line) {
        Ok(request) => {
            let (answer, told) = oneshot::channel();
            let asked = sender.send(Asked { request, answer }).await;
            let stopping = || Answer::Refused("the agent is stopping".to_owned());
            if asked.is_err() { stopping() } else { told.await.unwrap_or_else(|_| stopping()) }
        }
        Err(e) => Answer::Refused(format!("no request: {e}")),
    };
    let mut text = serde_json::to_vec(&answer).map_err(io::Error::other)?;
    text.push(b'\n');
    writer.write_all(&text).await?;
    writer.shutdown().await
}
