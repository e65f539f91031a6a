//! One process of a container: its init, or an exec.

mod state;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use protobuf::MessageField;
use protobuf::well_known_types::timestamp::Timestamp;
use tokio::sync::watch;

use crate::stdio::{Endpoints, Stdio, Streams};
use crate::{Error, Result};

pub use state::{State, Step};

/// The exit status of a process that could not be started; the one containerd itself uses for "unknown".
pub const NOT_STARTED: u32 = 255;

/// The exit status of a process that died with its VM: killed by SIGKILL.
pub const KILLED: u32 = 128 + 9;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// As a shell reports it: 128 + n for death by signal n.
    pub status: u32,
    /// When, by the host's clock.
    pub at: SystemTime,
}

impl Exit {
    /// An end that has just come.
    pub fn now(status: u32) -> Self {
        Self { status, at: SystemTime::now() }
    }

    /// [`Exit::at`] for a protobuf message.
    pub fn timestamp(&self) -> MessageField<Timestamp> {
        MessageField::some(self.at.into())
    }
}

#[derive(Clone, Copy, Debug)]
struct Status {
    state: State,
    exit: Option<Exit>,
}

/// One process and what containerd may know about it.
#[derive(Debug)]
pub struct Process {
    /// The container's identifier.
    pub container_id: String,
    /// Empty for the init process.
    pub exec_id: String,
    /// What containerd named as its stdin, stdout and stderr.
    pub endpoints: Endpoints,
    status: watch::Sender<Status>,
    /// The guest's ends of its streams, until it is started.
    streams: Mutex<Option<Streams>>,
    stdio: Mutex<Option<Arc<Stdio>>>,
    /// containerd has asked for the end of stdin, maybe before the start.
    stdin_closed: AtomicBool,
    /// The agent has told of its end.
    end_told: AtomicBool,
}

impl Process {
    /// A process that the agent is about to make.
    pub fn new(container_id: &str, exec_id: &str, endpoints: Endpoints) -> Self {
        Self {
            container_id: container_id.into(),
            exec_id: exec_id.into(),
            endpoints,
            status: watch::Sender::new(Status { state: State::Creating, exit: None }),
            streams: Mutex::new(None),
            stdio: Mutex::new(None),
            stdin_closed: AtomicBool::new(false),
            end_told: AtomicBool::new(false),
        }
    }

    /// The identifier that containerd uses in events: the exec's, or the container's for the init process.
    pub fn id(&self) -> &str {
        if self.exec_id.is_empty() { &self.container_id } else { &self.exec_id }
    }

    /// Where it is in its life.
    pub fn state(&self) -> State {
        self.status.borrow().state
    }

    /// How it ended, if it has.
    pub fn exit(&self) -> Option<Exit> {
        self.status.borrow().exit
    }

    /// Makes one step.
    ///
    /// # Errors
    /// [`Error::WrongState`], which names `operation`.
    pub fn step(&self, step: Step, operation: &'static str) -> Result<()> {
        let mut refused = None;
        self.status.send_if_modified(|status| match status.state.after(step) {
            Some(next) => {
                status.state = next;
                true
            }
            None => {
                refused = Some(status.state.name());
                false
            }
        });
        refused.map_or(Ok(()), |state| Err(Error::WrongState { operation, state }))
    }

    /// The agent tells of its end. Says whether for the first time.
    pub fn end_told(&self) -> bool {
        !self.end_told.swap(true, Ordering::Relaxed)
    }

    /// Records the end. The first one counts; says whether this was it.
    pub fn finish(&self, exit: Exit) -> bool {
        self.status.send_if_modified(|status| match status.state.after(Step::Exit) {
            Some(next) if status.exit.is_none() => {
                *status = Status { state: next, exit: Some(exit) };
                true
            }
            _ => false,
        })
    }

    /// Records that the start failed, which is an end as well. Says whether it was the first.
    pub fn finish_unstarted(&self) -> bool {
        self.status.send_if_modified(|status| {
            let first = status.state == State::Starting && status.exit.is_none();
            if first {
                *status = Status { state: State::Stopped, exit: Some(Exit::now(NOT_STARTED)) };
            }
            first
        })
    }

    /// Makes everybody who waits for the end go on, of a process that never began and never will.
    pub fn forget(&self) {
        self.status.send_modify(|status| {
            status.state = State::Deleting;
            status.exit.get_or_insert_with(|| Exit::now(NOT_STARTED));
        });
    }

    /// Waits for the end; at once if it has ended.
    pub async fn wait(&self) -> Exit {
        let mut status = self.status.subscribe();
        // The sender lives as long as `self`, so this cannot fail.
        let exit = status.wait_for(|status| status.exit.is_some()).await.ok().and_then(|status| status.exit);
        exit.unwrap_or_else(|| Exit::now(NOT_STARTED))
    }

    /// Waits until no creation or start is under way.
    pub async fn settled(&self) {
        let mut status = self.status.subscribe();
        let settled = |status: &Status| !matches!(status.state, State::Creating | State::Starting);
        // As above.
        let _ = status.wait_for(settled).await;
    }

    /// Waits until it is not alive: never started, or ended.
    pub async fn not_alive(&self) {
        let mut status = self.status.subscribe();
        // As above.
        let _ = status.wait_for(|status| !status.state.is_alive()).await;
    }

    /// Keeps the guest's ends of its streams until it is started.
    pub fn set_streams(&self, streams: Streams) {
        *self.streams.lock().unwrap_or_else(PoisonError::into_inner) = Some(streams);
    }

    /// Gives the guest's ends of its streams away.
    pub fn take_streams(&self) -> Option<Streams> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Keeps the open ends of its stdio.
    pub fn set_stdio(&self, stdio: Stdio) {
        let mut kept = self.lock_stdio();
        if self.stdin_closed.load(Ordering::Relaxed) {
            stdio.close_stdin();
        }
        *kept = Some(Arc::new(stdio));
    }

    /// Lets stdin end as soon as no client has it open.
    pub fn close_stdin(&self) {
        let stdio = self.lock_stdio();
        self.stdin_closed.store(true, Ordering::Relaxed);
        if let Some(stdio) = &*stdio {
            stdio.close_stdin();
        }
    }

    /// The open ends of its stdio.
    pub fn stdio(&self) -> Option<Arc<Stdio>> {
        self.lock_stdio().clone()
    }

    /// Gives the open ends of its stdio away, for closing.
    pub fn take_stdio(&self) -> Option<Arc<Stdio>> {
        self.lock_stdio().take()
    }

    fn lock_stdio(&self) -> std::sync::MutexGuard<'_, Option<Arc<Stdio>>> {
        self.stdio.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process() -> Process {
        Process::new("c", "", Endpoints::default())
    }

    fn running() -> Process {
        let process = process();
        for step in [Step::Created, Step::Start, Step::Started] {
            process.step(step, "begin").unwrap();
        }
        process
    }

    #[test]
    fn a_wrong_step_names_the_operation_and_the_state() {
        let error = running().step(Step::Delete, "delete").unwrap_err();
        assert_eq!(error.to_string(), "cannot delete a process that is running");
    }

    #[test]
    fn only_the_first_end_counts() {
        let process = running();
        assert!(process.finish(Exit::now(3)));
        assert!(!process.finish(Exit::now(4)));
        assert_eq!(process.exit().unwrap().status, 3);
        assert_eq!(process.state(), State::Stopped);
    }

    #[tokio::test]
    async fn waiting_for_a_stopped_process_returns_at_once() {
        let process = running();
        process.finish(Exit::now(42));
        assert_eq!(process.wait().await.status, 42);
    }

    #[tokio::test]
    async fn an_end_does_not_overtake_the_start() {
        let process = process();
        process.step(Step::Created, "create").unwrap();
        process.step(Step::Start, "start").unwrap();
        assert!(!process.finish(Exit::now(0)));
        process.step(Step::Started, "start").unwrap();
        process.settled().await;
        assert!(process.finish(Exit::now(0)));
    }

    #[tokio::test]
    async fn a_failed_start_is_an_end_and_a_later_end_is_none() {
        let process = process();
        process.step(Step::Created, "create").unwrap();
        process.step(Step::Start, "start").unwrap();
        assert!(process.finish_unstarted());
        assert!(!process.finish(Exit::now(0)));
        assert_eq!(process.wait().await.status, NOT_STARTED);
    }

    #[tokio::test]
    async fn forgetting_a_process_releases_those_who_wait() {
        let process = process();
        process.step(Step::Created, "create").unwrap();
        let (exit, ()) = tokio::join!(process.wait(), async { process.forget() });
        assert_eq!(exit.status, NOT_STARTED);
    }
}
