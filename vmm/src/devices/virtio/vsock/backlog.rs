//! Bytes from the guest that its host stream did not take yet.

use std::io::{self, ErrorKind, Write};
use std::os::unix::net::UnixStream;

use vm_memory::WriteVolatile;

use crate::devices::virtio::chain::Buffers;

/// A queue of bytes. Its owner bounds it by the credit that it grants. Empty, it holds no memory.
#[derive(Debug, Default)]
pub struct Backlog {
    bytes: Vec<u8>,
    /// How many of `bytes` are written already.
    written: usize,
}

impl Backlog {
    /// How many bytes wait.
    pub fn len(&self) -> usize {
        self.bytes.len() - self.written
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Appends `payload`.
    ///
    /// # Errors
    /// Guest memory cannot be read.
    pub fn append(&mut self, payload: &Buffers<'_>) -> io::Result<()> {
        // Moves what waits to the front once it is the smaller part, so that each byte moves at most once for each
        // byte written and the memory stays below twice what waits.
        if self.written > self.len() {
            self.bytes.drain(..self.written);
            self.written = 0;
        }
        for segment in payload.slices() {
            self.bytes.write_all_volatile(segment).map_err(io::Error::other)?;
        }
        Ok(())
    }

    /// Writes as much to `stream` as it takes now. Returns how many bytes that was.
    ///
    /// # Errors
    /// The other end reads no more.
    pub fn write_to(&mut self, mut stream: &UnixStream) -> io::Result<usize> {
        let before = self.written;
        while !self.is_empty() {
            match stream.write(&self.bytes[self.written..]) {
                Ok(0) => break,
                Ok(count) => self.written += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        let count = self.written - before;
        if self.is_empty() {
            *self = Self::default();
        }
        Ok(count)
    }

    /// Drops what waits.
    pub fn discard(&mut self) {
        *self = Self::default();
    }
}
