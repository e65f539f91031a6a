//! One container: its cgroup, its files, its init process and the processes executed beside it.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use libcontainer::notify_socket::NOTIFY_FILE;
use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use oci_spec::runtime::{LinuxResources, Spec};
use slog::{Logger, debug, o, warn};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::cgroup::Cgroup;
use crate::error::{Error, Result};
use crate::events::Events;
use crate::launch::{Launched, Launcher, ProcessKind, Request};
use crate::process::Process;
use crate::reaper::{Exit, Reaper};
use crate::spec::{self, ContainerPlan, ProcessPlan};
use crate::state::{Action, State};
use crate::stdio::{Ends, StdioRequest};
use crate::streams::Streams;

/// How many execs one container may have at once, ended ones that were not deleted included.
const MAX_EXECS: usize = 4096;
/// How long output that the shim does not take is kept when its process is deleted.
const DRAIN_DEADLINE: Duration = Duration::from_secs(10);
/// The container's seccomp filter in its bundle.
const SECCOMP_FILE: &str = "seccomp.json";
/// The longest reason taken from a process that could not execute its program, in bytes.
const MAX_FAILURE: u64 = 4096;
/// The status of an exec that never ran its program, as shells report it.
const NOT_STARTED: u32 = 255;

/// What all containers share.
pub struct Runtime {
    /// Starts processes.
    pub launcher: Launcher,
    /// How long the shim may take to connect the streams of a process that it starts.
    pub stream_deadline: Duration,
    /// Where bundles, libcontainer's states and sockets are kept.
    pub run_directory: PathBuf,
    /// Collects exits.
    pub reaper: Arc<Reaper>,
    /// What the shim is told.
    pub events: Arc<Events>,
    /// The shim's streams.
    pub streams: Arc<Streams>,
    /// Numbers files, so that two never meet.
    pub counter: AtomicU64,
    /// The agent's log.
    pub log: Logger,
}

/// A container from its creation to its deletion.
pub struct Container {
    id: String,
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
}

/// A process beside the init and what it is to run.
#[derive(Clone)]
struct Exec {
    process: Arc<Process>,
    spec: Arc<oci_spec::runtime::Process>,
    plan: Arc<ProcessPlan>,
}

impl Runtime {
    /// The directory of container `id`'s bundle.
    fn bundle(&self, id: &str) -> PathBuf {
        self.run_directory.join("bundles").join(id)
    }

    /// The directory in which libcontainer keeps a directory for each container.
    fn state_directory(&self) -> PathBuf {
        self.run_directory.join("state")
    }

    /// A path that nobody has used before.
    fn fresh_path(&self, suffix: &str) -> PathBuf {
        let number = self.counter.fetch_add(1, Ordering::Relaxed);
        self.run_directory.join(format!("{number}.{suffix}"))
    }
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

    /// Makes everything the container needs and its init process, which then waits to be started.
    ///
    /// # Errors
    ///
    /// `Launch` with libcontainer's reason, `LaunchDeadline`, or what the kernel refused. Nothing is left then.
    pub async fn set_up(self: &Arc<Self>, spec: Spec) -> Result<()> {
        let launched = match self.launch_init(spec).await {
            Ok(launched) => launched,
            Err(error) => {
                let error = self.explain(error);
                if let Err(error) = self.remove_files().await {
                    warn!(self.log, "cannot clean up after a failed create"; "error" => %error);
                }
                return Err(error);
            }
        };
        self.init.launched(launched.pid, launched.terminal);
        self.init.advance(Action::FinishCreate)?;
        self.watch_exit(Arc::clone(&self.init), launched.exit);
        self.watch_memory();
        self.set_console_size(&self.init, &self.plan.process);
        Ok(())
    }

    fn set_console_size(&self, process: &Process, plan: &ProcessPlan) {
        if let Some((columns, rows)) = plan.console_size.filter(|_| process.stdio().terminal)
            && let Err(error) = process.resize(columns, rows)
        {
            // The process may have ended.
            debug!(self.log, "cannot set the terminal's size"; "error" => %error);
        }
    }

    async fn launch_init(&self, mut spec: Spec) -> Result<Launched> {
        let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
        let devices = resources.and_then(|resources| resources.devices().as_deref());
        self.cgroup.create(devices.unwrap_or_default())?;
        self.without_swap(spec.linux_mut().as_mut().and_then(|linux| linux.resources_mut().as_mut()));
        for (key, value) in &self.plan.network_sysctls {
            set_sysctl(key, value)?;
        }
        let bundle = self.runtime.bundle(&self.id);
        fs::create_dir_all(&bundle).map_err(Error::file("create", &bundle))?;
        write_json(bundle.join("config.json"), &spec)?;
        if let Some(seccomp) = &self.plan.seccomp {
            write_json(bundle.join(SECCOMP_FILE), seccomp)?;
        }

        let (ends, mut descriptors) = pipes(&self.init, self.plan.process.user)?;
        let (read, write) = pipe2(OFlag::O_CLOEXEC).map_err(Error::system("make a pipe"))?;
        let read = pipe::Receiver::from_owned_fd(read).map_err(Error::io("watch a pipe"))?;
        {
            let mut inner = self.inner();
            inner.ends = Some(ends);
            inner.failure = Some(read);
        }
        descriptors.push(write);
        self.launch(&self.init, &self.plan.process, ProcessKind::Init { bundle }, descriptors).await
    }

    /// Runs the init's or an exec's program and returns the pid.
    ///
    /// # Errors
    ///
    /// `WrongState`, `MissingStream`, `Launch` with the reason the program could not be executed.
    pub async fn start(self: &Arc<Self>, exec_id: &str) -> Result<u32> {
        if exec_id.is_empty() {
            self.init.advance(Action::Start)?;
            let started = self.start_init().await;
            if started.is_err() {
                // It waits for a start that will not come.
                let _ = self.init.kill(libc::SIGKILL, &self.runtime.reaper);
            }
            started?;
            self.init.started();
            return Ok(self.init.pid());
        }
        let exec = self.exec_of(exec_id)?;
        self.init.advance(Action::Exec)?;
        exec.process.advance(Action::Start)?;
        if let Err(error) = self.start_exec(&exec).await {
            if exec.process.pid() == 0 {
                exec.process.exited(Exit { status: NOT_STARTED, at: SystemTime::now() });
            } else {
                // It runs without its streams.
                let _ = exec.process.kill(libc::SIGKILL, &self.runtime.reaper);
            }
            return Err(self.explain(error));
        }
        exec.process.started();
        Ok(exec.process.pid())
    }

    async fn start_init(&self) -> Result<()> {
        let connected = self.init.connect(self.runtime.stream_deadline).await?;
        let pipes = self.inner().ends.take().unwrap_or_default();
        let ends = if self.init.stdio().terminal { self.init.terminal_ends()? } else { pipes };
        self.init.copy(connected, ends);
        let failure = self.inner().failure.take();

        // libcontainer's init waits for a connection to this socket. The path is short enough for one: an id
        // has 76 characters at most.
        let socket = self.runtime.state_directory().join(&self.id).join(NOTIFY_FILE);
        UnixStream::connect(&socket)
            .and_then(|mut stream| stream.write_all(b"start container"))
            .map_err(Error::file("connect to", &socket))?;

        // The pipe ends when the program is executed; or when the process dies, which is its exit's business.
        let mut reason = String::new();
        if let Some(failure) = failure {
            failure
                .take(MAX_FAILURE)
                .read_to_string(&mut reason)
                .await
                .map_err(Error::io("wait for the program to be executed"))?;
        }
        if reason.is_empty() { Ok(()) } else { Err(Error::Launch(reason)) }
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

    async fn start_exec(self: &Arc<Self>, exec: &Exec) -> Result<()> {
        let process = &exec.process;
        let connected = process.connect(self.runtime.stream_deadline).await?;
        let file = self.runtime.fresh_path("json");
        write_json(file.clone(), exec.spec.as_ref())?;
        let (ends, descriptors) = pipes(process, exec.plan.user)?;
        let kind = ProcessKind::Exec { process: file.clone(), sub_cgroup: self.init_cgroup() };
        let launched = self.launch(process, &exec.plan, kind, descriptors).await;
        // It was only for the helper.
        let _ = fs::remove_file(&file);
        let launched = launched?;
        process.launched(launched.pid, launched.terminal);
        self.watch_exit(Arc::clone(process), launched.exit);
        let ends = if process.stdio().terminal { process.terminal_ends()? } else { ends };
        process.copy(connected, ends);
        self.set_console_size(process, &exec.plan);
        Ok(())
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

    /// Thaws all processes.
    ///
    /// # Errors
    ///
    /// `WrongState`, `File`, `CgroupDeadline`.
    pub async fn resume(&self) -> Result<()> {
        self.init.advance(Action::Resume)?;
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
            self.init.kill(libc::SIGKILL, &self.runtime.reaper)?;
            self.init.wait().await;
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
        for directory in [self.runtime.bundle(&self.id), self.runtime.state_directory().join(&self.id)] {
            if directory.exists() {
                fs::remove_dir_all(&directory).map_err(Error::file("remove", &directory))?;
            }
        }
        Ok(())
    }

    async fn launch(
        &self,
        process: &Process,
        plan: &ProcessPlan,
        kind: ProcessKind,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Launched> {
        let console = process.stdio().terminal.then(|| self.runtime.fresh_path("sock"));
        let request = Request {
            id: self.id.clone(),
            state_directory: self.runtime.state_directory(),
            console_socket: console.clone(),
            user: plan.user,
            seccomp: self.plan.seccomp.as_ref().map(|_| self.runtime.bundle(&self.id).join(SECCOMP_FILE)),
            capabilities: plan.capabilities.clone(),
            process: kind,
        };
        let launched = self.runtime.launcher.launch(&self.runtime.reaper, &request, descriptors).await;
        if let Some(console) = console {
            // There is none where the helper failed early.
            let _ = fs::remove_file(console);
        }
        launched
    }

    /// Reports the end of `process` when it comes.
    fn watch_exit(self: &Arc<Self>, process: Arc<Process>, exit: oneshot::Receiver<Exit>) {
        let container = Arc::clone(self);
        tokio::spawn(async move {
            // The reaper never drops what it watches.
            let Ok(exit) = exit.await else { return };
            if process.exec_id().is_empty() && !container.plan.own_pid_namespace {
                // Nobody else ends what the init leaves behind.
                if let Err(error) = container.end_all().await {
                    warn!(container.log, "cannot end what the init left behind"; "error" => %error);
                }
            }
            container.report_oom();
            process.exited(exit);
            container.runtime.events.exited(&container.id, process.exec_id(), process.pid(), exit);
        });
    }

    async fn end_all(&self) -> Result<()> {
        self.cgroup.kill()?;
        self.cgroup.empty().await
    }

    fn watch_memory(self: &Arc<Self>) {
        let mut watch = match self.cgroup.watch_memory() {
            Ok(watch) => watch,
            Err(error) => {
                warn!(self.log, "cannot watch memory"; "error" => %error);
                return;
            }
        };
        let container = Arc::downgrade(self);
        let task = tokio::spawn(async move {
            while watch.changed().await.is_ok() {
                let Some(container) = container.upgrade() else { return };
                container.report_oom();
            }
        });
        self.inner().memory_watch = Some(task);
    }

    /// Reports kills for want of memory that were not reported yet.
    fn report_oom(&self) {
        let kills = self.cgroup.oom_kills();
        if kills > self.oom_kills.swap(kills, Ordering::Relaxed) {
            self.runtime.events.out_of_memory(&self.id);
        }
    }

    /// Names the cause that libcontainer cannot see.
    fn explain(&self, error: Error) -> Error {
        match error {
            Error::Launch(reason) if self.cgroup.oom_kills() > self.oom_kills.load(Ordering::Relaxed) => {
                Error::Launch(format!("{reason} (the container is out of memory: is its limit too low?)"))
            }
            error => error,
        }
    }

    /// The cgroup of the init below the container's own, where it has moved to one: a cgroup with controllers
    /// for its children takes no processes.
    fn init_cgroup(&self) -> Option<String> {
        let text = fs::read_to_string(format!("/proc/{}/cgroup", self.init.pid())).ok()?;
        let own = Cgroup::spec_path(&self.id);
        // cgroups(7): "0::/path".
        let path = text.lines().find_map(|line| line.strip_prefix("0::"))?;
        let below = path.strip_prefix(own.to_str()?)?.trim_start_matches('/');
        (!below.is_empty()).then(|| below.to_owned())
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

/// The agent's ends of the pipes of `process` and its own, to launch it with; none for a terminal.
fn pipes(process: &Process, user: (u32, u32)) -> Result<(Ends, Vec<OwnedFd>)> {
    if process.stdio().terminal {
        return Ok((Ends::default(), Vec::new()));
    }
    let (ends, child) = process.stdio().pipes(user)?;
    Ok((ends, child.into()))
}

/// Writes a sysctl, in its form with dots or with slashes, sysctl(8).
fn set_sysctl(key: &str, value: &str) -> Result<()> {
    if key.split(['.', '/']).any(str::is_empty) {
        return Err(Error::InvalidSpec(format!("sysctl {key:?}")));
    }
    let path = PathBuf::from("/proc/sys").join(key.replace('.', "/"));
    fs::write(&path, value).map_err(Error::file("set sysctl", path))
}

fn write_json(path: PathBuf, value: &impl serde::Serialize) -> Result<()> {
    let text = serde_json::to_vec(value).map_err(|error| Error::InvalidSpec(error.to_string()))?;
    fs::write(&path, text).map_err(Error::file("write", path))
}
