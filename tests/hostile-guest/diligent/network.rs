//! Frames (virtio 1.2, 5.1) to somebody on the link who sends each back. A slot has one on the way.

use super::queue::{Queue, SLOTS};
use super::{CONFIGURATION, check_text, say, write_text, wrong};
use crate::{read16, read64, write_words, write8};

/// What is before a frame, and what is in it before its text.
const HEADER: u64 = 12;
const BEFORE: u64 = 20;

/// How much text a frame has. Its first word is the frame's number, above so many bits.
const TEXT: u64 = 256;
const NUMBER_SHIFT: u64 = 8;

/// Room for the longest packet (virtio 1.2, 5.1.6.3.1).
const ROOM: u64 = 65562;

/// To everybody, from a locally administered address, and of Local Experimental EtherType 1 (IEEE 802). The rest is for the words of the
/// text to be aligned.
const BEGINNING: [u8; BEFORE as usize] =
    [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 1, 0x88, 0xb5, 0, 0, 0, 0, 0, 0];

pub struct Network {
    device: u64,
    received: Queue,
    sent: Queue,
    /// How many frames were made.
    made: u64,
    /// The number of each slot's frame on the way, and how many of it have come back.
    on_the_way: [Option<u64>; SLOTS as usize],
    back: [u64; SLOTS as usize],
    is_up: bool,
}

impl Network {
    pub fn begin(device: u64, [mut received, sent]: [Queue; 2]) -> Self {
        (0..SLOTS).for_each(|slot| received.submit(slot, 0, ROOM));
        let (on_the_way, back) = ([None; SLOTS as usize], [0; SLOTS as usize]);
        Self { device, received, sent, made: 0, on_the_way, back, is_up: false }
    }

    /// How many frames of the slowest slot were sent and have come back, or were received.
    pub fn least(&self) -> u64 {
        self.back.into_iter().min().unwrap_or(0).min(self.received.least())
    }

    pub fn look(&mut self) {
        // Before the queues: while the link is down nothing comes any more.
        let is_up = read16(self.device + CONFIGURATION + 6) & 1 == 1;
        while let Some((_, length)) = self.sent.take() {
            if length != 0 {
                wrong("the length of an answer", length);
            }
        }
        while let Some((slot, length)) = self.received.take() {
            self.hear(self.received.answer(slot), length);
            self.received.submit(slot, 0, ROOM);
        }
        if self.is_up && !is_up {
            self.lose();
        }
        self.is_up = is_up;
        for slot in 0..SLOTS {
            if self.on_the_way[slot as usize].is_none() && self.sent.is_free(slot) {
                self.send(slot);
            }
        }
    }

    /// Takes a packet.
    fn hear(&mut self, packet: u64, length: u64) {
        let frame = packet + HEADER;
        if read16(frame + 12) != u16::from_le_bytes([BEGINNING[12], BEGINNING[13]]) {
            // The host's kernel has something to say.
            return;
        }
        if length != HEADER + BEFORE + TEXT {
            wrong("a frame of the length", length);
        }
        let first = read64(frame + BEFORE);
        check_text(frame + BEFORE, first, 0, TEXT);
        match self.on_the_way.iter().position(|number| *number == Some(first >> NUMBER_SHIFT)) {
            Some(slot) => {
                self.on_the_way[slot] = None;
                self.back[slot] += 1;
            }
            None => wrong("a frame that nobody waits for", first >> NUMBER_SHIFT),
        }
    }

    /// The link is down. What has left does not come back; what has not will leave when it is up again.
    fn lose(&mut self) {
        for slot in 0..SLOTS {
            if self.sent.is_free(slot) {
                self.on_the_way[slot as usize] = None;
            }
        }
        say(format_args!("link lost"));
    }

    fn send(&mut self, slot: u64) {
        let (packet, number) = (self.sent.request(slot), self.made);
        write_words(packet, &[0, 0]);
        let frame = packet + HEADER;
        (frame..).zip(BEGINNING).for_each(|(at, byte)| write8(at, byte));
        write_text(frame + BEFORE, number << NUMBER_SHIFT, 0, TEXT);
        self.made += 1;
        self.on_the_way[slot as usize] = Some(number);
        self.sent.submit(slot, HEADER + BEFORE + TEXT, 0);
    }
}
