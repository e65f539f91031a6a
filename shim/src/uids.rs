//! The uid of a pod's VMM: one that no other pod's has, for as long as the pod lives.
//!
//! ```text
//! /run/mayu/uid:<uid>      names the pod; the shim holds a lock on it (flock(2))
//! ```
//!
//! The kernel gives up the lock of a shim that dies, however it does. The VMM may take a moment longer, so a file that
//! nobody holds and that names a pod is used again when no process runs as that uid. A VMM that has not changed its user by
//! then has no guest that runs, and never will: its shim is gone.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};

use crate::config::Uids;
use crate::error::file;
use crate::pidfd::PidFd;
use crate::{Error, Result};

/// A uid that is one pod's. Dropping it frees the uid, unless a process still runs as it.
#[derive(Debug)]
pub struct Lease {
    uid: u32,
    path: PathBuf,
    lock: File,
}

impl Lease {
    /// Takes the first uid of the range that is free. `root` is the directory of all pods, `pod` is for those who want to
    /// know whose it is.
    ///
    /// # Errors
    /// [`Error::NoUid`] when there is none, or [`Error::File`].
    pub fn take(root: &Path, uids: Uids, pod: &str) -> Result<Self> {
        for uid in uids.range() {
            let path = path(root, uid);
            let Some(mut lock) = lock(&path, true).map_err(file("lock", &path))? else {
                continue;
            };
            if is_left_behind(&lock).map_err(file("look at", &path))? {
                if users().map_err(file("list the processes in", "/proc"))?.contains_key(&uid) {
                    continue;
                }
                lock.set_len(0).map_err(file("empty", &path))?;
            }
            lock.write_all(pod.as_bytes()).map_err(file("write", &path))?;
            return Ok(Self { uid, path, lock });
        }
        Err(Error::NoUid { uids, root: root.into() })
    }

    /// The uid.
    pub fn uid(&self) -> u32 {
        self.uid
    }

    /// Frees the uid. For when the VMM is known to be gone.
    pub fn release(&self) {
        // A second time the name may be that of somebody else's lease.
        if is_there(&self.lock) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if is_there(&self.lock) && users().is_ok_and(|in_use| !in_use.contains_key(&self.uid)) {
            self.release();
        }
    }
}

/// Frees the uid of a shim that is dead, whose VMM is about to end as well: waits no longer than `patience` for that. Fine when
/// another one has it by now.
pub fn clear(root: &Path, uid: u32, patience: Duration) {
    let path = path(root, uid);
    if let Ok(Some(lock)) = lock(&path, false) {
        if let Ok(in_use) = users()
            && let Some(pid) = in_use.get(&uid)
            && let Ok(vmm) = PidFd::open(*pid)
        {
            vmm.wait(patience);
        }
        drop(Lease { uid, path, lock });
    }
}

fn path(root: &Path, uid: u32) -> PathBuf {
    // No namespace of containerd has a colon in its name.
    root.join(format!("uid:{uid}"))
}

/// The file, locked. None if somebody else holds it.
fn lock(path: &Path, create: bool) -> io::Result<Option<File>> {
    loop {
        let file = File::options().write(true).create(create).truncate(false).mode(0o600).open(path)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            // It was given back in between, and the name may be another file's.
            Ok(()) if !is_there(&file) => {}
            Ok(()) => return Ok(Some(file)),
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Whether a locked file still has its name.
fn is_there(file: &File) -> bool {
    file.metadata().is_ok_and(|metadata| metadata.nlink() > 0)
}

/// Whether a shim has had this lease and not given it back. It writes into the file before it starts the VMM.
fn is_left_behind(file: &File) -> io::Result<bool> {
    Ok(file.metadata()?.len() > 0)
}

/// The uids that the host's processes run as, and one process of each: proc_pid_status(5). Who owns a process's directory
/// would not tell, since that is root for one that forbids being traced.
fn users() -> io::Result<HashMap<u32, i32>> {
    let mut users = HashMap::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        // One that has just ended has no such file.
        let Ok(status) = fs::read_to_string(entry.path().join("status")) else { continue };
        let field = |name| status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(":\t"));
        // One that has ended with all its threads, and waits for its parent to ask how.
        if field("State").is_some_and(|state| state.starts_with('Z')) && field("Threads") == Some("1") {
            continue;
        }
        let uids = field("Uid").unwrap_or_default().split_whitespace();
        users.extend(uids.filter_map(|uid| uid.parse::<u32>().ok()).map(|uid| (uid, pid)));
    }
    Ok(users)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::os::unix::process::CommandExt as _;
    use std::process::{Child, Command, Stdio};

    const UIDS: Uids = Uids { first: 2_130_710_000, count: 3 };

    fn take(root: &Path) -> Result<Lease> {
        Lease::take(root, UIDS, "ns/pod")
    }

    /// What a shim that dies leaves: the file, and no lock on it.
    fn left_behind(root: &Path, uid: u32) {
        fs::write(path(root, uid), "ns/dead").unwrap();
    }

    /// A process with this uid, as a VMM that outlives its shim.
    fn process_as(uid: u32) -> Option<Child> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIPPED: needs root: processes of other users");
            return None;
        }
        Some(Command::new("sleep").arg("1000").uid(uid).stdin(Stdio::null()).spawn().unwrap())
    }

    #[test]
    fn pods_side_by_side_have_different_uids_and_the_last_one_too_many_is_told_why() {
        let root = tempfile::tempdir().unwrap();
        let leases: Vec<_> = (0..3).map(|_| take(root.path()).unwrap()).collect();
        let uids: Vec<_> = leases.iter().map(Lease::uid).collect();
        assert_eq!(uids, UIDS.range().collect::<Vec<_>>());

        let message = take(root.path()).unwrap_err().to_string();

        for words in ["3 uids", "2130710000", "vm.uids", root.path().to_str().unwrap()] {
            assert!(message.contains(words), "{message}");
        }
    }

    #[test]
    fn shims_that_start_at_the_same_time_never_get_the_same() {
        let root = tempfile::tempdir().unwrap();
        let uids = Uids { count: 64, ..UIDS };
        let (taken, turns) = (std::sync::Mutex::new(HashSet::new()), 200);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..turns {
                        let lease = Lease::take(root.path(), uids, "ns/pod").unwrap();
                        assert!(taken.lock().unwrap().insert(lease.uid()), "{} twice", lease.uid());
                        assert!(taken.lock().unwrap().remove(&lease.uid()));
                        lease.release();
                    }
                });
            }
        });
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_uid_that_was_given_back_is_the_next_pod_s_and_stays_so() {
        let root = tempfile::tempdir().unwrap();
        let first = take(root.path()).unwrap();
        first.release();
        let next = take(root.path()).unwrap();
        assert_eq!(next.uid(), first.uid());

        first.release();
        drop(first);

        assert_ne!(take(root.path()).unwrap().uid(), next.uid());
    }

    #[test]
    fn a_dead_shim_s_uid_is_free_and_its_name_is_replaced() {
        let root = tempfile::tempdir().unwrap();
        left_behind(root.path(), UIDS.first);
        let lease = take(root.path()).unwrap();
        assert_eq!(lease.uid(), UIDS.first);
        assert_eq!(fs::read_to_string(path(root.path(), UIDS.first)).unwrap(), "ns/pod");
        drop(lease);
        assert!(!path(root.path(), UIDS.first).exists());
    }

    #[test]
    fn a_uid_is_not_free_while_a_process_runs_as_it() {
        // Another range than the other tests': they run at the same time.
        let uids = Uids { first: UIDS.first + 100, count: 2 };
        let Some(mut vmm) = process_as(uids.first) else { return };
        let root = tempfile::tempdir().unwrap();
        left_behind(root.path(), uids.first);

        let other = Lease::take(root.path(), uids, "ns/pod").unwrap();
        assert_eq!(other.uid(), uids.first + 1);
        clear(root.path(), uids.first, Duration::ZERO);
        assert!(path(root.path(), uids.first).exists());

        vmm.kill().unwrap();
        clear(root.path(), uids.first, Duration::from_secs(30));
        assert!(!path(root.path(), uids.first).exists(), "it has ended, though nobody has asked how");
        vmm.wait().unwrap();
        assert_eq!(Lease::take(root.path(), uids, "ns/pod").unwrap().uid(), uids.first);
    }

    #[test]
    fn clearing_leaves_a_living_pod_alone() {
        let root = tempfile::tempdir().unwrap();
        let lease = take(root.path()).unwrap();
        clear(root.path(), lease.uid(), Duration::ZERO);
        clear(root.path(), UIDS.first + 1, Duration::ZERO);
        assert_eq!(take(root.path()).unwrap().uid(), UIDS.first + 1);
    }
}
