//! containerd's Task service.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest,
    PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest,
    StartResponse, StateRequest, StateResponse, StatsRequest, StatsResponse, UpdateTaskRequest, WaitRequest,
    WaitResponse,
};
use containerd_shim_protos::events::task::{TaskExecStarted, TaskPaused, TaskResumed, TaskStart};
use containerd_shim_protos::shim_async::{Task, TaskClient, create_task};
use nix::libc;
use protobuf::MessageField;
use slog::{debug, info};
use tokio::time::timeout;
use ttrpc::r#async::{Service, TtrpcContext};
use ttrpc::context::Context;

use crate::container::Role;
use crate::exits::{self, publish_exit};
use crate::hooks::Point;
use crate::pod::Pod;
use crate::process::{Process, State, Step};
use crate::{Error, Result, stats};

/// The service's name in containerd 1.x; 2.x has it as `containerd.task.v3.Task` with the same messages.
const V2: &str = "containerd.task.v2.Task";

/// The signals that end the pod itself; Kubernetes' pause program heeds the same ones.
const DEADLY: [i32; 3] = [libc::SIGKILL, libc::SIGTERM, libc::SIGINT];

/// The Task service under both its names.
pub fn services(pod: &Arc<Pod>) -> HashMap<String, Service> {
    let service = || create_task(Arc::new(TaskService { pod: pod.clone() }));
    let v2 = service().into_values().map(|service| (V2.to_string(), service));
    v2.chain(service()).collect()
}

struct TaskService {
    pod: Arc<Pod>,
}

/// Runs a request to its end also when containerd goes away meanwhile: the server drops the handlers of a connection
/// that closes.
pub(crate) async fn complete<T, F>(operation: &'static str, pod: &Arc<Pod>, request: F) -> ttrpc::Result<T>
where
    T: Send + 'static,
    F: Future<Output = Result<T>> + Send + 'static,
{
    let result = tokio::spawn(request).await.unwrap_or_else(|error| {
        Err(Error::System { operation, source: std::io::Error::other(error.to_string()) })
    });
    result.map_err(|error| {
        info!(pod.log, "request failed"; "operation" => operation, "error" => error.to_string());
        error.into()
    })
}

#[async_trait]
impl Task for TaskService {
    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        let pod = self.pod.clone();
        let create = async move {
            let pid = pod.create(request).await?;
            Ok(CreateTaskResponse { pid, ..Default::default() })
        };
        complete("create", &self.pod, create).await
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        complete("start", &self.pod, start(self.pod.clone(), request)).await
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        Ok(state(&self.pod, &request)?)
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        let pod = self.pod.clone();
        let delete = async move { pod.delete(&request.id, &request.exec_id).await };
        complete("delete", &self.pod, delete).await
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        let pod = self.pod.clone();
        let exec = async move { pod.exec(request).await.map(|()| Empty::new()) };
        complete("exec", &self.pod, exec).await
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        complete("kill", &self.pod, kill(self.pod.clone(), request)).await
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        complete("pause", &self.pod, pause(self.pod.clone(), request)).await
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        complete("resume", &self.pod, resume(self.pod.clone(), request)).await
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let exit = self.pod.container(&request.id)?.process(&request.exec_id)?.wait().await;
        Ok(WaitResponse { exit_status: exit.status, exited_at: exit.timestamp(), ..Default::default() })
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let container = self.pod.container(&request.id)?;
        let state = container.init.state();
        if container.role == Role::Pod || matches!(state, State::Creating | State::Stopped) {
            // After a restart containerd takes a shim without processes for a leftover, and its exit code with it.
            let machine = ProcessInfo { pid: self.pod.pid(), ..Default::default() };
            return Ok(PidsResponse { processes: vec![machine], ..Default::default() });
        }
        let pids = async |task: TaskClient| task.pids(Context::default(), &request).await;
        Ok(self.pod.running_sandbox()?.agent.task("list processes", pids).await?)
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let sandbox = self.pod.running_sandbox()?;
        if self.pod.container(&request.id)?.role == Role::Pod {
            let stats = MessageField::some(stats::of_pod(&sandbox)?);
            return Ok(StatsResponse { stats, ..Default::default() });
        }
        let stats = async |task: TaskClient| task.stats(Context::default(), &request).await;
        Ok(sandbox.agent.task("read statistics", stats).await?)
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let container = self.pod.container(&request.id)?;
        container.require_process("update")?;
        let state = container.init.state();
        if matches!(state, State::Stopped | State::Deleting) {
            return Err(
                Error::WrongState { operation: "update the container of", state: state.name() }.into()
            );
        }
        let pod = self.pod.clone();
        let update = async move { pod.update(&container, request).await.map(|()| Empty::new()) };
        complete("update", &self.pod, update).await
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        let container = self.pod.container(&request.id)?;
        container.require_process("resize the terminal of")?;
        let process = container.process(&request.exec_id)?;
        let state = process.state();
        if matches!(state, State::Stopped | State::Deleting) {
            return Err(Error::WrongState { operation: "resize the terminal of", state: state.name() }.into());
        }
        let resize = async |task: TaskClient| task.resize_pty(Context::default(), &request).await;
        Ok(self.pod.running_sandbox()?.agent.task("resize a terminal", resize).await?)
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        let process = self.pod.container(&request.id)?.process(&request.exec_id)?;
        if request.stdin {
            process.close_stdin();
        }
        Ok(Empty::new())
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        Err(Error::Unimplemented("a container cannot be checkpointed: its memory is the VM's").into())
    }

    async fn connect(&self, _: &TtrpcContext, _: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        Ok(ConnectResponse { shim_pid: std::process::id(), task_pid: self.pod.pid(), ..Default::default() })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> ttrpc::Result<Empty> {
        let pod = self.pod.clone();
        let shutdown = async move {
            pod.shutdown().await;
            Ok(Empty::new())
        };
        complete("shutdown", &self.pod, shutdown).await
    }
}

async fn start(pod: Arc<Pod>, request: StartRequest) -> Result<StartResponse> {
    let container = pod.container(&request.id)?;
    let process = container.process(&request.exec_id)?;
    pod.check_startable(container.role)?;
    let init = container.init.state();
    if !request.exec_id.is_empty() && !matches!(init, State::Created | State::Running) {
        return Err(Error::WrongState { operation: "start an exec in the container of", state: init.name() });
    }
    process.step(Step::Start, "start")?;
    if container.role == Role::Workload
        && let Err(error) = start_in_guest(&pod, &process, &request).await
    {
        // An exec that never began has no end that containerd hears of; an init process has, as with runc.
        if process.finish_unstarted() && request.exec_id.is_empty() {
            publish_exit(&pod, &process, process.wait().await);
        }
        return Err(error);
    }
    let pid = pod.pid();
    if request.exec_id.is_empty() {
        pod.events.publish(TaskStart { container_id: container.id.clone(), pid, ..Default::default() });
    } else {
        let (container_id, exec_id) = (container.id.clone(), process.exec_id.clone());
        pod.events.publish(TaskExecStarted { container_id, exec_id, pid, ..Default::default() });
    }
    // Only now may its end be published.
    process.step(Step::Started, "start")?;
    if request.exec_id.is_empty() {
        pod.save_when_ready(&container);
    }
    if let Some(hooks) = container.hooks.get().filter(|_| request.exec_id.is_empty()) {
        // Failures are logged there.
        let _ = hooks.run(Point::Started, pid, &pod.log).await;
    }
    debug!(pod.log, "process started"; "container" => &container.id, "process" => process.id());
    Ok(StartResponse { pid, ..Default::default() })
}

async fn start_in_guest(pod: &Pod, process: &Process, request: &StartRequest) -> Result<()> {
    let sandbox = &*pod.running_sandbox()?;
    // Before the first program that could use it.
    sandbox.adopt_network().await?;
    pod.open_stdio(sandbox, process).await?;
    let start = async |task: TaskClient| task.start(Context::default(), request).await;
    sandbox.agent.task("start a process", start).await.map(drop)
}

fn state(pod: &Pod, request: &StateRequest) -> Result<StateResponse> {
    let container = pod.container(&request.id)?;
    let process = container.process(&request.exec_id)?;
    let exit = process.exit();
    let endpoints = process.endpoints.clone();
    Ok(StateResponse {
        id: process.id().into(),
        bundle: container.bundle.display().to_string(),
        pid: pod.pid(),
        status: shown_state(&process, &container.init).status().into(),
        stdin: endpoints.stdin,
        stdout: endpoints.stdout,
        stderr: endpoints.stderr,
        terminal: endpoints.terminal,
        exit_status: exit.map(|exit| exit.status).unwrap_or_default(),
        exited_at: exit.map(|exit| exit.timestamp()).unwrap_or_default(),
        exec_id: process.exec_id.clone(),
        ..Default::default()
    })
}

/// With its container every process is paused.
fn shown_state(process: &Process, init: &Process) -> State {
    match (process.state(), init.state()) {
        (State::Running, paused @ (State::Pausing | State::Paused)) => paused,
        (state, _) => state,
    }
}

async fn kill(pod: Arc<Pod>, request: KillRequest) -> Result<Empty> {
    let container = pod.container(&request.id)?;
    let process = container.process(&request.exec_id)?;
    if request.exec_id.is_empty() {
        // A client that was restarted meanwhile may want to be rid of what it had asked for.
        process.settled().await;
    }
    match process.state() {
        State::Stopped | State::Deleting => return Err(Error::Finished),
        state @ (State::Creating | State::Created) if !request.exec_id.is_empty() => {
            return Err(Error::WrongState { operation: "kill", state: state.name() });
        }
        _ => {}
    }
    if container.role == Role::Pod {
        kill_pod(&pod, &process, request.signal);
        return Ok(Empty::new());
    }
    let sent = match pod.running_sandbox() {
        Ok(sandbox) => {
            let kill = async |task: TaskClient| task.kill(Context::default(), &request).await;
            sandbox.agent.task("send a signal", kill).await
        }
        Err(gone) => Err(gone),
    };
    match sent {
        // It dies with its VM. Who wants its end has it, and would give up on another answer: containerd's CRI plugin does.
        Err(error @ (Error::SandboxGone(_) | Error::AgentConnection { .. })) => {
            let known = timeout(pod.sandbox()?.config.timeouts.request(), process.wait()).await;
            Err(known.map_or(error, |_| Error::Finished))
        }
        sent => sent,
    }
}

/// Ends what stands for the pod. The VM goes with its last container.
fn kill_pod(pod: &Pod, process: &Process, signal: u32) {
    if i32::try_from(signal).is_ok_and(|signal| DEADLY.contains(&signal)) {
        exits::publish(pod, process, 128 + signal);
    }
}

async fn pause(pod: Arc<Pod>, request: PauseRequest) -> Result<Empty> {
    let container = pod.container(&request.id)?;
    container.require_process("pause")?;
    let sandbox = pod.running_sandbox()?;
    container.init.step(Step::Pause, "pause")?;
    let pause = async |task: TaskClient| task.pause(Context::default(), &request).await;
    if let Err(error) = sandbox.agent.task("pause a container", pause).await {
        // It may have ended meanwhile.
        let _ = container.init.step(Step::NotPaused, "pause");
        return Err(error);
    }
    container.init.step(Step::Paused, "pause")?;
    pod.events.publish(TaskPaused { container_id: container.id.clone(), ..Default::default() });
    Ok(Empty::new())
}

async fn resume(pod: Arc<Pod>, request: ResumeRequest) -> Result<Empty> {
    let container = pod.container(&request.id)?;
    let sandbox = pod.running_sandbox()?;
    container.init.step(Step::Resume, "resume")?;
    let resume = async |task: TaskClient| task.resume(Context::default(), &request).await;
    if let Err(error) = sandbox.agent.task("resume a container", resume).await {
        // It may have ended meanwhile.
        let _ = container.init.step(Step::NotResumed, "resume");
        return Err(error);
    }
    container.init.step(Step::Resumed, "resume")?;
    pod.events.publish(TaskResumed { container_id: container.id.clone(), ..Default::default() });
    Ok(Empty::new())
}
