//! What can go wrong in the agent, and the RPC code under which the caller learns of it.

use std::io;
use std::path::PathBuf;

use nix::errno::Errno;
use ttrpc::Code;

use crate::state::{Action, State};

/// What an operation of the agent returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// One failed operation. The text is what the user of `ctr` or `kubectl` gets to read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An id that cannot be used as a part of a path.
    #[error("invalid id {id:?}: {reason}")]
    InvalidId {
        /// What the caller gave.
        id: String,
        /// The rule it breaks.
        reason: &'static str,
    },
    /// A request whose fields contradict each other or the protocol.
    #[error("invalid request: {0}")]
    InvalidRequest(String),
    /// An OCI spec the guest cannot honour.
    #[error("invalid OCI spec: {0}")]
    InvalidSpec(String),
    /// No container of this id.
    #[error("container {0:?} does not exist")]
    NoContainer(String),
    /// No exec of this id in the container.
    #[error("process {exec:?} does not exist in container {container:?}")]
    NoProcess {
        /// The container's id.
        container: String,
        /// The exec's id.
        exec: String,
    },
    /// The id is taken.
    #[error("container {0:?} already exists")]
    ContainerExists(String),
    /// The volume's name is taken.
    #[error("volume {0:?} already exists")]
    VolumeExists(String),
    /// The exec id is taken.
    #[error("process {exec:?} already exists in container {container:?}")]
    ProcessExists {
        /// The container's id.
        container: String,
        /// The exec's id.
        exec: String,
    },
    /// The process is in a state that does not allow the operation.
    #[error("cannot {action} {process}: it is {state}")]
    WrongState {
        /// The operation.
        action: Action,
        /// Its process.
        process: String,
        /// The process's state.
        state: State,
    },
    /// The container is frozen, but not such that it could go on as another.
    #[error("cannot adopt {0}: it is not suspended")]
    NotSuspended(String),
    /// Something keeps the containers from being suspended.
    #[error("cannot suspend: {0}")]
    Obstacle(String),
    /// The pod did not become ready in time.
    #[error("container {container:?} was not ready within {milliseconds} ms: {condition}")]
    NotReady {
        /// The container's id.
        container: String,
        /// The limit.
        milliseconds: u32,
        /// What is not so.
        condition: String,
    },
    /// A program that an adopted container was to run before it goes on has failed.
    #[error("hook {hook:?} of container {container:?} {reason}")]
    Hook {
        /// The program.
        hook: String,
        /// The container's id.
        container: String,
        /// What became of it.
        reason: String,
    },
    /// A signal for a process that is no more.
    #[error("process already finished: {0}")]
    Finished(String),
    /// A table of the agent is full.
    #[error("too many {what}: the limit is {limit}")]
    TooMany {
        /// What the table holds.
        what: &'static str,
        /// Its size.
        limit: usize,
    },
    /// The shim did not connect a stream that it had announced.
    #[error("{stream} ({id}) of {process} was not connected within {seconds} s")]
    MissingStream {
        /// `stdin`, `stdout` or `stderr`.
        stream: &'static str,
        /// The stream's id.
        id: String,
        /// Its process.
        process: String,
        /// How long the agent waited.
        seconds: u64,
    },
    /// The container runtime refused; the text is its reason.
    #[error("{0}")]
    Launch(String),
    /// The launch helper did not answer in time.
    #[error("starting {process} took longer than {seconds} s")]
    LaunchDeadline {
        /// What was being started.
        process: String,
        /// The limit.
        seconds: u64,
    },
    /// What the agent does not do.
    #[error("{0} is not supported")]
    Unsupported(&'static str),
    /// An operation on a file failed.
    #[error("{operation} {path:?}: {source}")]
    File {
        /// The operation, as in "write".
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// A system call failed.
    #[error("{operation}: {source}")]
    System {
        /// What was attempted.
        operation: &'static str,
        /// The reason.
        source: Errno,
    },
    /// The kernel refused a step of setting the network up.
    #[error("{step}: {source}")]
    Network {
        /// What was attempted, on which interface, route or neighbour.
        step: String,
        /// The reason.
        source: io::Error,
    },
    /// Input or output on a pipe or socket failed.
    #[error("{operation}: {source}")]
    Io {
        /// What was attempted.
        operation: &'static str,
        /// The reason.
        source: io::Error,
    },
    /// The kernel's table of sockets could not be read.
    #[error("read the table of sockets: {0}")]
    Sockets(#[source] procfs::ProcError),
    /// A cgroup did not reach a state in time.
    #[error("cgroup {path:?} was not {state} within {seconds} s")]
    CgroupDeadline {
        /// The cgroup.
        path: PathBuf,
        /// The state waited for.
        state: &'static str,
        /// The limit.
        seconds: u64,
    },
    /// The kernel refused a resource limit.
    #[error("set resource limits: {0}")]
    Resources(#[from] libcgroups::v2::manager::V2ManagerError),
    /// The RPC server could not be started.
    #[error("serve RPC: {0}")]
    Serve(#[source] ttrpc::Error),
}

impl Error {
    /// Wraps the failure of an operation on a file.
    pub fn file(operation: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { operation, path, source }
    }

    /// Wraps the failure of a system call.
    pub fn system(operation: &'static str) -> impl FnOnce(Errno) -> Self {
        move |source| Self::System { operation, source }
    }

    /// Wraps the failure of input or output.
    pub fn io(operation: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { operation, source }
    }

    /// The RPC code; containerd acts on these.
    pub fn code(&self) -> Code {
        match self {
            Self::InvalidId { .. } | Self::InvalidRequest(_) | Self::InvalidSpec(_) => Code::INVALID_ARGUMENT,
            Self::NoContainer(_) | Self::NoProcess { .. } | Self::Finished(_) => Code::NOT_FOUND,
            Self::ContainerExists(_) | Self::ProcessExists { .. } | Self::VolumeExists(_) => {
                Code::ALREADY_EXISTS
            }
            Self::WrongState { .. } | Self::NotSuspended(_) | Self::Obstacle(_) => Code::FAILED_PRECONDITION,
            Self::TooMany { .. } => Code::RESOURCE_EXHAUSTED,
            Self::MissingStream { .. }
            | Self::LaunchDeadline { .. }
            | Self::CgroupDeadline { .. }
            | Self::NotReady { .. } => Code::DEADLINE_EXCEEDED,
            Self::Unsupported(_) => Code::UNIMPLEMENTED,
            Self::Launch(_) | Self::Hook { .. } => Code::UNKNOWN,
            Self::File { .. }
            | Self::System { .. }
            | Self::Io { .. }
            | Self::Network { .. }
            | Self::Resources(_)
            | Self::Sockets(_)
            | Self::Serve(_) => Code::INTERNAL,
        }
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        Self::RpcStatus(ttrpc::get_status(error.code(), error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_containerd_acts_on_has_its_code() {
        let id = || "c".to_owned();
        let wrong = Error::WrongState { action: Action::Pause, process: id(), state: State::Stopped };
        assert_eq!(wrong.to_string(), "cannot pause c: it is stopped");
        let cases = [
            (Error::NoContainer(id()), Code::NOT_FOUND),
            (Error::Finished(id()), Code::NOT_FOUND),
            (Error::ContainerExists(id()), Code::ALREADY_EXISTS),
            (Error::VolumeExists(id()), Code::ALREADY_EXISTS),
            (wrong, Code::FAILED_PRECONDITION),
            (Error::Obstacle(id()), Code::FAILED_PRECONDITION),
            (Error::NotSuspended(id()), Code::FAILED_PRECONDITION),
            (Error::NotReady { container: id(), milliseconds: 1, condition: id() }, Code::DEADLINE_EXCEEDED),
            (Error::InvalidSpec(id()), Code::INVALID_ARGUMENT),
            (Error::Unsupported("x"), Code::UNIMPLEMENTED),
        ];
        for (error, code) in cases {
            let ttrpc::Error::RpcStatus(status) = error.into() else { panic!("no status") };
            assert_eq!(status.code(), code);
        }
    }
}
