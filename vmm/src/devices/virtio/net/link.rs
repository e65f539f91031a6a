//! What the driver is told of the cable: whether there is one.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::NetState;
use crate::devices::virtio::Interrupt;
use crate::error::{Error, Result};

/// The link's status. Never locked for long, since vCPUs wait for it when they read the configuration.
#[derive(Default)]
pub(super) struct Link {
    announcement: Mutex<Announcement>,
}

#[derive(Default)]
struct Announcement {
    state: NetState,
    /// The way to the driver, while there is one.
    interrupt: Option<Interrupt>,
    /// The link changed while there was no way to the driver, which may have read it before.
    overdue: bool,
}

impl Link {
    /// What the driver is told.
    pub(super) fn state(&self) -> NetState {
        self.announcement().state.clone()
    }

    /// The link is up or down from now on, of which the driver is told.
    ///
    /// # Errors
    /// The driver cannot be told.
    pub(super) fn set(&self, up: bool) -> Result<()> {
        let mut announcement = self.announcement();
        if announcement.state.up != up {
            announcement.state.up = up;
            announcement.change();
        }
        announcement.tell()
    }

    /// There is a driver that wants to be told.
    ///
    /// # Errors
    /// It cannot be told.
    pub(super) fn connect(&self, interrupt: Interrupt) -> Result<()> {
        let mut announcement = self.announcement();
        announcement.interrupt = Some(interrupt);
        announcement.tell()
    }

    /// There is none any more.
    pub(super) fn disconnect(&self) {
        self.announcement().interrupt = None;
    }

    /// Goes on from what the driver was told before a save, and corrects it if that is not so any more.
    pub(super) fn restore(&self, saved: &NetState) {
        let mut announcement = self.announcement();
        announcement.state.generation = saved.generation;
        if announcement.state.up != saved.up {
            announcement.change();
        }
    }

    fn announcement(&self) -> MutexGuard<'_, Announcement> {
        self.announcement.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Announcement {
    fn change(&mut self) {
        self.state.generation = self.state.generation.wrapping_add(1);
        self.overdue = true;
    }

    fn tell(&mut self) -> Result<()> {
        if let Some(interrupt) = &self.interrupt
            && self.overdue
        {
            interrupt.config_changed().map_err(Error::EventFd)?;
            self.overdue = false;
        }
        Ok(())
    }
}
