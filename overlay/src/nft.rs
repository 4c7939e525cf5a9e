//! The guard's table in nftables, through the `nft` program.

mod listing;

use std::io;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

use crate::backend::{BackendError, NftBackend, ObservedGuard};
use crate::guard::{self, Guard, Slot, TABLE};
use listing::Listing;

/// How long nft may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// The guard's table. What it wrote last is remembered, so that any other content is noticed.
pub struct Nft {
    program: PathBuf,
    /// What comes before nft's own arguments: where a loader starts it, its path.
    before: Vec<String>,
    /// The fingerprint and the digest of the listing after the last write or adoption.
    known: Option<(String, [u8; 32])>,
}

impl Default for Nft {
    fn default() -> Self {
        Self::new()
    }
}

impl Nft {
    /// With the `nft` on PATH, or what the environment variable `SENNIT_NFT` says: a program and the arguments
    /// that come before nft's own.
    pub fn new() -> Self {
        let said = std::env::var("SENNIT_NFT").unwrap_or_default();
        let mut words = said.split_whitespace().map(str::to_owned);
        match words.next() {
            Some(program) => Self { before: words.collect(), ..Self::with_program(program.into()) },
            None => Self::with_program("nft".into()),
        }
    }

    /// With another program of nft's command line.
    pub fn with_program(program: PathBuf) -> Self {
        Self { program, before: Vec::new(), known: None }
    }

    async fn run(&self, arguments: &[&str], input: &str) -> Result<std::process::Output, BackendError> {
        let failed = |error: io::Error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied => BackendError::MissingProgram {
                program: self.program.display().to_string(),
                reason: error.to_string(),
                package: "nftables",
            },
            _ => BackendError::failed(format!("running {}", self.program.display()), error),
        };
        let mut child = Command::new(&self.program)
            .args(&self.before)
            .args(arguments)
            .env("LC_ALL", "C")
            // Times are listed in the zone that this says.
            .env("TZ", "UTC0")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // Dropping it after the time is up ends it.
            .kill_on_drop(true)
            .spawn()
            .map_err(failed)?;
        let mut stdin = child.stdin.take();
        let work = async {
            if let Some(mut stdin) = stdin.take() {
                // A program that ends early says why on stderr.
                let _ = stdin.write_all(input.as_bytes()).await;
            }
            child.wait_with_output().await
        };
        match tokio::time::timeout(PATIENCE, work).await {
            Ok(output) => output.map_err(failed),
            Err(_) => Err(BackendError::failed(
                format!("running {} {}", self.program.display(), arguments.join(" ")),
                "no answer within 10 s",
            )),
        }
    }

    async fn load(&self, action: &str, text: &str) -> Result<(), BackendError> {
        let output = self.run(&["-f", "-"], text).await?;
        if output.status.success() { Ok(()) } else { Err(BackendError::failed(action, said(&output))) }
    }

    /// Reports whether a guard of ours stands, whichever it is. Writes nothing.
    ///
    /// # Errors
    /// When nft is missing or fails.
    pub async fn stands(&self) -> Result<bool, BackendError> {
        Ok(self.list().await?.is_some_and(|listing| {
            listing.fingerprint.is_some() && listing.slots.is_some_and(|slots| !slots.is_empty())
        }))
    }

    async fn list(&self) -> Result<Option<Listing>, BackendError> {
        let output = self.run(&["-j", "list", "table", "inet", TABLE], "").await?;
        let action = format!("listing nftables table inet {TABLE}");
        if !output.status.success() {
            let said = said(&output);
            return if said.contains("No such file or directory") {
                Ok(None)
            } else {
                Err(BackendError::failed(action, said))
            };
        }
        let json = serde_json::from_slice(&output.stdout).map_err(|e| BackendError::failed(action, e))?;
        Ok(Some(Listing::read(json, &|name| nix::net::if_::if_nametoindex(name).ok())))
    }
}

fn said(output: &std::process::Output) -> String {
    let text: String = String::from_utf8_lossy(&output.stderr).trim().chars().take(2_000).collect();
    if text.is_empty() { output.status.to_string() } else { text }
}

impl NftBackend for Nft {
    async fn observe(&mut self) -> Result<ObservedGuard, BackendError> {
        let Some(listing) = self.list().await? else {
            self.known = None;
            return Ok(ObservedGuard::default());
        };
        let untouched = match (&self.known, &listing.fingerprint) {
            (Some((mark, digest)), Some(found)) => mark == found && *digest == listing.digest,
            // After a restart there is nothing to compare with but what the listing says of itself.
            (None, Some(mark)) => listing
                .guard
                .as_ref()
                .is_some_and(|guard| guard.fingerprint() == *mark || guard.former_fingerprint() == *mark),
            (_, None) => false,
        };
        if untouched && self.known.is_none() {
            self.known = listing.fingerprint.clone().map(|mark| (mark, listing.digest));
        }
        Ok(ObservedGuard {
            exempt: listing.guard.iter().flat_map(Guard::exempt).collect(),
            fingerprint: listing.fingerprint.filter(|_| untouched),
            egress_drops: listing.egress_drops,
            ingress_drops: listing.ingress_drops,
            carrier_drops: listing.carrier_drops,
            cleartext_drops: listing.cleartext_drops,
            crossing: listing.crossing,
            crossed: listing.crossed,
        })
    }

    async fn apply(&mut self, guard: &Guard) -> Result<(), BackendError> {
        let standing = match self.list().await? {
            Some(listing) => listing.slots,
            None => Some(Vec::new()),
        };
        let action = format!("replacing nftables table inet {TABLE}");
        match standing.as_deref() {
            Some([]) => self.load(&action, &guard.render(Slot::A)).await?,
            Some([old]) => {
                self.load(&action, &guard.render(old.other())).await?;
                self.load(&action, &guard::render_retirement(*old)).await?;
            }
            // An agent died between the two steps; either guard is whole.
            Some([first, second, ..]) => {
                self.load(&action, &guard::render_retirement(*first)).await?;
                self.load(&action, &guard.render(*first)).await?;
                self.load(&action, &guard::render_retirement(*second)).await?;
            }
            None => self.load(&action, &guard.render_anew()).await?,
        }
        self.known = self.list().await?.map(|listing| (guard.fingerprint(), listing.digest));
        Ok(())
    }

    async fn remove(&mut self) -> Result<(), BackendError> {
        self.known = None;
        self.load(&format!("removing nftables table inet {TABLE}"), &guard::render_removal()).await
    }
}
