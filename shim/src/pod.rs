//! The pod: its VM and its containers, and the requests that make and unmake them.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use containerd_shim_protos::api::{CreateTaskRequest, DeleteRequest, DeleteResponse, ExecProcessRequest};
use containerd_shim_protos::events::task::{TaskCreate, TaskDelete, TaskExecAdded, TaskIO};
use mayu_agent_api::{PROCESS_TYPE_URL, SPEC_TYPE_URL};
use nix::sys::sysinfo::sysinfo;
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use serde::Serialize;
use slog::{Logger, info, o, warn};
use tokio::task::spawn_blocking;
use tokio_util::sync::CancellationToken;
use ttrpc::context::Context;

use crate::config::Config;
use crate::container::Container;
use crate::events::Events;
use crate::process::{Process, State, Step};
use crate::sandbox::{Blueprint, Sandbox};
use crate::spec::{self, GuestSpec};
use crate::state_dir::StateDir;
use crate::stdio::{Endpoints, Opened, Streams};
use crate::storage::{self, Storage};
use crate::{Error, Result, exits, id};

/// Where a pod finds and keeps things on the host.
#[derive(Clone, Debug)]
pub struct Roots {
    /// The configuration file.
    pub config: PathBuf,
    /// All pods have their directories below it: [`crate::state_dir::ROOT`].
    pub state: PathBuf,
}

/// All that the shim knows.
#[derive(Debug)]
pub struct Pod {
    /// containerd's namespace.
    pub namespace: String,
    /// The way to containerd.
    pub events: Events,
    /// Lines name the pod.
    pub log: Logger,
    /// Set when the shim is to end.
    pub exit: CancellationToken,
    id: String,
    roots: Roots,
    state: Mutex<PodState>,
}

#[derive(Debug, Default)]
struct PodState {
    vm: Vm,
    containers: HashMap<String, Arc<Container>>,
}

#[derive(Clone, Debug, Default)]
enum Vm {
    /// The first Create starts it.
    #[default]
    Absent,
    Booting,
    Up(Arc<Sandbox>),
    /// It ended, and why. There is no other for this pod.
    Gone(Arc<Sandbox>, String),
}

impl Pod {
    /// A pod without a VM yet.
    pub fn new(id: &str, namespace: &str, roots: Roots, events: Events, log: Logger) -> Arc<Self> {
        Arc::new(Self {
            namespace: namespace.into(),
            events,
            log,
            exit: CancellationToken::new(),
            id: id.into(),
            roots,
            state: Mutex::default(),
        })
    }

    /// The container with this id.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn container(&self, id: &str) -> Result<Arc<Container>> {
        let not_found = || Error::NotFound { kind: "container", id: id.chars().take(id::MAX_LEN).collect() };
        self.lock().containers.get(id).cloned().ok_or_else(not_found)
    }

    /// All containers.
    pub fn containers(&self) -> Vec<Arc<Container>> {
        self.lock().containers.values().cloned().collect()
    }

    /// The VM, running or not.
    ///
    /// # Errors
    /// [`Error::NoSandbox`] before it has been started.
    pub fn sandbox(&self) -> Result<Arc<Sandbox>> {
        match &self.lock().vm {
            Vm::Up(sandbox) | Vm::Gone(sandbox, _) => Ok(sandbox.clone()),
            Vm::Absent | Vm::Booting => Err(Error::NoSandbox),
        }
    }

    /// The VM, if it can be asked for something.
    ///
    /// # Errors
    /// [`Error::NoSandbox`] or [`Error::SandboxGone`].
    pub fn running_sandbox(&self) -> Result<Arc<Sandbox>> {
        match &self.lock().vm {
            Vm::Up(sandbox) => Ok(sandbox.clone()),
            Vm::Gone(_, reason) => Err(Error::SandboxGone(reason.clone())),
            Vm::Absent | Vm::Booting => Err(Error::NoSandbox),
        }
    }

    /// The pid that containerd is told, 0 without a VM.
    pub fn pid(&self) -> u32 {
        self.sandbox().map(|sandbox| sandbox.pid()).unwrap_or_default()
    }

    /// Creates a container; for the first one the VM as well.
    ///
    /// # Errors
    /// What failed. Then nothing is left of it, nor of the VM if this was to be the first container.
    pub async fn create(self: &Arc<Self>, request: CreateTaskRequest) -> Result<u32> {
        id::validate("container", &request.id)?;
        if !request.checkpoint.is_empty() {
            return Err(Error::Unimplemented("a container cannot be restored from a checkpoint"));
        }
        let endpoints = Endpoints {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        let container = Arc::new(Container::new(&request.id, Path::new(&request.bundle), endpoints));
        self.reserve(&container)?;
        let created = self.build(&container, request).await;
        if created.is_err() {
            self.abandon(&container).await;
        }
        created
    }

    fn reserve(&self, container: &Arc<Container>) -> Result<()> {
        let mut state = self.lock();
        if state.containers.contains_key(&container.id) {
            return Err(Error::AlreadyExists { kind: "container", id: container.id.clone() });
        }
        state.containers.insert(container.id.clone(), container.clone());
        Ok(())
    }

    async fn build(self: &Arc<Self>, container: &Arc<Container>, request: CreateTaskRequest) -> Result<u32> {
        let log = self.log.new(o!("container" => container.id.clone()));
        let spec = spec::load(&container.bundle)?;
        let hostname = spec.hostname().clone().filter(|name| !name.is_empty());
        let GuestSpec { spec, root, binds, cgroups_path } =
            spec::for_guest(spec, &container.id, &container.bundle, &log)?;
        let storage =
            Storage { container_id: container.id.clone(), rootfs: request.rootfs.clone(), root, binds };
        let hostname = hostname.unwrap_or_else(|| self.id.clone());
        let sandbox = self.sandbox_with(storage, hostname, cgroups_path).await?;
        let options = any(SPEC_TYPE_URL, &spec)?;
        self.attach_process(&sandbox, &container.init, |names| {
            let request = CreateTaskRequest {
                id: container.id.clone(),
                terminal: request.terminal,
                stdin: names.stdin,
                stdout: names.stdout,
                stderr: names.stderr,
                options: MessageField::some(options),
                ..Default::default()
            };
            let agent = sandbox.agent.clone();
            async move {
                let create = async |task: containerd_shim_protos::shim_async::TaskClient| {
                    task.create(Context::default(), &request).await
                };
                agent.task("create a container", create).await.map(drop)
            }
        })
        .await?;
        self.events.publish(created_event(request, sandbox.pid()));
        container.init.step(Step::Created, "create")?;
        info!(log, "container created");
        Ok(sandbox.pid())
    }

    /// Has the agent make the process, and connects the guest's ends of its streams.
    async fn attach_process<F>(
        &self,
        sandbox: &Sandbox,
        process: &Process,
        make: impl FnOnce(Endpoints) -> F,
    ) -> Result<()>
    where
        F: Future<Output = Result<()>>,
    {
        let present = process.endpoints.present()?;
        let ids = [present.stdin, present.stdout, present.stderr].map(|is| is.then(|| sandbox.next_stream()));
        let [stdin, stdout, stderr] = ids.map(|id| id.map(|id| id.to_string()).unwrap_or_default());
        make(Endpoints { stdin, stdout, stderr, terminal: process.endpoints.terminal }).await?;
        let connect = async |id: Option<_>| match id {
            Some(id) => sandbox.connect_stream(id).await.map(Some),
            None => Ok(None),
        };
        let [stdin, stdout, stderr] = ids;
        process.set_streams(Streams {
            stdin: connect(stdin).await?,
            stdout: connect(stdout).await?,
            stderr: connect(stderr).await?,
        });
        Ok(())
    }

    /// Opens containerd's ends of a process's streams and copies from now on. That is for Start: a client may end a
    /// short input as soon as it is open, and `ctr` does not tell before Create or Exec has returned.
    ///
    /// # Errors
    /// As [`Opened::open`].
    pub async fn open_stdio(&self, sandbox: &Sandbox, process: &Process) -> Result<()> {
        if let Some(streams) = process.take_streams() {
            let deadline = sandbox.config.timeouts.request();
            let opened = Opened::open(&process.endpoints, process.id(), &self.namespace, deadline).await?;
            process.set_stdio(opened.start(streams));
        }
        Ok(())
    }

    /// Mounts a container's files, booting the VM at the same time if there is none.
    async fn sandbox_with(
        self: &Arc<Self>,
        storage: Storage,
        hostname: String,
        cgroup: Option<PathBuf>,
    ) -> Result<Arc<Sandbox>> {
        let claimed = {
            let mut state = self.lock();
            let vm = state.vm.clone();
            if matches!(vm, Vm::Absent) {
                state.vm = Vm::Booting;
            }
            vm
        };
        match claimed {
            Vm::Up(sandbox) => {
                let dir = sandbox.dir.clone();
                blocking(move || storage.attach(&dir)).await?;
                Ok(sandbox)
            }
            Vm::Gone(_, reason) => Err(Error::SandboxGone(reason)),
            Vm::Booting => Err(Error::NoSandbox),
            Vm::Absent => {
                let booted = self.boot(storage, hostname, cgroup).await;
                if booted.is_err() {
                    self.lock().vm = Vm::Absent;
                }
                booted
            }
        }
    }

    async fn boot(
        self: &Arc<Self>,
        storage: Storage,
        hostname: String,
        cgroup: Option<PathBuf>,
    ) -> Result<Arc<Sandbox>> {
        let config = Config::load_from(&self.roots.config)?;
        check_memory(&config)?;
        let dir = StateDir::new(&self.roots.state, &self.namespace, &self.id)?;
        let made = dir.clone();
        blocking(move || crate::delete::make_anew(&made)).await?;
        let (id, log) = (self.id.clone(), self.log.clone());
        let blueprint = Blueprint { id, hostname, cgroup, config, dir: dir.clone(), log };
        let share = dir.clone();
        let (sandbox, signs, events) = match Sandbox::boot(blueprint, move || storage.attach(&share)).await {
            Ok(parts) => parts,
            Err(error) => {
                if let Err(error) = blocking(move || dir.remove()).await {
                    warn!(self.log, "the pod's directory stays"; "error" => error.to_string());
                }
                return Err(error);
            }
        };
        let sandbox = Arc::new(sandbox);
        self.lock().vm = Vm::Up(sandbox.clone());
        let (pod, watched) = (self.clone(), sandbox.clone());
        tokio::spawn(async move {
            let reason = watched.watch(signs).await;
            pod.sandbox_gone(&watched, reason);
        });
        tokio::spawn(exits::follow(self.clone(), sandbox.clone(), events));
        Ok(sandbox)
    }

    fn sandbox_gone(self: &Arc<Self>, sandbox: &Arc<Sandbox>, reason: String) {
        {
            let mut state = self.lock();
            if matches!(&state.vm, Vm::Up(up) if Arc::ptr_eq(up, sandbox)) {
                state.vm = Vm::Gone(sandbox.clone(), reason);
            }
        }
        exits::all_ended(self, sandbox);
    }

    /// Takes away what a failed Create has made.
    async fn abandon(self: &Arc<Self>, container: &Container) {
        container.init.forget();
        if let Some(stdio) = container.init.take_stdio() {
            stdio.close();
        }
        let last = {
            let mut state = self.lock();
            state.containers.remove(&container.id);
            state.containers.is_empty()
        };
        let Ok(sandbox) = self.sandbox() else {
            return;
        };
        if last {
            sandbox.tear_down().await;
            self.lock().vm = Vm::Absent;
            return;
        }
        // Where the agent has made no container there is nothing to delete.
        let _ = self.delete_in_guest(&container.id, "").await;
        self.detach_storage(&sandbox, &container.id).await;
    }

    /// Adds a process to a container.
    ///
    /// # Errors
    /// What failed; then nothing is left of it.
    pub async fn exec(&self, request: ExecProcessRequest) -> Result<()> {
        let container = self.container(&request.id)?;
        let sandbox = self.running_sandbox()?;
        let state = container.init.state();
        if !matches!(state, State::Created | State::Running) {
            return Err(Error::WrongState { operation: "exec in the container of", state: state.name() });
        }
        let log = self.log.new(o!("container" => request.id.clone(), "exec" => request.exec_id.clone()));
        let spec = guest_process(request.spec.as_ref(), &log)?;
        let endpoints = Endpoints {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        let process = container.add_exec(&request.exec_id, endpoints)?;
        let made = self.attach_process(&sandbox, &process, |names| {
            let request = ExecProcessRequest {
                stdin: names.stdin,
                stdout: names.stdout,
                stderr: names.stderr,
                spec: MessageField::some(spec),
                ..request
            };
            let agent = sandbox.agent.clone();
            async move {
                let exec = async |task: containerd_shim_protos::shim_async::TaskClient| {
                    task.exec(Context::default(), &request).await
                };
                agent.task("add a process", exec).await.map(drop)
            }
        });
        if let Err(error) = made.await {
            container.remove_exec(&process.exec_id);
            process.forget();
            // Where the agent has made no process there is nothing to delete.
            let _ = self.delete_in_guest(&container.id, &process.exec_id).await;
            return Err(error);
        }
        self.events.publish(TaskExecAdded {
            container_id: container.id.clone(),
            exec_id: process.exec_id.clone(),
            ..Default::default()
        });
        process.step(Step::Created, "create")
    }

    /// Deletes a stopped process; with an init process its container.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::WrongState`], or that the agent cannot.
    pub async fn delete(&self, container_id: &str, exec_id: &str) -> Result<DeleteResponse> {
        let container = self.container(container_id)?;
        let process = container.process(exec_id)?;
        process.step(Step::Delete, "delete")?;
        if let Err(error) = self.delete_in_guest(container_id, exec_id).await {
            process.step(Step::NotDeleted, "delete")?;
            return Err(error);
        }
        process.forget();
        if let Some(stdio) = process.take_stdio() {
            stdio.close();
        }
        let exit = process.wait().await;
        let pid = self.pid();
        if exec_id.is_empty() {
            self.remove(&container, pid, &process).await;
        } else {
            container.remove_exec(exec_id);
        }
        Ok(DeleteResponse {
            pid,
            exit_status: exit.status,
            exited_at: exit.timestamp(),
            ..Default::default()
        })
    }

    async fn remove(&self, container: &Container, pid: u32, init: &Process) {
        for exec in container.execs() {
            exec.forget();
            if let Some(stdio) = exec.take_stdio() {
                stdio.close();
            }
        }
        if let Ok(sandbox) = self.sandbox() {
            self.detach_storage(&sandbox, &container.id).await;
        }
        self.lock().containers.remove(&container.id);
        let exit = init.wait().await;
        self.events.publish(TaskDelete {
            container_id: container.id.clone(),
            pid,
            exit_status: exit.status,
            exited_at: exit.timestamp(),
            ..Default::default()
        });
    }

    /// Fine when the agent, or the whole guest, does not know it any more.
    async fn delete_in_guest(&self, container_id: &str, exec_id: &str) -> Result<()> {
        let Ok(sandbox) = self.running_sandbox() else {
            return Ok(());
        };
        let request =
            DeleteRequest { id: container_id.into(), exec_id: exec_id.into(), ..Default::default() };
        let delete = async |task: containerd_shim_protos::shim_async::TaskClient| {
            task.delete(Context::default(), &request).await
        };
        match sandbox.agent.task("delete a process", delete).await {
            Err(error) if !error.is_not_found() && self.running_sandbox().is_ok() => Err(error),
            _ => Ok(()),
        }
    }

    async fn detach_storage(&self, sandbox: &Sandbox, container_id: &str) {
        let (dir, id) = (sandbox.dir.clone(), container_id.to_string());
        if let Err(error) = blocking(move || storage::detach(&dir, &id)).await {
            warn!(self.log, "files stay mounted"; "container" => container_id, "error" => error.to_string());
        }
    }

    /// Ends the shim if no container is left.
    pub async fn shutdown(&self) {
        if !self.lock().containers.is_empty() {
            return;
        }
        self.tear_down().await;
        self.exit.cancel();
    }

    /// Ends the VM and everything on the host.
    pub async fn tear_down(&self) {
        if let Ok(sandbox) = self.sandbox() {
            sandbox.tear_down().await;
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, PodState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let ended = |error: tokio::task::JoinError| Error::System {
        operation: "run a blocking operation",
        source: std::io::Error::other(error.to_string()),
    };
    spawn_blocking(work).await.map_err(ended)?
}

fn check_memory(config: &Config) -> Result<()> {
    let host_mib = sysinfo().map_err(crate::error::system("ask for the host's memory"))?.ram_total() >> 20;
    let guest_mib = u64::from(config.vm.memory_mib);
    if guest_mib > host_mib {
        return Err(Error::Machine(format!(
            "vm.memory_mib = {guest_mib} is more than the {host_mib} MiB of this host"
        )));
    }
    Ok(())
}

fn any(type_url: &str, value: &impl Serialize) -> Result<Any> {
    let value = serde_json::to_vec(value).map_err(|error| Error::InvalidArgument(error.to_string()))?;
    Ok(Any { type_url: type_url.into(), value, ..Default::default() })
}

/// The process that an Exec request describes, for the guest.
fn guest_process(spec: Option<&Any>, log: &Logger) -> Result<Any> {
    let spec = spec.ok_or_else(|| Error::InvalidArgument("exec: the process spec is missing".into()))?;
    let mut process: oci_spec::runtime::Process = serde_json::from_slice(&spec.value)
        .map_err(|error| Error::InvalidArgument(format!("exec: the process spec is malformed: {error}")))?;
    spec::rewrite_process(&mut process, log);
    any(PROCESS_TYPE_URL, &process)
}

fn created_event(request: CreateTaskRequest, pid: u32) -> TaskCreate {
    let io = TaskIO {
        stdin: request.stdin,
        stdout: request.stdout,
        stderr: request.stderr,
        terminal: request.terminal,
        ..Default::default()
    };
    TaskCreate {
        container_id: request.id,
        bundle: request.bundle,
        rootfs: request.rootfs,
        io: MessageField::some(io),
        pid,
        ..Default::default()
    }
}
