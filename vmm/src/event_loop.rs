//! The VMM's one event loop: epoll, and who is called when a descriptor is ready.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::devices::virtio::DeviceEvent;
use crate::error::{Error, Result};

/// Registers one device's descriptors with the event loop. Level-triggered.
#[derive(Clone)]
pub struct Registrar {
    epoll: Arc<Epoll>,
    owner: u16,
}

/// Set in an event's token when a queue was kicked; the low bits are the queue's number.
const QUEUE: u64 = 1 << 32;

/// Where the owner's number starts in an event's token.
const OWNER_SHIFT: u32 = 48;

/// The most events that are handled before the loop asks for more.
const BATCH: usize = 64;

/// The loop's epoll instance.
pub struct EventLoop {
    epoll: Arc<Epoll>,
    events: Vec<EpollEvent>,
}

/// A descriptor is ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ready {
    /// The number of the subscriber that registered it.
    pub owner: u16,
    /// Which descriptor, and for what.
    pub event: DeviceEvent,
}

impl EventLoop {
    /// A loop that watches nothing yet.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn new() -> Result<Self> {
        Ok(Self {
            epoll: Arc::new(Epoll::new().map_err(Error::EventLoop)?),
            events: vec![EpollEvent::default(); BATCH],
        })
    }

    /// What the subscriber with this number registers its descriptors with.
    pub fn registrar(&self, owner: u16) -> Registrar {
        Registrar::new(self.epoll.clone(), owner)
    }

    /// Waits until a descriptor is ready. An event may be out of date by the time it is handled: a subscriber has to
    /// expect one for a descriptor that it has just forgotten.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn wait(&mut self) -> Result<Vec<Ready>> {
        loop {
            match self.epoll.wait(-1, &mut self.events) {
                Ok(count) => return Ok(self.events[..count].iter().map(Ready::from).collect()),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::EventLoop(error)),
            }
        }
    }
}

impl From<&EpollEvent> for Ready {
    fn from(event: &EpollEvent) -> Self {
        let (data, set) = (event.data(), event.event_set());
        let closed = EventSet::HANG_UP | EventSet::READ_HANG_UP | EventSet::ERROR;
        Self {
            owner: (data >> OWNER_SHIFT) as u16,
            event: match data & QUEUE {
                0 => DeviceEvent::Backend {
                    token: data as u32,
                    readable: set.intersects(EventSet::IN | closed),
                    writable: set.contains(EventSet::OUT),
                },
                _ => DeviceEvent::Queue(data as u16),
            },
        }
    }
}

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
        self.control(ControlOperation::Add, event.as_raw_fd(), EventSet::IN, QUEUE | u64::from(queue))
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
        self.control(ControlOperation::Modify, fd.as_raw_fd(), interest, u64::from(token))
    }

    /// Forgets `fd`. To be called before it is closed.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn forget(&self, fd: &impl AsRawFd) -> Result<()> {
        self.control(ControlOperation::Delete, fd.as_raw_fd(), EventSet::empty(), 0)
    }

    fn control(&self, operation: ControlOperation, fd: RawFd, interest: EventSet, token: u64) -> Result<()> {
        let data = u64::from(self.owner) << OWNER_SHIFT | token;
        self.epoll.ctl(operation, fd, EpollEvent::new(interest, data)).map_err(Error::EventLoop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::eventfd::EventFd;

    fn eventfd() -> EventFd {
        EventFd::new(libc::EFD_NONBLOCK).unwrap()
    }

    #[test]
    fn an_event_comes_with_its_owner_and_token() {
        let mut events = EventLoop::new().unwrap();
        let (queue, backend) = (eventfd(), eventfd());
        events.registrar(7).watch_queue(3, &queue).unwrap();
        events.registrar(u16::MAX).watch(&backend, EventSet::IN, u32::MAX).unwrap();

        queue.write(1).unwrap();
        let first = events.wait().unwrap();
        queue.read().unwrap();
        backend.write(1).unwrap();
        let second = events.wait().unwrap();

        let kicked = Ready { owner: 7, event: DeviceEvent::Queue(3) };
        let readable = Ready {
            owner: u16::MAX,
            event: DeviceEvent::Backend { token: u32::MAX, readable: true, writable: false },
        };
        assert_eq!((first, second), (vec![kicked], vec![readable]));
    }

    #[test]
    fn closing_the_other_side_is_reported_as_readable_without_any_interest() {
        let mut events = EventLoop::new().unwrap();
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        events.registrar(1).watch(&ours, EventSet::empty(), 5).unwrap();
        drop(theirs);
        let ready = events.wait().unwrap();
        assert!(matches!(
            ready[..],
            [Ready { event: DeviceEvent::Backend { token: 5, readable: true, .. }, .. }]
        ));
    }

    #[test]
    fn a_forgotten_descriptor_is_silent_and_a_changed_one_follows_its_new_interest() {
        let mut events = EventLoop::new().unwrap();
        let (forgotten, changed) = (eventfd(), eventfd());
        let registrar = events.registrar(1);
        registrar.watch(&forgotten, EventSet::IN, 1).unwrap();
        registrar.watch(&changed, EventSet::IN, 2).unwrap();
        registrar.forget(&forgotten).unwrap();
        registrar.change(&changed, EventSet::OUT, 2).unwrap();
        forgotten.write(1).unwrap();
        changed.write(1).unwrap();
        let ready = events.wait().unwrap();
        assert!(matches!(
            ready[..],
            [Ready { event: DeviceEvent::Backend { token: 2, readable: false, writable: true }, .. }]
        ));
    }
}
