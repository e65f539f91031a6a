//! The memory device (virtio 1.2, 5.15): memory that is plugged in and out while the guest runs.
//!
//! The device has a region of guest physical addresses beyond the memory that the guest boots with. The host says how much
//! of it is to be plugged; the driver says which blocks, and asks the device for each. The whole region is guest memory
//! from the start, of which the host reserves nothing: a block costs something only once the guest has touched it, and
//! nothing any more once it was unplugged.
//!
//! A guest that touches unplugged memory gets it all the same. Nothing between the guest and the host's kernel could
//! prevent that without a device falling over the hole as well, and what a pod uses is bounded by its cgroup.
//!
//! - [`MemHandle`] is how the host says how much.
//! - `region` knows which blocks are plugged, and answers the driver; `blocks` is its bitmap.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_MEM;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT as _, QueueState, QueueT as _};
use vm_memory::{GuestAddressSpace as _, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::chain::Chain;
use super::{
    Activation, DeviceEvent, DeviceState, GuestMemory, Health, Interrupt, VirtioDevice, read_config_from,
};
use crate::error::{Error, Result};
use crate::event_loop::Registrar;
use crate::memory::Pluggable;
use region::{REQUEST_SIZE, Region, Response};

mod blocks;
mod region;
#[cfg(test)]
mod tests;

/// Linux has one request under way at a time.
const QUEUE_SIZES: [u16; 1] = [16];

/// The most requests in one turn of the event loop: a driver that goes on and on does so in turn with everything else.
const BATCH: u16 = 8;

/// The driver may not touch unplugged memory, not even to read it (virtio 1.2, 5.15.3).
const VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE: u32 = 1;

/// What the memory device keeps beside its queue.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemState {
    /// Guest physical address of the region.
    start: u64,
    /// In bytes.
    size: u64,
    /// How much the driver is to have plugged, in bytes.
    requested: u64,
    /// One bit for each block, the first in the lowest: whether it is plugged.
    blocks: Vec<u64>,
    generation: u32,
}

/// Says how much memory is to be plugged, from any thread.
#[derive(Clone)]
pub struct MemHandle {
    region: Arc<Mutex<Region>>,
}

impl MemHandle {
    /// Asks the driver to have so many bytes plugged, rounded up to whole blocks. It does what it can, and when it can:
    /// plugging takes memory for its own tables, and unplugging takes memory that is not in use.
    ///
    /// # Errors
    /// The region has no room for that, or the driver cannot be told.
    pub fn resize(&self, bytes: u64) -> Result<()> {
        self.region().request(bytes)
    }

    /// What is plugged, in bytes.
    pub fn plugged(&self) -> u64 {
        self.region().plugged()
    }

    fn region(&self) -> MutexGuard<'_, Region> {
        self.region.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The memory device.
pub struct Mem {
    handle: MemHandle,
    active: Option<Active>,
}

struct Active {
    queue: Queue,
    queue_event: EventFd,
    memory: GuestMemory,
    interrupt: Interrupt,
    health: Health,
    registrar: Registrar,
    handle: MemHandle,
    paused: bool,
}

impl Mem {
    /// A device for this region of guest memory, in which nothing is plugged or to be plugged.
    pub fn new(place: Pluggable) -> (Self, MemHandle) {
        let handle = MemHandle { region: Arc::new(Mutex::new(Region::new(place))) };
        (Self { handle: handle.clone(), active: None }, handle)
    }
}

impl VirtioDevice for Mem {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_MEM
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, out: &mut [u8]) {
        read_config_from(&self.handle.region().config(), offset, out);
    }

    fn config_generation(&self) -> u32 {
        self.handle.region().announcement.generation()
    }

    fn activate(&mut self, mut activation: Activation) -> Result<()> {
        self.handle.region().announcement.connect(activation.interrupt.clone())?;
        let (Some(queue), Some(queue_event)) = (activation.queues.pop(), activation.queue_events.pop())
        else {
            return Ok(());
        };
        let active = self.active.insert(Active {
            queue,
            queue_event,
            memory: activation.memory,
            interrupt: activation.interrupt,
            health: activation.health,
            registrar: activation.registrar,
            handle: self.handle.clone(),
            paused: false,
        });
        active.registrar.watch_queue(0, &active.queue_event)
    }

    fn process(&mut self, _event: DeviceEvent) -> Result<()> {
        self.active.as_mut().map_or(Ok(()), Active::serve)
    }

    /// Plugged blocks stay plugged, with what is in them (virtio 1.2, 5.15.5).
    fn reset(&mut self) {
        self.handle.region().announcement.disconnect();
        if let Some(active) = self.active.take() {
            // Fails only if `activate` did not get so far.
            let _ = active.registrar.forget(&active.queue_event);
        }
    }

    fn pause(&mut self) {
        if let Some(active) = &mut self.active {
            active.paused = true;
        }
    }

    fn resume(&mut self) {
        if let Some(active) = &mut self.active {
            active.paused = false;
            if let Err(error) = active.serve() {
                active.health.fail(error);
            }
        }
    }

    fn save(&self) -> Result<DeviceState> {
        Ok(DeviceState::Mem(self.handle.region().save()))
    }

    fn restore(&mut self, state: &DeviceState) -> Result<()> {
        let problem = match state {
            DeviceState::Mem(state) if self.handle.region().restore(state) => return Ok(()),
            DeviceState::Mem(_) => "the region of memory is another one",
            _ => "the state is another device's",
        };
        Err(Error::RestoreDevice { device_type: VIRTIO_ID_MEM, problem })
    }

    fn queue_states(&self) -> Vec<QueueState> {
        self.active.iter().map(|active| active.queue.state()).collect()
    }
}

impl Active {
    /// Answers some of what is in the queue, and asks for another turn if there is more.
    fn serve(&mut self) -> Result<()> {
        if self.paused || !self.queue.ready() {
            return Ok(());
        }
        let memory = self.memory.memory();
        let used = self.queue.next_used();
        self.queue.disable_notification(&*memory).map_err(queue_error)?;
        for _ in 0..BATCH {
            let Some(chain) = self.queue.iter(&*memory).map_err(queue_error)?.next() else {
                break;
            };
            let head = chain.head_index();
            let written = self.answer(&memory, chain);
            self.queue.add_used(&*memory, head, written).map_err(queue_error)?;
        }
        if self.queue.next_used() != used && self.queue.needs_notification(&*memory).map_err(queue_error)? {
            self.interrupt.used_ring().map_err(Error::EventFd)?;
        }
        if self.queue.enable_notification(&*memory).map_err(queue_error)? {
            self.queue_event.write(1).map_err(Error::EventFd)?;
        }
        Ok(())
    }

    /// Answers one request, and says how many bytes were written.
    fn answer(&self, memory: &GuestMemoryMmap, chain: DescriptorChain<&GuestMemoryMmap>) -> u32 {
        let parts = Chain::walk(memory, chain, self.queue.size()).and_then(|mut chain| {
            let request = chain.readable.split_front(REQUEST_SIZE)?;
            let response = chain.writable.split_front(Response::SIZE)?;
            Some((request, response))
        });
        let Some((readable, writable)) = parts else {
            self.health.count_error();
            return 0;
        };
        let mut request = [0; REQUEST_SIZE];
        readable.copy_to(&mut request);
        let response = self.handle.region().answer(&request, memory);
        if response == Response::ERROR {
            self.health.count_error();
        }
        writable.copy_from(&response.bytes());
        Response::SIZE as u32
    }
}

impl Drop for Mem {
    fn drop(&mut self) {
        self.reset();
    }
}

fn queue_error(source: virtio_queue::Error) -> Error {
    Error::Queue { device: "mem", queue: 0, source }
}
