//! The device driven through real virtqueues. The cable's other end is a socket that keeps the boundaries of packets,
//! or, in `host`, a real TAP.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::AsFd as _;

use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_INT_CONFIG as CHANGED, VIRTIO_MMIO_INT_VRING as USED,
    VIRTIO_MMIO_STATUS,
};

use super::*;
use crate::devices::virtio::testing::{Descriptor, Driver, NEXT, RUNNING, Used, link};

mod data;
mod host;
mod hostile;
mod lifecycle;
mod limits;

const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;

/// How long the device may keep the test waiting on the host's end, in milliseconds. Only a failing test waits for it.
const PATIENCE: u16 = 30_000;

/// The flags of a used ring that say "do not kick".
const NO_NOTIFY: u8 = 1;

/// A driver, the device, and the other end of the cable.
struct Port {
    driver: Driver,
    slot: NetSlot,
    host: File,
    /// Where posted receive buffers lie, by the head of their chain.
    posted: Vec<(u16, u64)>,
    features: u64,
}

/// Two connected sockets that keep the boundaries of packets and do not block.
fn cable() -> (File, File) {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let (a, b) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
    (a.into(), b.into())
}

/// A frame that can be told from any other.
fn frame(number: usize, length: usize) -> Vec<u8> {
    (0..length).map(|byte| (byte * 7 + number * 31 + byte / 256) as u8).collect()
}

fn len(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.len()).unwrap()
}

impl Port {
    /// A device whose driver has accepted these features, with a cable.
    fn new(features: u64) -> Self {
        Self::limited(features, &RateLimit::default())
    }

    /// The same, and so much may go each way.
    fn limited(features: u64, limit: &RateLimit) -> Self {
        let mut port = Self::without_cable(limit);
        port.start(features);
        port.plug_in();
        port
    }

    /// A device without driver and without cable.
    fn unplugged() -> Self {
        Self::without_cable(&RateLimit::default())
    }

    fn without_cable(limit: &RateLimit) -> Self {
        let (net, slot) = Net::new(3, limit).unwrap();
        let host = tempfile::tempfile().unwrap();
        Self { driver: Driver::new(Box::new(net)), slot, host, posted: vec![], features: 0 }
    }

    fn plug_in(&mut self) {
        let (ours, theirs) = cable();
        self.host = ours;
        self.slot.attach_stand_in(theirs).unwrap();
    }

    /// The driver starts, from reset to DRIVER_OK, and with it the device's thread, if there is a cable.
    fn start(&mut self, features: u64) {
        self.driver.start(features);
        self.driver.run();
        self.features = features;
    }

    /// Tells the device that a queue has new chains, if it wants to know.
    fn kick(&mut self, queue: u16) {
        let event_idx = self.features & EVENT_IDX != 0;
        if self.driver.queues[usize::from(queue)].wants_kick(event_idx) {
            self.driver.kick(queue);
        }
    }

    /// Makes receive buffers available, without a kick.
    fn post(&mut self, count: usize, length: u32) {
        for _ in 0..count {
            let address = self.driver.alloc(length as usize);
            let head = self.driver.queues[0].add(&[Descriptor::writable(address, length)]);
            self.posted.retain(|(other, _)| *other != head);
            self.posted.push((head, address));
        }
    }

    /// The host sends a frame.
    fn deliver(&mut self, frame: &[u8]) {
        let packet = [&[0; HEADER_SIZE][..], frame].concat();
        assert_eq!(self.host.write(&packet).unwrap(), packet.len());
    }

    /// Waits until so many chains of a queue are used.
    fn wait(&mut self, queue: u16, count: u16) {
        self.driver.run_until(|driver| {
            let queue = &driver.queues[usize::from(queue)];
            queue.want_interrupt();
            queue.pending() >= count
        });
    }

    fn content(&self, used: Used) -> Vec<u8> {
        let (_, address) = self.posted.iter().find(|(head, _)| u32::from(*head) == used.head).unwrap();
        self.driver.read(*address, used.length as usize)
    }

    /// Waits for a packet in as many buffers as its header says, and returns its frame and their number.
    fn receive(&mut self) -> (Vec<u8>, u16) {
        self.wait(RX, 1);
        let mut used = self.driver.queues[0].used_one();
        let mut packet = self.content(used);
        let buffers = u16::from_le_bytes(packet[10..12].try_into().unwrap());
        assert_eq!(packet[..10], [0; 10]);
        for _ in 1..buffers {
            assert!(self.driver.queues[0].pending() > 0, "the buffers of a packet come together");
            used = self.driver.queues[0].used_one();
            packet.extend(self.content(used));
        }
        (packet.split_off(HEADER_SIZE), buffers)
    }

    /// The guest sends a frame behind an empty header, without a kick.
    fn add(&mut self, frame: &[u8]) {
        let header = self.driver.alloc_bytes(&[0; HEADER_SIZE]);
        let data = self.driver.alloc_bytes(frame);
        self.driver.queues[1]
            .add(&[Descriptor::readable(header, HEADER_SIZE as u32), Descriptor::readable(data, len(frame))]);
    }

    fn send(&mut self, frame: &[u8]) {
        self.add(frame);
        self.kick(TX);
    }

    /// Waits for a packet at the host's end, and returns it with its header.
    fn arrived(&mut self) -> Vec<u8> {
        assert!(readable(&self.host, PATIENCE), "no packet arrives");
        let mut packet = vec![0; 2 * MAX_PACKET];
        let length = self.host.read(&mut packet).unwrap();
        packet.truncate(length);
        packet
    }

    /// Packets go both ways.
    fn assert_works(&mut self) {
        self.driver.run();
        let sent = frame(1, 100);
        self.send(&sent);
        assert_eq!(self.arrived()[HEADER_SIZE..], sent);
        self.wait(TX, 1);
        self.driver.queues[1].used();

        let received = frame(2, 1000);
        self.post(1, 2000);
        self.kick(RX);
        self.deliver(&received);
        assert_eq!(self.receive(), (received, 1));
    }

    /// The same, after packets that may still come in.
    fn assert_works_in_the_end(&mut self) {
        self.fence();
        let last = frame(2, 1000);
        self.deliver(&last);
        self.post(200, 2000);
        self.kick(RX);
        while self.receive().0 != last {}
    }

    /// Returns when the device has done what it can about packets that were delivered: in a turn that starts now, they
    /// come before those that the guest sends.
    fn fence(&mut self) {
        self.driver.transport.pause();
        let sent = frame(99, 60);
        self.add(&sent);
        self.driver.transport.resume();
        assert_eq!(self.arrived()[HEADER_SIZE..], sent);
    }

    fn errors(&self) -> u64 {
        self.driver.transport.health().errors()
    }

    fn link_is_up(&mut self) -> bool {
        self.driver.config(6, 2) == [1, 0]
    }
}

fn readable(file: &File, timeout: u16) -> bool {
    poll(&mut [PollFd::new(file.as_fd(), PollFlags::POLLIN)], timeout).unwrap() > 0
}
