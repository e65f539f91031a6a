//! What no driver may do, done to every device: whatever the device is, the chain is given back and counted, or the
//! device needs a reset, and after that it works for the next driver. What only one of them can be told is in its own tests.

use std::any::Any;
use std::fs::File;
use std::io::Read as _;

use mayu_vmm_api::RateLimit;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use tempfile::TempDir;
use virtio_bindings::virtio_mmio::*;
use vm_memory::GuestAddress;

use super::VirtioDevice;
use super::balloon::Balloon;
use super::block::Block;
use super::fs::Fs;
use super::mem::Mem;
use super::net::Net;
use super::rng::Rng;
use super::testing::{Descriptor, Driver, INDIRECT, LOW_MEMORY, NEEDS_RESET, NEXT, RUNNING, WRITE, link};
use super::vsock::Vsock;
use crate::memory::{BLOCK_SIZE, Pluggable};
use crate::seccomp::Confinement;

/// Kicks in a storm.
const STORM: u32 = 10_000;

/// A device with a driver that has started it, and what a test has to know of it.
struct Subject {
    driver: Driver,
    device: Device,
}

/// What a test has to know of a device.
struct Device {
    name: &'static str,
    /// Queues whose chains the device uses as soon as it gets them, whatever they hold.
    answered: &'static [u16],
    good: Good,
    /// What has to be there as long as the device.
    _host: Box<dyn Any>,
}

/// A request that the device answers as it should.
struct Good {
    queue: u16,
    request: Vec<u8>,
    /// Bytes that the device may write, and those that it does.
    room: usize,
    answer: u32,
}

/// Makes a device.
type Make = fn() -> (Box<dyn VirtioDevice>, Device);

/// Every device there is.
const EVERY: [Make; 7] = [balloon, block, fs, mem, net, rng, vsock];

fn subjects() -> Vec<Subject> {
    EVERY.into_iter().map(Subject::started).collect()
}

fn balloon() -> (Box<dyn VirtioDevice>, Device) {
    // The number of a page, which the device leaves alone.
    let good = Good { queue: 0, request: vec![0; 4], room: 0, answer: 0 };
    (Box::new(Balloon::new().0), Device { name: "balloon", answered: &[0, 1, 2], good, _host: Box::new(()) })
}

fn block() -> (Box<dyn VirtioDevice>, Device) {
    let file = tempfile::tempfile().unwrap();
    file.set_len(64 * 512).unwrap();
    let (device, slot) = Block::new(Some((file, false))).unwrap();
    // A read of the first sector: sixteen times zero.
    let good = Good { queue: 0, request: vec![0; 16], room: 513, answer: 513 };
    (Box::new(device), Device { name: "block", answered: &[0], good, _host: Box::new(slot) })
}

fn fs() -> (Box<dyn VirtioDevice>, Device) {
    let share = TempDir::new().unwrap();
    let device = Fs::new("share", share.path(), &Confinement::none()).unwrap();
    // STATFS of the root.
    let mut request = [40_u32, 17].map(u32::to_le_bytes).concat();
    request.extend([2_u64, 1, 0, 1].map(u64::to_le_bytes).concat());
    let good = Good { queue: 1, request, room: 200, answer: 16 + 80 };
    (Box::new(device), Device { name: "fs", answered: &[0, 1], good, _host: Box::new(share) })
}

fn mem() -> (Box<dyn VirtioDevice>, Device) {
    let size = LOW_MEMORY / 2;
    let place = Pluggable { start: GuestAddress(size), size, limit: 4 * BLOCK_SIZE };
    let (device, handle) = Mem::new(place);
    // UNPLUG_ALL.
    let good = Good { queue: 0, request: [vec![2], vec![0; 23]].concat(), room: 10, answer: 10 };
    (Box::new(device), Device { name: "mem", answered: &[0], good, _host: Box::new(handle) })
}

fn net() -> (Box<dyn VirtioDevice>, Device) {
    let (ours, theirs) =
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
    fcntl(&theirs, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    let mut host = File::from(ours);
    // A host that takes whatever comes, until the device is gone.
    std::thread::spawn(move || while host.read(&mut [0; 4096]).is_ok_and(|length| length > 0) {});
    let (device, slot) = Net::new(3, &RateLimit::default()).unwrap();
    slot.attach_stand_in(File::from(theirs)).unwrap();
    // A header and a frame.
    let good = Good { queue: 1, request: vec![0; 72], room: 0, answer: 0 };
    (Box::new(device), Device { name: "net", answered: &[1], good, _host: Box::new(slot) })
}

fn rng() -> (Box<dyn VirtioDevice>, Device) {
    let good = Good { queue: 0, request: vec![], room: 64, answer: 64 };
    (Box::new(Rng::new()), Device { name: "rng", answered: &[0], good, _host: Box::new(()) })
}

fn vsock() -> (Box<dyn VirtioDevice>, Device) {
    let (device, handle) = Vsock::new(3, vec![], Box::new(|_, _| {})).unwrap();
    // The end of a connection that is not there.
    let mut request = [3_u64, 2].map(u64::to_le_bytes).concat();
    request.extend([5000_u32, 700, 0].map(u32::to_le_bytes).concat());
    request.extend([1_u16, 3].map(u16::to_le_bytes).concat());
    request.extend([0; 12]);
    let good = Good { queue: 1, request, room: 0, answer: 0 };
    (Box::new(device), Device { name: "vsock", answered: &[1], good, _host: Box::new(handle) })
}

impl Subject {
    fn started(make: Make) -> Self {
        let (device, known) = make();
        let mut subject = Self { driver: Driver::new(device), device: known };
        subject.driver.start(0);
        subject.assert_works();
        subject
    }

    /// Goes on with another device like this one, through a saved state.
    fn moved(mut self, make: Make) -> Self {
        self.driver.transport.pause();
        let state = serde_json::to_string(&self.driver.transport.save().unwrap()).unwrap();
        let (device, known) = make();
        let mut driver = self.driver.move_to(device);
        driver.transport.restore(&serde_json::from_str(&state).unwrap()).unwrap();
        driver.transport.resume();
        Self { driver, device: known }
    }

    fn errors(&self) -> u64 {
        self.driver.transport.health().errors()
    }

    /// The chain of the good request.
    fn good_chain(&mut self) -> Vec<Descriptor> {
        let Good { request, room, .. } = &self.device.good;
        let (from, to) = (self.driver.alloc_bytes(request), self.driver.alloc(*room));
        let lengths = [request.len(), *room].map(|length| u32::try_from(length).unwrap());
        let chain = [Descriptor::readable(from, lengths[0]), Descriptor::writable(to, lengths[1])];
        chain.into_iter().filter(|descriptor| descriptor.length > 0).collect()
    }

    fn assert_works(&mut self) {
        let before = self.errors();
        let chain = self.good_chain();
        let queue = self.device.good.queue;
        let head = self.driver.queues[usize::from(queue)].add(&chain);
        let used = self.driver.exchange(queue, 1);
        assert_eq!(used.len(), 1, "{}", self.device.name);
        assert_eq!(
            (used[0].head, used[0].length),
            (u32::from(head), self.device.good.answer),
            "{}",
            self.device.name
        );
        assert_eq!(self.errors(), before, "{}", self.device.name);
    }

    /// What follows DEVICE_NEEDS_RESET.
    fn assert_works_after_a_reset(&mut self) {
        self.driver.start(0);
        assert_eq!(self.driver.status(), RUNNING, "{}", self.device.name);
        self.assert_works();
    }

    /// Chains that no device takes.
    fn broken_chains(&mut self, size: u16) -> Vec<Vec<Descriptor>> {
        let buffer = self.driver.alloc(4096);
        let good = Descriptor::readable(buffer, 100);
        let inner = self.driver.alloc_table(&[good]);
        let nested = self.driver.alloc_table(&link(&[good, Descriptor::indirect(inner, 1)], 0, size));
        let endless = self.driver.alloc_table(&[Descriptor { flags: NEXT, next: 0, ..good }]);
        let next = |next| Descriptor { flags: NEXT, next, ..good };
        let at = |address, length| Descriptor { address, length, ..good };
        let table = |address, length| Descriptor { flags: INDIRECT, ..at(address, length) };
        vec![
            vec![next(size)],
            vec![good, next(u16::MAX)],
            vec![at(LOW_MEMORY, 1)],
            vec![good, at(LOW_MEMORY - 50, 100)],
            vec![at(1 << 40, 100), good],
            vec![at(u64::MAX - 50, 100)],
            vec![at(u64::MAX, u32::MAX)],
            vec![good, Descriptor::writable(u64::MAX - 50, 100)],
            vec![at(buffer, u32::MAX)],
            vec![Descriptor::writable(buffer, 100), good],
            vec![Descriptor::indirect(nested, 2)],
            vec![good, Descriptor::indirect(nested, 2)],
            vec![Descriptor::indirect(endless, 0xffff)],
            vec![table(inner, 0)],
            vec![table(inner, 17)],
            vec![table(1 << 40, 16)],
            vec![table(u64::MAX - 15, 32)],
            vec![at(buffer, 0)],
            vec![Descriptor::writable(buffer, 0)],
        ]
    }
}

#[test]
fn broken_chains_are_given_back_untouched_and_counted() {
    for mut subject in subjects() {
        for &queue in subject.device.answered {
            let size = subject.driver.queues[usize::from(queue)].size;
            for chain in subject.broken_chains(size) {
                let before = subject.errors();
                let head = subject.driver.queues[usize::from(queue)].add(&chain);
                let used = subject.driver.exchange(queue, 1);
                let what = format!("{} {queue}: {chain:x?}", subject.device.name);
                assert_eq!((used[0].head, used[0].length), (u32::from(head), 0), "{what}");
                assert_eq!(subject.errors(), before + 1, "{what}");
                assert_eq!(subject.driver.status(), RUNNING, "{what}");
            }
            subject.assert_works();
        }
    }
}

#[test]
fn chains_without_end_are_given_back_untouched_and_counted() {
    for mut subject in subjects() {
        for &queue in subject.device.answered {
            let buffer = subject.driver.alloc(64);
            // Each leads to itself, or the second to the first.
            for (length, flags) in [(1, 0), (1, WRITE), (2, 0), (2, WRITE)] {
                let before = subject.errors();
                let ring = &mut subject.driver.queues[usize::from(queue)];
                let descriptor = Descriptor { flags, ..Descriptor::readable(buffer, 1) };
                let head = ring.add(&vec![descriptor; length]);
                let last = (head + u16::try_from(length).unwrap() - 1) % ring.size;
                ring.write_descriptor(last, Descriptor { flags: flags | NEXT, next: head, ..descriptor });
                let used = subject.driver.exchange(queue, 1);
                assert_eq!(
                    (used[0].head, used[0].length),
                    (u32::from(head), 0),
                    "{} {queue}",
                    subject.device.name
                );
                assert_eq!(subject.errors(), before + 1, "{} {queue}", subject.device.name);
            }
            subject.assert_works();
        }
    }
}

#[test]
fn a_next_beside_an_indirect_table_means_nothing() {
    for mut subject in subjects() {
        let chain = subject.good_chain();
        let queue = usize::from(subject.device.good.queue);
        let size = subject.driver.queues[queue].size;
        let table = subject.driver.alloc_table(&link(&chain, 0, size));
        let table = Descriptor::indirect(table, u32::try_from(chain.len()).unwrap());
        let ring = &mut subject.driver.queues[queue];
        let head = ring.add(&[table]);
        ring.write_descriptor(head, Descriptor { flags: INDIRECT | NEXT, next: size, ..table });
        let used = subject.driver.exchange(subject.device.good.queue, 1);
        assert_eq!(
            (used[0].head, used[0].length),
            (u32::from(head), subject.device.good.answer),
            "{}",
            subject.device.name
        );
        subject.assert_works();
    }
}

#[test]
fn a_queue_full_of_broken_chains_is_given_back() {
    for mut subject in subjects() {
        for &queue in subject.device.answered {
            let before = subject.errors();
            let size = subject.driver.queues[usize::from(queue)].size;
            for _ in 0..size {
                subject.driver.queues[usize::from(queue)].add(&[Descriptor::readable(u64::MAX, 1)]);
            }
            assert_eq!(
                subject.driver.exchange(queue, size).len(),
                usize::from(size),
                "{}",
                subject.device.name
            );
            assert_eq!(subject.errors(), before + u64::from(size), "{}", subject.device.name);
            subject.assert_works();
        }
    }
}

#[test]
fn the_largest_buffers_there_are_cost_no_more_than_small_ones() {
    for mut subject in subjects() {
        for &queue in subject.device.answered {
            // All of low memory to be read, and all behind the queues to be written.
            let room = u32::try_from(LOW_MEMORY - (1 << 20)).unwrap();
            let chain = [
                Descriptor::readable(0, u32::try_from(LOW_MEMORY).unwrap()),
                Descriptor::writable(1 << 20, room),
            ];
            for chain in [&chain[..], &chain[..1], &chain[1..]] {
                subject.driver.queues[usize::from(queue)].add(chain);
                let used = subject.driver.exchange(queue, 1);
                assert!(used[0].length <= room, "{} {queue}: {used:?}", subject.device.name);
                assert_eq!(subject.driver.status(), RUNNING, "{} {queue}", subject.device.name);
            }
            subject.assert_works();
        }
    }
}

#[test]
fn an_available_index_that_jumps_needs_a_reset() {
    for mut subject in subjects() {
        for number in 0..subject.driver.queues.len() {
            let queue = u16::try_from(number).unwrap();
            let size = subject.driver.queues[number].size;
            // At most one request has been made before.
            for jump in [size + 2, 1 << 15, u16::MAX] {
                subject.driver.queues[number].set_avail_index(jump);
                subject.driver.kick(queue);
                // The other queues are looked at when the host has something to say.
                match subject.device.answered.contains(&queue) {
                    true => subject.driver.run_until_broken(),
                    false => subject.driver.run(),
                }
                subject.assert_works_after_a_reset();
            }
        }
    }
}

#[test]
fn a_head_outside_of_the_table_needs_a_reset() {
    for mut subject in subjects() {
        for &queue in subject.device.answered {
            for head in [subject.driver.queues[usize::from(queue)].size, u16::MAX] {
                subject.driver.queues[usize::from(queue)].publish(head);
                subject.driver.kick(queue);
                subject.driver.run_until_broken();
                assert_eq!(subject.driver.status(), RUNNING | NEEDS_RESET, "{} {queue}", subject.device.name);
                subject.assert_works_after_a_reset();
            }
        }
    }
}

#[test]
fn a_buffer_over_the_rings_spoils_them_and_no_more() {
    for mut subject in subjects() {
        for &queue in subject.device.answered {
            let good = subject.driver.alloc_bytes(&subject.device.good.request);
            let ring = &mut subject.driver.queues[usize::from(queue)];
            let rings = Descriptor::writable(ring.descriptor_table, 0x1_0000);
            ring.add(&[Descriptor::readable(good, 24), rings]);
            ring.add(&[rings]);
            subject.driver.kick(queue);
            subject.driver.run();
            subject.assert_works_after_a_reset();
        }
    }
}

#[test]
fn queues_stay_where_they_were_when_the_driver_began() {
    let registers = [
        VIRTIO_MMIO_QUEUE_NUM,
        VIRTIO_MMIO_QUEUE_READY,
        VIRTIO_MMIO_QUEUE_DESC_LOW,
        VIRTIO_MMIO_QUEUE_DESC_HIGH,
        VIRTIO_MMIO_QUEUE_AVAIL_LOW,
        VIRTIO_MMIO_QUEUE_AVAIL_HIGH,
        VIRTIO_MMIO_QUEUE_USED_LOW,
        VIRTIO_MMIO_QUEUE_USED_HIGH,
    ];
    for mut subject in subjects() {
        let before = subject.errors();
        for queue in 0..subject.driver.queues.len() {
            subject.driver.write_register(VIRTIO_MMIO_QUEUE_SEL, u32::try_from(queue).unwrap());
            for register in registers {
                subject.driver.write_register(register, 0);
                subject.driver.write_register(register, 0x4000);
            }
        }
        let writes = u64::try_from(subject.driver.queues.len() * registers.len() * 2).unwrap();
        assert_eq!(subject.errors(), before + writes, "{}", subject.device.name);
        subject.assert_works();
    }
}

#[test]
fn a_storm_of_kicks_is_nothing_to_do() {
    for mut subject in subjects() {
        let (errors, events) = (subject.errors(), subject.driver.events);
        let queues = u32::try_from(subject.driver.queues.len()).unwrap();
        for kick in 0..STORM {
            subject.driver.write_register(VIRTIO_MMIO_QUEUE_NOTIFY, kick % queues);
            if kick % 1000 == 0 {
                subject.driver.run();
            }
        }
        subject.driver.run();
        assert_eq!(subject.errors(), errors, "{}", subject.device.name);
        // Between two turns of the event loop, many are one. The entropy device's period may end as well.
        let turns = u64::from((STORM / 1000 + 1) * queues);
        assert!(subject.driver.events - events <= turns + 1, "{}", subject.device.name);
        for queue in [queues, 0xffff, u32::MAX] {
            subject.driver.write_register(VIRTIO_MMIO_QUEUE_NOTIFY, queue);
        }
        assert_eq!(subject.errors(), errors + 3, "{}", subject.device.name);
        subject.assert_works();
    }
}

#[test]
fn a_reset_with_requests_under_way_starts_from_nothing() {
    for mut subject in subjects() {
        let queue = usize::from(subject.device.good.queue);
        let chain = subject.good_chain();
        let size = subject.driver.queues[queue].size;
        for round in 0..20 {
            for _ in 0..usize::from(size) / chain.len() {
                subject.driver.queues[queue].add(&chain);
            }
            subject.driver.kick(subject.device.good.queue);
            if round % 2 == 0 {
                subject.driver.run();
            }
            subject.driver.write_register(VIRTIO_MMIO_STATUS, 0);
            // From here on the memory is the driver's again.
            subject.driver.start(0);
            subject.driver.run();
            assert_eq!(subject.driver.queues[queue].used(), [], "{}", subject.device.name);
        }
        subject.assert_works();
    }
}

#[test]
fn a_request_under_way_while_the_machine_is_saved_is_answered_once() {
    for make in EVERY {
        // A thread of its own gets now farther and now less far until the device is paused.
        for _ in 0..20 {
            let mut subject = Subject::started(make);
            let number = subject.device.good.queue;
            let queue = usize::from(number);
            let chain = subject.good_chain();
            let fit = subject.driver.queues[queue].size / u16::try_from(chain.len()).unwrap();
            let add = |driver: &mut Driver, count| {
                (0..count).map(|_| u32::from(driver.queues[queue].add(&chain))).collect::<Vec<_>>()
            };
            let mut added = add(&mut subject.driver, fit / 2);
            subject.driver.kick(number);
            subject.driver.run();
            added.extend(add(&mut subject.driver, fit - fit / 2));
            subject.driver.kick(number);

            let mut subject = subject.moved(make);
            subject.driver.run_until(|driver| driver.queues[queue].pending() == fit);

            let mut used = subject.driver.queues[queue].used();
            assert!(used.iter().all(|used| used.length == subject.device.good.answer), "{used:?}");
            added.sort_unstable();
            used.sort_unstable_by_key(|used| used.head);
            assert_eq!(used.iter().map(|used| used.head).collect::<Vec<_>>(), added);
            assert_eq!(subject.errors(), 0, "{}", subject.device.name);
            subject.assert_works();
        }
    }
}
