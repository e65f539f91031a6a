//! A PID namespace that containers share, and the process that is its first: this program again, which does nothing but be there.
//!
//! A namespace lives as long as its PID 1, and all in it die with that. So no container's process can be it. As PID 1 it is also the
//! parent of whatever a container leaves behind.

pub mod helper;

use std::io::{ErrorKind, Read};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};
use nix::unistd::Pid;
use tokio::sync::oneshot::Receiver;
use tokio::sync::oneshot::error::TryRecvError;

use crate::error::{Error, Result};
use crate::reaper::{Exit, Reaper};

/// The name under which this program is started to be the helper. It is all that ps(1) shows inside, and what users know from Kubernetes.
pub const PROGRAM: &str = "/pause";
/// What the helper says when it is set up.
const READY: u8 = b'.';

/// The process, and with it the namespace. Both end when this is dropped.
#[derive(Debug)]
pub struct Pause {
    pid: Pid,
    exit: Receiver<Exit>,
    /// Its end is the end of the process.
    lifeline: UnixStream,
}

impl Pause {
    /// Makes a namespace with its process, by executing `program`, which is this one. Blocks until the process is set up, for
    /// `deadline` at most.
    ///
    /// # Errors
    ///
    /// `System`, `File` or `Io` with what the kernel refused; `Launch` where the process ended, `LaunchDeadline`.
    pub fn start(program: &Path, deadline: Duration, reaper: &Arc<Reaper>) -> Result<Self> {
        let _launching = reaper.launching();
        let (lifeline, theirs) = UnixStream::pair().map_err(Error::io("make a socket"))?;
        // A process is in the namespace that the thread which makes it has chosen for its children. So that thread makes no
        // other: a thread that has chosen can never make processes in its own namespace again.
        let spawned = thread::scope(|scope| {
            let spawn = || {
                unshare(CloneFlags::CLONE_NEWPID).map_err(Error::system("make a PID namespace"))?;
                spawn(program, theirs.into())
            };
            thread::Builder::new().spawn_scoped(scope, spawn).map(thread::ScopedJoinHandle::join)
        });
        let pid = match spawned.map_err(Error::io("start a thread"))? {
            Ok(pid) => pid?,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        let pause = Self { pid, exit: reaper.watch(pid), lifeline };
        pause.lifeline.set_read_timeout(Some(deadline)).map_err(Error::io("set a deadline"))?;
        let mut answer = [0];
        match (&pause.lifeline).read_exact(&mut answer) {
            Ok(()) => Ok(pause),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                Err(Error::LaunchDeadline {
                    process: "the first process of the pod's PID namespace".into(),
                    seconds: deadline.as_secs(),
                })
            }
            Err(_) => Err(Error::Launch("the first process of the pod's PID namespace died".into())),
        }
    }

    /// Whether it still runs; a guest that is out of memory may have killed it.
    pub fn lives(&mut self) -> bool {
        self.exit.try_recv() == Err(TryRecvError::Empty)
    }

    /// Its pid in the agent's namespace.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Where its PID namespace is to be found.
    pub fn namespace(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/ns/pid", self.pid))
    }
}

fn spawn(program: &Path, lifeline: OwnedFd) -> Result<Pid> {
    let child = Command::new(program)
        .arg0(PROGRAM)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::from(lifeline))
        .stdout(Stdio::null())
        .stderr(Stdio::inherit())
        .spawn()
        .map_err(Error::file("execute", program))?;
    Ok(Pid::from_raw(child.id().cast_signed()))
}
