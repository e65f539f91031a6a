//! What is behind a block device: a backend that comes and goes, and what the driver is told of it.

use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::BlockState;
use super::backend::Backend;
use crate::devices::virtio::Interrupt;
use crate::devices::virtio::announcement::Announcement;
use crate::error::Result;

/// Fills and empties a block device while the guest runs.
///
/// Linux takes note of a new capacity only. So before a backend is replaced by another of the same size, the guest
/// must have seen the slot empty, or it keeps what it had cached of the old one.
#[derive(Clone)]
pub struct BlockSlot {
    shared: Arc<Shared>,
}

struct Shared {
    /// Locked during I/O. Always locked before `told`.
    backend: Mutex<Option<Backend>>,
    /// Never locked for long, since vCPUs wait for it when they read the configuration.
    told: Mutex<Told>,
}

/// What the driver is told.
struct Told {
    /// In sectors.
    capacity: u64,
    announcement: Announcement,
}

impl BlockSlot {
    pub(super) fn new(backend: Option<Backend>) -> Self {
        let capacity = backend.as_ref().map_or(0, Backend::capacity);
        let told = Told { capacity, announcement: Announcement::default() };
        Self { shared: Arc::new(Shared { backend: Mutex::new(backend), told: Mutex::new(told) }) }
    }

    /// Puts a file behind the device, in place of what was there, and tells the driver. Its capacity is the file's
    /// size now, in whole sectors.
    ///
    /// # Errors
    /// The file's size cannot be found, or the driver cannot be told.
    pub fn attach(&self, file: File, read_only: bool) -> Result<()> {
        self.replace(Some(Backend::new(file, read_only)?))
    }

    /// Empties the device and tells the driver. Waits for the request under way: after that the file is not used
    /// any more.
    ///
    /// # Errors
    /// The driver cannot be told.
    pub fn detach(&self) -> Result<()> {
        self.replace(None)
    }

    /// Whether there is a file behind it. Waits for the request under way.
    pub fn is_filled(&self) -> bool {
        self.backend().is_some()
    }

    fn replace(&self, new: Option<Backend>) -> Result<()> {
        let mut backend = self.backend();
        *backend = new;
        let capacity = backend.as_ref().map_or(0, Backend::capacity);
        let mut told = self.told();
        told.capacity = capacity;
        told.announcement.change();
        told.announcement.tell()
    }

    /// The backend, for one request.
    pub(super) fn backend(&self) -> MutexGuard<'_, Option<Backend>> {
        self.shared.backend.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the driver is told.
    pub(super) fn state(&self) -> BlockState {
        let told = self.told();
        BlockState { capacity: told.capacity, generation: told.announcement.generation() }
    }

    /// There is a driver that wants to be told.
    pub(super) fn connect(&self, interrupt: Interrupt) -> Result<()> {
        self.told().announcement.connect(interrupt)
    }

    /// There is none any more.
    pub(super) fn disconnect(&self) {
        self.told().announcement.disconnect();
    }

    /// Goes on from what the driver was told before a save, and corrects it if that is not so any more.
    pub(super) fn restore(&self, saved: &BlockState) {
        let mut told = self.told();
        let changed = told.capacity != saved.capacity;
        told.announcement.restore(saved.generation, changed);
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        self.shared.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
