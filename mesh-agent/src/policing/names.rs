//! What names resolve to, from the answers that the kernel copies.

use std::time::{Duration, Instant};

use mesh_policy::{Compiler, Event, dns};

use super::flows::{LISTEN_AGAIN, Socket, listen};
use crate::config::{Config, Mode};

pub(super) struct Answers {
    group: Option<u16>,
    socket: Option<Socket>,
    listens_at: Instant,
    // Since when the clock of names counts.
    began: Instant,
    deaf: Option<String>,
}

impl Answers {
    pub(super) fn new(config: &Config) -> Self {
        let wanted = config.policy.mode != Mode::Off;
        let now = Instant::now();
        Self {
            group: wanted.then_some(config.policy.dns.group),
            socket: None,
            listens_at: now,
            began: now,
            deaf: None,
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
        let why = self.deaf.as_ref().filter(|_| compiler.state().domains().next().is_some())?;
        let group = self.group.unwrap_or_default();
        Some(format!(
            "policy.dns: NFLOG group {group}: {why}; domainNames match nothing; another group may be free"
        ))
    }

    /// Seconds of the names' clock.
    fn clock(&self, at: Instant) -> u64 {
        at.saturating_duration_since(self.began).as_secs()
    }

    /// When a name has an address no more, or when to try to listen again.
    pub(super) fn wake_at(&self, compiler: Option<&Compiler>) -> Option<Instant> {
        let deaf = self.group.is_some() && self.socket.is_none();
        let due = compiler.and_then(|compiler| compiler.state().world.names.due());
        let due = due.map(|second| self.began + Duration::from_secs(second));
        [deaf.then_some(self.listens_at), due].into_iter().flatten().min()
    }

    /// Tells the compiler what was answered, and how late it is.
    pub(super) fn turn(&mut self, compiler: &mut Compiler) {
        let now = self.clock(Instant::now());
        if let Some(socket) = &self.socket {
            let told = socket.get_ref().receive(|logged| {
                if let Some(resolved) = dns::answer(logged.packet) {
                    compiler.take(Event::Resolved(resolved, now));
                }
            });
            if let Err(e) = told {
                (self.deaf, self.socket) = (Some(format!("reading: {e}")), None);
            }
        }
        if compiler.state().world.names.due().is_some_and(|due| due <= now) {
            compiler.take(Event::Clock(now));
        }
    }
}
