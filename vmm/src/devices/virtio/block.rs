//! The block device (virtio 1.2, 5.2).
//!
//! Reading and writing a file can block, and a flush can take seconds, so requests are served by a thread of the
//! device's own ([`worker`]) and never by the event loop, which has the pod's streams to carry. The thread starts
//! with the first request: a slot that is never filled costs none.

use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_ID_BYTES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueState;
use vmm_sys_util::eventfd::EventFd;

use self::backend::Backend;
pub use self::slot::BlockSlot;
use self::worker::{Orders, Worker};
use super::rate_limiter::RateLimiter;
use super::{Activation, DeviceEvent, DeviceState, Health, VirtioDevice, read_config_from};
use crate::error::{Error, Result};
use crate::event_loop::Registrar;
use crate::seccomp::{Confinement, Kind};
use crate::thread;

mod backend;
mod slot;
#[cfg(test)]
mod tests;
mod worker;

/// One request is served at a time, and each place in the queue costs the guest memory.
const QUEUE_SIZES: [u16; 1] = [128];

/// `seg_max`: the longest chain, less the header and the status.
const SEG_MAX: u32 = 126;

/// `size_max`: the longest segment, in bytes.
const SIZE_MAX: u32 = 256 << 10;

/// What GET_ID answers (virtio 1.2, 5.2.6).
type Id = [u8; VIRTIO_BLK_ID_BYTES as usize];

/// What the block device keeps beside its queue: what its driver believes of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    /// In sectors.
    capacity: u64,
    generation: u32,
}

/// A block device over a file or another block device, or over none yet.
pub struct Block {
    slot: BlockSlot,
    id: Id,
    read_only: bool,
    limiter: RateLimiter,
    active: Option<Active>,
}

struct Active {
    registrar: Registrar,
    queue_event: EventFd,
    health: Health,
    worker: Arc<Mutex<Worker>>,
    orders: Arc<Orders>,
    confinement: Confinement,
    /// Until it is started, the event loop watches the queue; then the thread does.
    thread: Option<JoinHandle<()>>,
}

impl Block {
    /// A block device, and the handle that fills and empties it at run time. With a read-only backend here, the
    /// driver is told so. Without one, it takes the device for writable whatever [`BlockSlot::attach`] brings, and
    /// a write to a read-only backend fails.
    ///
    /// # Errors
    /// The file's size cannot be found.
    pub fn new(backend: Option<(File, bool)>) -> Result<(Self, BlockSlot)> {
        let read_only = matches!(backend, Some((_, true)));
        let backend = backend.map(|(file, read_only)| Backend::new(file, read_only)).transpose()?;
        let slot = BlockSlot::new(backend);
        let limiter = RateLimiter::default();
        let block = Self { slot: slot.clone(), id: Id::default(), read_only, limiter, active: None };
        Ok((block, slot))
    }

    /// Names the device, by which the guest finds it (`/sys/block/*/serial` in Linux). The first 20 bytes of the
    /// name count; without one, a device answers an empty string.
    #[must_use]
    pub fn with_id(mut self, id: &str) -> Self {
        self.id = Id::default();
        for (target, byte) in self.id.iter_mut().zip(id.bytes()) {
            *target = byte;
        }
        self
    }

    /// Lets so much through and no more.
    #[must_use]
    pub fn with_limiter(mut self, limiter: RateLimiter) -> Self {
        self.limiter = limiter;
        self
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_SIZE_MAX
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | u64::from(self.read_only) << VIRTIO_BLK_F_RO
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, out: &mut [u8]) {
        let mut config = self.slot.state().capacity.to_le_bytes().to_vec();
        config.extend(SIZE_MAX.to_le_bytes());
        config.extend(SEG_MAX.to_le_bytes());
        read_config_from(&config, offset, out);
    }

    fn config_generation(&self) -> u32 {
        self.slot.state().generation
    }

    fn activate(&mut self, mut activation: Activation) -> Result<()> {
        self.slot.connect(activation.interrupt.clone())?;
        let (Some(queue), Some(queue_event)) = (activation.queues.pop(), activation.queue_events.pop())
        else {
            return Ok(());
        };
        let worker = Worker {
            queue,
            queue_event: queue_event.try_clone().map_err(Error::EventFd)?,
            memory: activation.memory,
            interrupt: activation.interrupt,
            health: activation.health.clone(),
            write_through: activation.features & 1 << VIRTIO_BLK_F_FLUSH == 0,
            slot: self.slot.clone(),
            id: self.id,
            limiter: self.limiter.clone(),
        };
        let active = self.active.insert(Active {
            registrar: activation.registrar,
            queue_event,
            health: activation.health,
            worker: Arc::new(Mutex::new(worker)),
            orders: Arc::default(),
            confinement: activation.confinement,
            thread: None,
        });
        active.registrar.watch_queue(0, &active.queue_event)
    }

    fn process(&mut self, event: DeviceEvent) -> Result<()> {
        match (&mut self.active, event) {
            (Some(active), DeviceEvent::Queue(_)) => active.start(),
            _ => Ok(()),
        }
    }

    fn reset(&mut self) {
        self.slot.disconnect();
        if let Some(active) = self.active.take() {
            active.stop();
        }
    }

    fn pause(&mut self) {
        if let Some(active) = &self.active {
            active.orders.pause();
            // Whoever has the worker sees the order before its next request.
            drop(active.worker());
        }
    }

    fn resume(&mut self) {
        if let Some(active) = &self.active {
            active.orders.resume();
            if let Err(error) = active.worker().wake_if_pending() {
                active.health.fail(error);
            }
        }
    }

    fn save(&self) -> Result<DeviceState> {
        Ok(DeviceState::Block(self.slot.state()))
    }

    fn restore(&mut self, state: &DeviceState) -> Result<()> {
        let DeviceState::Block(state) = state else {
            return Err(Error::RestoreDevice {
                device_type: VIRTIO_ID_BLOCK,
                problem: "the state is another device's",
            });
        };
        self.slot.restore(state);
        Ok(())
    }

    fn queue_states(&self) -> Vec<QueueState> {
        self.active.iter().map(|active| active.worker().queue_state()).collect()
    }
}

impl Active {
    /// Starts the thread, for a kick that the event loop has taken.
    fn start(&mut self) -> Result<()> {
        if self.thread.is_some() {
            return Ok(());
        }
        self.registrar.forget(&self.queue_event)?;
        let (worker, orders) = (Arc::clone(&self.worker), Arc::clone(&self.orders));
        let queue_event = self.queue_event.try_clone().map_err(Error::EventFd)?;
        let run = move |()| worker::run(&worker, &queue_event, &orders);
        self.thread = Some(thread::spawn("block".into(), Kind::Block, &self.confinement, || Ok(()), run)?);
        Ok(())
    }

    fn stop(self) {
        let Some(thread) = self.thread else {
            // Fails only if `activate` did not get so far.
            let _ = self.registrar.forget(&self.queue_event);
            return;
        };
        self.orders.stop();
        // An eventfd always takes a one, and a thread that panicked has stopped as well.
        let _ = self.queue_event.write(1);
        let _ = thread.join();
    }

    fn worker(&self) -> MutexGuard<'_, Worker> {
        self.worker.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.reset();
    }
}

fn device_error(operation: &'static str, source: std::io::Error) -> Error {
    Error::Device { device: "block", operation, source }
}
