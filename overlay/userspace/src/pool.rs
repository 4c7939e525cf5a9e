//! Threads that help with traffic when it comes faster than one thread can deal with it, and sleep otherwise.

use std::io;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::thread::{self, Thread};

use parking_lot::Mutex;

use crate::worker::{Family, Shared, Worker};

/// More threads than this would have more datagrams of one session under way than boringtun's replay window of 1,024
/// has room for.
pub const MAX_THREADS: usize = 4;

/// Half the processors, 1 to [`MAX_THREADS`]: on two, a second thread takes more time than it gives.
pub fn default_threads() -> NonZeroUsize {
    let processors = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    NonZeroUsize::new((processors / 2).clamp(1, MAX_THREADS)).unwrap_or(NonZeroUsize::MIN)
}

/// Threads that sleep until there is too much to do for those that are awake.
#[derive(Debug)]
pub struct Pool {
    size: usize,
    sleeping: Mutex<Vec<Thread>>,
}

impl Pool {
    /// A pool for this many threads, which [`Pool::fill`] starts.
    pub fn new(size: usize) -> Self {
        Self { size, sleeping: Mutex::new(Vec::with_capacity(size)) }
    }

    /// Whether it has no threads at all.
    pub fn is_empty(&self) -> bool {
        self.size == 0
    }

    /// Wakes one of those that sleep.
    pub fn call(&self) {
        if self.size > 0 {
            let woken = self.sleeping.lock().pop();
            if let Some(thread) = woken {
                thread.unpark();
            }
        }
    }

    /// Starts the threads. They run as long as the process.
    pub fn fill(shared: &Arc<Shared>) -> io::Result<()> {
        for number in 1..=shared.pool.size {
            let shared = Arc::clone(shared);
            thread::Builder::new()
                .name(format!("traffic-{number}"))
                .spawn(move || shared.pool.work(Worker::new(Arc::clone(&shared))))?;
        }
        Ok(())
    }

    fn work(&self, mut worker: Worker) {
        loop {
            worker.drop_sockets();
            self.sleeping.lock().push(thread::current());
            thread::park();
            // It may have woken up by itself.
            self.sleeping.lock().retain(|thread| thread.id() != thread::current().id());
            loop {
                worker.renew_sockets();
                let received = worker.receive(Family::V4) | worker.receive(Family::V6);
                // What ails the device is the event loop's to find out.
                if !(worker.transmit().unwrap_or(false) | received) {
                    break;
                }
            }
        }
    }
}
