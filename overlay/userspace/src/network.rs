//! Which UDP sockets are in use: changed by configuration, picked up by the event loop.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::features::Features;
use crate::sys::event::Waker;
use crate::sys::udp::UdpPair;
use crate::uapi::{SocketControl, SocketSnapshot};

// How long sockets that the event loop lets go of may take to be closed, in steps.
const CLOSING_STEPS: usize = 250;
const CLOSING_STEP: Duration = Duration::from_millis(1);
// Sockets that nobody holds any more are closed by whoever held them last, a moment later; on a busy machine, much later.
const CLOSED_BY: Duration = Duration::from_secs(1);

/// The sockets, and the wish for them while the link is down.
pub struct Network {
    state: Mutex<State>,
    changed: Waker,
    generation: AtomicU64,
    wanted: Features,
}

struct State {
    sockets: Option<Arc<UdpPair>>,
    // Replaced, but perhaps still held, and with them their ports, by the event loop.
    replaced: Vec<(u16, Weak<UdpPair>, Instant)>,
    port: u16,
    mark: u32,
}

impl Network {
    /// No sockets yet, and no wish for a particular port. Those to come use what they may and can of `wanted`.
    pub fn new(wanted: Features) -> io::Result<Self> {
        let state = State { sockets: None, replaced: Vec::new(), port: 0, mark: 0 };
        Ok(Self { state: Mutex::new(state), changed: Waker::new()?, generation: AtomicU64::new(1), wanted })
    }

    /// The sockets to use now.
    pub fn sockets(&self) -> Option<Arc<UdpPair>> {
        self.state.lock().sockets.clone()
    }

    /// A number, not 0, that grows when the sockets are replaced.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Set when the sockets have been replaced.
    pub fn changed(&self) -> &Waker {
        &self.changed
    }

    /// Makes sure that there are sockets, on the wished port.
    pub fn open(&self) -> io::Result<()> {
        let mut state = self.state.lock();
        if state.sockets.is_none() {
            let sockets = UdpPair::bind(state.port, state.mark, self.wanted)?;
            self.use_now(&mut state, Arc::new(sockets));
        }
        Ok(())
    }

    fn use_now(&self, state: &mut State, sockets: Arc<UdpPair>) {
        state.port = sockets.port();
        let before = state.sockets.replace(sockets);
        state.replaced.retain(|(_, sockets, at)| sockets.strong_count() > 0 || at.elapsed() < CLOSED_BY);
        state.replaced.extend(before.map(|before| (before.port(), Arc::downgrade(&before), Instant::now())));
        self.generation.fetch_add(1, Ordering::Release);
        self.changed.wake();
    }
}

impl State {
    // A port that only we ourselves still hold is not taken.
    fn bind(&self, port: u16, wanted: Features) -> io::Result<Arc<UdpPair>> {
        let mut steps = CLOSING_STEPS;
        loop {
            let ours = |(replaced, ..): &&(u16, Weak<UdpPair>, Instant)| *replaced == port;
            let mut ours = self.replaced.iter().filter(ours).peekable();
            let known = ours.peek().is_some();
            if let Some(sockets) = ours.find_map(|(_, sockets, _)| sockets.upgrade()) {
                sockets.set_mark(self.mark)?;
                return Ok(sockets);
            }
            match UdpPair::bind(port, self.mark, wanted) {
                Err(error) if known && steps > 0 && error.raw_os_error() == Some(libc::EADDRINUSE) => {
                    steps -= 1;
                    thread::sleep(CLOSING_STEP);
                }
                result => return result.map(Arc::new),
            }
        }
    }
}

impl SocketControl for Network {
    fn snapshot(&self) -> SocketSnapshot {
        let state = self.state.lock();
        SocketSnapshot { listen_port: state.port, fwmark: state.mark }
    }

    fn features(&self) -> Features {
        // Before there are sockets, what is asked for is the best that can be said.
        let wanted = Features { tun_tso: false, tun_uso: false, ..self.wanted };
        self.sockets().map_or(wanted, |sockets| sockets.features())
    }

    // Bound at once, even while the link is down, so that a taken port is reported to whoever asked for it.
    fn set_listen_port(&self, port: u16) -> io::Result<()> {
        let mut state = self.state.lock();
        if port != 0 && state.sockets.as_ref().is_some_and(|sockets| sockets.port() == port) {
            return Ok(());
        }
        let sockets = state.bind(port, self.wanted)?;
        self.use_now(&mut state, sockets);
        Ok(())
    }

    fn set_fwmark(&self, mark: u32) -> io::Result<()> {
        let mut state = self.state.lock();
        if let Some(sockets) = &state.sockets {
            sockets.set_mark(mark)?;
        }
        state.mark = mark;
        Ok(())
    }
}
