//! Flow control (virtio 1.2, 5.10.6.3): each side grants the other the right to send as much as its buffer holds.
//!
//! All counters are numbers of bytes modulo 2^32, and only their differences mean anything. A difference is what is
//! in flight or buffered; it never exceeds a buffer's size and so never wraps itself.

use std::num::Wrapping;

/// What this side grants the guest.
#[derive(Clone, Debug)]
pub struct Granted {
    buf_alloc: u32,
    /// Bytes that the guest sent.
    received: Wrapping<u32>,
    /// Bytes of them that left the buffer.
    forwarded: Wrapping<u32>,
    /// The guest's latest knowledge of `forwarded`; none before the first packet to it, when it may send nothing.
    advertised: Option<Wrapping<u32>>,
}

/// The guest sent more than it was granted.
#[derive(Debug, PartialEq, Eq)]
pub struct Overrun;

impl Granted {
    /// A buffer of `buf_alloc` bytes, of which the guest does not know yet.
    pub fn new(buf_alloc: u32) -> Self {
        Self { buf_alloc, received: Wrapping(0), forwarded: Wrapping(0), advertised: None }
    }

    /// The buffer's size in bytes.
    pub fn buf_alloc(&self) -> u32 {
        self.buf_alloc
    }

    /// The guest sent `len` bytes.
    ///
    /// # Errors
    /// It had no right to.
    pub fn receive(&mut self, len: u32) -> Result<(), Overrun> {
        if len > self.known_space() {
            return Err(Overrun);
        }
        self.received += Wrapping(len);
        Ok(())
    }

    /// `len` bytes have left the buffer.
    pub fn forward(&mut self, len: u32) {
        self.forwarded += Wrapping(len);
    }

    /// The buffer has been emptied.
    pub fn forward_all(&mut self) {
        self.forwarded = self.received;
    }

    /// `buf_alloc` and `fwd_cnt` for a packet that is now sent to the guest.
    pub fn advertise(&mut self) -> (u32, u32) {
        self.advertised = Some(self.forwarded);
        (self.buf_alloc, self.forwarded.0)
    }

    /// Whether the guest should be told of the space that it does not know of. Not for every few bytes; yet when the
    /// buffer is empty and nothing is due, the guest knows of three quarters of it, so it never waits in vain.
    pub fn update_due(&self) -> bool {
        self.advertised.is_some_and(|advertised| (self.forwarded - advertised).0 > self.buf_alloc / 4)
    }

    /// How much the guest may send, as far as it knows.
    fn known_space(&self) -> u32 {
        self.advertised.map_or(0, |advertised| self.buf_alloc - (self.received - advertised).0)
    }
}

/// What the guest grants this side.
#[derive(Clone, Debug, Default)]
pub struct Peer {
    buf_alloc: u32,
    fwd_cnt: Wrapping<u32>,
    sent: Wrapping<u32>,
}

impl Peer {
    /// The guest's `buf_alloc` and `fwd_cnt`, which every packet of it carries. Packets that two of its threads send
    /// can overtake each other, so a count that is older than the known one says nothing; nor does one that is ahead
    /// of what was sent.
    pub fn update(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.buf_alloc = buf_alloc;
        let fwd_cnt = Wrapping(fwd_cnt);
        if self.sent - fwd_cnt <= self.in_flight() {
            self.fwd_cnt = fwd_cnt;
        }
    }

    /// How many bytes may be sent. The guest can shrink its buffer below what is in flight.
    pub fn space(&self) -> u32 {
        self.buf_alloc.saturating_sub(self.in_flight().0)
    }

    /// `len` bytes, at most [`space`](Self::space), were sent.
    pub fn send(&mut self, len: u32) {
        self.sent += Wrapping(len);
    }

    fn in_flight(&self) -> Wrapping<u32> {
        self.sent - self.fwd_cnt
    }
}
