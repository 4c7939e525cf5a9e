//! The peers that time has something to do for, so that silent ones cost nothing, however many there are.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::peer::Peer;

/// Who has woken up since the last sweep. Its lock is taken last, and held for no longer than an insertion.
#[derive(Default)]
pub struct Roster {
    woken: Mutex<Vec<Arc<Peer>>>,
}

impl Roster {
    /// Adds a peer that is not on it.
    pub(crate) fn add(&self, peer: Arc<Peer>) {
        self.woken.lock().push(peer);
    }

    /// Moves all into `queue`.
    pub(crate) fn drain_into(&self, queue: &mut VecDeque<Arc<Peer>>) {
        queue.extend(self.woken.lock().drain(..));
    }
}
