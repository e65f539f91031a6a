//! A queue as its driver sees it. Its requests have slots: each is a place for bytes, and descriptors that lead there.

use super::wrong;
use crate::{
    BUFFERS, NEXT, QUEUE_NOTIFY, QUEUE_SELECT, QUEUE_SIZE_MAX, WRITE, read16, read32, ring, write_words,
    write16, write32,
};

/// Requests under way in each queue, and the descriptors of each.
pub const SLOTS: u64 = 8;
const PARTS: u64 = 2;

/// A slot has so much room, first for what the device reads and then, from here on, for what it writes.
const BUFFER: u64 = 0x2_0000;
pub const ANSWER: u64 = 0x2000;

pub struct Queue {
    device: u64,
    number: u64,
    /// How many entries its rings have.
    size: u64,
    /// Where its buffers begin.
    buffers: u64,
    /// How many requests were made and answered, and how many of each slot.
    made: u16,
    seen: u16,
    answered: [u64; SLOTS as usize],
    under_way: [bool; SLOTS as usize],
}

impl Queue {
    /// A queue that is set up. No other one has its buffers at the same place.
    pub fn new(device: u64, number: u64, place: u64) -> Self {
        let (size, buffers) = (largest(device, number).into(), BUFFERS + place * SLOTS * BUFFER);
        let (answered, under_way) = ([0; SLOTS as usize], [false; SLOTS as usize]);
        Self { device, number, size, buffers, made: 0, seen: 0, answered, under_way }
    }

    /// Where the bytes of a slot's request are.
    pub fn request(&self, slot: u64) -> u64 {
        self.buffers + slot * BUFFER
    }

    /// Where those of its answer are.
    pub fn answer(&self, slot: u64) -> u64 {
        self.request(slot) + ANSWER
    }

    /// How many requests of a slot were answered.
    pub fn answered(&self, slot: u64) -> u64 {
        self.answered[slot as usize]
    }

    /// The same, of the slot with the fewest.
    pub fn least(&self) -> u64 {
        self.answered.into_iter().min().unwrap_or(0)
    }

    pub fn is_free(&self, slot: u64) -> bool {
        !self.under_way[slot as usize]
    }

    /// Puts a slot's buffers into the queue: so many bytes for the device to read and to write.
    pub fn submit(&mut self, slot: u64, readable: u64, writable: u64) {
        let ring = ring(self.device, self.number);
        let (head, at) = (slot * PARTS, ring + slot * PARTS * 16);
        let answer = [self.answer(slot), writable | WRITE << 32];
        match (readable, writable) {
            (0, _) => write_words(at, &answer),
            (_, 0) => write_words(at, &[self.request(slot), readable]),
            _ => {
                write_words(at, &[self.request(slot), readable | NEXT << 32 | (head + 1) << 48]);
                write_words(at + 16, &answer);
            }
        }
        self.under_way[slot as usize] = true;
        let available = ring + 0x1000;
        write16(available + 4 + u64::from(self.made) % self.size * 2, head as u16);
        self.made = self.made.wrapping_add(1);
        write16(available + 2, self.made);
        write32(self.device + QUEUE_NOTIFY, self.number as u32);
    }

    /// The next answer, if there is one: its slot and its length.
    pub fn take(&mut self) -> Option<(u64, u64)> {
        let used = ring(self.device, self.number) + 0x2000;
        if read16(used + 2) == self.seen {
            return None;
        }
        let at = used + 4 + u64::from(self.seen) % self.size * 8;
        let (head, length) = (u64::from(read32(at)), u64::from(read32(at + 4)));
        self.seen = self.seen.wrapping_add(1);
        let slot = head / PARTS;
        match self.under_way.get_mut(slot as usize) {
            Some(under_way @ true) => *under_way = false,
            _ => wrong("an answer that nobody waits for", head),
        }
        self.answered[slot as usize] += 1;
        Some((slot, length))
    }
}

/// How many entries the rings of a queue have, zero where there is no such queue.
pub fn largest(device: u64, number: u64) -> u32 {
    write32(device + QUEUE_SELECT, number as u32);
    read32(device + QUEUE_SIZE_MAX).min(128)
}
