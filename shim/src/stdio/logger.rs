//! A logger program: containerd's `binary://` protocol (`core/runtime/v2/logging`).

use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};
use nix::fcntl::OFlag;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, pipe2};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::process::{Child, Command};
use tokio::time::timeout;

use crate::error::system;
use crate::{Error, Result};

/// How long a logger may take for its end, as the runc shim has it.
const GRACE: Duration = Duration::from_secs(12);

/// A running logger: reads stdout on descriptor 3 and stderr on 4, and closes 5 when it is ready.
#[derive(Debug)]
pub(super) struct LoggerProcess {
    child: Child,
}

impl LoggerProcess {
    /// Starts the program and waits until it is ready. Gives where stdout and stderr are to be written.
    pub(super) async fn start(
        program: &Path,
        arguments: &[String],
        id: &str,
        namespace: &str,
        deadline: Duration,
    ) -> Result<(Self, pipe::Sender, pipe::Sender)> {
        let what = format!("logger {}", program.display());
        let failed = |source| Error::Spawn { what: what.clone(), source };
        let (out_reader, out_writer) = pipe()?;
        let (err_reader, err_writer) = pipe()?;
        let (ready_reader, ready_writer) = pipe()?;
        let mut command = std::process::Command::new(program);
        command
            .args(arguments)
            .env_clear()
            .env("CONTAINER_ID", id)
            .env("CONTAINER_NAMESPACE", namespace)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let fds = [(out_reader, 3), (err_reader, 4), (ready_writer, 5)];
        let mappings = fds.map(|(parent_fd, child_fd)| FdMapping { parent_fd, child_fd });
        command.fd_mappings(mappings.into()).map_err(|error| failed(std::io::Error::other(error)))?;
        let mut command = Command::from(command);
        let child = command.kill_on_drop(true).spawn().map_err(failed)?;
        // The command holds the logger's ends; the ready pipe ends only when they are closed here.
        drop(command);
        let mut ready = pipe::Receiver::from_owned_fd(ready_reader).map_err(failed)?;
        // One byte or the end means ready.
        timeout(deadline, ready.read(&mut [0]))
            .await
            .map_err(|error| failed(error.into()))?
            .map_err(failed)?;
        let sender = |fd| pipe::Sender::from_owned_fd(fd).map_err(failed);
        Ok((Self { child }, sender(out_writer)?, sender(err_writer)?))
    }

    /// Asks it to end, then makes it.
    pub(super) async fn stop(mut self) {
        if let Some(pid) = self.child.id().and_then(|pid| i32::try_from(pid).ok()) {
            // It may have ended already; it is not reaped before `wait`, so the pid is still its own.
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        if timeout(GRACE, self.child.wait()).await.is_err() {
            // As above.
            let _ = self.child.kill().await;
        }
    }

    /// Waits for its own end.
    #[cfg(test)]
    pub(super) async fn finished(mut self) {
        self.child.wait().await.unwrap();
    }
}

fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    pipe2(OFlag::O_CLOEXEC).map_err(system("create a pipe for a logger"))
}
