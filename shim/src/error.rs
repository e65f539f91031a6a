//! What can go wrong, and the RPC code by which containerd learns of it.

use std::io;
use std::path::PathBuf;

use ttrpc::{Code, Status};

use crate::config::Uids;

/// An operation of the shim that failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An identifier that cannot be a file name.
    #[error("{kind} id {id:?}: {reason}")]
    InvalidId {
        /// What it identifies.
        kind: &'static str,
        /// The identifier, shortened.
        id: String,
        /// Why it is refused.
        reason: &'static str,
    },
    /// The configuration file cannot be read or says something impossible.
    #[error("{}:{} {reason}", path.display(), line.map(|line| format!(" line {line}:")).unwrap_or_default())]
    Config {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1, where one is known.
        line: Option<usize>,
        /// What is wrong, with the offending key.
        reason: String,
    },
    /// The bundle's OCI runtime spec is unusable.
    #[error("OCI spec {}: {reason}", path.display())]
    Spec {
        /// The file.
        path: PathBuf,
        /// What is wrong and where.
        reason: String,
    },
    /// A bind mount of the spec has a source that is not there or cannot be used.
    #[error("mount on {}: source {}: {source}", destination.display(), path.display())]
    MountSource {
        /// Where in the container.
        destination: PathBuf,
        /// The path on the host.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// A pod that wants what a VM cannot share with its host.
    #[error("{field}: a pod in a VM cannot share the host's {what}; use another runtime class for it")]
    HostNamespace {
        /// What it wants.
        what: &'static str,
        /// Kubernetes' name of the wish.
        field: &'static str,
    },
    /// A pod that wants its users to be others on the host.
    #[error(
        "hostUsers: false: containers in a VM have no user namespace; the VM itself keeps their users apart from the host's"
    )]
    UserNamespace,
    /// An annotation of the pod that cannot be heeded.
    #[error("annotation {name}: {reason}")]
    Annotation {
        /// Its name, shortened.
        name: String,
        /// Why.
        reason: String,
    },
    /// A device of the host that the guest does not get.
    #[error("device {}: {reason}", path.display())]
    Device {
        /// Its path in the container.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A program that the client wants run did not do its work.
    #[error("hook {}: {reason}", path.display())]
    Hook {
        /// The program.
        path: PathBuf,
        /// How it ended and what it said.
        reason: String,
    },
    /// A container that is to see the processes of another one, and no telling which.
    #[error("the target of the PID namespace cannot be told: containerd names it by the VM, and {} have namespaces of their own;              share the pod's PID namespace instead (shareProcessNamespace)", candidates.join(", "))]
    AmbiguousTarget {
        /// The containers that it could be.
        candidates: Vec<String>,
    },
    /// The operator's policy cannot be used, so nothing is allowed.
    #[error(transparent)]
    Policy(#[from] mayu_policy::Error),
    /// The operator's policy is against it.
    #[error("denied by policy {}: {reasons}", policy.display())]
    Denied {
        /// The file.
        policy: PathBuf,
        /// Rules, fields and values, in bounded length.
        reasons: String,
    },
    /// A request with an argument that cannot be.
    #[error("{0}")]
    InvalidArgument(String),
    /// The stdin, stdout or stderr that containerd names cannot be opened.
    #[error("open {stream} {uri:?}: {source}")]
    OpenStdio {
        /// `stdin`, `stdout` or `stderr`.
        stream: &'static str,
        /// containerd's path or URI.
        uri: String,
        /// The reason.
        source: io::Error,
    },
    /// The container or exec is not known.
    #[error("{kind} {id:?} not found")]
    NotFound {
        /// `container` or `exec`.
        kind: &'static str,
        /// Its identifier.
        id: String,
    },
    /// A signal for a process that has ended.
    #[error("process already finished")]
    Finished,
    /// The container or exec is there already.
    #[error("{kind} {id:?} already exists")]
    AlreadyExists {
        /// `container`, `exec` or `sandbox`.
        kind: &'static str,
        /// Its identifier.
        id: String,
    },
    /// The request does not fit the state of the process.
    #[error("cannot {operation} a process that is {state}")]
    WrongState {
        /// What was asked.
        operation: &'static str,
        /// The state it is in.
        state: &'static str,
    },
    /// The pod's VM is gone, so nothing can be asked of it.
    #[error("the pod's VM is gone: {0}")]
    SandboxGone(String),
    /// The pod's VM has not been started yet.
    #[error("the pod's VM is not running")]
    NoSandbox,
    /// A machine that went on from a new template could not run a container.
    #[error("run a container in a machine from the template: {reason}")]
    Rehearsal {
        /// What went wrong.
        reason: String,
    },
    /// A request that is not supported.
    #[error("{0}")]
    Unimplemented(&'static str),
    /// A request for a process of the pod itself, which has none.
    #[error("cannot {operation} {id:?}: it is the pod itself, which has no process; its containers have")]
    NoProcess {
        /// What was asked.
        operation: &'static str,
        /// The identifier of the pod.
        id: String,
    },
    /// A file that every pod needs is missing or unreadable.
    #[error("open the {what} {}: {source}; {hint}", path.display())]
    HostFile {
        /// What the file is.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
        /// What to do about it.
        hint: &'static str,
    },
    /// A file or directory of the pod's state, or of the bundle.
    #[error("{operation} {}: {source}", path.display())]
    File {
        /// What was done.
        operation: &'static str,
        /// To which path.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// A mount failed.
    #[error("mount {what} on {}: {reason}", target.display())]
    Mount {
        /// What was to be mounted.
        what: String,
        /// On which path.
        target: PathBuf,
        /// The reason.
        reason: String,
    },
    /// The host's account of a VMM cannot be read.
    #[error("read the statistics of the VMM (process {pid}): {reason}")]
    Stats {
        /// The VMM.
        pid: u32,
        /// Why.
        reason: String,
    },
    /// There are more pods than uids for their VMMs.
    #[error(
        "all {} uids from {} on are in use, each by the VMM of a pod ({}/uid:* name them); raise vm.uids.count in the configuration file",
        uids.count, uids.first, root.display()
    )]
    NoUid {
        /// The configured range.
        uids: Uids,
        /// Where the leases are.
        root: PathBuf,
    },
    /// A template that cannot be used.
    #[error("template {}: {reason}", path.display())]
    Template {
        /// Its directory.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The machine as configured does not fit this host.
    #[error("{0}")]
    Machine(String),
    /// A process could not be started.
    #[error("start {what}: {source}")]
    Spawn {
        /// Which process.
        what: String,
        /// The kernel's reason.
        source: io::Error,
    },
    /// A system call on behalf of a process, socket or pipe.
    #[error("{operation}: {source}")]
    System {
        /// What was done.
        operation: &'static str,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The pod's network namespace is not there, or holds what a guest cannot have.
    #[error("network namespace {}: {reason}", path.display())]
    NetworkNamespace {
        /// Its path.
        path: PathBuf,
        /// What is wrong, with the interface where it is one's.
        reason: String,
    },
    /// The kernel refused a part of the pod's network.
    #[error("{operation} {subject} in network namespace {}: {source}{hint}", namespace.display())]
    Network {
        /// What was done.
        operation: &'static str,
        /// To which interface, or what was read.
        subject: String,
        /// The namespace's path.
        namespace: PathBuf,
        /// The kernel's reason.
        source: io::Error,
        /// What to do about it, or nothing.
        hint: &'static str,
    },
    /// A conversation with the VMM failed.
    #[error(transparent)]
    Vmm(#[from] mayu_vmm_api::Error),
    /// The guest did not come up.
    #[error("the guest did not start: {reason}{}", console_tail(console))]
    Boot {
        /// Why.
        reason: String,
        /// The end of what it wrote to its console.
        console: String,
    },
    /// The guest did not report in by its deadline.
    #[error("the guest did not report in within {seconds} s (timeouts.boot){}", console_tail(console))]
    BootTimeout {
        /// The deadline, in seconds.
        seconds: u64,
        /// The end of what it wrote to its console.
        console: String,
    },
    /// The agent refused a request; its RPC code is passed on.
    #[error("{}", status.message())]
    Agent {
        /// Its answer.
        status: Box<Status>,
    },
    /// The agent did not answer in time.
    #[error("agent: {operation}: no answer within {seconds} s (timeouts.request)")]
    AgentTimeout {
        /// What was asked.
        operation: &'static str,
        /// The deadline, in seconds.
        seconds: u64,
    },
    /// The connection to the agent failed.
    #[error("agent: {operation}: {reason}")]
    AgentConnection {
        /// What was asked.
        operation: &'static str,
        /// The reason.
        reason: String,
    },
    /// containerd's request to `start`, `delete` or `-info` is not understood.
    #[error("{0}")]
    Protocol(String),
    /// The shim's own address cannot be used.
    #[error("shim socket {address}: {source}")]
    Socket {
        /// The address.
        address: String,
        /// The reason.
        source: io::Error,
    },
}

/// The result of an operation of the shim.
pub type Result<T> = std::result::Result<T, Error>;

fn console_tail(console: &str) -> String {
    match console.trim_end() {
        "" => "; its console is empty".into(),
        text => format!("; the end of its console:\n{text}"),
    }
}

impl Error {
    /// The one place where a failure becomes an RPC code. containerd acts on NotFound, AlreadyExists,
    /// FailedPrecondition, InvalidArgument, Unimplemented and DeadlineExceeded, and shows PermissionDenied; the rest is Internal.
    pub fn code(&self) -> Code {
        match self {
            Self::InvalidId { .. }
            | Self::Spec { .. }
            | Self::MountSource { .. }
            | Self::InvalidArgument(_)
            | Self::HostNamespace { .. }
            | Self::UserNamespace
            | Self::Annotation { .. }
            | Self::Device { .. }
            | Self::OpenStdio { .. } => Code::INVALID_ARGUMENT,
            Self::NotFound { .. } | Self::Finished => Code::NOT_FOUND,
            Self::AlreadyExists { .. } => Code::ALREADY_EXISTS,
            Self::WrongState { .. }
            | Self::SandboxGone(_)
            | Self::NoSandbox
            | Self::AmbiguousTarget { .. }
            | Self::Config { .. }
            | Self::Policy(_)
            | Self::HostFile { .. }
            | Self::NetworkNamespace { .. }
            | Self::NoUid { .. }
            | Self::Machine(_) => Code::FAILED_PRECONDITION,
            Self::Denied { .. } => Code::PERMISSION_DENIED,
            Self::Unimplemented(_) | Self::NoProcess { .. } => Code::UNIMPLEMENTED,
            Self::BootTimeout { .. } | Self::AgentTimeout { .. } => Code::DEADLINE_EXCEEDED,
            Self::Vmm(mayu_vmm_api::Error::Timeout { .. }) => Code::DEADLINE_EXCEEDED,
            Self::Agent { status } => status.code(),
            Self::File { .. }
            | Self::Mount { .. }
            | Self::Hook { .. }
            | Self::Spawn { .. }
            | Self::Stats { .. }
            | Self::System { .. }
            | Self::Network { .. }
            | Self::Template { .. }
            | Self::Rehearsal { .. }
            | Self::Vmm(_)
            | Self::Boot { .. }
            | Self::AgentConnection { .. }
            | Self::Protocol(_)
            | Self::Socket { .. } => Code::INTERNAL,
        }
    }

    /// Whether this says that what was asked for is not there.
    pub fn is_not_found(&self) -> bool {
        self.code() == Code::NOT_FOUND
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        Self::RpcStatus(ttrpc::get_status(error.code(), error.to_string()))
    }
}

/// Names the operation and path in an I/O error; for `map_err`.
pub(crate) fn file(operation: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Error {
    let path = path.into();
    move |source| Error::File { operation, path, source }
}

/// Names the operation in an error of a system call; for `map_err`.
pub(crate) fn system<E: Into<io::Error>>(operation: &'static str) -> impl FnOnce(E) -> Error {
    move |source| Error::System { operation, source: source.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_codes_that_containerd_acts_on_are_told_apart() {
        let id = || "x".to_string();
        let table = [
            (Error::InvalidId { kind: "container", id: id(), reason: "" }, Code::INVALID_ARGUMENT),
            (Error::Spec { path: "/b".into(), reason: id() }, Code::INVALID_ARGUMENT),
            (Error::NotFound { kind: "exec", id: id() }, Code::NOT_FOUND),
            (Error::Finished, Code::NOT_FOUND),
            (Error::AlreadyExists { kind: "exec", id: id() }, Code::ALREADY_EXISTS),
            (Error::WrongState { operation: "start", state: "running" }, Code::FAILED_PRECONDITION),
            (Error::SandboxGone(id()), Code::FAILED_PRECONDITION),
            (Error::Policy(mayu_policy::Error::Parse(id())), Code::FAILED_PRECONDITION),
            (Error::Denied { policy: "/p".into(), reasons: id() }, Code::PERMISSION_DENIED),
            (Error::Unimplemented("checkpoint"), Code::UNIMPLEMENTED),
            (Error::BootTimeout { seconds: 1, console: id() }, Code::DEADLINE_EXCEEDED),
            (Error::AgentTimeout { operation: "start", seconds: 1 }, Code::DEADLINE_EXCEEDED),
            (
                Error::Vmm(mayu_vmm_api::Error::Timeout { operation: "resume", seconds: 1 }),
                Code::DEADLINE_EXCEEDED,
            ),
            (Error::Vmm(mayu_vmm_api::Error::Closed), Code::INTERNAL),
        ];
        for (error, code) in table {
            assert_eq!(error.code(), code, "{error}");
        }
    }

    #[test]
    fn the_agents_own_code_is_passed_on() {
        let status = Box::new(ttrpc::get_status(Code::INVALID_ARGUMENT, "no user \"nobody2\""));
        let ttrpc::Error::RpcStatus(status) = Error::Agent { status }.into() else { panic!("not a status") };
        assert_eq!((status.code(), status.message()), (Code::INVALID_ARGUMENT, "no user \"nobody2\""));
    }

    #[test]
    fn a_guest_that_never_reports_in_shows_the_end_of_its_console() {
        let error = Error::BootTimeout { seconds: 20, console: "Kernel panic\n".into() };
        assert_eq!(
            error.to_string(),
            "the guest did not report in within 20 s (timeouts.boot); the end of its console:\nKernel panic"
        );
    }
}
