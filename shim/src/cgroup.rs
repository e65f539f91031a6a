//! The pod's cgroup on the host. The VMM lives in it, so the host accounts for what the pod really uses.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::fs::{XattrFlags, getxattr, setxattr};

use crate::Result;
use crate::error::file;

/// Where the host's cgroup v2 hierarchy is mounted.
pub const MOUNT: &str = "/sys/fs/cgroup";

/// How many threads a VMM may have, several times what the largest machine needs.
const MAX_THREADS: &str = "512";

/// Tells the cgroups that a pod has made from those of the kubelet or of systemd.
const MADE_BY_MAYU: &str = "user.mayu";

/// The directory that a spec's `cgroupsPath` names: a path below the mount, or systemd's `slice:prefix:name`,
/// which is laid out as systemd would (systemd.slice(5)).
pub fn directory(mount: &Path, cgroups_path: &Path) -> PathBuf {
    let text = cgroups_path.to_string_lossy();
    let relative = match text.split(':').collect::<Vec<_>>()[..] {
        [slice, prefix, name] => expand_slice(slice).join(scope(prefix, name)),
        _ => PathBuf::from(text.trim_start_matches('/')),
    };
    // Only names: a path of the spec must not leave the hierarchy.
    let names = relative.components().filter(|part| matches!(part, std::path::Component::Normal(_)));
    names.fold(mount.to_path_buf(), |path, name| path.join(name))
}

fn expand_slice(slice: &str) -> PathBuf {
    let stem = slice.strip_suffix(".slice").unwrap_or(slice);
    let ends = stem.match_indices('-').map(|(index, _)| index).chain([stem.len()]);
    ends.filter(|end| *end > 0).map(|end| format!("{}.slice", &stem[..end])).collect()
}

fn scope(prefix: &str, name: &str) -> String {
    if name.ends_with(".slice") { name.into() } else { format!("{prefix}-{name}.scope") }
}

/// Makes `directory`, and opens it for a process to be put there.
///
/// # Errors
/// [`crate::Error::File`]; what was made is gone again.
pub fn make(directory: &Path) -> Result<OwnedFd> {
    // Another pod that ends may take a common parent away just now.
    let result = make_path(directory).or_else(|_| make_path(directory)).and_then(|()| {
        bound_threads(directory);
        File::open(directory).map_err(file("open", directory))
    });
    if result.is_err() {
        remove(directory);
    }
    result.map(OwnedFd::from)
}

fn make_path(directory: &Path) -> Result<()> {
    if let Some(parent) = directory.parent().filter(|parent| !parent.exists()) {
        make_path(parent)?;
        // Threads are counted below it, if they are counted in it; those who make a cgroup for a pod see to that themselves.
        write(&parent.join("cgroup.subtree_control"), "+pids");
    }
    match fs::create_dir(directory) {
        // Where it cannot be marked, it stays behind empty, which does no harm.
        Ok(()) => drop(setxattr(directory, MADE_BY_MAYU, b"1", XattrFlags::empty())),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(file("create", directory)(error)),
    }
    Ok(())
}

/// Only in a cgroup of the pod's own; where there is no controller for it, the VMM's filters have to do.
fn bound_threads(directory: &Path) {
    if is_made_by_mayu(directory) {
        write(&directory.join("pids.max"), MAX_THREADS);
    }
}

/// Writes to a file of a cgroup, where it is there and takes it.
fn write(path: &Path, text: &str) {
    let file = OpenOptions::new().write(true).open(path);
    let _ = file.and_then(|mut file| file.write_all(text.as_bytes()));
}

fn is_made_by_mayu(directory: &Path) -> bool {
    getxattr(directory, MADE_BY_MAYU, &mut [0; 1]).is_ok()
}

/// Removes the pod's cgroup, and its parents as far as a pod has made them and nothing else uses them: the last pod
/// takes away what the first one made.
pub fn remove(directory: &Path) {
    for directory in directory.ancestors() {
        if !is_made_by_mayu(directory) || fs::remove_dir(directory).is_err() {
            break;
        }
    }
}

/// The same for the cgroup of a shim that is dead, whose VMM may be about to end as well, and be known by nothing but this: waits no longer
/// than `patience` for that.
pub fn remove_when_empty(directory: &Path, patience: Duration) {
    let begun = Instant::now();
    while is_made_by_mayu(directory) && is_populated(directory) && begun.elapsed() < patience {
        sleep(Duration::from_millis(10));
    }
    remove(directory);
}

/// Whether there are processes (Documentation/admin-guide/cgroup-v2.rst, "(Un)populated Notification").
fn is_populated(directory: &Path) -> bool {
    let events = fs::read_to_string(directory.join("cgroup.events")).unwrap_or_default();
    events.lines().any(|line| line == "populated 1")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_both_cgroup_drivers() {
        let table = [
            ("/default/c1", "/cg/default/c1"),
            ("kubepods/burstable/pod1/c1", "/cg/kubepods/burstable/pod1/c1"),
            (
                "kubepods-besteffort-pod1.slice:cri-containerd:c1",
                "/cg/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1.slice/cri-containerd-c1.scope",
            ),
            ("system.slice:docker:c1", "/cg/system.slice/docker-c1.scope"),
            ("/../../etc", "/cg/etc"),
        ];
        for (path, expected) in table {
            assert_eq!(directory(Path::new("/cg"), Path::new(path)), Path::new(expected), "{path}");
        }
    }

    #[test]
    fn the_last_pod_removes_what_the_first_one_made_and_no_more() {
        let mount = tempfile::tempdir().unwrap();
        let kubelet = mount.path().join("kubepods");
        fs::create_dir(&kubelet).unwrap();
        let pods = ["kubepods/pods/1", "kubepods/pods/2"].map(|path| mount.path().join(path));
        for pod in &pods {
            make(pod).unwrap();
        }

        remove(&pods[0]);
        assert!(!pods[0].exists() && pods[1].exists());

        remove(&pods[1]);
        assert!(fs::read_dir(&kubelet).unwrap().next().is_none());
    }

    #[test]
    fn a_vmm_may_end_after_its_shim_and_the_cgroup_goes_then() {
        let mount = tempfile::tempdir().unwrap();
        let pod = mount.path().join("pod");
        make(&pod).unwrap();
        // The kernel takes its own files away with the directory; here they are in the way of it.
        let events = pod.join("cgroup.events");
        fs::write(&events, "populated 1\nfrozen 0\n").unwrap();
        remove_when_empty(&pod, Duration::ZERO);
        assert!(pod.exists());

        let vmm = std::thread::spawn(move || {
            sleep(Duration::from_millis(50));
            fs::remove_file(events).unwrap();
        });
        remove_when_empty(&pod, Duration::from_secs(60));
        vmm.join().unwrap();
        assert!(!pod.exists());
    }
}
