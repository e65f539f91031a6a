//! The Sandbox service: what concerns the guest as a whole.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::future::join_all;
use mayu_agent_api::sandbox::{
    ConfigureNetworkRequest, ConfigureNetworkResponse, ConfigureRequest, ConfigureResponse,
    CreateVolumeRequest, CreateVolumeResponse, Event, EventsRequest, HealthRequest, HealthResponse,
    ResizeRequest, ResizeResponse, ShutdownRequest, ShutdownResponse, SuspendRequest, SuspendResponse,
};
use mayu_agent_api::sandbox_ttrpc::Sandbox;
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::time::TimeSpec;
use nix::sys::utsname::uname;
use nix::time::{ClockId, clock_settime};
use nix::unistd::{SysconfVar, sethostname, sync, sysconf};
use slog::{Logger, error, warn};
use tokio::time::{sleep, timeout};
use ttrpc::asynchronous::{ServerStreamSender, TtrpcContext};

use crate::blocking::blocking;
use crate::cpus::Cpus;
use crate::error::{Error, Result};
use crate::events::Events;
use crate::network::{Network, VirtioSlots};
use crate::suspend::Suspender;
use crate::task::{Containers, complete};
use crate::volumes::Volumes;
use crate::{sys, sysctl};

/// The least entropy a host may give: what the kernel's generator needs to be seeded.
const MIN_ENTROPY: usize = 32;
/// The kernel's longest host name.
const MAX_HOSTNAME: usize = 64;
/// How long killed processes may take to end before the guest goes down with them.
const END_DEADLINE: Duration = Duration::from_secs(5);
/// How long the reply to a shutdown has to leave the guest before the guest resets itself.
const REPLY_TIME: Duration = Duration::from_millis(50);

/// The Sandbox service.
pub struct SandboxService {
    containers: Arc<Containers>,
    events: Arc<Events>,
    network: Arc<Network<VirtioSlots>>,
    volumes: Volumes,
    cpus: Arc<Cpus>,
    suspender: Arc<Suspender>,
    log: Logger,
}

impl SandboxService {
    /// Serves the guest and its `containers`.
    pub fn new(
        containers: Arc<Containers>,
        events: Arc<Events>,
        volumes: Volumes,
        suspender: Suspender,
        log: Logger,
    ) -> Self {
        let network = Arc::new(Network::new(VirtioSlots::new()));
        let (cpus, suspender) = (Arc::new(Cpus::new()), Arc::new(suspender));
        Self { containers, events, network, volumes, cpus, suspender, log }
    }

    /// Kills all processes and waits for their end, so that what they have written can be written back.
    async fn end_containers(&self) {
        let containers = self.containers.all();
        for container in &containers {
            if let Err(error) = container.cgroup().kill() {
                warn!(self.log, "cannot end a container"; "container" => container.id(), "error" => %error);
            }
        }
        let ended = join_all(containers.iter().map(|container| container.cgroup().empty()));
        if timeout(END_DEADLINE, ended).await.is_err() {
            warn!(self.log, "processes hang in the kernel");
        }
        sync();
    }
}

#[async_trait]
impl Sandbox for SandboxService {
    async fn configure(
        &self,
        _: &TtrpcContext,
        request: ConfigureRequest,
    ) -> ttrpc::Result<ConfigureResponse> {
        configure(&request)?;
        Ok(ConfigureResponse::default())
    }

    async fn configure_network(
        &self,
        _: &TtrpcContext,
        request: ConfigureNetworkRequest,
    ) -> ttrpc::Result<ConfigureNetworkResponse> {
        let network = Arc::clone(&self.network);
        blocking(move || network.configure(&request)).await?;
        Ok(ConfigureNetworkResponse::default())
    }

    async fn create_volume(
        &self,
        _: &TtrpcContext,
        request: CreateVolumeRequest,
    ) -> ttrpc::Result<CreateVolumeResponse> {
        self.volumes.create(&request)?;
        Ok(CreateVolumeResponse::default())
    }

    async fn resize(&self, _: &TtrpcContext, request: ResizeRequest) -> ttrpc::Result<ResizeResponse> {
        let cpus = Arc::clone(&self.cpus);
        blocking(move || cpus.resize(request.vcpus)).await?;
        Ok(ResizeResponse::default())
    }

    async fn events(
        &self,
        _: &TtrpcContext,
        _: EventsRequest,
        stream: ServerStreamSender<Event>,
    ) -> ttrpc::Result<()> {
        let subscription = self.events.subscribe();
        while let Some((number, event)) = self.events.next(&subscription).await {
            stream.send(&event).await?;
            self.events.acknowledge(number);
        }
        Ok(())
    }

    async fn health(&self, _: &TtrpcContext, _: HealthRequest) -> ttrpc::Result<HealthResponse> {
        let containers = u32::try_from(self.containers.count()).unwrap_or(u32::MAX);
        Ok(health(containers)?)
    }

    async fn suspend(&self, _: &TtrpcContext, request: SuspendRequest) -> ttrpc::Result<SuspendResponse> {
        let suspender = Arc::clone(&self.suspender);
        complete(async move { suspender.suspend(&request).await }).await?;
        Ok(SuspendResponse::default())
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> ttrpc::Result<ShutdownResponse> {
        self.end_containers().await;
        let log = self.log.clone();
        tokio::spawn(async move {
            // ttrpc does not tell when a reply has been sent.
            sleep(REPLY_TIME).await;
            let Err(errno) = reboot(RebootMode::RB_AUTOBOOT);
            error!(log, "cannot reset the guest"; "error" => %errno);
        });
        Ok(ShutdownResponse::default())
    }
}

fn configure(request: &ConfigureRequest) -> Result<()> {
    if request.entropy.len() < MIN_ENTROPY {
        return Err(Error::InvalidRequest(format!("less than {MIN_ENTROPY} bytes of entropy")));
    }
    if request.hostname.len() > MAX_HOSTNAME {
        return Err(Error::InvalidRequest(format!("a host name of more than {MAX_HOSTNAME} bytes")));
    }
    if request.realtime_ns > 0 {
        clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::from(Duration::from_nanos(request.realtime_ns)))
            .map_err(Error::system("set the clock"))?;
    }
    let path = "/dev/urandom";
    let random = File::options().write(true).open(path).map_err(Error::file("open", path))?;
    sys::add_entropy(random.as_fd(), &request.entropy).map_err(Error::system("add entropy"))?;
    if !request.hostname.is_empty() {
        sethostname(&request.hostname).map_err(Error::system("set the host name"))?;
    }
    for (name, value) in &request.sysctls {
        sysctl::set(name, value)?;
    }
    Ok(())
}

fn health(containers: u32) -> Result<HealthResponse> {
    let read = |path: &str| fs::read_to_string(path).map_err(Error::file("read", path));
    let memory = read("/proc/meminfo")?;
    let kilobytes = |key: &str| {
        let line = memory.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_default();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0)
    };
    // The second field of statm is the resident set in pages, proc(5).
    let pages = read("/proc/self/statm")?
        .split_whitespace()
        .nth(1)
        .and_then(|pages| pages.parse::<u64>().ok())
        .unwrap_or(0);
    let page_size = sysconf(SysconfVar::PAGE_SIZE)
        .ok()
        .flatten()
        .and_then(|size| u64::try_from(size).ok())
        .unwrap_or(4096);
    let system = uname().map_err(Error::system("read the kernel's release"))?;
    Ok(HealthResponse {
        kernel_release: system.release().to_string_lossy().into_owned(),
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        memory_total_bytes: kilobytes("MemTotal:") * 1024,
        memory_available_bytes: kilobytes("MemAvailable:") * 1024,
        agent_rss_bytes: pages * page_size,
        containers,
        ..HealthResponse::default()
    })
}
