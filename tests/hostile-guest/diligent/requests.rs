//! Requests that have nothing to do with each other, and whose answers are known.

use super::queue::{ANSWER, Queue, SLOTS};
use super::wrong;
use crate::{read8, read64, write_words, write8, write64};

/// The image has so many sectors, and the file so many pages. Each word in them is its own offset.
const SECTORS: u64 = 1024;
const PAGES: u64 = 64;

/// The header of a request to virtio-fs, and that of an answer.
const REQUEST_HEADER: u64 = 40;
const ANSWER_HEADER: u64 = 16;

/// What is asked of a device.
#[derive(Clone, Copy)]
pub enum Kind {
    Disk,
    Entropy,
    File {
        node: u64,
        handle: u64,
    },
    /// That it takes a page, which may be used again afterwards.
    FreePages,
}

pub struct Requests {
    queue: Queue,
    kind: Kind,
    /// What the request under way in a slot asks for.
    asked: [u64; SLOTS as usize],
}

impl Requests {
    pub fn begin(queue: Queue, kind: Kind) -> Self {
        let mut requests = Self { queue, kind, asked: [0; SLOTS as usize] };
        (0..SLOTS).for_each(|slot| requests.ask(slot));
        requests
    }

    /// Mounts the share and opens the file in it. Its content is what is asked for from then on.
    pub fn of_a_file(mut queue: Queue) -> Self {
        const INIT: u64 = 26;
        const LOOKUP: u64 = 1;
        const OPEN: u64 = 14;
        const ROOT: u64 = 1;
        // Version 7.31.
        call(&mut queue, [INIT, 0], &[7 | 31 << 32, 0], [16, 64]);
        let node = call(&mut queue, [LOOKUP, ROOT], &[u64::from_le_bytes(*b"data\0\0\0\0")], [5, 128]);
        let handle = call(&mut queue, [OPEN, node], &[0], [8, 16]);
        Self::begin(queue, Kind::File { node, handle })
    }

    /// How many requests of the slowest slot were answered.
    pub fn least(&self) -> u64 {
        self.queue.least()
    }

    /// Looks for answers, and asks for more.
    pub fn look(&mut self) {
        while let Some((slot, length)) = self.queue.take() {
            self.check(slot, length);
            self.ask(slot);
        }
    }

    fn check(&self, slot: u64, length: u64) {
        let (asked, answer) = (self.asked[slot as usize], self.queue.answer(slot));
        let (first, bytes, expected) = match self.kind {
            Kind::Disk => (answer, 512, 513),
            Kind::File { .. } => (answer + ANSWER_HEADER, 4096, 4096 + ANSWER_HEADER),
            Kind::Entropy => {
                if length != 64 || (0..8).all(|word| read64(answer + word * 8) == 0) {
                    wrong("no entropy", length);
                }
                return;
            }
            Kind::FreePages => return check_page(answer, asked, length),
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
        let (request, answer) = (self.queue.request(slot), self.queue.answer(slot));
        (0..ANSWER / 8).for_each(|word| write64(answer + word * 8, 0));
        let turn = self.queue.answered(slot) * SLOTS + slot;
        self.asked[slot as usize] = match self.kind {
            Kind::Disk => {
                let sector = turn * 7 % SECTORS;
                write_words(request, &[0, sector]);
                // No status is like this one.
                write8(answer + 512, 0xff);
                self.queue.submit(slot, 16, 513);
                sector * 512
            }
            Kind::File { node, handle } => {
                const READ: u64 = 15;
                let offset = turn * 7 % PAGES * 4096;
                ask_for_files(&mut self.queue, slot, [READ, node], &[handle, offset, 4096, 0, 0], [40, 4096]);
                offset
            }
            Kind::Entropy => {
                self.queue.submit(slot, 0, 64);
                0
            }
            Kind::FreePages => {
                (0..4096).step_by(8).for_each(|offset| write64(answer + offset, turn));
                self.queue.submit(slot, 0, 4096);
                turn
            }
        };
    }
}

/// What was reported reads as zero, or as it was when the machine was saved.
fn check_page(page: u64, written: u64, length: u64) {
    if length != 0 {
        wrong("the length of an answer", length);
    }
    for at in (page..page + 4096).step_by(8) {
        let word = read64(at);
        if word != 0 && (word > written || word % SLOTS != written % SLOTS) {
            wrong("on a page that was reported", word);
        }
    }
}

/// Makes one request of virtio-fs and waits for the first word of its answer.
fn call(queue: &mut Queue, what: [u64; 2], body: &[u64], lengths: [u64; 2]) -> u64 {
    ask_for_files(queue, 0, what, body, lengths);
    while queue.take().is_none() {}
    let error = (read64(queue.answer(0)) >> 32) as i32;
    if error != 0 {
        wrong("an error of virtio-fs", error.unsigned_abs().into());
    }
    read64(queue.answer(0) + ANSWER_HEADER)
}

fn ask_for_files(queue: &mut Queue, slot: u64, what: [u64; 2], body: &[u64], [length, room]: [u64; 2]) {
    let request = queue.request(slot);
    let [operation, node] = what;
    let length = REQUEST_HEADER + length;
    write_words(request, &[length | operation << 32, 2 + slot * 2, node, 0, 1]);
    write_words(request + REQUEST_HEADER, body);
    queue.submit(slot, length, ANSWER_HEADER + room);
}
