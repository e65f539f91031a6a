//! One container: its cgroup, its files, its init process and the processes executed beside it.

mod adopt;
mod start;
mod suspend;
mod watch;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use oci_spec::runtime::LinuxResources;
use slog::{Logger, o};
use tokio::net::unix::pipe;
use tokio::task::JoinHandle;

use self::adopt::Adoption;
use crate::cgroup::Cgroup;
use crate::error::{Error, Result};
use crate::process::Process;
use crate::runtime::Runtime;
use crate::spec::{self, ContainerPlan, ProcessPlan};
use crate::state::{Action, State};
use crate::stdio::{Ends, StdioRequest};

/// How many execs one container may have at once, ended ones that were not deleted included.
const MAX_EXECS: usize = 4096;
/// How long output that the shim does not take is kept when its process is deleted.
const DRAIN_DEADLINE: Duration = Duration::from_secs(10);

/// A container from its creation to its deletion.
pub struct Container {
    id: String,
    /// What its cgroup and its files are called: the id under which it was created, which is another's where it was adopted.
    name: String,
    runtime: Arc<Runtime>,
    cgroup: Cgroup,
    init: Arc<Process>,
    plan: ContainerPlan,
    inner: Mutex<Inner>,
    oom_kills: AtomicU64,
    log: Logger,
}

#[derive(Default)]
struct Inner {
    execs: HashMap<String, Exec>,
    /// The ends of the init's pipes until it is started.
    ends: Option<Ends>,
    /// Tells why the init could not execute its program.
    failure: Option<pipe::Receiver>,
    memory_watch: Option<JoinHandle<()>>,
    /// What an adopted container is to be when it is started.
    adoption: Option<Adoption>,
}

/// A process beside the init and what it is to run.
#[derive(Clone)]
struct Exec {
    process: Arc<Process>,
    spec: Arc<oci_spec::runtime::Process>,
    plan: Arc<ProcessPlan>,
}

impl Container {
    /// A container that is to be [set up](Self::set_up).
    ///
    /// # Errors
    ///
    /// `InvalidRequest` for bad streams.
    pub fn new(runtime: Arc<Runtime>, id: &str, stdio: StdioRequest, plan: ContainerPlan) -> Result<Self> {
        let expected = stdio.expect(&runtime.streams)?;
        let log = runtime.log.new(o!("container" => id.to_owned()));
        Ok(Self {
            id: id.to_owned(),
            name: id.to_owned(),
            cgroup: Cgroup::of(id),
            init: Arc::new(Process::new(id, "", stdio, expected, State::Creating)),
            plan,
            inner: Mutex::default(),
            oom_kills: AtomicU64::new(0),
            runtime,
            log,
        })
    }

    /// The container's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// What its cgroup and its files are called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The init process.
    pub fn init(&self) -> &Arc<Process> {
        &self.init
    }

    /// The container's cgroup.
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// The init process for an empty id, an exec otherwise.
    ///
    /// # Errors
    ///
    /// `NoProcess`.
    pub fn process(&self, exec_id: &str) -> Result<Arc<Process>> {
        if exec_id.is_empty() { Ok(Arc::clone(&self.init)) } else { Ok(self.exec_of(exec_id)?.process) }
    }

    /// Adds a process to be started in the running container.
    ///
    /// # Errors
    ///
    /// `WrongState`, `ProcessExists`, `InvalidSpec`, `InvalidRequest`, `TooMany`.
    pub fn exec(
        &self,
        exec_id: &str,
        stdio: StdioRequest,
        mut spec: oci_spec::runtime::Process,
    ) -> Result<()> {
        self.init.advance(Action::Exec)?;
        let root = PathBuf::from(format!("/proc/{}/root", self.init.pid()));
        let plan = spec::adapt_process(&mut spec, &root, stdio.terminal, self.plan.seccomp.is_some())?;
        let mut inner = self.inner();
        if inner.execs.len() >= MAX_EXECS {
            return Err(Error::TooMany { what: "execs", limit: MAX_EXECS });
        }
        match inner.execs.entry(exec_id.to_owned()) {
            Entry::Occupied(_) => {
                Err(Error::ProcessExists { container: self.id.clone(), exec: exec_id.to_owned() })
            }
            Entry::Vacant(vacant) => {
                let expected = stdio.expect(&self.runtime.streams)?;
                let process = Arc::new(Process::new(&self.id, exec_id, stdio, expected, State::Created));
                vacant.insert(Exec { process, spec: Arc::new(spec), plan: Arc::new(plan) });
                Ok(())
            }
        }
    }

    /// Freezes all processes.
    ///
    /// # Errors
    ///
    /// `WrongState`, `File`, `CgroupDeadline`.
    pub async fn pause(&self) -> Result<()> {
        self.init.advance(Action::Pause)?;
        let frozen = self.cgroup.freeze(true).await;
        if frozen.is_err() {
            self.init.advance(Action::Resume)?;
            self.cgroup.freeze(false).await?;
        }
        frozen
    }

    /// Thaws all processes, suspended ones too.
    ///
    /// # Errors
    ///
    /// `WrongState`, `File`, `CgroupDeadline`.
    pub async fn resume(&self) -> Result<()> {
        self.init.advance(Action::Resume)?;
        self.init.unpark();
        self.cgroup.freeze(false).await
    }

    /// Signals the init, an exec, or every process.
    ///
    /// # Errors
    ///
    /// `WrongState`, `Finished`, `NoProcess`, `System`.
    pub fn kill(&self, exec_id: &str, signal: i32, all: bool) -> Result<()> {
        if all && exec_id.is_empty() {
            self.init.advance(Action::Kill)?;
            return self.cgroup.signal(signal);
        }
        self.process(exec_id)?.kill(signal, &self.runtime.reaper)
    }

    /// Changes limits.
    ///
    /// # Errors
    ///
    /// `WrongState`, `Resources`.
    pub fn update(&self, mut resources: LinuxResources) -> Result<()> {
        self.init.advance(Action::Inspect)?;
        self.without_swap(Some(&mut resources));
        self.cgroup.update(&resources)
    }

    /// Forgets an exec that has ended or was never started.
    ///
    /// # Errors
    ///
    /// `NoProcess`, `WrongState`.
    pub async fn delete_exec(&self, exec_id: &str) -> Result<Arc<Process>> {
        let process = self.exec_of(exec_id)?.process;
        process.advance(Action::Delete)?;
        process.close_stdio(DRAIN_DEADLINE).await;
        self.inner().execs.remove(exec_id);
        Ok(process)
    }

    /// Removes the stopped or never started container with all that belongs to it.
    ///
    /// # Errors
    ///
    /// `WrongState`; `CgroupDeadline` where a process does not die, after which it may be tried again.
    pub async fn delete(&self) -> Result<()> {
        if self.init.state() == State::Created {
            match self.init.kill(libc::SIGKILL, &self.runtime.reaper) {
                Ok(()) | Err(Error::Finished(_)) => self.init.wait().await,
                Err(error) => return Err(error),
            };
        }
        self.init.advance(Action::Delete)?;
        if let Err(error) = self.remove_files().await {
            self.init.advance(Action::AbandonDelete)?;
            return Err(error);
        }
        let execs: Vec<Exec> = self.inner().execs.drain().map(|(_, exec)| exec).collect();
        for process in execs.iter().map(|exec| &exec.process).chain([&self.init]) {
            process.close_stdio(DRAIN_DEADLINE).await;
        }
        Ok(())
    }

    /// Removes the cgroup with what runs in it, and the files.
    async fn remove_files(&self) -> Result<()> {
        if let Some(watch) = self.inner().memory_watch.take() {
            watch.abort();
        }
        self.cgroup.remove().await?;
        self.runtime.root(&self.name).remove()?;
        for directory in [self.runtime.bundle(&self.name), self.runtime.state_directory().join(&self.name)] {
            if directory.exists() {
                fs::remove_dir_all(&directory).map_err(Error::file("remove", &directory))?;
            }
        }
        Ok(())
    }

    /// Takes limits of swap out where the guest's kernel has no swap: there is nothing to limit, and no file.
    fn without_swap(&self, resources: Option<&mut LinuxResources>) {
        if !self.cgroup.limits_swap()
            && let Some(memory) = resources.and_then(|resources| resources.memory_mut().as_mut())
        {
            memory.set_swap(None);
        }
    }

    fn exec_of(&self, exec_id: &str) -> Result<Exec> {
        self.inner()
            .execs
            .get(exec_id)
            .cloned()
            .ok_or_else(|| Error::NoProcess { container: self.id.clone(), exec: exec_id.to_owned() })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
