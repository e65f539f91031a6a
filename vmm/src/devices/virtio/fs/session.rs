//! The queues from activation to reset.

use std::os::fd::AsRawFd;
use std::sync::Mutex;
use std::sync::atomic::Ordering;

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::table::lock;
use crate::devices::virtio::{Activation, GuestMemory, Health, Interrupt};
use crate::error::{Error, Result};

/// The epoll token of the event that stops the workers; a queue's token is its number.
const STOP: u64 = u64::MAX;

/// What virtio-queue says of a queue that the driver has broken.
pub(super) type QueueResult<T> = std::result::Result<T, virtio_queue::Error>;

/// The queues and what else the driver has set up, from activation to reset.
pub(super) struct Session {
    pub memory: GuestMemory,
    pub queues: Vec<KickedQueue>,
    /// Edge-triggered on the kicks: each wakes one idle worker, and nobody has to read them.
    pub epoll: Epoll,
    interrupt: Interrupt,
    pub health: Health,
}

impl Session {
    /// Prepares to serve the queues until `stop` is written.
    ///
    /// # Errors
    /// The kicks cannot be waited for.
    pub(super) fn new(activation: Activation, stop: &EventFd) -> Result<Self> {
        let epoll = Epoll::new().map_err(Error::EventLoop)?;
        let watch = |event: &EventFd, interest, token| {
            let interest = EpollEvent::new(interest, token);
            epoll.ctl(ControlOperation::Add, event.as_raw_fd(), interest).map_err(Error::EventLoop)
        };
        watch(stop, EventSet::IN, STOP)?;
        for (token, kick) in (0..).zip(&activation.queue_events) {
            watch(kick, EventSet::IN | EventSet::EDGE_TRIGGERED, token)?;
        }
        let queues = activation.queues.into_iter().zip(activation.queue_events);
        Ok(Self {
            memory: activation.memory,
            queues: queues.map(KickedQueue::new).collect(),
            epoll,
            interrupt: activation.interrupt,
            health: activation.health,
        })
    }

    /// Tells the driver that a request is done. An interrupt that cannot be raised is KVM's to notice; there is nobody
    /// else to tell.
    pub(super) fn interrupt(&self) {
        let _ = self.interrupt.used_ring();
    }

    /// The driver has broken a queue: nothing more is served before it resets the device.
    pub(super) fn give_up(&self) {
        self.health.set_broken();
        let _ = self.interrupt.config_changed();
    }
}

/// A queue and the eventfd by which the driver kicks it.
pub(super) struct KickedQueue {
    queue: Mutex<Queue>,
    kick: EventFd,
}

/// A request that was taken from a queue, and whether there are more.
pub(super) struct NextRequest<'a> {
    pub chain: DescriptorChain<&'a GuestMemoryMmap>,
    pub more: bool,
}

impl KickedQueue {
    fn new((queue, kick): (Queue, EventFd)) -> Self {
        Self { queue: Mutex::new(queue), kick }
    }

    /// Takes the next request, if there is one.
    ///
    /// # Errors
    /// The driver has broken the queue.
    pub(super) fn next_request<'a>(
        &self,
        memory: &'a GuestMemoryMmap,
    ) -> QueueResult<Option<NextRequest<'a>>> {
        let mut queue = lock(&self.queue);
        if !queue.ready() {
            return Ok(None);
        }
        let Some(chain) = queue.iter(memory)?.next() else {
            return Ok(None);
        };
        let more = queue.avail_idx(memory, Ordering::Acquire)?.0 != queue.next_avail();
        Ok(Some(NextRequest { chain, more }))
    }

    /// Has a worker look into the queue. Fails only if the driver's kicks have filled the counter, and then one will.
    pub(super) fn kick(&self) {
        let _ = self.kick.write(1);
    }

    /// How far the device has come.
    pub(super) fn state(&self) -> QueueState {
        lock(&self.queue).state()
    }

    /// Gives a chain back to the driver, and says whether it wants to be told.
    ///
    /// # Errors
    /// The driver has broken the queue.
    pub(super) fn finish(&self, memory: &GuestMemoryMmap, head: u16, written: u32) -> QueueResult<bool> {
        let mut queue = lock(&self.queue);
        queue.add_used(memory, head, written)?;
        queue.needs_notification(memory)
    }
}
