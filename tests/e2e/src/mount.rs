//! Mounts on the host, as a kubelet and its volume plugins make them.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tempfile::NamedTempFile;

use crate::run;

/// A mount that is gone when its test is.
pub struct HostMount {
    path: PathBuf,
}

impl HostMount {
    /// A file system in memory, with options of tmpfs(5).
    ///
    /// # Panics
    /// It cannot be mounted.
    #[track_caller]
    pub fn tmpfs(path: &Path, options: &str) -> Self {
        mount(Some("tmpfs"), path, Some("tmpfs"), MsFlags::empty(), Some(options))
            .expect("a tmpfs is mounted");
        Self { path: path.into() }
    }

    /// A directory or file at a second place.
    ///
    /// # Panics
    /// It cannot be mounted.
    #[track_caller]
    pub fn bind(source: &Path, path: &Path) -> Self {
        mount(Some(source), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .expect("a bind mount is made");
        Self { path: path.into() }
    }

    /// A new ext4 in a file, by way of a loop device.
    ///
    /// # Panics
    /// It cannot be made or mounted.
    #[track_caller]
    pub fn ext4(image: &Path, size: u64, path: &Path) -> Self {
        File::create_new(image).expect("a new file").set_len(size).expect("there is room");
        // Fails where loop devices are no module; where there are none at all, the mount says so.
        run(Command::new("modprobe").arg("loop"));
        Self::new_ext4(image, &["-o", "loop"], path)
    }

    /// A new ext4 on a disk.
    ///
    /// # Panics
    /// It cannot be made or mounted.
    #[track_caller]
    pub fn ext4_on(disk: &Path, path: &Path) -> Self {
        Self::new_ext4(disk, &[], path)
    }

    #[track_caller]
    fn new_ext4(device: &Path, options: &[&str], path: &Path) -> Self {
        run(Command::new("mkfs.ext4").arg("-q").arg(device)).success();
        run(Command::new("mount").args(options).arg(device).arg(path)).success();
        Self { path: path.into() }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for HostMount {
    fn drop(&mut self) {
        // Something may still use it where its test has failed.
        let _ = umount2(&self.path, MntFlags::MNT_DETACH);
    }
}

/// A disk that is a file, until its test is over.
pub struct LoopDevice {
    backing: NamedTempFile,
    path: PathBuf,
}

impl LoopDevice {
    /// An empty one, of so many bytes.
    ///
    /// # Panics
    /// There is no loop device to be had.
    #[track_caller]
    pub fn new(bytes: u64) -> Self {
        let backing = NamedTempFile::new_in("/var/tmp").expect("a new file");
        backing.as_file().set_len(bytes).expect("there is room");
        // Fails where loop devices are no module; where there are none at all, the next says so.
        run(Command::new("modprobe").arg("loop"));
        let path = run(Command::new("losetup").args(["--find", "--show"]).arg(backing.path()))
            .success()
            .text()
            .into();
        Self { backing, path }
    }

    /// The device.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it consists of.
    pub fn backing(&self) -> &File {
        self.backing.as_file()
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        run(Command::new("losetup").arg("--detach").arg(&self.path));
    }
}
