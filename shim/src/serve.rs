//! The shim server: one process per pod, started by [`crate::start`].

use std::env;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::time::Duration;

use containerd_shim::Flags;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::setsid;
use slog::{Logger, info};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{sleep, timeout};
use ttrpc::r#async::Server;
use ttrpc::asynchronous::transport::Listener;

use crate::config::Config;
use crate::error::system;
use crate::events::Events;
use crate::pod::{Pod, Roots};
use crate::start::{TTRPC_ADDRESS, unlink_socket};
use crate::{Error, Result, log, privileges, sandbox_service, spec, state_dir, task};

/// How long containerd has for taking the last answer and the last events.
const FAREWELL: Duration = Duration::from_secs(2);

/// How long connections stay open behind the last answer. ttrpc's client in Go waits for an answer and for the end of the
/// connection at once (`Client.dispatch`), and may take the latter, so that a pod that is shut down looks like one that failed to.
const LINGER: Duration = Duration::from_millis(50);

/// How many descriptors the shim may have: each stream of a process is several, and a pod may have hundreds of containers.
const DESCRIPTORS: u64 = 1 << 16;

/// For how many there is room from the start.
const DESCRIPTOR_TABLE: i32 = 512;

/// Serves until containerd asks for the shutdown or a signal ends it. The working directory is the bundle, standard
/// input is the listening socket, standard error the bundle's log.
///
/// # Errors
/// The server could not be set up.
pub async fn run(flags: &Flags) -> Result<()> {
    // Out of containerd's session and process group: it may be restarted and the pod must not notice.
    setsid().map_err(system("start a session"))?;
    allow_descriptors();
    privileges::drop_unneeded()?;
    let bundle = env::current_dir().map_err(system("ask for the working directory"))?;
    let sandbox_id = spec::sandbox_id(&bundle, &flags.id)?;
    let log = log::logger(std::io::stderr(), &sandbox_id, flags.debug);
    let listener = inherited_listener()?;
    let address = listener.local_addr().map_err(system("ask for the socket's address"))?;
    let containerd = env::var(TTRPC_ADDRESS)
        .map_err(|_| Error::Protocol(format!("{TTRPC_ADDRESS} is not set: events have nowhere to go")))?;
    let events = Events::new(&containerd, &flags.namespace, log.clone());
    let roots = Roots { config: Config::path(), state: state_dir::ROOT.into() };
    let pod = Pod::new(&sandbox_id, &flags.namespace, roots, events, log.clone());
    let listener = Listener::try_from(listener).map_err(system("watch the socket"))?;
    let mut server = Server::new()
        .add_listener(listener)
        .register_service(task::services(&pod))
        .register_service(sandbox_service::services(&pod));
    server.start().await.map_err(|error| Error::Protocol(error.to_string()))?;
    info!(log, "shim started"; "pid" => std::process::id(), "version" => env!("CARGO_PKG_VERSION"));

    tokio::select! {
        () = pod.exit.cancelled() => {}
        signal = terminated(&log) => {
            signal?;
            pod.tear_down().await;
        }
    }
    if let Some(path) = address.as_pathname() {
        unlink_socket(path);
    }
    sleep(LINGER).await;
    let _ = timeout(FAREWELL, server.shutdown()).await;
    pod.events.flush(FAREWELL).await;
    Ok(())
}

/// Raises the limit of descriptors, whatever containerd was started with. Where that is forbidden, what there is has to do.
fn allow_descriptors() {
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, DESCRIPTORS, hard.max(DESCRIPTORS))
            .or_else(|_| setrlimit(Resource::RLIMIT_NOFILE, hard.min(DESCRIPTORS), hard));
    }
    // The kernel makes the table of descriptors larger at once when there is a single thread. Among several it waits for a grace
    // period of RCU, some milliseconds: `expand_fdtable` in its fs/file.c.
    let _ = rustix::io::fcntl_dupfd_cloexec(std::io::stdin(), DESCRIPTOR_TABLE - 1);
}

fn inherited_listener() -> Result<UnixListener> {
    let stdin = std::io::stdin().as_fd().try_clone_to_owned().map_err(system("take the socket over"))?;
    Ok(UnixListener::from(stdin))
}

async fn terminated(log: &Logger) -> Result<()> {
    let watch = |kind| signal(kind).map_err(system("watch for signals"));
    let (mut terminate, mut interrupt) = (watch(SignalKind::terminate())?, watch(SignalKind::interrupt())?);
    let name = tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    };
    info!(log, "the shim is told to end"; "signal" => name);
    Ok(())
}
