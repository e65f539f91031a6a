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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use virtio_queue::{QueueOwnedT, QueueT};
    use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

    use super::*;
    use crate::devices::virtio::GuestMemory;
    use crate::devices::virtio::testing::{
        self, DriverQueue, HIGH_MEMORY, HIGH_MEMORY_SIZE, INDIRECT, LOW_MEMORY, NEXT, WRITE, guest_memory,
    };

    const SIZE: u16 = 16;
    const BUFFER: u64 = 1 << 20;
    const TABLE: u64 = 2 << 20;

    /// Descriptors of the table from zero on, the first of them made available. The lengths of what the device may
    /// read and write, if it is a chain.
    fn walk(descriptors: &[testing::Descriptor]) -> Option<(usize, usize)> {
        walk_in(&guest_memory(), descriptors)
    }

    fn walk_in(memory: &GuestMemory, descriptors: &[testing::Descriptor]) -> Option<(usize, usize)> {
        let mut queue = DriverQueue::new(memory, 0, SIZE);
        for (number, descriptor) in (0..).zip(descriptors) {
            queue.write_descriptor(number, *descriptor);
        }
        queue.publish(0);
        let memory = memory.memory();
        let mut device = queue.device_side();
        let chain = device.iter(&*memory).unwrap().next().unwrap();
        let chain = Chain::walk(&memory, chain, device.size())?;
        Some((chain.readable.len(), chain.writable.len()))
    }

    fn descriptor(address: u64, length: u32, flags: u16, next: u16) -> testing::Descriptor {
        testing::Descriptor { address, length, flags, next }
    }

    fn write_table(memory: &GuestMemory, table: &[testing::Descriptor]) {
        let bytes: Vec<u8> = table.iter().flat_map(|descriptor| descriptor.bytes()).collect();
        memory.memory().write_slice(&bytes, GuestAddress(TABLE)).unwrap();
    }

    #[test]
    fn a_chain_is_split_into_what_is_read_and_what_is_written() {
        let chain = [
            descriptor(BUFFER, 16, NEXT, 1),
            descriptor(BUFFER + 512, 100, NEXT, 2),
            descriptor(HIGH_MEMORY, 512, NEXT | WRITE, 3),
            descriptor(BUFFER + 4096, 1, WRITE, 0),
        ];
        assert_eq!(walk(&chain), Some((116, 513)));
    }

    #[test]
    fn empty_buffers_are_no_buffers() {
        let chain = [
            descriptor(BUFFER, 0, NEXT, 1),
            descriptor(u64::MAX, 0, NEXT | WRITE, 2),
            descriptor(0, 0, WRITE, 0),
        ];
        assert_eq!(walk(&chain), Some((0, 0)));
    }

    #[test]
    fn a_chain_may_fill_the_whole_table_and_all_of_memory() {
        let mut chain: Vec<_> = (1..=SIZE).map(|next| descriptor(BUFFER, 1, NEXT, next)).collect();
        chain[usize::from(SIZE) - 1] = descriptor(0, u32::try_from(LOW_MEMORY).unwrap(), WRITE, 0);
        assert_eq!(walk(&chain), Some((15, usize::try_from(LOW_MEMORY).unwrap())));
    }

    #[test]
    fn an_endless_chain_is_refused() {
        assert_eq!(walk(&[descriptor(BUFFER, 1, NEXT, 0)]), None);
        assert_eq!(walk(&[descriptor(BUFFER, 1, NEXT, 1), descriptor(BUFFER, 1, NEXT, 0)]), None);
    }

    #[test]
    fn a_chain_that_leaves_its_table_is_refused() {
        for next in [SIZE, SIZE + 1, u16::MAX] {
            assert_eq!(walk(&[descriptor(BUFFER, 1, NEXT, next)]), None, "{next}");
        }
    }

    #[test]
    fn a_buffer_outside_guest_memory_is_refused() {
        let cases = [
            (LOW_MEMORY, 1),
            (LOW_MEMORY - 1, 2),
            (HIGH_MEMORY - 1, 2),
            (HIGH_MEMORY + HIGH_MEMORY_SIZE - 1, 2),
            (u64::MAX, 1),
            (u64::MAX - 1, u32::MAX),
            (0, u32::MAX),
        ];
        for (address, length) in cases {
            assert_eq!(walk(&[descriptor(address, length, 0, 0)]), None, "{address:#x} {length:#x}");
            assert_eq!(walk(&[descriptor(address, length, WRITE, 0)]), None, "{address:#x} {length:#x}");
        }
    }

    #[test]
    fn a_chain_of_more_than_4_gib_is_refused() {
        let all = u32::try_from(LOW_MEMORY).unwrap();
        let memory = guest_memory();
        // 128 times 64 MiB, each of them in guest memory.
        let mut queue = DriverQueue::new(&memory, 0, 128);
        queue.add(&[testing::Descriptor::readable(0, all); 128]);
        let memory = memory.memory();
        let mut device = queue.device_side();
        let chain = device.iter(&*memory).unwrap().next().unwrap();
        assert!(Chain::walk(&memory, chain, device.size()).is_none());
    }

    #[test]
    fn a_readable_buffer_after_a_writable_one_is_refused() {
        assert_eq!(walk(&[descriptor(BUFFER, 1, NEXT | WRITE, 1), descriptor(BUFFER, 1, 0, 0)]), None);
        assert_eq!(walk(&[descriptor(BUFFER, 0, NEXT | WRITE, 1), descriptor(BUFFER, 1, 0, 0)]), None);
    }

    #[test]
    fn an_indirect_table_is_walked() {
        let memory = guest_memory();
        write_table(&memory, &[descriptor(BUFFER, 20, NEXT, 1), descriptor(BUFFER, 30, WRITE, 0)]);
        assert_eq!(walk_in(&memory, &[descriptor(TABLE, 32, INDIRECT, 0)]), Some((20, 30)));
        // After direct ones (virtio 1.2, 2.7.5.3.2), and with a NEXT that means nothing.
        let mixed = [descriptor(BUFFER, 1, NEXT, 1), descriptor(TABLE, 32, INDIRECT, 0)];
        assert_eq!(walk_in(&memory, &mixed), Some((21, 30)));
        assert_eq!(walk_in(&memory, &[descriptor(TABLE, 32, INDIRECT | NEXT, 5)]), Some((20, 30)));
    }

    #[test]
    fn an_indirect_table_inside_an_indirect_table_is_refused() {
        let memory = guest_memory();
        write_table(&memory, &[descriptor(BUFFER, 20, NEXT, 1), descriptor(TABLE, 32, INDIRECT, 0)]);
        assert_eq!(walk_in(&memory, &[descriptor(TABLE, 32, INDIRECT, 0)]), None);
        write_table(&memory, &[descriptor(TABLE, 16, INDIRECT, 0)]);
        assert_eq!(walk_in(&memory, &[descriptor(TABLE, 16, INDIRECT, 0)]), None);
    }

    #[test]
    fn an_indirect_table_that_is_no_table_is_refused() {
        let memory = guest_memory();
        write_table(&memory, &[descriptor(BUFFER, 1, 0, 0)]);
        for (address, length) in [(TABLE, 0), (TABLE, 15), (TABLE, 17), (LOW_MEMORY, 16), (u64::MAX - 15, 32)]
        {
            let head = descriptor(address, length, INDIRECT, 0);
            assert_eq!(walk_in(&memory, &[head]), None, "{address:#x} {length}");
            let second = [descriptor(BUFFER, 1, NEXT, 1), head];
            assert_eq!(walk_in(&memory, &second), None, "{address:#x} {length}, second");
        }
    }

    #[test]
    fn an_indirect_table_is_no_way_around_the_longest_chain() {
        let memory = guest_memory();
        let links = |count: u16| -> Vec<_> {
            (1..=count).map(|next| descriptor(BUFFER, 1, if next < count { NEXT } else { 0 }, next)).collect()
        };
        write_table(&memory, &links(SIZE));
        assert_eq!(walk_in(&memory, &[testing::Descriptor::indirect(TABLE, 16)]), Some((16, 0)));
        write_table(&memory, &links(SIZE + 1));
        assert_eq!(walk_in(&memory, &[testing::Descriptor::indirect(TABLE, 17)]), None);
        // The longest table that a descriptor can name, and endless in itself.
        write_table(&memory, &[descriptor(BUFFER, 1, NEXT, 0)]);
        assert_eq!(walk_in(&memory, &[testing::Descriptor::indirect(TABLE, 0xffff)]), None);
    }

    proptest! {
        #[test]
        fn splitting_keeps_every_byte_in_its_place(
            lengths in prop::collection::vec(0_u32..36, 0..8),
            front in 0_usize..200,
            back in 0_usize..200,
        ) {
            let memory = guest_memory();
            let bytes: Vec<u8> = (0..=255).collect();
            let guard = memory.memory();
            guard.write_slice(&bytes, GuestAddress(BUFFER)).unwrap();
            let mut all = Buffers::default();
            let mut address = BUFFER;
            for length in lengths {
                all.push(&guard, Descriptor::new(address, length, 0, 0)).unwrap();
                address += u64::from(length);
            }
            let (total, mut left) = (all.len(), all.len());
            let first = all.split_front(front);
            prop_assert_eq!(first.is_some(), front <= left);
            left -= first.as_ref().map_or(0, Buffers::len);
            let last = all.split_back(back);
            prop_assert_eq!(last.is_some(), back <= left);
            let mut joined = Vec::new();
            for part in first.iter().chain([&all]).chain(&last) {
                prop_assert!(part.slices().all(|slice| !slice.is_empty()));
                let mut bytes = vec![0; part.len()];
                part.copy_to(&mut bytes);
                joined.extend(bytes);
            }
            prop_assert_eq!(joined, &bytes[..total]);
        }
    }
}
