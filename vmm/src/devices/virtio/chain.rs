//! A descriptor chain as what a device needs of it: slices of guest memory to read and to write.
//!
//! virtio-queue walks a chain and bounds the walk, but ends it silently where it is broken, so that half a request
//! looks like a whole one. A [`Chain`] exists only for a chain that keeps the rules of virtio 1.2, 2.7.4 and 2.7.5.

use std::collections::VecDeque;
use std::ops::Deref;

use virtio_queue::DescriptorChain;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{GuestMemory as _, GuestMemoryMmap, VolatileSlice};

/// The buffers of one request. A device must not care how they are cut into descriptors (virtio 1.2, 2.7.4).
pub struct Chain<'a> {
    /// What the device reads.
    pub readable: Buffers<'a>,
    /// What the device writes.
    pub writable: Buffers<'a>,
}

impl<'a> Chain<'a> {
    /// Walks a chain of at most `limit` descriptors, all of whose buffers lie in `memory`.
    ///
    /// None if the chain is endless, longer than that, leaves its table or guest memory, has a readable
    /// descriptor after a writable one, or an indirect table that is no table.
    pub fn walk<M>(memory: &'a GuestMemoryMmap, descriptors: DescriptorChain<M>, limit: u16) -> Option<Self>
    where
        M: Deref<Target = GuestMemoryMmap>,
    {
        let mut chain = Self { readable: Buffers::default(), writable: Buffers::default() };
        let mut left = limit;
        let mut complete = false;
        let mut seen_writable = false;
        for descriptor in descriptors {
            left = left.checked_sub(1)?;
            complete = !descriptor.has_next();
            if descriptor.is_write_only() {
                seen_writable = true;
                chain.writable.push(memory, descriptor)?;
            } else if seen_writable {
                return None;
            } else {
                chain.readable.push(memory, descriptor)?;
            }
        }
        complete.then_some(chain)
    }
}

/// Bytes of guest memory in the order in which the driver gave them. None of its slices is empty.
#[derive(Clone, Debug, Default)]
pub struct Buffers<'a> {
    slices: VecDeque<VolatileSlice<'a>>,
    length: usize,
}

impl<'a> Buffers<'a> {
    /// In bytes; below 2³² (virtio 1.2, 2.7.5.2).
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether there is nothing left.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The slices in order.
    pub fn slices(&self) -> impl Iterator<Item = &VolatileSlice<'a>> {
        self.slices.iter()
    }

    /// Takes the first `count` bytes away, if there are so many.
    pub fn split_front(&mut self, count: usize) -> Option<Self> {
        let rest = self.length.checked_sub(count)?;
        let mut front = Self::default();
        while front.length < count {
            let slice = self.slices.pop_front()?;
            let wanted = count - front.length;
            if slice.len() > wanted {
                let (first, second) = slice.split_at(wanted).ok()?;
                self.slices.push_front(second);
                front.add(first);
            } else {
                front.add(slice);
            }
        }
        self.length = rest;
        Some(front)
    }

    /// Takes the last `count` bytes away, if there are so many.
    pub fn split_back(&mut self, count: usize) -> Option<Self> {
        let mut back = self.clone();
        *self = back.split_front(self.length.checked_sub(count)?)?;
        Some(back)
    }

    /// Reads as much as there is and `target` has room for.
    pub fn copy_to(&self, mut target: &mut [u8]) {
        for slice in &self.slices {
            let copied = slice.copy_to(target);
            target = target.get_mut(copied..).unwrap_or_default();
        }
    }

    /// Writes as much of `source` as there is room for.
    pub fn copy_from(&self, mut source: &[u8]) {
        for slice in &self.slices {
            let (now, later) = source.split_at(source.len().min(slice.len()));
            slice.copy_from(now);
            source = later;
        }
    }

    fn push(&mut self, memory: &'a GuestMemoryMmap, descriptor: Descriptor) -> Option<()> {
        let length = usize::try_from(descriptor.len()).ok()?;
        for slice in memory.get_slices(descriptor.addr(), length) {
            self.add(slice.ok()?);
        }
        Some(())
    }

    fn add(&mut self, slice: VolatileSlice<'a>) {
        self.length += slice.len();
        self.slices.push_back(slice);
    }
}
