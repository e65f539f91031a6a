//! Where the TAP and the driver meet.

use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_queue::QueueState;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::link::Link;
use super::session::Session;
use super::tap::Tap;
use super::wire::Limiters;
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
    limiters: Limiters,
    /// Written when the driver has come, and by the thread when there is something for the log.
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
    pub(super) fn new(number: u8, limiters: Limiters) -> Result<Self> {
        let notice = Arc::new(EventFd::new(EFD_NONBLOCK).map_err(Error::EventFd)?);
        let shared = Shared { number, link: Arc::default(), limiters, notice, ends: Mutex::default() };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Connects the device to a TAP that was opened with `IFF_TAP`, `IFF_NO_PI` and `IFF_VNET_HDR`, and tells the driver
    /// that the link is up.
    ///
    /// # Errors
    /// It has one already, the file is no such TAP, or the driver cannot be told.
    pub fn attach(&self, file: File) -> Result<()> {
        self.attach_tap(Tap::new(file)?)
    }

    /// Connects the device to what keeps the boundaries of packets as a TAP does, for those who may not have one.
    ///
    /// # Errors
    /// As for [`NetSlot::attach`].
    #[cfg(any(test, feature = "testing"))]
    pub fn attach_stand_in(&self, file: File) -> Result<()> {
        self.attach_tap(Tap::stand_in(file))
    }

    fn attach_tap(&self, tap: Tap) -> Result<()> {
        let mut ends = self.ends();
        if ends.tap.is_some() {
            return Err(Error::NetSlotTaken { slot: self.shared.number });
        }
        if let Some(session) = &mut ends.driver {
            session.start(&tap, self.limiters(), self.name())?;
        }
        ends.tap = Some(tap);
        self.shared.link.set(true)
    }

    pub(super) fn link(&self) -> &Link {
        &self.shared.link
    }

    /// The driver is ready, and the event loop is asked to start its thread.
    ///
    /// # Errors
    /// The queues are not those of a network device, or the kernel refuses.
    pub(super) fn activate(&self, activation: Activation) -> Result<()> {
        let mut ends = self.ends();
        let interrupt = activation.interrupt.clone();
        let link = Arc::clone(&self.shared.link);
        let session = ends.driver.insert(Session::new(activation, link, Arc::clone(&self.shared.notice))?);
        session.watch_notice()?;
        // A vCPU does this, and may start no thread.
        self.shared.notice.write(1).map_err(Error::EventFd)?;
        self.shared.link.connect(interrupt)
    }

    /// The event loop was woken: the driver waits for its thread, or the thread has left a word in the device's health.
    /// A TAP that has become useless meanwhile is nothing that the driver could be blamed for: it finds the link down.
    ///
    /// # Errors
    /// The driver cannot be told.
    pub(super) fn process(&self) -> Result<()> {
        // Nonblocking; without a count there is nothing to clear.
        let _ = self.shared.notice.read();
        let mut ends = self.ends();
        let Ends { tap, driver } = &mut *ends;
        if let (Some(tap), Some(session)) = (tap, driver)
            && !session.has_started()
            && self.shared.link.state().up
            && let Err(error) = session.start(tap, self.limiters(), self.name())
        {
            session.note(error);
            self.shared.link.set(false)?;
        }
        Ok(())
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

    fn limiters(&self) -> Limiters {
        self.shared.limiters.clone()
    }

    fn name(&self) -> String {
        format!("net{}", self.shared.number)
    }

    fn ends(&self) -> MutexGuard<'_, Ends> {
        self.shared.ends.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
