//! The cgroup of one container: made before its first process, removed after its last. cgroup v2 only,
//! see the kernel's Documentation/admin-guide/cgroup-v2.rst.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use libcgroups::common::{CgroupManager, ControllerOpt};
use libcgroups::v2::manager::Manager;
use nix::errno::Errno;
use nix::sys::uio::pread;
use nix::unistd::Pid;
use oci_spec::runtime::{LinuxDeviceCgroup, LinuxResources};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::timeout;

use crate::device_filter;
use crate::error::{Error, Result};
use crate::sys;

/// Where cgroup v2 is mounted.
pub const MOUNT_POINT: &str = "/sys/fs/cgroup";
/// The parent of every container's cgroup, below [`MOUNT_POINT`].
const PARENT: &str = "mayu";
/// How long freezing, thawing and dying may take; longer means that a process hangs in the kernel.
const DEADLINE: Duration = Duration::from_secs(30);
/// How many levels of cgroups of its own a container may have made and still be cleaned up after.
const MAX_DEPTH: usize = 64;

/// One container's cgroup.
#[derive(Clone, Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// The path of container `id`'s cgroup below the mount point, as an OCI spec's `cgroupsPath`.
    pub fn spec_path(id: &str) -> PathBuf {
        Path::new("/").join(PARENT).join(id)
    }

    /// The cgroup of container `id`, there or not.
    pub fn of(id: &str) -> Self {
        Self { path: Path::new(MOUNT_POINT).join(PARENT).join(id) }
    }

    /// Makes the cgroup, with every controller of the guest; its processes may use only the devices of `rules`.
    ///
    /// # Errors
    ///
    /// `File` where the kernel refuses, also when the cgroup is there already.
    pub fn create(&self, rules: &[LinuxDeviceCgroup]) -> Result<()> {
        let root = Path::new(MOUNT_POINT);
        let parent = root.join(PARENT);
        if !parent.exists() {
            fs::create_dir(&parent).map_err(Error::file("create", &parent))?;
            enable_controllers(root)?;
            enable_controllers(&parent)?;
        }
        fs::create_dir(&self.path).map_err(Error::file("create", &self.path))?;
        self.filter_devices(rules)
    }

    /// The cgroup's directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Changes the limits that `resources` names, and no others.
    ///
    /// # Errors
    ///
    /// `Resources` with the file and the value that the kernel refused.
    pub fn update(&self, resources: &LinuxResources) -> Result<()> {
        let below = self.path.strip_prefix(MOUNT_POINT).unwrap_or(&self.path);
        let manager = Manager::new(MOUNT_POINT.into(), Path::new("/").join(below))?;
        let options =
            ControllerOpt { resources, freezer_state: None, oom_score_adj: None, disable_oom_killer: false };
        Ok(manager.apply(&options)?)
    }

    /// Whether this guest limits swap; without swap in the kernel there is no such file.
    pub fn limits_swap(&self) -> bool {
        self.path.join("memory.swap.max").exists()
    }

    /// The pids of all processes in the cgroup and those below it.
    ///
    /// # Errors
    ///
    /// `File` where the cgroup cannot be read.
    pub fn processes(&self) -> Result<Vec<Pid>> {
        let mut pids = Vec::new();
        walk(&self.path, 0, &mut |directory| {
            let file = directory.join("cgroup.procs");
            match fs::read_to_string(&file) {
                Ok(text) => {
                    pids.extend(text.lines().filter_map(|line| line.parse().ok()).map(Pid::from_raw));
                    Ok(())
                }
                // Threaded cgroups list their processes in their parent's file only; others may have gone.
                Err(error)
                    if matches!(
                        error.raw_os_error(),
                        Some(libc::EOPNOTSUPP | libc::ENOENT | libc::ENODEV)
                    ) =>
                {
                    Ok(())
                }
                Err(error) => Err(Error::file("read", file)(error)),
            }
        })?;
        Ok(pids)
    }

    /// Sends `signal`, any number the kernel knows, to every process.
    ///
    /// # Errors
    ///
    /// `System` where the kernel refuses.
    pub fn signal(&self, signal: i32) -> Result<()> {
        if signal == libc::SIGKILL {
            return self.kill();
        }
        for pid in self.processes()? {
            match sys::signal_process(pid, signal) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(errno) => return Err(Error::system("send a signal")(errno)),
            }
        }
        Ok(())
    }

    /// Kills every process at once, forks in progress included.
    ///
    /// # Errors
    ///
    /// `File` where the kernel refuses.
    pub fn kill(&self) -> Result<()> {
        self.write("cgroup.kill", "1")
    }

    /// Freezes or thaws all processes and waits until it is done.
    ///
    /// # Errors
    ///
    /// `File`, `CgroupDeadline`.
    pub async fn freeze(&self, frozen: bool) -> Result<()> {
        self.write("cgroup.freeze", if frozen { "1" } else { "0" })?;
        self.wait_for("frozen", frozen, if frozen { "frozen" } else { "thawed" }).await
    }

    /// Waits until no process is left, zombies aside.
    ///
    /// # Errors
    ///
    /// `File`, `CgroupDeadline`.
    pub async fn empty(&self) -> Result<()> {
        self.wait_for("populated", false, "empty").await
    }

    /// Kills what is left, waits for its end and removes the cgroup with all below it.
    ///
    /// # Errors
    ///
    /// `File`, `CgroupDeadline`.
    pub async fn remove(&self) -> Result<()> {
        if !self.path.exists() {
            return Ok(());
        }
        // A frozen cgroup's processes die as well.
        self.kill()?;
        self.empty().await?;
        walk(&self.path, 0, &mut |directory| {
            fs::remove_dir(directory).map_err(Error::file("remove", directory))
        })
    }

    /// How many processes the kernel has killed here for want of memory.
    pub fn oom_kills(&self) -> u64 {
        oom_kills(&self.path)
    }

    /// A notification for each change of `memory.events`.
    ///
    /// # Errors
    ///
    /// `File` where the guest's kernel has no memory controller.
    pub fn watch_memory(&self) -> Result<Watch> {
        Watch::open(self.path.join("memory.events"))
    }

    async fn wait_for(&self, key: &str, wanted: bool, state: &'static str) -> Result<()> {
        let mut watch = Watch::open(self.path.join("cgroup.events"))?;
        let reached = async {
            while keyed_value(&watch.read()?, key) != Some(u64::from(wanted)) {
                watch.changed().await?;
            }
            Ok(())
        };
        timeout(DEADLINE, reached).await.unwrap_or(Err(Error::CgroupDeadline {
            path: self.path.clone(),
            state,
            seconds: DEADLINE.as_secs(),
        }))
    }

    fn filter_devices(&self, rules: &[LinuxDeviceCgroup]) -> Result<()> {
        let program = device_filter::compile(rules)?;
        let directory = File::open(&self.path).map_err(Error::file("open", &self.path))?;
        sys::attach_device_filter(&program, directory.as_fd()).map_err(Error::system("filter devices"))
    }

    fn write(&self, name: &str, value: &str) -> Result<()> {
        write(&self.path.join(name), value)
    }
}

/// How many processes the kernel has killed for want of memory in all containers, also in those that are gone.
pub fn all_oom_kills() -> u64 {
    oom_kills(&Path::new(MOUNT_POINT).join(PARENT))
}

fn oom_kills(directory: &Path) -> u64 {
    let text = fs::read_to_string(directory.join("memory.events")).unwrap_or_default();
    keyed_value(&text, "oom_kill").unwrap_or(0)
}

/// Enables in `directory`'s children every controller that `directory` has.
///
/// # Errors
///
/// `File` where the kernel refuses.
pub fn enable_controllers(directory: &Path) -> Result<()> {
    let available = directory.join("cgroup.controllers");
    let controllers = fs::read_to_string(&available).map_err(Error::file("read", &available))?;
    let enable: Vec<String> = controllers.split_whitespace().map(|name| format!("+{name}")).collect();
    write(&directory.join("cgroup.subtree_control"), &enable.join(" "))
}

/// A file of a cgroup that the kernel announces the changes of.
pub struct Watch {
    file: AsyncFd<OwnedFd>,
    path: PathBuf,
}

impl Watch {
    fn open(path: PathBuf) -> Result<Self> {
        let file = File::open(&path).map_err(Error::file("open", &path))?;
        // kernfs reports a change since the last read as an exceptional condition, not as readable.
        let file =
            sys::watch(OwnedFd::from(file), Interest::PRIORITY).map_err(Error::file("watch", &path))?;
        Ok(Self { file, path })
    }

    /// The file's present contents.
    fn read(&self) -> Result<String> {
        let mut buffer = [0; 4096];
        let length = pread(self.file.get_ref(), &mut buffer, 0)
            .map_err(|errno| Error::file("read", &self.path)(errno.into()))?;
        Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
    }

    /// Waits for a change since the last [read](Self::read).
    ///
    /// # Errors
    ///
    /// `File` when the cgroup has been removed.
    pub async fn changed(&mut self) -> Result<()> {
        let mut ready =
            self.file.ready(Interest::PRIORITY).await.map_err(Error::file("watch", &self.path))?;
        ready.clear_ready();
        Ok(())
    }
}

/// Calls `visit` for every cgroup below and including `directory`, children first.
fn walk(directory: &Path, depth: usize, visit: &mut dyn FnMut(&Path) -> Result<()>) -> Result<()> {
    if depth < MAX_DEPTH {
        let entries = match fs::read_dir(directory) {
            Ok(entries) => entries,
            // The container has removed it in the meantime.
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(Error::file("list", directory)(error)),
        };
        for entry in entries {
            let entry = entry.map_err(Error::file("list", directory))?;
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                walk(&entry.path(), depth + 1, visit)?;
            }
        }
    }
    visit(directory)
}

/// The value of `key` in a file of lines "key value".
pub fn keyed_value(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.parse().ok())
}

fn write(path: &Path, value: &str) -> Result<()> {
    let result: io::Result<()> =
        OpenOptions::new().write(true).open(path).and_then(|mut file| file.write_all(value.as_bytes()));
    result.map_err(Error::file("write", path))
}
