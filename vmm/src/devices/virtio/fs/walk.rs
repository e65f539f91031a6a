//! From the root of the share to a file, by a path that was true once.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Component, Path};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags, openat};
use rustix::io::Errno;

use super::table::Inode;

/// Opens one path after another, name by name as a driver does that looks them up, and never through a symbolic link. Keeps the directories
/// of the last path open, so that paths in their order take little more than one step each.
pub(super) struct Walk {
    root: Arc<Inode>,
    directories: Vec<(OsString, OwnedFd)>,
}

impl Walk {
    /// Starts at `root`.
    pub(super) fn new(root: Arc<Inode>) -> Self {
        Self { root, directories: Vec::new() }
    }

    /// Opens the place to which `path` leads, below the root.
    ///
    /// # Errors
    /// `EINVAL`: the path is none of names alone. Otherwise the kernel's reason.
    pub(super) fn open(&mut self, path: &Path) -> io::Result<OwnedFd> {
        let names = names(path).ok_or(Errno::INVAL)?;
        let (last, directories) = names.split_last().ok_or(Errno::INVAL)?;
        let same = |((known, _), name): &(&(OsString, OwnedFd), &&OsStr)| known == *name;
        let known = self.directories.iter().zip(directories).take_while(same).count();
        self.directories.truncate(known);
        for name in directories.iter().skip(known) {
            let directory = self.step(name, OFlags::DIRECTORY)?;
            self.directories.push(((*name).to_owned(), directory));
        }
        self.step(last, OFlags::empty())
    }

    /// Opens `name` in the directory that was opened last.
    fn step(&self, name: &OsStr, flags: OFlags) -> io::Result<OwnedFd> {
        let flags = flags | OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened = match self.directories.last() {
            Some((_, directory)) => openat(directory, name, flags, Mode::empty()),
            None => openat(&*self.root, name, flags, Mode::empty()),
        };
        Ok(opened?)
    }
}

/// The names that a path consists of, if there is nothing else in it.
pub(super) fn names(path: &Path) -> Option<Vec<&OsStr>> {
    let name = |component| match component {
        Component::Normal(name) => Some(name),
        _ => None,
    };
    path.components().map(name).collect()
}
