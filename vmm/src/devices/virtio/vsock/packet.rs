//! Packets in descriptor chains (virtio 1.2, 5.10.6).
//!
//! A packet is a header of 44 bytes and, for `RW`, a payload. How a driver spreads the two over descriptors is its
//! own affair (virtio 1.2, 2.7.4): Linux uses one descriptor for a receive buffer, two for a packet it sends, and up
//! to eighteen for one whose payload lies in page fragments (`virtio_transport_send_skb`). The packet type of the
//! `virtio-vsock` crate allows at most two, so a packet is taken from a [`Chain`] here.

use std::io::{self, ErrorKind};
use std::os::unix::net::UnixStream;

use vm_memory::{ReadVolatile, VolatileMemoryError, WriteVolatile};

use crate::devices::virtio::chain::{Buffers, Chain};

/// The size of a packet's header in bytes.
pub const HEADER_SIZE: usize = 44;

/// The largest payload of a packet in bytes, as in Linux (`VIRTIO_VSOCK_MAX_PKT_BUF_SIZE`).
pub const MAX_PAYLOAD: usize = 64 * 1024;

/// The host's context id (virtio 1.2, 5.10.4).
pub const HOST_CID: u64 = 2;

/// A connection of an ordered stream of bytes, `VIRTIO_VSOCK_TYPE_STREAM`.
pub const TYPE_STREAM: u16 = 1;

/// `VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE`: the sender will read no more.
pub const SHUTDOWN_RECEIVE: u32 = 1;

/// `VIRTIO_VSOCK_SHUTDOWN_F_SEND`: the sender will send no more.
pub const SHUTDOWN_SEND: u32 = 2;

/// What a packet is for (virtio 1.2, 5.10.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Op {
    /// Asks for a connection.
    Request = 1,
    /// Grants a connection.
    Response = 2,
    /// Refuses or ends a connection.
    Reset = 3,
    /// Ends one or both directions of a connection.
    Shutdown = 4,
    /// Carries payload.
    Rw = 5,
    /// Tells the sender's buffer space.
    CreditUpdate = 6,
    /// Asks for the receiver's buffer space.
    CreditRequest = 7,
}

impl Op {
    /// The operation with this number, if there is one.
    pub fn from_raw(raw: u16) -> Option<Self> {
        Some(match raw {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Rw,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// `struct virtio_vsock_hdr`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// The sender's context id.
    pub src_cid: u64,
    /// The receiver's context id.
    pub dst_cid: u64,
    /// The sender's port.
    pub src_port: u32,
    /// The receiver's port.
    pub dst_port: u32,
    /// The payload in bytes.
    pub len: u32,
    /// The kind of socket; only [`TYPE_STREAM`] is served.
    pub kind: u16,
    /// See [`Op`].
    pub op: u16,
    /// See [`SHUTDOWN_RECEIVE`] and [`SHUTDOWN_SEND`].
    pub flags: u32,
    /// The sender's receive buffer in bytes.
    pub buf_alloc: u32,
    /// How many bytes the sender has taken out of its receive buffer, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads the header's little-endian form.
    pub fn from_bytes(bytes: &[u8; HEADER_SIZE]) -> Self {
        fn field<const N: usize>(bytes: &[u8; HEADER_SIZE], offset: usize) -> [u8; N] {
            std::array::from_fn(|i| bytes[offset + i])
        }
        Self {
            src_cid: u64::from_le_bytes(field(bytes, 0)),
            dst_cid: u64::from_le_bytes(field(bytes, 8)),
            src_port: u32::from_le_bytes(field(bytes, 16)),
            dst_port: u32::from_le_bytes(field(bytes, 20)),
            len: u32::from_le_bytes(field(bytes, 24)),
            kind: u16::from_le_bytes(field(bytes, 28)),
            op: u16::from_le_bytes(field(bytes, 30)),
            flags: u32::from_le_bytes(field(bytes, 32)),
            buf_alloc: u32::from_le_bytes(field(bytes, 36)),
            fwd_cnt: u32::from_le_bytes(field(bytes, 40)),
        }
    }

    /// The header's little-endian form.
    pub fn to_bytes(self) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// The answer that refuses this packet (virtio 1.2, 5.10.6.4).
    pub fn refusal(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: Op::Reset as u16,
            ..Self::default()
        }
    }
}

/// A chain that holds no packet: it is too short or too long, or runs the wrong way.
#[derive(Debug)]
pub struct Malformed {
    /// The packet's header where that much could be read, so that its connection can be ended.
    pub header: Option<Header>,
}

/// A packet that the guest sends.
pub struct TxPacket<'a> {
    /// Read once; the guest cannot change it any more.
    pub header: Header,
    /// `header.len` bytes for `RW`, nothing for all others.
    pub payload: Buffers<'a>,
}

impl<'a> TxPacket<'a> {
    /// Finds the packet in a chain.
    ///
    /// # Errors
    /// It holds none.
    pub fn parse(mut chain: Chain<'a>) -> Result<Self, Malformed> {
        let head = chain.readable.split_front(HEADER_SIZE);
        let Some(head) = head.filter(|_| chain.writable.is_empty()) else {
            return Err(Malformed { header: None });
        };
        let mut bytes = [0; HEADER_SIZE];
        head.copy_to(&mut bytes);
        let header = Header::from_bytes(&bytes);
        let len = match Op::from_raw(header.op) {
            Some(Op::Rw) => header.len as usize,
            _ => 0,
        };
        let payload = match len {
            0..=MAX_PAYLOAD => chain.readable.split_front(len),
            _ => None,
        };
        match payload {
            Some(payload) => Ok(Self { header, payload }),
            None => Err(Malformed { header: Some(header) }),
        }
    }
}

/// A buffer that the guest provides for a packet.
pub struct RxBuffer<'a> {
    header: Buffers<'a>,
    payload: Buffers<'a>,
}

impl<'a> RxBuffer<'a> {
    /// Finds the buffer in a chain; none if it cannot take a packet with some payload.
    pub fn new(mut chain: Chain<'a>) -> Option<Self> {
        let header = chain.writable.split_front(HEADER_SIZE)?;
        let payload = chain.writable;
        (chain.readable.is_empty() && !payload.is_empty()).then_some(Self { header, payload })
    }

    /// Reads at most `limit` bytes of payload straight from `stream`. 0 is the stream's end.
    /// Also tells how many bytes were asked for: with less, the stream holds no more now.
    ///
    /// # Errors
    /// Nothing could be read.
    pub fn read_from(&self, mut stream: &UnixStream, limit: usize) -> io::Result<(usize, usize)> {
        let (mut read, mut asked) = (0, 0);
        for segment in self.payload.slices() {
            let want = segment.len().min(limit - asked);
            if want == 0 || read < asked {
                break;
            }
            let mut part = segment.subslice(0, want).map_err(io::Error::other)?;
            asked += want;
            match retry(|| stream.read_volatile(&mut part)) {
                Ok(count) => read += count,
                Err(_) if read > 0 => break,
                Err(error) => return Err(error),
            }
        }
        Ok((read, asked))
    }

    /// Puts the header in front. Returns how many bytes the buffer holds now.
    pub fn finish(self, header: Header) -> u32 {
        self.header.copy_from(&header.to_bytes());
        HEADER_SIZE as u32 + header.len
    }
}

/// Writes as much of `payload` straight to `stream` as it takes now. Returns how many bytes that was.
///
/// # Errors
/// The other end reads no more.
pub fn write_to(mut stream: &UnixStream, payload: &Buffers<'_>) -> io::Result<usize> {
    let mut written = 0;
    for segment in payload.slices() {
        match retry(|| stream.write_volatile(segment)) {
            Ok(count) => {
                written += count;
                if count < segment.len() {
                    break;
                }
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => return Err(error),
        }
    }
    Ok(written)
}

/// Repeats a call that a signal interrupted.
fn retry(mut call: impl FnMut() -> Result<usize, VolatileMemoryError>) -> io::Result<usize> {
    loop {
        match call() {
            Ok(count) => return Ok(count),
            Err(VolatileMemoryError::IOError(error)) if error.kind() == ErrorKind::Interrupted => {}
            Err(VolatileMemoryError::IOError(error)) => return Err(error),
            Err(error) => return Err(io::Error::other(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_header_lies_as_the_specification_says() {
        let header = Header {
            src_cid: 0x0102_0304_0506_0708,
            dst_cid: 0x1112_1314_1516_1718,
            src_port: 0x2122_2324,
            dst_port: 0x3132_3334,
            len: 0x4142_4344,
            kind: 0x5152,
            op: 0x6162,
            flags: 0x7172_7374,
            buf_alloc: 0x8182_8384,
            fwd_cnt: 0x9192_9394,
        };
        let bytes = [
            8, 7, 6, 5, 4, 3, 2, 1, 0x18, 0x17, 0x16, 0x15, 0x14, 0x13, 0x12, 0x11, 0x24, 0x23, 0x22, 0x21,
            0x34, 0x33, 0x32, 0x31, 0x44, 0x43, 0x42, 0x41, 0x52, 0x51, 0x62, 0x61, 0x74, 0x73, 0x72, 0x71,
            0x84, 0x83, 0x82, 0x81, 0x94, 0x93, 0x92, 0x91,
        ];
        assert_eq!(header.to_bytes(), bytes);
    }

    #[test]
    fn operations_have_their_numbers() {
        let known: Vec<_> = (0..=u16::MAX).filter_map(Op::from_raw).map(|op| op as u16).collect();
        assert_eq!(known, [1, 2, 3, 4, 5, 6, 7]);
    }

    proptest! {
        #[test]
        fn headers_are_read_as_they_are_written(bytes: [[u8; 4]; 11]) {
            let bytes: [u8; HEADER_SIZE] = bytes.concat().try_into().unwrap();
            prop_assert_eq!(Header::from_bytes(&bytes).to_bytes(), bytes);
        }
    }
}
