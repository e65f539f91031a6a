//! The TAP as the thread sees it: ready to be read, ready to be written, or cut; and how much may go through it.

use std::io;

use fuse_backend_rs::file_buf::FileVolatileSlice;
use vmm_sys_util::epoll::EventSet;

use super::tap::{self, Tap};
use super::{HEADER_SIZE, MAX_PACKET};
use crate::devices::virtio::rate_limiter::RateLimiter;

/// What became of an attempt to send or to receive a packet.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Carried {
    /// So many bytes, with the header.
    Packet(usize),
    /// Nothing; the TAP or a limit's timer says when it is worth another try.
    Later,
    /// The kernel refused the packet for what is in it.
    Refused,
    /// The packet is lost: the interface is down or gone, or the host lacks memory.
    Lost,
}

/// How many packets, and bytes without their headers, may go each way.
#[derive(Clone, Default)]
pub(super) struct Limiters {
    pub receive: RateLimiter,
    pub transmit: RateLimiter,
}

/// The TAP, and what is known of it.
pub(super) struct Wire {
    tap: Tap,
    limiters: Limiters,
    readable: bool,
    writable: bool,
    /// The interface was deleted: nothing comes in any more, and what goes out is lost.
    cut: bool,
    /// Why, until it has been told.
    reason: Option<io::Error>,
}

impl Wire {
    pub(super) fn new(tap: Tap, limiters: Limiters) -> Self {
        Self { tap, limiters, readable: true, writable: true, cut: false, reason: None }
    }

    /// Whether a packet may be there.
    pub(super) fn readable(&self) -> bool {
        self.readable && !self.cut && !self.limiters.receive.is_waiting()
    }

    /// Whether a packet may be taken, or dropped.
    pub(super) fn writable(&self) -> bool {
        self.cut || self.writable && !self.limiters.transmit.is_waiting()
    }

    /// Reads a packet into `buffers`, which have room for the longest.
    pub(super) fn receive(&mut self, buffers: &[FileVolatileSlice<'_>]) -> Carried {
        self.receive_with(|tap| tap.read(buffers))
    }

    /// The same, into memory of this process.
    pub(super) fn receive_into(&mut self, buffer: &mut [u8]) -> Carried {
        self.receive_with(|tap| tap.read_into(buffer))
    }

    /// How long a packet is shows only when it has been read. So there has to be enough for the longest.
    fn receive_with(&mut self, read: impl FnOnce(&mut Tap) -> io::Result<usize>) -> Carried {
        const LONGEST: usize = MAX_PACKET - HEADER_SIZE;
        if !self.limiters.receive.admit(LONGEST) {
            return Carried::Later;
        }
        let outcome = read(&mut self.tap);
        let carried = self.received(outcome);
        match carried {
            Carried::Packet(length) => {
                self.limiters.receive.correct(LONGEST, length.saturating_sub(HEADER_SIZE));
            }
            _ => self.limiters.receive.cancel(LONGEST),
        }
        carried
    }

    /// Sends what is in `buffers`, so many bytes with the header. A packet that is refused or lost counts as well.
    pub(super) fn send(&mut self, buffers: &[FileVolatileSlice<'_>], length: usize) -> Carried {
        if self.cut {
            return Carried::Lost;
        }
        let length = length.saturating_sub(HEADER_SIZE);
        if !self.limiters.transmit.admit(length) {
            return Carried::Later;
        }
        match self.tap.write(buffers) {
            Ok(length) => Carried::Packet(length),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.limiters.transmit.cancel(length);
                self.writable = false;
                Carried::Later
            }
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Carried::Refused,
            Err(error) => self.lost(error),
        }
    }

    fn received(&mut self, outcome: io::Result<usize>) -> Carried {
        match outcome {
            Ok(length @ HEADER_SIZE..) => Carried::Packet(length),
            // No TAP does that.
            Ok(_) => Carried::Lost,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                Carried::Later
            }
            Err(error) => self.lost(error),
        }
    }

    fn lost(&mut self, error: io::Error) -> Carried {
        if tap::is_gone(&error) {
            self.cut(error);
        }
        Carried::Lost
    }

    fn cut(&mut self, reason: io::Error) {
        if !self.cut {
            self.cut = true;
            self.reason = Some(reason);
        }
    }

    /// The TAP has said that something has changed.
    pub(super) fn stir(&mut self, change: EventSet) {
        self.readable = true;
        self.writable = true;
        if change.intersects(tap::GONE) {
            self.cut(io::Error::from_raw_os_error(libc::EBADFD));
        }
    }

    /// Why it was cut, once.
    pub(super) fn take_reason(&mut self) -> Option<io::Error> {
        self.reason.take()
    }
}
