//! The status socket: connect, read one JSON document, end of file.

use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use tokio::io::AsyncWriteExt as _;
use tokio::net::{UnixListener, UnixStream};

use crate::status::Status;

/// How long a reader may take before it is hung up on.
const PATIENCE: Duration = Duration::from_secs(5);

/// The listening socket, mode 0600.
pub(super) struct Server(UnixListener);

/// Somebody who asked.
pub(super) struct Asked(UnixStream);

impl Server {
    /// Binds the socket; the lock is held, so that one that lies there is dead.
    pub(super) fn bind(path: &Path) -> anyhow::Result<Self> {
        match std::fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(e).with_context(|| format!("removing {}", path.display()));
            }
            _ => {}
        }
        let listener = UnixListener::bind(path).with_context(|| format!("binding {}", path.display()))?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
            .with_context(|| format!("chmod 0600 {}", path.display()))?;
        Ok(Self(listener))
    }

    /// Waits for somebody to ask.
    pub(super) async fn asked(&self) -> Asked {
        loop {
            match self.0.accept().await {
                Ok((stream, _)) => return Asked(stream),
                // Out of descriptors: others need the time more.
                Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
            }
        }
    }
}

impl Asked {
    /// Answers beside the loop: a reader that does not read holds nobody up.
    pub(super) fn answer(mut self, status: &Status) {
        let Ok(text) = serde_json::to_vec(status) else { return };
        tokio::task::spawn_local(async move {
            let _ = tokio::time::timeout(PATIENCE, async {
                self.0.write_all(&text).await?;
                self.0.shutdown().await
            })
            .await;
        });
    }
}
