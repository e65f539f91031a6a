//! A driver for tests: it runs a device behind its real transport and writes virtqueues into guest memory byte by
//! byte, so that it can also write what no driver may. The fuzz targets drive the devices by it as well, for which
//! there is the feature `testing`.

#![allow(clippy::unwrap_used)]

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_mmio::*;
use virtio_queue::{Queue, QueueState};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::transport::MmioTransport;
use super::{DeviceEvent, GuestMemory, Interrupt, VirtioDevice};
use crate::event_loop::{Ready, Registrar};
use crate::seccomp::Confinement;

/// `VIRTQ_DESC_F_NEXT`: the chain goes on (virtio 1.2, 2.7.5).
pub const NEXT: u16 = 1;
/// `VIRTQ_DESC_F_WRITE`: the device writes the buffer.
pub const WRITE: u16 = 2;
/// `VIRTQ_DESC_F_INDIRECT`: the buffer holds a table of descriptors.
pub const INDIRECT: u16 = 4;

/// The device's status when its driver has done everything right.
pub const RUNNING: u32 = 0xf;
/// The device's bit in its status that says that it has given up.
pub const NEEDS_RESET: u32 = 0x40;

/// Guest memory: so many bytes from zero, then the hole, ...
pub const LOW_MEMORY: u64 = 64 << 20;
/// ... then more from here on, ...
pub const HIGH_MEMORY: u64 = 1 << 32;
/// ... so many bytes.
pub const HIGH_MEMORY_SIZE: u64 = 1 << 20;

/// Where the first queue lies, and how much room each one has.
const QUEUES: u64 = 0x1_0000;

/// Where the buffers of [`Driver::alloc`] start.
const BUFFERS: u64 = 1 << 20;

/// How long the device may do nothing before a test fails, in milliseconds. Only a failing test waits for it.
const PATIENCE: i32 = 30_000;

/// The event loop's word for the interrupt line.
const INTERRUPT: u64 = u64::MAX;

/// Fresh guest memory.
pub fn guest_memory() -> GuestMemory {
    let regions = [
        (GuestAddress(0), usize::try_from(LOW_MEMORY).unwrap()),
        (GuestAddress(HIGH_MEMORY), usize::try_from(HIGH_MEMORY_SIZE).unwrap()),
    ];
    GuestMemory::new(GuestMemoryMmap::from_ranges(&regions).unwrap())
}

/// One descriptor as it lies in guest memory (virtio 1.2, 2.7.5).
#[derive(Clone, Copy, Debug)]
pub struct Descriptor {
    /// Guest physical address of the buffer.
    pub address: u64,
    /// In bytes.
    pub length: u32,
    /// [`NEXT`], [`WRITE`] and [`INDIRECT`].
    pub flags: u16,
    /// The number of the next one.
    pub next: u16,
}

impl Descriptor {
    /// A buffer that the device reads; [`DriverQueue::add`] links it.
    pub fn readable(address: u64, length: u32) -> Self {
        Self { address, length, flags: 0, next: 0 }
    }

    /// A buffer that the device writes.
    pub fn writable(address: u64, length: u32) -> Self {
        Self { flags: WRITE, ..Self::readable(address, length) }
    }

    /// A table of `count` descriptors.
    pub fn indirect(address: u64, count: u32) -> Self {
        Self { flags: INDIRECT, ..Self::readable(address, count * 16) }
    }

    /// As it lies in guest memory.
    pub fn bytes(self) -> Vec<u8> {
        let mut bytes = self.address.to_le_bytes().to_vec();
        bytes.extend(self.length.to_le_bytes());
        bytes.extend(self.flags.to_le_bytes());
        bytes.extend(self.next.to_le_bytes());
        bytes
    }
}

/// Links descriptors one after the other, the first of them being number `first` of `size`.
pub fn link(chain: &[Descriptor], first: u16, size: u16) -> Vec<Descriptor> {
    let mut linked = chain.to_vec();
    for (number, descriptor) in linked.iter_mut().rev().skip(1).rev().enumerate() {
        descriptor.flags |= NEXT;
        descriptor.next = (first + u16::try_from(number).unwrap() + 1) % size;
    }
    linked
}

/// A used element: the chain's head and how many bytes the device wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// The number of the chain's first descriptor.
    pub head: u32,
    /// In bytes.
    pub length: u32,
}

/// One split virtqueue from the driver's side.
pub struct DriverQueue {
    memory: GuestMemory,
    /// In descriptors.
    pub size: u16,
    /// Guest physical address.
    pub descriptor_table: u64,
    /// Guest physical address.
    pub avail_ring: u64,
    /// Guest physical address.
    pub used_ring: u64,
    next_descriptor: u16,
    avail_index: u16,
    used_index: u16,
    /// `avail_index` when it was last asked whether to kick.
    kicked_index: u16,
}

impl DriverQueue {
    /// Queue number `number` with `size` descriptors, in its own part of guest memory.
    pub fn new(memory: &GuestMemory, number: usize, size: u16) -> Self {
        let base = QUEUES + u64::try_from(number).unwrap() * 0x1_0000;
        Self {
            memory: memory.clone(),
            size,
            descriptor_table: base,
            avail_ring: base + 0x8000,
            used_ring: base + 0xc000,
            next_descriptor: 0,
            avail_index: 0,
            used_index: 0,
            kicked_index: 0,
        }
    }

    /// Writes one descriptor of the table.
    pub fn write_descriptor(&self, number: u16, descriptor: Descriptor) {
        write(&self.memory, self.descriptor_table + u64::from(number) * 16, &descriptor.bytes());
    }

    /// Links the descriptors, puts them where none were before (the table is used round and round), and makes them
    /// available. Returns the head.
    pub fn add(&mut self, chain: &[Descriptor]) -> u16 {
        let head = self.next_descriptor;
        for descriptor in link(chain, head, self.size) {
            self.write_descriptor(self.next_descriptor, descriptor);
            self.next_descriptor = (self.next_descriptor + 1) % self.size;
        }
        self.publish(head);
        head
    }

    /// Makes the chain at `head` available.
    pub fn publish(&mut self, head: u16) {
        let slot = u64::from(self.avail_index % self.size);
        write(&self.memory, self.avail_ring + 4 + 2 * slot, &head.to_le_bytes());
        self.set_avail_index(self.avail_index.wrapping_add(1));
    }

    /// Says how many chains were ever made available.
    pub fn set_avail_index(&mut self, index: u16) {
        self.avail_index = index;
        write(&self.memory, self.avail_ring + 2, &index.to_le_bytes());
    }

    /// Whether the device wants to be kicked for what was added since the last call, which only a driver that trusts it
    /// asks (virtio 1.2, 2.7.10).
    pub fn wants_kick(&mut self, event_idx: bool) -> bool {
        let (before, now) = (self.kicked_index, self.avail_index);
        self.kicked_index = now;
        // The device first writes what it wants and then looks into the available ring.
        fence(Ordering::SeqCst);
        let half = |address| u16::from_le_bytes(read(&self.memory, address, 2).try_into().unwrap());
        if !event_idx {
            return half(self.used_ring) & 1 == 0;
        }
        let avail_event = half(self.used_ring + 4 + 8 * u64::from(self.size));
        now.wrapping_sub(avail_event).wrapping_sub(1) < now.wrapping_sub(before)
    }

    /// With event indices: asks for an interrupt once the used index passes `index`.
    pub fn set_used_event(&self, index: u16) {
        let address = self.avail_ring + 4 + 2 * u64::from(self.size);
        write(&self.memory, address, &index.to_le_bytes());
    }

    /// With event indices: asks for an interrupt for what is used from now on, as a driver does that is about to wait.
    pub fn want_interrupt(&self) {
        self.set_used_event(self.used_index.wrapping_add(self.pending()));
    }

    /// How many chains the device has used that `used` has not returned yet.
    pub fn pending(&self) -> u16 {
        let index = read(&self.memory, self.used_ring + 2, 2);
        u16::from_le_bytes(index.try_into().unwrap()).wrapping_sub(self.used_index)
    }

    /// How many chains are available that the device has not used.
    pub fn unanswered(&self) -> u16 {
        self.avail_index.wrapping_sub(self.used_index).wrapping_sub(self.pending())
    }

    /// What the device has used since the last call.
    pub fn used(&mut self) -> Vec<Used> {
        (0..self.pending()).map(|_| self.used_one()).collect()
    }

    /// The next chain that the device has used.
    pub fn used_one(&mut self) -> Used {
        let slot = u64::from(self.used_index % self.size);
        let element = read(&self.memory, self.used_ring + 4 + 8 * slot, 8);
        let (head, length) = element.split_at(4);
        self.used_index = self.used_index.wrapping_add(1);
        Used {
            head: u32::from_le_bytes(head.try_into().unwrap()),
            length: u32::from_le_bytes(length.try_into().unwrap()),
        }
    }

    /// The device's half, ready, for tests without a transport.
    pub fn device_side(&self) -> Queue {
        Queue::try_from(QueueState {
            max_size: self.size,
            size: self.size,
            ready: true,
            desc_table: self.descriptor_table,
            avail_ring: self.avail_ring,
            used_ring: self.used_ring,
            ..QueueState::default()
        })
        .unwrap()
    }

    /// Goes on as if so many chains had come and gone.
    pub fn start_at(&mut self, position: u16) {
        (self.avail_index, self.used_index) = (position, position);
    }

    fn restart(&mut self) {
        write(&self.memory, self.descriptor_table, &[0; 0x1_0000]);
        (self.next_descriptor, self.avail_index, self.used_index, self.kicked_index) = (0, 0, 0, 0);
    }
}

/// A device, its transport, an event loop, and the driver's half of it all.
pub struct Driver {
    /// All of guest memory.
    pub memory: GuestMemory,
    /// The device, as its registers show it.
    pub transport: MmioTransport,
    /// All queues of the device.
    pub queues: Vec<DriverQueue>,
    /// How often the interrupt line was found raised.
    pub interrupts: u64,
    /// How many events the device was handed.
    pub events: u64,
    epoll: Arc<Epoll>,
    next_buffer: u64,
}

impl Driver {
    /// A machine with this device, freshly powered on.
    pub fn new(device: Box<dyn VirtioDevice>) -> Self {
        Self::with_memory(device, guest_memory())
    }

    fn with_memory(device: Box<dyn VirtioDevice>, memory: GuestMemory) -> Self {
        let epoll = Arc::new(Epoll::new().unwrap());
        let interrupt = Interrupt::new(EventFd::new(EFD_NONBLOCK).unwrap());
        epoll
            .ctl(
                ControlOperation::Add,
                interrupt.line().as_raw_fd(),
                EpollEvent::new(EventSet::IN, INTERRUPT),
            )
            .unwrap();
        let sizes = device.queue_sizes().to_vec();
        let events = sizes.iter().map(|_| EventFd::new(EFD_NONBLOCK).unwrap()).collect();
        let queues =
            sizes.iter().enumerate().map(|(number, &size)| DriverQueue::new(&memory, number, size)).collect();
        let registrar = Registrar::new(Arc::clone(&epoll), 0);
        Self {
            transport: MmioTransport::new(
                device,
                memory.clone(),
                interrupt,
                events,
                registrar,
                Confinement::none(),
            ),
            memory,
            queues,
            interrupts: 0,
            events: 0,
            epoll,
            next_buffer: BUFFERS,
        }
    }

    /// Goes on with another device in the same place, as after a restore. Guest memory and the driver's own state
    /// stay as they are.
    pub fn move_to(self, device: Box<dyn VirtioDevice>) -> Self {
        let mut moved = Self::with_memory(device, self.memory);
        moved.queues = self.queues;
        moved.next_buffer = self.next_buffer;
        moved
    }

    /// Everything from reset to DRIVER_OK, with all queues and exactly these features beside VERSION_1.
    pub fn start(&mut self, features: u64) {
        self.negotiate(features);
        for number in 0..self.queues.len() {
            self.set_up_queue(number);
        }
        self.write_register(VIRTIO_MMIO_STATUS, RUNNING);
        assert_eq!(self.status(), RUNNING, "{:?}", self.transport.health().take_failure());
    }

    /// From reset to FEATURES_OK.
    pub fn negotiate(&mut self, features: u64) {
        self.write_register(VIRTIO_MMIO_STATUS, 0);
        for queue in &mut self.queues {
            queue.restart();
        }
        self.write_register(VIRTIO_MMIO_STATUS, 1);
        self.write_register(VIRTIO_MMIO_STATUS, 3);
        let features = features | 1 << 32;
        for (select, half) in [(0, features & 0xffff_ffff), (1, features >> 32)] {
            self.write_register(VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
            self.write_register(VIRTIO_MMIO_DRIVER_FEATURES, u32::try_from(half).unwrap());
        }
        self.write_register(VIRTIO_MMIO_STATUS, 0xb);
        assert_eq!(self.status(), 0xb, "the device refuses these features");
    }

    /// Tells the device where a queue lies, and that it is ready.
    pub fn set_up_queue(&mut self, number: usize) {
        let queue = &self.queues[number];
        let (size, addresses) = (
            u32::from(queue.size),
            [
                (VIRTIO_MMIO_QUEUE_DESC_LOW, queue.descriptor_table),
                (VIRTIO_MMIO_QUEUE_AVAIL_LOW, queue.avail_ring),
                (VIRTIO_MMIO_QUEUE_USED_LOW, queue.used_ring),
            ],
        );
        self.write_register(VIRTIO_MMIO_QUEUE_SEL, u32::try_from(number).unwrap());
        self.write_register(VIRTIO_MMIO_QUEUE_NUM, size);
        for (register, address) in addresses {
            self.write_register(register, u32::try_from(address & 0xffff_ffff).unwrap());
            self.write_register(register + 4, u32::try_from(address >> 32).unwrap());
        }
        self.write_register(VIRTIO_MMIO_QUEUE_READY, 1);
    }

    /// The device's status register.
    pub fn status(&mut self) -> u32 {
        self.read_register(VIRTIO_MMIO_STATUS)
    }

    /// Reads the register at this offset.
    pub fn read_register(&mut self, register: u32) -> u32 {
        let mut data = [0; 4];
        self.transport.read(u64::from(register), &mut data);
        u32::from_le_bytes(data)
    }

    /// Writes the register at this offset.
    pub fn write_register(&mut self, register: u32, value: u32) {
        self.transport.write(u64::from(register), &value.to_le_bytes());
    }

    /// Reads the device's configuration.
    pub fn config(&mut self, offset: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0xee; length];
        self.transport.read(u64::from(VIRTIO_MMIO_CONFIG) + offset, &mut data);
        data
    }

    /// Handles an interrupt as a driver does: reads its reasons and acknowledges them.
    pub fn take_interrupt(&mut self) -> u32 {
        let reasons = self.read_register(VIRTIO_MMIO_INTERRUPT_STATUS);
        self.write_register(VIRTIO_MMIO_INTERRUPT_ACK, reasons);
        reasons
    }

    /// Tells the device that a queue has new chains.
    pub fn kick(&mut self, queue: u16) {
        self.write_register(VIRTIO_MMIO_QUEUE_NOTIFY, u32::from(queue));
    }

    /// Kicks the queue and waits until the device has used `count` chains of it.
    pub fn exchange(&mut self, queue: u16, count: u16) -> Vec<Used> {
        self.kick(queue);
        let queue = usize::from(queue);
        self.run_until(|driver| driver.queues[queue].pending() >= count);
        self.queues[queue].used()
    }

    /// Runs the event loop as long as something is ready.
    pub fn run(&mut self) {
        while self.dispatch(0) > 0 {}
    }

    /// Runs the event loop until `condition` holds.
    pub fn run_until(&mut self, mut condition: impl FnMut(&mut Self) -> bool) {
        while !condition(self) {
            assert_ne!(self.dispatch(PATIENCE), 0, "the device does nothing");
        }
    }

    /// Runs the event loop until the device has broken down, for which it interrupts.
    pub fn run_until_broken(&mut self) {
        self.run_until(|driver| driver.status() & NEEDS_RESET != 0);
        self.run();
    }

    /// A piece of guest memory that nothing else uses.
    pub fn alloc(&mut self, length: usize) -> u64 {
        let address = self.next_buffer;
        self.next_buffer += u64::try_from(length.next_multiple_of(64)).unwrap();
        assert!(self.next_buffer <= LOW_MEMORY, "guest memory is full");
        address
    }

    /// A piece of guest memory with these bytes.
    pub fn alloc_bytes(&mut self, bytes: &[u8]) -> u64 {
        let address = self.alloc(bytes.len());
        self.write(address, bytes);
        address
    }

    /// A table for [`Descriptor::indirect`] with these descriptors, as they are.
    pub fn alloc_table(&mut self, descriptors: &[Descriptor]) -> u64 {
        let bytes: Vec<u8> = descriptors.iter().flat_map(|descriptor| descriptor.bytes()).collect();
        self.alloc_bytes(&bytes)
    }

    /// Writes guest memory, which has to be there.
    pub fn write(&self, address: u64, bytes: &[u8]) {
        write(&self.memory, address, bytes);
    }

    /// Reads guest memory, which has to be there.
    pub fn read(&self, address: u64, length: usize) -> Vec<u8> {
        read(&self.memory, address, length)
    }

    /// Waits for events and handles them; returns how many there were.
    fn dispatch(&mut self, timeout: i32) -> usize {
        let mut events = [EpollEvent::default(); 16];
        let count = loop {
            match self.epoll.wait(timeout, &mut events) {
                // Fuzzers have alarms.
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                count => break count.unwrap(),
            }
        };
        for event in &events[..count] {
            if event.data() == INTERRUPT {
                // Another event's handling may have raised or taken it meanwhile.
                self.interrupts += u64::from(self.transport.interrupt().line().read().is_ok());
                continue;
            }
            match Ready::from(event).event {
                // Read by the event loop; by then a thread of the device may have been faster.
                DeviceEvent::Queue(queue) if self.transport.queue_event(queue).unwrap().read().is_err() => {}
                event => {
                    self.events += 1;
                    self.transport.process(event);
                }
            }
        }
        count
    }
}

fn write(memory: &GuestMemory, address: u64, bytes: &[u8]) {
    memory.memory().write_slice(bytes, GuestAddress(address)).unwrap();
}

fn read(memory: &GuestMemory, address: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    memory.memory().read_slice(&mut bytes, GuestAddress(address)).unwrap();
    bytes
}
