//! Telling the driver that a device's configuration has changed.

use super::Interrupt;
use crate::error::{Error, Result};

/// What the driver has been told, and the way to it while there is one.
#[derive(Default)]
pub(super) struct Announcement {
    /// Differs whenever the configuration does (virtio 1.2, 4.2.2.1).
    generation: u32,
    interrupt: Option<Interrupt>,
    /// Something changed while there was no way to the driver, which may have read it before.
    overdue: bool,
}

impl Announcement {
    /// `ConfigGeneration`.
    pub(super) fn generation(&self) -> u32 {
        self.generation
    }

    /// The configuration is another one from now on. [`Announcement::tell`] is to follow once it is.
    pub(super) fn change(&mut self) {
        self.generation = self.generation.wrapping_add(1);
        self.overdue = true;
    }

    /// The same, for a change that the driver knows of, since it asked for it. It is not told.
    pub(super) fn change_unannounced(&mut self) {
        self.generation = self.generation.wrapping_add(1);
    }

    /// Tells the driver, if there is one and something to tell.
    ///
    /// # Errors
    /// The driver cannot be told.
    pub(super) fn tell(&mut self) -> Result<()> {
        if let Some(interrupt) = &self.interrupt
            && self.overdue
        {
            interrupt.config_changed().map_err(Error::EventFd)?;
            self.overdue = false;
        }
        Ok(())
    }

    /// There is a driver that wants to be told.
    ///
    /// # Errors
    /// It cannot be told what has changed before.
    pub(super) fn connect(&mut self, interrupt: Interrupt) -> Result<()> {
        self.interrupt = Some(interrupt);
        self.tell()
    }

    /// There is none any more.
    pub(super) fn disconnect(&mut self) {
        self.interrupt = None;
    }

    /// Goes on from what the driver was told before a save, and corrects it if that is not so any more.
    pub(super) fn restore(&mut self, generation: u32, changed: bool) {
        self.generation = generation;
        if changed {
            self.change();
        }
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::*;

    fn interrupt() -> Interrupt {
        Interrupt::new(EventFd::new(EFD_NONBLOCK).unwrap())
    }

    #[test]
    fn a_change_is_told_once_and_as_soon_as_there_is_a_driver() {
        let (first, second) = (interrupt(), interrupt());
        let mut announcement = Announcement::default();
        announcement.change();
        announcement.tell().unwrap();
        announcement.connect(first.clone()).unwrap();
        assert_eq!(first.line().read().unwrap(), 1);
        announcement.disconnect();
        announcement.connect(second.clone()).unwrap();
        assert!(second.line().read().is_err(), "once is enough");
        announcement.change();
        announcement.tell().unwrap();
        assert_eq!((second.line().read().unwrap(), announcement.generation()), (1, 2));
        assert!(first.line().read().is_err(), "it is gone");
    }

    #[test]
    fn a_driver_is_not_told_what_it_asked_for_itself() {
        let interrupt = interrupt();
        let mut announcement = Announcement::default();
        announcement.connect(interrupt.clone()).unwrap();
        announcement.change_unannounced();
        announcement.tell().unwrap();
        assert!(interrupt.line().read().is_err());
        assert_eq!(announcement.generation(), 1);
    }

    #[test]
    fn a_restored_driver_is_told_only_what_differs() {
        for (changed, generation) in [(false, u32::MAX), (true, 0)] {
            let interrupt = interrupt();
            let mut announcement = Announcement::default();
            announcement.restore(u32::MAX, changed);
            announcement.connect(interrupt.clone()).unwrap();
            assert_eq!(interrupt.line().read().is_ok(), changed);
            assert_eq!(announcement.generation(), generation);
        }
    }
}
