//! The TAP as the thread sees it: ready to be read, ready to be written, or cut.

use std::io;

use fuse_backend_rs::file_buf::FileVolatileSlice;
use vmm_sys_util::epoll::EventSet;

use super::HEADER_SIZE;
use super::tap::{self, Tap};

/// What became of an attempt to send or to receive a packet.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Carried {
    /// So many bytes, with the header.
    Packet(usize),
    /// Nothing; the TAP says when it is worth another try.
    Later,
    /// The kernel refused the packet for what is in it.
    Refused,
    /// The packet is lost: the interface is down or gone, or the host lacks memory.
    Lost,
}

/// The TAP, and what is known of it.
pub(super) struct Wire {
    tap: Tap,
    readable: bool,
    writable: bool,
    /// The interface was deleted: nothing comes in any more, and what goes out is lost.
    cut: bool,
    /// Why, until it has been told.
    reason: Option<io::Error>,
}

impl Wire {
    pub(super) fn new(tap: Tap) -> Self {
        Self { tap, readable: true, writable: true, cut: false, reason: None }
    }

    /// Whether a packet may be there.
    pub(super) fn readable(&self) -> bool {
        self.readable && !self.cut
    }

    /// Whether a packet may be taken, or dropped.
    pub(super) fn writable(&self) -> bool {
        self.writable || self.cut
    }

    /// Reads a packet into `buffers`, which have room for the longest.
    pub(super) fn receive(&mut self, buffers: &[FileVolatileSlice<'_>]) -> Carried {
        let outcome = self.tap.read(buffers);
        self.received(outcome)
    }

    /// The same, into memory of this process.
    pub(super) fn receive_into(&mut self, buffer: &mut [u8]) -> Carried {
        let outcome = self.tap.read_into(buffer);
        self.received(outcome)
    }

    /// Sends what is in `buffers`.
    pub(super) fn send(&mut self, buffers: &[FileVolatileSlice<'_>]) -> Carried {
        if self.cut {
            return Carried::Lost;
        }
        match self.tap.write(buffers) {
            Ok(length) => Carried::Packet(length),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
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
