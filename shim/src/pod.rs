//! The pod: its VM and its containers.

mod api;
mod create;
mod delete;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use containerd_shim_protos::api::UpdateTaskRequest;
use containerd_shim_protos::shim_async::TaskClient;
use containerd_shim_protos::types::mount::Mount;
use mayu_vmm_api::VmConfig;
use nix::sys::sysinfo::sysinfo;
use oci_spec::runtime::Spec;
use slog::{Logger, info, warn};
use tokio::task::spawn_blocking;
use tokio_util::sync::CancellationToken;
use ttrpc::context::Context;

use crate::admission::Admission;
use crate::config::Config;
use crate::container::{Container, PidNamespace, Role};
use crate::events::Events;
use crate::pod_spec::{Limits, PodSpec, Size};
use crate::sandbox::{Blueprint, Sandbox};
use crate::snapshot::{self, Likeness, Start, Store};
use crate::state_dir::StateDir;
use crate::storage::{self, Storage};
use crate::vmm_process::HostFiles;
use crate::{Error, Result, exits, id, machine, spec};

pub use api::Requested;
pub(crate) use create::any;

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
    /// Set when the pod is first asked for.
    admission: Option<Arc<Admission>>,
    /// Set where the pod was made with the Sandbox API.
    requested: Option<Arc<Requested>>,
    /// Set where the VM starts with the first container, because the pod is to be saved with it, or to go on as another: what the pod is
    /// to be.
    deferred: Option<PodSpec>,
    containers: HashMap<String, Arc<Container>>,
    /// One of them has stood for the pod itself.
    had_pod_container: bool,
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

    /// What decides over the pod. `spec` is what the pod is to be unless it was made with the Sandbox API.
    fn admission(&self, spec: &PodSpec) -> Result<Arc<Admission>> {
        let requested = {
            let state = self.lock();
            if let Some(admission) = &state.admission {
                return Ok(admission.clone());
            }
            state.requested.clone()
        };
        let spec = requested.as_ref().map_or(spec, |requested| &requested.spec);
        let admission = Admission::load(&self.roots.config, &self.namespace, &self.id, spec)?;
        Ok(self.lock().admission.get_or_insert(Arc::new(admission)).clone())
    }

    /// What has decided over the pod.
    fn decided(&self) -> Result<Arc<Admission>> {
        self.lock().admission.clone().ok_or(Error::NoSandbox)
    }

    /// The pid that containerd is told: the VMM's. Where its VM starts with its first container, the pod has none yet, and containerd
    /// needs one that there is: this process's.
    pub fn pid(&self) -> u32 {
        match self.sandbox() {
            Ok(sandbox) => sandbox.pid(),
            Err(_) if self.waits_for_container() => std::process::id(),
            Err(_) => 0,
        }
    }

    /// Whether its VM starts with its first container, of which there is none yet.
    pub fn waits_for_container(&self) -> bool {
        let state = self.lock();
        state.deferred.is_some() && matches!(state.vm, Vm::Absent | Vm::Booting)
    }

    /// Refuses to start anything in a pod whose VM has ended, or was never started.
    ///
    /// # Errors
    /// [`Error::NoSandbox`] or [`Error::SandboxGone`].
    pub fn check_startable(&self, role: Role) -> Result<()> {
        match role {
            Role::Pod if self.waits_for_container() => Ok(()),
            _ => self.running_sandbox().map(drop),
        }
    }

    /// Boots the VM of a pod that has no container yet; or not yet, where its container has to be known for that.
    async fn boot_ahead(self: &Arc<Self>, spec: PodSpec) -> Result<()> {
        let admission = self.admission(&spec)?;
        if admission.wish.is_none() {
            return self.sandbox_with(None, spec, Start::Ordinary).await.map(drop);
        }
        check_size(&admission, spec.limits.size(&admission.config.vm))?;
        self.lock().deferred = Some(spec);
        Ok(())
    }

    /// Mounts a container's files, if it has any, booting the VM at the same time if there is none.
    async fn sandbox_with(
        self: &Arc<Self>,
        storage: Option<Storage>,
        spec: PodSpec,
        start: Start,
    ) -> Result<Arc<Sandbox>> {
        let claimed = {
            let mut state = self.lock();
            let vm = state.vm.clone();
            let is_early = state.requested.is_some() && state.deferred.is_none();
            if storage.is_some() && is_early && matches!(vm, Vm::Absent) {
                // It is for StartSandbox to boot it.
                return Err(Error::NoSandbox);
            }
            if matches!(vm, Vm::Absent) {
                state.vm = Vm::Booting;
            }
            vm
        };
        match claimed {
            Vm::Up(sandbox) => {
                let dir = sandbox.dir.clone();
                blocking(move || attach(storage.as_ref(), &dir)).await?;
                Ok(sandbox)
            }
            Vm::Gone(_, reason) => Err(Error::SandboxGone(reason)),
            Vm::Booting => Err(Error::NoSandbox),
            Vm::Absent => {
                let booted = self.boot(storage, spec, start).await;
                if booted.is_err() {
                    self.lock().vm = Vm::Absent;
                }
                booted
            }
        }
    }

    /// How the VM of a pod starts whose first container this is.
    fn start_of(&self, admission: &Admission, container: &Container, about: About<'_>) -> Result<Start> {
        let Some(wish) = admission.wish.as_ref().filter(|_| matches!(self.lock().vm, Vm::Absent)) else {
            return Ok(Start::Ordinary);
        };
        let Config { vm, snapshot: config, .. } = &admission.config;
        let size = about.pod.limits.max(container.limits()).size(vm);
        let made_of = machine::made_of(vm, &HostFiles::open(vm)?)?;
        let machine = VmConfig { made_of, ..machine::machine(vm, size, 1) };
        let parts = snapshot::Parts {
            config,
            client: &self.namespace,
            pod: about.pod,
            pod_id: &self.id,
            id: &container.id,
            spec: about.spec,
            rootfs: about.rootfs,
            wish,
            machine: &machine,
        };
        let store = Store::new(config);
        let likeness = match Likeness::of(parts) {
            Ok(likeness) => likeness,
            Err(reason) => {
                info!(self.log, "the pod cannot have a snapshot"; "reason" => reason);
                return Ok(Start::Ordinary);
            }
        };
        if let Some(snapshot) = store.find(&likeness, &self.log) {
            return Ok(Start::From(Box::new(snapshot)));
        }
        if let Some((other, differences)) = store.differences(&likeness) {
            info!(self.log, "the pod is another one than was saved of its image";
                "snapshot" => other.name(), "differs_in" => differences.join(" "));
        }
        store.begin(&likeness, &container.id, &self.log).map(|begun| match begun {
            Ok(making) => Start::ToSave(Box::new(making)),
            Err(reason) => {
                info!(self.log, "the pod starts without a snapshot"; "reason" => reason);
                Start::Ordinary
            }
        })
    }

    /// Saves the pod once this container is ready, where that was asked for and there is nothing to go on from.
    pub fn save_when_ready(self: &Arc<Self>, container: &Arc<Container>) {
        let Ok(sandbox) = self.sandbox() else { return };
        if let Some(making) = sandbox.take_making().filter(|making| making.container == container.id) {
            tokio::spawn(snapshot::save(self.clone(), sandbox, container.clone(), making));
        }
    }

    async fn boot(
        self: &Arc<Self>,
        storage: Option<Storage>,
        spec: PodSpec,
        start: Start,
    ) -> Result<Arc<Sandbox>> {
        let admission = self.admission(&spec)?;
        let config = admission.config.clone();
        let size = spec.limits.max(self.limits()).size(&config.vm);
        check_size(&admission, size)?;
        let dir = self.dir()?;
        let made = dir.clone();
        blocking(move || crate::delete::make_anew(&made)).await?;
        let (id, log) = (self.id.clone(), self.log.clone());
        let blueprint = Blueprint { id, spec, size, start, config, dir: dir.clone(), log };
        let share = dir.clone();
        let attach = move || attach(storage.as_ref(), &share);
        let (sandbox, signs, events) = match Sandbox::boot(blueprint, attach).await {
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

    /// Its directory, which is made when its VM starts.
    fn dir(&self) -> Result<StateDir> {
        StateDir::new(&self.roots.state, &self.namespace, &self.id)
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

    /// Whose processes a container with this spec sees. containerd names the namespace of the pod and that of another
    /// container by the same path, that of the VM's process; they are told apart by what the containers there have.
    fn pid_namespace(&self, spec: &Spec) -> Result<PidNamespace> {
        if !spec::shares_pids(spec) {
            return Ok(PidNamespace::Own);
        }
        let state = self.lock();
        let others = state.containers.values().filter(|container| {
            container.role == Role::Workload
                && container.pid_namespace == PidNamespace::Own
                && container.init.state().is_alive()
        });
        let mut candidates: Vec<_> = others.map(|container| container.id.clone()).collect();
        candidates.sort();
        match &candidates[..] {
            [] => Ok(PidNamespace::Pod),
            [target] => Ok(PidNamespace::Of(target.clone())),
            _ => Err(Error::AmbiguousTarget { candidates }),
        }
    }

    /// What the containers may use together.
    fn limits(&self) -> Limits {
        let state = self.lock();
        state.containers.values().fold(Limits::default(), |sum, container| sum.plus(container.limits()))
    }

    /// Changes what a container may use; the VM grows before it, and shrinks after it.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for limits that cannot be read, [`Error::Denied`], or what the VM or the agent cannot do.
    pub async fn update(&self, container: &Container, mut request: UpdateTaskRequest) -> Result<()> {
        let sandbox = self.running_sandbox()?;
        let malformed = |error: serde_json::Error| Error::InvalidArgument(format!("resources: {error}"));
        let mut resources = serde_json::from_slice(&request.resources.value).map_err(malformed)?;
        spec::drop_huge_pages(&mut resources)?;
        request.resources.mut_or_insert_default().value =
            serde_json::to_vec(&resources).map_err(malformed)?;
        let (before, needed) = (container.limits(), self.limits());
        container.set_limits(before.updated(&resources));
        let update = async {
            let admission = self.decided()?;
            let size = sandbox.size_for(self.limits());
            admission.decide(|| admission.resize(&container.subject, &resources, size))?;
            sandbox.fit(self.limits().max(needed)).await?;
            let update = async |task: TaskClient| task.update(Context::default(), &request).await;
            sandbox.agent.task("update resources", update).await
        };
        if let Err(error) = update.await {
            container.set_limits(before);
            return Err(error);
        }
        sandbox.fit(self.limits()).await
    }

    async fn detach_storage(&self, sandbox: &Sandbox, container: &Container) {
        let (dir, place) = (sandbox.dir.clone(), container.place.clone());
        if let Err(error) = blocking(move || storage::detach(&dir, &place)).await {
            warn!(self.log, "files stay mounted"; "container" => &container.id, "error" => error.to_string());
        }
    }

    /// Ends the shim if no container is left, or what stood for the pod is gone: its client removes it last, and has
    /// forgotten the others. A pod that was made with the Sandbox API is for [`Pod::shutdown_sandbox`] to end: containerd asks
    /// for this one when its only container could not be created, and the pod is to have others.
    pub async fn shutdown(&self) {
        let over = {
            let state = self.lock();
            let stands_for_pod = state.containers.values().any(|container| container.role == Role::Pod);
            let of_containers = state.containers.is_empty() || (state.had_pod_container && !stands_for_pod);
            of_containers && state.requested.is_none()
        };
        if !over {
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

/// What there is to know about a container before the VM starts.
#[derive(Clone, Copy)]
struct About<'a> {
    pod: &'a PodSpec,
    spec: &'a Spec,
    rootfs: &'a [Mount],
}

fn attach(storage: Option<&Storage>, dir: &StateDir) -> Result<()> {
    storage.map_or(Ok(()), |storage| storage.attach(dir))
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let ended = |error: tokio::task::JoinError| Error::System {
        operation: "run a blocking operation",
        source: std::io::Error::other(error.to_string()),
    };
    spawn_blocking(work).await.map_err(ended)?
}

/// Refuses a VM of this size where the host has no room for it, or the policy is against it.
fn check_size(admission: &Admission, size: Size) -> Result<()> {
    check_memory(size)?;
    admission.decide(|| admission.pod(size))
}

fn check_memory(size: Size) -> Result<()> {
    let host_mib = sysinfo().map_err(crate::error::system("ask for the host's memory"))?.ram_total() >> 20;
    let guest_mib = u64::from(size.memory_mib);
    if guest_mib > host_mib {
        return Err(Error::Machine(format!(
            "the guest's {guest_mib} MiB (vm.memory_mib and the pod's limits) are more than the {host_mib} MiB of this host"
        )));
    }
    Ok(())
}
