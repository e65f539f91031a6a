//! The pod's cgroup on the host. The VMM lives in it, so the host accounts for what the pod really uses.

use std::path::{Path, PathBuf};
use std::{fs, io};

use crate::Result;
use crate::error::file;

/// Where the host's cgroup v2 hierarchy is mounted.
pub const MOUNT: &str = "/sys/fs/cgroup";

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

/// Makes `directory` and puts the process into it. Gives what was made, the innermost first.
///
/// # Errors
/// [`crate::Error::File`]; what was made is gone again.
pub fn enter(directory: &Path, pid: i32) -> Result<Vec<PathBuf>> {
    let mut made = Vec::new();
    // Another pod that ends may take a common parent away just now.
    let result = make(directory, &mut made).or_else(|_| make(directory, &mut made)).and_then(|()| {
        let procs = directory.join("cgroup.procs");
        fs::write(&procs, pid.to_string()).map_err(file("move the VMM into", procs))
    });
    if let Err(error) = result {
        remove(&made);
        return Err(error);
    }
    Ok(made)
}

fn make(directory: &Path, made: &mut Vec<PathBuf>) -> Result<()> {
    if let Some(parent) = directory.parent().filter(|parent| !parent.exists()) {
        make(parent, made)?;
    }
    match fs::create_dir(directory) {
        Ok(()) => made.insert(0, directory.into()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(file("create", directory)(error)),
    }
    Ok(())
}

/// Removes cgroups, the innermost first. One that another pod has come to use stays.
pub fn remove(made: &[PathBuf]) {
    for directory in made {
        if fs::remove_dir(directory).is_err() {
            break;
        }
    }
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
    fn only_what_was_made_is_removed() {
        let mount = tempfile::tempdir().unwrap();
        let inner = mount.path().join("default/c1");
        let mut made = Vec::new();
        make(&inner, &mut made).unwrap();
        assert_eq!(made, [inner.clone(), mount.path().join("default")]);
        fs::create_dir(mount.path().join("default/c2")).unwrap();
        remove(&made);
        assert!(!inner.exists() && mount.path().join("default/c2").exists());
    }
}
