//! One process of a container, as the Task service knows it: its state, its streams and its end.

use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::unistd::Pid;
use tokio::sync::watch;

use crate::error::{Error, Result};
use crate::reaper::{Exit, Reaper};
use crate::state::{Action, State};
use crate::stdio::{ConnectedStdio, Copies, Ends, ExpectedStdio, Parked, StdioRequest};
use crate::sys;

/// A container's init (which has no exec id) or an exec.
pub struct Process {
    container_id: String,
    exec_id: String,
    stdio: StdioRequest,
    inner: Mutex<Inner>,
    exit: watch::Sender<Option<Exit>>,
}

struct Inner {
    state: State,
    pid: Option<Pid>,
    expected: Option<ExpectedStdio>,
    terminal: Option<OwnedFd>,
    copies: Option<Copies>,
    /// There while it is suspended, and until it is started as another container's.
    parked: Option<Parked>,
}

impl Process {
    /// A process that has not been started; `expected` are the streams that `stdio` asks for.
    pub fn new(
        container_id: &str,
        exec_id: &str,
        stdio: StdioRequest,
        expected: ExpectedStdio,
        state: State,
    ) -> Self {
        Self {
            container_id: container_id.to_owned(),
            exec_id: exec_id.to_owned(),
            stdio,
            inner: Mutex::new(Inner {
                state,
                pid: None,
                expected: Some(expected),
                terminal: None,
                copies: None,
                parked: None,
            }),
            exit: watch::Sender::new(None),
        }
    }

    /// This suspended process as the init of container `container_id`, yet to be started. Nobody can do anything with it under its former
    /// name any more but learn of its end. `watch` takes its exit over.
    ///
    /// # Errors
    ///
    /// `WrongState`, `NotSuspended`, `InvalidRequest` where one of the two has a terminal, and those of `watch`. Nothing has changed
    /// then.
    pub fn adopt<T>(
        &self,
        container_id: &str,
        stdio: StdioRequest,
        expected: ExpectedStdio,
        watch: impl FnOnce(Pid) -> Option<T>,
    ) -> Result<(Self, T)> {
        let mut inner = self.inner();
        let action = Action::Adopt;
        let state = inner.state.after(action).ok_or_else(|| Error::WrongState {
            action,
            process: self.to_string(),
            state: inner.state,
        })?;
        let (Some(pid), true) = (inner.pid, inner.parked.is_some()) else {
            return Err(Error::NotSuspended(self.to_string()));
        };
        if stdio.terminal != self.stdio.terminal {
            let has = if self.stdio.terminal { "has a terminal" } else { "has no terminal" };
            return Err(Error::InvalidRequest(format!("{self} {has}")));
        }
        let watched = watch(pid).ok_or_else(|| Error::Finished(self.to_string()))?;
        inner.state = State::Deleting;
        // What it copies to and from is the former shim's.
        inner.copies = None;
        let adopted = Self {
            container_id: container_id.to_owned(),
            exec_id: String::new(),
            stdio,
            inner: Mutex::new(Inner {
                state,
                pid: Some(pid),
                expected: Some(expected),
                terminal: inner.terminal.take(),
                copies: None,
                parked: inner.parked.take(),
            }),
            exit: self.exit.clone(),
        };
        Ok((adopted, watched))
    }

    /// Empty for a container's init.
    pub fn exec_id(&self) -> &str {
        &self.exec_id
    }

    /// The streams as they were asked for.
    pub fn stdio(&self) -> &StdioRequest {
        &self.stdio
    }

    /// Where it stands.
    pub fn state(&self) -> State {
        self.inner().state
    }

    /// Its pid in the guest; 0 before it has one.
    pub fn pid(&self) -> u32 {
        self.inner().pid.map_or(0, |pid| pid.as_raw().cast_unsigned())
    }

    /// How it ended, if it has.
    pub fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Waits for its end.
    pub async fn wait(&self) -> Exit {
        let mut exit = self.exit.subscribe();
        match exit.wait_for(Option::is_some).await.map(|exit| *exit) {
            Ok(Some(exit)) => exit,
            // The sender is ours, so it cannot be closed, and the value is there by the condition.
            Ok(None) | Err(_) => std::future::pending().await,
        }
    }

    /// Passes to the next state.
    ///
    /// # Errors
    ///
    /// `WrongState` where the present state does not allow `action`; `Finished` for a signal that comes too late.
    pub fn advance(&self, action: Action) -> Result<()> {
        let mut inner = self.inner();
        match inner.state.after(action) {
            Some(state) => {
                inner.state = state;
                Ok(())
            }
            None if action == Action::Kill && matches!(inner.state, State::Stopped | State::Deleting) => {
                Err(Error::Finished(self.to_string()))
            }
            None => Err(Error::WrongState { action, process: self.to_string(), state: inner.state }),
        }
    }

    /// Notes its pid and its terminal.
    pub fn launched(&self, pid: Pid, terminal: Option<OwnedFd>) {
        let mut inner = self.inner();
        inner.pid = Some(pid);
        inner.terminal = terminal;
    }

    /// Waits for the shim to connect all streams.
    ///
    /// # Errors
    ///
    /// `MissingStream`.
    pub async fn connect(&self, deadline: Duration) -> Result<ConnectedStdio> {
        let expected = self.inner().expected.take().unwrap_or_default();
        expected.connected(&self.to_string(), deadline).await
    }

    /// Starts copying between the shim's streams and the process's.
    pub fn copy(&self, connected: ConnectedStdio, ends: Ends) {
        self.inner().copies = Some(connected.copy(ends));
    }

    /// The ends of its terminal.
    ///
    /// # Errors
    ///
    /// Those of [`Ends::of_terminal`].
    pub fn terminal_ends(&self) -> Result<Ends> {
        self.inner().terminal.as_ref().map_or(Ok(Ends::default()), Ends::of_terminal)
    }

    /// Whether somebody may still write to its streams.
    pub fn prints(&self) -> bool {
        self.inner().copies.as_ref().is_some_and(Copies::are_open)
    }

    /// Whether all output has reached the shim, if it has no more.
    ///
    /// # Errors
    ///
    /// Those of [`Copies::are_drained`].
    pub fn is_drained(&self) -> Result<bool> {
        self.inner().copies.as_ref().map_or(Ok(true), Copies::are_drained)
    }

    /// Keeps the ends of its pipes, whatever becomes of the shim's streams.
    ///
    /// # Errors
    ///
    /// Those of [`Copies::park`].
    pub fn park(&self) -> Result<()> {
        let mut inner = self.inner();
        inner.parked = Some(inner.copies.as_ref().map_or(Ok(Parked::default()), Copies::park)?);
        Ok(())
    }

    /// Leaves its pipes to the copies.
    pub fn unpark(&self) {
        self.inner().parked = None;
    }

    /// Whether the ends of its pipes are kept.
    pub fn is_parked(&self) -> bool {
        self.inner().parked.is_some()
    }

    /// The ends that were kept; those of its terminal if it has one.
    ///
    /// # Errors
    ///
    /// Those of [`Parked::into_ends`] and [`Ends::of_terminal`].
    pub fn parked_ends(&self) -> Result<Ends> {
        let parked = self.inner().parked.take().unwrap_or_default();
        if self.stdio.terminal { self.terminal_ends() } else { parked.into_ends() }
    }

    /// Notes that it runs its program; or already has, and has ended.
    pub fn started(&self) {
        let mut inner = self.inner();
        if let Some(state) = inner.state.after(Action::FinishStart) {
            inner.state = state;
        }
    }

    /// Notes its end.
    pub fn exited(&self, exit: Exit) {
        let mut inner = self.inner();
        if let Some(state) = inner.state.after(Action::Exit) {
            inner.state = state;
        }
        drop(inner);
        self.exit.send_replace(Some(exit));
    }

    /// Sends a signal.
    ///
    /// # Errors
    ///
    /// `WrongState`, `Finished`, `System`.
    pub fn kill(&self, signal: i32, reaper: &Reaper) -> Result<()> {
        self.advance(Action::Kill)?;
        let Some(pid) = self.inner().pid else {
            return Err(Error::WrongState {
                action: Action::Kill,
                process: self.to_string(),
                state: self.state(),
            });
        };
        reaper.signal(pid, signal).map_err(|errno| match errno {
            Errno::ESRCH => Error::Finished(self.to_string()),
            errno => Error::System { operation: "send a signal", source: errno },
        })
    }

    /// Sets the size of its terminal in characters.
    ///
    /// # Errors
    ///
    /// `WrongState`, `InvalidRequest` without a terminal, `System`.
    pub fn resize(&self, columns: u16, rows: u16) -> Result<()> {
        self.advance(Action::Resize)?;
        if !self.stdio.terminal {
            return Err(Error::InvalidRequest(format!("{self} has no terminal")));
        }
        match &self.inner().terminal {
            Some(terminal) => sys::resize_terminal(terminal.as_fd(), columns, rows)
                .map_err(Error::system("resize the terminal")),
            // An exec gets its terminal when it starts.
            None => Ok(()),
        }
    }

    /// Closes its standard input once it has got what has arrived so far.
    pub fn close_stdin(&self) {
        if let Some(copies) = &self.inner().copies {
            copies.close_stdin();
        }
    }

    /// Waits, up to `deadline`, until its output has reached the shim, and closes its streams.
    pub async fn close_stdio(&self, deadline: Duration) {
        let (copies, expected) = {
            let mut inner = self.inner();
            inner.terminal = None;
            inner.parked = None;
            (inner.copies.take(), inner.expected.take())
        };
        drop(expected);
        if let Some(copies) = copies {
            copies.finish(deadline).await;
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.exec_id.is_empty() {
            write!(f, "container {:?}", self.container_id)
        } else {
            write!(f, "process {:?} of container {:?}", self.exec_id, self.container_id)
        }
    }
}
