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

#[cfg(test)]
mod tests {
    use std::io::Read;

    use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

    use super::*;
    use crate::devices::virtio::chain::Chain;
    use crate::devices::virtio::testing::{Descriptor, DriverQueue, guest_memory};
    use virtio_queue::{Queue, QueueOwnedT, QueueT};

    /// Appends `bytes` from guest memory.
    fn append(backlog: &mut Backlog, bytes: &[u8]) {
        let memory = guest_memory();
        let mut driver = DriverQueue::new(&memory, 0, 8);
        let memory = memory.memory();
        memory.write_slice(bytes, GuestAddress(1 << 20)).unwrap();
        driver.add(&[Descriptor::readable(1 << 20, bytes.len() as u32)]);
        let mut queue = Queue::new(8).unwrap();
        queue.set_desc_table_address(Some(driver.descriptor_table as u32), Some(0));
        queue.set_avail_ring_address(Some(driver.avail_ring as u32), Some(0));
        queue.set_used_ring_address(Some(driver.used_ring as u32), Some(0));
        queue.set_ready(true);
        let descriptors = queue.iter(&*memory).unwrap().next().unwrap();
        let chain = Chain::walk(&memory, descriptors, 8).unwrap();
        backlog.append(&chain.readable).unwrap();
    }

    #[test]
    fn bytes_come_out_in_order_and_leave_no_memory_behind() {
        let (mut host, device) = UnixStream::pair().unwrap();
        device.set_nonblocking(true).unwrap();
        let mut backlog = Backlog::default();
        // More than the stream takes, so that something waits from now on.
        let mut expected = vec![0xff; 500_000];
        append(&mut backlog, &expected);
        let mut got = Vec::new();
        for round in 0..20u8 {
            let bytes = vec![round; 60_000];
            append(&mut backlog, &bytes);
            expected.extend_from_slice(&bytes);
            backlog.write_to(&device).unwrap();
            let mut buffer = vec![0; 60_000];
            host.read_exact(&mut buffer).unwrap();
            got.extend_from_slice(&buffer);
            assert!(!backlog.is_empty());
            assert!(backlog.bytes.len() <= 2 * backlog.len() + 120_000, "written bytes pile up");
        }
        while !backlog.is_empty() {
            backlog.write_to(&device).unwrap();
            let mut buffer = vec![0; 1 << 20];
            let count = host.read(&mut buffer).unwrap();
            got.extend_from_slice(&buffer[..count]);
        }
        drop(device);
        host.read_to_end(&mut got).unwrap();
        assert!(got == expected);
        assert_eq!(backlog.bytes.capacity(), 0);
    }

    #[test]
    fn a_host_that_is_gone_is_an_error() {
        let (host, device) = UnixStream::pair().unwrap();
        let mut backlog = Backlog::default();
        append(&mut backlog, b"nobody");
        drop(host);
        assert_eq!(backlog.write_to(&device).unwrap_err().kind(), ErrorKind::BrokenPipe);
        backlog.discard();
        assert!(backlog.is_empty());
    }
}
