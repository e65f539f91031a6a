//! From the TAP into the guest's buffers.

use std::collections::VecDeque;

use fuse_backend_rs::file_buf::FileVolatileSlice;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_MRG_RXBUF};
use virtio_queue::{Queue, QueueOwnedT as _, QueueState, QueueT as _};
use vm_memory::GuestMemoryMmap;

use super::wire::{Carried, Wire};
use super::worker::{BATCH, Progress};
use super::{HEADER_SIZE, MAX_PACKET};
use crate::devices::virtio::Health;
use crate::devices::virtio::chain::{Buffers, Chain};
use crate::devices::virtio::used::{publish, wants_interrupt};

/// The most buffers that `readv` takes at once (`IOV_MAX`, Linux's `include/uapi/linux/uio.h`).
const MAX_BUFFERS: usize = 1024;

/// The length of `num_buffers`, the last field of the header, in bytes.
const NUM_BUFFERS_SIZE: usize = 2;

type QueueResult<T> = Result<T, virtio_queue::Error>;

/// The receive queue.
///
/// A packet that the driver has no room for waits in the host, where the TAP's queue bounds what it costs: nothing is read
/// before at least one buffer is there. How long the next packet is shows only when it has been read. So it is read into
/// the guest's buffers where they have room for any packet, and into the device's own memory where they have not; there
/// it is held until they have.
pub(super) struct Receiver {
    queue: Queue,
    /// The driver takes a packet in several buffers.
    mergeable: bool,
    /// The driver wants to hear of checksums.
    checksums: bool,
    /// `next_used` when the driver was last told of used buffers.
    told: u16,
    held: Held,
}

/// Room for a packet that the driver has none for; used rarely, and then once at a time.
#[derive(Default)]
struct Held {
    bytes: Vec<u8>,
    /// Zero while there is none.
    length: usize,
}

/// Chains that the driver has made available and the device has not used.
#[derive(Default)]
struct Posted<'a> {
    chains: VecDeque<(u16, Buffers<'a>)>,
    /// In bytes.
    capacity: usize,
    /// In buffers, as `readv` counts them.
    buffers: usize,
}

/// Whether what is posted has room for a packet.
enum Room {
    Enough,
    /// Not yet: the driver may post more.
    Short,
    /// Not ever: one packet can get no more than this.
    Limited,
    /// The next chain is none for packets. It has been given back.
    Useless,
}

impl Receiver {
    pub(super) fn new(queue: Queue, features: u64) -> Self {
        let told = queue.next_used();
        Self {
            queue,
            mergeable: features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0,
            checksums: features & 1 << VIRTIO_NET_F_GUEST_CSUM != 0,
            told,
            held: Held::default(),
        }
    }

    pub(super) fn queue_state(&self) -> QueueState {
        self.queue.state()
    }

    /// Receives packets, as long as there are any and the driver has room for them.
    ///
    /// # Errors
    /// The driver has broken the queue.
    pub(super) fn receive(
        &mut self,
        memory: &GuestMemoryMmap,
        wire: &mut Wire,
        health: &Health,
    ) -> QueueResult<Progress> {
        if !self.queue.ready() || !(wire.readable() || self.held.is_some()) {
            return Ok(Progress::default());
        }
        let mut posted = Posted::default();
        let more = self.fill(memory, wire, health, &mut posted);
        // What was not used stays available.
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(posted.chains.len() as u16));
        let more = more?;
        Ok(Progress { more, interrupt: wants_interrupt(&self.queue, memory, &mut self.told)? })
    }

    /// Fills posted chains with packets. Says whether it stopped because it was enough for one turn.
    fn fill<'a>(
        &mut self,
        memory: &'a GuestMemoryMmap,
        wire: &mut Wire,
        health: &Health,
        posted: &mut Posted<'a>,
    ) -> QueueResult<bool> {
        // While there are buffers, more of them are no news.
        self.queue.disable_notification(memory)?;
        let mut received = false;
        for _ in 0..BATCH {
            let carried = match (self.gather(memory, health, posted)?, self.held.is_some()) {
                (Room::Useless, _) => continue,
                (Room::Enough, true) => posted.copy_from(self.held.take()),
                (Room::Enough, false) => wire.receive(&posted.slices()),
                (Room::Limited, true) => {
                    self.held.take();
                    continue;
                }
                (Room::Short | Room::Limited, false) if posted.capacity > 0 => {
                    match self.held.receive(wire) {
                        Carried::Packet(_) => continue,
                        carried => carried,
                    }
                }
                (Room::Short | Room::Limited, _) => {
                    if !self.queue.enable_notification(memory)? {
                        return Ok(false);
                    }
                    self.queue.disable_notification(memory)?;
                    continue;
                }
            };
            match carried {
                Carried::Packet(length) => {
                    publish(&mut self.queue, memory, &posted.complete(length, self.checksums))?;
                    received = true;
                }
                Carried::Later => return Ok(false),
                // An error that stays is not tried again before the TAP says that something has changed.
                Carried::Lost | Carried::Refused => return Ok(received),
            }
        }
        Ok(true)
    }

    /// Takes chains from the queue until they have room for the packet that is held, or for any. What is posted are
    /// always the last chains that were taken.
    fn gather<'a>(
        &mut self,
        memory: &'a GuestMemoryMmap,
        health: &Health,
        posted: &mut Posted<'a>,
    ) -> QueueResult<Room> {
        let wanted = if self.held.is_some() { self.held.length } else { MAX_PACKET };
        let most = if self.mergeable { self.queue.size() } else { 1 };
        while posted.capacity < wanted {
            if posted.chains.len() >= usize::from(most) {
                return Ok(Room::Limited);
            }
            let Some(chain) = self.queue.iter(memory)?.next() else {
                return Ok(Room::Short);
            };
            let head = chain.head_index();
            let buffers = Chain::walk(memory, chain, self.queue.size())
                .filter(|chain| chain.readable.is_empty() && chain.writable.len() > HEADER_SIZE);
            match buffers {
                Some(Chain { writable, .. }) if posted.has_place_for(&writable) => posted.add(head, writable),
                _ if posted.chains.is_empty() => {
                    health.count_error();
                    self.queue.add_used(memory, head, 0)?;
                    return Ok(Room::Useless);
                }
                // Its turn comes when those before it are used.
                _ => {
                    self.queue.go_to_previous_position();
                    return Ok(Room::Limited);
                }
            }
        }
        Ok(Room::Enough)
    }
}

impl Held {
    fn is_some(&self) -> bool {
        self.length > 0
    }

    /// Reads a packet from the TAP.
    fn receive(&mut self, wire: &mut Wire) -> Carried {
        self.bytes.resize(MAX_PACKET, 0);
        let carried = wire.receive_into(&mut self.bytes);
        if let Carried::Packet(length) = carried {
            self.length = length;
        }
        carried
    }

    /// The packet, which is held no longer.
    fn take(&mut self) -> &[u8] {
        let length = std::mem::take(&mut self.length);
        &self.bytes[..length]
    }
}

impl<'a> Posted<'a> {
    /// Whether `readv` takes these buffers, too.
    fn has_place_for(&self, buffers: &Buffers<'a>) -> bool {
        self.buffers + buffers.slices().count() <= MAX_BUFFERS
    }

    fn add(&mut self, head: u16, buffers: Buffers<'a>) {
        self.capacity += buffers.len();
        self.buffers += buffers.slices().count();
        self.chains.push_back((head, buffers));
    }

    fn slices(&self) -> Vec<FileVolatileSlice<'a>> {
        let slices = self.chains.iter().flat_map(|(_, buffers)| buffers.slices());
        slices.map(FileVolatileSlice::from_volatile_slice).collect()
    }

    /// Writes a packet that fits.
    fn copy_from(&self, packet: &[u8]) -> Carried {
        let mut rest = packet;
        for (_, buffers) in &self.chains {
            buffers.copy_from(rest);
            rest = rest.get(buffers.len()..).unwrap_or_default();
        }
        Carried::Packet(packet.len())
    }

    /// Takes the chains away that a packet of `length` bytes fills, and completes its header: how many they are, and no
    /// flags for a driver that knows none. What the used ring is to say of them.
    fn complete(&mut self, length: usize, checksums: bool) -> Vec<(u16, u32)> {
        let mut used = Vec::new();
        let mut header = None;
        let mut left = length;
        while left > 0
            && let Some((head, mut buffers)) = self.chains.pop_front()
        {
            self.capacity -= buffers.len();
            self.buffers -= buffers.slices().count();
            let written = left.min(buffers.len());
            used.push((head, written as u32));
            left -= written;
            header = header.or_else(|| buffers.split_front(HEADER_SIZE));
        }
        if let Some(mut header) = header {
            if !checksums {
                // The flags are its first byte.
                header.copy_from(&[0]);
            }
            if let Some(num_buffers) = header.split_back(NUM_BUFFERS_SIZE) {
                num_buffers.copy_from(&(used.len() as u16).to_le_bytes());
            }
        }
        used
    }
}
