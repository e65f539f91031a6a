use proptest::prelude::*;
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_INT_CONFIG as CHANGED, VIRTIO_MMIO_INT_VRING as USED,
    VIRTIO_MMIO_STATUS,
};
use vm_memory::{Bytes as _, GuestAddress};

use super::*;
use crate::devices::virtio::testing::{
    Descriptor, Driver, LOW_MEMORY, NEEDS_RESET, NEXT, RUNNING, Used, guest_memory, link,
};
use crate::memory::BLOCK_SIZE;

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

const ACK: u16 = 0;
const NACK: u16 = 1;
const BUSY: u16 = 2;
const ERROR: u16 = 3;

const PLUGGED: u16 = 0;
const UNPLUGGED: u16 = 1;
const MIXED: u16 = 2;

/// The region is the upper half of the test's low memory: 16 blocks, 12 of which may be plugged.
const PLACE: Pluggable =
    Pluggable { start: GuestAddress(LOW_MEMORY / 2), size: 16 * BLOCK_SIZE, limit: 12 * BLOCK_SIZE };

/// A driver, and the host's handle.
struct Guest {
    driver: Driver,
    handle: MemHandle,
}

/// The address of block number `block`.
fn address(block: u64) -> u64 {
    PLACE.start.0 + block * BLOCK_SIZE
}

fn request(kind: u16, address: u64, count: u16) -> Vec<u8> {
    // What is reserved, the device has to ignore.
    let mut request = kind.to_le_bytes().to_vec();
    request.extend([0xee; 6]);
    request.extend(address.to_le_bytes());
    request.extend(count.to_le_bytes());
    request.extend([0xee; 6]);
    request
}

impl Guest {
    /// A guest that is to have so many blocks.
    fn new(blocks: u64) -> Self {
        let (device, handle) = Mem::new(PLACE);
        let mut driver = Driver::new(Box::new(device));
        driver.start(1 << VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE);
        handle.resize(blocks * BLOCK_SIZE).unwrap();
        Self { driver, handle }
    }

    /// Makes a request; the type of the response, and the state that it tells.
    fn call(&mut self, kind: u16, address: u64, count: u16) -> (u16, u16) {
        let request = self.driver.alloc_bytes(&request(kind, address, count));
        let response = self.driver.alloc_bytes(&[0xee; 10]);
        let head = self.driver.queues[0]
            .add(&[Descriptor::readable(request, 24), Descriptor::writable(response, 10)]);
        let used = self.driver.exchange(0, 1);
        assert_eq!(used, [Used { head: u32::from(head), length: 10 }]);
        let response = self.driver.read(response, 10);
        assert_eq!(response[2..8], [0; 6]);
        (u16::from_le_bytes([response[0], response[1]]), u16::from_le_bytes([response[8], response[9]]))
    }

    fn plug(&mut self, block: u64, count: u16) -> u16 {
        self.call(PLUG, address(block), count).0
    }

    fn unplug(&mut self, block: u64, count: u16) -> u16 {
        self.call(UNPLUG, address(block), count).0
    }

    fn state(&mut self, block: u64, count: u16) -> u16 {
        let (kind, state) = self.call(STATE, address(block), count);
        assert_eq!(kind, ACK);
        state
    }

    /// The blocks that are plugged, as STATE tells.
    fn plugged(&mut self) -> Vec<u64> {
        (0..16).filter(|block| self.state(*block, 1) == PLUGGED).collect()
    }

    /// A field of the configuration.
    fn config(&mut self, field: u64) -> u64 {
        u64::from_le_bytes(self.driver.config(field * 8, 8).try_into().unwrap())
    }

    fn generation(&mut self) -> u32 {
        self.driver.read_register(VIRTIO_MMIO_CONFIG_GENERATION)
    }

    fn errors(&self) -> u64 {
        self.driver.transport.health().errors()
    }
}

#[test]
fn it_says_where_it_is_and_what_is_wanted() {
    let mut guest = Guest::new(3);
    guest.plug(0, 2);
    let fields: Vec<_> = (0..7).map(|field| guest.config(field)).collect();
    let blocks = |blocks: u64| blocks * BLOCK_SIZE;
    assert_eq!(fields, [2 << 20, 0, 32 << 20, blocks(16), blocks(16), blocks(2), blocks(3)]);
    assert_eq!(guest.driver.config(56, 4), [0; 4]);
    let (device, _) = Mem::new(PLACE);
    assert_eq!((device.device_type(), device.queue_sizes()), (24, &[16][..]));
    assert_eq!(device.features(), 1 << 1 | 1 << 28 | 1 << 29);
}

#[test]
fn blocks_are_plugged_and_unplugged() {
    let mut guest = Guest::new(12);
    assert_eq!(guest.plug(2, 3), ACK);
    assert_eq!(guest.plug(15, 1), ACK);
    assert_eq!(guest.plugged(), [2, 3, 4, 15]);
    assert_eq!(guest.handle.plugged(), 4 * BLOCK_SIZE);
    assert_eq!(guest.unplug(3, 1), ACK);
    assert_eq!(guest.plugged(), [2, 4, 15]);
    assert_eq!((guest.state(0, 2), guest.state(2, 1), guest.state(2, 3)), (UNPLUGGED, PLUGGED, MIXED));
    assert_eq!(guest.call(UNPLUG_ALL, 0, 0), (ACK, 0));
    assert_eq!((guest.plugged(), guest.handle.plugged()), (vec![], 0));
    assert_eq!(guest.plug(0, 12), ACK);
    assert_eq!(guest.driver.take_interrupt(), USED | CHANGED);
    assert_eq!(guest.errors(), 0);
}

#[test]
fn no_more_is_plugged_than_is_wanted() {
    let mut guest = Guest::new(4);
    assert_eq!(guest.plug(0, 5), NACK);
    assert_eq!(guest.plug(0, 3), ACK);
    assert_eq!(guest.plug(8, 2), NACK);
    assert_eq!(guest.plug(8, 1), ACK);
    assert_eq!(guest.plug(9, 1), NACK);
    // The host wants less, and the driver is slow to follow.
    guest.handle.resize(BLOCK_SIZE).unwrap();
    assert_eq!(guest.plugged(), [0, 1, 2, 8]);
    assert_eq!(guest.unplug(0, 1), ACK);
    assert_eq!(guest.plug(0, 1), NACK);
    assert_eq!(guest.handle.plugged(), 3 * BLOCK_SIZE);
    assert_eq!(guest.errors(), 0);
}

#[test]
fn the_host_s_wish_is_told_and_bounded() {
    let mut guest = Guest::new(0);
    assert_eq!(guest.driver.take_interrupt(), 0, "nothing new");
    let generation = guest.generation();
    guest.handle.resize(1).unwrap();
    assert_eq!((guest.driver.take_interrupt(), guest.config(6)), (CHANGED, BLOCK_SIZE));
    assert_ne!(guest.generation(), generation);
    guest.handle.resize(BLOCK_SIZE).unwrap();
    assert_eq!(guest.driver.take_interrupt(), 0, "that is the same");
    guest.handle.resize(PLACE.limit).unwrap();
    assert_eq!((guest.driver.take_interrupt(), guest.config(6)), (CHANGED, PLACE.limit));
    let refusal = guest.handle.resize(PLACE.limit + 1).unwrap_err().to_string();
    assert!(refusal.contains("at most 25165824"), "{refusal}");
    assert_eq!((guest.driver.take_interrupt(), guest.config(6)), (0, PLACE.limit));
}

#[test]
fn what_is_plugged_is_part_of_the_configuration_but_no_news() {
    let mut guest = Guest::new(4);
    guest.driver.take_interrupt();
    for step in [PLUG, UNPLUG] {
        let generation = guest.generation();
        guest.call(step, address(0), 4);
        assert_ne!(guest.generation(), generation);
        assert_eq!(guest.driver.take_interrupt(), USED);
    }
}

#[test]
fn requests_that_break_a_rule_are_errors_and_change_nothing() {
    let mut guest = Guest::new(12);
    guest.plug(4, 4);
    let start = PLACE.start.0;
    let cases = [
        (0, 1),
        (start - BLOCK_SIZE, 1),
        (start - BLOCK_SIZE, 2),
        (start + 1, 1),
        (start + BLOCK_SIZE / 2, 1),
        (start + BLOCK_SIZE - 1, 1),
        (start, 0),
        (start, 17),
        (address(15), 2),
        (address(16), 1),
        (address(16), 0),
        (start, u16::MAX),
        (u64::MAX, 1),
        (u64::MAX - BLOCK_SIZE + 1, 2),
        (1 << 63, u16::MAX),
    ];
    let mut errors = 0;
    for kind in [PLUG, UNPLUG, STATE] {
        for (address, count) in cases {
            assert_eq!(guest.call(kind, address, count), (ERROR, 0), "{kind} {address:#x} {count}");
            errors += 1;
            assert_eq!(guest.errors(), errors);
        }
    }
    for (kind, block, count) in
        [(PLUG, 4, 1), (PLUG, 3, 2), (PLUG, 7, 2), (UNPLUG, 3, 2), (UNPLUG, 0, 1), (UNPLUG, 7, 2), (4, 0, 1)]
    {
        assert_eq!(guest.call(kind, address(block), count), (ERROR, 0), "{kind} {block} {count}");
    }
    assert_eq!(guest.call(u16::MAX, address(0), 1), (ERROR, 0));
    assert_eq!(guest.plugged(), [4, 5, 6, 7]);
}

#[test]
fn what_is_unplugged_goes_back_to_the_host_and_nothing_else_does() {
    let mut guest = Guest::new(12);
    assert_eq!(guest.plug(0, 4), ACK);
    let block = vec![0x5a; usize::try_from(BLOCK_SIZE).unwrap()];
    for number in 0..4 {
        guest.driver.write(address(number), &block);
    }
    guest.driver.write(address(0) - 16, &[0x77; 16]);
    assert_eq!(guest.unplug(1, 2), ACK);
    for (number, kept) in [(0, true), (1, false), (2, false), (3, true)] {
        let content = guest.driver.read(address(number), block.len());
        assert_eq!((content == block, content.iter().all(|byte| *byte == 0)), (kept, !kept), "{number}");
    }
    assert_eq!(guest.call(UNPLUG_ALL, u64::MAX, u16::MAX), (ACK, 0));
    assert_eq!(guest.driver.read(address(0), 16), [0; 16]);
    assert_eq!(guest.driver.read(address(3), 16), [0; 16]);
    assert_eq!(guest.driver.read(address(0) - 16, 16), [0x77; 16]);
}

#[test]
fn a_region_that_is_not_there_cannot_be_unplugged() {
    let memory = guest_memory();
    let beyond = Pluggable { start: GuestAddress(LOW_MEMORY), ..PLACE };
    let mut region = Region::new(beyond);
    region.request(BLOCK_SIZE).unwrap();
    let mut answer = |kind| {
        let request = request(kind, LOW_MEMORY, 1).try_into().unwrap();
        region.answer(&request, &memory.memory())
    };
    assert_eq!(answer(PLUG), Response::ACK);
    assert_eq!(answer(UNPLUG), Response::BUSY);
    assert_eq!(Response::BUSY.bytes()[0], BUSY.to_le_bytes()[0]);
    assert_eq!(region.plugged(), BLOCK_SIZE);
}

#[test]
fn requests_may_be_cut_into_descriptors_anyhow() {
    let mut guest = Guest::new(4);
    let bytes = guest.driver.alloc_bytes(&request(PLUG, address(0), 4));
    let response = guest.driver.alloc_bytes(&[0xee; 20]);
    let chain = [
        Descriptor::readable(bytes, 1),
        Descriptor::readable(bytes, 0),
        Descriptor::readable(bytes + 1, 23),
        Descriptor::readable(bytes, 5),
        Descriptor::writable(response, 3),
        Descriptor::writable(response + 3, 17),
    ];
    let table = guest.driver.alloc_table(&link(&chain, 0, 16));
    guest.driver.queues[0].add(&[Descriptor::indirect(table, 6)]);
    assert_eq!(guest.driver.exchange(0, 1)[0].length, 10);
    assert_eq!(guest.driver.read(response, 12), [vec![0; 10], vec![0xee; 2]].concat());
    assert_eq!(guest.handle.plugged(), 4 * BLOCK_SIZE);
}

#[test]
fn a_chain_that_is_no_request_is_given_back_and_counted() {
    let mut guest = Guest::new(4);
    let bytes = guest.driver.alloc_bytes(&request(PLUG, address(0), 4));
    let response = guest.driver.alloc(10);
    let (readable, writable) = (Descriptor::readable(bytes, 24), Descriptor::writable(response, 10));
    let chains = [
        vec![readable],
        vec![writable],
        vec![Descriptor { length: 23, ..readable }, writable],
        vec![readable, Descriptor { length: 9, ..writable }],
        vec![writable, readable],
        vec![readable, Descriptor { address: 1 << 40, ..writable }],
        vec![Descriptor { address: u64::MAX - 8, ..readable }, writable],
        vec![readable, Descriptor { flags: writable.flags | NEXT, next: 99, ..writable }],
    ];
    for (number, chain) in (1..).zip(&chains) {
        guest.driver.queues[0].add(chain);
        assert_eq!(guest.driver.exchange(0, 1)[0].length, 0, "{chain:?}");
        assert_eq!(guest.errors(), number);
    }
    assert_eq!(guest.handle.plugged(), 0);
    assert_eq!(guest.plug(0, 4), ACK);
}

#[test]
fn an_index_beyond_belief_needs_a_reset_and_what_is_plugged_stays() {
    let mut guest = Guest::new(4);
    guest.plug(0, 4);
    guest.driver.queues[0].set_avail_index(1000);
    guest.driver.kick(0);
    guest.driver.run_until_broken();
    assert_eq!(guest.driver.status(), RUNNING | NEEDS_RESET);
    guest.driver.start(0);
    assert_eq!(guest.plugged(), [0, 1, 2, 3]);
}

#[test]
fn a_reset_changes_no_block_and_no_memory() {
    let mut guest = Guest::new(4);
    guest.plug(1, 2);
    guest.driver.write(address(1), b"kept");
    guest.driver.start(0);
    assert_eq!(guest.plugged(), [1, 2]);
    assert_eq!(guest.driver.read(address(1), 4), b"kept");
    assert_eq!((guest.config(5), guest.config(6)), (2 * BLOCK_SIZE, 4 * BLOCK_SIZE));
}

#[test]
fn a_wish_from_before_the_driver_is_told_when_it_is_there() {
    let (device, handle) = Mem::new(PLACE);
    let mut driver = Driver::new(Box::new(device));
    driver.negotiate(0);
    driver.set_up_queue(0);
    handle.resize(BLOCK_SIZE).unwrap();
    assert_eq!(driver.take_interrupt(), 0, "not before DRIVER_OK");
    driver.write_register(VIRTIO_MMIO_STATUS, RUNNING);
    assert_eq!(driver.take_interrupt(), CHANGED);
}

#[test]
fn a_driver_without_a_queue_is_left_alone() {
    let (device, _) = Mem::new(PLACE);
    let mut driver = Driver::new(Box::new(device));
    driver.negotiate(0);
    driver.write_register(VIRTIO_MMIO_STATUS, RUNNING);
    driver.kick(0);
    driver.run();
    assert_eq!(driver.status(), RUNNING);
}

#[test]
fn more_requests_than_one_turn_answers_are_all_answered() {
    let mut guest = Guest::new(12);
    let bytes = guest.driver.alloc_bytes(&request(STATE, address(0), 16));
    let response = guest.driver.alloc(10);
    let head =
        guest.driver.queues[0].add(&[Descriptor::readable(bytes, 24), Descriptor::writable(response, 10)]);
    guest.driver.exchange(0, 1);
    for _ in 0..100 {
        for _ in 0..16 {
            guest.driver.queues[0].publish(head);
        }
        assert_eq!(guest.driver.exchange(0, 16).len(), 16);
    }
}

#[test]
fn a_paused_device_keeps_what_it_has_not_begun() {
    let mut guest = Guest::new(4);
    guest.driver.run();
    guest.driver.transport.pause();
    let bytes = guest.driver.alloc_bytes(&request(PLUG, address(0), 4));
    let response = guest.driver.alloc(10);
    guest.driver.queues[0].add(&[Descriptor::readable(bytes, 24), Descriptor::writable(response, 10)]);
    guest.driver.kick(0);
    guest.driver.run();
    let state = guest.driver.transport.save().unwrap();
    assert_eq!(guest.driver.transport.save().unwrap(), state);
    assert_eq!(guest.handle.plugged(), 0);
    guest.driver.transport.resume();
    assert_eq!(guest.handle.plugged(), 4 * BLOCK_SIZE);
    assert_eq!(guest.driver.queues[0].pending(), 1);
}

#[test]
fn a_restored_device_goes_on_with_its_blocks() {
    let mut guest = Guest::new(6);
    for block in [0, 3, 15] {
        assert_eq!(guest.plug(block, 1), ACK);
    }
    guest.driver.write(address(3), b"kept");
    guest.driver.run();
    guest.driver.take_interrupt();
    let generation = guest.generation();
    guest.driver.transport.pause();
    let state = serde_json::to_string(&guest.driver.transport.save().unwrap()).unwrap();

    let (device, handle) = Mem::new(PLACE);
    let mut driver = guest.driver.move_to(Box::new(device));
    driver.transport.restore(&serde_json::from_str(&state).unwrap()).unwrap();
    driver.transport.resume();
    let mut guest = Guest { driver, handle };

    assert_eq!((guest.driver.take_interrupt(), guest.generation()), (0, generation));
    assert_eq!((guest.plugged(), guest.config(6)), (vec![0, 3, 15], 6 * BLOCK_SIZE));
    assert_eq!(guest.driver.read(address(3), 4), b"kept");
    assert_eq!(guest.plug(4, 3), ACK);
    assert_eq!(guest.plug(7, 1), NACK);
}

#[test]
fn a_state_of_another_region_or_device_is_refused() {
    let good = Region::new(PLACE).save();
    let refused = [
        MemState { start: good.start + BLOCK_SIZE, ..good.clone() },
        MemState { size: good.size + BLOCK_SIZE, ..good.clone() },
        MemState { requested: PLACE.limit + BLOCK_SIZE, ..good.clone() },
        MemState { requested: 1, ..good.clone() },
        MemState { blocks: vec![], ..good.clone() },
        MemState { blocks: vec![1 << 16], ..good },
    ];
    for state in refused {
        let refusal = Mem::new(PLACE).0.restore(&DeviceState::Mem(state.clone())).unwrap_err().to_string();
        assert!(refusal.contains("the region of memory is another one"), "{state:?}: {refusal}");
    }
    assert!(Mem::new(PLACE).0.restore(&DeviceState::Mem(good)).is_ok());
    assert!(Mem::new(PLACE).0.restore(&DeviceState::Rng).is_err());
}

proptest! {
    #[test]
    fn any_requests_keep_the_books_straight(
        wish in 0_u64..=12,
        requests in prop::collection::vec((0_u16..6, 0_u64..18, 0_u16..6, any::<bool>()), 1..40),
    ) {
        let mut guest = Guest::new(wish);
        let mut model = [false; 16];
        for (kind, block, count, odd) in requests {
            let (first, end) = (block as usize, block as usize + usize::from(count));
            let legal = !odd && count > 0 && end <= 16;
            let plugged = if legal { model[first..end].iter().filter(|plugged| **plugged).count() } else { 0 };
            let expected = match kind {
                UNPLUG_ALL => ACK,
                PLUG if legal && plugged == 0 => {
                    let all = model.iter().filter(|plugged| **plugged).count() as u64 + u64::from(count);
                    if all > wish { NACK } else { ACK }
                }
                UNPLUG if legal && plugged == usize::from(count) => ACK,
                STATE if legal => ACK,
                _ => ERROR,
            };
            let (answer, _) = guest.call(kind, address(block) + u64::from(odd) * 4096, count);
            prop_assert_eq!(answer, expected, "{} {} {}", kind, block, count);
            match kind {
                PLUG if answer == ACK => model[first..end].fill(true),
                UNPLUG if answer == ACK => model[first..end].fill(false),
                UNPLUG_ALL => model.fill(false),
                _ => {}
            }
            let all = model.iter().filter(|plugged| **plugged).count() as u64;
            prop_assert_eq!(guest.handle.plugged(), all * BLOCK_SIZE);
            prop_assert_eq!(guest.config(5), all * BLOCK_SIZE);
        }
        let model: Vec<u64> = (0..16).filter(|block| model[*block as usize]).collect();
        prop_assert_eq!(guest.plugged(), model);
    }

    #[test]
    fn any_bytes_are_answered_and_touch_no_memory_outside_of_the_region(
        bytes in prop::array::uniform24(any::<u8>()),
        blocks in 0_u16..12,
    ) {
        let memory = guest_memory();
        let guard = memory.memory();
        guard.write_slice(&[0x77; 4096], GuestAddress(PLACE.start.0 - 4096)).unwrap();
        let mut region = Region::new(PLACE);
        region.request(PLACE.limit).unwrap();
        region.answer(&request(PLUG, address(0), blocks).try_into().unwrap(), &guard);
        let response = region.answer(&bytes, &guard);
        prop_assert!(response.bytes()[0] <= 3);
        prop_assert!(region.plugged() <= PLACE.limit);
        let mut before = [0; 4096];
        guard.read_slice(&mut before, GuestAddress(PLACE.start.0 - 4096)).unwrap();
        prop_assert_eq!(before, [0x77; 4096]);
    }
}
