//! The `delete` command: cleans up after a shim that is dead, with no agent and no VMM to ask. containerd runs it for every
//! container that is gone, so also while the pod's shim lives and serves others.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, SystemTime};
use std::{env, fs};

use containerd_shim::Flags;
use containerd_shim_protos::api::DeleteResponse;
use protobuf::{Message, MessageField};

use crate::pidfd::PidFd;
use crate::process::KILLED;
use crate::start::{ADDRESS_FILE, socket_path, unlink_socket};
use crate::state_dir::{self, Record, StateDir};
use crate::{Error, Result, cgroup, id, spec, storage, uids};

/// How long a killed VMM may take for its end.
const PATIENCE: Duration = Duration::from_secs(10);

/// Runs the command; gives the reply for standard output.
///
/// # Errors
/// What could not be taken away.
pub fn run(flags: &Flags) -> Result<Vec<u8>> {
    id::validate("container", &flags.id)?;
    let bundle = bundle(flags)?;
    // Where config.json is gone or broken the container was a pod of its own, or never got as far as a VM.
    let sandbox_id = spec::sandbox_id(&bundle, &flags.id).unwrap_or_else(|_| flags.id.clone());
    let dir = StateDir::new(Path::new(state_dir::ROOT), &flags.namespace, &sandbox_id)?;
    let pid = dir.read_record().map_or(0, |record| record.pid);
    let address = fs::read_to_string(bundle.join(ADDRESS_FILE)).unwrap_or_default();
    clean_up(&dir, &flags.id, sandbox_id == flags.id, socket_path(address.trim()))?;
    DeleteResponse {
        pid: pid.unsigned_abs(),
        exit_status: KILLED,
        exited_at: MessageField::some(SystemTime::now().into()),
        ..Default::default()
    }
    .write_to_bytes()
    .map_err(|error| Error::Protocol(error.to_string()))
}

/// Takes away what is left of a container; with the pod itself, or after its shim's end, of the VM.
fn clean_up(dir: &StateDir, container_id: &str, is_pod: bool, socket: &Path) -> Result<()> {
    if !is_pod && UnixStream::connect(socket).is_ok() {
        // The shim has taken away what belonged to this one, and goes on with the others.
        return Ok(());
    }
    // The VM of a pod ends with its shim, whichever of its containers containerd asks about first.
    kill_vmm(dir)?;
    if is_pod {
        remove(dir)?;
    } else {
        storage::detach(dir, container_id)?;
    }
    unlink_socket(socket);
    Ok(())
}

fn bundle(flags: &Flags) -> Result<std::path::PathBuf> {
    if !flags.bundle.is_empty() {
        return Ok(flags.bundle.clone().into());
    }
    env::current_dir().map_err(crate::error::system("ask for the working directory"))
}

/// Makes a pod's directory. What a dead pod of the same name has left is taken away first.
///
/// # Errors
/// [`Error::AlreadyExists`] when that pod is alive, or the step that failed.
pub fn make_anew(dir: &StateDir) -> Result<()> {
    match dir.create() {
        Err(Error::AlreadyExists { kind, id }) => {
            if dir.read_record().is_some_and(|record| start_time(record.pid) == Some(record.start_time)) {
                return Err(Error::AlreadyExists { kind, id });
            }
            remove(dir)?;
            dir.create()
        }
        created => created,
    }
    .inspect_err(|error| {
        if !matches!(error, Error::AlreadyExists { .. }) {
            // The first error says more than that this one could not be undone.
            let _ = dir.remove();
        }
    })
}

fn remove(dir: &StateDir) -> Result<()> {
    let Record { cgroup, uid, .. } = dir.read_record().unwrap_or_default();
    if let Some(uid) = uid {
        uids::clear(dir.root(), uid, PATIENCE);
    }
    if let Some(directory) = cgroup {
        cgroup::remove_when_empty(&directory, PATIENCE);
    }
    dir.remove()
}

/// Kills the VMM that the directory names, and no other process that has got its pid since.
fn kill_vmm(dir: &StateDir) -> Result<()> {
    let Some(record) = dir.read_record() else {
        return Ok(());
    };
    let Ok(vmm) = PidFd::open(record.pid) else {
        return Ok(());
    };
    // The descriptor stands for whoever has the pid now; only the start time tells who that is.
    if start_time(record.pid) != Some(record.start_time) {
        return Ok(());
    }
    vmm.kill();
    if vmm.wait(PATIENCE) {
        return Ok(());
    }
    let source = std::io::Error::other(format!("process {} does not end", record.pid));
    Err(Error::System { operation: "kill the VMM", source })
}

/// When a process started, in clock ticks since boot: proc_pid_stat(5), field 22. None for no process.
pub fn start_time(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field, the name in parentheses, may hold anything; the third follows its last parenthesis.
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_whitespace().nth(22 - 3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;
    use std::process::{Command, Stdio};

    fn dir() -> (tempfile::TempDir, StateDir) {
        let root = tempfile::tempdir().unwrap();
        let dir = StateDir::new(root.path(), "ns", "pod").unwrap();
        fs::create_dir_all(dir.path()).unwrap();
        (root, dir)
    }

    fn sleeper() -> std::process::Child {
        Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn().unwrap()
    }

    /// A process that the directory names as the VMM.
    fn recorded_vmm(dir: &StateDir) -> std::process::Child {
        let child = sleeper();
        let pid = child.id() as i32;
        let record = Record { pid, start_time: start_time(pid).unwrap(), ..Default::default() };
        dir.write_record(&record).unwrap();
        child
    }

    #[test]
    fn the_recorded_vmm_is_killed() {
        let (_root, dir) = dir();
        let mut child = recorded_vmm(&dir);
        kill_vmm(&dir).unwrap();
        assert!(!child.wait().unwrap().success());
    }

    #[test]
    fn a_pod_that_is_served_outlives_its_containers() {
        let (root, dir) = dir();
        let mut child = recorded_vmm(&dir);
        let socket = root.path().join("socket");
        let shim = UnixListener::bind(&socket).unwrap();

        clean_up(&dir, "c", false, &socket).unwrap();
        assert!(child.try_wait().unwrap().is_none() && socket.exists());

        drop(shim);
        clean_up(&dir, "c", false, &socket).unwrap();
        assert!(!child.wait().unwrap().success() && !socket.exists());
    }

    #[test]
    fn what_a_dead_pod_had_is_free_again() {
        let (root, dir) = dir();
        let uid = crate::config::Uids::default().first;
        let lease = root.path().join(format!("uid:{uid}"));
        fs::write(&lease, "ns/pod").unwrap();
        dir.write_record(&Record { uid: Some(uid), ..Default::default() }).unwrap();
        remove(&dir).unwrap();
        assert!(!lease.exists() && !dir.path().exists());
    }

    #[test]
    fn another_process_with_the_same_pid_is_left_alone() {
        let (_root, dir) = dir();
        let mut child = sleeper();
        let pid = child.id() as i32;
        dir.write_record(&Record { pid, start_time: 1, ..Default::default() }).unwrap();
        kill_vmm(&dir).unwrap();
        assert!(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_process_has_a_start_time_and_none_has_none() {
        assert!(start_time(std::process::id() as i32).unwrap() > 0);
        assert_eq!(start_time(i32::MAX), None);
    }
}
