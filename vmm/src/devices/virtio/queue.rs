//! The registers of a device's queues, and what must be true of them before the device may use them.

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueState};
use vm_memory::{GuestAddress, GuestMemory as _, GuestMemoryMmap};

/// What the driver has written about one queue (virtio 1.2, 4.2.2).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct QueueRegisters {
    /// `QueueNum`, in descriptors.
    pub size: u32,
    /// `QueueReady`.
    pub ready: bool,
    /// Guest physical address of the descriptor table.
    pub descriptor_table: u64,
    /// Guest physical address of the available ring, the "driver area".
    pub avail_ring: u64,
    /// Guest physical address of the used ring, the "device area".
    pub used_ring: u64,
}

/// How far the device has come in one queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct QueuePosition {
    next_avail: u16,
    next_used: u16,
}

impl From<QueueState> for QueuePosition {
    fn from(state: QueueState) -> Self {
        Self { next_avail: state.next_avail, next_used: state.next_used }
    }
}

/// Why a queue is of no use: its number and what is wrong.
pub(super) type Refusal = (usize, &'static str);

/// Checks the driver's queues and makes them for the device, at their `positions` (zero where there is none).
///
/// # Errors
/// The first queue that is ready but breaks a rule of virtio 1.2, 2.7, or overlaps another.
pub(super) fn build(
    registers: &[QueueRegisters],
    max_sizes: &[u16],
    positions: &[QueuePosition],
    event_idx: bool,
    memory: &GuestMemoryMmap,
) -> Result<Vec<Queue>, Refusal> {
    let queues = registers
        .iter()
        .zip(max_sizes)
        .enumerate()
        .map(|(number, (queue, &max_size))| {
            let position = positions.get(number).copied().unwrap_or_default();
            queue.build(max_size, position, event_idx, memory).map_err(|problem| (number, problem))
        })
        .collect::<Result<_, _>>()?;
    check_overlap(registers)?;
    Ok(queues)
}

impl QueueRegisters {
    fn build(
        &self,
        max_size: u16,
        position: QueuePosition,
        event_idx: bool,
        memory: &GuestMemoryMmap,
    ) -> Result<Queue, &'static str> {
        let mut state =
            QueueState { max_size, size: max_size, event_idx_enabled: event_idx, ..QueueState::default() };
        if self.ready {
            self.check(max_size, memory)?;
            state = QueueState {
                next_avail: position.next_avail,
                next_used: position.next_used,
                size: u16::try_from(self.size).map_err(|_| "size above the maximum")?,
                ready: true,
                desc_table: self.descriptor_table,
                avail_ring: self.avail_ring,
                used_ring: self.used_ring,
                ..state
            };
        }
        Queue::try_from(state).map_err(|_| "refused by virtio-queue")
    }

    fn check(&self, max_size: u16, memory: &GuestMemoryMmap) -> Result<(), &'static str> {
        if !self.size.is_power_of_two() {
            return Err("size is not a power of two");
        }
        if self.size > u32::from(max_size) {
            return Err("size above the maximum");
        }
        // virtio-queue takes an available ring at zero for a queue that was reset.
        if self.avail_ring == 0 {
            return Err("available ring at address zero");
        }
        for area in self.areas() {
            if area.start % area.alignment != 0 {
                return Err("misaligned ring or table");
            }
            let Ok(length) = usize::try_from(area.length) else {
                return Err("ring or table outside guest memory");
            };
            if !memory.check_range(GuestAddress(area.start), length) {
                return Err("ring or table outside guest memory");
            }
        }
        Ok(())
    }

    /// Sizes and alignments of a split virtqueue's parts (virtio 1.2, 2.7), with the event index after each ring.
    fn areas(&self) -> [Area; 3] {
        let size = u64::from(self.size);
        [
            Area { start: self.descriptor_table, length: 16 * size, alignment: 16 },
            Area { start: self.avail_ring, length: 6 + 2 * size, alignment: 2 },
            Area { start: self.used_ring, length: 6 + 8 * size, alignment: 4 },
        ]
    }
}

struct Area {
    start: u64,
    length: u64,
    alignment: u64,
}

/// Refuses queues whose parts share memory: what the device writes to a used ring must change nothing else that
/// it reads.
fn check_overlap(registers: &[QueueRegisters]) -> Result<(), Refusal> {
    let mut areas: Vec<(usize, Area)> = registers
        .iter()
        .enumerate()
        .filter(|(_, queue)| queue.ready)
        .flat_map(|(number, queue)| queue.areas().map(|area| (number, area)))
        .collect();
    areas.sort_by_key(|(_, area)| area.start);
    for ((_, before), (number, area)) in areas.iter().zip(areas.iter().skip(1)) {
        if before.start.saturating_add(before.length) > area.start {
            return Err((*number, "ring or table overlaps another"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::GuestAddressSpace as _;

    use super::*;
    use crate::devices::virtio::testing::{LOW_MEMORY, guest_memory};

    const MAX_SIZE: u16 = 32;

    /// Mostly what a driver may write, close together and at the end of memory; sometimes anything.
    fn registers() -> impl Strategy<Value = QueueRegisters> {
        let address = || {
            prop_oneof![
                8 => (0_u64..0x80).prop_map(|place| 0x1000 + 16 * place),
                2 => (0_u64..0x40).prop_map(|place| LOW_MEMORY - 16 * place),
                1 => 0x1000_u64..0x1800,
                1 => any::<u64>(),
            ]
        };
        let size =
            prop_oneof![6 => (0_u32..7).prop_map(|power| 1 << power), 1 => 0_u32..40, 1 => any::<u32>()];
        (size, any::<bool>(), address(), address(), address()).prop_map(
            |(size, ready, descriptor_table, avail_ring, used_ring)| QueueRegisters {
                size,
                ready,
                descriptor_table,
                avail_ring,
                used_ring,
            },
        )
    }

    /// The bytes of all three parts of a queue, one by one; none if the queue breaks a rule of its own.
    fn bytes(queue: &QueueRegisters) -> Option<Vec<u64>> {
        if !queue.size.is_power_of_two() || queue.size > u32::from(MAX_SIZE) {
            return None;
        }
        let size = u64::from(queue.size);
        let parts = [
            (queue.descriptor_table, 16 * size, 16),
            (queue.avail_ring, 6 + 2 * size, 2),
            (queue.used_ring, 6 + 8 * size, 4),
        ];
        let in_low_memory = |&(start, length, alignment): &(u64, u64, u64)| {
            start % alignment == 0 && start < LOW_MEMORY && length <= LOW_MEMORY - start
        };
        let fits = parts.iter().all(in_low_memory) && queue.avail_ring != 0;
        fits.then(|| parts.iter().flat_map(|&(start, length, _)| start..start + length).collect())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// Queues are accepted exactly if each keeps the rules and no byte is part of two things.
        #[test]
        fn what_is_accepted_shares_no_byte(queues in prop::collection::vec(registers(), 1..4)) {
            let memory = guest_memory();
            let max_sizes = vec![MAX_SIZE; queues.len()];
            let built = build(&queues, &max_sizes, &[], true, &memory.memory());

            let ready: Vec<_> = queues.iter().filter(|queue| queue.ready).map(bytes).collect();
            let legal = ready.iter().all(Option::is_some);
            let mut all: Vec<_> = ready.into_iter().flatten().flatten().collect();
            let count = all.len();
            all.sort_unstable();
            all.dedup();
            prop_assert_eq!(built.is_ok(), legal && all.len() == count, "{:x?}", queues);
        }
    }
}
