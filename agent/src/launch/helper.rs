//! The launch helper: all calls of libcontainer, in a process of its own with a single thread.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::container::{Container, ContainerStatus};
use libcontainer::error::LibcontainerError;
use libcontainer::syscall::syscall::SyscallType;
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Gid, Uid, fchown};
use serde::de::DeserializeOwned;

use super::executor::ProgramExecutor;
use super::trace::ErrorLog;
use super::{ProcessKind, Reply, Request, receive, send};
use crate::error::{Error, Result};
use crate::sys;

/// Serves the one request that comes through the standard input.
pub fn main() -> ExitCode {
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mayu-agent launch: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve() -> Result<()> {
    let socket = io::stdin().as_fd().try_clone_to_owned().map_err(Error::io("take the launch socket"))?;
    let Some((request, descriptors)) = receive::<Request>(socket.as_fd())? else { return Ok(()) };
    report_panics(&socket)?;
    let log = ErrorLog::install()?;
    let (reply, terminal) = match launch(&request, descriptors) {
        Ok((pid, terminal)) => (Reply::Launched { pid }, terminal),
        Err(error) => (Reply::Failed(describe(&error, log)), None),
    };
    send(socket.as_fd(), &reply, terminal.as_slice())
}

/// Has a panic, which ends this process, answer the request.
fn report_panics(socket: &OwnedFd) -> Result<()> {
    let socket = socket.try_clone().map_err(Error::io("duplicate the launch socket"))?;
    let helper = std::process::id();
    std::panic::set_hook(Box::new(move |panic| {
        // In a process cloned from the helper libcontainer reports the failure itself.
        if std::process::id() == helper {
            let _ = send(socket.as_fd(), &Reply::Failed(format!("launch helper: {panic}")), &[]);
        }
    }));
    Ok(())
}

fn launch(request: &Request, mut descriptors: Vec<OwnedFd>) -> Result<(i32, Option<OwnedFd>)> {
    // The process inherits all of these.
    sys::restore_sigpipe().map_err(Error::system("restore SIGPIPE"))?;
    umask(Mode::from_bits_truncate(0o022));

    let (failure_pipe, root) = match request.process {
        ProcessKind::Init { .. } => (descriptors.pop(), &request.state_directory),
        ProcessKind::Exec { .. } => {
            copy_state(request)?;
            (None, &request.work_directory)
        }
    };
    let seccomp = request.seccomp.as_deref().map(read_json).transpose()?;
    let executor = ProgramExecutor::new(failure_pipe, seccomp, request.capabilities.clone());
    let console =
        request.terminal.then(|| Console::listen(request.work_directory.join("console.sock"))).transpose()?;
    let mut builder = ContainerBuilder::new(request.id.clone(), SyscallType::default())
        .with_root_path(root)?
        .with_console_socket(console.as_ref().map(|console| &console.path))
        .validate_id()?
        .with_executor(executor);
    if console.is_none() {
        let Ok([stdin, stdout, stderr]) = <[OwnedFd; 3]>::try_from(descriptors) else {
            return Err(Error::InvalidRequest("a launch needs three standard streams".into()));
        };
        builder = builder.with_stdin(stdin).with_stdout(stdout).with_stderr(stderr);
    }
    let pid = match &request.process {
        ProcessKind::Init { bundle } => {
            let container = builder.as_init(bundle).with_systemd(false).with_detach(true).build()?;
            container.pid().ok_or_else(|| Error::Launch("the container has no process".into()))?.as_raw()
        }
        ProcessKind::Exec { process, sub_cgroup } => builder
            .as_tenant()
            .with_process(Some(process))
            .with_sub_cgroup(sub_cgroup.clone())
            .with_detach(true)
            .build()?
            .as_raw(),
    };
    let terminal = console.map(|console| console.receive(request.user)).transpose()?;
    Ok((pid, terminal))
}

/// Makes libcontainer's state of the container anew in the work directory. There it is a running container,
/// which may have execs (the agent starts the init itself and does not keep libcontainer's books), and the
/// sockets that libcontainer leaves beside the state with each exec are removed together with it.
fn copy_state(request: &Request) -> Result<()> {
    let mut container = Container::load(request.state_directory.join(&request.id))?;
    if container.status() == ContainerStatus::Created {
        container.set_status(ContainerStatus::Running);
    }
    container.root = request.work_directory.join(&request.id);
    fs::create_dir(&container.root).map_err(Error::file("create", &container.root))?;
    container.save()?;
    Ok(())
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = fs::read(path).map_err(Error::file("read", path))?;
    serde_json::from_slice(&text).map_err(|error| Error::InvalidSpec(error.to_string()))
}

/// Where libcontainer sends a terminal's master.
struct Console {
    listener: UnixListener,
    path: PathBuf,
}

impl Console {
    fn listen(path: PathBuf) -> Result<Self> {
        let listener = UnixListener::bind(&path).map_err(Error::file("listen on", &path))?;
        Ok(Self { listener, path })
    }

    /// The master; the terminal is handed to the process's user, or it could not open /dev/stdout.
    fn receive(&self, (uid, gid): (u32, u32)) -> Result<OwnedFd> {
        // libcontainer has connected and sent before it returned.
        let (stream, _) = self.listener.accept().map_err(Error::io("accept the terminal"))?;
        let mut buffer = [0; 64];
        let (_, mut descriptors) =
            sys::receive(stream.as_fd(), &mut buffer).map_err(Error::system("receive the terminal"))?;
        let master = descriptors.pop().ok_or_else(|| Error::Launch("no terminal was sent".into()))?;
        let terminal = sys::open_terminal_peer(master.as_fd()).map_err(Error::system("open the terminal"))?;
        fchown(terminal.as_fd(), Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
            .map_err(Error::system("give the terminal to the process's user"))?;
        Ok(master)
    }
}

impl From<LibcontainerError> for Error {
    fn from(error: LibcontainerError) -> Self {
        Self::Launch(error.to_string())
    }
}

/// The failure in words that help: what went wrong innermost, without the stages it passed through.
fn describe(error: &Error, log: ErrorLog) -> String {
    let text = error.to_string();
    // What the executor says is complete: `exec: "x": executable file not found in $PATH`.
    if let Some(start) = text.find("exec: ") {
        return text[start..].trim_end_matches('\0').to_owned();
    }
    // The phrases with which libcontainer passes a failure from its inner processes to its outer ones.
    let stages =
        ["error in executing process : ", "exec process failed with error ", "failed to create container: "];
    let text = stages.iter().find_map(|stage| Some(text.rsplit_once(stage)?.1)).unwrap_or(&text);
    log.explain(text)
}
