//! A device and a driver that does whatever the fuzzer has thought of.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use mayu_vmm::devices::virtio::VirtioDevice;
use mayu_vmm::devices::virtio::testing::{Descriptor, Driver, LOW_MEMORY, RUNNING, WRITE};

use crate::{Action, Area, Piece};

/// Guest physical addresses of the buffers: behind the queues, as in the devices' own tests.
const BUFFERS: u64 = 1 << 20;

/// How long a device that was lied to may take over what it will perhaps never do.
const MOMENT: Duration = Duration::from_micros(200);

/// Offsets of registers (virtio 1.2, 4.2.2).
const DEVICE_FEATURES: u32 = 0x10;
const DEVICE_FEATURES_SELECT: u32 = 0x14;
const STATUS: u32 = 0x70;

/// A device behind its transport, and the books that are kept of it.
pub struct Guest {
    /// The honest half of the driver.
    pub driver: Driver,
    /// Queues whose chains the device uses as soon as it gets them, whatever they hold.
    answered: &'static [u16],
    /// For each queue what the device has not used yet, by the chain's head.
    available: Vec<HashMap<u32, Chain>>,
    next_buffer: u64,
    /// The driver has done nothing that it may not since its start, so that the device has to do its part.
    honest: bool,
    /// What the host does while the device is waited for.
    meanwhile: Box<dyn FnMut()>,
}

/// What is known of a chain.
struct Chain {
    descriptors: u16,
    /// Bytes that the device may write.
    writable: u64,
}

impl Guest {
    /// A device that is switched off. It answers the chains of the queues `answered` whatever they hold.
    pub fn new(device: Box<dyn VirtioDevice>, answered: &'static [u16]) -> Self {
        let driver = Driver::new(device);
        let available = driver.queues.iter().map(|_| HashMap::new()).collect();
        Self { driver, answered, available, next_buffer: BUFFERS, honest: false, meanwhile: Box::new(|| {}) }
    }

    /// Has the host do something again and again while the device is waited for.
    pub fn meanwhile(&mut self, action: impl FnMut() + 'static) {
        self.meanwhile = Box::new(action);
    }

    /// Carries out all steps; `host` does those of the host.
    pub fn play(&mut self, actions: Vec<Action>, mut host: impl FnMut(u8, &[u8])) {
        for action in actions {
            match action {
                Action::Host(what, bytes) => host(what, &bytes),
                action => self.take(action),
            }
        }
        self.settle();
    }

    /// Whatever happened, a driver that starts anew finds the device as new, and is not blamed for what was before.
    pub fn start_anew(&mut self) {
        self.start(0);
        assert_eq!(self.driver.status(), RUNNING);
    }

    fn take(&mut self, action: Action) {
        match action {
            Action::Start(features) => self.start(features),
            Action::WriteRegister(register, value) => {
                self.honest = false;
                self.driver.write_register(u32::from(register) * 4, value);
            }
            Action::Read(offset, length) => {
                let mut data = vec![0; usize::from(length)];
                self.driver.transport.read(u64::from(offset), &mut data);
            }
            Action::Chain(queue, pieces) => self.add(queue, pieces),
            Action::Write(queue, area, offset, bytes) => self.write(queue, area, offset, &bytes),
            Action::SetAvailable(queue, index) => {
                self.honest = false;
                let queue = self.queue(queue);
                self.driver.queues[queue].set_avail_index(index);
            }
            Action::Kick(queue) => self.driver.kick(u16::from(queue)),
            Action::Run => self.settle(),
            Action::Reset => {
                self.honest = false;
                self.driver.write_register(STATUS, 0);
            }
            Action::PauseAndResume => {
                self.driver.transport.pause();
                self.driver.run();
                self.driver.transport.resume();
            }
            Action::Host(..) => {}
        }
    }

    fn start(&mut self, features: u64) {
        self.driver.write_register(DEVICE_FEATURES_SELECT, 0);
        let offered = u64::from(self.driver.read_register(DEVICE_FEATURES));
        self.driver.start(features & offered);
        self.available.iter_mut().for_each(HashMap::clear);
        self.honest = true;
    }

    fn queue(&self, number: u8) -> usize {
        usize::from(number) % self.driver.queues.len()
    }

    /// Makes a chain available, if there is room for one more.
    fn add(&mut self, queue: u8, pieces: Vec<Piece>) {
        let queue = self.queue(queue);
        let taken: u16 = self.available[queue].values().map(|chain| chain.descriptors).sum();
        let descriptors = pieces.len() as u16;
        if pieces.is_empty() || taken + descriptors > self.driver.queues[queue].size {
            return;
        }
        // A wild buffer may be a ring, and a wild chain may end anywhere.
        self.honest &= !pieces.iter().any(|piece| matches!(piece, Piece::Wild(..) | Piece::Table(_)));
        let chain: Vec<_> = pieces.into_iter().map(|piece| self.place(piece)).collect();
        let writable =
            chain.iter().filter(|piece| piece.flags & WRITE != 0).map(|piece| u64::from(piece.length)).sum();
        let head = self.driver.queues[queue].add(&chain);
        self.available[queue].insert(u32::from(head), Chain { descriptors, writable });
    }

    /// Puts a piece into guest memory, and describes it.
    fn place(&mut self, piece: Piece) -> Descriptor {
        match piece {
            Piece::Readable(bytes) => {
                let address = self.allocate(&bytes);
                Descriptor::readable(address, bytes.len() as u32)
            }
            Piece::Writable(length) => {
                let address = self.next_buffer;
                self.next_buffer = self.room(u64::from(length).min(1 << 16));
                Descriptor::writable(address, length)
            }
            Piece::Wild(address, length, flags, next) => Descriptor { address, length, flags, next },
            Piece::Table(descriptors) => {
                let bytes: Vec<u8> = descriptors
                    .iter()
                    .flat_map(|&(address, length, flags, next)| {
                        Descriptor { address, length, flags, next }.bytes()
                    })
                    .collect();
                let address = self.allocate(&bytes);
                Descriptor::indirect(address, descriptors.len() as u32)
            }
        }
    }

    /// Writes a buffer where none was before, or where the oldest ones are once memory is full.
    fn allocate(&mut self, bytes: &[u8]) -> u64 {
        let address = self.next_buffer;
        self.driver.write(address, bytes);
        self.next_buffer = self.room(bytes.len() as u64);
        address
    }

    /// Where the next buffer begins, after one of `length` bytes. At least 64 KiB are there.
    fn room(&self, length: u64) -> u64 {
        let next = (self.next_buffer + length).next_multiple_of(64);
        if next + (1 << 16) > LOW_MEMORY { BUFFERS } else { next }
    }

    fn write(&mut self, queue: u8, area: Area, offset: u16, bytes: &[u8]) {
        self.honest = false;
        let queue = &self.driver.queues[self.queue(queue)];
        let start = match area {
            Area::Table => queue.descriptor_table,
            Area::Available => queue.avail_ring,
            Area::Used => queue.used_ring,
            Area::Buffers => BUFFERS,
        };
        self.driver.write(start + u64::from(offset), bytes);
    }

    /// Has the device work until it has done what it owes the driver, or for a moment where nobody can say what that is.
    fn settle(&mut self) {
        let deadline = Instant::now() + MOMENT;
        for &queue in self.answered {
            self.driver.kick(queue);
        }
        loop {
            self.driver.run();
            (self.meanwhile)();
            let done = self.is_done();
            if done || (!self.honest && Instant::now() > deadline) {
                break;
            }
            std::thread::yield_now();
        }
        assert!(!self.honest || self.driver.status() == RUNNING, "given up on a driver that kept the rules");
        self.check_used();
    }

    /// Whether the device owes the driver nothing.
    fn is_done(&mut self) -> bool {
        // A device that is broken, or off, owes nothing.
        self.driver.status() != RUNNING
            || self.answered.iter().all(|&queue| self.driver.queues[usize::from(queue)].unanswered() == 0)
    }

    /// Everything that was used was available, and no more was written than there was room for.
    fn check_used(&mut self) {
        for (queue, available) in self.driver.queues.iter_mut().zip(&mut self.available) {
            for used in queue.used() {
                let chain = available.remove(&used.head);
                if !self.honest {
                    continue;
                }
                let Chain { writable, .. } = chain.unwrap_or_else(|| panic!("{used:?} was not available"));
                assert!(u64::from(used.length) <= writable, "{used:?} where {writable} bytes may be written");
            }
        }
    }
}
