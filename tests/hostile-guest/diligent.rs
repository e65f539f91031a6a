//! A guest that uses its disk, its entropy and its files as drivers do, with requests under way at every moment, and that looks whether
//! each is answered once and with what was asked for. It says how many requests the slowest of its slots has had answered: where one is
//! lost, that number stands still.

use core::fmt::Write;

use crate::{
    ACKNOWLEDGE, BUFFERS, Console, DEVICE_COUNT, DEVICE_ID, DEVICE_SIZE, DEVICES, DRIVER, DRIVER_FEATURES,
    DRIVER_FEATURES_SELECT, DRIVER_OK, FEATURES_OK, NEXT, QUEUE_AVAILABLE, QUEUE_DESCRIPTORS, QUEUE_NOTIFY,
    QUEUE_READY, QUEUE_SELECT, QUEUE_SIZE, QUEUE_SIZE_MAX, QUEUE_USED, STATUS, WRITE, halt, read8, read16,
    read32, read64, ring, write_words, write8, write16, write32, write64,
};

/// Ids of devices (virtio 1.2, 5).
const BLOCK: u32 = 2;
const ENTROPY: u32 = 4;
const FILES: u32 = 26;

/// Requests under way in each device, and the descriptors of each.
const SLOTS: u64 = 8;
const PARTS: u64 = 2;

/// The image has so many sectors, and the file so many pages. Each word in them is its own offset.
const SECTORS: u64 = 1024;
const PAGES: u64 = 64;

/// After so many answers to each slot it says so.
const REPORT: u64 = 50;

/// Where the bytes of a slot's request are, and those of its answer.
const BUFFER: u64 = 0x4000;
const ANSWER: u64 = 0x2000;

/// The header of a request to virtio-fs, and that of an answer.
const REQUEST_HEADER: u64 = 40;
const ANSWER_HEADER: u64 = 16;

pub fn run() -> ! {
    let of_kind = |kind| {
        let mut devices = (0..DEVICE_COUNT).map(|number| DEVICES + number * DEVICE_SIZE);
        devices.find(|device| read32(device + DEVICE_ID) == kind).unwrap_or(DEVICES)
    };
    let mut queues = [
        // The image is the first of the disks.
        Queue::new(of_kind(BLOCK), 0, 0, Kind::Disk),
        Queue::new(of_kind(ENTROPY), 0, 1, Kind::Entropy),
        Queue::new(of_kind(FILES), 1, 2, Kind::Nothing),
    ];
    queues[2].open_file();
    for queue in &mut queues {
        (0..SLOTS).for_each(|slot| queue.ask(slot));
    }
    let mut reported = 0;
    loop {
        queues.iter_mut().for_each(Queue::look);
        let least = queues.iter().flat_map(|queue| queue.answered).min().unwrap_or(0);
        if least >= reported + REPORT {
            reported = least;
            let _ = writeln!(Console, "diligent: {least}");
        }
    }
}

/// What is asked of a device.
#[derive(Clone, Copy)]
enum Kind {
    Disk,
    Entropy,
    File { node: u64, handle: u64 },
    Nothing,
}

struct Queue {
    device: u64,
    number: u64,
    /// How many entries its rings have.
    size: u64,
    /// Where its buffers begin.
    buffers: u64,
    kind: Kind,
    /// How many requests were made and answered, and how many of each slot.
    made: u16,
    seen: u16,
    answered: [u64; SLOTS as usize],
    /// What the request under way in a slot asks for, if there is one.
    asked: [Option<u64>; SLOTS as usize],
}

impl Queue {
    fn new(device: u64, number: u64, index: u64, kind: Kind) -> Self {
        write32(device + STATUS, 0);
        write32(device + STATUS, ACKNOWLEDGE);
        write32(device + STATUS, ACKNOWLEDGE | DRIVER);
        // VIRTIO_F_VERSION_1 and nothing else.
        write32(device + DRIVER_FEATURES_SELECT, 1);
        write32(device + DRIVER_FEATURES, 1);
        write32(device + STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        let mut size = 0;
        for queue in 0..=number {
            write32(device + QUEUE_SELECT, queue as u32);
            size = read32(device + QUEUE_SIZE_MAX).min(128);
            write32(device + QUEUE_SIZE, size);
            let ring = ring(device, queue);
            for (register, part) in [(QUEUE_DESCRIPTORS, 0), (QUEUE_AVAILABLE, 0x1000), (QUEUE_USED, 0x2000)]
            {
                write32(device + register, (ring + part) as u32);
                write32(device + register + 4, 0);
            }
            write32(device + QUEUE_READY, 1);
        }
        write32(device + STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        let buffers = BUFFERS + index * SLOTS * BUFFER;
        let (answered, asked) = ([0; SLOTS as usize], [None; SLOTS as usize]);
        Self { device, number, size: size.into(), buffers, kind, made: 0, seen: 0, answered, asked }
    }

    /// Mounts the share and opens the file in it. Its content is what is asked for from then on.
    fn open_file(&mut self) {
        const INIT: u64 = 26;
        const LOOKUP: u64 = 1;
        const OPEN: u64 = 14;
        const ROOT: u64 = 1;
        // Version 7.31.
        self.call(INIT, 0, &[7 | 31 << 32, 0], 16, 64);
        let node = self.call(LOOKUP, ROOT, &[u64::from_le_bytes(*b"data\0\0\0\0")], 5, 128);
        let handle = self.call(OPEN, node, &[0], 8, 16);
        self.kind = Kind::File { node, handle };
    }

    /// Makes one request of virtio-fs and waits for the first word of its answer.
    fn call(&mut self, operation: u64, node: u64, body: &[u64], length: u64, room: u64) -> u64 {
        self.ask_for_files(0, [operation, node], body, [length, room]);
        let used = ring(self.device, self.number) + 0x2000;
        while read16(used + 2) == self.seen {}
        self.seen = self.seen.wrapping_add(1);
        let answer = self.buffers + ANSWER;
        let error = (read64(answer) >> 32) as i32;
        if error != 0 {
            wrong("an error of virtio-fs", error.unsigned_abs().into());
        }
        read64(answer + ANSWER_HEADER)
    }

    /// Looks for answers, and asks for more.
    fn look(&mut self) {
        let used = ring(self.device, self.number) + 0x2000;
        while read16(used + 2) != self.seen {
            let at = used + 4 + u64::from(self.seen) % self.size * 8;
            let (head, length) = (u64::from(read32(at)), u64::from(read32(at + 4)));
            self.seen = self.seen.wrapping_add(1);
            let slot = head / PARTS;
            match self.asked.get_mut(slot as usize).and_then(Option::take) {
                Some(asked) => self.check(slot, asked, length),
                None => wrong("an answer that nobody waits for", head),
            }
            self.answered[slot as usize] += 1;
            self.ask(slot);
        }
    }

    fn check(&self, slot: u64, asked: u64, length: u64) {
        let answer = self.buffers + slot * BUFFER + ANSWER;
        let (first, bytes, expected) = match self.kind {
            Kind::Disk => (answer, 512, 513),
            Kind::File { .. } => (answer + ANSWER_HEADER, 4096, 4096 + ANSWER_HEADER),
            Kind::Entropy | Kind::Nothing => {
                if length != 64 || (0..8).all(|word| read64(answer + word * 8) == 0) {
                    wrong("no entropy", length);
                }
                return;
            }
        };
        if length != expected || (read8(first + bytes) != 0 && matches!(self.kind, Kind::Disk)) {
            wrong("the length of an answer", length);
        }
        for offset in (0..bytes).step_by(8) {
            if read64(first + offset) != asked + offset {
                wrong("the content at", asked + offset);
            }
        }
    }

    /// Asks for the next piece in this slot.
    fn ask(&mut self, slot: u64) {
        let buffer = self.buffers + slot * BUFFER;
        (0..ANSWER / 8).for_each(|word| write64(buffer + ANSWER + word * 8, 0));
        let turn = self.answered[slot as usize] * SLOTS + slot;
        match self.kind {
            Kind::Disk => {
                let sector = turn * 7 % SECTORS;
                write_words(buffer, &[0, sector]);
                // No status is like this one.
                write8(buffer + ANSWER + 512, 0xff);
                self.asked[slot as usize] = Some(sector * 512);
                self.submit(slot, 16, 513);
            }
            Kind::File { node, handle } => {
                const READ: u64 = 15;
                let offset = turn * 7 % PAGES * 4096;
                self.asked[slot as usize] = Some(offset);
                let body = [handle, offset, 4096, 0, 0];
                self.ask_for_files(slot, [READ, node], &body, [40, 4096]);
            }
            Kind::Entropy => {
                self.asked[slot as usize] = Some(0);
                self.submit(slot, 0, 64);
            }
            Kind::Nothing => {}
        }
    }

    fn ask_for_files(&mut self, slot: u64, what: [u64; 2], body: &[u64], [length, room]: [u64; 2]) {
        let buffer = self.buffers + slot * BUFFER;
        let [operation, node] = what;
        let length = REQUEST_HEADER + length;
        write_words(buffer, &[length | operation << 32, 2 + slot * 2, node, 0, 1]);
        write_words(buffer + REQUEST_HEADER, body);
        self.submit(slot, length, ANSWER_HEADER + room);
    }

    /// Puts a slot's buffers into the queue: what the device reads, if there is any, and what it writes.
    fn submit(&mut self, slot: u64, readable: u64, writable: u64) {
        let (buffer, ring) = (self.buffers + slot * BUFFER, ring(self.device, self.number));
        let (head, at) = (slot * PARTS, ring + slot * PARTS * 16);
        let answer = [buffer + ANSWER, writable | WRITE << 32];
        match readable {
            0 => write_words(at, &answer),
            _ => {
                write_words(at, &[buffer, readable | NEXT << 32 | (head + 1) << 48]);
                write_words(at + 16, &answer);
            }
        }
        let available = ring + 0x1000;
        write16(available + 4 + u64::from(self.made) % self.size * 2, head as u16);
        self.made = self.made.wrapping_add(1);
        write16(available + 2, self.made);
        write32(self.device + QUEUE_NOTIFY, self.number as u32);
    }
}

fn wrong(what: &str, number: u64) -> ! {
    let _ = writeln!(Console, "wrong: {what} {number:#x}");
    loop {
        halt();
    }
}
