//! Collects the exit of every child: PID 1 inherits all orphans of the guest, and the launch helper leaves
//! each container's first process behind as one.

use std::collections::{HashMap, VecDeque};
use std::ffi::c_int;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use nix::errno::Errno;
use nix::unistd::Pid;
use slog::{Logger, warn};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use crate::error::{Error, Result};
use crate::sys;

/// How many exits of processes that nobody watches yet are kept while something is being launched.
const MAX_UNCLAIMED: usize = 4096;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// The exit status as a shell reports it: 128 + n for death by signal n.
    pub status: u32,
    /// When it was collected, by the guest's clock.
    pub at: SystemTime,
}

/// The one place where children are waited for.
#[derive(Default)]
pub struct Reaper {
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    watched: HashMap<Pid, oneshot::Sender<Exit>>,
    unclaimed: VecDeque<(Pid, Exit)>,
    launches: usize,
}

/// Open for as long as a process may be started of which the agent does not know the pid yet. Meanwhile the
/// exits of unknown processes are kept, so that one which ends before it is watched is not missed. Outside of
/// launches they are dropped: a pid is used again, and a stale exit must not be taken for the new process's.
pub struct Launching {
    reaper: Arc<Reaper>,
}

impl Reaper {
    /// Starts collecting, in a task of the current runtime.
    ///
    /// # Errors
    ///
    /// Where SIGCHLD cannot be handled.
    pub fn start(log: Logger) -> Result<Arc<Self>> {
        let reaper = Arc::new(Self::default());
        let mut children = signal(SignalKind::child()).map_err(Error::io("handle SIGCHLD"))?;
        let collector = Arc::clone(&reaper);
        tokio::spawn(async move {
            // One signal can stand for many exits; collect until there are none.
            while children.recv().await.is_some() {
                collector.collect(&log);
            }
        });
        Ok(reaper)
    }

    /// Announces that a process is about to be started.
    pub fn launching(self: &Arc<Self>) -> Launching {
        self.table().launches += 1;
        Launching { reaper: Arc::clone(self) }
    }

    /// The exit of child `pid`, now or in future. To be called while a [`Launching`] that was opened before the
    /// process was started is still open.
    pub fn watch(&self, pid: Pid) -> oneshot::Receiver<Exit> {
        let (sender, receiver) = oneshot::channel();
        let mut table = self.table();
        match table.unclaimed.iter().position(|(unclaimed, _)| *unclaimed == pid) {
            Some(index) => {
                if let Some((_, exit)) = table.unclaimed.remove(index) {
                    // The receiver is still here, so this cannot fail.
                    let _ = sender.send(exit);
                }
            }
            None => {
                table.watched.insert(pid, sender);
            }
        }
        receiver
    }

    /// The exit of the watched process `pid`, of which its watcher so far will not learn any more; nothing where that one has been told
    /// already.
    pub fn take_over(&self, pid: Pid) -> Option<oneshot::Receiver<Exit>> {
        let (sender, receiver) = oneshot::channel();
        *self.table().watched.get_mut(&pid)? = sender;
        Some(receiver)
    }

    /// Sends `signal` to the watched process `pid`. A pid that is watched has not been collected, so that the
    /// kernel cannot have given it to another process.
    ///
    /// # Errors
    ///
    /// ESRCH for a process that has ended, EINVAL for a number that is no signal.
    pub fn signal(&self, pid: Pid, signal: c_int) -> Result<(), Errno> {
        if !self.table().watched.contains_key(&pid) {
            return Err(Errno::ESRCH);
        }
        sys::signal_process(pid, signal)
    }

    fn collect(&self, log: &Logger) {
        loop {
            match sys::collect_child() {
                Ok(Some((pid, status))) => {
                    self.record(pid, Exit { status: encode(status), at: SystemTime::now() });
                }
                Ok(None) | Err(Errno::ECHILD) => return,
                Err(Errno::EINTR) => {}
                Err(errno) => {
                    warn!(log, "cannot wait for children"; "error" => %errno);
                    return;
                }
            }
        }
    }

    fn record(&self, pid: Pid, exit: Exit) {
        let mut table = self.table();
        if let Some(watcher) = table.watched.remove(&pid) {
            // A watcher that has gone away no longer cares.
            let _ = watcher.send(exit);
        } else if table.launches > 0 {
            if table.unclaimed.len() == MAX_UNCLAIMED {
                table.unclaimed.pop_front();
            }
            table.unclaimed.push_back((pid, exit));
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Launching {
    fn drop(&mut self) {
        let mut table = self.reaper.table();
        table.launches -= 1;
        if table.launches == 0 {
            table.unclaimed = VecDeque::new();
        }
    }
}

/// The exit status as a shell reports it, from that of `waitpid(2)`.
fn encode(status: c_int) -> u32 {
    if libc::WIFSIGNALED(status) {
        128 + libc::WTERMSIG(status).cast_unsigned()
    } else {
        libc::WEXITSTATUS(status).cast_unsigned()
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;

    fn exit(status: u32) -> Exit {
        Exit { status, at: UNIX_EPOCH }
    }

    fn pid(number: i32) -> Pid {
        Pid::from_raw(number)
    }

    #[test]
    fn a_status_is_encoded_as_a_shell_does() {
        // wait(2): the exit code in the second byte, or the signal in the low seven bits, 0x80 for a core dump.
        assert_eq!(encode(0), 0);
        assert_eq!(encode(42 << 8), 42);
        assert_eq!(encode(255 << 8), 255);
        assert_eq!(encode(libc::SIGKILL), 137);
        assert_eq!(encode(libc::SIGSEGV | 0x80), 139);
        assert_eq!(encode(40), 168);
    }

    #[test]
    fn an_exit_reaches_its_watcher() {
        let reaper = Arc::new(Reaper::default());
        let mut watched = reaper.watch(pid(7));

        reaper.record(pid(8), exit(1));
        assert!(watched.try_recv().is_err());
        reaper.record(pid(7), exit(2));

        assert_eq!(watched.try_recv(), Ok(exit(2)));
    }

    #[test]
    fn a_watch_is_taken_over_until_the_exit_is_told() {
        let reaper = Arc::new(Reaper::default());
        let mut first = reaper.watch(pid(7));

        let mut second = reaper.take_over(pid(7)).unwrap();
        assert_eq!(first.try_recv(), Err(oneshot::error::TryRecvError::Closed));
        reaper.record(pid(7), exit(2));

        assert_eq!(second.try_recv(), Ok(exit(2)));
        assert!(reaper.take_over(pid(7)).is_none());
    }

    #[test]
    fn an_exit_during_a_launch_waits_for_its_watcher() {
        let reaper = Arc::new(Reaper::default());
        let launching = reaper.launching();
        reaper.record(pid(7), exit(3));

        let mut watched = reaper.watch(pid(7));

        assert_eq!(watched.try_recv(), Ok(exit(3)));
        drop(launching);
    }

    #[test]
    fn a_stale_exit_is_not_taken_for_that_of_a_later_process() {
        let reaper = Arc::new(Reaper::default());
        reaper.record(pid(7), exit(1));
        let (first, second) = (reaper.launching(), reaper.launching());
        reaper.record(pid(8), exit(1));
        drop(first);
        drop(second);

        let launching = reaper.launching();

        assert!(reaper.watch(pid(7)).try_recv().is_err());
        assert!(reaper.watch(pid(8)).try_recv().is_err());
        drop(launching);
    }

    #[test]
    fn unclaimed_exits_are_bounded() {
        let reaper = Arc::new(Reaper::default());
        let launching = reaper.launching();

        for number in 0..2 * MAX_UNCLAIMED {
            reaper.record(pid(i32::try_from(number).unwrap() + 1), exit(0));
        }

        assert_eq!(reaper.table().unclaimed.len(), MAX_UNCLAIMED);
        drop(launching);
    }

    #[test]
    fn only_a_watched_process_is_signalled() {
        let reaper = Reaper::default();

        let result = reaper.signal(Pid::this(), libc::SIGKILL);

        assert_eq!(result, Err(Errno::ESRCH));
    }
}
