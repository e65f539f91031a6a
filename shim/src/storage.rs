//! A container's root filesystem and bind mounts, on the pod's share.

use std::fs::{self, OpenOptions};
use std::io;
use std::path::{Component, Path, PathBuf};
use std::thread;

use containerd_shim::mount::mount_rootfs;
use containerd_shim_protos::types::mount::Mount;
use nix::mount::{MsFlags, mount};
use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use crate::error::file;
use crate::mount_attr::{Depth, Propagation, set_inert, set_propagation, set_read_only};
use crate::spec::{Bind, ReadOnly};
use crate::state_dir::{StateDir, unmount_below};
use crate::{Error, Result};

/// How a root filesystem is mounted, beside what the snapshotter says: an image may hold the nodes of devices, and they would
/// be the host's for a VMM that has been taken over.
const INERT: [&str; 3] = ["nodev", "nosuid", "noexec"];

/// What a container sees of the host's files.
#[derive(Debug)]
pub struct Storage {
    /// The container's place on the share.
    pub place: String,
    /// What containerd's snapshotter wants mounted as the root, in order. May be empty.
    pub rootfs: Vec<Mount>,
    /// The root directory when `rootfs` is empty.
    pub root: PathBuf,
    /// Bind mounts; the n-th goes to `mounts/<n>`.
    pub binds: Vec<Bind>,
}

impl Storage {
    /// Mounts everything under the share. Blocks.
    ///
    /// # Errors
    /// The mount that failed. What was mounted before stays until [`detach`].
    pub fn attach(&self, dir: &StateDir) -> Result<()> {
        let tree = dir.tree().join(&self.place);
        for path in [tree.clone(), tree.join("rootfs"), tree.join("mounts")] {
            fs::create_dir(&path).map_err(file("create", &path))?;
        }
        let share = dir.share().join(&self.place);
        self.attach_rootfs(&share.join("rootfs"))?;
        for (index, bind) in self.binds.iter().enumerate() {
            attach_bind(bind, &tree.join("mounts"), &share.join("mounts"), &index.to_string())?;
        }
        Ok(())
    }

    fn attach_rootfs(&self, target: &Path) -> Result<()> {
        if self.rootfs.is_empty() {
            return bind_root(&self.root, target, Depth::AllBelow, ReadOnly::No);
        }
        for layer in &self.rootfs {
            let target = below(target, &layer.target)?;
            let has = |option: &str| layer.options.iter().any(|other| other == option);
            if has("bind") || has("rbind") {
                let depth = if has("rbind") { Depth::AllBelow } else { Depth::Itself };
                let read_only = if has("ro") { ReadOnly::Itself } else { ReadOnly::No };
                bind_root(Path::new(&layer.source), &target, depth, read_only)?;
            } else {
                mount_layer(layer, &target)?;
            }
        }
        cut_off(target)
    }
}

fn bind_root(source: &Path, target: &Path, depth: Depth, read_only: ReadOnly) -> Result<()> {
    let bind = Bind {
        source: source.into(),
        destination: "/".into(),
        recursive: depth == Depth::AllBelow,
        read_only,
        follows: true,
    };
    bind_mount(&bind, target).map_err(|error| Error::Mount {
        what: format!("the root filesystem {}", source.display()),
        target: target.into(),
        reason: error.to_string(),
    })
}

/// Takes away what [`Storage::attach`] mounted, also when it failed half way. Blocks.
///
/// # Errors
/// [`Error::Mount`] or [`Error::File`].
pub fn detach(dir: &StateDir, place: &str) -> Result<()> {
    unmount_below(&dir.share().join(place))?;
    let tree = dir.tree().join(place);
    match fs::remove_dir_all(&tree) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(file("remove", tree)(error)),
        _ => Ok(()),
    }
}

/// In a thread of its own: for a long list of overlay layers `mount_rootfs` changes the thread's working
/// directory to shorten the paths, since mount(2) takes no more than a page of options.
fn mount_layer(layer: &Mount, target: &Path) -> Result<()> {
    let kind = Some(layer.type_.as_str()).filter(|kind| !kind.is_empty());
    let source = Some(layer.source.as_str()).filter(|source| !source.is_empty());
    let inert = INERT.map(str::to_owned);
    let options = [&layer.options[..], &inert[..]].concat();
    let mounted = thread::scope(|scope| {
        scope.spawn(|| mount_rootfs(kind, source, &options, target).map_err(|error| error.to_string())).join()
    });
    let reason = match mounted {
        Ok(Ok(())) => return Ok(()),
        Ok(Err(reason)) => reason,
        Err(_) => "the mounting thread ended early".into(),
    };
    let what = format!("{} {} ({})", layer.type_, layer.source, layer.options.join(","));
    Err(Error::Mount { what, target: target.into(), reason })
}

/// A path of the client below `base`, which it must not leave.
fn below(base: &Path, path: &str) -> Result<PathBuf> {
    let path = Path::new(path.trim_start_matches('/'));
    if path.components().all(|component| matches!(component, Component::Normal(_) | Component::CurDir)) {
        return Ok(base.join(path));
    }
    Err(Error::InvalidArgument(format!("rootfs mount target {} leaves the root filesystem", path.display())))
}

fn attach_bind(bind: &Bind, tree: &Path, share: &Path, name: &str) -> Result<()> {
    let unusable = |source| Error::MountSource {
        destination: bind.destination.clone(),
        path: bind.source.clone(),
        source,
    };
    let point = tree.join(name);
    if fs::metadata(&bind.source).map_err(&unusable)?.is_dir() {
        fs::create_dir(&point).map_err(file("create", &point))?;
    } else {
        OpenOptions::new().write(true).create_new(true).open(&point).map_err(file("create", &point))?;
    }
    bind_mount(bind, &share.join(name)).map_err(unusable)
}

/// Clones what is mounted at the source, restricts it, and puts it in place. The VMM gets a copy of the mount as it is at
/// that moment, so nothing may be left to be changed afterwards.
fn bind_mount(bind: &Bind, target: &Path) -> io::Result<()> {
    let clone = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let depth = if bind.recursive { OpenTreeFlags::AT_RECURSIVE } else { OpenTreeFlags::empty() };
    let tree = open_tree(CWD, &bind.source, clone | depth)?;
    let propagation = if bind.follows { Propagation::FromSource } else { Propagation::None };
    set_propagation(&tree, propagation)?;
    set_inert(&tree)?;
    match bind.read_only {
        ReadOnly::No => {}
        ReadOnly::Itself => set_read_only(&tree, Depth::Itself)?,
        ReadOnly::AllBelow => set_read_only(&tree, Depth::AllBelow)?,
    }
    Ok(move_mount(&tree, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
}

/// Later mounts on the source still arrive; unmounting here no longer unmounts there.
fn cut_off(target: &Path) -> Result<()> {
    let flags = MsFlags::MS_SLAVE | MsFlags::MS_REC;
    mount(None::<&str>, target, None::<&str>, flags, None::<&str>).map_err(|errno| Error::Mount {
        what: "as a slave".into(),
        target: target.into(),
        reason: errno.desc().into(),
    })
}

#[cfg(test)]
mod tests {
    use rustix::fs::{FileType, Mode, mknodat};

    use super::*;

    struct Pod {
        root: tempfile::TempDir,
        dir: StateDir,
    }

    impl Drop for Pod {
        fn drop(&mut self) {
            self.dir.remove().unwrap();
        }
    }

    fn pod() -> Option<Pod> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIPPED: needs root: mounts");
            return None;
        }
        let root = tempfile::tempdir().unwrap();
        let dir = StateDir::new(&root.path().join("run"), "ns", "pod").unwrap();
        dir.create().unwrap();
        Some(Pod { root, dir })
    }

    fn storage(pod: &Pod, binds: Vec<Bind>) -> Storage {
        let root = pod.root.path().join("root");
        fs::create_dir_all(&root).unwrap();
        fs::write(root.join("hello"), "world").unwrap();
        Storage { place: "c".into(), rootfs: vec![], root, binds }
    }

    fn bind(source: PathBuf, read_only: bool) -> Bind {
        let read_only = if read_only { ReadOnly::Itself } else { ReadOnly::No };
        Bind { source, destination: "/data".into(), recursive: true, read_only, follows: false }
    }

    #[test]
    fn root_and_binds_appear_under_the_share_and_go_away_again() {
        let Some(pod) = pod() else { return };
        let data = pod.root.path().join("data");
        fs::create_dir(&data).unwrap();
        let file = pod.root.path().join("file");
        fs::write(&file, "text").unwrap();
        let storage = storage(&pod, vec![bind(data.clone(), false), bind(file.clone(), true)]);

        storage.attach(&pod.dir).unwrap();

        let share = pod.dir.share().join("c");
        assert_eq!(fs::read_to_string(share.join("rootfs/hello")).unwrap(), "world");
        fs::write(share.join("mounts/0/new"), "x").unwrap();
        assert!(data.join("new").exists());
        assert_eq!(fs::read_to_string(share.join("mounts/1")).unwrap(), "text");
        assert!(fs::write(share.join("mounts/1"), "y").is_err());

        detach(&pod.dir, "c").unwrap();

        assert!(!share.exists());
        assert!(data.join("new").exists() && file.exists());
    }

    #[test]
    fn devices_of_an_image_or_a_volume_are_not_the_host_s() {
        let Some(pod) = pod() else { return };
        let data = pod.root.path().join("data");
        fs::create_dir(&data).unwrap();
        let layer = Mount { type_: "tmpfs".into(), source: "tmpfs".into(), ..Default::default() };
        let bound = Mount {
            type_: "bind".into(),
            source: data.display().to_string(),
            options: vec!["rbind".into(), "rw".into()],
            ..Default::default()
        };
        let share = pod.dir.share().join("c");
        for rootfs in [vec![], vec![layer], vec![bound]] {
            let mut storage = storage(&pod, vec![bind(data.clone(), false)]);
            storage.rootfs = rootfs;
            storage.attach(&pod.dir).unwrap();
            for place in ["rootfs", "mounts/0"] {
                let node = share.join(place).join("zero");
                let zero = rustix::fs::makedev(1, 5);
                mknodat(CWD, &node, FileType::CharacterDevice, Mode::RUSR, zero).unwrap();

                let error = fs::File::open(&node).unwrap_err();

                assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{place}: {error}");
                fs::remove_file(&node).unwrap();
            }
            detach(&pod.dir, "c").unwrap();
        }
    }

    #[test]
    fn a_missing_source_is_named_and_leaves_nothing() {
        let Some(pod) = pod() else { return };
        let error = storage(&pod, vec![bind("/nonexistent".into(), false)]).attach(&pod.dir).unwrap_err();
        assert!(
            error.to_string().starts_with("mount on /data: source /nonexistent: No such file"),
            "{error}"
        );
        detach(&pod.dir, "c").unwrap();
        assert_eq!(fs::read_dir(pod.dir.tree()).unwrap().count(), 0);
    }

    #[test]
    fn an_overlay_with_more_layers_than_a_page_of_options_is_mounted() {
        let Some(pod) = pod() else { return };
        let layers = pod.root.path().join("a-rather-long-directory-name/snapshots");
        let names: Vec<_> = (0..120).map(|n| layers.join(n.to_string()).join("fs")).collect();
        for name in &names {
            fs::create_dir_all(name).unwrap();
        }
        fs::write(names[119].join("deep"), "x").unwrap();
        let lower: Vec<_> = names.iter().map(|name| name.display().to_string()).collect();
        let mut storage = storage(&pod, vec![]);
        let options = vec![format!("lowerdir={}", lower.join(":"))];
        assert!(options[0].len() > 4096);
        storage.rootfs =
            vec![Mount { type_: "overlay".into(), source: "overlay".into(), options, ..Default::default() }];
        if let Err(error) = storage.attach(&pod.dir) {
            assert!(error.to_string().contains("No such device"), "{error}");
            eprintln!("SKIPPED: needs overlayfs: {error}");
            return;
        }
        assert!(pod.dir.share().join("c/rootfs/deep").exists());
    }

    #[test]
    fn a_target_outside_the_root_is_refused() {
        assert!(below(Path::new("/r"), "../x").is_err());
        assert_eq!(below(Path::new("/r"), "/a/b").unwrap(), Path::new("/r/a/b"));
        assert_eq!(below(Path::new("/r"), "").unwrap(), Path::new("/r/"));
    }
}
