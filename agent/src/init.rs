//! The boot of the guest: what PID 1 does before it can serve, from the kernel's handover to the announcement
//! to the shim.

use std::fs;
use std::io::ErrorKind;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use mayu_agent_api::{
    FORWARD_PORT, Hello, READY_PORT, RPC_PORT, SHARE_DIR, SHARE_TAG, STREAM_PORT, TEMPLATE_PARAMETER,
    VOLUME_DIR,
};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use nix::time::{ClockId, clock_gettime};
use tokio::io::{AsyncWriteExt, Interest};
use tokio_vsock::{VMADDR_CID_HOST, VsockAddr, VsockStream};

use crate::cgroup::{MOUNT_POINT, enable_controllers};
use crate::error::{Error, Result};
use crate::server::{self, Listeners, Options};
use crate::{console, sys, template};

/// The word on the kernel's command line that makes the agent log everything.
const DEBUG_PARAMETER: &str = "mayu.debug";
/// What the agent executes to have its helpers.
const OWN_PROGRAM: &str = "/proc/self/exe";
/// Where the agent keeps its files.
const RUN_DIRECTORY: &str = "/run/mayu";
/// How long the launch of one process may take; a machine that emulates its CPU needs seconds.
const LAUNCH_DEADLINE: Duration = Duration::from_secs(120);
/// How long the shim may take to connect the streams of a process that it starts.
const STREAM_DEADLINE: Duration = Duration::from_secs(30);
/// How long what the kernel has cached of the share's attributes may be used, which is 500 ms for all that the VMM tells, and a little.
const SETTLE_TIME: Duration = Duration::from_millis(600);
/// Open files: each stream of a process is two. Containers without a limit of their own inherit it, as they
/// do from containerd.
const MAX_FILES: u64 = 1024 * 1024;

/// One file system of the guest.
struct Mount {
    source: &'static str,
    target: &'static str,
    kind: &'static str,
    flags: MsFlags,
    data: Option<&'static str>,
}

const NOTHING: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC);
const NO_DEVICES: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV);

/// All of them, in order.
const MOUNTS: [Mount; 10] = [
    Mount { source: "proc", target: "/proc", kind: "proc", flags: NOTHING, data: None },
    Mount { source: "sysfs", target: "/sys", kind: "sysfs", flags: NOTHING, data: None },
    Mount {
        source: "devtmpfs",
        target: "/dev",
        kind: "devtmpfs",
        flags: MsFlags::MS_NOSUID,
        data: Some("mode=755"),
    },
    Mount {
        source: "devpts",
        target: "/dev/pts",
        kind: "devpts",
        flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
        data: Some("mode=620,ptmxmode=666,gid=5"),
    },
    Mount { source: "shm", target: "/dev/shm", kind: "tmpfs", flags: NO_DEVICES, data: Some("mode=1777") },
    Mount { source: "mqueue", target: "/dev/mqueue", kind: "mqueue", flags: NOTHING, data: None },
    Mount { source: "run", target: "/run", kind: "tmpfs", flags: NO_DEVICES, data: Some("mode=755") },
    Mount { source: "tmp", target: "/tmp", kind: "tmpfs", flags: NO_DEVICES, data: Some("mode=1777") },
    Mount {
        source: "cgroup2",
        target: MOUNT_POINT,
        kind: "cgroup2",
        flags: NOTHING,
        // A container may manage its own part of the tree, and no more than that.
        data: Some("nsdelegate"),
    },
    Mount { source: SHARE_TAG, target: SHARE_DIR, kind: "virtiofs", flags: MsFlags::empty(), data: None },
];

/// Kernel settings of the guest.
const SYSCTLS: [(&str, &str); 2] = [
    // A pid that comes back soon could be taken for the process that had it.
    ("/proc/sys/kernel/pid_max", "4194304"),
    // Programs that map many files (databases, search engines) ask their hosts for this.
    ("/proc/sys/vm/max_map_count", "262144"),
];

/// Boots the guest and serves until the machine ends. Returns never, except that a guest without an agent is
/// of no use: on failure the machine is reset, and the reason is on its console.
pub fn run() -> ExitCode {
    let entered = uptime();
    std::panic::set_hook(Box::new(|panic| give_up(panic)));
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => give_up(&format_args!("start the runtime: {error}")),
    };
    match runtime.block_on(boot(entered)) {
        Ok(never) => match never {},
        Err(error) => give_up(&error),
    }
}

async fn boot(entered: Duration) -> Result<std::convert::Infallible> {
    for file_system in &MOUNTS {
        file_system.mount()?;
    }
    let parameters = fs::read_to_string("/proc/cmdline").map_err(Error::file("read", "/proc/cmdline"))?;
    let is_told = |parameter| parameters.split_whitespace().any(|word| word == parameter);
    let log = console::logger(is_told(DEBUG_PARAMETER));
    for (path, value) in SYSCTLS {
        fs::write(path, value).map_err(Error::file("write", path))?;
    }
    setrlimit(Resource::RLIMIT_NOFILE, MAX_FILES, MAX_FILES)
        .map_err(Error::system("raise the file limit"))?;
    enter_cgroup()?;
    bring_loopback_up()?;

    // The pods that go on from here have it for as long as they live.
    let _shared = is_told(TEMPLATE_PARAMETER).then(|| template::prepare(OWN_PROGRAM.as_ref())).transpose()?;

    let listeners = Listeners {
        rpc: server::listen(RPC_PORT, &log)?,
        streams: server::listen(STREAM_PORT, &log)?,
        forward: server::listen(FORWARD_PORT, &log)?,
    };
    let options = Options {
        program: OWN_PROGRAM.into(),
        launch_deadline: LAUNCH_DEADLINE,
        stream_deadline: STREAM_DEADLINE,
        settle_time: SETTLE_TIME,
        run_directory: RUN_DIRECTORY.into(),
        volume_directory: VOLUME_DIR.into(),
    };
    let _server = server::serve(options, listeners, &log).await?;
    let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    let agent_us = micros(uptime().saturating_sub(entered));
    let mut hello =
        Hello { version: env!("CARGO_PKG_VERSION").to_owned(), kernel_us: micros(entered), agent_us };
    loop {
        let ready = announce(&hello).await?;
        slog::debug!(log, "ready"; "kernel_us" => hello.kernel_us, "agent_us" => hello.agent_us);
        // That is where this machine was saved and goes on as another one.
        end_of(ready.as_fd()).await.map_err(Error::io("watch the connection to the host"))?;
        (hello.kernel_us, hello.agent_us) = (0, 0);
    }
}

/// Tells the shim that the agent serves. The connection stays open for as long as the agent lives and its shim does.
async fn announce(hello: &Hello) -> Result<VsockStream> {
    let mut ready = VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, READY_PORT))
        .await
        .map_err(Error::io("connect to the host to announce the agent"))?;
    let mut line = serde_json::to_string(hello).map_err(|error| Error::InvalidRequest(error.to_string()))?;
    line.push('\n');
    ready.write_all(line.as_bytes()).await.map_err(Error::io("announce the agent"))?;
    Ok(ready)
}

/// Waits for the end of a connection on which nothing arrives. To be reset with all others is an error for a socket of vsock and
/// nothing else (`virtio_vsock_reset_sock` of the kernel), which does not wake up who reads from it by tokio.
async fn end_of(connection: BorrowedFd<'_>) -> std::io::Result<()> {
    let interest = Interest::READABLE | Interest::ERROR;
    sys::watch(connection.try_clone_to_owned()?, interest)?.ready(interest).await.map(drop)
}

impl Mount {
    fn mount(&self) -> Result<()> {
        // Directories on the read-only root are there already; the others are on what was mounted before.
        match fs::create_dir_all(self.target) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists && !Path::new(self.target).is_dir() => {
                return Err(Error::file("create", self.target)(error));
            }
            _ => {}
        }
        match mount(Some(self.source), self.target, Some(self.kind), self.flags, self.data) {
            // The kernel has mounted /dev by itself.
            Err(Errno::EBUSY) if self.kind == "devtmpfs" => Ok(()),
            result => result.map_err(|errno| Error::file("mount", self.target)(errno.into())),
        }
    }
}

/// Puts the agent into a cgroup of its own, so that its use is told apart from the containers'.
fn enter_cgroup() -> Result<()> {
    let root = Path::new(MOUNT_POINT);
    enable_controllers(root)?;
    let own = root.join("agent");
    fs::create_dir(&own).map_err(Error::file("create", &own))?;
    let processes = own.join("cgroup.procs");
    fs::write(&processes, "0").map_err(Error::file("write", processes))
}

fn bring_loopback_up() -> Result<()> {
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)
        .map_err(Error::system("open a socket"))?;
    sys::bring_loopback_up(socket.as_fd()).map_err(Error::system("bring loopback up"))
}

/// The time since the kernel started.
fn uptime() -> Duration {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map(Duration::from).unwrap_or_default()
}

fn give_up(reason: &dyn std::fmt::Display) -> ! {
    eprintln!("mayu-agent: fatal: {reason}");
    // Ends the virtual machine. Should it fail, leaving does the same: the kernel panics without PID 1.
    let _ = reboot(RebootMode::RB_AUTOBOOT);
    std::process::abort()
}
