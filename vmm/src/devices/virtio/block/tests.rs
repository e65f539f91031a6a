use std::fs::File;
use std::os::unix::fs::FileExt;

use proptest::prelude::*;
use virtio_bindings::virtio_blk::*;
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_INT_CONFIG as CHANGED, VIRTIO_MMIO_INT_VRING as USED,
    VIRTIO_MMIO_STATUS,
};
use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::*;
use crate::devices::virtio::Interrupt;
use crate::devices::virtio::testing::{
    Descriptor, Driver, DriverQueue, INDIRECT, NEEDS_RESET, NEXT, RUNNING, WRITE, guest_memory, link,
};

mod limits;

const FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;
const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
const SECTORS: u64 = 64;

/// What the status byte holds before a request.
const UNTOUCHED: u8 = 0xee;

/// A file whose every sector is filled with its own number.
fn numbered(sectors: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    for sector in 0..sectors {
        file.write_all_at(&[u8::try_from(sector % 251).unwrap(); 512], sector * 512).unwrap();
    }
    file
}

/// A driver and what it talks to.
struct Disk {
    driver: Driver,
    slot: BlockSlot,
    file: File,
}

/// What came of a request.
#[derive(Debug, PartialEq, Eq)]
struct Answer {
    status: u8,
    /// As the used ring has it.
    length: u32,
    data: Vec<u8>,
}

impl Disk {
    fn new(read_only: bool) -> Self {
        Self::limited(read_only, RateLimiter::default())
    }

    /// A disk that lets so much through.
    fn limited(read_only: bool, limiter: RateLimiter) -> Self {
        let file = numbered(SECTORS);
        let (block, slot) = Block::new(Some((file.try_clone().unwrap(), read_only))).unwrap();
        let mut driver = Driver::new(Box::new(block.with_id("disk0").with_limiter(limiter)));
        driver.start(FLUSH | u64::from(read_only) << VIRTIO_BLK_F_RO);
        Self { driver, slot, file }
    }

    fn empty() -> Self {
        let (block, slot) = Block::new(None).unwrap();
        let mut driver = Driver::new(Box::new(block));
        driver.start(FLUSH);
        Self { driver, slot, file: tempfile::tempfile().unwrap() }
    }

    fn header(&mut self, request_type: u32, sector: u64) -> u64 {
        let mut header = request_type.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        self.driver.alloc_bytes(&header)
    }

    /// Adds a request; returns where its data and its status will be.
    fn add(&mut self, request_type: u32, sector: u64, out: &[u8], space: usize) -> (u64, u64) {
        let header = self.header(request_type, sector);
        let (source, target) = (self.driver.alloc_bytes(out), self.driver.alloc(space));
        let status = self.driver.alloc_bytes(&[UNTOUCHED]);
        let mut chain = vec![Descriptor::readable(header, 16)];
        if !out.is_empty() {
            chain.push(Descriptor::readable(source, u32::try_from(out.len()).unwrap()));
        }
        if space > 0 {
            chain.push(Descriptor::writable(target, u32::try_from(space).unwrap()));
        }
        chain.push(Descriptor::writable(status, 1));
        self.driver.queues[0].add(&chain);
        (target, status)
    }

    fn request(&mut self, request_type: u32, sector: u64, out: &[u8], space: usize) -> Answer {
        let (target, status) = self.add(request_type, sector, out, space);
        let used = self.driver.exchange(0, 1);
        assert_eq!(used.len(), 1);
        Answer {
            status: self.driver.read(status, 1)[0],
            length: used[0].length,
            data: self.driver.read(target, space),
        }
    }

    fn read(&mut self, sector: u64, length: usize) -> Answer {
        self.request(VIRTIO_BLK_T_IN, sector, &[], length)
    }

    fn write(&mut self, sector: u64, data: &[u8]) -> u8 {
        self.request(VIRTIO_BLK_T_OUT, sector, data, 0).status
    }

    /// Serves a chain as it is; returns the length from the used ring.
    fn serve(&mut self, chain: &[Descriptor]) -> u32 {
        self.driver.queues[0].add(chain);
        self.driver.exchange(0, 1)[0].length
    }

    fn assert_works(&mut self) {
        let answer = self.read(7, 512);
        assert_eq!(answer, Answer { status: OK, length: 513, data: vec![7; 512] });
    }

    fn errors(&self) -> u64 {
        self.driver.transport.health().errors()
    }

    fn contents(&self, sector: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.file.read_exact_at(&mut bytes, sector * 512).unwrap();
        bytes
    }

    fn capacity(&mut self) -> u64 {
        u64::from_le_bytes(self.driver.config(0, 8).try_into().unwrap())
    }
}

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

#[test]
fn it_reads_and_writes() {
    let mut disk = Disk::new(false);
    disk.assert_works();
    let answer = disk.read(SECTORS - 2, 1024);
    assert_eq!((answer.status, answer.length), (OK, 1025));
    assert_eq!(answer.data, disk.contents(SECTORS - 2, 1024));
    assert_eq!(disk.write(3, &[0xab; 1024]), OK);
    assert_eq!(disk.contents(2, 2048), [vec![2; 512], vec![0xab; 1024], vec![5; 512]].concat());
    assert_eq!(disk.request(VIRTIO_BLK_T_OUT, 3, &[1; 512], 0).length, 1);
    assert_eq!(disk.request(VIRTIO_BLK_T_FLUSH, 0, &[], 0), Answer { status: OK, length: 1, data: vec![] });
    assert_eq!(disk.driver.take_interrupt(), USED);
    assert_eq!(disk.errors(), 0);
}

#[test]
fn it_writes_through_for_a_driver_that_does_not_flush() {
    let mut disk = Disk::new(false);
    disk.driver.start(0);
    assert_eq!(disk.write(3, &[0xab; 512]), OK);
    assert_eq!(disk.contents(3, 512), [0xab; 512]);
    disk.assert_works();
}

#[test]
fn requests_may_be_cut_into_descriptors_anyhow() {
    let mut disk = Disk::new(false);
    let header = disk.header(VIRTIO_BLK_T_IN, 7);
    let target = disk.driver.alloc(1025);

    // Data and status in one, the header in three, with empty ones between.
    let read = [
        Descriptor::readable(header, 1),
        Descriptor::readable(header, 0),
        Descriptor::readable(header + 1, 14),
        Descriptor::readable(header + 15, 1),
        Descriptor::writable(target, 0),
        Descriptor::writable(target, 100),
        Descriptor::writable(target + 100, 413),
    ];
    assert_eq!(disk.serve(&read), 513);
    assert_eq!(disk.driver.read(target, 513), [vec![7; 512], vec![OK]].concat());

    // Header and data in one.
    let mut bytes = VIRTIO_BLK_T_OUT.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(9_u64.to_le_bytes());
    bytes.extend([0x5a; 512]);
    let bytes = disk.driver.alloc_bytes(&bytes);
    assert_eq!(disk.serve(&[Descriptor::readable(bytes, 528), Descriptor::writable(target, 1)]), 1);
    assert_eq!(disk.contents(9, 512), [0x5a; 512]);

    // The whole chain in an indirect table.
    let table = disk.driver.alloc_table(&link(&read, 0, 128));
    disk.driver.write(target, &[0; 513]);
    assert_eq!(disk.serve(&[Descriptor::indirect(table, 7)]), 513);
    assert_eq!(disk.driver.read(target, 513), [vec![7; 512], vec![OK]].concat());
    assert_eq!(disk.errors(), 0);
}

#[test]
fn only_whole_sectors_that_exist_are_read_or_written() {
    let cases = [
        (SECTORS, 0, true),
        (0, 0, true),
        (SECTORS - 1, 512, true),
        (SECTORS, 512, false),
        (SECTORS - 1, 1024, false),
        (SECTORS + 1, 0, false),
        (0, 511, false),
        (0, 513, false),
        (0, 1, false),
        (u64::MAX, 512, false),
        (u64::MAX, 0, false),
        (u64::MAX / 512, 512, false),
        (u64::MAX / 512 + 1, 512, false),
        (1 << 55, 512, false),
        (1 << 63, 512, false),
    ];
    let mut disk = Disk::new(false);
    let before = disk.contents(0, 512 * 64);
    for (sector, length, legal) in cases {
        let answer = disk.read(sector, length);
        assert_eq!(answer.status, if legal { OK } else { IOERR }, "read {sector:#x} {length}");
        let expected = if legal { u32::try_from(length).unwrap() + 1 } else { 1 };
        assert_eq!(answer.length, expected, "read {sector:#x} {length}");
        let data = vec![u8::try_from(sector % 251).unwrap(); length];
        let status = disk.write(sector, &data);
        assert_eq!(status, if legal { OK } else { IOERR }, "write {sector:#x} {length}");
    }
    assert_eq!(disk.contents(0, 512 * 64), before);
    assert_eq!(disk.file.metadata().unwrap().len(), SECTORS * 512);
    assert_eq!(disk.errors(), 24);
}

#[test]
fn a_read_only_disk_stays_as_it_is() {
    let mut disk = Disk::new(true);
    assert_eq!(disk.write(3, &[0xab; 512]), IOERR);
    assert_eq!(disk.contents(3, 512), [3; 512]);
    assert_eq!(disk.request(VIRTIO_BLK_T_FLUSH, 0, &[], 0).status, OK);
    disk.assert_works();
}

#[test]
fn its_features_are_those_of_its_backend() {
    let offered = |backend| Block::new(backend).unwrap().0.features();
    let read_only = 1 << VIRTIO_BLK_F_RO;
    assert_eq!(offered(Some((numbered(1), true))) & read_only, read_only);
    assert_eq!(offered(Some((numbered(1), false))) & read_only, 0);
    assert_eq!(offered(None) & (read_only | FLUSH | EVENT_IDX), FLUSH | EVENT_IDX);
}

#[test]
fn it_says_its_name() {
    let mut disk = Disk::new(true);
    let mut name = b"disk0".to_vec();
    name.resize(20, 0);
    let get_id = VIRTIO_BLK_T_GET_ID;
    assert_eq!(disk.request(get_id, 0, &[], 20), Answer { status: OK, length: 21, data: name.clone() });
    assert_eq!(disk.request(get_id, 0, &[], 3), Answer { status: OK, length: 4, data: b"dis".to_vec() });
    name.resize(30, 0);
    assert_eq!(disk.request(get_id, 0, &[], 30), Answer { status: OK, length: 21, data: name });
    let (long, _) = Block::new(None).unwrap();
    assert_eq!(long.with_id("a name of more than twenty bytes").id, *b"a name of more than ");
}

#[test]
fn an_unknown_request_is_unsupported() {
    let mut disk = Disk::new(false);
    for request_type in [2, 3, 5, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES, 1 << 31, u32::MAX] {
        let answer = disk.request(request_type, 0, &[0; 16], 16);
        assert_eq!((answer.status, answer.length), (UNSUPP, 1), "{request_type}");
    }
    assert_eq!(disk.errors(), 0);
    disk.assert_works();
}

#[test]
fn the_largest_request_is_served_and_a_larger_one_is_not() {
    let largest = 126 * (256 << 10);
    let file = tempfile::tempfile().unwrap();
    file.set_len(u64::from(largest) + 512).unwrap();
    file.write_all_at(b"the end", u64::from(largest) - 7).unwrap();
    let mut disk = Disk::empty();
    disk.slot.attach(file, false).unwrap();
    assert_eq!(disk.driver.config(8, 8), [(256_u32 << 10).to_le_bytes(), 126_u32.to_le_bytes()].concat());
    let header = disk.header(VIRTIO_BLK_T_IN, 0);
    let target = disk.driver.alloc(usize::try_from(largest).unwrap() + 513);
    let read = |length: u32| [Descriptor::readable(header, 16), Descriptor::writable(target, length + 1)];
    assert_eq!(disk.serve(&read(largest)), largest + 1);
    assert_eq!(disk.driver.read(target + u64::from(largest) - 7, 8), b"the end\0");
    assert_eq!(disk.serve(&read(largest + 512)), 1);
    assert_eq!(disk.driver.read(target + u64::from(largest) + 512, 1), [IOERR]);
    // As many segments as the driver may use.
    let mut chain = vec![Descriptor::readable(header, 16)];
    chain.extend((0..126).map(|number| Descriptor::writable(target + 512 * number, 512)));
    chain.push(Descriptor::writable(target + 512 * 126, 1));
    assert_eq!(disk.serve(&chain), 512 * 126 + 1);
}

#[test]
fn a_request_with_nowhere_to_answer_is_dropped() {
    let mut disk = Disk::new(false);
    let header = disk.header(VIRTIO_BLK_T_OUT, 3);
    let data = disk.driver.alloc_bytes(&[0xab; 512]);
    let (readable, writable) = (Descriptor::readable, Descriptor::writable);
    let chains = [
        vec![readable(header, 16), readable(data, 512)],
        vec![readable(header, 16), readable(data, 512), writable(data, 0)],
        vec![readable(header, 0)],
        vec![writable(u64::MAX, 1)],
    ];
    for chain in &chains {
        assert_eq!(disk.serve(chain), 0, "{chain:?}");
    }
    assert_eq!(disk.errors(), 4);
    assert_eq!(disk.contents(3, 512), [3; 512]);
    disk.assert_works();
}

#[test]
fn a_request_without_a_whole_header_fails() {
    let mut disk = Disk::new(false);
    let header = disk.header(VIRTIO_BLK_T_IN, 3);
    for length in [0, 1, 15] {
        let target = disk.driver.alloc_bytes(&[UNTOUCHED; 513]);
        let chain = [Descriptor::readable(header, length), Descriptor::writable(target, 513)];
        assert_eq!(disk.serve(&chain), 1);
        assert_eq!(disk.driver.read(target, 513), [vec![UNTOUCHED; 512], vec![IOERR]].concat(), "{length}");
    }
    assert_eq!(disk.errors(), 3);
    disk.assert_works();
}

#[test]
fn a_broken_chain_is_dropped() {
    let mut disk = Disk::new(false);
    let header = disk.header(VIRTIO_BLK_T_IN, 3);
    let target = disk.driver.alloc(513);
    let (first, last) = (Descriptor::readable(header, 16), Descriptor::writable(target, 513));
    let inner = disk.driver.alloc_table(&[last]);
    let nested = disk.driver.alloc_table(&link(&[first, Descriptor::indirect(inner, 1)], 0, 128));
    let short = Descriptor { length: 17, ..Descriptor::indirect(inner, 1) };
    let chains = [
        vec![first, Descriptor { flags: WRITE | NEXT, next: 128, ..last }],
        vec![first, Descriptor { flags: WRITE | NEXT, next: 0xffff, ..last }],
        vec![last, first],
        vec![first, last, first],
        vec![first, Descriptor::writable(1 << 40, 512), last],
        vec![first, Descriptor::writable(u64::MAX - 100, 512), last],
        vec![first, Descriptor::writable(target, u32::MAX), last],
        vec![Descriptor::indirect(nested, 2)],
        vec![first, short],
        vec![first, Descriptor { flags: INDIRECT, ..Descriptor::readable(1 << 40, 16) }],
    ];
    for chain in &chains {
        assert_eq!(disk.serve(chain), 0, "{chain:?}");
    }
    // One that leads back to its own head.
    let head = disk.driver.queues[0].add(&[first]);
    disk.driver.queues[0].write_descriptor(head, Descriptor { flags: NEXT, next: head, ..first });
    assert_eq!(disk.driver.exchange(0, 1)[0].length, 0);
    assert_eq!(disk.errors(), 11);
    assert_eq!(disk.driver.read(target, 513), [0; 513]);
    disk.assert_works();
}

#[test]
fn a_request_may_spoil_the_queue_but_no_more() {
    let mut disk = Disk::new(false);
    let header = disk.header(VIRTIO_BLK_T_IN, 0xaa);
    let whole_queue = Descriptor::writable(disk.driver.queues[0].descriptor_table, 0x1_0000);
    let status = disk.driver.alloc(1);
    disk.driver.queues[0].add(&[
        Descriptor::readable(header, 16),
        whole_queue,
        Descriptor::writable(status, 1),
    ]);
    disk.driver.kick(0);
    // Whatever the device now makes of its rings, it takes a reset.
    disk.driver.start(FLUSH);
    disk.assert_works();
}

#[test]
fn an_available_ring_beyond_belief_needs_a_reset() {
    let mut disk = Disk::new(false);
    disk.assert_works();
    disk.driver.take_interrupt();
    disk.driver.queues[0].set_avail_index(1000);
    disk.driver.kick(0);
    disk.driver.run_until_broken();
    assert_eq!(disk.driver.take_interrupt(), CHANGED);
    assert!(disk.driver.transport.health().take_failure().is_some());
    disk.driver.start(FLUSH);
    disk.assert_works();
}

#[test]
fn a_head_outside_the_table_needs_a_reset() {
    let mut disk = Disk::new(false);
    disk.driver.queues[0].publish(128);
    disk.driver.kick(0);
    disk.driver.run_until_broken();
    assert_eq!(disk.driver.status(), RUNNING | NEEDS_RESET);
    disk.driver.start(FLUSH);
    disk.assert_works();
}

#[test]
fn a_slot_is_filled_and_emptied_at_run_time() {
    let mut disk = Disk::empty();
    assert_eq!(disk.capacity(), 0);
    assert_eq!(disk.read(0, 512).status, IOERR);
    assert_eq!(disk.read(0, 0).status, IOERR);
    assert_eq!(disk.write(0, &[0; 512]), IOERR);
    assert_eq!(disk.request(VIRTIO_BLK_T_FLUSH, 0, &[], 0).status, IOERR);
    disk.driver.take_interrupt();
    let generation = disk.driver.read_register(VIRTIO_MMIO_CONFIG_GENERATION);

    disk.slot.attach(numbered(10), false).unwrap();

    disk.driver.run_until(|driver| driver.take_interrupt() == CHANGED);
    assert_ne!(disk.driver.read_register(VIRTIO_MMIO_CONFIG_GENERATION), generation);
    assert_eq!(disk.capacity(), 10);
    disk.assert_works();
    assert_eq!(disk.read(10, 512).status, IOERR);

    disk.driver.take_interrupt();
    let generation = disk.driver.read_register(VIRTIO_MMIO_CONFIG_GENERATION);
    disk.slot.detach().unwrap();

    disk.driver.run_until(|driver| driver.take_interrupt() == CHANGED);
    assert_ne!(disk.driver.read_register(VIRTIO_MMIO_CONFIG_GENERATION), generation);
    assert_eq!(disk.capacity(), 0);
    assert_eq!(disk.read(7, 512).status, IOERR);
}

#[test]
fn a_slot_can_hold_what_may_not_be_written() {
    let mut disk = Disk::empty();
    let file = numbered(10);
    disk.slot.attach(file.try_clone().unwrap(), true).unwrap();
    disk.assert_works();
    assert_eq!(disk.write(0, &[0xab; 512]), IOERR);
}

#[test]
fn a_change_that_the_driver_could_not_be_told_is_told_later() {
    let (block, slot) = Block::new(None).unwrap();
    let mut driver = Driver::new(Box::new(block));
    driver.negotiate(FLUSH);
    driver.set_up_queue(0);
    slot.attach(numbered(10), false).unwrap();
    assert_eq!(driver.take_interrupt(), 0, "not before DRIVER_OK");
    driver.write_register(VIRTIO_MMIO_STATUS, RUNNING);
    assert_eq!(driver.take_interrupt(), CHANGED);
    driver.start(FLUSH);
    assert_eq!(driver.take_interrupt(), 0, "once is enough");
    driver.write_register(VIRTIO_MMIO_STATUS, 0);
    slot.detach().unwrap();
    driver.start(FLUSH);
    assert_eq!(driver.take_interrupt(), CHANGED);
}

#[test]
fn the_capacity_is_in_whole_sectors() {
    let file = tempfile::tempfile().unwrap();
    let mut disk = Disk::empty();
    for (size, sectors) in [(0, 0), (511, 0), (512, 1), (1535, 2)] {
        file.set_len(size).unwrap();
        disk.slot.attach(file.try_clone().unwrap(), false).unwrap();
        assert_eq!(disk.capacity(), sectors, "{size}");
    }
    assert_eq!(disk.read(2, 512).status, IOERR);
    assert!(
        disk.slot.attach(File::from(std::os::fd::OwnedFd::from(std::io::pipe().unwrap().0)), true).is_err()
    );
    assert_eq!(disk.capacity(), 2, "what was there before stays");
}

#[test]
fn a_file_that_became_shorter_fails_to_be_read() {
    let mut disk = Disk::new(false);
    disk.file.set_len(5 * 512 + 100).unwrap();
    assert_eq!(disk.read(4, 512).status, OK);
    assert_eq!(disk.read(5, 512).status, IOERR);
    assert_eq!(disk.read(9, 512).status, IOERR);
}

#[test]
fn many_requests_at_once_and_after_one_another() {
    let mut disk = Disk::new(false);
    for round in 0..40_u64 {
        let requests: Vec<_> = (0..40).map(|number| (round + number) % SECTORS).collect();
        let places: Vec<_> =
            requests.iter().map(|&sector| disk.add(VIRTIO_BLK_T_IN, sector, &[], 512)).collect();
        let used = disk.driver.exchange(0, 40);
        assert!(used.iter().all(|used| used.length == 513));
        for (sector, (target, status)) in requests.into_iter().zip(places) {
            assert_eq!(disk.driver.read(status, 1), [OK]);
            assert_eq!(disk.driver.read(target, 512), [u8::try_from(sector).unwrap(); 512]);
        }
    }
}

#[test]
fn a_storm_of_flushes_holds_up_nobody_but_the_disk() {
    let mut disk = Disk::new(false);
    for _ in 0..50 {
        let statuses: Vec<_> = (0..64).map(|_| disk.add(VIRTIO_BLK_T_FLUSH, 0, &[], 0).1).collect();
        disk.driver.kick(0);
        // The event loop has nothing to do with it once the thread is there.
        let events = disk.driver.events;
        disk.driver.run_until(|driver| driver.queues[0].pending() == 64);
        assert!(disk.driver.events - events <= 1);
        assert!(disk.driver.queues[0].used().iter().all(|used| used.length == 1));
        assert!(statuses.into_iter().all(|status| disk.driver.read(status, 1) == [OK]));
    }
    assert_eq!(disk.errors(), 0);
}

#[test]
fn with_event_indices_it_interrupts_only_when_asked() {
    let mut disk = Disk::new(false);
    disk.driver.start(FLUSH | EVENT_IDX);
    disk.driver.queues[0].set_used_event(2);
    for _ in 0..2 {
        disk.add(VIRTIO_BLK_T_FLUSH, 0, &[], 0);
    }
    disk.driver.kick(0);
    // Nothing tells the driver, so it has to look. The pause ends the device's work.
    while disk.driver.queues[0].pending() < 2 {
        disk.driver.run();
        std::thread::yield_now();
    }
    disk.driver.transport.pause();
    assert_eq!(disk.driver.take_interrupt(), 0);
    disk.driver.transport.resume();
    disk.driver.queues[0].used();
    disk.add(VIRTIO_BLK_T_FLUSH, 0, &[], 0);
    disk.driver.exchange(0, 1);
    disk.driver.transport.pause();
    assert_eq!(disk.driver.take_interrupt(), USED);
}

#[test]
fn a_reset_with_requests_under_way_starts_from_nothing() {
    let mut disk = Disk::new(false);
    for _ in 0..20 {
        for sector in 0..30 {
            disk.add(VIRTIO_BLK_T_IN, sector, &[], 512);
        }
        disk.driver.kick(0);
        disk.driver.run();
        disk.driver.start(FLUSH);
        assert_eq!(disk.driver.queues[0].used(), [], "nothing arrives after the reset");
        disk.assert_works();
    }
    disk.driver.write_register(VIRTIO_MMIO_STATUS, 0);
    assert_eq!(disk.driver.read_register(VIRTIO_MMIO_STATUS), 0);
}

#[test]
fn a_paused_disk_serves_nothing_until_it_goes_on() {
    for started in [false, true] {
        let mut disk = Disk::new(false);
        if started {
            disk.assert_works();
        }
        disk.driver.transport.pause();
        let (target, status) = disk.add(VIRTIO_BLK_T_IN, 7, &[], 512);
        disk.driver.kick(0);
        disk.driver.run();
        let state = disk.driver.transport.save().unwrap();
        assert_eq!(disk.driver.transport.save().unwrap(), state);
        assert_eq!(disk.driver.read(status, 1), [UNTOUCHED]);

        disk.driver.transport.resume();

        disk.driver.run_until(|driver| driver.queues[0].pending() == 1);
        disk.driver.queues[0].used();
        assert_eq!(disk.driver.read(status, 1), [OK]);
        assert_eq!(disk.driver.read(target, 512), [7; 512]);
        disk.assert_works();
    }
}

#[test]
fn a_worker_follows_its_orders() {
    let memory = guest_memory();
    let mut queue = DriverQueue::new(&memory, 0, 128);
    queue.add(&[Descriptor::writable(1 << 20, 1)]);
    let (_, slot) = Block::new(None).unwrap();
    let event = || EventFd::new(EFD_NONBLOCK).unwrap();
    let mut worker = Worker {
        queue: queue.device_side(),
        queue_event: event(),
        memory,
        interrupt: Interrupt::new(event()),
        health: Health::default(),
        write_through: false,
        slot,
        id: Id::default(),
        limiter: RateLimiter::default(),
    };
    let orders = Orders::default();
    for (order, served) in [
        (Orders::pause as fn(&Orders), 0),
        (Orders::resume, 1),
        (Orders::pause, 1),
        (Orders::stop, 1),
        (Orders::resume, 1),
    ] {
        order(&orders);
        worker.serve(&orders).unwrap();
        assert_eq!(queue.pending(), served);
        if served == 1 {
            queue.publish(0);
        }
    }
}

/// Saves a disk with a request in its queue, and restores it over `file`.
fn saved_and_restored(file: File) -> (Disk, u64) {
    let mut disk = Disk::new(false);
    for _ in 0..100 {
        disk.assert_works();
    }
    disk.driver.take_interrupt();
    disk.driver.transport.pause();
    let (_, status) = disk.add(VIRTIO_BLK_T_IN, 7, &[], 512);
    let state = serde_json::to_string(&disk.driver.transport.save().unwrap()).unwrap();

    let (block, slot) = Block::new(Some((file.try_clone().unwrap(), false))).unwrap();
    let mut driver = disk.driver.move_to(Box::new(block));
    driver.transport.restore(&serde_json::from_str(&state).unwrap()).unwrap();
    driver.run();
    assert_eq!(driver.read(status, 1), [UNTOUCHED], "still paused");
    (Disk { driver, slot, file }, status)
}

#[test]
fn a_restored_disk_goes_on_with_what_was_queued() {
    let (mut disk, status) = saved_and_restored(numbered(SECTORS));
    assert_eq!(disk.driver.take_interrupt(), 0, "nothing has changed");
    disk.driver.transport.resume();
    disk.driver.run_until(|driver| driver.queues[0].pending() == 1);
    disk.driver.queues[0].used();
    assert_eq!(disk.driver.read(status, 1), [OK]);
    for _ in 0..100 {
        disk.assert_works();
    }
}

#[test]
fn a_disk_restored_over_another_tells_the_driver() {
    let (mut disk, _) = saved_and_restored(numbered(10));
    assert_eq!(disk.driver.take_interrupt(), CHANGED);
    assert_eq!(disk.capacity(), 10);
    disk.driver.transport.resume();
    disk.driver.run_until(|driver| driver.queues[0].pending() == 1);
    disk.driver.queues[0].used();
    disk.assert_works();
}

#[test]
fn an_empty_slot_is_filled_after_a_restore() {
    let mut disk = Disk::empty();
    disk.driver.transport.pause();
    let state = disk.driver.transport.save().unwrap();
    let (block, slot) = Block::new(None).unwrap();
    let mut driver = disk.driver.move_to(Box::new(block));
    driver.transport.restore(&state).unwrap();
    slot.attach(numbered(10), false).unwrap();
    assert_eq!(driver.take_interrupt(), CHANGED);
    driver.transport.resume();
    Disk { driver, slot, file: numbered(0) }.assert_works();
}

#[test]
fn another_devices_state_is_refused() {
    let (mut block, _) = Block::new(None).unwrap();
    assert!(block.restore(&DeviceState::Rng).is_err());
}

/// Any descriptor: mostly one that points to somewhere in guest memory, and never into the queue.
fn descriptor() -> impl Strategy<Value = Descriptor> {
    let address = prop_oneof![4 => (1_u64 << 21)..(1 << 22), 1 => any::<u64>()];
    let length = prop_oneof![1 => Just(1_u32), 1 => Just(16), 2 => (0_u32..8).prop_map(|n| n * 512), 1 => any::<u32>()];
    (address, length, 0_u16..8, 0_u16..130).prop_map(|(address, length, flags, next)| Descriptor {
        address,
        length,
        flags,
        next,
    })
}

proptest! {
    #[test]
    fn any_request_is_answered(
        request_type in prop_oneof![4 => 0_u32..16, 1 => any::<u32>()],
        sector in prop_oneof![4 => 0..SECTORS + 2, 1 => any::<u64>()],
        out in 0_usize..3000,
        space in 0_usize..3000,
    ) {
        let mut disk = Disk::new(false);
        let answer = disk.request(request_type, sector, &vec![0x77; out], space);
        prop_assert!(answer.status <= UNSUPP, "{:?}", answer.status);
        prop_assert!(answer.length >= 1 && usize::try_from(answer.length).unwrap() <= space + 1);
        prop_assert_eq!(disk.file.metadata().unwrap().len(), SECTORS * 512);
        disk.driver.start(FLUSH);
        prop_assert_eq!(disk.read(SECTORS - 1, 512).status, OK);
    }

    #[test]
    fn no_table_breaks_it_for_good(
        table in prop::collection::vec(descriptor(), 128),
        heads in prop::collection::vec(0_u16..128, 0..128),
        headers in prop::collection::vec((0_u32..10, 0_u64..70), 16),
    ) {
        let mut disk = Disk::new(false);
        for (number, (request_type, sector)) in (0_u64..).zip(headers) {
            let mut header = request_type.to_le_bytes().to_vec();
            header.extend([0; 4]);
            header.extend(sector.to_le_bytes());
            disk.driver.write((1 << 21) + 0x1_0000 * number, &header);
        }
        for (number, descriptor) in (0..).zip(table) {
            disk.driver.queues[0].write_descriptor(number, descriptor);
        }
        for &head in &heads {
            disk.driver.queues[0].publish(head);
        }
        if !heads.is_empty() {
            let used = disk.driver.exchange(0, u16::try_from(heads.len()).unwrap());
            prop_assert_eq!(used.len(), heads.len());
        }
        prop_assert_eq!(disk.driver.status(), RUNNING);
        prop_assert_eq!(disk.file.metadata().unwrap().len(), SECTORS * 512);
        disk.driver.start(FLUSH);
        prop_assert_eq!(disk.read(SECTORS - 1, 512).status, OK);
    }
}
