//! Giving several chains back to the driver at once.
//!
//! virtio-queue shows each chain to the driver as soon as it is added to the used ring. A device that spreads one
//! packet over several chains may not do that: the driver must find all of them or none (virtio 1.2, 5.1.6.4.1).

use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Error, Queue, QueueT};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

/// Flags and index come before a ring's elements, in bytes (virtio 1.2, 2.7.6 and 2.7.8).
const RING_HEADER: u64 = 4;

/// An element of the available ring is a head, one of the used ring a head and a length.
const AVAIL_ELEMENT: u64 = 2;
const USED_ELEMENT: u64 = 8;

/// Adds chains to the used ring, each a head and the bytes written, and then shows them to the driver together.
/// [`wants_interrupt`] then tells whether it wants to know; [`QueueT::needs_notification`] has not counted them.
///
/// # Errors
/// A head is no descriptor of the table, or the ring is not in guest memory.
pub(super) fn publish(queue: &mut Queue, memory: &GuestMemoryMmap, used: &[(u16, u32)]) -> Result<(), Error> {
    let Some((&(last_head, last_length), rest)) = used.split_last() else {
        return Ok(());
    };
    let mut next = queue.next_used();
    for (head, length) in rest {
        let offset = RING_HEADER + USED_ELEMENT * u64::from(next % queue.size());
        let element = u64::from(*length) << 32 | u64::from(*head);
        let address = queue.used_ring().checked_add(offset).ok_or(Error::AddressOverflow)?;
        memory.write_obj(element.to_le(), GuestAddress(address)).map_err(Error::GuestMemory)?;
        next = next.wrapping_add(1);
    }
    queue.set_next_used(next);
    queue.add_used(memory, last_head, last_length)
}

/// Whether the driver wants an interrupt for what was used since `told`, the value of `next_used` when it was last
/// asked (virtio 1.2, 2.7.7.2).
///
/// # Errors
/// The ring is not in guest memory.
pub(super) fn wants_interrupt(
    queue: &Queue,
    memory: &GuestMemoryMmap,
    told: &mut u16,
) -> Result<bool, Error> {
    let (now, before) = (queue.next_used(), *told);
    if now == before {
        return Ok(false);
    }
    *told = now;
    // The driver first writes what it wants and then looks into the used ring, so the device has to do the opposite.
    fence(Ordering::SeqCst);
    let load = |offset: u64| -> Result<u16, Error> {
        let address = queue.avail_ring().checked_add(offset).ok_or(Error::AddressOverflow)?;
        let value = memory.load(GuestAddress(address), Ordering::Relaxed).map_err(Error::GuestMemory)?;
        Ok(u16::from_le(value))
    };
    if !queue.event_idx_enabled() {
        return Ok(u32::from(load(0)?) & VRING_AVAIL_F_NO_INTERRUPT == 0);
    }
    let used_event = load(RING_HEADER + AVAIL_ELEMENT * u64::from(queue.size()))?;
    let since_event = now.wrapping_sub(used_event).wrapping_sub(1);
    Ok(since_event < now.wrapping_sub(before))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use virtio_queue::{QueueOwnedT, QueueState};
    use vm_memory::GuestAddressSpace as _;

    use super::*;
    use crate::devices::virtio::testing::{Descriptor, DriverQueue, Used, guest_memory};

    const SIZE: u16 = 8;

    /// A driver's queue and the device's side of it, with event indices or without, some chains from the start.
    fn queues(event_idx: bool, position: u16) -> (DriverQueue, Queue, crate::devices::virtio::GuestMemory) {
        let memory = guest_memory();
        let mut driver = DriverQueue::new(&memory, 0, SIZE);
        driver.start_at(position);
        let state = QueueState {
            event_idx_enabled: event_idx,
            next_avail: position,
            next_used: position,
            ..driver.device_side().state()
        };
        (driver, Queue::try_from(state).unwrap(), memory)
    }

    #[test]
    fn chains_are_given_back_in_order_also_around_the_end_of_the_ring() {
        for position in [0, 5, 7, u16::MAX - 1] {
            let (mut driver, mut queue, memory) = queues(false, position);
            let memory = memory.memory();
            for _ in 0..4 {
                driver.add(&[Descriptor::writable(1 << 20, 1)]);
            }
            let heads: Vec<_> = queue.iter(&*memory).unwrap().map(|chain| (chain.head_index(), 7)).collect();
            publish(&mut queue, &memory, &heads).unwrap();
            assert_eq!(driver.pending(), 4);
            let expected: Vec<_> =
                heads.iter().map(|(head, length)| Used { head: (*head).into(), length: *length }).collect();
            assert_eq!(driver.used(), expected, "from {position}");
            assert_eq!(queue.next_used(), position.wrapping_add(4));
        }
    }

    #[test]
    fn a_head_outside_the_table_is_refused_and_nothing_is_shown() {
        let (driver, mut queue, memory) = queues(false, 0);
        assert!(publish(&mut queue, &memory.memory(), &[(0, 1), (SIZE, 1)]).is_err());
        assert_eq!(driver.pending(), 0);
    }

    #[test]
    fn a_driver_without_event_indices_wants_every_interrupt_unless_it_says_no() {
        let (driver, mut queue, memory) = queues(false, 0);
        let memory = memory.memory();
        let mut told = 0;
        assert!(!wants_interrupt(&queue, &memory, &mut told).unwrap(), "nothing was used");
        publish(&mut queue, &memory, &[(0, 1)]).unwrap();
        assert!(wants_interrupt(&queue, &memory, &mut told).unwrap());
        assert!(!wants_interrupt(&queue, &memory, &mut told).unwrap(), "once is enough");
        memory.write_obj(1_u16, GuestAddress(driver.avail_ring)).unwrap();
        publish(&mut queue, &memory, &[(1, 1), (2, 1)]).unwrap();
        assert!(!wants_interrupt(&queue, &memory, &mut told).unwrap());
    }

    proptest! {
        #[test]
        fn with_event_indices_the_interrupt_comes_when_the_index_passes_the_event(
            position in any::<u16>(),
            batches in prop::collection::vec(1_u16..=SIZE, 1..6),
            event in 0_u16..20,
        ) {
            let (driver, mut queue, memory) = queues(true, position);
            let memory = memory.memory();
            let event = position.wrapping_add(event);
            driver.set_used_event(event);
            let mut told = position;
            for batch in batches {
                let before = queue.next_used();
                let used: Vec<_> = (0..batch).map(|head| (head % SIZE, 1)).collect();
                publish(&mut queue, &memory, &used).unwrap();
                let passed = (0..batch).any(|number| before.wrapping_add(number) == event);
                prop_assert_eq!(wants_interrupt(&queue, &memory, &mut told).unwrap(), passed);
            }
        }
    }
}
