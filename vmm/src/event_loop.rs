//! The VMM's one event loop: epoll, and who is called when a descriptor is ready.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::error::{Error, Result};

/// Registers one device's descriptors with the event loop. Level-triggered.
#[derive(Clone)]
pub struct Registrar {
    epoll: Arc<Epoll>,
    owner: u16,
}

/// Set in an event's token when a queue was kicked; the low bits are the queue's number.
const QUEUE: u64 = 1 << 32;

impl Registrar {
    /// A registrar for the subscriber with this number.
    pub fn new(epoll: Arc<Epoll>, owner: u16) -> Self {
        Self { epoll, owner }
    }

    /// Has `DeviceEvent::Queue(queue)` delivered whenever the eventfd is written; the loop reads it.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn watch_queue(&self, queue: u16, event: &impl AsRawFd) -> Result<()> {
        self.control(
            ControlOperation::Add,
            event.as_raw_fd(),
            EventSet::IN,
            QUEUE | u64::from(queue),
        )
    }

    /// Has `DeviceEvent::Backend` with this token delivered while `fd` is ready for `interest`.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn watch(&self, fd: &impl AsRawFd, interest: EventSet, token: u32) -> Result<()> {
        self.control(ControlOperation::Add, fd.as_raw_fd(), interest, u64::from(token))
    }

    /// Changes what `fd` is watched for. An empty set still reports its closing by the other side.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn change(&self, fd: &impl AsRawFd, interest: EventSet, token: u32) -> Result<()> {
        self.control(
            ControlOperation::Modify,
            fd.as_raw_fd(),
            interest,
            u64::from(token),
        )
    }

    /// Forgets `fd`. To be called before it is closed.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn forget(&self, fd: &impl AsRawFd) -> Result<()> {
        self.control(ControlOperation::Delete, fd.as_raw_fd(), EventSet::empty(), 0)
    }

    fn control(&self, operation: ControlOperation, fd: RawFd, interest: EventSet, token: u64) -> Result<()> {
        let data = u64::from(self.owner) << 48 | token;
        self.epoll
            .ctl(operation, fd, EpollEvent::new(interest, data))
            .map_err(Error::EventLoop)
    }
}
