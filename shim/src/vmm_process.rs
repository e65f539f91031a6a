//! The VMM: one jailed process per pod.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use command_fds::{CommandFdExt, FdMapping};
use mayu_vmm_api::{
    CGROUP_ARGUMENT, CGROUP_FD, CONTROL_FD, Event, EventStream, Request, VmConfig, VmmClient,
};
use nix::libc::O_PATH;
use nix::sys::prctl::set_child_subreaper;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use slog::{Logger, debug, o};
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::config::{Config, Vm};
use crate::console::{Console, Source};
use crate::error::{file, system};
use crate::pidfd::{PidFd, WatchedProcess};
use crate::saved::Saved;
use crate::uids::Lease;
use crate::{Error, Result};

/// A running VMM. Dropping it kills it.
#[derive(Debug)]
pub struct VmmProcess {
    /// Its pid on the host.
    pub pid: i32,
    process: WatchedProcess,
    lease: Lease,
    _stderr: Console,
}

/// What the shim opens for the VMM, since the VMM opens no path of its own.
#[derive(Debug)]
pub struct HostFiles {
    kvm: File,
    pub(crate) kernel: File,
    pub(crate) image: File,
}

impl HostFiles {
    /// Opens what every pod needs.
    ///
    /// # Errors
    /// [`Error::HostFile`], which says what to do about it.
    pub fn open(vm: &Vm) -> Result<Self> {
        let open = |what, path: &Path, write, hint| {
            OpenOptions::new().read(true).write(write).open(path).map_err(|source| Error::HostFile {
                what,
                path: path.into(),
                source,
                hint,
            })
        };
        let set_kernel = "set vm.kernel in the configuration file";
        let set_image = "set vm.image in the configuration file";
        Ok(Self {
            kvm: open("KVM device", Path::new("/dev/kvm"), true, "`mayu check` says what this host lacks")?,
            kernel: open("guest kernel", &vm.kernel, false, set_kernel)?,
            image: open("guest image", &vm.image, false, set_image)?,
        })
    }
}

/// Where a guest starts.
#[derive(Debug)]
pub enum Origin {
    /// With its kernel.
    Kernel,
    /// As well, to be saved: with its memory in this file.
    ToSave(File),
    /// Where another was saved.
    Saved(Saved),
}

/// What a VMM is told to build, and the descriptors for it.
#[derive(Debug)]
pub struct Building {
    /// The machine.
    pub machine: VmConfig,
    /// What every pod needs.
    pub files: HostFiles,
    /// Where its guest starts.
    pub origin: Origin,
    /// The directory that virtio-fs serves.
    pub share: PathBuf,
    /// Where the guest's console goes.
    pub console: OwnedFd,
    /// The directory of the cgroup that the VMM is to be in, if not the shim's.
    pub cgroup: Option<OwnedFd>,
}

/// A VMM that is building its machine.
#[derive(Debug)]
pub struct Spawned {
    /// The process.
    pub process: VmmProcess,
    /// For asking it.
    pub client: Arc<VmmClient>,
    /// What it tells.
    pub events: EventStream,
    /// When it was started.
    pub at: Instant,
    built: JoinHandle<Result<()>>,
}

impl Spawned {
    /// Waits until the machine is built. Once.
    ///
    /// # Errors
    /// The VMM's reason why it is not.
    pub async fn built(&mut self) -> Result<()> {
        (&mut self.built).await.map_err(|_| Error::Vmm(mayu_vmm_api::Error::Closed))?
    }
}

impl VmmProcess {
    /// Spawns `mayu-vmm`, tells it what to build and waits until it has forked into its own namespaces. `lease` is for the
    /// uid that it is told to run as.
    ///
    /// # Errors
    /// The step that failed; then there is no process.
    pub async fn spawn(
        config: &Config,
        mut building: Building,
        lease: Lease,
        log: &Logger,
    ) -> Result<Spawned> {
        let log = log.new(o!("program" => "mayu-vmm"));
        let (stderr_reader, stderr) = Console::pipe(Source::Vmm, log.clone())?;
        // The process that is spawned forks the real one and ends; that one then is a child of the nearest
        // subreaper. Only for so long, or orphans of others would become this process's to reap.
        set_child_subreaper(true).map_err(system("become a subreaper"))?;
        let at = Instant::now();
        let (mut child, socket) = run(&config.vm.vmm, stderr, building.cgroup.take())?;
        let (client, mut events) = VmmClient::new(socket, config.timeouts.request())?;
        let client = Arc::new(client);
        let mut built = tokio::spawn(build(client.clone(), building));
        let pid = match timeout(config.timeouts.boot(), started(&mut events)).await {
            Ok(Ok(pid)) => pid,
            Err(_) => return Err(failed("it did not fork in time")),
            // Where it has refused to build, its answer says more than that it ended.
            Ok(Err(ended)) => return Err(refusal(&mut built).await.unwrap_or(ended)),
        };
        let process = PidFd::open(pid).and_then(WatchedProcess::new).map_err(system("watch the VMM"))?;
        let process = Self { pid, process, lease, _stderr: stderr_reader };
        timeout(config.timeouts.boot(), child.wait())
            .await
            .map_err(|_| failed("its first process does not end"))?
            .map_err(system("wait for the VMM's first process"))?;
        set_child_subreaper(false).map_err(system("stop being a subreaper"))?;
        debug!(log, "VMM started"; "pid" => pid);
        Ok(Spawned { process, client, events, at, built })
    }

    /// The uid that it runs as.
    pub fn uid(&self) -> u32 {
        self.lease.uid()
    }

    /// Waits for the end of the process.
    pub async fn ended(&self) {
        self.process.ended().await;
    }

    /// Kills it, waits until it is gone and frees its uid. Says how it ended, for the log.
    pub async fn kill(&self) -> String {
        self.process.process().kill();
        match timeout(Duration::from_secs(10), self.ended()).await {
            Ok(()) => {
                self.lease.release();
                self.process.process().reap()
            }
            Err(_) => "it does not end".into(),
        }
    }
}

impl Drop for VmmProcess {
    fn drop(&mut self) {
        self.process.process().kill();
    }
}

/// Runs the program; gives the shim's end of its control socket.
fn run(program: &Path, stderr: OwnedFd, cgroup: Option<OwnedFd>) -> Result<(Child, OwnedFd)> {
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
        .map_err(system("create the VMM's control socket"))?;
    let spawn_failed = |source| Error::Spawn { what: program.display().to_string(), source };
    let mut command = std::process::Command::new(program);
    command.env_clear().current_dir("/").stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr);
    let mut inherited = vec![FdMapping { parent_fd: theirs, child_fd: CONTROL_FD }];
    if let Some(cgroup) = cgroup {
        command.arg(CGROUP_ARGUMENT);
        inherited.push(FdMapping { parent_fd: cgroup, child_fd: CGROUP_FD });
    }
    command.fd_mappings(inherited).map_err(|error| spawn_failed(std::io::Error::other(error)))?;
    let child = Command::from(command).kill_on_drop(true).spawn().map_err(spawn_failed)?;
    Ok((child, ours))
}

/// Has the VMM confine itself and build the machine.
async fn build(client: Arc<VmmClient>, building: Building) -> Result<()> {
    let Building { machine, files, origin, share, console, .. } = building;
    let share = OpenOptions::new()
        .read(true)
        .custom_flags(O_PATH)
        .open(&share)
        .map_err(file("open the share", share))?;
    let (kvm, kernel, image) = (files.kvm.as_fd(), files.kernel.as_fd(), files.image.as_fd());
    let (share, console) = (share.as_fd(), console.as_fd());
    match &origin {
        Origin::Kernel => {
            client.request(Request::Build(machine), &[kvm, kernel, image, share, console]).await?;
        }
        Origin::ToSave(memory) => {
            let fds = [kvm, kernel, image, share, console, memory.as_fd()];
            client.request(Request::BuildTemplate(machine), &fds).await?;
        }
        Origin::Saved(Saved { state, memory, working_set }) => {
            let mut fds = vec![kvm, state.as_fd(), memory.as_fd(), image, share, console];
            fds.extend(working_set.as_ref().map(AsFd::as_fd));
            client.request(Request::Restore(machine), &fds).await?;
        }
    }
    Ok(())
}

/// The VMM's reason for not building the machine, if it gave one before it ended.
async fn refusal(built: &mut JoinHandle<Result<()>>) -> Option<Error> {
    match built.await {
        Ok(Err(error @ Error::Vmm(mayu_vmm_api::Error::Refused { .. }))) => Some(error),
        _ => None,
    }
}

async fn started(events: &mut EventStream) -> Result<i32> {
    match events.recv().await {
        Some((Event::Started { pid }, _)) => Ok(pid),
        Some((Event::Exited(reason), _)) => Err(failed(&format!("{reason:?}"))),
        Some(_) => Err(failed("it says something else first")),
        None => Err(failed("it ended at once; its log lines say why")),
    }
}

fn failed(reason: &str) -> Error {
    Error::Boot { reason: format!("the VMM did not start: {reason}"), console: String::new() }
}
