//! The agent's services on their listeners.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use containerd_shim_protos::shim_async::create_task;
use futures::stream;
use mayu_agent_api::sandbox_ttrpc::create_sandbox;
use slog::{Logger, o, warn};
use tokio::time::sleep;
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener};
use ttrpc::asynchronous::Server;
use ttrpc::asynchronous::transport::Listener;

use crate::error::{Error, Result};
use crate::events::Events;
use crate::forward::Forwarder;
use crate::launch::Launcher;
use crate::pid_namespace::PodPidNamespace;
use crate::reaper::Reaper;
use crate::runtime::Runtime;
use crate::sandbox::SandboxService;
use crate::streams::Streams;
use crate::suspend::Suspender;
use crate::task::{Containers, TaskService};
use crate::volumes::Volumes;

/// How long to wait after a connection could not be accepted, which is for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What the agent is given to work with.
pub struct Options {
    /// This program, which is its own launch helper.
    pub program: PathBuf,
    /// How long the launch of one process may take.
    pub launch_deadline: Duration,
    /// How long the shim may take to connect the streams of a process that it starts.
    pub stream_deadline: Duration,
    /// How long a machine that is to be saved stands still until nothing that its kernel has cached of the share may be used any more.
    pub settle_time: Duration,
    /// Where bundles, libcontainer's states and sockets are kept.
    pub run_directory: PathBuf,
    /// Where the volumes that containers share are mounted.
    pub volume_directory: PathBuf,
}

/// Where the shim connects to.
pub struct Listeners {
    /// For requests.
    pub rpc: Listener,
    /// For the streams of processes.
    pub streams: Listener,
    /// For connections to servers in the guest.
    pub forward: Listener,
}

/// A listener on vsock port `port` that takes connections from the host only: a container can connect to the
/// guest's own address as well.
///
/// # Errors
///
/// `Io` where the port cannot be listened on.
pub fn listen(port: u32, log: &Logger) -> Result<Listener> {
    let listener =
        VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port)).map_err(Error::io("listen on vsock"))?;
    let log = log.new(o!("port" => port));
    Ok(Listener::new(stream::unfold((listener, log), |(listener, log)| async {
        loop {
            match listener.accept().await {
                Ok((socket, peer)) if peer.cid() == VMADDR_CID_HOST => {
                    return Some((Ok(socket), (listener, log)));
                }
                Ok((_, peer)) => warn!(log, "refused a connection"; "cid" => peer.cid()),
                Err(error) => {
                    warn!(log, "cannot accept a connection"; "error" => %error);
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    })))
}

/// Serves until the returned server is dropped.
///
/// # Errors
///
/// Where signals cannot be handled or the server cannot start.
pub async fn serve(options: Options, listeners: Listeners, log: &Logger) -> Result<Server> {
    let reaper = Reaper::start(log.clone())?;
    let events = Arc::new(Events::default());
    let registry = Arc::new(Streams::default());
    let launcher = Launcher { program: options.program, deadline: options.launch_deadline };
    let pid_namespace = PodPidNamespace::new(launcher.clone(), Arc::clone(&reaper), log.clone());
    let runtime = Arc::new(Runtime {
        launcher,
        pid_namespace: Arc::new(pid_namespace),
        stream_deadline: options.stream_deadline,
        run_directory: options.run_directory,
        reaper,
        events: Arc::clone(&events),
        streams: Arc::clone(&registry),
        counter: AtomicU64::new(0),
        log: log.clone(),
    });
    let containers = Arc::new(Containers::new(runtime));
    tokio::spawn(registry.serve(listeners.streams, log.clone()));
    tokio::spawn(Forwarder::new(log.clone()).serve(listeners.forward));
    let volumes = Volumes::new(options.volume_directory);
    let suspender = Suspender::new(Arc::clone(&containers), options.settle_time, log.clone());
    let sandbox = SandboxService::new(Arc::clone(&containers), events, volumes, suspender, log.clone());
    let mut server = Server::new()
        .register_service(create_task(Arc::new(TaskService::new(containers))))
        .register_service(create_sandbox(Arc::new(sandbox)))
        .add_listener(listeners.rpc);
    server.start().await.map_err(Error::Serve)?;
    Ok(server)
}
