//! Watches for changes of links, routes and guard; one that cannot be watched is tried again.

use mesh_overlay::netlink::Watch;
use tokio::time::Instant;

use super::RETRY;

/// The kernel's word that something changed. While there is none, passes come by their timer.
pub(super) struct Drift {
    watch: Option<Watch>,
    failure: Option<String>,
    again: Instant,
}

impl Drift {
    /// Begins to watch, as soon as that can be done.
    pub(super) fn new() -> Self {
        let mut drift = Self { watch: None, failure: None, again: Instant::now() };
        drift.begin();
        drift
    }

    /// Returns why changes are seen late, if so.
    pub(super) fn failure(&self) -> Option<String> {
        self.failure.clone()
    }

    fn begin(&mut self) {
        match Watch::new() {
            Ok(watch) => (self.watch, self.failure) = (Some(watch), None),
            Err(error) => {
                self.failure = Some(format!(
                    "{error}; changes by others are seen every 10 s only, and it is tried again"
                ));
            }
        }
        self.again = Instant::now() + RETRY;
    }

    /// Waits until something changed, or may have. Safe to drop and call again.
    pub(super) async fn changed(&mut self) {
        loop {
            let Some(watch) = &mut self.watch else {
                tokio::time::sleep_until(self.again).await;
                self.begin();
                if self.watch.is_some() {
                    return;
                }
                continue;
            };
            match watch.changed().await {
                Ok(()) => return,
                Err(error) => {
                    tracing::warn!("{error}; watching anew");
                    self.watch = None;
                    self.again = Instant::now();
                }
            }
        }
    }
}
