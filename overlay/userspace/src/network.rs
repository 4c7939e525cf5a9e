//! Which UDP sockets are in use: changed by configuration, picked up by the event loop.

use std::io;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::sys::event::Waker;
use crate::sys::udp::UdpPair;
use crate::uapi::{SocketControl, SocketSnapshot};

/// The sockets, and the wish for them while the link is down.
pub struct Network {
    state: Mutex<State>,
    changed: Waker,
}

struct State {
    sockets: Option<Arc<UdpPair>>,
    port: u16,
    mark: u32,
}

impl Network {
    /// No sockets yet, and no wish for a particular port.
    pub fn new() -> io::Result<Self> {
        let state = State { sockets: None, port: 0, mark: 0 };
        Ok(Self { state: Mutex::new(state), changed: Waker::new()? })
    }

    /// The sockets to use now.
    pub fn sockets(&self) -> Option<Arc<UdpPair>> {
        self.state.lock().sockets.clone()
    }

    /// Set when the sockets have been replaced.
    pub fn changed(&self) -> &Waker {
        &self.changed
    }

    /// Makes sure that there are sockets, on the wished port.
    pub fn open(&self) -> io::Result<()> {
        let mut state = self.state.lock();
        if state.sockets.is_none() {
            let sockets = UdpPair::bind(state.port, state.mark)?;
            self.use_now(&mut state, sockets);
        }
        Ok(())
    }

    fn use_now(&self, state: &mut State, sockets: UdpPair) {
        state.port = sockets.port();
        state.sockets = Some(Arc::new(sockets));
        self.changed.wake();
    }
}

impl SocketControl for Network {
    fn snapshot(&self) -> SocketSnapshot {
        let state = self.state.lock();
        SocketSnapshot { listen_port: state.port, fwmark: state.mark }
    }

    // Bound at once, even while the link is down, so that a taken port is reported to whoever asked for it.
    fn set_listen_port(&self, port: u16) -> io::Result<()> {
        let mut state = self.state.lock();
        if port != 0 && state.sockets.as_ref().is_some_and(|sockets| sockets.port() == port) {
            return Ok(());
        }
        let sockets = UdpPair::bind(port, state.mark)?;
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
