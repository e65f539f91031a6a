//! The pod's directory under `/run/mayu`.
//!
//! ```text
//! /run/mayu/uid:<uid>             whose VMM runs as that uid: uids.rs
//! /run/mayu/<namespace>/<sandbox>/
//!   vmm.json                      what `delete` needs when there is no shim to ask
//!   files/                        what a client leaves to the shim to write: hosts, resolv.conf, ...
//!   tree/<container>/rootfs       mount points, made here
//!   tree/<container>/mounts/<n>
//!   share/                        the tree, bound read-only: what virtio-fs serves. Mounts go on its paths
//! ```
//!
//! The guest writes to what is mounted on the share but not to the share, which is the host's `/run`. The share
//! is a shared mount of its own: what is mounted on it later appears in the VMM's mount namespace too, and
//! nowhere else.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use containerd_shim::mount::umount_recursive;
use nix::mount::{MntFlags, MsFlags, mount};
use serde::{Deserialize, Serialize};

use crate::error::file;
use crate::{Error, Result, id};

/// Where all pods have their directories.
pub const ROOT: &str = "/run/mayu";

/// What outlives the shim.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The VMM's pid, 0 before it has one.
    pub pid: i32,
    /// The VMM's start in clock ticks since boot (proc_pid_stat(5), field 22). With the pid it names one process.
    pub start_time: u64,
    /// The cgroup that was made for the pod.
    pub cgroup: Option<PathBuf>,
    /// The uid that is leased to the pod.
    pub uid: Option<u32>,
}

/// The directory of one pod.
#[derive(Clone, Debug)]
pub struct StateDir {
    root: PathBuf,
    path: PathBuf,
}

impl StateDir {
    /// Names the directory of pod `sandbox_id`; nothing is made yet.
    ///
    /// # Errors
    /// [`Error::InvalidId`].
    pub fn new(root: &Path, namespace: &str, sandbox_id: &str) -> Result<Self> {
        id::validate("namespace", namespace)?;
        id::validate("sandbox", sandbox_id)?;
        Ok(Self { root: root.into(), path: root.join(namespace).join(sandbox_id) })
    }

    /// The directory of all pods.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The pod's namespace and id.
    pub fn name(&self) -> String {
        self.path.strip_prefix(&self.root).unwrap_or(&self.path).display().to_string()
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the pod's own files are, which containers can have mounted.
    pub fn files(&self) -> PathBuf {
        self.path.join("files")
    }

    /// What virtio-fs serves. Mounts for a container go below its name.
    pub fn share(&self) -> PathBuf {
        self.path.join("share")
    }

    /// Where mount points are made; each appears under the same name in [`StateDir::share`].
    pub fn tree(&self) -> PathBuf {
        self.path.join("tree")
    }

    /// Makes the directory and mounts the share.
    ///
    /// # Errors
    /// [`Error::AlreadyExists`], or the step that failed; then [`StateDir::remove`] takes away what was made.
    pub fn create(&self) -> Result<()> {
        match self.create_path() {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                let id = self.path.file_name().unwrap_or_default().to_string_lossy().into();
                return Err(Error::AlreadyExists { kind: "sandbox", id });
            }
            created => created.map_err(file("create", &self.path))?,
        }
        for path in [self.tree(), self.share()] {
            DirBuilder::new().mode(0o755).create(&path).map_err(file("create", &path))?;
        }
        self.mount_share()
    }

    fn create_path(&self) -> io::Result<()> {
        let parent = self.path.parent().unwrap_or(Path::new(ROOT));
        let mut attempts = 0;
        loop {
            DirBuilder::new().recursive(true).mode(0o711).create(parent)?;
            match DirBuilder::new().mode(0o711).create(&self.path) {
                // Another pod of the namespace, the last so far, has just gone and taken the parent with it.
                Err(error) if error.kind() == io::ErrorKind::NotFound && attempts < 16 => attempts += 1,
                created => return created,
            }
        }
    }

    fn mount_share(&self) -> Result<()> {
        let (tree, share) = (self.tree(), self.share());
        let step = |source: Option<&Path>, flags: MsFlags| {
            mount(source, &share, None::<&str>, flags, None::<&str>).map_err(|errno| Error::Mount {
                what: "the share".into(),
                target: share.clone(),
                reason: errno.desc().into(),
            })
        };
        step(Some(&tree), MsFlags::MS_BIND)?;
        // First out of the peer group of /run, then into one of its own.
        step(None, MsFlags::MS_PRIVATE)?;
        step(None, MsFlags::MS_SHARED)?;
        let read_only = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        step(None, MsFlags::MS_REMOUNT | MsFlags::MS_BIND | read_only)
    }

    /// Writes what `delete` needs.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn write_record(&self, record: &Record) -> Result<()> {
        let path = self.path.join("vmm.json");
        let text = serde_json::to_vec(record).map_err(io::Error::from).map_err(file("encode", &path))?;
        fs::write(&path, text).map_err(file("write", &path))
    }

    /// What [`StateDir::write_record`] wrote, if it did.
    pub fn read_record(&self) -> Option<Record> {
        serde_json::from_slice(&fs::read(self.path.join("vmm.json")).ok()?).ok()
    }

    /// Unmounts everything below and removes the directory. Fine when there is none.
    ///
    /// # Errors
    /// [`Error::Mount`] or [`Error::File`]. Nothing is removed while anything is mounted: it would be removed from
    /// what is mounted.
    pub fn remove(&self) -> Result<()> {
        unmount_below(&self.path)?;
        match fs::remove_dir_all(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(file("remove", &self.path)(error));
            }
            _ => {}
        }
        // The namespace's directory goes with its last pod; one that other pods use is not empty.
        if let Some(parent) = self.path.parent() {
            let _ = fs::remove_dir(parent);
        }
        Ok(())
    }
}

/// Unmounts `path` and everything below it. The kernel does it when the last user is gone, so this never waits. Others may do the
/// same at the same time: containerd has a pod and its containers cleaned up side by side.
///
/// # Errors
/// [`Error::Mount`] when something is still mounted afterwards.
pub fn unmount_below(path: &Path) -> Result<()> {
    let failed = |reason: String| Error::Mount {
        what: "nothing".into(),
        target: path.into(),
        reason: format!("unmounting failed: {reason}"),
    };
    let name = path.to_str().ok_or_else(|| failed("the path is not UTF-8".into()))?;
    let mut attempts = 3;
    loop {
        let tried = umount_recursive(Some(name), MntFlags::MNT_DETACH.bits());
        let Some(point) = mounted_below(path).map_err(|error| failed(error.to_string()))? else {
            return Ok(());
        };
        attempts -= 1;
        if attempts == 0 {
            return Err(failed(match tried {
                Ok(()) => format!("{point} is still mounted"),
                Err(error) => error.to_string(),
            }));
        }
    }
}

/// A mount point at `path` or below it, if there is one.
fn mounted_below(path: &Path) -> io::Result<Option<String>> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    // The fifth field is the mount point, proc_pid_mountinfo(5).
    let mut points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
    Ok(points.find(|point| Path::new(point).starts_with(path)).map(str::to_owned))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_would_leave_the_root_are_refused() {
        for (namespace, id) in [("../x", "a"), ("default", "../../etc"), ("default", "a/b"), ("", "a")] {
            assert!(StateDir::new(Path::new(ROOT), namespace, id).is_err(), "{namespace} {id}");
        }
    }

    #[test]
    fn the_record_survives_being_written() {
        let root = tempfile::tempdir().unwrap();
        let dir = StateDir::new(root.path(), "ns", "pod").unwrap();
        assert_eq!(dir.read_record(), None);
        fs::create_dir_all(dir.path()).unwrap();
        let record = Record { pid: 7, start_time: 99, cgroup: Some("/sys/fs/cgroup/x".into()), uid: Some(5) };
        dir.write_record(&record).unwrap();
        assert_eq!(dir.read_record(), Some(record));
    }

    #[test]
    fn removing_what_is_not_there_is_fine() {
        let root = tempfile::tempdir().unwrap();
        StateDir::new(root.path(), "ns", "pod").unwrap().remove().unwrap();
    }

    #[test]
    fn the_share_shows_the_tree_and_the_end_leaves_nothing() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIPPED: needs root: mounts");
            return;
        }
        let root = tempfile::tempdir().unwrap();
        let dir = StateDir::new(root.path(), "ns", "pod").unwrap();
        dir.create().unwrap();
        assert!(matches!(dir.create(), Err(Error::AlreadyExists { .. })));
        fs::create_dir(dir.tree().join("c")).unwrap();
        assert!(dir.share().join("c").is_dir());
        let error = fs::create_dir(dir.share().join("d")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem);
        dir.remove().unwrap();
        assert!(!dir.path().exists());
    }

    #[test]
    fn two_may_unmount_the_same() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIPPED: needs root: mounts");
            return;
        }
        let root = tempfile::tempdir().unwrap();
        for round in 0..20 {
            let path = root.path().join(round.to_string());
            for name in 0..20 {
                let target = path.join(name.to_string());
                fs::create_dir_all(&target).unwrap();
                let tmpfs = Some("tmpfs");
                mount(tmpfs, &target, tmpfs, MsFlags::empty(), None::<&str>).unwrap();
            }
            // As one who removes a directory right after its mount.
            let remove = || unmount_below(&path).map(|()| fs::remove_dir_all(&path));
            std::thread::scope(|scope| {
                let other = scope.spawn(remove);
                remove().unwrap().ok();
                other.join().unwrap().unwrap().ok();
            });
            assert_eq!(mounted_below(&path).unwrap(), None);
        }
    }
}
