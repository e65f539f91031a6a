//! From a blueprint to a guest whose agent answers.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use mayu_agent_api::{READY_PORT, RPC_PORT};
use mayu_vmm_api::{Event, EventStream, MAX_NET_SLOTS, Request, VmConfig, VmmClient};
use slog::{Logger, info, warn};
use tokio::net::UnixStream;
use tokio::sync::{Mutex, watch};
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::{Instant, timeout_at};

use super::network::{Given, Network};
use super::size::Sizes;
use super::{Sandbox, Signs, connect, describe, into_stream};
use crate::agent::{Agent, AgentEvents, read_hello};
use crate::cgroup;
use crate::config::Config;
use crate::console::{Console, Source};
use crate::delete::start_time;
use crate::error::file;
use crate::pod_spec::{PodFile, PodSpec, Size};
use crate::state_dir::{Record, StateDir};
use crate::uids::Lease;
use crate::vmm_process::{Building, HostFiles, Spawned, VmmProcess};
use crate::{Error, Result};

/// The guest's vsock context id. It need not differ from pod to pod: each VMM has a vsock of its own.
const GUEST_CID: u32 = 3;

/// What a VM is made of.
#[derive(Clone, Debug)]
pub struct Blueprint {
    /// The pod.
    pub id: String,
    /// What the pod is to be.
    pub spec: PodSpec,
    /// How large the VM is to be.
    pub size: Size,
    /// The operator's configuration.
    pub config: Config,
    /// The pod's directory, which has been made.
    pub dir: StateDir,
    /// Lines name the pod.
    pub log: Logger,
}

/// A guest that has come up.
struct Up {
    agent: Agent,
    agent_events: AgentEvents,
    ready: UnixStream,
    network: Network,
}

impl Sandbox {
    /// Starts the VMM, boots the guest and waits for its agent. `attach` mounts the first container's files on the
    /// share while the guest boots; what was mounted before, the VMM would not see.
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
        let (mut console, console_writer) = Console::pipe(Source::Guest, log.clone())?;
        let network = Given::find(&blueprint.spec, log).await?;
        let lease = Lease::take(dir.root(), config.vm.uids, &dir.name())?;
        dir.write_record(&Record { uid: Some(lease.uid()), ..Record::default() })?;
        let machine = machine(&blueprint, network.as_ref().map_or(0, Given::interfaces), lease.uid())?;
        let pod_files = write_files(dir, &blueprint.spec.files)?;
        let building = Building { machine, files, share: dir.share(), console: console_writer };
        let mut spawned = VmmProcess::spawn(config, building, lease, log).await?;
        let mut own_cgroup = None;
        let up = come_up(&blueprint, &mut spawned, network, &mut own_cgroup, attach).await;
        let Spawned { process: vmm, client, events: vmm_events, .. } = spawned;
        match up {
            Ok(Up { agent, agent_events, ready, network }) => {
                let Blueprint { spec, config, dir, log, size, .. } = blueprint;
                let sandbox = Self {
                    agent,
                    files: pod_files,
                    volumes: Mutex::default(),
                    slots: Mutex::default(),
                    network: Mutex::new(network),
                    sizes: Sizes::new(size, spec.limits, &config.vm),
                    config,
                    dir,
                    vmm,
                    client,
                    own_cgroup,
                    next_stream: AtomicU64::new(1),
                    condemned: watch::Sender::new(None),
                    ended: watch::Sender::new(None),
                    log,
                };
                Ok((sandbox, Signs { vmm_events, ready, console }, agent_events))
            }
            Err(error) => {
                let end = vmm.kill().await;
                if let Some(directory) = &own_cgroup {
                    cgroup::remove(directory);
                }
                Err(with_console(error, &end, console.final_tail().await))
            }
        }
    }
}

/// The machine, with a network slot for each interface. There is one in every machine: the topology is the same for all.
fn machine(blueprint: &Blueprint, interfaces: usize, uid: u32) -> Result<VmConfig> {
    let Config { vm, limits, .. } = &blueprint.config;
    let largest = blueprint.size.largest(vm);
    let net_slots = u8::try_from(interfaces.max(1)).unwrap_or(u8::MAX);
    if net_slots > MAX_NET_SLOTS {
        return Err(Error::Machine(format!(
            "the pod has {interfaces} network interfaces; a VM has no more than {MAX_NET_SLOTS}"
        )));
    }
    Ok(VmConfig {
        sandbox_id: blueprint.id.clone(),
        vcpus: blueprint.size.vcpus,
        max_vcpus: largest.vcpus,
        memory_mib: blueprint.size.memory_mib,
        max_memory_mib: largest.memory_mib,
        net_slots,
        guest_cid: GUEST_CID,
        kernel_args: vm.kernel_args.clone(),
        host_ports: vec![READY_PORT],
        uid,
        net_limit: limits.net(),
        block_limit: limits.block(),
        made_of: BTreeMap::new(),
    })
}

/// Writes the pod's own files where containers can have them mounted from.
fn write_files(dir: &StateDir, files: &[PodFile]) -> Result<Vec<(&'static str, PathBuf)>> {
    let folder = dir.path().join("files");
    if !files.is_empty() {
        fs::create_dir(&folder).map_err(file("create", &folder))?;
    }
    let write = |pod_file: &PodFile| {
        let path = folder.join(pod_file.name);
        fs::write(&path, &pod_file.text).map_err(file("write", &path))?;
        Ok((pod_file.name, path))
    };
    files.iter().map(write).collect()
}

/// Puts the VMM into the pod's cgroup before it allocates anything. How to find both is written down first: whoever cleans up after
/// a shim that dies here has to know.
fn enter_cgroup(blueprint: &Blueprint, vmm: &VmmProcess, made: &mut Option<PathBuf>) -> Result<()> {
    let pid = vmm.pid;
    let mount = Path::new(cgroup::MOUNT);
    let directory = match &blueprint.spec.cgroups_path {
        Some(path) if mount.join("cgroup.controllers").exists() => Some(cgroup::directory(mount, path)),
        Some(_) => {
            warn!(blueprint.log, "the VMM stays in the shim's cgroup: the host has no cgroup v2");
            None
        }
        None => None,
    };
    let start_time = start_time(pid).unwrap_or_default();
    let record = Record { pid, start_time, cgroup: directory.clone(), uid: Some(vmm.uid()) };
    blueprint.dir.write_record(&record)?;
    if let Some(directory) = &directory {
        cgroup::enter(directory, pid)?;
    }
    *made = directory;
    Ok(())
}

/// From a forked VMM to a guest whose agent answers, with the first container's files mounted.
async fn come_up(
    blueprint: &Blueprint,
    spawned: &mut Spawned,
    network: Option<Given>,
    cgroup: &mut Option<PathBuf>,
    attach: impl FnOnce() -> Result<()> + Send + 'static,
) -> Result<Up> {
    let deadline = Instant::now() + blueprint.config.timeouts.boot();
    let seconds = blueprint.config.timeouts.boot;
    let too_late = |_| Error::BootTimeout { seconds, console: String::new() };
    enter_cgroup(blueprint, &spawned.process, cgroup)?;
    let built = timeout_at(deadline, &mut spawned.built).await.map_err(too_late)?;
    built.map_err(|_| Error::Vmm(mayu_vmm_api::Error::Closed))??;
    let run = run_guest(blueprint, network, &spawned.client, &mut spawned.events);
    let run = async { timeout_at(deadline, run).await.map_err(too_late)? };
    both(run, spawn_blocking(attach)).await
}

/// Runs the guest and mounts its files at the same time. A failed mount does not wait for the guest; a guest that
/// fails waits for the mounting, which cannot be stopped half way.
async fn both(run: impl Future<Output = Result<Up>>, mut attaching: JoinHandle<Result<()>>) -> Result<Up> {
    let ended = |_| Error::System { operation: "mount", source: std::io::Error::other("it was cut short") };
    let mut run = std::pin::pin!(run);
    tokio::select! {
        up = &mut run => {
            let attached = attaching.await.map_err(ended);
            let up = up?;
            attached??;
            Ok(up)
        }
        attached = &mut attaching => {
            attached.map_err(ended)??;
            run.await
        }
    }
}

/// Lets the vCPUs run, waits until the agent announces itself and makes the guest this pod.
async fn run_guest(
    blueprint: &Blueprint,
    network: Option<Given>,
    client: &Arc<VmmClient>,
    events: &mut EventStream,
) -> Result<Up> {
    client.request(Request::Resume, &[]).await?;
    // While the guest boots.
    let wiring = async {
        match network {
            Some(given) => given.wire(client, blueprint.config.timeouts.request()).await,
            None => Ok(Network::Unknown),
        }
    };
    let ((ready, agent), network) = tokio::try_join!(agent_of(blueprint, client, events), wiring)?;
    let hostname = blueprint.spec.hostname.as_ref().unwrap_or(&blueprint.id);
    // Kernel parameters of the pod may be those of an interface.
    agent.configure_network(network.request()).await?;
    agent.configure(hostname, &blueprint.spec.sysctls).await?;
    let agent_events = agent.events().await?;
    Ok(Up { agent, agent_events, ready, network })
}

/// Waits for the agent's announcement and connects to it.
async fn agent_of(
    blueprint: &Blueprint,
    client: &VmmClient,
    events: &mut EventStream,
) -> Result<(UnixStream, Agent)> {
    let mut ready = announced(events).await?;
    let hello = read_hello(&mut ready).await?;
    let stream = connect(client, RPC_PORT).await?;
    let vmm = client.status().await?;
    info!(blueprint.log, "VM is up";
        "vmm_us" => vmm.guest_entry_us, "kernel_us" => hello.kernel_us, "agent_us" => hello.agent_us);
    Ok((ready, Agent::new(stream, blueprint.config.timeouts.request())))
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
            None => return Err(failed("its VMM ended".into())),
        }
    }
}

/// Adds what the guest's console says, and how the VMM ended where that is the failure.
fn with_console(error: Error, end: &str, console: String) -> Error {
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
