//! Where the TAP and the driver meet.

use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_queue::QueueState;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::link::Link;
use super::session::Session;
use super::tap::Tap;
use crate::devices::virtio::Activation;
use crate::error::{Error, Result};

/// Gives a network device its TAP while the guest runs. It has that for good: a pod's interface goes with the pod.
#[derive(Clone)]
pub struct NetSlot {
    shared: Arc<Shared>,
}

struct Shared {
    number: u8,
    link: Arc<Link>,
    /// Written by the thread when there is something for the log.
    notice: Arc<EventFd>,
    /// Always locked before the link.
    ends: Mutex<Ends>,
}

/// The two ends of the cable.
#[derive(Default)]
struct Ends {
    tap: Option<Tap>,
    driver: Option<Session>,
}

impl NetSlot {
    pub(super) fn new(number: u8) -> Result<Self> {
        let notice = Arc::new(EventFd::new(EFD_NONBLOCK).map_err(Error::EventFd)?);
        Ok(Self { shared: Arc::new(Shared { number, link: Arc::default(), notice, ends: Mutex::default() }) })
    }

    /// Connects the device to a TAP that was opened with `IFF_TAP`, `IFF_NO_PI` and `IFF_VNET_HDR`, and tells the driver
    /// that the link is up.
    ///
    /// # Errors
    /// It has one already, the file is no such TAP, or the driver cannot be told.
    pub fn attach(&self, file: File) -> Result<()> {
        self.attach_tap(Tap::new(file)?)
    }

    pub(super) fn attach_tap(&self, tap: Tap) -> Result<()> {
        let mut ends = self.ends();
        if ends.tap.is_some() {
            return Err(Error::NetSlotTaken { slot: self.shared.number });
        }
        if let Some(session) = &mut ends.driver {
            session.start(&tap, self.name())?;
        }
        ends.tap = Some(tap);
        self.shared.link.set(true)
    }

    pub(super) fn link(&self) -> &Link {
        &self.shared.link
    }

    /// The driver is ready. A TAP that has become useless meanwhile is nothing that the driver could be blamed for: it
    /// finds the link down.
    pub(super) fn activate(&self, activation: Activation) -> Result<()> {
        let mut ends = self.ends();
        let (interrupt, health) = (activation.interrupt.clone(), activation.health.clone());
        let link = Arc::clone(&self.shared.link);
        let Ends { tap, driver } = &mut *ends;
        let session = driver.insert(Session::new(activation, link, Arc::clone(&self.shared.notice))?);
        session.watch_notice()?;
        if let Some(tap) = tap
            && self.shared.link.state().up
            && let Err(error) = session.start(tap, self.name())
        {
            health.note(error);
            self.shared.link.set(false)?;
            // An eventfd always takes a one.
            let _ = self.shared.notice.write(1);
        }
        self.shared.link.connect(interrupt)
    }

    /// There is no driver any more. Waits for the packet under way.
    pub(super) fn deactivate(&self) {
        self.shared.link.disconnect();
        let session = self.ends().driver.take();
        if let Some(session) = session {
            session.stop();
            if let Some(tap) = &mut self.ends().tap {
                tap.forget_driver();
            }
        }
    }

    pub(super) fn pause(&self) {
        if let Some(session) = &self.ends().driver {
            session.pause();
        }
    }

    pub(super) fn resume(&self) {
        if let Some(session) = &self.ends().driver {
            session.resume();
        }
    }

    pub(super) fn queue_states(&self) -> Vec<QueueState> {
        self.ends().driver.as_ref().map_or_else(Vec::new, Session::queue_states)
    }

    /// The event loop was woken, and whoever woke it has left a word in the device's health.
    pub(super) fn take_notice(&self) {
        // Nonblocking; without a count there is nothing to clear.
        let _ = self.shared.notice.read();
    }

    fn name(&self) -> String {
        format!("net{}", self.shared.number)
    }

    fn ends(&self) -> MutexGuard<'_, Ends> {
        self.shared.ends.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
