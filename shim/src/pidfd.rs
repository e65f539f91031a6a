//! A process by descriptor: unlike a pid it never comes to mean another process (pidfd_open(2)).

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// The signal that ends a process for a system call that its filter forbids.
const SIGSYS: i32 = Signal::SYS.as_raw();

/// A process.
#[derive(Debug)]
pub struct PidFd(OwnedFd);

impl PidFd {
    /// Whichever process has `pid` now.
    ///
    /// # Errors
    /// There is none.
    pub fn open(pid: i32) -> io::Result<Self> {
        let pid = Pid::from_raw(pid).ok_or(io::ErrorKind::NotFound)?;
        Ok(Self(pidfd_open(pid, PidfdFlags::NONBLOCK)?))
    }

    /// Sends SIGKILL. Fine when it has ended.
    pub fn kill(&self) {
        let _ = pidfd_send_signal(&self.0, Signal::KILL);
    }

    /// Blocks until it has ended, but no longer than `patience`; says whether it has.
    pub fn wait(&self, patience: Duration) -> bool {
        let timeout = PollTimeout::try_from(patience).unwrap_or(PollTimeout::NONE);
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, timeout) == Ok(1)
    }

    /// Takes the dead process away if it is a child. Says how it ended, for the log.
    pub fn reap(&self) -> String {
        match waitid(WaitId::PidFd(self.0.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG) {
            Ok(Some(status)) => match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => format!("exit status {code}"),
                (None, Some(SIGSYS)) => {
                    "a system call that seccomp forbids; the kernel's log names it".into()
                }
                (None, Some(signal)) => format!("signal {signal}"),
                (None, None) => "unknown status".into(),
            },
            _ => "unknown status".into(),
        }
    }
}

impl AsRawFd for PidFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// A process whose end can be awaited.
#[derive(Debug)]
pub struct WatchedProcess(AsyncFd<PidFd>);

impl WatchedProcess {
    /// Watches a process. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// The descriptor cannot be registered.
    #[allow(unsafe_code)]
    pub fn new(pidfd: PidFd) -> io::Result<Self> {
        // SAFETY: a `PidFd` holds one `OwnedFd`, which nothing replaces, so its descriptor stays open and the same
        // until the `AsyncFd` is dropped with it.
        Ok(Self(unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }?))
    }

    /// The process.
    pub fn process(&self) -> &PidFd {
        self.0.get_ref()
    }

    /// Waits for its end.
    pub async fn ended(&self) {
        // A pidfd becomes readable once and for all. That epoll fails on it cannot be told from the end.
        let _ = self.0.readable().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[tokio::test]
    async fn a_killed_process_is_seen_to_end_and_reaped() {
        let mut child = Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn().unwrap();
        let watched = WatchedProcess::new(PidFd::open(child.id() as i32).unwrap()).unwrap();
        assert!(!watched.process().wait(Duration::ZERO));
        watched.process().kill();
        watched.ended().await;
        assert_eq!(watched.process().reap(), "signal 9");
        assert!(child.wait().is_err());
    }

    #[test]
    fn there_is_no_descriptor_of_no_process() {
        assert!(PidFd::open(0).is_err());
        assert!(PidFd::open(i32::MAX).is_err());
    }
}
