//! The VMM: one jailed process per pod.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};
use mayu_vmm_api::{CONTROL_FD, Event, EventStream, VmConfig, VmmClient};
use nix::libc::O_PATH;
use nix::sys::prctl::set_child_subreaper;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use slog::{Logger, debug, o};
use tokio::process::Command;
use tokio::time::timeout;

use crate::config::{Config, Vm};
use crate::console::{Console, Source};
use crate::error::{file, system};
use crate::pidfd::{PidFd, WatchedProcess};
use crate::{Error, Result};

/// A running VMM. Dropping it kills it.
#[derive(Debug)]
pub struct VmmProcess {
    /// Its pid on the host.
    pub pid: i32,
    process: WatchedProcess,
    _stderr: Console,
}

/// What the shim opens for the VMM, since the VMM opens no path of its own.
#[derive(Debug)]
pub struct HostFiles {
    kvm: File,
    kernel: File,
    image: File,
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
        Ok(Self {
            kvm: open(
                "KVM device",
                Path::new("/dev/kvm"),
                true,
                "`mayu check` tells whether this host has KVM",
            )?,
            kernel: open("guest kernel", &vm.kernel, false, "set vm.kernel in the configuration file")?,
            image: open("guest image", &vm.image, false, "set vm.image in the configuration file")?,
        })
    }
}

impl VmmProcess {
    /// Spawns `mayu-vmm` and waits until it has gone into its own namespaces.
    ///
    /// # Errors
    /// The step that failed; then there is no process.
    pub async fn spawn(config: &Config, log: &Logger) -> Result<(Self, VmmClient, EventStream)> {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
                .map_err(system("create the VMM's control socket"))?;
        let log = log.new(o!("program" => "mayu-vmm"));
        let (stderr_reader, stderr) = Console::pipe(Source::Vmm, log.clone())?;
        let path = &config.vm.vmm;
        let spawn_failed = |source| Error::Spawn { what: path.display().to_string(), source };
        let mut command = std::process::Command::new(path);
        command.env_clear().current_dir("/").stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr);
        command
            .fd_mappings(vec![FdMapping { parent_fd: theirs, child_fd: CONTROL_FD }])
            .map_err(|error| spawn_failed(std::io::Error::other(error)))?;
        // The process that is spawned forks the real one and ends; that one then is a child of the nearest
        // subreaper. Only for so long, or orphans of others would become this process's to reap.
        set_child_subreaper(true).map_err(system("become a subreaper"))?;
        let mut child = Command::from(command).kill_on_drop(true).spawn().map_err(spawn_failed)?;
        let (client, mut events) = VmmClient::new(ours, config.timeouts.request())?;
        let boot = config.timeouts.boot();
        let pid = timeout(boot, started(&mut events))
            .await
            .unwrap_or_else(|_| Err(failed("it did not start in time")))?;
        let process = PidFd::open(pid).and_then(WatchedProcess::new).map_err(system("watch the VMM"))?;
        let process = Self { pid, process, _stderr: stderr_reader };
        timeout(boot, child.wait())
            .await
            .map_err(|_| failed("its first process does not end"))?
            .map_err(system("wait for the VMM's first process"))?;
        set_child_subreaper(false).map_err(system("stop being a subreaper"))?;
        debug!(log, "VMM started"; "pid" => pid);
        Ok((process, client, events))
    }

    /// Has the VMM confine itself and build the machine.
    ///
    /// # Errors
    /// [`Error::Vmm`] with the VMM's reason, such as a kernel file that is none.
    pub async fn build(
        client: &VmmClient,
        machine: VmConfig,
        files: HostFiles,
        share: &Path,
        console: OwnedFd,
    ) -> Result<()> {
        let share_fd = OpenOptions::new()
            .read(true)
            .custom_flags(O_PATH)
            .open(share)
            .map_err(file("open the share", share))?;
        let fds =
            [files.kvm.as_fd(), files.kernel.as_fd(), files.image.as_fd(), share_fd.as_fd(), console.as_fd()];
        Ok(client.request(mayu_vmm_api::Request::Build(machine), &fds).await?)
    }

    /// Waits for the end of the process.
    pub async fn ended(&self) {
        self.process.ended().await;
    }

    /// Kills it and waits until it is gone. Says how it ended, for the log.
    pub async fn kill(&self) -> String {
        self.process.process().kill();
        match timeout(Duration::from_secs(10), self.ended()).await {
            Ok(()) => self.process.process().reap(),
            Err(_) => "it does not end".into(),
        }
    }
}

impl Drop for VmmProcess {
    fn drop(&mut self) {
        self.process.process().kill();
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
