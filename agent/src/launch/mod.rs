//! Starts container processes by way of the launch helper: this program again, with a single thread.
//!
//! libcontainer clones a process and goes on running Rust code in it, which is undefined where there are
//! other threads; and what it does to the current directory, the OOM score and the dumpable flag must not
//! happen to PID 1. The helper gets one [`Request`] with its descriptors over a socket, which is its standard
//! input, answers with one [`Reply`] and exits. The process it started becomes a child of PID 1.

mod executor;
pub mod helper;
mod seccomp;
mod trace;

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair};
use nix::unistd::Pid;
use oci_spec::runtime::LinuxCapabilities;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::timeout;

use crate::error::{Error, Result};
use crate::reaper::{Exit, Reaper};
use crate::sys;

/// The word on the command line that makes this program the helper.
pub const HELPER_ARGUMENT: &str = "launch";
/// The longest request or reply in bytes.
const MAX_MESSAGE: usize = 64 * 1024;

/// What the helper is asked to start.
#[derive(Debug, Serialize, Deserialize)]
pub struct Request {
    /// The container.
    pub id: String,
    /// libcontainer's directory of states, one directory for each container.
    pub state_directory: PathBuf,
    /// A directory for this launch alone, which is removed after it.
    pub work_directory: PathBuf,
    /// Whether the process gets a terminal. Without one its standard streams are the first three descriptors
    /// that come with the request.
    pub terminal: bool,
    /// User and group of the process, who will own its terminal.
    pub user: (u32, u32),
    /// A file with the container's seccomp filter in JSON.
    pub seccomp: Option<PathBuf>,
    /// What the process may keep of its capabilities, where that is not left to libcontainer.
    pub capabilities: Option<LinuxCapabilities>,
    /// Which process.
    pub process: ProcessKind,
}

/// A container's first process or another one.
#[derive(Debug, Serialize, Deserialize)]
pub enum ProcessKind {
    /// The init process of a new container. The last descriptor is a pipe into which the process writes why
    /// its program could not be executed, and which is closed when it could.
    Init {
        /// The OCI bundle: a directory with `config.json`.
        bundle: PathBuf,
    },
    /// A process in a running container.
    Exec {
        /// A file with the OCI process in JSON.
        process: PathBuf,
        /// The cgroup to join, below the container's own.
        sub_cgroup: Option<String>,
    },
}

/// The helper's answer. The terminal's master comes with it where one was asked for.
#[derive(Debug, Serialize, Deserialize)]
pub enum Reply {
    /// The process is there: an init waits to be started, an exec runs its program.
    Launched {
        /// Its pid in the agent's namespace.
        pid: i32,
    },
    /// It is not, for this reason.
    Failed(String),
}

/// Starts launch helpers.
#[derive(Clone, Debug)]
pub struct Launcher {
    /// This program.
    pub program: PathBuf,
    /// How long one launch may take.
    pub deadline: Duration,
}

/// A process that has been started.
#[derive(Debug)]
pub struct Launched {
    /// Its pid.
    pub pid: Pid,
    /// The master of its terminal, where one was asked for.
    pub terminal: Option<OwnedFd>,
    /// Its end.
    pub exit: tokio::sync::oneshot::Receiver<Exit>,
}

impl Launcher {
    /// Has the helper carry out `request`, to which `descriptors` belong.
    ///
    /// # Errors
    ///
    /// `Launch` with libcontainer's reason, `LaunchDeadline` after which the helper is killed.
    pub async fn launch(
        &self,
        reaper: &Arc<Reaper>,
        request: &Request,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Launched> {
        let launching = reaper.launching();
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
                .map_err(Error::system("make the launch helper's socket"))?;
        let helper = Command::new(&self.program)
            .arg(HELPER_ARGUMENT)
            .env_clear()
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::inherit())
            .spawn()
            .map_err(Error::file("execute", &self.program))?;
        let helper = Pid::from_raw(helper.id().cast_signed());
        let mut helper_exit = reaper.watch(helper);
        match send(ours.as_fd(), request, &descriptors) {
            Err(Error::System { source: Errno::EPIPE | Errno::ECONNRESET, .. }) => return Err(helper_died()),
            sent => sent?,
        }
        drop(descriptors);

        fcntl(&ours, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))
            .map_err(Error::system("make the launch helper's socket non-blocking"))?;
        let socket = sys::watch(ours, Interest::READABLE).map_err(Error::io("watch the launch helper"))?;
        let answer = async {
            tokio::select! {
                biased;
                received = receive_when_ready::<Reply>(&socket) => received,
                // Its last message can be there although the socket has not been found readable. The socket's
                // end cannot be waited for: the process that was started may still hold it.
                _ = &mut helper_exit => receive::<Reply>(socket.get_ref().as_fd()),
            }
        };
        let Ok(answer) = timeout(self.deadline, answer).await else {
            // It may have ended in this moment.
            let _ = reaper.signal(helper, libc::SIGKILL);
            return Err(Error::LaunchDeadline {
                process: format!("a process of container {:?}", request.id),
                seconds: self.deadline.as_secs(),
            });
        };
        let (reply, mut received) = match answer {
            Ok(Some(message)) => message,
            Ok(None) | Err(Error::System { source: Errno::EAGAIN | Errno::ECONNRESET, .. }) => {
                return Err(helper_died());
            }
            Err(error) => return Err(error),
        };
        match reply {
            Reply::Launched { pid } => {
                let pid = Pid::from_raw(pid);
                let exit = reaper.watch(pid);
                drop(launching);
                Ok(Launched { pid, terminal: received.pop(), exit })
            }
            Reply::Failed(reason) => Err(Error::Launch(reason)),
        }
    }
}

fn helper_died() -> Error {
    Error::Launch("the launch helper died".into())
}

async fn receive_when_ready<T: DeserializeOwned>(
    socket: &AsyncFd<OwnedFd>,
) -> Result<Option<(T, Vec<OwnedFd>)>> {
    loop {
        let mut ready = socket.readable().await.map_err(Error::io("wait for the launch helper"))?;
        match ready.try_io(|socket| match receive(socket.as_fd()) {
            Err(Error::System { source: Errno::EAGAIN, .. }) => Err(Errno::EAGAIN.into()),
            other => Ok(other),
        }) {
            Ok(received) => return received.map_err(Error::io("read from the launch helper"))?,
            Err(_would_block) => {}
        }
    }
}

/// Sends one message with its descriptors.
fn send<T: Serialize>(socket: BorrowedFd<'_>, message: &T, descriptors: &[OwnedFd]) -> Result<()> {
    let text = serde_json::to_vec(message).map_err(|error| Error::InvalidRequest(error.to_string()))?;
    if text.len() > MAX_MESSAGE {
        return Err(Error::InvalidRequest("the launch request is too long".into()));
    }
    let raw: Vec<_> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let control = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &[][..] } else { &control[..] };
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(&text)], control, MsgFlags::MSG_NOSIGNAL, None)
        .map(drop)
        .map_err(Error::system("write to the launch socket"))
}

/// Receives one message with its descriptors; nothing at the end.
fn receive<T: DeserializeOwned>(socket: BorrowedFd<'_>) -> Result<Option<(T, Vec<OwnedFd>)>> {
    let mut buffer = vec![0; MAX_MESSAGE];
    let (length, descriptors) =
        sys::receive(socket, &mut buffer).map_err(Error::system("read from the launch socket"))?;
    if length == 0 {
        return Ok(None);
    }
    let message = serde_json::from_slice(&buffer[..length])
        .map_err(|error| Error::InvalidRequest(format!("launch message: {error}")))?;
    Ok(Some((message, descriptors)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sockets() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap()
    }

    #[test]
    fn a_message_arrives_with_its_descriptors() {
        let (ours, theirs) = sockets();
        let null = std::fs::File::open("/dev/null").unwrap();

        send(ours.as_fd(), &Reply::Launched { pid: 7 }, &[null.into()]).unwrap();

        let (reply, descriptors) = receive::<Reply>(theirs.as_fd()).unwrap().unwrap();
        assert!(matches!(reply, Reply::Launched { pid: 7 }));
        assert_eq!(descriptors.len(), 1);
    }

    #[test]
    fn the_end_is_no_message() {
        let (ours, theirs) = sockets();
        drop(ours);

        assert!(receive::<Reply>(theirs.as_fd()).unwrap().is_none());
    }

    #[tokio::test]
    async fn a_helper_that_says_nothing_is_reported() {
        let log = slog::Logger::root(slog::Discard, slog::o!());
        let reaper = Reaper::start(log).unwrap();
        let launcher = Launcher { program: "/bin/false".into(), deadline: Duration::from_secs(60) };
        let request = Request {
            id: "c".into(),
            state_directory: "/no/such".into(),
            work_directory: "/no/such".into(),
            terminal: false,
            user: (0, 0),
            seccomp: None,
            capabilities: None,
            process: ProcessKind::Init { bundle: "/no/such".into() },
        };

        let error = launcher.launch(&reaper, &request, Vec::new()).await.unwrap_err();

        assert!(matches!(&error, Error::Launch(reason) if reason.contains("died")), "{error}");
    }
}
