//! The shared directory: every request becomes system calls on descriptors, never on paths.
//!
//! The driver is hostile, the host's directory tree is not trusted to hold still. A name is one component; it is
//! looked up once, without following a symbolic link, and from then on the descriptor stands for the file. Only
//! regular files and directories are ever opened for more than a look, so that no FIFO or device can block or act.

use std::ffi::{CStr, OsString};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::ROOT_ID;
use fuse_backend_rs::api::filesystem::{Entry, FsOptions, OpenOptions};
use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, RawDir, RawDirEntry, SeekFrom, Statx, StatxFlags, openat,
    readlinkat, seek, statx,
};
use rustix::io::Errno;
use rustix::path::DecInt;

use super::attributes;
use super::identity::{ScopedUmask, WithoutFsetid};
use super::raw;
use super::table::{Budget, Descriptor, Handle, Handles, Inode, Inodes, Version, lock};

/// How long the driver may believe what it was told of a name or an attribute: what somebody else changes in a
/// volume is to be seen in the guest within a second.
pub(super) const TIMEOUT: Duration = Duration::from_millis(500);

/// FUSE_ATTR_SUBMOUNT of `include/uapi/linux/fuse.h`: this directory is the root of another mount.
const ATTR_SUBMOUNT: u32 = 1;

/// Bytes of directory entries that are read at once.
const DIRECTORY_BUFFER: usize = 32 * 1024;

/// A directory of the host and what the driver holds of it.
pub(super) struct Share {
    pub inodes: Inodes,
    pub handles: Handles,
    budget: Arc<Budget>,
    /// `/proc/self/fd`, through which an `O_PATH` descriptor is opened again.
    pub descriptors: OwnedFd,
    /// The [`FsOptions`] of the current session; none before INIT.
    options: AtomicU64,
}

impl Share {
    /// Opens `root` and `/proc/self/fd`.
    ///
    /// # Errors
    /// One of the two cannot be opened.
    pub(super) fn new(root: &Path, budget: Arc<Budget>) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let descriptors = openat(CWD, "/proc/self/fd", flags, Mode::empty())?;
        let root = openat(CWD, root, flags, Mode::empty())?;
        let stat = stat(&root)?;
        Ok(Self {
            inodes: Inodes::new(budget.charge(root)?, &stat),
            handles: Handles::default(),
            budget,
            descriptors,
            options: AtomicU64::new(0),
        })
    }

    /// The shared directory.
    pub(super) fn root(&self) -> io::Result<Arc<Inode>> {
        self.inodes.get(ROOT_ID)
    }

    /// Ends the session: what the driver held is closed and forgotten.
    pub(super) fn end_session(&self) {
        self.close_all();
        self.options.store(0, Ordering::Relaxed);
    }

    /// Closes and forgets what the driver holds.
    pub(super) fn close_all(&self) {
        self.handles.clear();
        self.inodes.clear();
    }

    /// The options of the current session.
    pub(super) fn options(&self) -> u64 {
        self.options.load(Ordering::Relaxed)
    }

    /// Starts a session, or continues one.
    pub(super) fn begin_session(&self, options: u64) {
        self.options.store(options, Ordering::Relaxed);
    }

    fn has_option(&self, option: FsOptions) -> bool {
        self.options() & option.bits() != 0
    }

    /// Charges the driver for a file.
    ///
    /// # Errors
    /// `ENFILE`: it holds too much already.
    pub(super) fn charge(&self, file: OwnedFd) -> io::Result<Descriptor> {
        self.budget.charge(file)
    }

    /// Where an open file or directory is, as the kernel says: an absolute path, if it is anywhere.
    pub(super) fn path_of(&self, file: &impl AsFd) -> io::Result<PathBuf> {
        let path = readlinkat(&self.descriptors, DecInt::from_fd(file), Vec::new())?;
        Ok(OsString::from_vec(path.into_bytes()).into())
    }

    /// Opens what an `O_PATH` descriptor stands for.
    pub(super) fn reopen(&self, file: &impl AsFd, flags: OFlags) -> io::Result<OwnedFd> {
        let name = DecInt::from_fd(file);
        Ok(openat(&self.descriptors, name, flags | OFlags::CLOEXEC, Mode::empty())?)
    }

    /// Opens a regular file. Where the host would wait, as for somebody's lease or in some files of procfs, the
    /// driver is told EAGAIN instead.
    pub(super) fn open_file(&self, inode: &Inode, flags: OFlags) -> io::Result<OwnedFd> {
        match inode.kind {
            FileType::RegularFile => self.reopen(inode, flags | OFlags::NONBLOCK),
            _ => Err(Errno::BADF.into()),
        }
    }

    /// Finds `name` in `parent` and counts that the driver is told.
    pub(super) fn find(&self, parent: &Inode, name: &CStr) -> io::Result<Entry> {
        check_name(name)?;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = openat(parent, name, flags, Mode::empty())?;
        self.entry(parent, file)
    }

    /// Finds or adds the inode of an `O_PATH` descriptor, and counts that the driver is told.
    pub(super) fn entry(&self, parent: &Inode, file: OwnedFd) -> io::Result<Entry> {
        let stat = stat(&file)?;
        let inode = self.inodes.remember(self.charge(file)?, &stat);
        let crosses = inode.kind == FileType::Directory
            && (inode.key.mount, inode.key.device) != (parent.key.mount, parent.key.device);
        let submount = crosses && self.has_option(FsOptions::SUBMOUNTS);
        Ok(Entry {
            inode: inode.id,
            generation: 0,
            attr: attributes::from_statx(&stat),
            attr_flags: if submount { ATTR_SUBMOUNT } else { 0 },
            attr_timeout: TIMEOUT,
            entry_timeout: TIMEOUT,
        })
    }

    /// Makes `name` in the directory `parent` by `make`, and tells what came to be.
    pub(super) fn make(
        &self,
        parent: u64,
        name: &CStr,
        umask: u32,
        make: impl FnOnce(&Inode) -> rustix::io::Result<()>,
    ) -> io::Result<Entry> {
        check_name(name)?;
        let parent = self.inodes.get(parent)?;
        {
            let _umask = ScopedUmask::new(umask);
            make(&parent)?;
        }
        self.find(&parent, name)
    }

    /// Registers an open file, and tells the driver how to cache it.
    pub(super) fn add_handle(
        &self,
        inode: &Inode,
        file: Descriptor,
        flags: OFlags,
    ) -> io::Result<(u64, OpenOptions)> {
        let mut options = OpenOptions::empty();
        if inode.unchanged_since_open(Version::from(&stat(&file)?)) {
            options |= OpenOptions::KEEP_CACHE;
        }
        let writable = flags & OFlags::ACCMODE != OFlags::RDONLY;
        if !writable {
            options |= raw::no_flush();
        }
        Ok((self.handles.insert(inode.id, file, writable), options))
    }

    /// Calls `add` for each entry of a directory from `offset` on, until it says that there is no more room.
    pub(super) fn read_directory(
        &self,
        inode: u64,
        handle: u64,
        offset: u64,
        add: &mut dyn FnMut(&RawDirEntry<'_>) -> io::Result<usize>,
    ) -> io::Result<()> {
        let handle = self.handles.get(handle, inode)?;
        let _position = lock(&handle.position);
        seek(&*handle, SeekFrom::Start(offset))?;
        let mut buffer = Vec::with_capacity(DIRECTORY_BUFFER);
        let mut entries = RawDir::new(&*handle, buffer.spare_capacity_mut());
        let mut added = false;
        while let Some(entry) = entries.next() {
            match entry.map_err(io::Error::from).and_then(|entry| add(&entry)) {
                Ok(0) => break,
                Ok(_) => added = true,
                // What was added counts as told, so it must reach the driver; the error comes with its next request.
                Err(_) if added => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// `truncate`, of an open file or by the inode.
    pub(super) fn set_size(
        &self,
        inode: &Inode,
        handle: Option<&Handle>,
        size: i64,
        kill_privileges: bool,
    ) -> io::Result<()> {
        let size = u64::try_from(size).map_err(|_| Errno::INVAL)?;
        let _without = kill_privileges.then(WithoutFsetid::new).transpose()?;
        match handle {
            Some(handle) => rustix::fs::ftruncate(handle, size)?,
            None => rustix::fs::ftruncate(self.open_file(inode, OFlags::WRONLY)?, size)?,
        }
        Ok(())
    }
}

/// Type, attributes and mount of an open file.
pub(super) fn stat(file: &impl AsFd) -> io::Result<Statx> {
    let wanted = StatxFlags::BASIC_STATS | StatxFlags::MNT_ID;
    Ok(statx(file, c"", AtFlags::EMPTY_PATH, wanted)?)
}

/// Refuses what is no name of something in a directory. A NUL cannot be in a [`CStr`].
pub(super) fn check_name(name: &CStr) -> io::Result<()> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(Errno::INVAL.into()),
        name if name.contains(&b'/') => Err(Errno::INVAL.into()),
        _ => Ok(()),
    }
}
