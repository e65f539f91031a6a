//! From the guest's buffers into the TAP.

use fuse_backend_rs::file_buf::FileVolatileSlice;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT as _, QueueState, QueueT as _};
use vm_memory::GuestMemoryMmap;

use super::wire::{Carried, Wire};
use super::worker::{BATCH, Progress};
use super::{HEADER_SIZE, MAX_PACKET};
use crate::devices::virtio::Health;
use crate::devices::virtio::chain::{Buffers, Chain};

type QueueResult<T> = Result<T, virtio_queue::Error>;

/// The transmit queue.
pub(super) struct Transmitter {
    queue: Queue,
}

impl Transmitter {
    pub(super) fn new(queue: Queue) -> Self {
        Self { queue }
    }

    pub(super) fn queue_state(&self) -> QueueState {
        self.queue.state()
    }

    /// Sends packets, as long as there are any and the TAP takes them. One that it takes for no packet is dropped, as
    /// are all once its interface is gone.
    ///
    /// # Errors
    /// The driver has broken the queue.
    pub(super) fn send(
        &mut self,
        memory: &GuestMemoryMmap,
        wire: &mut Wire,
        health: &Health,
    ) -> QueueResult<Progress> {
        if !self.queue.ready() || !wire.writable() {
            return Ok(Progress::default());
        }
        let before = self.queue.next_used();
        let more = self.drain(memory, wire, health)?;
        let interrupt = self.queue.next_used() != before && self.queue.needs_notification(memory)?;
        Ok(Progress { more, interrupt })
    }

    /// Says whether it stopped because it was enough for one turn.
    fn drain(&mut self, memory: &GuestMemoryMmap, wire: &mut Wire, health: &Health) -> QueueResult<bool> {
        self.queue.disable_notification(memory)?;
        for _ in 0..BATCH {
            let Some(chain) = self.queue.iter(memory)?.next() else {
                if !self.queue.enable_notification(memory)? {
                    return Ok(false);
                }
                self.queue.disable_notification(memory)?;
                continue;
            };
            let head = chain.head_index();
            let carried = match packet(memory, chain, self.queue.size()) {
                Some(packet) => {
                    let slices: Vec<_> =
                        packet.slices().map(FileVolatileSlice::from_volatile_slice).collect();
                    wire.send(&slices, packet.len())
                }
                None => Carried::Refused,
            };
            match carried {
                Carried::Later => {
                    self.queue.go_to_previous_position();
                    return Ok(false);
                }
                Carried::Refused => health.count_error(),
                Carried::Packet(_) | Carried::Lost => {}
            }
            self.queue.add_used(memory, head, 0)?;
        }
        Ok(true)
    }
}

/// The packet in a chain, if there may be one. Of so many descriptors and bytes, `writev` takes all slices at once.
fn packet<'a>(
    memory: &'a GuestMemoryMmap,
    chain: DescriptorChain<&GuestMemoryMmap>,
    limit: u16,
) -> Option<Buffers<'a>> {
    let chain = Chain::walk(memory, chain, limit)?;
    let length = chain.readable.len();
    (chain.writable.is_empty() && length > HEADER_SIZE && length <= MAX_PACKET).then_some(chain.readable)
}
