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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Both sides of a grant with counters that never wrap.
    #[derive(Default)]
    struct Model {
        received: u64,
        forwarded: u64,
        advertised: Option<u64>,
    }

    impl Model {
        fn known_space(&self, buf_alloc: u32) -> u64 {
            self.advertised.map_or(0, |advertised| u64::from(buf_alloc) - (self.received - advertised))
        }
    }

    fn granted_at(start: u32, buf_alloc: u32) -> Granted {
        Granted { received: Wrapping(start), forwarded: Wrapping(start), ..Granted::new(buf_alloc) }
    }

    fn peer_at(start: u32) -> Peer {
        Peer { fwd_cnt: Wrapping(start), sent: Wrapping(start), ..Peer::default() }
    }

    /// Starts of counters of which some wrap soon.
    fn start() -> impl Strategy<Value = u32> {
        prop_oneof![Just(0), any::<u32>(), (u32::MAX - 100_000)..=u32::MAX]
    }

    #[test]
    fn nothing_is_granted_before_it_is_advertised() {
        let mut granted = Granted::new(1000);
        assert_eq!(granted.receive(1), Err(Overrun));
        assert!(!granted.update_due());

        assert_eq!(granted.advertise(), (1000, 0));
        assert_eq!(granted.receive(1000), Ok(()));
        assert_eq!(granted.receive(1), Err(Overrun));
    }

    #[test]
    fn what_is_forwarded_counts_once_it_is_advertised() {
        let mut granted = Granted::new(1000);
        granted.advertise();
        granted.receive(1000).unwrap();
        granted.forward(300);
        assert_eq!(granted.receive(1), Err(Overrun));
        assert!(granted.update_due());

        assert_eq!(granted.advertise(), (1000, 300));
        assert!(!granted.update_due());
        assert_eq!(granted.receive(300), Ok(()));
        assert_eq!(granted.receive(1), Err(Overrun));
    }

    #[test]
    fn a_peer_that_shrinks_its_buffer_grants_nothing() {
        let mut peer = Peer::default();
        peer.update(1000, 0);
        peer.send(600);
        peer.update(500, 0);
        assert_eq!(peer.space(), 0);
        peer.update(500, 200);
        assert_eq!(peer.space(), 100);
    }

    #[test]
    fn a_peer_that_is_overtaken_by_itself_loses_nothing() {
        let mut peer = Peer::default();
        peer.update(1000, 0);
        peer.send(1000);
        peer.update(1000, 800);
        peer.update(1000, 500);
        assert_eq!(peer.space(), 800);
    }

    proptest! {
        /// A guest within its credit is never refused, one beyond it always, and an empty buffer is never kept from
        /// a guest that waits for it.
        #[test]
        fn grants_as_unbounded_counters_would(
            start in start(),
            buf_alloc in prop_oneof![1u32..100_000, any::<u32>()],
            steps in prop::collection::vec((0u8..4, any::<u32>()), 1..200),
        ) {
            let mut granted = granted_at(start, buf_alloc);
            let mut model = Model::default();
            for (step, amount) in steps {
                // Mostly near what is possible.
                let amount = if amount % 2 == 0 { amount } else { amount % buf_alloc.saturating_add(2).max(1) };
                match step {
                    0 => {
                        let allowed = u64::from(amount) <= model.known_space(buf_alloc);
                        prop_assert_eq!(granted.receive(amount).is_ok(), allowed);
                        if allowed {
                            model.received += u64::from(amount);
                        }
                    }
                    1 => {
                        let amount = u64::from(amount).min(model.received - model.forwarded);
                        granted.forward(amount as u32);
                        model.forwarded += amount;
                    }
                    2 => {
                        granted.forward_all();
                        model.forwarded = model.received;
                    }
                    _ => {
                        let (_, fwd_cnt) = granted.advertise();
                        prop_assert_eq!(fwd_cnt, (u64::from(start) + model.forwarded) as u32);
                        model.advertised = Some(model.forwarded);
                    }
                }
                let buffered = model.received - model.forwarded;
                prop_assert!(buffered <= u64::from(buf_alloc));
                if buffered == 0 && model.advertised.is_some() && !granted.update_due() {
                    prop_assert!(model.known_space(buf_alloc) >= u64::from(buf_alloc) - u64::from(buf_alloc) / 4);
                }
            }
        }

        /// Never more is in flight than the guest has room for, whatever it claims; and what an honest guest frees
        /// can be used.
        #[test]
        fn sends_as_unbounded_counters_would(
            start in start(),
            steps in prop::collection::vec((0u8..3, any::<u32>(), 0u32..100_000), 1..200),
        ) {
            let mut peer = peer_at(start);
            let (mut sent, mut fwd_cnt) = (0u64, 0u64);
            for (step, forged, amount) in steps {
                match step {
                    0 => {
                        let len = peer.space().min(amount);
                        peer.send(len);
                        sent += u64::from(len);
                    }
                    1 => {
                        fwd_cnt = (fwd_cnt + u64::from(amount)).min(sent);
                        peer.update(amount, (u64::from(start) + fwd_cnt) as u32);
                        let free = u64::from(amount).saturating_sub(sent - fwd_cnt);
                        prop_assert_eq!(u64::from(peer.space()), free);
                    }
                    _ => {
                        let before = peer.in_flight().0;
                        peer.update(amount, forged);
                        prop_assert!(peer.in_flight().0 <= before);
                        prop_assert!(peer.space() <= amount);
                        // The truth from here on.
                        fwd_cnt = sent - u64::from(peer.in_flight().0);
                    }
                }
            }
        }
    }
}
