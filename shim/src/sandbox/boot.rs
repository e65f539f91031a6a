//! From a blueprint to a guest whose agent answers.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex as StdMutex;
use std::sync::atomic::AtomicU64;

use mayu_agent_api::{READY_PORT, RPC_PORT};
use mayu_vmm_api::{Event, EventStream, MAX_NET_SLOTS, Request, VmConfig};
use slog::{Logger, debug, info, warn};
use tokio::net::UnixStream;
use tokio::sync::{Mutex, watch};
use tokio::task::{JoinError, JoinHandle, spawn_blocking};
use tokio::time::{Instant, timeout_at};

use super::network::{Given, Network};
use super::size::Sizes;
use super::{Sandbox, Signs, connect, describe, into_stream};
use crate::agent::{Agent, AgentEvents, read_hello};
use crate::cgroup;
use crate::config::{Config, Timeouts, Vm};
use crate::console::{Console, Source};
use crate::delete::start_time;
use crate::error::{file, system};
use crate::pod_spec::{Limits, PodFile, PodSpec, Size};
use crate::saved::Saved;
use crate::snapshot::{Snapshot, Start};
use crate::state_dir::{Record, StateDir};
use crate::template::{self, Template};
use crate::uids::Lease;
use crate::vmm_process::{Building, HostFiles, Origin, Spawned, VmmProcess};
use crate::{Error, Result, machine};

/// How a VMM ends that somebody else has killed, or the host's kernel for want of memory.
const KILLED: &str = "signal 9";

/// What a VM is made of.
#[derive(Debug)]
pub struct Blueprint {
    /// The pod.
    pub id: String,
    /// What the pod is to be.
    pub spec: PodSpec,
    /// How large the VM is to be.
    pub size: Size,
    /// How its guest comes up.
    pub start: Start,
    /// The operator's configuration.
    pub config: Config,
    /// The pod's directory, which has been made.
    pub dir: StateDir,
    /// Lines name the pod.
    pub log: Logger,
}

/// A VMM with a machine that does not run yet.
struct Begun {
    spawned: Spawned,
    console: Console,
    own_cgroup: Option<PathBuf>,
    /// With which its guest starts.
    size: Size,
    /// Whether it can be.
    is_to_be_saved: bool,
    /// When the agent has to have answered.
    deadline: Instant,
}

/// A guest that has come up.
struct Up {
    agent: Agent,
    agent_events: AgentEvents,
    ready: UnixStream,
    network: Network,
}

impl Sandbox {
    /// Starts the VMM, boots the guest or has it go on from a template, and waits for its agent. `attach` mounts the first
    /// container's files on the share meanwhile; what was mounted before the VMM was started, it would not see.
    ///
    /// # Errors
    /// The step that failed, with the end of the guest's console where it may tell more; then there is no process
    /// and no cgroup. The directory stays, with what is mounted there.
    pub async fn boot(
        blueprint: Blueprint,
        attach: impl FnOnce() -> Result<()> + Send + 'static,
    ) -> Result<(Self, Signs, AgentEvents)> {
        let Blueprint { config, dir, log, .. } = &blueprint;
        let files = HostFiles::open(&config.vm)?;
        let network = Given::find(&blueprint.spec, log).await?;
        let machine = of_pod(&blueprint, network.as_ref().map_or(0, Given::interfaces))?;
        write_files(dir, &blueprint.spec.files)?;
        let pod_files = blueprint.spec.paths_of_files(dir);
        let (mut begun, saved) = begin(&blueprint, machine, files).await?;
        let sizes = Sizes::new(begun.size, blueprint.spec.limits, &config.vm);
        match come_up(&blueprint, &mut begun, &sizes, network, attach).await {
            Ok(Up { agent, agent_events, ready, network }) => {
                let Blueprint { config, dir, start, log, .. } = blueprint;
                let Begun { spawned, console, own_cgroup, is_to_be_saved, .. } = begun;
                let sandbox = Self {
                    agent,
                    files: pod_files,
                    volumes: Mutex::default(),
                    slots: Mutex::default(),
                    network: Mutex::new(network),
                    sizes,
                    config,
                    dir,
                    vmm: spawned.process,
                    client: spawned.client,
                    own_cgroup,
                    next_stream: AtomicU64::new(1),
                    snapshot: StdMutex::new(saved.and_then(OnDisk::snapshot)),
                    making: StdMutex::new(match start {
                        Start::ToSave(making) if is_to_be_saved => Some(making),
                        _ => None,
                    }),
                    condemned: watch::Sender::new(None),
                    ended: watch::Sender::new(None),
                    log,
                };
                let signs = Signs { vmm_events: spawned.events, ready, console };
                Ok((sandbox, signs, agent_events))
            }
            Err(error) => {
                let Abandoned { error, may_be_what_was_saved } = begun.abandon(error).await;
                // What the VMM refuses from here on is something of the pod's.
                let of_the_guest = matches!(error, Error::Boot { .. } | Error::BootTimeout { .. });
                // A guest that has files open is refused to go on without them.
                let counts = of_the_guest || matches!(saved, Some(OnDisk::Snapshot(_)));
                if let Some(on_disk) = saved.filter(|_| may_be_what_was_saved && counts) {
                    on_disk.discard(config, &error, log);
                }
                Err(error)
            }
        }
    }
}

impl Begun {
    /// Writes down which process is the VMM, and waits for the machine.
    async fn wait_until_built(&mut self, blueprint: &Blueprint, record: Record) -> Result<()> {
        let pid = self.spawned.process.pid;
        let start_time = start_time(pid).unwrap_or_default();
        blueprint.dir.write_record(&Record { pid, start_time, ..record })?;
        timeout_at(self.deadline, self.spawned.built()).await.map_err(|_| too_late(&blueprint.config))?
    }

    /// Ends the VMM because of an error.
    async fn abandon(mut self, error: Error) -> Abandoned {
        let end = self.spawned.process.kill().await;
        if let Some(directory) = &self.own_cgroup {
            cgroup::remove(directory);
        }
        let may_be_what_was_saved = match &error {
            Error::Boot { .. } | Error::BootTimeout { .. } => true,
            Error::Vmm(mayu_vmm_api::Error::Refused { .. }) => true,
            Error::Vmm(mayu_vmm_api::Error::Closed) => end != KILLED,
            _ => false,
        };
        Abandoned { error: with_console(error, &end, self.console.final_tail().await), may_be_what_was_saved }
    }
}

/// Why there is no machine, or no guest that answers.
struct Abandoned {
    /// With what is known from the console.
    error: Error,
    /// Whether it could be met by every pod that goes on from the same template, or snapshot.
    may_be_what_was_saved: bool,
}

impl From<Error> for Abandoned {
    fn from(error: Error) -> Self {
        Self { error, may_be_what_was_saved: false }
    }
}

/// What a guest can go on from.
enum OnDisk {
    Template(Template),
    Snapshot(Box<Snapshot>),
}

impl OnDisk {
    fn snapshot(self) -> Option<Box<Snapshot>> {
        match self {
            Self::Template(_) => None,
            Self::Snapshot(snapshot) => Some(snapshot),
        }
    }

    fn machine(&self) -> &VmConfig {
        match self {
            Self::Template(template) => &template.description.machine,
            Self::Snapshot(snapshot) => &snapshot.description.likeness.machine,
        }
    }

    fn discard(&self, config: &Config, reason: &Error, log: &Logger) {
        match self {
            Self::Template(template) => template.discard(reason, log),
            Self::Snapshot(snapshot) => snapshot.discard(&config.snapshot, reason, log),
        }
    }
}

/// Has a VMM build the machine: from what was saved, if there is something for it and the VMM does not refuse it.
async fn begin(
    blueprint: &Blueprint,
    machine: VmConfig,
    files: HostFiles,
) -> Result<(Begun, Option<OnDisk>)> {
    let Blueprint { config, log, .. } = blueprint;
    let files = match find_saved(blueprint, &machine, &files) {
        None => files,
        Some((on_disk, saved)) => {
            let VmConfig { sandbox_id, net_limit, block_limit, .. } = machine.clone();
            let as_saved = VmConfig { sandbox_id, net_limit, block_limit, ..on_disk.machine().clone() };
            match build(blueprint, as_saved, files, Origin::Saved(saved)).await {
                Ok(begun) => return Ok((begun, Some(on_disk))),
                Err(Abandoned { error, may_be_what_was_saved: false }) => return Err(error),
                Err(Abandoned { error, .. }) => on_disk.discard(config, &error, log),
            }
            HostFiles::open(&config.vm)?
        }
    };
    let (machine, origin) = match &blueprint.start {
        Start::ToSave(making) if machine.net_slots == making.likeness.machine.net_slots => {
            let memory = making.memory.try_clone();
            let made_of = making.likeness.machine.made_of.clone();
            (
                VmConfig { made_of, ..machine },
                Origin::ToSave(memory.map_err(system("share a snapshot's memory"))?),
            )
        }
        _ => (machine, Origin::Kernel),
    };
    let begun = build(blueprint, machine, files, origin).await;
    Ok((begun.map_err(|abandoned| abandoned.error)?, None))
}

/// Finds what a guest can go on from.
fn find_saved(blueprint: &Blueprint, machine: &VmConfig, files: &HostFiles) -> Option<(OnDisk, Saved)> {
    let Blueprint { config, start, log, .. } = blueprint;
    match start {
        Start::ToSave(_) => None,
        Start::From(snapshot) if machine.net_slots == snapshot.description.likeness.machine.net_slots => {
            info!(log, "the pod goes on from a snapshot"; "snapshot" => snapshot.name());
            let saved = snapshot.open().inspect_err(|error| snapshot.discard(&config.snapshot, error, log));
            Some((OnDisk::Snapshot(snapshot.clone()), saved.ok()?))
        }
        _ => {
            let fits = fits_template(machine, &config.vm);
            let (template, saved) = fits.then(|| template::for_pod(config, files, log)).flatten()?;
            info!(log, "the pod goes on from a template"; "template" => template.name());
            Some((OnDisk::Template(template), saved))
        }
    }
}

/// Whether the machine is one that a template can become: its devices are the same, and it grows to its size.
fn fits_template(machine: &VmConfig, vm: &Vm) -> bool {
    let VmConfig { max_vcpus, max_memory_mib, net_slots, .. } = *machine;
    let largest = Size { vcpus: vm.vcpus, memory_mib: vm.memory_mib }.largest(vm);
    net_slots == 1 && largest == Size { vcpus: max_vcpus, memory_mib: max_memory_mib }
}

/// Has a VMM build the machine.
async fn build(
    blueprint: &Blueprint,
    machine: VmConfig,
    files: HostFiles,
    origin: Origin,
) -> std::result::Result<Begun, Abandoned> {
    let Blueprint { config, dir, log, .. } = blueprint;
    let (console, console_writer) = Console::pipe(Source::Guest, log.clone())?;
    let lease = Lease::take(dir.root(), config.vm.uids, &dir.name())?;
    let own_cgroup = own_cgroup(blueprint);
    let record = Record { uid: Some(lease.uid()), cgroup: own_cgroup.clone(), ..Record::default() };
    // Whoever cleans up after a shim that dies here has to know what there is.
    dir.write_record(&record)?;
    let cgroup = own_cgroup.as_deref().map(cgroup::make).transpose()?;
    let size = Size { vcpus: machine.vcpus, memory_mib: machine.memory_mib };
    let machine = VmConfig { uid: lease.uid(), ..machine };
    let is_to_be_saved = matches!(origin, Origin::ToSave(_));
    let building = Building { machine, files, origin, share: dir.share(), console: console_writer, cgroup };
    let deadline = Instant::now() + config.timeouts.boot();
    let spawned = VmmProcess::spawn(config, building, lease, log)
        .await
        .inspect_err(|_| own_cgroup.iter().for_each(|directory| cgroup::remove(directory)))?;
    let mut begun = Begun { spawned, console, own_cgroup, size, is_to_be_saved, deadline };
    match begun.wait_until_built(blueprint, record).await {
        Ok(()) => Ok(begun),
        Err(error) => Err(begun.abandon(error).await),
    }
}

/// The agent has not reported in by its deadline.
pub(crate) fn too_late(config: &Config) -> Error {
    Error::BootTimeout { seconds: config.timeouts.boot, console: String::new() }
}

/// The pod's machine as it boots, with a network slot for each interface. There is one in every machine: the topology is the same for
/// all. Its uid is not known yet.
fn of_pod(blueprint: &Blueprint, interfaces: usize) -> Result<VmConfig> {
    let Config { vm, limits, .. } = &blueprint.config;
    let net_slots = u8::try_from(interfaces.max(1)).unwrap_or(u8::MAX);
    if net_slots > MAX_NET_SLOTS {
        return Err(Error::Machine(format!(
            "the pod has {interfaces} network interfaces; a VM has no more than {MAX_NET_SLOTS}"
        )));
    }
    Ok(VmConfig {
        sandbox_id: blueprint.id.clone(),
        net_limit: limits.net(),
        block_limit: limits.block(),
        ..machine::machine(vm, blueprint.size, net_slots)
    })
}

/// Writes the pod's own files where containers can have them mounted from.
fn write_files(dir: &StateDir, files: &[PodFile]) -> Result<()> {
    let folder = dir.files();
    if !files.is_empty() {
        fs::create_dir(&folder).map_err(file("create", &folder))?;
    }
    for pod_file in files {
        let path = folder.join(pod_file.name);
        fs::write(&path, &pod_file.text).map_err(file("write", &path))?;
    }
    Ok(())
}

/// The cgroup that the pod is to have.
fn own_cgroup(blueprint: &Blueprint) -> Option<PathBuf> {
    let path = blueprint.spec.cgroups_path.as_deref()?;
    let mount = Path::new(cgroup::MOUNT);
    if !mount.join("cgroup.controllers").exists() {
        warn!(blueprint.log, "the VMM stays in the shim's cgroup: the host has no cgroup v2");
        return None;
    }
    Some(cgroup::directory(mount, path))
}

/// From a built machine to a guest whose agent answers, with the first container's files mounted.
async fn come_up(
    blueprint: &Blueprint,
    begun: &mut Begun,
    sizes: &Sizes,
    network: Option<Given>,
    attach: impl FnOnce() -> Result<()> + Send + 'static,
) -> Result<Up> {
    let deadline = begun.deadline;
    let run = run_guest(blueprint, sizes, network, &mut begun.spawned);
    let run = async { timeout_at(deadline, run).await.map_err(|_| too_late(&blueprint.config))? };
    if matches!(blueprint.start, Start::From(_)) {
        // The guest holds files of the share as soon as it runs.
        spawn_blocking(attach).await.map_err(cut_short)??;
        return run.await;
    }
    both(run, spawn_blocking(attach)).await
}

/// Runs the guest and mounts its files at the same time. A failed mount does not wait for the guest; a guest that
/// fails waits for the mounting, which cannot be stopped half way.
async fn both(run: impl Future<Output = Result<Up>>, mut attaching: JoinHandle<Result<()>>) -> Result<Up> {
    let mut run = std::pin::pin!(run);
    tokio::select! {
        up = &mut run => {
            let attached = attaching.await.map_err(cut_short);
            let up = up?;
            attached??;
            Ok(up)
        }
        attached = &mut attaching => {
            attached.map_err(cut_short)??;
            run.await
        }
    }
}

fn cut_short(_: JoinError) -> Error {
    Error::System { operation: "mount", source: std::io::Error::other("it was cut short") }
}

/// Lets the vCPUs run, waits until the agent announces itself and makes the guest this pod.
async fn run_guest(
    blueprint: &Blueprint,
    sizes: &Sizes,
    network: Option<Given>,
    spawned: &mut Spawned,
) -> Result<Up> {
    let Blueprint { spec, config, log, .. } = blueprint;
    let client = spawned.client.clone();
    client.request(Request::Resume, &[]).await?;
    // While the guest boots.
    let wiring = async {
        match network {
            Some(given) => given.wire(&client, config.timeouts.request()).await,
            None => Ok(Network::Unknown),
        }
    };
    let agent = wait_for_agent(spawned, &config.timeouts, log);
    let ((ready, agent), network) = tokio::try_join!(agent, wiring)?;
    let hostname = spec.hostname.as_ref().unwrap_or(&blueprint.id);
    // Kernel parameters of the pod may be those of an interface.
    let prefetch = async {
        if let Err(error) = client.request(Request::Prefetch, &[]).await {
            debug!(log, "the pod starts slower than it could"; "error" => error.to_string());
        }
    };
    let ((), configured) = tokio::join!(prefetch, agent.configure_network(network.request()));
    configured?;
    agent.configure(hostname, &spec.sysctls).await?;
    sizes.fit(Limits::default(), &client, &agent, log).await?;
    let agent_events = agent.events().await?;
    Ok(Up { agent, agent_events, ready, network })
}

/// Waits for the agent's announcement and connects to it.
pub(crate) async fn wait_for_agent(
    spawned: &mut Spawned,
    timeouts: &Timeouts,
    log: &Logger,
) -> Result<(UnixStream, Agent)> {
    let mut ready = announced(&mut spawned.events).await?;
    let hello = read_hello(&mut ready).await?;
    let stream = connect(&spawned.client, RPC_PORT).await?;
    let ready_us = u64::try_from(spawned.at.elapsed().as_micros()).unwrap_or(u64::MAX);
    let vmm = spawned.client.status().await?;
    info!(log, "VM is up"; "ready_us" => ready_us,
        "vmm_us" => vmm.guest_entry_us, "kernel_us" => hello.kernel_us, "agent_us" => hello.agent_us);
    Ok((ready, Agent::new(stream, timeouts.request())))
}

async fn announced(events: &mut EventStream) -> Result<UnixStream> {
    let failed = |reason: String| Error::Boot { reason, console: String::new() };
    loop {
        match events.recv().await {
            Some((Event::VsockAccepted { port: READY_PORT }, fds)) => {
                let fd = fds.into_iter().next().ok_or_else(|| failed("the VMM sent no stream".into()))?;
                return into_stream(fd);
            }
            Some((Event::Exited(why), _)) => return Err(failed(describe(why))),
            Some(_) => {}
            None => return Err(Error::Vmm(mayu_vmm_api::Error::Closed)),
        }
    }
}

/// Adds what the guest's console says, and how the VMM ended where that is the failure.
pub(crate) fn with_console(error: Error, end: &str, console: String) -> Error {
    match error {
        Error::Boot { reason, .. } => Error::Boot { reason, console },
        Error::BootTimeout { seconds, .. } => Error::BootTimeout { seconds, console },
        Error::Vmm(mayu_vmm_api::Error::Closed) => {
            Error::Boot { reason: format!("its VMM ended ({end}); its log lines say why"), console }
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_boot_shows_the_console_and_another_error_stays_as_it_is() {
        let console = || "panic".to_string();
        let timed_out = Error::BootTimeout { seconds: 3, console: String::new() };
        assert!(with_console(timed_out, "signal 9", console()).to_string().ends_with("panic"));
        let closed = Error::Vmm(mayu_vmm_api::Error::Closed);
        let message = with_console(closed, "signal 11", console()).to_string();
        assert!(message.contains("signal 11") && message.ends_with("panic"), "{message}");
        let refused = mayu_vmm_api::Error::Refused { operation: "build", reason: "no ELF file".into() };
        assert_eq!(with_console(Error::Vmm(refused), "", console()).to_string(), "VMM: build: no ELF file");
    }
}
