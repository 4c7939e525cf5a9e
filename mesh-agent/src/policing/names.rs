//! What names resolve to, from the answers that the kernel copies.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use mesh_policy::names::Recalled;
use mesh_policy::{Compiler, Event, dns};
use serde::{Deserialize, Serialize};

use super::flows::{LISTEN_AGAIN, READ_AGAIN, Socket, listen};
use crate::atomic;
use crate::config::{Config, Mode};

/// In the state directory: what names were seen to have, so that a restart cuts nobody.
pub const FILE: &str = "names.json";
/// So long after something was learnt at most it is kept.
const KEEP: Duration = Duration::from_secs(5);
/// Where the clock of names begins: what is recalled lies before.
const ORIGIN: u64 = 7 * 24 * 3600;

/// The least time between two writes.
const BETWEEN: Duration = Duration::from_secs(60);
/// The most addresses that are kept.
const KEPT_MOST: usize = 20_000;
/// The most bytes that are read of the file: more than so many addresses take with names of full length.
const FILE_MOST: u64 = 8 << 20;

/// Reads of the socket in one turn. A policy that changes meanwhile waits for the turn to end.
const READS_MOST: usize = 64;
/// A turn reads no further once so many addresses are others: each is a change in the kernel.
const CHANGES_MOST: usize = 1_024;

/// What the file holds.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Kept {
    /// The second of the Epoch in which it was written.
    written: u64,
    /// By name and address the second until which it counts.
    names: BTreeMap<String, BTreeMap<IpAddr, u64>>,
}

pub(super) struct Answers {
    group: Option<u16>,
    socket: Option<Socket>,
    listens_at: Instant,
    // More may wait to be read.
    more: bool,
    // Since when the clock of names counts.
    began: Instant,
    deaf: Option<String>,
    file: PathBuf,
    // The revision that the file holds, and when the next is written.
    kept: u64,
    keep_at: Option<Instant>,
    kept_at: Option<Instant>,
}

/// Seconds of the Epoch.
fn epoch() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// What a file holds; nothing, and why, where it cannot be read.
fn read(path: &Path) -> (Kept, Option<String>) {
    let text = match std::fs::File::open(path).and_then(|file| atomic::read_at_most(file, FILE_MOST)) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return (Kept::default(), None),
        Err(e) => return (Kept::default(), Some(e.to_string())),
    };
    match serde_json::from_slice(&text) {
        Ok(kept) => (kept, None),
        Err(e) => (Kept::default(), Some(e.to_string())),
    }
}

/// A second of one clock on another, by what both say now.
fn moved(second: u64, from: u64, to: u64) -> u64 {
    (second.saturating_add(to)).saturating_sub(from)
}

/// Reads as long as there is more, and as far as one turn goes. Returns whether there may be more.
fn bounded<C>(
    compiler: &mut C,
    renamed: impl Fn(&C) -> usize,
    mut read: impl FnMut(&mut C) -> io::Result<bool>,
) -> io::Result<bool> {
    let before = renamed(compiler);
    for _ in 0..READS_MOST {
        if renamed(compiler).saturating_sub(before) >= CHANGES_MOST {
            return Ok(true);
        }
        if !read(compiler)? {
            return Ok(false);
        }
    }
    Ok(true)
}

impl Answers {
    pub(super) fn new(config: &Config) -> Self {
        let wanted = config.policy.mode != Mode::Off;
        let now = Instant::now();
        Self {
            group: wanted.then_some(config.policy.dns.group),
            socket: None,
            listens_at: now,
            more: false,
            began: now,
            deaf: None,
            file: config.state_dir.join(FILE),
            kept: 0,
            keep_at: None,
            kept_at: None,
        }
    }

    /// Tells a compiler that knows nothing yet what an agent before knew.
    pub(super) fn recall(&mut self, compiler: &mut Compiler) {
        let (kept, wrong) = read(&self.file);
        if let Some(why) = wrong {
            tracing::warn!("{}: {why}; names are learnt anew", self.file.display());
        }
        // A clock that went back since must not make anything last longer.
        let (clock, epoch) = (self.clock(Instant::now()), epoch().max(kept.written));
        let all = kept.names.into_iter().flat_map(|(name, addresses)| {
            let of = move |(address, until)| Recalled {
                name: name.clone(),
                address,
                until: moved(until, epoch, clock),
            };
            addresses.into_iter().map(of)
        });
        let all: Vec<Recalled> = all.take(KEPT_MOST).collect();
        if !all.is_empty() {
            compiler.take(Event::Recalled(all, clock));
        }
        self.kept = compiler.state().world.names.revision();
    }

    /// Writes what is known for an agent to come.
    pub(super) fn keep(&mut self, compiler: &Compiler) {
        self.keep_at = None;
        self.kept_at = Some(Instant::now());
        let names = &compiler.state().world.names;
        if std::mem::replace(&mut self.kept, names.revision()) == names.revision() {
            return;
        }
        let (clock, epoch) = (self.clock(Instant::now()), epoch());
        let mut kept = Kept { written: epoch, ..Kept::default() };
        for Recalled { name, address, until } in names.kept(KEPT_MOST) {
            kept.names.entry(name).or_default().insert(address, moved(until, clock, epoch));
        }
        let text = serde_json::to_vec(&kept).map_err(io::Error::other);
        if let Err(e) = text.and_then(|text| atomic::replace(&self.file, &text, 0o600)) {
            tracing::warn!("{}: {e}; at a restart names have to be asked for again", self.file.display());
        }
    }

    /// Whether what the kernel copies is heard; else it is not asked to.
    pub(super) fn hears(&self) -> bool {
        self.socket.is_some()
    }

    pub(super) fn listener(&self) -> Option<Socket> {
        self.socket.clone()
    }

    /// Begins to listen, where it is time for a try.
    pub(super) fn listen(&mut self) {
        let Some(group) = self.group.filter(|_| self.socket.is_none()) else { return };
        if Instant::now() < self.listens_at {
            return;
        }
        self.listens_at = Instant::now() + LISTEN_AGAIN;
        match listen(group, Some(dns::RANGE)) {
            Ok(socket) => (self.socket, self.deaf) = (Some(socket), None),
            Err(e) => self.deaf = Some(e.to_string()),
        }
    }

    /// What is wrong, where a policy speaks of names.
    pub(super) fn failure(&self, compiler: &Compiler) -> Option<String> {
        let why = self.deaf.as_ref().filter(|_| compiler.state().speaks_of_names())?;
        let group = self.group.unwrap_or_default();
        Some(format!(
            "policy.dns: NFLOG group {group}: {why}; domainNames match nothing; another group may be free"
        ))
    }

    /// Seconds of the names' clock.
    fn clock(&self, at: Instant) -> u64 {
        ORIGIN + at.saturating_duration_since(self.began).as_secs()
    }

    /// When a name has an address no more, or when to try to listen again.
    pub(super) fn wake_at(&self, compiler: Option<&Compiler>) -> Option<Instant> {
        let deaf = self.group.is_some() && self.socket.is_none();
        let due = compiler.and_then(|compiler| compiler.state().world.names.due());
        let due = due.map(|second| self.began + Duration::from_secs(second.saturating_sub(ORIGIN)));
        let more = self.more.then(|| Instant::now() + READ_AGAIN);
        [deaf.then_some(self.listens_at), due, self.keep_at, more].into_iter().flatten().min()
    }

    /// Tells the compiler what was answered, as far as a turn goes, and how late it is.
    pub(super) fn turn(&mut self, compiler: &mut Compiler) {
        let now = self.clock(Instant::now());
        if let Some(socket) = &self.socket {
            let told = bounded(compiler, Compiler::renamed, |compiler| {
                socket.get_ref().receive(1, |logged| {
                    if let Some(resolved) = dns::wanted(logged.packet, compiler.state().world.names.wanted())
                    {
                        compiler.take(Event::Resolved(resolved, now));
                    }
                })
            });
            self.more = *told.as_ref().unwrap_or(&false);
            if let Err(e) = told {
                (self.deaf, self.socket) = (Some(format!("reading: {e}")), None);
            }
        }
        if compiler.state().world.names.due().is_some_and(|due| due <= now) {
            compiler.take(Event::Clock(now));
        }
        if compiler.state().world.names.revision() != self.kept {
            let soon = Instant::now() + KEEP;
            let due = self.kept_at.map_or(soon, |at| soon.max(at + BETWEEN));
            let at = *self.keep_at.get_or_insert(due);
            if at <= Instant::now() {
                self.keep(compiler);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_is_the_same_on_both_clocks() {
        for (second, from, to, expected) in [(110, 100, 1000, 1010), (90, 100, 1000, 990), (1, 100, 50, 0)] {
            assert_eq!(moved(second, from, to), expected);
        }
    }

    #[test]
    fn a_turn_ends_though_answers_go_on() {
        // A policy that changes waits for no more than that.
        for (each, most) in [(0, 0), (1, READS_MOST), (200, CHANGES_MOST + 200)] {
            let (mut renamed, mut reads) = (5, 0);
            let more = bounded(
                &mut renamed,
                |renamed| *renamed,
                |renamed| {
                    (*renamed, reads) = (*renamed + each, reads + 1);
                    Ok(true)
                },
            );
            assert!(
                more.unwrap() && reads <= READS_MOST && renamed - 5 <= most,
                "{each}: {reads}, {renamed}"
            );
        }
        let mut left = 3;
        let more = bounded(
            &mut left,
            |_| 0,
            |left| {
                *left -= 1;
                Ok(*left > 0)
            },
        );
        assert!(!more.unwrap() && left == 0);
    }

    #[test]
    fn a_file_that_is_broken_is_no_file_and_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        assert_eq!(read(&path), (Kept::default(), None));
        let with = |names: &str| format!(r#"{{"written": 9, "names": {names}}}"#);
        std::fs::write(&path, with(r#"{"example.com": {"192.0.2.1": 5}}"#)).unwrap();
        let (kept, wrong) = read(&path);
        assert_eq!((kept.names["example.com"].len(), wrong), (1, None));
        for broken in
            ["{", &with(r#"{"example.com": {"nonsense": 5}}"#), &with(r#"{"a.b": {"192.0.2.1": -5}}"#)]
        {
            std::fs::write(&path, broken).unwrap();
            let (kept, wrong) = read(&path);
            assert!(kept.names.is_empty() && wrong.is_some(), "{broken}");
        }
        // However long it is, so much is read.
        std::fs::File::create(&path).unwrap().set_len(FILE_MOST + (1 << 30)).unwrap();
        assert!(read(&path).1.is_some_and(|why| why.contains("more than")));
    }
}
