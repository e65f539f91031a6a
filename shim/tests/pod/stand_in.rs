//! A stand-in for `mayu-vmm` and the guest's agent: it speaks both protocols and runs scripted processes.
//!
//! The test program itself is the stand-in: it runs its test [`run`] when it finds its control socket. What it does
//! out of the ordinary stands in the machine's `kernel_args`. A process does what its arguments say:
//!
//! | arguments | what it does |
//! | --- | --- |
//! | `echo TEXT` | writes the text to stdout and ends with 0 |
//! | `exit N` | ends with N before the answer to Start is out |
//! | `cat` | copies stdin to stdout and ends with 0 |
//! | `sleep` | runs until it is killed |
//! | `missing` | cannot be started |
//! | `never` | its start is not answered |
//! | `lie` | has a pid and an exit status that none has |
//! | `flood` | tells of ends and of lacks of memory, a hundred thousand times, and ends with 0 |
//! | `yes` | writes to stdout until it is killed |

use std::collections::HashMap;
use std::io::Write as _;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CreateTaskRequest, CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest,
    KillRequest, StartRequest, StartResponse,
};
use containerd_shim_protos::shim_async::{Task, create_task};
use futures::StreamExt;
use mayu_agent_api::sandbox::{
    ConfigureNetworkRequest, ConfigureNetworkResponse, ConfigureRequest, ConfigureResponse, Event,
    EventsRequest, HealthRequest, HealthResponse, OutOfMemory, ProcessExit, ShutdownRequest,
    ShutdownResponse, event,
};
use mayu_agent_api::sandbox_ttrpc::{Sandbox, create_sandbox};
use mayu_agent_api::{Hello, READY_PORT, RPC_PORT, STREAM_PORT, StreamId};
use mayu_vmm_api as vmm;
use mayu_vmm_api::{CONTROL_FD, Message, Reply, Request};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{Notify, mpsc};
use ttrpc::r#async::{Server, ServerStreamSender, TtrpcContext};
use ttrpc::asynchronous::transport::{Listener, Socket};

use crate::hostile;

/// The environment variable that makes the test program the stand-in.
pub const VARIABLE: &str = "MAYU_TEST_STAND_IN";

/// Speaks with the shim until it closes the control socket.
pub async fn run() {
    // SAFETY: the shim hands the control socket over under this number; nothing else here uses it.
    #[allow(unsafe_code)]
    let control = unsafe { BorrowedFd::borrow_raw(CONTROL_FD) }.try_clone_to_owned().unwrap();
    let agent = Arc::new(Agent::default());
    let (requests, mut incoming) = mpsc::unbounded_channel();
    let socket = control.try_clone().unwrap();
    std::thread::spawn(move || {
        while let Ok(request) = vmm::receive(&socket) {
            requests.send(request).unwrap();
        }
        // The shim has gone, and so does its VMM.
        std::process::exit(0);
    });
    let mut behaviour = String::new();
    let mut ready = None;
    while let Some((message, fds)) = incoming.recv().await {
        let Message::Request { id, body } = message else { panic!("not a request") };
        let reply = match body {
            Request::Build(machine) => {
                behaviour = machine.kernel_args;
                build(&control, &behaviour, fds)
            }
            Request::Resume => {
                ready = resume(&control, &behaviour);
                Reply::Ok
            }
            Request::VsockConnect { port } => {
                connect(&agent, &behaviour, port, fds).await;
                Reply::Ok
            }
            // There is nothing that it could map.
            Request::Prefetch => Reply::Ok,
            Request::Status => Reply::Status(vmm::Status { running: true, ..Default::default() }),
            other => Reply::Error { reason: format!("unexpected {other:?}") },
        };
        let refused = matches!(reply, Reply::Error { .. });
        vmm::send(&control, &Message::Reply { id, body: reply }, &[]).unwrap();
        if refused {
            return;
        }
    }
    drop(ready);
}

fn build(control: &OwnedFd, behaviour: &str, fds: Vec<OwnedFd>) -> Reply {
    assert_eq!(fds.len(), 5);
    if behaviour == "refuse" {
        return Reply::Error { reason: "the kernel is no ELF file".into() };
    }
    let started = vmm::Event::Started { pid: std::process::id() as i32 };
    vmm::send(control, &Message::Event { body: started }, &[]).unwrap();
    let mut console = std::fs::File::from(fds.into_iter().nth(4).unwrap());
    console.write_all(b"Linux version 6.12 (stand-in)\n").unwrap();
    Reply::Ok
}

/// Announces the agent. Its stream has to stay open.
fn resume(control: &OwnedFd, behaviour: &str) -> Option<StdUnixStream> {
    let version = match behaviour {
        "silent" => return None,
        "old-agent" => "0.0.0",
        _ => env!("CARGO_PKG_VERSION"),
    };
    let (mut ours, theirs) = StdUnixStream::pair().unwrap();
    let hello = Hello { version: version.into(), kernel_us: 1, agent_us: 2 };
    writeln!(ours, "{}", serde_json::to_string(&hello).unwrap()).unwrap();
    let accepted = || Message::Event { body: vmm::Event::VsockAccepted { port: READY_PORT } };
    vmm::send(control, &accepted(), &[theirs.as_fd()]).unwrap();
    if behaviour == "connections" {
        for _ in 0..5000 {
            vmm::send(control, &accepted(), &[theirs.as_fd()]).unwrap();
        }
    }
    Some(ours)
}

async fn connect(agent: &Arc<Agent>, behaviour: &str, port: u32, fds: Vec<OwnedFd>) {
    let stream = StdUnixStream::from(fds.into_iter().next().unwrap());
    stream.set_nonblocking(true).unwrap();
    let mut stream = UnixStream::from_std(stream).unwrap();
    match port {
        RPC_PORT if hostile::NONSENSE.contains(&behaviour) => {
            agent.serve(hostile::interpose(stream, behaviour)).await;
        }
        RPC_PORT => agent.serve(stream).await,
        STREAM_PORT => {
            let agent = agent.clone();
            tokio::spawn(async move {
                let id = StreamId(stream.read_u64().await.unwrap()).to_string();
                agent.streams.lock().unwrap().insert(id, stream);
                agent.connected.notify_waiters();
            });
        }
        other => panic!("unexpected port {other}"),
    }
}

#[derive(Clone)]
struct Process {
    arguments: Vec<String>,
    stdin: String,
    stdout: String,
    killed: Arc<Notify>,
}

#[derive(Default)]
struct Agent {
    processes: Mutex<HashMap<(String, String), Process>>,
    streams: Mutex<HashMap<String, UnixStream>>,
    connected: Notify,
    exits: Mutex<Option<mpsc::UnboundedSender<Event>>>,
}

impl Agent {
    async fn serve(self: &Arc<Self>, stream: UnixStream) {
        let one = futures::stream::once(async { Ok(stream) }).chain(futures::stream::pending());
        let mut server = Server::new()
            .add_listener(Listener::new(one.map(|stream: std::io::Result<_>| stream.map(Socket::new))))
            .register_service(create_task(Arc::new(Service(self.clone()))))
            .register_service(create_sandbox(Arc::new(Service(self.clone()))));
        server.start().await.unwrap();
        // It lives as long as the process.
        std::mem::forget(server);
    }

    fn add(&self, id: &str, exec_id: &str, process: Process) {
        self.processes.lock().unwrap().insert((id.into(), exec_id.into()), process);
    }

    fn get(&self, id: &str, exec_id: &str) -> ttrpc::Result<Process> {
        let found = self.processes.lock().unwrap().get(&(id.to_string(), exec_id.to_string())).cloned();
        found.ok_or_else(|| failure(ttrpc::Code::NOT_FOUND, "no such process"))
    }

    async fn stream(&self, name: &str) -> UnixStream {
        loop {
            let connected = self.connected.notified();
            if let Some(stream) = self.streams.lock().unwrap().remove(name) {
                return stream;
            }
            connected.await;
        }
    }

    fn ended(&self, id: &str, exec_id: &str, exit_status: u32) {
        let exit = ProcessExit {
            container_id: id.into(),
            exec_id: exec_id.into(),
            exit_status,
            ..Default::default()
        };
        self.tell(event::Event::Exit(exit));
    }

    fn flood(&self) {
        for _ in 0..25_000 {
            self.ended("d", "", 0);
            self.ended("nobody", "", 1);
            self.ended("d", "nobody", 2);
            let oom = OutOfMemory { container_id: "d".into(), ..Default::default() };
            self.tell(event::Event::Oom(oom));
        }
    }

    fn tell(&self, event: event::Event) {
        let event = Event { event: Some(event), ..Default::default() };
        self.exits.lock().unwrap().as_ref().unwrap().send(event).unwrap();
    }

    async fn run(&self, process: &Process) -> u32 {
        let mut stdout =
            if process.stdout.is_empty() { None } else { Some(self.stream(&process.stdout).await) };
        match process.arguments[0].as_str() {
            "echo" => {
                let text = format!("{}\n", process.arguments[1]);
                stdout.as_mut().unwrap().write_all(text.as_bytes()).await.unwrap();
                0
            }
            "cat" => {
                let mut stdin = self.stream(&process.stdin).await;
                tokio::io::copy(&mut stdin, stdout.as_mut().unwrap()).await.unwrap();
                0
            }
            "sleep" => {
                process.killed.notified().await;
                137
            }
            "exit" => process.arguments[1].parse().unwrap(),
            "lie" => u32::MAX,
            "flood" => {
                self.flood();
                0
            }
            "yes" => loop {
                let written = stdout.as_mut().unwrap().write_all(&[b'y'; 4096]);
                tokio::select! {
                    written = written => written.unwrap(),
                    () = process.killed.notified() => break 137,
                }
            },
            other => panic!("unexpected program {other}"),
        }
    }
}

fn failure(code: ttrpc::Code, message: &str) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, message))
}

struct Service(Arc<Agent>);

#[async_trait]
impl Task for Service {
    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        let spec: oci_spec::runtime::Spec = serde_json::from_slice(&request.options.value).unwrap();
        let arguments = spec.process().as_ref().unwrap().args().clone().unwrap();
        if arguments[0] == "uncreatable" {
            return Err(failure(ttrpc::Code::INVALID_ARGUMENT, "no user \"nobody2\""));
        }
        let process =
            Process { arguments, stdin: request.stdin, stdout: request.stdout, killed: Arc::default() };
        self.0.add(&request.id, "", process);
        Ok(CreateTaskResponse::default())
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        let spec: oci_spec::runtime::Process = serde_json::from_slice(&request.spec.value).unwrap();
        let arguments = spec.args().clone().unwrap();
        let process =
            Process { arguments, stdin: request.stdin, stdout: request.stdout, killed: Arc::default() };
        self.0.add(&request.id, &request.exec_id, process);
        Ok(Empty::new())
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let process = self.0.get(&request.id, &request.exec_id)?;
        match process.arguments[0].as_str() {
            "missing" => return Err(failure(ttrpc::Code::INVALID_ARGUMENT, "missing: no such file")),
            "never" => std::future::pending().await,
            "lie" => {
                self.0.ended(&request.id, &request.exec_id, u32::MAX);
                return Ok(StartResponse { pid: u32::MAX, ..Default::default() });
            }
            // Its end is on its way before the answer is.
            "exit" => {
                let status = self.0.run(&process).await;
                self.0.ended(&request.id, &request.exec_id, status);
            }
            _ => {
                let agent = self.0.clone();
                tokio::spawn(async move {
                    let status = agent.run(&process).await;
                    agent.ended(&request.id, &request.exec_id, status);
                });
            }
        }
        Ok(StartResponse { pid: 7, ..Default::default() })
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        self.0.get(&request.id, &request.exec_id)?.killed.notify_one();
        Ok(Empty::new())
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        self.0.get(&request.id, &request.exec_id)?;
        self.0.processes.lock().unwrap().remove(&(request.id, request.exec_id));
        Ok(DeleteResponse::default())
    }
}

#[async_trait]
impl Sandbox for Service {
    async fn configure(
        &self,
        _: &TtrpcContext,
        request: ConfigureRequest,
    ) -> ttrpc::Result<ConfigureResponse> {
        assert!(request.entropy.len() >= 32 && request.realtime_ns > 0);
        Ok(ConfigureResponse::default())
    }

    async fn configure_network(
        &self,
        _: &TtrpcContext,
        request: ConfigureNetworkRequest,
    ) -> ttrpc::Result<ConfigureNetworkResponse> {
        assert!(request.interfaces.is_empty(), "the pods of these tests have no network");
        Ok(ConfigureNetworkResponse::default())
    }

    async fn events(
        &self,
        _: &TtrpcContext,
        _: EventsRequest,
        sender: ServerStreamSender<Event>,
    ) -> ttrpc::Result<()> {
        let (exits, mut waiting) = mpsc::unbounded_channel();
        *self.0.exits.lock().unwrap() = Some(exits);
        while let Some(event) = waiting.recv().await {
            sender.send(&event).await?;
        }
        Ok(())
    }

    async fn health(&self, _: &TtrpcContext, _: HealthRequest) -> ttrpc::Result<HealthResponse> {
        Ok(HealthResponse::default())
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> ttrpc::Result<ShutdownResponse> {
        Ok(ShutdownResponse::default())
    }
}
