//! A stream to a port of the host (virtio 1.2, 5.10), by which everything comes back that was sent. It is as much under way as the host
//! has room for.

use super::queue::{Queue, SLOTS};
use super::{CONFIGURATION, check_text, say, write_text, wrong};
use crate::{read16, read32, read64, write_words, write32};

/// The host, and its port.
const HOST: u64 = 2;
const HOST_PORT: u64 = 1024;

/// What a packet is for (virtio 1.2, 5.10.6).
const REQUEST: u64 = 1;
const RESPONSE: u64 = 2;
const RESET: u64 = 3;
const DATA: u64 = 5;
const CREDIT_UPDATE: u64 = 6;
const CREDIT_REQUEST: u64 = 7;

/// A packet's header, and the room for a packet that is received: about as long as one that is sent, so that they are as many.
const HEADER: u64 = 44;
const ROOM: u64 = 512;

/// What this side says that it has room for: as much as all its buffers.
const BUFFERED: u64 = SLOTS * (ROOM - HEADER);

/// The length of an event, of which there is one kind: that all connections are gone, whose id is zero.
const EVENT: u64 = 4;

/// How far a connection has come.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    New,
    Asked,
    Open,
    /// The host knows nothing of it. It is to say that it knows of none.
    Lost,
}

pub struct Socket {
    received: Queue,
    sent: Queue,
    events: Queue,
    /// This machine's context id.
    id: u64,
    connection: Connection,
}

struct Connection {
    stage: Stage,
    /// The port on this side. Each connection has its own.
    port: u64,
    /// Bytes that were sent, and that came back.
    there: u64,
    back: u64,
    /// What the host has room for, and how many bytes it has got rid of.
    room: u32,
    forwarded: u32,
    /// The host wants to know the same of this side.
    asks: bool,
}

impl Connection {
    fn new(port: u64) -> Self {
        Self { stage: Stage::New, port, there: 0, back: 0, room: 0, forwarded: 0, asks: false }
    }

    /// The number with which its text begins.
    fn first(&self) -> u64 {
        self.port << 32
    }

    /// How many bytes may be sent.
    fn credit(&self) -> u64 {
        let under_way = (self.there as u32).wrapping_sub(self.forwarded);
        self.room.saturating_sub(under_way).into()
    }
}

impl Socket {
    pub fn begin(device: u64, [mut received, sent, mut events]: [Queue; 3]) -> Self {
        (0..SLOTS).for_each(|slot| received.submit(slot, 0, ROOM));
        (0..SLOTS).for_each(|slot| events.submit(slot, 0, EVENT));
        Self { received, sent, events, id: read64(device + CONFIGURATION), connection: Connection::new(1) }
    }

    /// How many packets of the slowest slot were sent or received.
    pub fn least(&self) -> u64 {
        self.received.least().min(self.sent.least())
    }

    pub fn look(&mut self) {
        while let Some((slot, length)) = self.received.take() {
            self.hear(self.received.answer(slot), length);
            self.received.submit(slot, 0, ROOM);
        }
        while let Some((slot, length)) = self.events.take() {
            if length != EVENT || read32(self.events.answer(slot)) != 0 {
                wrong("an event of the socket device", length);
            }
            self.lose();
            self.connection = Connection::new(self.connection.port + 1);
            // No event is like this one.
            write32(self.events.answer(slot), u32::MAX);
            self.events.submit(slot, 0, EVENT);
        }
        while let Some((_, length)) = self.sent.take() {
            if length != 0 {
                wrong("the length of an answer", length);
            }
        }
        for slot in 0..SLOTS {
            if self.sent.is_free(slot) {
                self.speak(slot);
            }
        }
    }

    /// Takes a packet.
    fn hear(&mut self, packet: u64, length: u64) {
        let (connection, payload) = (&mut self.connection, u64::from(read32(packet + 24)));
        if length != HEADER + payload || read64(packet) != HOST || read64(packet + 8) != self.id {
            wrong("a packet of the length", length);
        }
        let ports = [read32(packet + 16), read32(packet + 20)].map(u64::from);
        if ports != [HOST_PORT, connection.port] || connection.stage == Stage::Lost {
            // Of a connection that is no more.
            return;
        }
        (connection.room, connection.forwarded) = (read32(packet + 36), read32(packet + 40));
        match (u64::from(read16(packet + 30)), connection.stage) {
            (RESPONSE, Stage::Asked) => connection.stage = Stage::Open,
            (DATA, Stage::Open) => {
                if connection.back + payload > connection.there {
                    wrong("more came back than was sent", payload);
                }
                check_text(packet + HEADER, connection.first(), connection.back, payload);
                connection.back += payload;
            }
            (CREDIT_UPDATE, Stage::Open) => {}
            (CREDIT_REQUEST, Stage::Open) => connection.asks = true,
            (RESET, Stage::Asked | Stage::Open) => self.lose(),
            (operation, _) => wrong("a packet for", operation),
        }
    }

    /// The connection is gone.
    fn lose(&mut self) {
        if self.connection.stage != Stage::Lost {
            self.connection.stage = Stage::Lost;
            say(format_args!("connection lost"));
        }
    }

    /// Sends what there is to be sent.
    fn speak(&mut self, slot: u64) {
        let connection = &mut self.connection;
        let (credit, turn) = (connection.credit(), self.sent.answered(slot) * SLOTS + slot);
        match connection.stage {
            Stage::New => {
                connection.stage = Stage::Asked;
                self.send(slot, REQUEST, 0);
            }
            Stage::Open if connection.asks => {
                connection.asks = false;
                self.send(slot, CREDIT_UPDATE, 0);
            }
            // Also no whole words.
            Stage::Open if credit > 0 => self.send(slot, DATA, credit.min(1 + turn * 777 % 1024)),
            _ => {}
        }
    }

    fn send(&mut self, slot: u64, operation: u64, length: u64) {
        let (connection, packet) = (&mut self.connection, self.sent.request(slot));
        let ports = connection.port | HOST_PORT << 32;
        // A stream is of kind 1.
        let what = length | 1 << 32 | operation << 48;
        write_words(packet, &[self.id, HOST, ports, what, BUFFERED << 32]);
        write32(packet + 40, connection.back as u32);
        write_text(packet + HEADER, connection.first(), connection.there, length);
        connection.there += length;
        self.sent.submit(slot, HEADER + length, 0);
    }
}
