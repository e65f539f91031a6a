//! Has the pod's containers stand still so that the machine can be saved with them, and go on from there as other containers.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use mayu_agent_api::sandbox::SuspendRequest;
use nix::unistd::sync;
use slog::{Logger, warn};
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep};

use crate::blocking::blocking;
use crate::container::Container;
use crate::error::{Error, Result};
use crate::root;
use crate::state::State;
use crate::task::Containers;
use crate::tcp;

/// How often to look for what there is no event for.
const INTERVAL: Duration = Duration::from_millis(20);
/// How long the shim may take to take the output of the containers.
const DRAIN_DEADLINE: Duration = Duration::from_secs(1);
/// Drops pages, and inodes and directory entries that nobody uses (the kernel's Documentation/admin-guide/sysctl/vm.rst).
const DROP_CACHES: &str = "/proc/sys/vm/drop_caches";

/// Suspends the containers of the pod.
pub struct Suspender {
    containers: Arc<Containers>,
    settle_time: Duration,
    one: Semaphore,
    log: Logger,
}

/// When a pod is ready.
struct Readiness {
    port: Option<u16>,
    path: Option<String>,
}

impl Suspender {
    /// Suspends `containers`, with `settle_time` until what the kernel knows of the share is out of date.
    pub fn new(containers: Arc<Containers>, settle_time: Duration, log: Logger) -> Self {
        Self { containers, settle_time, one: Semaphore::new(1), log }
    }

    /// Carries `request` out.
    ///
    /// # Errors
    ///
    /// `InvalidRequest`, `NoContainer`; `NotReady`; `Obstacle` or `WrongState` with what is in the way; what the kernel refused. All go on
    /// then.
    pub async fn suspend(&self, request: &SuspendRequest) -> Result<()> {
        let Ok(_only) = self.one.try_acquire() else {
            return Err(Error::Obstacle("it is under way already".into()));
        };
        let readiness = Readiness::of(request)?;
        let container = self.containers.get(&request.container_id)?;
        readiness.wait(&container, request.wait_ms).await?;
        self.check(State::Running).await?;

        self.containers.set_suspended(true);
        let mut paused = Vec::new();
        let stopped = self.stop(&mut paused).await;
        if stopped.is_err() {
            for container in paused {
                self.undo(&container).await;
            }
            self.containers.set_suspended(false);
        }
        stopped.map_err(|error| match error {
            // Its code is that of a pod which is not ready yet.
            Error::CgroupDeadline { .. } => Error::Obstacle(error.to_string()),
            error => error,
        })
    }

    /// Has all stand still; those that do are in `paused`, also where another does not.
    async fn stop(&self, paused: &mut Vec<Arc<Container>>) -> Result<()> {
        for container in self.containers.all() {
            container.pause().await?;
            paused.push(container);
        }
        self.drain(paused).await?;
        for container in &*paused {
            container.init().park()?;
        }
        blocking(write_back).await?;
        sleep(self.settle_time).await;
        // Others may have come, and connections, which the kernel accepts for whoever listens.
        self.check(State::Paused).await?;
        self.drain(paused).await
    }

    async fn undo(&self, container: &Container) {
        // It may have been killed meanwhile, or have been resumed.
        if container.init().state() == State::Paused
            && let Err(error) = container.resume().await
        {
            warn!(self.log, "cannot resume a container"; "container" => container.id(), "error" => %error);
        }
    }

    /// Refuses what cannot be saved, where all containers are to be in `state`.
    async fn check(&self, state: State) -> Result<()> {
        let obstacle = self.containers.all().iter().find_map(|container| container.obstacle(state));
        if let Some(obstacle) = obstacle {
            return Err(Error::Obstacle(obstacle));
        }
        match blocking(tcp::foreign_connection).await? {
            Some(connection) => Err(Error::Obstacle(format!("the connection {connection} is open"))),
            None => Ok(()),
        }
    }

    /// Waits until the shim has got all that the paused containers have printed.
    async fn drain(&self, paused: &[Arc<Container>]) -> Result<()> {
        let until = Instant::now() + DRAIN_DEADLINE;
        for container in paused {
            while !container.init().is_drained()? {
                if Instant::now() >= until {
                    return Err(Error::Obstacle(format!("nobody takes the output of {}", container.init())));
                }
                sleep(INTERVAL).await;
            }
        }
        Ok(())
    }
}

impl Readiness {
    fn of(request: &SuspendRequest) -> Result<Self> {
        let port = u16::try_from(request.port)
            .map_err(|_| Error::InvalidRequest(format!("{} is no TCP port", request.port)))?;
        let path = &request.path;
        if !path.is_empty() && (!path.starts_with('/') || path.contains('\0')) {
            return Err(Error::InvalidRequest(format!("{path:?} is no absolute path")));
        }
        Ok(Self {
            port: Some(port).filter(|port| *port != 0),
            path: Some(path.clone()).filter(|path| !path.is_empty()),
        })
    }

    /// Waits until `container` is ready, as long as it runs.
    async fn wait(&self, container: &Container, milliseconds: u32) -> Result<()> {
        let until = Instant::now() + Duration::from_millis(milliseconds.into());
        loop {
            let last = Instant::now() >= until;
            let state = container.init().state();
            if state != State::Running {
                return Err(Error::Obstacle(format!("{} is {state}", container.init())));
            }
            let Some(condition) = self.lacking(container).await? else { return Ok(()) };
            if last {
                return Err(Error::NotReady {
                    container: container.id().to_owned(),
                    milliseconds,
                    condition,
                });
            }
            sleep(INTERVAL).await;
        }
    }

    /// What is not so yet.
    async fn lacking(&self, container: &Container) -> Result<Option<String>> {
        if let Some(port) = self.port
            && !blocking(move || tcp::listens(port)).await?
        {
            return Ok(Some(format!("nobody listens on TCP port {port}")));
        }
        let Some(path) = self.path.clone() else { return Ok(None) };
        let pid = container.init().pid();
        let lacking = format!("{path} does not exist");
        let exists = move || root::exists(pid, &path).map_err(Error::file("look for", path));
        Ok((!blocking(exists).await?).then_some(lacking))
    }
}

/// Has the host know of all that was written, and the kernel forget all of the share that it can.
fn write_back() -> Result<()> {
    sync();
    fs::write(DROP_CACHES, "3").map_err(Error::file("write", DROP_CACHES))
}
