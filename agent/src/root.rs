//! The root file system of a container that may be suspended: an overlay whose upper layer is in the guest's memory, so that what the
//! container has written is a part of the machine's state, and what it was made from is never written to.

use std::collections::BTreeMap;
use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, chown, fchown};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::Mode;

use crate::error::{Error, Result};

/// One container's overlay, there or not.
pub struct Root {
    directory: PathBuf,
}

impl Root {
    /// The overlay that is kept in `directory`.
    pub fn at(directory: PathBuf) -> Self {
        Self { directory }
    }

    /// Where the container's root is mounted.
    pub fn path(&self) -> PathBuf {
        self.directory.join("merged")
    }

    /// Puts it over `lower`.
    ///
    /// # Errors
    ///
    /// `File` with what the kernel refused; what there is by then is left for [`Self::remove`].
    pub fn mount(&self, lower: &Path) -> Result<()> {
        let failed = || Error::file("mount an overlay over", lower);
        fs::create_dir_all(&self.directory).map_err(Error::file("create", &self.directory))?;
        mount(Some("upper"), &self.directory, Some("tmpfs"), MsFlags::empty(), Some("mode=700"))
            .map_err(|errno| Error::file("mount a tmpfs on", &self.directory)(errno.into()))?;
        let [upper, work, merged] = ["upper", "work", "merged"].map(|name| self.directory.join(name));
        for directory in [&upper, &work, &merged] {
            fs::create_dir(directory).map_err(Error::file("create", directory))?;
        }
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let lower = File::from(open(lower, flags, Mode::empty()).map_err(|errno| failed()(errno.into()))?);
        // The root of an overlay looks like that of its upper layer.
        copy_owner(&lower, &upper).map_err(Error::file("set the owner of", &upper))?;
        // By its descriptor, since what is a separator of options and layers may be in a path.
        let options = format!(
            "lowerdir=/proc/self/fd/{},upperdir={},workdir={}",
            lower.as_raw_fd(),
            upper.display(),
            work.display()
        );
        mount(Some("overlay"), &merged, Some("overlay"), MsFlags::empty(), Some(options.as_str()))
            .map_err(|errno| failed()(errno.into()))
    }

    /// The file of the environment, to be bound into the container: it sees it there whatever else is mounted, and cannot lead the writing
    /// anywhere else.
    pub fn environment(&self) -> PathBuf {
        self.directory.join("environment.json")
    }

    /// Writes the file of a process's `environment`, for `user` (and group) alone. Nobody reads it meanwhile: its container has not been
    /// started, or is frozen.
    ///
    /// # Errors
    ///
    /// `File` with what the kernel refused.
    pub fn write_environment(&self, environment: &[String], (uid, gid): (u32, u32)) -> Result<()> {
        let path = self.environment();
        let write = || -> io::Result<()> {
            let text = serde_json::to_vec(&variables(environment))?;
            let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&path)?;
            fchown(&file, Some(uid), Some(gid))?;
            file.write_all(&text)
        };
        write().map_err(Error::file("write", &path))
    }

    /// Removes it, with all that was written. Nobody uses it any more.
    ///
    /// # Errors
    ///
    /// `File` with what the kernel refused.
    pub fn remove(&self) -> Result<()> {
        if !self.directory.exists() {
            return Ok(());
        }
        for mounted in [self.path(), self.directory.clone()] {
            // The kernel takes a mount namespace apart after its last process has gone, so that the mount may be busy still.
            match umount2(&mounted, MntFlags::MNT_DETACH) {
                // It has not come to that.
                Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
                Err(errno) => return Err(Error::file("unmount", mounted)(errno.into())),
            }
        }
        fs::remove_dir(&self.directory).map_err(Error::file("remove", &self.directory))
    }
}

fn copy_owner(from: &File, to: &Path) -> io::Result<()> {
    let metadata = from.metadata()?;
    chown(to, Some(metadata.uid()), Some(metadata.gid()))?;
    fs::set_permissions(to, Permissions::from_mode(metadata.mode()))
}

/// The variables by their names; of equal names the last counts, as where a program is executed.
fn variables(environment: &[String]) -> BTreeMap<&str, &str> {
    environment.iter().filter_map(|entry| entry.split_once('=')).collect()
}

fn open_below(root: &File, path: &Path, flags: OFlag) -> nix::Result<File> {
    let resolve = ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS;
    openat2(root, path.as_os_str().as_bytes(), OpenHow::new().flags(flags).resolve(resolve)).map(File::from)
}

/// Whether `path` exists as the process `pid` sees it; no link leads out of its root. For a process that has ended nothing exists.
///
/// # Errors
///
/// What the kernel says other than that it does not exist.
pub fn exists(pid: u32, path: &str) -> io::Result<bool> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let root = match open(format!("/proc/{pid}/root").as_str(), flags, Mode::empty()) {
        Ok(root) => File::from(root),
        Err(Errno::ENOENT) => return Ok(false),
        Err(errno) => return Err(errno.into()),
    };
    match open_below(&root, Path::new(path), OFlag::O_PATH | OFlag::O_CLOEXEC) {
        Ok(_) => Ok(true),
        // EAGAIN: a directory was being moved meanwhile.
        Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP | Errno::EAGAIN) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}
