//! The gate that holds the workers between two requests.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use virtio_queue::QueueState;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::failed;
use super::session::{KickedQueue, Session};
use super::table::lock;
use crate::devices::virtio::Activation;
use crate::error::{Error, Result};

/// Lets the workers work, or not. The device holds one end, the workers the other.
pub(super) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
    /// Set while the workers are asked to stop; read between two requests.
    stopping: AtomicBool,
    /// Written meanwhile, for those who wait for a kick.
    stop: EventFd,
}

/// What a worker is to do.
pub(super) enum Work {
    /// Serve the driver's queues.
    Requests(Arc<Session>),
    /// Something else, once.
    Errand(Errand),
}

/// See [`Gate::run`].
type Errand = Box<dyn FnOnce() + Send>;

struct State {
    phase: Phase,
    errand: Option<Errand>,
    /// Workers that use the session.
    busy: usize,
}

enum Phase {
    /// The driver has not set up the device.
    Idle,
    Running(Arc<Session>),
    Paused(Arc<Session>),
    /// The device is gone.
    Closed,
}

impl Gate {
    /// A closed gate for a device that is not set up.
    ///
    /// # Errors
    /// There is no eventfd to be had.
    pub(super) fn new() -> Result<Self> {
        Ok(Self {
            state: Mutex::new(State { phase: Phase::Idle, errand: None, busy: 0 }),
            changed: Condvar::new(),
            stopping: AtomicBool::new(false),
            stop: EventFd::new(EFD_NONBLOCK).map_err(Error::EventFd)?,
        })
    }

    /// Hands the driver's queues to the workers, who look into them when they are kicked.
    ///
    /// # Errors
    /// The kicks cannot be waited for.
    pub(super) fn open(&self, activation: Activation) -> Result<()> {
        let session = Session::new(activation, &self.stop)?;
        self.enter(Phase::Running(Arc::new(session)));
        Ok(())
    }

    /// Holds the workers, and returns when each has finished its request.
    pub(super) fn pause(&self) {
        let mut state = lock(&self.state);
        let Phase::Running(session) = &state.phase else {
            return;
        };
        state.phase = Phase::Paused(Arc::clone(session));
        self.stopping.store(true, Ordering::SeqCst);
        // Writing and reading fail only for a counter that is full or empty, which this one is not.
        let _ = self.stop.write(1);
        while state.busy > 0 {
            state = self.wait_for_change(state);
        }
        let _ = self.stop.read();
        self.stopping.store(false, Ordering::SeqCst);
    }

    /// Goes on after [`Gate::pause`], also with what was queued meanwhile.
    pub(super) fn resume(&self) {
        let session = match &lock(&self.state).phase {
            Phase::Paused(session) => Arc::clone(session),
            _ => return,
        };
        session.queues.iter().for_each(KickedQueue::kick);
        self.enter(Phase::Running(session));
    }

    /// Takes the queues away from the workers.
    pub(super) fn reset(&self) {
        self.pause();
        self.enter(Phase::Idle);
    }

    /// Ends the workers.
    pub(super) fn close(&self) {
        self.pause();
        self.enter(Phase::Closed);
    }

    /// The positions of the queues; none before the device is set up.
    pub(super) fn queue_states(&self) -> Vec<QueueState> {
        match &lock(&self.state).phase {
            Phase::Running(session) | Phase::Paused(session) => {
                session.queues.iter().map(KickedQueue::state).collect()
            }
            Phase::Idle | Phase::Closed => Vec::new(),
        }
    }

    fn enter(&self, phase: Phase) {
        lock(&self.state).phase = phase;
        self.changed.notify_all();
    }

    /// Has a worker do something, with what it may do and the caller may not, and waits for that. Legal while no requests are served.
    ///
    /// # Errors
    /// They are, or the worker is gone.
    pub(super) fn run<T: Send + 'static>(&self, errand: impl FnOnce() -> T + Send + 'static) -> Result<T> {
        let (sender, result) = mpsc::channel();
        {
            let mut state = lock(&self.state);
            if !matches!(state.phase, Phase::Idle | Phase::Paused(_)) {
                return Err(Error::Running(true));
            }
            // Whoever asks waits.
            state.errand = Some(Box::new(move || drop(sender.send(errand()))));
        }
        self.changed.notify_all();
        result.recv().map_err(|error| failed("run in a worker", io::Error::other(error)))
    }

    /// Waits until there is work; none when the device is gone. After requests, [`Gate::leave`] has to follow.
    pub(super) fn wait(&self) -> Option<Work> {
        let mut state = lock(&self.state);
        loop {
            if let Some(errand) = state.errand.take() {
                return Some(Work::Errand(errand));
            }
            match &state.phase {
                Phase::Running(session) if !session.health.is_broken() => {
                    let session = Arc::clone(session);
                    state.busy += 1;
                    return Some(Work::Requests(session));
                }
                Phase::Closed => return None,
                _ => state = self.wait_for_change(state),
            }
        }
    }

    fn wait_for_change<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    /// The worker no longer uses the session.
    pub(super) fn leave(&self, session: Arc<Session>) {
        drop(session);
        lock(&self.state).busy -= 1;
        self.changed.notify_all();
    }

    /// Whether the workers are to come back after their requests.
    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }
}
