//! The connection to the guest's agent. What comes back is hostile: every call has a deadline, every text a bound.

use std::collections::HashMap;
use std::future::Future;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use containerd_shim_protos::shim_async::TaskClient;
use mayu_agent_api::Hello;
use mayu_agent_api::sandbox::{
    ConfigureNetworkRequest, ConfigureRequest, CreateVolumeRequest, Event, EventsRequest, HealthRequest,
    HealthResponse, ResizeRequest, ShutdownRequest, SuspendRequest,
};
use mayu_agent_api::sandbox_ttrpc::SandboxClient;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::net::UnixStream;
use tokio::time::timeout;
use ttrpc::Code;
use ttrpc::r#async::{Client, ClientStreamReceiver};
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::Context;

use crate::error::system;
use crate::snapshot::Ready;
use crate::spec::{Part, Volume};
use crate::{Error, Result};

/// The longest [`Hello`] line, in bytes.
const MAX_HELLO: usize = 4096;

/// The longest message of the agent that goes into an error, in bytes.
const MAX_MESSAGE: usize = 4096;

/// Random bytes for the guest's generator.
const ENTROPY: usize = 64;

/// A client of the agent's two services.
#[derive(Clone)]
pub struct Agent {
    task: TaskClient,
    sandbox: SandboxClient,
    deadline: Duration,
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Agent").field("deadline", &self.deadline).finish_non_exhaustive()
    }
}

/// What became of [`Agent::suspend`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Suspension {
    /// All containers stand still.
    Done,
    /// The container was not ready in time.
    NotReady,
    /// Something is in the way, maybe not for long.
    Hindered(String),
}

/// The agent's events, in order; it ends with the agent.
pub type AgentEvents = ClientStreamReceiver<Event>;

/// Reads the agent's announcement.
///
/// # Errors
/// [`Error::Boot`] when it is none, or of another version than this shim.
pub async fn read_hello(stream: &mut (impl AsyncRead + Unpin)) -> Result<Hello> {
    let wrong = |reason: String| Error::Boot { reason, console: String::new() };
    let mut line = Vec::new();
    loop {
        match stream.read_u8().await {
            Ok(b'\n') => break,
            Ok(byte) if line.len() < MAX_HELLO => line.push(byte),
            Ok(_) => return Err(wrong(format!("the agent's announcement exceeds {MAX_HELLO} bytes"))),
            Err(error) => return Err(wrong(format!("the agent did not finish its announcement: {error}"))),
        }
    }
    let hello: Hello = serde_json::from_slice(&line)
        .map_err(|error| wrong(format!("the agent's announcement is malformed: {error}")))?;
    if hello.version != env!("CARGO_PKG_VERSION") {
        let version = bounded(&hello.version);
        let expected = env!("CARGO_PKG_VERSION");
        return Err(wrong(format!(
            "the guest image has agent {version}, this shim needs {expected}; rebuild the image"
        )));
    }
    Ok(hello)
}

impl Agent {
    /// Speaks over a stream that the VMM has connected to the agent.
    pub fn new(stream: UnixStream, deadline: Duration) -> Self {
        let client = Client::new(Socket::new(stream));
        Self { task: TaskClient::new(client.clone()), sandbox: SandboxClient::new(client), deadline }
    }

    /// Asks the agent's Task service for something; `request` is given the client.
    ///
    /// # Errors
    /// [`Error::Agent`] with the agent's own code, [`Error::AgentTimeout`] or [`Error::AgentConnection`].
    pub async fn task<T, F>(
        &self,
        operation: &'static str,
        request: impl FnOnce(TaskClient) -> F,
    ) -> Result<T>
    where
        F: Future<Output = ttrpc::Result<T>>,
    {
        answer(operation, self.deadline, request(self.task.clone())).await
    }

    /// Gives the guest its clock, entropy and host name.
    ///
    /// # Errors
    /// As [`Agent::task`].
    pub async fn configure(&self, hostname: &str, sysctls: &HashMap<String, String>) -> Result<()> {
        let mut entropy = vec![0; ENTROPY];
        let mut random = tokio::fs::File::open("/dev/urandom").await.map_err(system("open /dev/urandom"))?;
        random.read_exact(&mut entropy).await.map_err(system("read /dev/urandom"))?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let request = ConfigureRequest {
            realtime_ns: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
            entropy,
            hostname: hostname.into(),
            sysctls: sysctls.clone(),
            ..Default::default()
        };
        let call = self.sandbox.configure(Context::default(), &request);
        answer("configure the guest", self.deadline, call).await.map(drop)
    }

    /// Makes the guest's network that of the pod.
    ///
    /// # Errors
    /// As [`Agent::task`].
    pub async fn configure_network(&self, request: ConfigureNetworkRequest) -> Result<()> {
        let call = self.sandbox.configure_network(Context::default(), &request);
        answer("configure the guest's network", self.deadline, call).await.map(drop)
    }

    /// Makes a file system in the guest's memory, or finds a directory of one.
    ///
    /// # Errors
    /// As [`Agent::task`].
    pub async fn create_volume(&self, volume: &Volume) -> Result<()> {
        let Volume { name, size, mode, uid, gid, part } = volume.clone();
        let (part_of, path) = match part {
            Some(Part { of, path }) => (of, path.to_string_lossy().into_owned()),
            None => Default::default(),
        };
        let request = CreateVolumeRequest {
            name,
            size_bytes: size,
            mode,
            uid,
            gid,
            part_of,
            path,
            ..Default::default()
        };
        let call = self.sandbox.create_volume(Context::default(), &request);
        answer("create a volume in the guest", self.deadline, call).await.map(drop)
    }

    /// Has the guest use so many of its vCPUs.
    ///
    /// # Errors
    /// As [`Agent::task`].
    pub async fn resize(&self, vcpus: u8) -> Result<()> {
        let request = ResizeRequest { vcpus: vcpus.into(), ..Default::default() };
        let call = self.sandbox.resize(Context::default(), &request);
        answer("bring CPUs online", self.deadline, call).await.map(drop)
    }

    /// Has the containers stand still once this one is ready, if that is within `wait`. To have a container go on is a request of the
    /// Task service.
    ///
    /// # Errors
    /// As [`Agent::task`].
    pub async fn suspend(&self, container: &str, ready: &Ready, wait: Duration) -> Result<Suspension> {
        let (port, path) = match ready {
            Ready::Port(port) => (u32::from(*port), String::new()),
            Ready::File(path) => (0, path.to_string_lossy().into_owned()),
        };
        let request = SuspendRequest {
            container_id: container.into(),
            port,
            path,
            wait_ms: u32::try_from(wait.as_millis()).unwrap_or(u32::MAX),
            ..Default::default()
        };
        let call = self.sandbox.suspend(Context::default(), &request);
        match answer("have the containers stand still", wait + self.deadline, call).await {
            Ok(_) => Ok(Suspension::Done),
            Err(Error::Agent { status }) if status.code() == Code::DEADLINE_EXCEEDED => {
                Ok(Suspension::NotReady)
            }
            Err(Error::Agent { status }) if status.code() == Code::FAILED_PRECONDITION => {
                Ok(Suspension::Hindered(status.message))
            }
            Err(error) => Err(error),
        }
    }

    /// Subscribes to the agent's events.
    ///
    /// # Errors
    /// As [`Agent::task`].
    pub async fn events(&self) -> Result<AgentEvents> {
        let request = EventsRequest::default();
        answer("subscribe to events", self.deadline, self.sandbox.events(Context::default(), &request)).await
    }

    /// Asks how the guest is doing.
    ///
    /// # Errors
    /// As [`Agent::task`].
    pub async fn health(&self) -> Result<HealthResponse> {
        let request = HealthRequest::default();
        answer("answer", self.deadline, self.sandbox.health(Context::default(), &request)).await
    }

    /// Has the guest write everything back.
    ///
    /// # Errors
    /// As [`Agent::task`].
    pub async fn shutdown(&self, deadline: Duration) -> Result<()> {
        let request = ShutdownRequest::default();
        answer("shut down", deadline, self.sandbox.shutdown(Context::default(), &request)).await.map(drop)
    }
}

async fn answer<T>(
    operation: &'static str,
    deadline: Duration,
    call: impl Future<Output = ttrpc::Result<T>>,
) -> Result<T> {
    match timeout(deadline, call).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(ttrpc::Error::RpcStatus(mut status))) => {
            status.message = bounded(&status.message);
            status.details.clear();
            Err(Error::Agent { status: Box::new(status) })
        }
        Ok(Err(error)) => Err(Error::AgentConnection { operation, reason: bounded(&error.to_string()) }),
        Err(_) => Err(Error::AgentTimeout { operation, seconds: deadline.as_secs() }),
    }
}

fn bounded(text: &str) -> String {
    let text = text
        .chars()
        .map(|character| if character.is_control() && character != '\n' { '?' } else { character });
    let mut length = 0;
    text.take_while(|character| {
        length += character.len_utf8();
        length <= MAX_MESSAGE
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn hello(line: &str) -> Result<Hello> {
        read_hello(&mut line.as_bytes()).await
    }

    #[tokio::test]
    async fn an_agent_of_the_same_version_is_welcome() {
        let version = env!("CARGO_PKG_VERSION");
        let line = format!("{{\"version\":\"{version}\",\"kernel_us\":7,\"agent_us\":8}}\nrest");
        assert_eq!(hello(&line).await.unwrap().kernel_us, 7);
    }

    #[tokio::test]
    async fn what_is_no_announcement_says_so() {
        let table = [
            ("{\"version\":\"0.0.0\",\"kernel_us\":7,\"agent_us\":8}\n", "agent 0.0.0"),
            ("hello\n", "malformed"),
            ("{", "did not finish"),
            (&"x".repeat(MAX_HELLO + 2), "exceeds"),
        ];
        for (line, expected) in table {
            let message = hello(line).await.unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
    }

    #[tokio::test]
    async fn a_silent_agent_costs_one_deadline() {
        let call = std::future::pending::<ttrpc::Result<()>>();
        let error = answer("start", Duration::from_millis(1), call).await.unwrap_err();
        assert!(matches!(error, Error::AgentTimeout { operation: "start", .. }));
    }

    #[tokio::test]
    async fn an_agents_message_is_bounded() {
        let status = ttrpc::get_status(Code::INTERNAL, "\x1b".repeat(2 * MAX_MESSAGE));
        let error =
            answer("start", Duration::from_secs(1), async { Err::<(), _>(ttrpc::Error::RpcStatus(status)) })
                .await
                .unwrap_err();
        assert_eq!(error.to_string(), "?".repeat(MAX_MESSAGE));
    }
}
