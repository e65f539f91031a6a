//! A guest that uses all its devices as drivers do, with requests under way at every moment, and that looks whether each is answered
//! once and with what was asked for. It says how many requests the slowest of its slots has had answered, and the slowest of each device:
//! where one is lost, that number stands still.
//!
//! - [`requests`] are those of a disk, of entropy, of files and of free pages, which all go on wherever the guest does;
//! - a [`socket`] has a connection to the host, which somebody there echoes. A restored guest is told that it is lost, and connects anew;
//! - a [`network`] has frames, which are echoed as well. A restored guest finds the link down, and what was on the way lost; what it had
//!   not got rid of goes out when the link is up again.

use core::fmt::Write;

use crate::{
    ACKNOWLEDGE, BALLOON, Console, DEVICE_COUNT, DEVICE_ID, DEVICE_SIZE, DEVICES, DRIVER, DRIVER_FEATURES,
    DRIVER_FEATURES_SELECT, DRIVER_OK, FEATURES_OK, QUEUE_AVAILABLE, QUEUE_DESCRIPTORS, QUEUE_READY,
    QUEUE_SELECT, QUEUE_SIZE, QUEUE_USED, QUEUES, STATUS, halt, read8, read32, ring, write8, write32,
};
use network::Network;
use queue::{Queue, largest};
use requests::{Kind, Requests};
use socket::Socket;

mod network;
mod queue;
mod requests;
mod socket;

/// Ids of devices (virtio 1.2, 5).
const NETWORK: u32 = 1;
const BLOCK: u32 = 2;
const ENTROPY: u32 = 4;
const SOCKET: u32 = 19;
const FILES: u32 = 26;

/// Features without which a part of a device is not used: the status of a link, and reports of free pages.
const LINK_STATUS: u32 = 1 << 16;
const REPORTING: u32 = 1 << 5;

/// A device's own registers (virtio 1.2, 4.2.2).
const CONFIGURATION: u64 = 0x100;

/// After so many answers to each slot it says so.
const REPORT: u64 = 50;

pub fn run() -> ! {
    let queue = |device, number, place| Queue::new(device, number, place);
    // The image is the first of the disks.
    let (disk, entropy, files) = (set_up(BLOCK, 0), set_up(ENTROPY, 0), set_up(FILES, 0));
    let (balloon, socket, network) =
        (set_up(BALLOON, REPORTING), set_up(SOCKET, 0), set_up(NETWORK, LINK_STATUS));
    let mut requests = [
        Requests::begin(queue(disk, 0, 0), Kind::Disk),
        Requests::begin(queue(entropy, 0, 1), Kind::Entropy),
        Requests::of_a_file(queue(files, 1, 2)),
        Requests::begin(queue(balloon, 2, 3), Kind::FreePages),
    ];
    let mut socket = Socket::begin(socket, [0, 1, 2].map(|number| queue(socket, number, 4 + number)));
    let mut network = Network::begin(network, [0, 1].map(|number| queue(network, number, 7 + number)));
    let mut reported = [0; 2];
    loop {
        requests.iter_mut().for_each(Requests::look);
        socket.look();
        network.look();
        let [disk, entropy, files, free_pages] = requests.each_ref().map(Requests::least);
        let answered = [
            ("disk", disk),
            ("entropy", entropy),
            ("files", files),
            ("free pages", free_pages),
            ("socket", socket.least()),
            ("network", network.least()),
        ];
        let counts = answered.map(|(_, count)| count).into_iter();
        let [least, most] = [counts.clone().min(), counts.max()].map(Option::unwrap_or_default);
        // Also where all but one go on: which one is it?
        if least >= reported[0] + REPORT || most >= reported[1] + 100 * REPORT {
            reported = [least, most];
            say(format_args!("{least} of {answered:?}"));
        }
    }
}

/// Sets up the first device of a kind with all its queues, and no feature but those named and VIRTIO_F_VERSION_1.
fn set_up(kind: u32, features: u32) -> u64 {
    let mut devices = (0..DEVICE_COUNT).map(|number| DEVICES + number * DEVICE_SIZE);
    let device = devices.find(|device| read32(device + DEVICE_ID) == kind).unwrap_or(DEVICES);
    write32(device + STATUS, 0);
    write32(device + STATUS, ACKNOWLEDGE);
    write32(device + STATUS, ACKNOWLEDGE | DRIVER);
    for (word, features) in [features, 1].into_iter().enumerate() {
        write32(device + DRIVER_FEATURES_SELECT, word as u32);
        write32(device + DRIVER_FEATURES, features);
    }
    write32(device + STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    for queue in (0..QUEUES).take_while(|queue| largest(device, *queue) > 0) {
        write32(device + QUEUE_SELECT, queue as u32);
        write32(device + QUEUE_SIZE, largest(device, queue));
        let ring = ring(device, queue);
        for (register, part) in [(QUEUE_DESCRIPTORS, 0), (QUEUE_AVAILABLE, 0x1000), (QUEUE_USED, 0x2000)] {
            write32(device + register, (ring + part) as u32);
            write32(device + register + 4, 0);
        }
        write32(device + QUEUE_READY, 1);
    }
    write32(device + STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    device
}

/// The byte at an offset of a text whose words are a running number.
fn byte(first: u64, offset: u64) -> u8 {
    (first + offset / 8).to_le_bytes()[offset as usize % 8]
}

/// Writes so many bytes of such a text.
fn write_text(at: u64, first: u64, offset: u64, length: u64) {
    (0..length).for_each(|index| write8(at + index, byte(first, offset + index)));
}

/// Looks whether these are those bytes of such a text.
fn check_text(at: u64, first: u64, offset: u64, length: u64) {
    if let Some(index) = (0..length).find(|index| read8(at + index) != byte(first, offset + index)) {
        wrong("the text at", offset + index);
    }
}

fn say(what: core::fmt::Arguments<'_>) {
    let _ = writeln!(Console, "diligent: {what}");
}

fn wrong(what: &str, number: u64) -> ! {
    let _ = writeln!(Console, "wrong: {what} {number:#x}");
    loop {
        halt();
    }
}
