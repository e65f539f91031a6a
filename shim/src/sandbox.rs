//! One pod's VM: from a spawned VMM to an agent that answers, and back to nothing.

use std::collections::HashSet;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use mayu_agent_api::{READY_PORT, RPC_PORT, STREAM_PORT, StreamId};
use mayu_vmm_api::{Event, EventStream, ExitReason, Request, VmConfig, VmmClient};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use slog::{Logger, debug, info, warn};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{Mutex, watch};
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::{Instant, timeout_at};

use crate::agent::{Agent, AgentEvents, read_hello};
use crate::cgroup;
use crate::config::Config;
use crate::console::{Console, Source};
use crate::delete::start_time;
use crate::devices::{BlockDevice, Place, Slots};
use crate::error::{file, system};
use crate::pod_spec::{PodFile, PodSpec, Size};
use crate::spec::Volume;
use crate::state_dir::{Record, StateDir};
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

/// A running VM.
#[derive(Debug)]
pub struct Sandbox {
    /// The configuration it was started with.
    pub config: Config,
    /// The pod's directory.
    pub dir: StateDir,
    /// The agent inside.
    pub agent: Agent,
    /// Files for every container: their names below `/etc`, and where they are on the host.
    pub files: Vec<(&'static str, PathBuf)>,
    /// The names of the guest's volumes.
    volumes: Mutex<HashSet<String>>,
    /// What is in the block slots.
    slots: Mutex<Slots>,
    size: Size,
    vmm: VmmProcess,
    client: Arc<VmmClient>,
    own_cgroup: Option<PathBuf>,
    next_stream: AtomicU64,
    condemned: watch::Sender<Option<String>>,
    ended: watch::Sender<Option<String>>,
    log: Logger,
}

/// What tells of the VM's end, for [`Sandbox::watch`].
#[derive(Debug)]
pub struct Signs {
    vmm_events: EventStream,
    ready: UnixStream,
    console: Console,
}

/// A guest that has come up.
struct Up {
    agent: Agent,
    agent_events: AgentEvents,
    ready: UnixStream,
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
        let machine = machine(&blueprint);
        let pod_files = write_files(dir, &blueprint.spec.files)?;
        let building = Building { machine, files, share: dir.share(), console: console_writer };
        let mut spawned = VmmProcess::spawn(config, building, log).await?;
        let mut own_cgroup = None;
        let up = come_up(&blueprint, &mut spawned, &mut own_cgroup, attach).await;
        let Spawned { process: vmm, client, events: vmm_events, .. } = spawned;
        match up {
            Ok(Up { agent, agent_events, ready }) => {
                let Blueprint { config, dir, log, size, .. } = blueprint;
                let sandbox = Self {
                    config,
                    dir,
                    agent,
                    files: pod_files,
                    volumes: Mutex::default(),
                    slots: Mutex::default(),
                    size,
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

    /// The VMM's pid, which containerd is told as the pid of every process of the pod.
    pub fn pid(&self) -> u32 {
        self.vmm.pid.unsigned_abs()
    }

    /// How large the VM is.
    pub fn size(&self) -> Size {
        self.size
    }

    /// Connects a stdio stream of a process that the agent knows by `id`.
    ///
    /// # Errors
    /// [`Error::Vmm`] or [`Error::System`].
    pub async fn connect_stream(&self, id: StreamId) -> Result<UnixStream> {
        let mut stream = connect(&self.client, STREAM_PORT).await?;
        stream.write_u64(id.0).await.map_err(system("name a stdio stream to the agent"))?;
        Ok(stream)
    }

    /// Makes volumes that the guest does not have yet.
    ///
    /// # Errors
    /// As [`Agent::task`].
    pub async fn provide(&self, volumes: Vec<Volume>) -> Result<()> {
        let mut there = self.volumes.lock().await;
        for volume in volumes {
            if !there.contains(&volume.name) {
                self.agent.create_volume(&volume).await?;
                there.insert(volume.name);
            }
        }
        Ok(())
    }

    /// Puts a container's block devices into slots. Says which device is in which.
    ///
    /// # Errors
    /// [`Error::Device`] or [`Error::Vmm`]; [`Sandbox::release_devices`] takes back what was done.
    pub async fn attach_devices(
        &self,
        container: &str,
        devices: &[BlockDevice],
    ) -> Result<Vec<((i64, i64), u8)>> {
        let mut slots = self.slots.lock().await;
        let mut places = Vec::new();
        for device in devices {
            let slot = match slots.take(device, container)? {
                Place::There(slot) => slot,
                Place::Empty(slot) => {
                    let file = device.open()?;
                    let attach = Request::AttachBlock { slot, read_only: device.read_only };
                    self.client.request(attach, &[file.as_fd()]).await?;
                    slot
                }
            };
            places.push((device.number, slot));
        }
        Ok(places)
    }

    /// Takes away the block devices that a container was the last to use.
    pub async fn release_devices(&self, container: &str) {
        let mut slots = self.slots.lock().await;
        for slot in slots.release(container) {
            if let Err(error) = self.client.request(Request::DetachBlock { slot }, &[]).await {
                debug!(self.log, "a block slot stays as it is"; "slot" => slot, "error" => error.to_string());
            }
        }
    }

    /// An identifier for the next stdio stream.
    pub fn next_stream(&self) -> StreamId {
        StreamId(self.next_stream.fetch_add(1, Ordering::Relaxed))
    }

    /// Waits for the end of the VM, makes sure of it, and says why.
    pub async fn watch(&self, mut signs: Signs) -> String {
        let mut condemned = self.condemned.subscribe();
        let mut byte = [0];
        let mut reason = tokio::select! {
            () = self.vmm.ended() => "its VMM ended".to_string(),
            reason = exit_event(&mut signs.vmm_events) => reason,
            _ = signs.ready.read(&mut byte) => "its agent ended".to_string(),
            reason = condemned.wait_for(Option::is_some) =>
                reason.ok().and_then(|reason| reason.clone()).unwrap_or_default(),
        };
        let how = self.vmm.kill().await;
        // The VMM's own word is better than what its end looks like from outside.
        while let Ok((event, _)) = signs.vmm_events.try_recv() {
            if let Event::Exited(why) = event {
                reason = describe(why);
            }
        }
        let console = signs.console.final_tail().await;
        info!(self.log, "the VM is gone"; "reason" => &reason, "vmm" => how, "console" => last_lines(&console));
        self.ended.send_replace(Some(reason.clone()));
        reason
    }

    /// Ends the VM for a reason; [`Sandbox::watch`] does it.
    pub fn condemn(&self, reason: &str) {
        self.condemned.send_if_modified(|condemned| {
            let first = condemned.is_none();
            if first {
                *condemned = Some(reason.into());
            }
            first
        });
    }

    /// Has the guest write everything back, ends the VM and takes away everything on the host.
    /// [`Sandbox::watch`] must be running.
    pub async fn tear_down(&self) {
        if self.ended.borrow().is_none() {
            if let Err(error) = self.agent.shutdown(self.config.timeouts.shutdown()).await {
                warn!(self.log, "the guest did not shut down"; "error" => error.to_string());
            }
            self.condemn("the pod was shut down");
        }
        // The sender lives as long as `self`.
        let _ = self.ended.subscribe().wait_for(Option::is_some).await;
        if let Some(directory) = &self.own_cgroup {
            cgroup::remove(directory);
        }
        let dir = self.dir.clone();
        match spawn_blocking(move || dir.remove()).await {
            Ok(Err(error)) => warn!(self.log, "the pod's directory stays"; "error" => error.to_string()),
            Err(error) => warn!(self.log, "the pod's directory stays"; "error" => error.to_string()),
            Ok(Ok(())) => {}
        }
    }
}

fn machine(blueprint: &Blueprint) -> VmConfig {
    let vm = &blueprint.config.vm;
    VmConfig {
        sandbox_id: blueprint.id.clone(),
        vcpus: blueprint.size.vcpus,
        memory_mib: blueprint.size.memory_mib,
        net_slots: 1,
        guest_cid: GUEST_CID,
        kernel_args: vm.kernel_args.clone(),
        host_ports: vec![READY_PORT],
        uid: vm.uid,
    }
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

/// Puts the VMM into the pod's cgroup before it allocates anything, and writes down how to find both.
fn enter_cgroup(blueprint: &Blueprint, pid: i32, made: &mut Option<PathBuf>) -> Result<()> {
    let mount = Path::new(cgroup::MOUNT);
    match &blueprint.spec.cgroups_path {
        Some(path) if mount.join("cgroup.controllers").exists() => {
            let directory = cgroup::directory(mount, path);
            cgroup::enter(&directory, pid)?;
            *made = Some(directory);
        }
        Some(_) => warn!(blueprint.log, "the VMM stays in the shim's cgroup: the host has no cgroup v2"),
        None => {}
    }
    let start_time = start_time(pid).unwrap_or_default();
    blueprint.dir.write_record(&Record { pid, start_time, cgroup: made.clone() })
}

/// From a forked VMM to a guest whose agent answers, with the first container's files mounted.
async fn come_up(
    blueprint: &Blueprint,
    spawned: &mut Spawned,
    cgroup: &mut Option<PathBuf>,
    attach: impl FnOnce() -> Result<()> + Send + 'static,
) -> Result<Up> {
    let deadline = Instant::now() + blueprint.config.timeouts.boot();
    let seconds = blueprint.config.timeouts.boot;
    let too_late = |_| Error::BootTimeout { seconds, console: String::new() };
    enter_cgroup(blueprint, spawned.process.pid, cgroup)?;
    let built = timeout_at(deadline, &mut spawned.built).await.map_err(too_late)?;
    built.map_err(|_| Error::Vmm(mayu_vmm_api::Error::Closed))??;
    let run = run_guest(blueprint, &spawned.client, &mut spawned.events);
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

/// Lets the vCPUs run, waits until the agent announces itself and connects to it.
async fn run_guest(blueprint: &Blueprint, client: &VmmClient, events: &mut EventStream) -> Result<Up> {
    client.request(Request::Resume, &[]).await?;
    let mut ready = announced(events).await?;
    let hello = read_hello(&mut ready).await?;
    let stream = connect(client, RPC_PORT).await?;
    let agent = Agent::new(stream, blueprint.config.timeouts.request());
    let hostname = blueprint.spec.hostname.as_ref().unwrap_or(&blueprint.id);
    agent.configure(hostname, &blueprint.spec.sysctls).await?;
    let agent_events = agent.events().await?;
    let vmm = client.status().await?;
    info!(blueprint.log, "VM is up";
        "vmm_us" => vmm.guest_entry_us, "kernel_us" => hello.kernel_us, "agent_us" => hello.agent_us);
    Ok(Up { agent, agent_events, ready })
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

/// Never ends without an [`Event::Exited`]: the end of the VMM is seen elsewhere.
async fn exit_event(events: &mut EventStream) -> String {
    loop {
        match events.recv().await {
            Some((Event::Exited(why), _)) => return describe(why),
            Some(_) => {}
            None => std::future::pending().await,
        }
    }
}

fn describe(reason: ExitReason) -> String {
    match reason {
        ExitReason::GuestReset => "the guest reset itself".into(),
        ExitReason::Requested => "the shim asked for it".into(),
        ExitReason::Failed(detail) => {
            format!("its VMM failed: {}", detail.chars().take(1024).collect::<String>())
        }
    }
}

async fn connect(client: &VmmClient, port: u32) -> Result<UnixStream> {
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC)
        .map_err(system("create a stream to the guest"))?;
    client.request(Request::VsockConnect { port }, &[theirs.as_fd()]).await?;
    into_stream(ours)
}

fn into_stream(fd: OwnedFd) -> Result<UnixStream> {
    let stream = std::os::unix::net::UnixStream::from(fd);
    stream.set_nonblocking(true).map_err(system("make a stream non-blocking"))?;
    UnixStream::from_std(stream).map_err(system("watch a stream to the guest"))
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

/// Enough of the console for a log line.
fn last_lines(console: &str) -> &str {
    let start = console.trim_end().rmatch_indices('\n').nth(4).map_or(0, |(index, _)| index + 1);
    &console[start..]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_five_lines_of_a_console() {
        assert_eq!(last_lines("1\n2\n3\n4\n5\n6\n"), "2\n3\n4\n5\n6\n");
        assert_eq!(last_lines("1\n2"), "1\n2");
        assert_eq!(last_lines(""), "");
    }

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
