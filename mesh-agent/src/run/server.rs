//! The status socket: connect, read one JSON document, end of file.

use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use tokio::io::AsyncWriteExt as _;
use tokio::net::{UnixListener, UnixStream};
use tokio::time::Instant;

use crate::status::Status;

/// How long a reader may take before it is hung up on.
const PATIENCE: Duration = Duration::from_secs(5);

/// A Unix socket, mode 0600, that is bound as soon as it can be: one that cannot stops nothing else.
pub(super) struct Listener {
    path: PathBuf,
    bound: Option<UnixListener>,
    failure: Option<String>,
    again: Instant,
}

/// How often a socket that cannot be bound is tried again.
const BIND_AGAIN: Duration = Duration::from_secs(2);

impl Listener {
    /// Tries to bind; the agent's lock is held, so that a socket which lies there is dead.
    pub(super) fn new(path: &Path) -> Self {
        let mut listener = Self { path: path.to_owned(), bound: None, failure: None, again: Instant::now() };
        listener.bind();
        listener
    }

    /// Returns why it is not bound, if so.
    pub(super) fn failure(&self) -> Option<String> {
        self.failure.clone()
    }

    fn bind(&mut self) {
        match bind(&self.path) {
            Ok(bound) => (self.bound, self.failure) = (Some(bound), None),
            Err(e) => self.failure = Some(format!("{e:#}; it is tried again")),
        }
        self.again = Instant::now() + BIND_AGAIN;
    }

    /// Waits for somebody. Safe to drop and call again.
    pub(super) async fn accept(&mut self) -> UnixStream {
        loop {
            let Some(bound) = &self.bound else {
                tokio::time::sleep_until(self.again).await;
                self.bind();
                continue;
            };
            match bound.accept().await {
                Ok((stream, _)) => return stream,
                // Out of descriptors: others need the time more.
                Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
            }
        }
    }
}

fn bind(path: &Path) -> anyhow::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            return Err(e).with_context(|| format!("removing {}", path.display()));
        }
        _ => {}
    }
    let listener = UnixListener::bind(path).with_context(|| format!("binding {}", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
        .with_context(|| format!("chmod 0600 {}", path.display()))?;
    Ok(listener)
}

/// Answers beside the loop: a reader that does not read holds nobody up.
pub(super) fn answer(mut stream: UnixStream, status: &Status) {
    let Ok(text) = serde_json::to_vec(status) else { return };
    tokio::task::spawn_local(async move {
        let _ = tokio::time::timeout(PATIENCE, async {
            stream.write_all(&text).await?;
            stream.shutdown().await
        })
        .await;
    });
}
