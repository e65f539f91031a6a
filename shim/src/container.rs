//! One container and its processes.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use mayu_agent_api::{CONTAINER_PID_NAMESPACE, POD_PID_NAMESPACE};

use crate::admission::Subject;
use crate::hooks::ContainerHooks;
use crate::pod_spec::Limits;
use crate::process::Process;
use crate::stdio::Endpoints;
use crate::{Error, Result, id};

/// The most execs of one container at a time.
const MAX_EXECS: usize = 4096;

/// The shortest time between two events that tell of a lack of memory in one container: the guest may tell of as many as it wants.
const OOM_PAUSE: Duration = Duration::from_secs(1);

/// What a container is to its pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The pod itself, as Kubernetes has it: elsewhere a process that does nothing but hold the pod's namespaces.
    /// Here the VM does that, and the guest knows of no such container.
    Pod,
    /// One that runs something.
    Workload,
}

/// Whose processes a container sees.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum PidNamespace {
    /// Its own.
    #[default]
    Own,
    /// Those of all containers of the pod that share them.
    Pod,
    /// Those of the container with this id.
    Of(String),
}

impl PidNamespace {
    /// The path by which the agent knows it; none for a new one.
    pub fn path(&self) -> Option<PathBuf> {
        match self {
            Self::Own => None,
            Self::Pod => Some(POD_PID_NAMESPACE.into()),
            Self::Of(id) => Some(format!("{CONTAINER_PID_NAMESPACE}{id}").into()),
        }
    }
}

/// A container of the pod.
#[derive(Debug)]
pub struct Container {
    /// containerd's identifier.
    pub id: String,
    /// Whether it is more than the VM.
    pub role: Role,
    /// containerd's directory for it.
    pub bundle: PathBuf,
    /// Where its files are on the share: below its own id, or where a snapshot has those of the container that it goes on as.
    pub place: String,
    /// What a policy knows of it.
    pub subject: Subject,
    /// Whose processes it sees.
    pub pid_namespace: PidNamespace,
    /// Programs of the host that its client wants run.
    pub hooks: OnceLock<ContainerHooks>,
    /// What it may use.
    limits: Mutex<Limits>,
    /// Its first process.
    pub init: Arc<Process>,
    execs: Mutex<HashMap<String, Arc<Process>>>,
    /// When containerd was last told of a lack of memory.
    last_oom: Mutex<Option<Instant>>,
}

impl Container {
    /// A container that is about to be made.
    pub fn new(id: &str, role: Role, bundle: &Path, endpoints: Endpoints) -> Self {
        Self {
            id: id.into(),
            role,
            bundle: bundle.into(),
            place: id.into(),
            subject: Subject::default(),
            pid_namespace: PidNamespace::Own,
            hooks: OnceLock::new(),
            limits: Mutex::default(),
            init: Arc::new(Process::new(id, "", endpoints)),
            execs: Mutex::default(),
            last_oom: Mutex::default(),
        }
    }

    /// A lack of memory has ended one of its processes. Says whether containerd is to be told, which it was not just `now`.
    pub fn notice_oom(&self, now: Instant) -> bool {
        let mut last = self.last_oom.lock().unwrap_or_else(PoisonError::into_inner);
        let due = last.is_none_or(|last| now.saturating_duration_since(last) >= OOM_PAUSE);
        if due {
            *last = Some(now);
        }
        due
    }

    /// What it may use.
    pub fn limits(&self) -> Limits {
        *self.limits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It may use something else from now on.
    pub fn set_limits(&self, limits: Limits) {
        *self.limits.lock().unwrap_or_else(PoisonError::into_inner) = limits;
    }

    /// Refuses an operation on processes to a container that has none.
    ///
    /// # Errors
    /// [`Error::NoProcess`].
    pub fn require_process(&self, operation: &'static str) -> Result<()> {
        match self.role {
            Role::Pod => Err(Error::NoProcess { operation, id: self.id.clone() }),
            Role::Workload => Ok(()),
        }
    }

    /// The process with this exec id; the init process for an empty one.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn process(&self, exec_id: &str) -> Result<Arc<Process>> {
        if exec_id.is_empty() {
            return Ok(self.init.clone());
        }
        let not_found = || Error::NotFound { kind: "exec", id: exec_id.chars().take(id::MAX_LEN).collect() };
        self.lock().get(exec_id).cloned().ok_or_else(not_found)
    }

    /// Adds an exec that is about to be made.
    ///
    /// # Errors
    /// [`Error::InvalidId`], [`Error::AlreadyExists`], or [`Error::InvalidArgument`] when there are too many.
    pub fn add_exec(&self, exec_id: &str, endpoints: Endpoints) -> Result<Arc<Process>> {
        id::validate("exec", exec_id)?;
        let mut execs = self.lock();
        if execs.contains_key(exec_id) {
            return Err(Error::AlreadyExists { kind: "exec", id: exec_id.into() });
        }
        if execs.len() == MAX_EXECS {
            return Err(Error::InvalidArgument(format!(
                "container {} has {MAX_EXECS} execs already",
                self.id
            )));
        }
        let process = Arc::new(Process::new(&self.id, exec_id, endpoints));
        execs.insert(exec_id.into(), process.clone());
        Ok(process)
    }

    /// Removes an exec.
    pub fn remove_exec(&self, exec_id: &str) {
        self.lock().remove(exec_id);
    }

    /// All execs.
    pub fn execs(&self) -> Vec<Arc<Process>> {
        self.lock().values().cloned().collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Arc<Process>>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containerd_hears_of_a_lack_of_memory_at_once_and_then_now_and_then() {
        let container = Container::new("c", Role::Workload, Path::new("/b"), Endpoints::default());
        let start = Instant::now();
        let told =
            [0, 1, 999, 1000, 1500, 2000].map(|ms| container.notice_oom(start + Duration::from_millis(ms)));
        assert_eq!(told, [true, false, false, true, false, true]);
    }

    #[test]
    fn execs_are_found_by_id_and_only_once() {
        let container = Container::new("c", Role::Workload, Path::new("/b"), Endpoints::default());
        container.add_exec("e", Endpoints::default()).unwrap();
        assert!(matches!(
            container.add_exec("e", Endpoints::default()),
            Err(Error::AlreadyExists { kind: "exec", .. })
        ));
        assert!(matches!(container.add_exec("../e", Endpoints::default()), Err(Error::InvalidId { .. })));
        assert_eq!(container.process("e").unwrap().id(), "e");
        assert_eq!(container.process("").unwrap().id(), "c");
        container.remove_exec("e");
        assert!(matches!(container.process("e"), Err(Error::NotFound { kind: "exec", .. })));
    }
}
