//! Making containers and processes.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use containerd_shim_protos::api::{CreateTaskRequest, ExecProcessRequest};
use containerd_shim_protos::events::task::{TaskCreate, TaskExecAdded, TaskIO};
use containerd_shim_protos::shim_async::TaskClient;
use mayu_agent_api::{ADOPT, BLOCK_DEVICES, HOOK, PROCESS_TYPE_URL, SPEC_TYPE_URL, WARM};
use oci_spec::runtime::Spec;
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use serde::Serialize;
use slog::{info, o};
use ttrpc::context::Context;

use super::{About, Pod, Vm};
use crate::admission::{Admission, Subject};
use crate::container::{Container, Role};
use crate::hooks::Point;
use crate::pod_spec::{Limits, PodSpec};
use crate::process::{Process, State, Step};
use crate::sandbox::Sandbox;
use crate::snapshot::{self, Description, Start};
use crate::spec::{self, GuestSpec, Origin};
use crate::stdio::{Endpoints, Opened, Streams};
use crate::storage::Storage;
use crate::{Error, Result, devices, id};

impl Pod {
    /// Creates a container; for the first one the VM as well.
    ///
    /// # Errors
    /// What failed. Then nothing is left of it, nor of the VM if this was to be the first container.
    pub async fn create(self: &Arc<Self>, request: CreateTaskRequest) -> Result<u32> {
        id::validate("container", &request.id)?;
        if !request.checkpoint.is_empty() {
            return Err(Error::Unimplemented("a container cannot be restored from a checkpoint"));
        }
        let endpoints = Endpoints::from(&request);
        endpoints.present()?;
        let bundle = Path::new(&request.bundle);
        let spec = spec::load(bundle)?;
        let pod = PodSpec::from_oci(&spec)?;
        let admission = self.admission(&pod)?;
        let mut container = Container::new(&request.id, spec::role(&spec), bundle, endpoints);
        if container.role == Role::Workload {
            spec::check_profiles(&spec, &admission.config.security)?;
            container.subject = Subject::new(&request.id, &spec);
            container.pid_namespace = self.pid_namespace(&spec)?;
            container.set_limits(Limits::of_container(&spec));
        }
        let pod = self.lock().deferred.clone().unwrap_or(pod);
        let mut start = Start::Ordinary;
        if container.role == Role::Workload {
            let about = About { pod: &pod, spec: &spec, rootfs: &request.rootfs };
            start = self.start_of(&admission, &container, about)?;
        }
        if let Start::From(snapshot) = &start {
            container.place.clone_from(&snapshot.description.container);
        }
        let container = Arc::new(container);
        self.reserve(&container)?;
        let created = match self.admit(&admission, &container, &pod, &spec) {
            Ok(()) => self.build(&container, pod, spec, start, request).await,
            Err(error) => Err(error),
        };
        if created.is_err() {
            self.abandon(&container).await;
        }
        created
    }

    /// Asks the policy about a container that has been reserved, so that of two at the same time each counts for the other.
    fn admit(&self, admission: &Admission, container: &Container, pod: &PodSpec, spec: &Spec) -> Result<()> {
        if container.role == Role::Pod {
            return Ok(());
        }
        let size = match self.sandbox() {
            Ok(sandbox) => sandbox.size_for(self.limits()),
            Err(_) => pod.limits.size(&admission.config.vm),
        };
        admission.decide(|| admission.container(&container.subject, spec, size))
    }

    fn reserve(&self, container: &Arc<Container>) -> Result<()> {
        let mut state = self.lock();
        if state.containers.contains_key(&container.id) {
            return Err(Error::AlreadyExists { kind: "container", id: container.id.clone() });
        }
        state.had_pod_container |= container.role == Role::Pod;
        state.containers.insert(container.id.clone(), container.clone());
        Ok(())
    }

    async fn build(
        self: &Arc<Self>,
        container: &Arc<Container>,
        pod: PodSpec,
        spec: Spec,
        start: Start,
        request: CreateTaskRequest,
    ) -> Result<u32> {
        let log = self.log.new(o!("container" => container.id.clone()));
        match container.role {
            Role::Pod => self.boot_ahead(pod).await?,
            Role::Workload => {
                let files = self.files(&pod)?;
                let origin = Origin {
                    id: &container.id,
                    place: &container.place,
                    bundle: &container.bundle,
                    pid_namespace: &container.pid_namespace,
                    files: &files,
                };
                let GuestSpec { mut spec, root, binds, volumes, devices, hooks } =
                    spec::for_guest(spec, origin, &log)?;
                let rootfs = request.rootfs.clone();
                let storage = Storage { place: container.place.clone(), rootfs, root, binds };
                let sandbox = self.sandbox_with(Some(storage), pod, start).await?;
                sandbox.fit(self.limits()).await?;
                let snapshot = sandbox.take_snapshot();
                match &snapshot {
                    Some(snapshot) => {
                        sandbox.has_volumes(volumes).await;
                        let Description { likeness, container, .. } = &snapshot.description;
                        spec::tell_agent(&mut spec, ADOPT, container.clone());
                        if let Some(hook) = &likeness.wish.hook {
                            spec::tell_agent(&mut spec, HOOK, hook.clone());
                        }
                    }
                    None => {
                        sandbox.provide(volumes).await?;
                        // Whether or not it is saved: what a container finds is not to depend on that.
                        if self.decided()?.wish.is_some() {
                            spec::tell_agent(&mut spec, WARM, true.to_string());
                        }
                    }
                }
                if !devices.is_empty() {
                    let places = sandbox.attach_devices(&container.id, &devices).await?;
                    spec::tell_agent(&mut spec, BLOCK_DEVICES, devices::annotation(&places));
                }
                let hooks = container.hooks.get_or_init(|| hooks);
                hooks.run(Point::Created, sandbox.pid(), &log).await?;
                let created = self.create_in_guest(&sandbox, container, &spec, request.terminal).await;
                match (&created, snapshot) {
                    (Err(error), Some(snapshot)) => {
                        snapshot.discard(&sandbox.config.snapshot, error, &log);
                        // What was saved is still in the guest, and is nobody's.
                        sandbox.condemn("its container did not go on as it was saved");
                    }
                    (Ok(()), Some(snapshot)) => {
                        tokio::spawn(snapshot::record(
                            snapshot,
                            sandbox.pid(),
                            container.clone(),
                            log.clone(),
                        ));
                    }
                    _ => {}
                }
                created?;
            }
        }
        let pid = self.pid();
        self.events.publish(created_event(request, pid));
        container.init.step(Step::Created, "create")?;
        info!(log, "container created");
        Ok(pid)
    }

    /// The pod's files, which are written when its VM starts.
    fn files(&self, pod: &PodSpec) -> Result<Vec<(&'static str, PathBuf)>> {
        match self.sandbox() {
            Ok(sandbox) => Ok(sandbox.files.clone()),
            Err(_) => Ok(pod.paths_of_files(&self.dir()?)),
        }
    }

    async fn create_in_guest(
        &self,
        sandbox: &Sandbox,
        container: &Container,
        spec: &Spec,
        terminal: bool,
    ) -> Result<()> {
        let options = any(SPEC_TYPE_URL, spec)?;
        self.attach_process(sandbox, &container.init, |names| {
            let request = CreateTaskRequest {
                id: container.id.clone(),
                terminal,
                stdin: names.stdin,
                stdout: names.stdout,
                stderr: names.stderr,
                options: MessageField::some(options),
                ..Default::default()
            };
            let agent = sandbox.agent.clone();
            async move {
                let create = async |task: TaskClient| task.create(Context::default(), &request).await;
                agent.task("create a container", create).await.map(drop)
            }
        })
        .await
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
            let last = state.containers.is_empty() && state.requested.is_none();
            if last {
                // Where it is asked for once more, it is another pod.
                state.admission = None;
            }
            last
        };
        let Ok(sandbox) = self.sandbox() else {
            return;
        };
        drop(sandbox.take_making());
        if sandbox.take_snapshot().is_some() {
            // What was saved is in the guest, and no other container may become it.
            sandbox.condemn("nobody has taken over its container as it was saved");
        }
        if last {
            sandbox.tear_down().await;
            self.lock().vm = Vm::Absent;
            return;
        }
        // Where the agent has made no container there is nothing to delete.
        let _ = self.delete_in_guest(&container.id, "").await;
        sandbox.release_devices(&container.id).await;
        self.detach_storage(&sandbox, container).await;
    }

    /// Adds a process to a container.
    ///
    /// # Errors
    /// What failed; then nothing is left of it.
    pub async fn exec(&self, request: ExecProcessRequest) -> Result<()> {
        let container = self.container(&request.id)?;
        container.require_process("exec in")?;
        let sandbox = self.running_sandbox()?;
        let state = container.init.state();
        if !matches!(state, State::Created | State::Running) {
            return Err(Error::WrongState { operation: "exec in the container of", state: state.name() });
        }
        let log = self.log.new(o!("container" => request.id.clone(), "exec" => request.exec_id.clone()));
        let mut spec = process(request.spec.as_ref())?;
        let (admission, size) = (self.decided()?, sandbox.size_for(self.limits()));
        admission.decide(|| admission.exec(&container.subject, &spec, size))?;
        spec::rewrite_process(&mut spec, &log);
        let spec = any(PROCESS_TYPE_URL, &spec)?;
        let process = container.add_exec(&request.exec_id, Endpoints::from(&request))?;
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
                let exec = async |task: TaskClient| task.exec(Context::default(), &request).await;
                agent.task("add a process", exec).await.map(drop)
            }
        });
        if let Err(error) = made.await {
            process.forget();
            // Where the agent has made no process there is nothing to delete.
            let _ = self.delete_in_guest(&container.id, &process.exec_id).await;
            container.remove_exec(&process.exec_id);
            return Err(error);
        }
        self.events.publish(TaskExecAdded {
            container_id: container.id.clone(),
            exec_id: process.exec_id.clone(),
            ..Default::default()
        });
        process.step(Step::Created, "create")
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
}

pub(crate) fn any(type_url: &str, value: &impl Serialize) -> Result<Any> {
    let value = serde_json::to_vec(value).map_err(|error| Error::InvalidArgument(error.to_string()))?;
    Ok(Any { type_url: type_url.into(), value, ..Default::default() })
}

/// The process that an Exec request describes.
fn process(spec: Option<&Any>) -> Result<oci_spec::runtime::Process> {
    let spec = spec.ok_or_else(|| Error::InvalidArgument("exec: the process spec is missing".into()))?;
    serde_json::from_slice(&spec.value)
        .map_err(|error| Error::InvalidArgument(format!("exec: the process spec is malformed: {error}")))
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
