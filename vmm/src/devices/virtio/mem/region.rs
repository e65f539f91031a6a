//! The device-managed region, and what the driver may do with its blocks.

use std::ops::Range;

use vm_memory::{GuestAddress, GuestMemory as _, GuestMemoryMmap};

use super::MemState;
use super::blocks::Blocks;
use crate::devices::virtio::announcement::Announcement;
use crate::devices::virtio::discard::discard;
use crate::error::{Error, Result};
use crate::memory::{BLOCK_SIZE, Pluggable};

/// The length of every request, in bytes (virtio 1.2, 5.15.6).
pub(super) const REQUEST_SIZE: usize = 24;

/// Types of requests.
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

/// States of blocks.
const PLUGGED: u16 = 0;
const UNPLUGGED: u16 = 1;
const MIXED: u16 = 2;

/// What the driver is answered: whether the request was carried out, and the state of blocks if it asked for that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Response {
    kind: u16,
    state: u16,
}

impl Response {
    pub(super) const ACK: Self = Self { kind: 0, state: 0 };
    /// More would be plugged than is requested.
    pub(super) const NACK: Self = Self { kind: 1, state: 0 };
    /// Not now.
    pub(super) const BUSY: Self = Self { kind: 2, state: 0 };
    /// The request breaks a rule.
    pub(super) const ERROR: Self = Self { kind: 3, state: 0 };

    /// The length of every response, in bytes.
    pub(super) const SIZE: usize = 10;

    pub(super) fn bytes(self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        bytes[..2].copy_from_slice(&self.kind.to_le_bytes());
        bytes[8..].copy_from_slice(&self.state.to_le_bytes());
        bytes
    }
}

/// The region. All of it is usable.
pub(super) struct Region {
    place: Pluggable,
    /// In bytes.
    requested: u64,
    blocks: Blocks,
    pub(super) announcement: Announcement,
}

impl Region {
    pub(super) fn new(place: Pluggable) -> Self {
        let blocks = Blocks::new((place.size / BLOCK_SIZE) as usize);
        Self { place, requested: 0, blocks, announcement: Announcement::default() }
    }

    /// Asks the driver to have so many bytes plugged.
    pub(super) fn request(&mut self, bytes: u64) -> Result<()> {
        let requested = bytes.next_multiple_of(BLOCK_SIZE);
        if requested > self.place.limit {
            return Err(Error::PluggedMemory { bytes, limit: self.place.limit });
        }
        if requested != self.requested {
            self.requested = requested;
            self.announcement.change();
        }
        self.announcement.tell()
    }

    /// In bytes.
    pub(super) fn plugged(&self) -> u64 {
        self.blocks.plugged() as u64 * BLOCK_SIZE
    }

    /// `struct virtio_mem_config` (virtio 1.2, 5.15.4). There is one NUMA node, and no ACPI to tell its number.
    pub(super) fn config(&self) -> Vec<u8> {
        let Pluggable { start, size, .. } = self.place;
        let node_and_padding = 0;
        let fields = [BLOCK_SIZE, node_and_padding, start.0, size, size, self.plugged(), self.requested];
        fields.into_iter().flat_map(u64::to_le_bytes).collect()
    }

    /// Does what the driver asks for (virtio 1.2, 5.15.6.1 to 5.15.6.4).
    pub(super) fn answer(&mut self, request: &[u8; REQUEST_SIZE], memory: &GuestMemoryMmap) -> Response {
        let [t0, t1, _, _, _, _, _, _, address @ .., n0, n1, _, _, _, _, _, _] = *request;
        let kind = u16::from_le_bytes([t0, t1]);
        if kind == UNPLUG_ALL {
            return self.unplug(0..self.blocks.total(), memory);
        }
        let count = u16::from_le_bytes([n0, n1]);
        let Some(range) = self.range(u64::from_le_bytes(address), count) else {
            return Response::ERROR;
        };
        let plugged = self.blocks.count(range.clone());
        match kind {
            PLUG if plugged == 0 => self.plug(range),
            UNPLUG if plugged == range.len() => self.unplug(range, memory),
            STATE if plugged == 0 => Response { state: UNPLUGGED, ..Response::ACK },
            STATE if plugged == range.len() => Response { state: PLUGGED, ..Response::ACK },
            STATE => Response { state: MIXED, ..Response::ACK },
            _ => Response::ERROR,
        }
    }

    /// The blocks from an address on, if there are any and all of them are the region's.
    fn range(&self, address: u64, count: u16) -> Option<Range<usize>> {
        let offset = address.checked_sub(self.place.start.0)?;
        let first = usize::try_from(offset / BLOCK_SIZE).ok()?;
        let end = first.checked_add(usize::from(count))?;
        (offset.is_multiple_of(BLOCK_SIZE) && count > 0 && end <= self.blocks.total()).then_some(first..end)
    }

    fn plug(&mut self, range: Range<usize>) -> Response {
        if self.plugged() + range.len() as u64 * BLOCK_SIZE > self.requested {
            return Response::NACK;
        }
        self.blocks.set(range, true);
        self.announcement.change_unannounced();
        Response::ACK
    }

    fn unplug(&mut self, range: Range<usize>, memory: &GuestMemoryMmap) -> Response {
        let start = GuestAddress(self.place.start.0 + range.start as u64 * BLOCK_SIZE);
        for pages in memory.get_slices(start, range.len() * BLOCK_SIZE as usize) {
            if !pages.is_ok_and(|pages| discard(memory, &pages).is_ok()) {
                return Response::BUSY;
            }
        }
        self.blocks.set(range, false);
        self.announcement.change_unannounced();
        Response::ACK
    }

    pub(super) fn save(&self) -> MemState {
        MemState {
            start: self.place.start.0,
            size: self.place.size,
            requested: self.requested,
            blocks: self.blocks.words().to_vec(),
            generation: self.announcement.generation(),
        }
    }

    /// Takes up a saved state, if it is of this region and within its limit.
    pub(super) fn restore(&mut self, state: &MemState) -> bool {
        let same = (state.start, state.size) == (self.place.start.0, self.place.size);
        let sane = state.requested <= self.place.limit && state.requested.is_multiple_of(BLOCK_SIZE);
        match Blocks::from_words(state.blocks.clone(), self.blocks.total()) {
            Some(blocks) if same && sane => self.blocks = blocks,
            _ => return false,
        }
        self.requested = state.requested;
        self.announcement.restore(state.generation, false);
        true
    }
}
