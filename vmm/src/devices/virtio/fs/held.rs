//! What a driver holds of the share, as it is saved and found again.
//!
//! Descriptors stay behind; paths do not. Whoever restores a machine puts the same files at the same places of its share. What the guest has
//! open has to be there again. What it merely knows it looks up once more if it is not.

use std::collections::HashSet;
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

use fuse_backend_rs::abi::fuse_abi::ROOT_ID;
use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::failed;
use super::share::{Share, stat};
use super::table::{Descriptor, Key, Known, Version, kind};
use super::walk::{Walk, names};
use crate::error::{Error, Result};

/// Numbers are given one after another, so that none gets so far.
const MAX_NUMBER: u64 = u64::MAX / 2;

/// What the fs device keeps beside its queues.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsState {
    /// What driver and device have agreed on in FUSE's INIT; zero before it.
    options: u64,
    /// What the driver knows beside the root, by number.
    inodes: Vec<InodeState>,
    /// What it has open, by number.
    handles: Vec<HandleState>,
    /// The numbers that come next.
    next_inode: u64,
    next_handle: u64,
}

/// A file of any type that the driver has looked up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct InodeState {
    id: u64,
    lookups: u64,
    /// Its type, as in a mode.
    kind: u32,
    /// Where it is below the share.
    path: OsString,
    opened: Option<Version>,
}

/// A file that is open for reading, or a directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct HandleState {
    id: u64,
    inode: u64,
}

impl FsState {
    /// What driver and device have agreed on.
    pub(super) fn options(&self) -> u64 {
        self.options
    }

    /// Whether the driver holds nothing beside the root.
    pub(super) fn is_empty(&self) -> bool {
        self.inodes.is_empty() && self.handles.is_empty()
    }

    /// An open file is not there.
    fn lost(&self, inode: u64, source: io::Error) -> Error {
        match self.inodes.binary_search_by_key(&inode, |inode| inode.id).map(|index| self.inodes.get(index)) {
            Ok(Some(inode)) => inode.lost(source),
            _ => failed("open the share", source),
        }
    }

    /// Why no share can go on from here, if none can. The one that has written this may have been its guest's.
    pub(super) fn problem(&self) -> Option<&'static str> {
        let inodes = || self.inodes.iter().map(|inode| inode.id);
        let handles = || self.handles.iter().map(|handle| handle.id);
        let known: HashSet<_> = inodes().chain([ROOT_ID]).collect();
        if !inodes().is_sorted_by(|a, b| a < b) || !handles().is_sorted_by(|a, b| a < b) {
            Some("a number of a file is there twice")
        } else if inodes().any(|id| id <= ROOT_ID) {
            Some("a file has the number of the root")
        } else if inodes().any(|id| id >= self.next_inode) || handles().any(|id| id >= self.next_handle) {
            Some("a number of a file would be given once more")
        } else if self.next_inode.max(self.next_handle) > MAX_NUMBER {
            Some("the numbers of files are at their end")
        } else if self.handles.iter().any(|handle| !known.contains(&handle.inode)) {
            Some("an open file is none that the guest knows")
        } else if self.inodes.iter().any(|inode| names(inode.path.as_ref()).is_none_or(|it| it.is_empty())) {
            Some("a file is not below the share")
        } else {
            None
        }
    }
}

impl Share {
    /// What the driver holds now. What it knows and is not where it was any more is left out.
    ///
    /// # Errors
    /// [`Error::NotNow`]: it has a file open that could not be found again as it is.
    pub(super) fn save(&self) -> Result<FsState> {
        let root = self.root().and_then(|root| Ok((self.path_of(&*root)?, root)));
        let (top, root) = root.map_err(|error| failed("find the share", error))?;
        let (known, next_inode) = self.inodes.known();
        let mut places: Vec<_> =
            known.iter().filter_map(|known| Some((self.place(known, &top)?, known))).collect();
        places.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
        let mut walk = Walk::new(root);
        places.retain(|(path, known)| {
            let found = walk.open(path).and_then(|file| stat(&file));
            found.is_ok_and(|stat| Key::from(&stat) == known.inode.key)
        });
        let mut inodes: Vec<_> =
            places.into_iter().map(|(path, known)| InodeState::new(path, known)).collect();
        inodes.sort_unstable_by_key(|inode| inode.id);
        let (handles, next_handle) = self.save_handles(&inodes, &top)?;
        Ok(FsState { options: self.options(), inodes, handles, next_inode, next_handle })
    }

    fn save_handles(&self, inodes: &[InodeState], top: &Path) -> Result<(Vec<HandleState>, u64)> {
        let found: HashSet<_> = inodes.iter().map(|inode| inode.id).chain([ROOT_ID]).collect();
        let (open, next) = self.handles.open();
        for (_, handle) in &open {
            let how = match (handle.writable, found.contains(&handle.inode)) {
                (true, _) => "open for writing",
                (false, false) => "open, and it is not there any more",
                (false, true) => continue,
            };
            let path = self.path_of(&**handle).unwrap_or_default();
            let path = path.strip_prefix(top).unwrap_or(&path);
            return Err(Error::NotNow { obstacle: format!("the guest has {path:?} of its share {how}") });
        }
        Ok((open.iter().map(|(id, handle)| HandleState { id: *id, inode: handle.inode }).collect(), next))
    }

    /// Where something is below the share, whose path is `top`, if it is there.
    fn place(&self, known: &Known, top: &Path) -> Option<PathBuf> {
        let path = self.path_of(&*known.inode).ok()?;
        Some(path.strip_prefix(top).ok()?.to_owned())
    }

    /// Opens again what the driver held. Legal in a share of which it holds nothing yet.
    ///
    /// # Errors
    /// Something that it has open is not there: it then holds nothing, and this can be tried once more.
    pub(super) fn recover(&self, state: &FsState) -> Result<()> {
        let recovered = self.find_inodes(state).and_then(|()| self.open_handles(state));
        match recovered {
            Ok(()) => self.number_from(state),
            Err(_) => self.close_all(),
        }
        recovered
    }

    /// Gives no number that was given before a save.
    pub(super) fn number_from(&self, state: &FsState) {
        self.inodes.go_on_from(state.next_inode);
        self.handles.go_on_from(state.next_handle);
    }

    fn find_inodes(&self, state: &FsState) -> Result<()> {
        let open: HashSet<_> = state.handles.iter().map(|handle| handle.inode).collect();
        let mut inodes: Vec<_> = state.inodes.iter().collect();
        inodes.sort_unstable_by_key(|inode| Path::new(&inode.path));
        let root = self.root().map_err(|error| failed("find the share", error))?;
        let mut walk = Walk::new(root);
        for saved in inodes {
            match self.find_inode(saved, &mut walk) {
                Err(error) if open.contains(&saved.id) || is_exhausted(&error) => {
                    return Err(saved.lost(error));
                }
                // The guest is told that there is no such inode, and looks the name up again.
                Ok(()) | Err(_) => {}
            }
        }
        Ok(())
    }

    fn find_inode(&self, saved: &InodeState, walk: &mut Walk) -> io::Result<()> {
        let file = walk.open(saved.path.as_ref())?;
        let stat = stat(&file)?;
        if kind(&stat) != FileType::from_raw_mode(saved.kind) {
            return Err(Errno::STALE.into());
        }
        self.inodes.adopt(saved.id, saved.lookups, self.charge(file)?, &stat, saved.opened);
        Ok(())
    }

    fn open_handles(&self, state: &FsState) -> Result<()> {
        for handle in &state.handles {
            let file =
                self.reopen_for_reading(handle.inode).map_err(|error| state.lost(handle.inode, error))?;
            self.handles.adopt(handle.id, handle.inode, file);
        }
        Ok(())
    }

    fn reopen_for_reading(&self, inode: u64) -> io::Result<Descriptor> {
        let inode = self.inodes.get(inode)?;
        let file = match inode.kind {
            FileType::Directory => self.reopen(&*inode, OFlags::RDONLY | OFlags::DIRECTORY)?,
            _ => self.open_file(&inode, OFlags::RDONLY)?,
        };
        self.charge(file)
    }
}

impl InodeState {
    fn new(path: PathBuf, known: &Known) -> Self {
        Self {
            id: known.inode.id,
            lookups: known.lookups,
            kind: known.inode.kind.as_raw_mode(),
            path: path.into_os_string(),
            opened: known.inode.opened(),
        }
    }

    fn lost(&self, source: io::Error) -> Error {
        Error::Reopen { path: PathBuf::from(&self.path), source }
    }
}

/// Whether it is this process that can hold no more.
fn is_exhausted(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENFILE | libc::EMFILE | libc::ENOMEM))
}
