//! What the driver holds of the share: inodes it has looked up and files it has open. Each costs one descriptor of
//! this process, and their number is bounded.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fuse_backend_rs::abi::fuse_abi::ROOT_ID;
use rustix::fs::{FileType, Statx};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::{Deserialize, Serialize};

/// The most descriptors that a driver may hold: half of the kernel's default `fs.nr_open`.
const MAX_DESCRIPTORS: usize = 1 << 19;

/// How many descriptors the driver may still cause to be held.
pub(super) struct Budget {
    left: AtomicUsize,
}

impl Budget {
    /// Raises the process's soft limit to its hard limit and grants the driver seven eighths of it.
    pub(super) fn from_limits() -> Arc<Self> {
        let limit = getrlimit(Resource::Nofile);
        let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
        let granted = match setrlimit(Resource::Nofile, raised) {
            Ok(()) => raised.current,
            Err(_) => limit.current,
        };
        let granted = granted.and_then(|granted| usize::try_from(granted).ok());
        let granted = granted.unwrap_or(usize::MAX);
        Self::new(MAX_DESCRIPTORS.min(granted - granted / 8))
    }

    /// Exactly so many.
    pub(super) fn new(descriptors: usize) -> Arc<Self> {
        Arc::new(Self { left: AtomicUsize::new(descriptors) })
    }

    /// Charges the driver for `file`.
    ///
    /// # Errors
    /// `ENFILE`: it holds too much already. The file is closed.
    pub(super) fn charge(self: &Arc<Self>, file: OwnedFd) -> io::Result<Descriptor> {
        let one_less = |left: usize| left.checked_sub(1);
        self.left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less)
            .map_err(|_| io::Error::from_raw_os_error(libc::ENFILE))?;
        Ok(Descriptor { file, budget: Arc::clone(self) })
    }
}

/// A descriptor that counts against a [`Budget`] until it is closed.
pub(super) struct Descriptor {
    file: OwnedFd,
    budget: Arc<Budget>,
}

impl AsFd for Descriptor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        self.budget.left.fetch_add(1, Ordering::Relaxed);
    }
}

/// What makes an inode of the host one inode of the guest. The share spans many mounts, of which two can show the
/// same file with different rights, so the mount is a part of it. A mount's id is not given to another one while a
/// descriptor holds it, not even after a lazy unmount.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub mount: u64,
    pub device: (u32, u32),
    pub number: u64,
}

impl From<&Statx> for Key {
    fn from(stat: &Statx) -> Self {
        Self {
            mount: stat.stx_mnt_id,
            device: (stat.stx_dev_major, stat.stx_dev_minor),
            number: stat.stx_ino,
        }
    }
}

/// What changes whenever the content of a file does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Version {
    changed: (i64, u32),
    modified: (i64, u32),
    size: u64,
}

impl From<&Statx> for Version {
    fn from(stat: &Statx) -> Self {
        Self {
            changed: (stat.stx_ctime.tv_sec, stat.stx_ctime.tv_nsec),
            modified: (stat.stx_mtime.tv_sec, stat.stx_mtime.tv_nsec),
            size: stat.stx_size,
        }
    }
}

/// The type of a file.
pub(super) fn kind(stat: &Statx) -> FileType {
    FileType::from_raw_mode(u32::from(stat.stx_mode))
}

/// A file of any type that the driver has looked up.
pub(super) struct Inode {
    /// The driver's name for it.
    pub id: u64,
    /// Its identity on the host.
    pub key: Key,
    /// Its type, which cannot change.
    pub kind: FileType,
    /// Opened with `O_PATH`: a place, not a file that can be read or that blocks.
    file: Descriptor,
    /// What it was like when it was opened last.
    opened: Mutex<Option<Version>>,
}

impl Inode {
    fn new(id: u64, file: Descriptor, stat: &Statx, opened: Option<Version>) -> Arc<Self> {
        Arc::new(Self { id, key: Key::from(stat), kind: kind(stat), file, opened: Mutex::new(opened) })
    }

    /// What it was like when it was opened last, if it ever was.
    pub(super) fn opened(&self) -> Option<Version> {
        *lock(&self.opened)
    }

    /// Whether what the driver has cached since the file was last opened is still so. Remembers this opening.
    pub(super) fn unchanged_since_open(&self, version: Version) -> bool {
        lock(&self.opened).replace(version) == Some(version)
    }
}

impl AsFd for Inode {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The inodes that the driver knows. Number 1 is the root, which it never forgets.
pub(super) struct Inodes {
    table: Mutex<InodeTable>,
}

struct InodeTable {
    by_id: HashMap<u64, Known>,
    by_key: HashMap<Key, u64>,
    next_id: u64,
}

/// An inode that the driver knows.
#[derive(Clone)]
pub(super) struct Known {
    pub inode: Arc<Inode>,
    /// How often the driver was told of it, less what it has forgotten.
    pub lookups: u64,
}

impl Inodes {
    /// Knows `root` alone.
    pub(super) fn new(root: Descriptor, stat: &Statx) -> Self {
        let inodes = Self {
            table: Mutex::new(InodeTable { by_id: HashMap::new(), by_key: HashMap::new(), next_id: ROOT_ID }),
        };
        lock(&inodes.table).insert(root, stat);
        inodes
    }

    /// # Errors
    /// `EBADF`: there is no such inode, or no longer.
    pub(super) fn get(&self, id: u64) -> io::Result<Arc<Inode>> {
        let table = lock(&self.table);
        let known = table.by_id.get(&id).ok_or(rustix::io::Errno::BADF)?;
        Ok(Arc::clone(&known.inode))
    }

    /// Finds or adds the inode at `file`, and counts that the driver is told of it.
    pub(super) fn remember(&self, file: Descriptor, stat: &Statx) -> Arc<Inode> {
        let mut table = lock(&self.table);
        let id = table.by_key.get(&Key::from(stat)).copied();
        match id.and_then(|id| table.by_id.get_mut(&id)) {
            Some(known) => {
                known.lookups = known.lookups.saturating_add(1);
                Arc::clone(&known.inode)
            }
            None => table.insert(file, stat),
        }
    }

    /// Adds an inode under the number that the driver knows it by, which no other has.
    pub(super) fn adopt(
        &self,
        id: u64,
        lookups: u64,
        file: Descriptor,
        stat: &Statx,
        opened: Option<Version>,
    ) {
        let inode = Inode::new(id, file, stat, opened);
        lock(&self.table).add(Known { inode, lookups });
    }

    /// What the driver knows beside the root, by number, and the next number.
    pub(super) fn known(&self) -> (Vec<Known>, u64) {
        let table = lock(&self.table);
        let mut known: Vec<_> =
            table.by_id.values().filter(|known| known.inode.id != ROOT_ID).cloned().collect();
        known.sort_by_key(|known| known.inode.id);
        (known, table.next_id)
    }

    /// Gives no number below this one from now on.
    pub(super) fn go_on_from(&self, next_id: u64) {
        let mut table = lock(&self.table);
        table.next_id = table.next_id.max(next_id);
    }

    /// Takes back `lookups` times that the driver was told.
    pub(super) fn forget(&self, id: u64, lookups: u64) {
        let forgotten = lock(&self.table).forget(id, lookups);
        // Closed without the lock: this may be the last that holds a deleted file.
        drop(forgotten);
    }

    /// Forgets all but the root.
    pub(super) fn clear(&self) {
        let mut table = lock(&self.table);
        table.by_id.retain(|&id, _| id == ROOT_ID);
        table.by_key.retain(|_, &mut id| id == ROOT_ID);
    }
}

impl InodeTable {
    fn insert(&mut self, file: Descriptor, stat: &Statx) -> Arc<Inode> {
        let inode = Inode::new(self.next_id, file, stat, None);
        self.next_id += 1;
        self.add(Known { inode: Arc::clone(&inode), lookups: 1 });
        inode
    }

    /// What was two inodes when it was saved can be one by now. Then a lookup finds the first.
    fn add(&mut self, known: Known) {
        self.by_key.entry(known.inode.key).or_insert(known.inode.id);
        self.by_id.insert(known.inode.id, known);
    }

    fn forget(&mut self, id: u64, lookups: u64) -> Option<Known> {
        let known = self.by_id.get_mut(&id).filter(|_| id != ROOT_ID)?;
        known.lookups = known.lookups.saturating_sub(lookups);
        if known.lookups > 0 {
            return None;
        }
        if self.by_key.get(&known.inode.key) == Some(&id) {
            self.by_key.remove(&known.inode.key);
        }
        self.by_id.remove(&id)
    }
}

/// An open file or directory.
pub(super) struct Handle {
    /// Of which inode.
    pub inode: u64,
    /// Whether it can be written through.
    pub writable: bool,
    file: Descriptor,
    /// Held while a directory is read, which moves the position that all its readers share.
    pub position: Mutex<()>,
}

impl Handle {
    fn new(inode: u64, file: Descriptor, writable: bool) -> Arc<Self> {
        Arc::new(Self { inode, writable, file, position: Mutex::new(()) })
    }
}

impl AsFd for Handle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The files that the driver has open.
#[derive(Default)]
pub(super) struct Handles {
    table: Mutex<HandleTable>,
}

#[derive(Default)]
struct HandleTable {
    open: HashMap<u64, Arc<Handle>>,
    next_id: u64,
}

impl Handles {
    /// Adds an open file and names it.
    pub(super) fn insert(&self, inode: u64, file: Descriptor, writable: bool) -> u64 {
        let mut table = lock(&self.table);
        let id = table.next_id;
        table.next_id += 1;
        table.open.insert(id, Handle::new(inode, file, writable));
        id
    }

    /// Adds a file that is open for reading under the name that the driver has for it, and no other has.
    pub(super) fn adopt(&self, id: u64, inode: u64, file: Descriptor) {
        lock(&self.table).open.insert(id, Handle::new(inode, file, false));
    }

    /// What is open, by name, and the next name.
    pub(super) fn open(&self) -> (Vec<(u64, Arc<Handle>)>, u64) {
        let table = lock(&self.table);
        let mut open: Vec<_> = table.open.iter().map(|(id, handle)| (*id, Arc::clone(handle))).collect();
        open.sort_by_key(|(id, _)| *id);
        (open, table.next_id)
    }

    /// Gives no name below this one from now on.
    pub(super) fn go_on_from(&self, next_id: u64) {
        let mut table = lock(&self.table);
        table.next_id = table.next_id.max(next_id);
    }

    /// # Errors
    /// `EBADF`: there is no such handle of this inode.
    pub(super) fn get(&self, id: u64, inode: u64) -> io::Result<Arc<Handle>> {
        let table = lock(&self.table);
        let handle = table.open.get(&id).filter(|handle| handle.inode == inode);
        Ok(Arc::clone(handle.ok_or(rustix::io::Errno::BADF)?))
    }

    /// Closes a handle once no request uses it any more.
    ///
    /// # Errors
    /// `EBADF`: there is no such handle of this inode.
    pub(super) fn remove(&self, id: u64, inode: u64) -> io::Result<()> {
        let closed = {
            let mut table = lock(&self.table);
            match table.open.get(&id) {
                Some(handle) if handle.inode == inode => table.open.remove(&id),
                _ => return Err(rustix::io::Errno::BADF.into()),
            }
        };
        // Closed without the lock: a network file system writes back here.
        drop(closed);
        Ok(())
    }

    /// Closes all.
    pub(super) fn clear(&self) {
        lock(&self.table).open.clear();
    }
}

/// Locks a table that is whole at every unwinding point, so that poison means nothing.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
