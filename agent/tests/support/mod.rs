//! An agent in this process, a client of its services, and a root file system with busybox. Each program of tests uses a part of it.

#![allow(dead_code)]

use std::cell::Cell;
use std::collections::VecDeque;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;
use std::time::Duration;

use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, CreateTaskRequest, DeleteRequest, ExecProcessRequest, KillRequest,
    PauseRequest, PidsRequest, ResizePtyRequest, ResumeRequest, StartRequest, StateRequest, StatsRequest,
    UpdateTaskRequest, WaitRequest,
};
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::shim_async::TaskClient;
use mayu_agent::server::{self, Listeners, Options};
use mayu_agent_api::sandbox::{
    CreateVolumeRequest, Event, EventsRequest, HealthRequest, HealthResponse, SuspendRequest, event,
};
use mayu_agent_api::sandbox_ttrpc::SandboxClient;
use mayu_agent_api::{PROCESS_TYPE_URL, SPEC_TYPE_URL, StreamId};
use nix::unistd::Pid;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use serde_json::{Value, json};
use slog::{Discard, Logger, o};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::Notify;
use ttrpc::asynchronous::transport::Listener;
use ttrpc::asynchronous::{Client, Server};
use ttrpc::context::Context;
use ttrpc::{Code, Error};

/// Runs scenarios with one agent, one after the other; those whose names have `ONLY` in them, where the environment has that.
#[allow(unused_macros)]
macro_rules! scenarios {
    ($($scenario:ident),* $(,)?) => {
        if let Some(reason) = support::missing() {
            eprintln!("SKIPPED: needs a host for containers: {reason}");
            return;
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        tokio::task::LocalSet::new().block_on(&runtime, async {
            let agent = Agent::serve().await;
            let only = std::env::var("ONLY").unwrap_or_default();
            $(
                if stringify!($scenario).contains(&only) {
                    eprintln!("- {}", stringify!($scenario).replace('_', " "));
                    $scenario(&agent).await;
                    agent.assert_clean();
                }
            )*
        });
    };
}

type Result<T> = std::result::Result<T, Error>;

/// The capabilities of containerd's default spec.
const CAPABILITIES: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

/// What this machine lacks to run containers.
pub fn missing() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("not root".into());
    }
    let controllers = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default();
    if !["memory", "pids", "cpu"].iter().all(|name| controllers.split_whitespace().any(|c| c == *name)) {
        return Some("/sys/fs/cgroup is not cgroup v2 with memory, pids and cpu".into());
    }
    if busybox().is_none() {
        return Some("no static busybox in $PATH".into());
    }
    None
}

fn busybox() -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?)
        .map(|path| path.join("busybox"))
        .find(|path| path.exists())
}

/// The fields a caller may change of a spec like containerd's default one.
pub fn spec(args: &[&str]) -> Value {
    let capabilities = json!(CAPABILITIES);
    json!({
        "ociVersion": "1.2.0",
        "root": {"path": ""},
        "hostname": "test",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": args,
            "env": ["PATH=/usr/bin:/bin"],
            "cwd": "/",
            "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
             "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
             "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs",
             "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
             "options": ["ro", "nosuid", "noexec", "nodev"]},
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["mode=1777"]},
        ],
        "linux": {
            "cgroupsPath": "/default/whatever",
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "namespaces": [
                {"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}, {"type": "cgroup"},
            ],
            "maskedPaths": [],
            "readonlyPaths": [],
        },
    })
}

/// The agent, its client, and what it has told so far.
pub struct Agent {
    directory: TempDir,
    task: TaskClient,
    sandbox: SandboxClient,
    events: Rc<Events>,
    next_stream: Cell<u64>,
    _server: Server,
}

#[derive(Default)]
struct Events {
    all: std::cell::RefCell<VecDeque<event::Event>>,
    told: std::cell::RefCell<Vec<(String, &'static str)>>,
    changed: Notify,
}

/// What a process has printed and how it ended.
#[derive(Debug)]
pub struct Output {
    pub stdout: String,
    pub stderr: String,
    pub status: u32,
}

/// The streams of a process.
pub struct Process {
    stdin: Option<UnixStream>,
    stdout: UnixStream,
    stderr: UnixStream,
}

/// The streams of a process with a terminal.
pub struct Terminal {
    stdin: UnixStream,
    stdout: UnixStream,
    seen: String,
}

impl Agent {
    /// Starts the agent in this process.
    pub async fn serve() -> Self {
        nix::sys::prctl::set_child_subreaper(true).unwrap();
        let directory = TempDir::new().unwrap();
        make_rootfs(&directory.path().join("rootfs"));
        let socket = |name: &str| format!("unix://{}", directory.path().join(name).display());
        let program =
            std::env::var_os("MAYU_AGENT").map_or(env!("CARGO_BIN_EXE_mayu-agent").into(), PathBuf::from);
        let options = Options {
            program,
            launch_deadline: Duration::from_secs(120),
            stream_deadline: Duration::from_secs(2),
            settle_time: Duration::from_millis(10),
            run_directory: directory.path().join("run"),
            volume_directory: directory.path().join("volumes"),
        };
        fs::create_dir(&options.run_directory).unwrap();
        let [rpc, streams, forward] =
            ["rpc", "streams", "forward"].map(|name| Listener::bind(socket(name)).unwrap());
        let log = Logger::root(Discard, o!());
        let listeners = Listeners { rpc, streams, forward };
        let server = server::serve(options, listeners, &log).await.unwrap();

        let client = Client::connect(&socket("rpc")).await.unwrap();
        let sandbox = SandboxClient::new(client.clone());
        let events = Rc::new(Events::default());
        let agent = Self {
            directory,
            task: TaskClient::new(client),
            sandbox,
            events,
            next_stream: Cell::new(1),
            _server: server,
        };
        agent.collect_events().await;
        agent
    }

    async fn collect_events(&self) {
        let mut stream = self.sandbox.events(forever(), &EventsRequest::default()).await.unwrap();
        let events = Rc::clone(&self.events);
        tokio::task::spawn_local(async move {
            while let Ok(Some(Event { event: Some(event), .. })) = stream.recv().await {
                let told = match &event {
                    event::Event::Exit(exit) => (exit.container_id.clone(), "exit"),
                    event::Event::Oom(oom) => (oom.container_id.clone(), "oom"),
                    _ => continue,
                };
                events.told.borrow_mut().push(told);
                events.all.borrow_mut().push_back(event);
                events.changed.notify_waiters();
            }
        });
    }

    /// A path in the test's own directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// All that the agent keeps in its directory.
    pub fn paths_in_use(&self) -> Vec<PathBuf> {
        let mut paths = vec![self.path("run")];
        let mut next = 0;
        while let Some(path) = paths.get(next).cloned() {
            paths.extend(fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path()));
            next += 1;
        }
        paths
    }

    /// How often to repeat what is repeated.
    pub fn repetitions(&self) -> usize {
        std::env::var("REPEAT").ok().and_then(|text| text.parse().ok()).unwrap_or(100)
    }

    /// Nothing may be left of the containers that are gone.
    pub fn assert_clean(&self) {
        let entries = |path: PathBuf| -> Vec<PathBuf> {
            let list = fs::read_dir(path).into_iter().flatten().flatten();
            list.filter(|entry| entry.file_type().unwrap().is_dir()).map(|entry| entry.path()).collect()
        };
        assert_eq!(entries("/sys/fs/cgroup/mayu".into()), Vec::<PathBuf>::new());
        assert_eq!(entries(self.path("run/bundles")), Vec::<PathBuf>::new());
        assert_eq!(entries(self.path("run/state")), Vec::<PathBuf>::new());
        let files = fs::read_dir(self.path("run")).unwrap().flatten().map(|entry| entry.file_name());
        assert_eq!(entries(self.path("run/roots")), Vec::<PathBuf>::new());
        let mut files: Vec<_> = files.filter(|name| name != "roots").collect();
        files.sort();
        assert_eq!(files, ["bundles", "state"]);
        self.events.all.borrow_mut().clear();
        // The pod's PID namespace stays until the guest ends.
        let left: Vec<Pid> = children().into_iter().filter(|pid| !is_pause(pid)).collect();
        assert_eq!(left, [], "left-over processes");
    }

    /// Runs a container from its creation to its deletion.
    pub async fn run(&self, id: &str, spec: Value, input: &[u8]) -> Output {
        let process = self.create(id, spec, !input.is_empty()).await.unwrap();
        self.start(id, "").await.unwrap();
        let output = self.feed(id, "", process, input).await;
        self.delete(id, "").await.unwrap();
        output
    }

    /// The same with output that is no text, and the exit status.
    pub async fn run_bytes(&self, id: &str, spec: Value, input: &[u8]) -> (Vec<u8>, u32) {
        let Process { stdin, mut stdout, .. } = self.create(id, spec, true).await.unwrap();
        self.start(id, "").await.unwrap();
        let mut output = Vec::new();
        let (read, ()) = tokio::join!(stdout.read_to_end(&mut output), write_all(stdin.unwrap(), input));
        read.unwrap();
        let status = self.exit_event(id, "").await;
        self.delete(id, "").await.unwrap();
        (output, status)
    }

    /// Runs an exec from its creation to its deletion.
    pub async fn run_exec(&self, id: &str, exec_id: &str, args: &[&str], input: &[u8]) -> Output {
        self.run_process(id, exec_id, spec(args)["process"].take(), input).await
    }

    /// The same, with all that a process's spec can say.
    pub async fn run_process(&self, id: &str, exec_id: &str, spec: Value, input: &[u8]) -> Output {
        let process = self.exec_with(id, exec_id, &spec, !input.is_empty()).await.unwrap();
        self.start(id, exec_id).await.unwrap();
        let output = self.feed(id, exec_id, process, input).await;
        self.delete(id, exec_id).await.unwrap();
        output
    }

    async fn feed(&self, id: &str, exec_id: &str, mut process: Process, input: &[u8]) -> Output {
        match process.stdin.take() {
            Some(stdin) => tokio::join!(self.finish(id, exec_id, process), write_all(stdin, input)).0,
            None => self.finish(id, exec_id, process).await,
        }
    }

    /// Reads a process's output to its end and waits for its exit.
    pub async fn finish(&self, id: &str, exec_id: &str, mut process: Process) -> Output {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let (out, err) =
            tokio::join!(process.stdout.read_to_end(&mut stdout), process.stderr.read_to_end(&mut stderr));
        out.unwrap();
        err.unwrap();
        Output {
            stdout: String::from_utf8(stdout).unwrap(),
            stderr: String::from_utf8(stderr).unwrap(),
            status: self.exit_event(id, exec_id).await,
        }
    }

    pub async fn create(&self, id: &str, spec: Value, stdin: bool) -> Result<Process> {
        let (ids, request) = self.create_request(id, spec, stdin);
        self.task.create(forever(), &request).await?;
        let [input, stdout, stderr] = ids;
        Ok(Process {
            stdin: if stdin { Some(self.connect(input).await) } else { None },
            stdout: self.connect(stdout).await,
            stderr: self.connect(stderr).await,
        })
    }

    pub async fn create_unconnected(&self, id: &str, spec: Value) {
        let (_, request) = self.create_request(id, spec, false);
        self.task.create(forever(), &request).await.unwrap();
    }

    /// Creates a container that has a standard error alone.
    pub async fn create_with_errors_only(&self, id: &str, spec: Value) -> UnixStream {
        let ([.., stderr], mut request) = self.create_request(id, spec, false);
        request.stdout = String::new();
        self.task.create(forever(), &request).await.unwrap();
        self.connect(stderr).await
    }

    pub async fn create_terminal(&self, id: &str, spec: Value) -> Terminal {
        let ([stdin, stdout, _], mut request) = self.create_request(id, spec, true);
        request.terminal = true;
        request.stderr = String::new();
        self.task.create(forever(), &request).await.unwrap();
        self.connect_terminal(stdin, stdout).await
    }

    fn create_request(&self, id: &str, mut spec: Value, stdin: bool) -> ([StreamId; 3], CreateTaskRequest) {
        if spec["root"]["path"] == "" {
            spec["root"]["path"] = json!(self.path("rootfs"));
        }
        let ids = self.streams();
        let request = CreateTaskRequest {
            id: id.to_owned(),
            stdin: if stdin { ids[0].to_string() } else { String::new() },
            stdout: ids[1].to_string(),
            stderr: ids[2].to_string(),
            options: any(SPEC_TYPE_URL, &spec),
            ..Default::default()
        };
        (ids, request)
    }

    pub async fn exec(&self, id: &str, exec_id: &str, args: &[&str]) -> Result<Process> {
        self.exec_with(id, exec_id, &spec(args)["process"], false).await
    }

    async fn exec_with(&self, id: &str, exec_id: &str, spec: &Value, stdin: bool) -> Result<Process> {
        let ids = self.streams();
        let request = ExecProcessRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            stdin: if stdin { ids[0].to_string() } else { String::new() },
            stdout: ids[1].to_string(),
            stderr: ids[2].to_string(),
            spec: any(PROCESS_TYPE_URL, spec),
            ..Default::default()
        };
        self.task.exec(forever(), &request).await?;
        Ok(Process {
            stdin: if stdin { Some(self.connect(ids[0]).await) } else { None },
            stdout: self.connect(ids[1]).await,
            stderr: self.connect(ids[2]).await,
        })
    }

    pub async fn exec_terminal(&self, id: &str, exec_id: &str, args: &[&str]) -> Terminal {
        let ids = self.streams();
        let mut process = spec(args)["process"].take();
        process["user"] = json!({"uid": 1000, "gid": 1000});
        let request = ExecProcessRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            terminal: true,
            stdin: ids[0].to_string(),
            stdout: ids[1].to_string(),
            spec: any(PROCESS_TYPE_URL, &process),
            ..Default::default()
        };
        self.task.exec(forever(), &request).await.unwrap();
        self.connect_terminal(ids[0], ids[1]).await
    }

    async fn connect_terminal(&self, stdin: StreamId, stdout: StreamId) -> Terminal {
        Terminal { stdin: self.connect(stdin).await, stdout: self.connect(stdout).await, seen: String::new() }
    }

    pub async fn start(&self, id: &str, exec_id: &str) -> Result<u32> {
        let request = StartRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        self.task.start(forever(), &request).await.map(|response| response.pid)
    }

    pub async fn kill(&self, id: &str, exec_id: &str, signal: u32, all: bool) -> Result<()> {
        let request =
            KillRequest { id: id.into(), exec_id: exec_id.into(), signal, all, ..Default::default() };
        self.task.kill(forever(), &request).await.map(drop)
    }

    pub async fn delete(&self, id: &str, exec_id: &str) -> Result<u32> {
        let request = DeleteRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        self.task.delete(forever(), &request).await.map(|response| response.exit_status)
    }

    pub async fn wait(&self, id: &str, exec_id: &str) -> Result<u32> {
        let request = WaitRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        self.task.wait(forever(), &request).await.map(|response| response.exit_status)
    }

    pub async fn pause(&self, id: &str) -> Result<()> {
        self.task.pause(forever(), &PauseRequest { id: id.into(), ..Default::default() }).await.map(drop)
    }

    pub async fn resume(&self, id: &str) -> Result<()> {
        self.task.resume(forever(), &ResumeRequest { id: id.into(), ..Default::default() }).await.map(drop)
    }

    /// Suspends all containers once there is a listener on `port` and the file `path` in container `id`.
    pub async fn suspend_when(&self, id: &str, port: u32, path: &str, wait_ms: u32) -> Result<()> {
        let request = SuspendRequest {
            container_id: id.into(),
            port,
            path: path.into(),
            wait_ms,
            ..SuspendRequest::default()
        };
        self.sandbox.suspend(forever(), &request).await.map(drop)
    }

    pub async fn suspend(&self, id: &str) -> Result<()> {
        self.suspend_when(id, 0, "", 0).await
    }

    pub async fn resize(&self, id: &str, exec_id: &str, width: u32, height: u32) -> Result<()> {
        let request =
            ResizePtyRequest { id: id.into(), exec_id: exec_id.into(), width, height, ..Default::default() };
        self.task.resize_pty(forever(), &request).await.map(drop)
    }

    pub async fn close_io(&self, id: &str) -> Result<()> {
        let request = CloseIORequest { id: id.into(), stdin: true, ..Default::default() };
        self.task.close_io(forever(), &request).await.map(drop)
    }

    pub async fn checkpoint(&self, id: &str) -> Result<()> {
        let request = CheckpointTaskRequest { id: id.into(), ..Default::default() };
        self.task.checkpoint(forever(), &request).await.map(drop)
    }

    pub async fn update(&self, id: &str, resources: Value) -> Result<()> {
        let type_url = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";
        let request =
            UpdateTaskRequest { id: id.into(), resources: any(type_url, &resources), ..Default::default() };
        self.task.update(forever(), &request).await.map(drop)
    }

    pub async fn pids(&self, id: &str) -> Vec<u32> {
        let request = PidsRequest { id: id.into(), ..Default::default() };
        let response = self.task.pids(forever(), &request).await.unwrap();
        response.processes.iter().map(|process| process.pid).collect()
    }

    pub async fn state(&self, id: &str) -> String {
        let request = StateRequest { id: id.into(), ..Default::default() };
        format!("{:?}", self.task.state(forever(), &request).await.unwrap().status.unwrap())
    }

    pub async fn metrics(&self, id: &str) -> Metrics {
        let request = StatsRequest { id: id.into(), ..Default::default() };
        let stats = self.task.stats(forever(), &request).await.unwrap().stats;
        assert_eq!(stats.type_url, "io.containerd.cgroups.v2.Metrics");
        Metrics::parse_from_bytes(&stats.value).unwrap()
    }

    pub async fn cpu_usage(&self, id: &str) -> u64 {
        self.metrics(id).await.cpu.usage_usec
    }

    pub async fn health(&self) -> HealthResponse {
        self.sandbox.health(forever(), &HealthRequest::default()).await.unwrap()
    }

    pub async fn create_volume(&self, name: &str, size_bytes: u64) -> Result<()> {
        let request =
            CreateVolumeRequest { name: name.into(), size_bytes, mode: 0o777, ..Default::default() };
        self.sandbox.create_volume(forever(), &request).await.map(drop)
    }

    /// Waits for the report of a process's end and takes it out.
    pub async fn exit_event(&self, id: &str, exec_id: &str) -> u32 {
        loop {
            let changed = self.events.changed.notified();
            if let Some(status) = self.take_exit(id, exec_id) {
                return status;
            }
            changed.await;
        }
    }

    fn take_exit(&self, id: &str, exec_id: &str) -> Option<u32> {
        let mut events = self.events.all.borrow_mut();
        let index = events.iter().position(|event| {
            matches!(event, event::Event::Exit(exit) if exit.container_id == id && exit.exec_id == exec_id)
        })?;
        match events.remove(index) {
            Some(event::Event::Exit(exit)) => Some(exit.exit_status),
            _ => None,
        }
    }

    /// The kinds of the events of a container, in order.
    pub fn events_of(&self, id: &str) -> Vec<&'static str> {
        self.events.told.borrow().iter().filter(|(of, _)| of == id).map(|(_, kind)| *kind).collect()
    }

    fn streams(&self) -> [StreamId; 3] {
        let first = self.next_stream.get();
        self.next_stream.set(first + 3);
        [StreamId(first), StreamId(first + 1), StreamId(first + 2)]
    }

    async fn connect(&self, id: StreamId) -> UnixStream {
        let mut stream = UnixStream::connect(self.path("streams")).await.unwrap();
        stream.write_u64(id.0).await.unwrap();
        stream
    }
}

impl Process {
    /// Reads whatever comes next on the standard output.
    pub async fn read_some(&mut self) -> usize {
        self.read_text().await.len()
    }

    /// The same, as text.
    pub async fn read_text(&mut self) -> String {
        let mut buffer = vec![0; 64 * 1024];
        let length = self.stdout.read(&mut buffer).await.unwrap();
        buffer.truncate(length);
        String::from_utf8(buffer).unwrap()
    }

    pub async fn write(&mut self, bytes: &[u8]) {
        self.stdin.as_mut().unwrap().write_all(bytes).await.unwrap();
    }

    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Waits until the agent has closed the standard input.
    pub async fn stdin_closed(&mut self) {
        assert_eq!(self.stdin.as_mut().unwrap().read(&mut [0]).await.unwrap(), 0);
    }
}

impl Terminal {
    /// Reads until `text` has appeared.
    pub async fn until(&mut self, text: &str) {
        while !self.seen.contains(text) {
            let mut buffer = [0; 4096];
            let length = self.stdout.read(&mut buffer).await.unwrap();
            assert!(length > 0, "no {text:?} in {:?}", self.seen);
            self.seen.push_str(std::str::from_utf8(&buffer[..length]).unwrap());
        }
        self.seen.clear();
    }

    pub async fn write(&mut self, bytes: &[u8]) {
        self.stdin.write_all(bytes).await.unwrap();
    }

    /// Reads to the end.
    pub async fn rest(mut self) -> String {
        let mut rest = String::new();
        self.stdout.read_to_string(&mut rest).await.unwrap();
        rest
    }
}

pub fn code_of<T>(result: Result<T>) -> Code {
    match result.map(drop).unwrap_err() {
        Error::RpcStatus(status) => status.code(),
        other => panic!("{other}"),
    }
}

pub fn message_of(error: Error) -> String {
    match error {
        Error::RpcStatus(status) => status.message,
        other => panic!("{other}"),
    }
}

/// How many files this process, the agent, has open.
pub fn open_files() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

/// The children of this process, zombies included.
fn children() -> Vec<Pid> {
    let own = std::process::id();
    let tasks = fs::read_dir(format!("/proc/{own}/task")).unwrap().flatten();
    let lists = tasks.map(|task| fs::read_to_string(task.path().join("children")).unwrap_or_default());
    let pids = lists.collect::<String>();
    pids.split_whitespace().map(|pid| Pid::from_raw(pid.parse().unwrap())).collect()
}

fn is_pause(pid: &Pid) -> bool {
    fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|name| name == "/pause\0")
}

/// The first process of the pod's PID namespace, once there is one.
pub fn pause() -> Option<Pid> {
    children().into_iter().find(is_pause)
}

fn forever() -> Context {
    Context::default()
}

fn any(type_url: &str, value: &Value) -> MessageField<Any> {
    let value = serde_json::to_vec(value).unwrap();
    MessageField::some(Any { type_url: type_url.to_owned(), value, ..Any::default() })
}

async fn write_all(mut stream: UnixStream, bytes: &[u8]) {
    stream.write_all(bytes).await.unwrap();
    stream.shutdown().await.unwrap();
}

fn make_rootfs(root: &Path) {
    for directory in ["bin", "dev", "etc", "home/user", "proc", "root", "sys", "tmp", "bound", "scratch"] {
        fs::create_dir_all(root.join(directory)).unwrap();
    }
    let busybox = busybox().unwrap();
    fs::copy(&busybox, root.join("bin/busybox")).unwrap();
    let list = Command::new(&busybox).arg("--list").output().unwrap();
    for applet in String::from_utf8(list.stdout).unwrap().lines().filter(|applet| *applet != "busybox") {
        symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    fs::write(
        root.join("etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n",
    )
    .unwrap();
    let not_a_program = root.join("bin/not-a-program");
    fs::write(&not_a_program, "\u{1}\u{2}\u{3}\u{4} neither ELF nor script").unwrap();
    fs::set_permissions(&not_a_program, fs::Permissions::from_mode(0o755)).unwrap();
}
