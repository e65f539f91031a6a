//! What the driver is told of the cable: whether there is one.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::NetState;
use crate::devices::virtio::Interrupt;
use crate::devices::virtio::announcement::Announcement;
use crate::error::Result;

/// The link's status. Never locked for long, since vCPUs wait for it when they read the configuration.
#[derive(Default)]
pub(super) struct Link {
    status: Mutex<Status>,
}

#[derive(Default)]
struct Status {
    up: bool,
    announcement: Announcement,
}

impl Link {
    /// What the driver is told.
    pub(super) fn state(&self) -> NetState {
        let status = self.status();
        NetState { up: status.up, generation: status.announcement.generation() }
    }

    /// The link is up or down from now on, of which the driver is told.
    ///
    /// # Errors
    /// The driver cannot be told.
    pub(super) fn set(&self, up: bool) -> Result<()> {
        let mut status = self.status();
        if status.up != up {
            status.up = up;
            status.announcement.change();
        }
        status.announcement.tell()
    }

    /// There is a driver that wants to be told.
    ///
    /// # Errors
    /// It cannot be told.
    pub(super) fn connect(&self, interrupt: Interrupt) -> Result<()> {
        self.status().announcement.connect(interrupt)
    }

    /// There is none any more.
    pub(super) fn disconnect(&self) {
        self.status().announcement.disconnect();
    }

    /// Goes on from what the driver was told before a save, and corrects it if that is not so any more.
    pub(super) fn restore(&self, saved: &NetState) {
        let mut status = self.status();
        let changed = status.up != saved.up;
        status.announcement.restore(saved.generation, changed);
    }

    fn status(&self) -> MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
