//! containerd's Task service (`containerd.task.v3.Task`): what its requests mean for the containers here.

use std::collections::HashMap;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest,
    PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest,
    StartResponse, StateRequest, StateResponse, StatsRequest, StatsResponse, Status, UpdateTaskRequest,
    WaitRequest, WaitResponse,
};
use containerd_shim_protos::shim_async::Task;
use mayu_agent_api::ADOPT;
use oci_spec::runtime::Spec;
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use tokio::sync::watch;
use tokio::time::timeout;
use ttrpc::asynchronous::TtrpcContext;

use crate::block_devices;
use crate::blocking::blocking;
use crate::container::Container;
use crate::error::{Error, Result};
use crate::pid_namespace::{self, Shared};
use crate::process::Process;
use crate::runtime::Runtime;
use crate::spec::{self, check_id};
use crate::state::{Action, State};
use crate::stats;
use crate::stdio::StdioRequest;
use crate::tcp;

/// How many containers there may be at once.
const MAX_CONTAINERS: usize = 1024;

/// How long containers may stand still to be saved before a request does not wait for them any more.
const SUSPENSION: Duration = Duration::from_secs(5);

/// The containers of the pod.
pub struct Containers {
    runtime: Arc<Runtime>,
    table: Mutex<HashMap<String, Arc<Container>>>,
    /// All of them stand still to be saved.
    suspended: watch::Sender<bool>,
}

/// The Task service.
pub struct TaskService {
    containers: Arc<Containers>,
}

impl Containers {
    /// No containers yet.
    pub fn new(runtime: Arc<Runtime>) -> Self {
        Self { runtime, table: Mutex::default(), suspended: watch::Sender::new(false) }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.table().len()
    }

    /// All there are.
    pub fn all(&self) -> Vec<Arc<Container>> {
        self.table().values().cloned().collect()
    }

    /// The container of this id.
    ///
    /// # Errors
    ///
    /// `NoContainer`.
    pub fn get(&self, id: &str) -> Result<Arc<Container>> {
        self.table().get(id).cloned().ok_or_else(|| Error::NoContainer(id.to_owned()))
    }

    fn process(&self, id: &str, exec_id: &str) -> Result<Arc<Process>> {
        self.get(id)?.process(exec_id)
    }

    /// Takes note that all of them stand still to be saved, or go on.
    pub fn set_suspended(&self, suspended: bool) {
        self.suspended.send_replace(suspended);
    }

    /// Waits until they go on, where they stand still to be saved: who wants something of them is not to notice. Not for ever, since who has
    /// them stand still may be gone.
    async fn going_on(&self) {
        let mut suspended = self.suspended.subscribe();
        // Whoever goes on meets them as they are.
        let _ = timeout(SUSPENSION, suspended.wait_for(|suspended| !suspended)).await;
    }

    async fn create(&self, request: CreateTaskRequest) -> Result<Arc<Container>> {
        check_id(&request.id)?;
        let mut spec = spec::read_spec(request.options.as_ref())?;
        let stdio = StdioRequest {
            terminal: request.terminal,
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
        };
        if let Some(suspended) = spec::annotation(&spec, ADOPT) {
            if let Some(connection) = blocking(tcp::stale_connection).await? {
                return Err(Error::Obstacle(format!(
                    "the connection {connection} was open when the machine was saved"
                )));
            }
            return self.adopt(suspended, request.id, stdio, &spec);
        }
        block_devices::translate(&mut spec, Path::new(block_devices::DISKS)).await?;
        if let Some(shared) = pid_namespace::shared(&spec)? {
            pid_namespace::join(&mut spec, self.pid_namespace(shared).await?);
        }
        let plan = spec::adapt_spec(&mut spec, &request.id, request.terminal)?;
        let container = {
            let mut table = self.table();
            if table.len() >= MAX_CONTAINERS {
                return Err(Error::TooMany { what: "containers", limit: MAX_CONTAINERS });
            }
            if is_taken(&table, &request.id) {
                return Err(Error::ContainerExists(request.id));
            }
            let container = Container::new(Arc::clone(&self.runtime), &request.id, stdio, plan)?;
            Arc::clone(table.entry(request.id).insert_entry(Arc::new(container)).get())
        };
        match container.set_up(spec).await {
            Ok(()) => Ok(container),
            Err(error) => {
                self.table().remove(container.id());
                Err(error)
            }
        }
    }

    /// Makes the suspended container the one of `id`.
    fn adopt(&self, suspended: &str, id: String, stdio: StdioRequest, spec: &Spec) -> Result<Arc<Container>> {
        let mut table = self.table();
        if id != suspended && is_taken(&table, &id) {
            return Err(Error::ContainerExists(id));
        }
        let known = table.get(suspended).ok_or_else(|| Error::NoContainer(suspended.to_owned()))?;
        let container = known.adopt(&id, stdio, spec)?;
        self.set_suspended(false);
        table.remove(suspended);
        table.insert(id, Arc::clone(&container));
        Ok(container)
    }

    async fn pid_namespace(&self, shared: Shared) -> Result<PathBuf> {
        match shared {
            Shared::Pod => {
                let namespace = Arc::clone(&self.runtime.pid_namespace);
                blocking(move || namespace.path()).await
            }
            Shared::Container(id) => {
                let container = self.get(&id)?;
                container.init().advance(Action::Join)?;
                Ok(format!("/proc/{}/ns/pid", container.init().pid()).into())
            }
        }
    }

    async fn delete(&self, id: &str, exec_id: &str) -> Result<Arc<Process>> {
        let container = self.get(id)?;
        if !exec_id.is_empty() {
            return container.delete_exec(exec_id).await;
        }
        container.delete().await?;
        self.table().remove(id);
        Ok(Arc::clone(container.init()))
    }

    fn table(&self) -> MutexGuard<'_, HashMap<String, Arc<Container>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether `id` is a container's, or was when its cgroup and its files got their name from it.
fn is_taken(table: &HashMap<String, Arc<Container>>, id: &str) -> bool {
    table.contains_key(id) || table.values().any(|container| container.name() == id)
}

impl TaskService {
    /// Serves `containers`.
    pub fn new(containers: Arc<Containers>) -> Self {
        Self { containers }
    }
}

#[async_trait]
impl Task for TaskService {
    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let process = self.containers.process(&request.id, &request.exec_id)?;
        let stdio = process.stdio().clone();
        let exit = process.exit();
        Ok(StateResponse {
            id: request.id,
            exec_id: request.exec_id,
            pid: process.pid(),
            status: status(process.state()).into(),
            stdin: stdio.stdin,
            stdout: stdio.stdout,
            stderr: stdio.stderr,
            terminal: stdio.terminal,
            exit_status: exit.map_or(0, |exit| exit.status),
            exited_at: exit.map_or_else(MessageField::none, |exit| timestamp(exit.at)),
            ..StateResponse::default()
        })
    }

    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        if !request.checkpoint.is_empty() {
            return Err(Error::Unsupported("restoring a checkpoint").into());
        }
        let containers = Arc::clone(&self.containers);
        let container = complete(async move { containers.create(request).await }).await?;
        Ok(CreateTaskResponse { pid: container.init().pid(), ..CreateTaskResponse::default() })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let container = self.containers.get(&request.id)?;
        self.containers.going_on().await;
        let pid = complete(async move { container.start(&request.exec_id).await }).await?;
        Ok(StartResponse { pid, ..StartResponse::default() })
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        let containers = Arc::clone(&self.containers);
        let process = complete(async move { containers.delete(&request.id, &request.exec_id).await }).await?;
        let exit = process.exit();
        Ok(DeleteResponse {
            pid: process.pid(),
            exit_status: exit.map_or(0, |exit| exit.status),
            exited_at: exit.map_or_else(MessageField::none, |exit| timestamp(exit.at)),
            ..DeleteResponse::default()
        })
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let container = self.containers.get(&request.id)?;
        container.init().advance(Action::Inspect)?;
        let processes = container
            .cgroup()
            .processes()?
            .into_iter()
            .map(|pid| ProcessInfo { pid: pid.as_raw().cast_unsigned(), ..ProcessInfo::default() });
        Ok(PidsResponse { processes: processes.collect(), ..PidsResponse::default() })
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        let container = self.containers.get(&request.id)?;
        complete(async move { container.pause().await }).await?;
        Ok(Empty::default())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        let container = self.containers.get(&request.id)?;
        let resumed = complete(async move { container.resume().await }).await;
        self.containers.set_suspended(false);
        resumed?;
        Ok(Empty::default())
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        Err(Error::Unsupported("checkpointing a container").into())
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        let signal = i32::try_from(request.signal)
            .ok()
            .filter(|signal| (1..=libc::SIGRTMAX()).contains(signal))
            .ok_or_else(|| Error::InvalidRequest(format!("{} is no signal", request.signal)))?;
        self.containers.get(&request.id)?.kill(&request.exec_id, signal, request.all)?;
        Ok(Empty::default())
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        check_id(&request.exec_id)?;
        let container = self.containers.get(&request.id)?;
        self.containers.going_on().await;
        let process = spec::read_process(request.spec.as_ref())?;
        let stdio = StdioRequest {
            terminal: request.terminal,
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
        };
        container.exec(&request.exec_id, stdio, process)?;
        Ok(Empty::default())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        let characters = |count: u32| {
            u16::try_from(count)
                .map_err(|_| Error::InvalidRequest(format!("a terminal of {count} characters")))
        };
        let process = self.containers.process(&request.id, &request.exec_id)?;
        process.resize(characters(request.width)?, characters(request.height)?)?;
        Ok(Empty::default())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        let process = self.containers.process(&request.id, &request.exec_id)?;
        if request.stdin {
            process.close_stdin();
        }
        Ok(Empty::default())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let container = self.containers.get(&request.id)?;
        container.update(spec::read_resources(request.resources.as_ref())?)?;
        Ok(Empty::default())
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let process = self.containers.process(&request.id, &request.exec_id)?;
        let exit = process.wait().await;
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: timestamp(exit.at),
            ..WaitResponse::default()
        })
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let container = self.containers.get(&request.id)?;
        container.init().advance(Action::Inspect)?;
        let metrics = stats::read(container.cgroup().path());
        let value = protobuf::Message::write_to_bytes(&metrics)
            .map_err(|error| ttrpc::Error::Others(error.to_string()))?;
        let any = Any { type_url: stats::TYPE_URL.to_owned(), value, ..Any::default() };
        Ok(StatsResponse { stats: MessageField::some(any), ..StatsResponse::default() })
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        let container = self.containers.get(&request.id)?;
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: container.init().pid(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..ConnectResponse::default()
        })
    }

    /// The agent lives and dies with its sandbox; `Sandbox.Shutdown` ends both.
    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> ttrpc::Result<Empty> {
        Ok(Empty::default())
    }
}

/// Carries `operation` through to its end even if the caller gives up: ttrpc drops the handler of a call
/// whose time is over, and half a container must not be left behind.
pub async fn complete<T: Send + 'static>(
    operation: impl Future<Output = Result<T>> + Send + 'static,
) -> ttrpc::Result<T> {
    match tokio::spawn(operation).await {
        Ok(result) => Ok(result?),
        Err(error) => Err(ttrpc::Error::Others(error.to_string())),
    }
}

fn status(state: State) -> Status {
    match state {
        State::Creating | State::Created | State::Starting => Status::CREATED,
        State::Running => Status::RUNNING,
        State::Paused => Status::PAUSED,
        State::Stopped | State::Deleting => Status::STOPPED,
    }
}

fn timestamp(time: SystemTime) -> MessageField<Timestamp> {
    MessageField::some(time.into())
}
