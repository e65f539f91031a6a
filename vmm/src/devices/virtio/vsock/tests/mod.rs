//! The device behind its real transport, with a guest that speaks vsock byte by byte.

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, TryRecvError, channel};

use super::packet::{HEADER_SIZE, Header, Op, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM};
use super::{Vsock, VsockHandle};
use crate::devices::virtio::testing::{Descriptor, Driver, RUNNING};

mod connect;
mod data;
mod hostile;
mod lifecycle;

const RX: usize = 0;
const TX: usize = 1;

const GUEST: u64 = 3;
const HOST: u64 = 2;

/// The one port that the guest may connect to.
const ALLOWED: u32 = 700;

/// The guest's own receive buffer for a connection.
const GUEST_BUFFER: u32 = 1 << 20;

/// A packet that the guest got.
#[derive(Clone, Debug)]
struct Packet {
    header: Header,
    payload: Vec<u8>,
}

impl Packet {
    fn is(&self, op: Op) -> bool {
        self.header.op == op as u16
    }
}

/// Both ends of a connection as the tests see them.
struct Pair {
    host: UnixStream,
    host_port: u32,
    guest_port: u32,
}

struct Guest {
    driver: Driver,
    handle: VsockHandle,
    accepted: Receiver<(u32, UnixStream)>,
    /// The receive buffers in the queue, by head.
    buffers: HashMap<u32, Vec<Descriptor>>,
    /// Puts a receive buffer back after use.
    refill: bool,
    transmit: u64,
    next_port: u32,
}

impl Guest {
    /// A guest with all receive buffers, each as large as Linux's.
    fn new() -> Self {
        let mut guest = Self::without_buffers();
        guest.provide(128, &[4096]);
        guest
    }

    fn without_buffers() -> Self {
        Self::with_features(0)
    }

    fn with_features(features: u64) -> Self {
        let mut guest = Self::switched_off();
        guest.driver.start(features);
        guest
    }

    /// A guest whose driver has not started.
    fn switched_off() -> Self {
        let (device, handle, accepted) = device();
        let mut driver = Driver::new(device);
        let transmit = driver.alloc(2 * 65536);
        Self { driver, handle, accepted, buffers: HashMap::new(), refill: true, transmit, next_port: 5000 }
    }

    /// Adds `count` receive buffers, each of descriptors of these lengths.
    fn provide(&mut self, count: usize, lengths: &[usize]) {
        for _ in 0..count {
            let chain: Vec<_> = lengths
                .iter()
                .map(|&length| Descriptor::writable(self.driver.alloc(length), length as u32))
                .collect();
            self.add_buffer(chain);
        }
        self.driver.kick(RX as u16);
    }

    fn add_buffer(&mut self, chain: Vec<Descriptor>) {
        let head = self.driver.queues[RX].add(&chain);
        self.buffers.insert(u32::from(head), chain);
    }

    /// Sends a packet and has the device take it.
    fn send(&mut self, header: Header, payload: &[u8]) {
        self.driver.write(self.transmit, &header.to_bytes());
        self.driver.write(self.transmit + 64, payload);
        let mut chain = vec![Descriptor::readable(self.transmit, HEADER_SIZE as u32)];
        if !payload.is_empty() {
            chain.push(Descriptor::readable(self.transmit + 64, payload.len() as u32));
        }
        self.send_chain(&chain);
    }

    fn send_chain(&mut self, chain: &[Descriptor]) {
        self.driver.queues[TX].add(chain);
        let used = self.driver.exchange(TX as u16, 1);
        assert_eq!(used.len(), 1);
        assert_eq!(used[0].length, 0);
    }

    /// Runs the device until it has nothing more to do. Returns what it sent.
    fn receive(&mut self) -> Vec<Packet> {
        let mut packets = Vec::new();
        loop {
            self.driver.run();
            let used = self.driver.queues[RX].used();
            if used.is_empty() {
                return packets;
            }
            for used in used {
                let chain = self.buffers.remove(&used.head).unwrap();
                packets.extend(self.read_packet(&chain, used.length as usize));
                if self.refill {
                    self.add_buffer(chain);
                }
            }
            if self.refill {
                self.driver.kick(RX as u16);
            }
        }
    }

    fn read_packet(&self, chain: &[Descriptor], length: usize) -> Option<Packet> {
        if length == 0 {
            return None;
        }
        let mut bytes = Vec::new();
        for descriptor in chain {
            bytes.extend(self.driver.read(descriptor.address, descriptor.length as usize));
        }
        bytes.truncate(length);
        let header = Header::from_bytes(bytes[..HEADER_SIZE].try_into().unwrap());
        assert_eq!(length, HEADER_SIZE + header.len as usize);
        Some(Packet { header, payload: bytes.split_off(HEADER_SIZE) })
    }

    /// What the device sends, which is one packet.
    fn receive_one(&mut self) -> Packet {
        let packets = self.receive();
        assert_eq!(packets.len(), 1, "{packets:?}");
        packets[0].clone()
    }

    /// The host connects to `guest_port`, and the guest grants it.
    fn host_connects(&mut self, guest_port: u32) -> Pair {
        let (host, result) = self.request(guest_port);
        // The end of a stream that a test has dropped may come now: a process that another test forks holds it for a moment.
        let mut packets = self.receive();
        packets.retain(|packet| !packet.is(Op::Reset) || packet.header.dst_port == guest_port);
        let [request] = &packets[..] else { panic!("{packets:?}") };
        assert!(request.is(Op::Request));
        let pair = Pair { host, host_port: request.header.src_port, guest_port };
        self.send(pair.header(Op::Response), &[]);
        assert_eq!(result.try_recv(), Ok(Ok(())));
        pair
    }

    /// The host asks for a connection.
    fn request(&mut self, guest_port: u32) -> (UnixStream, Receiver<Result<(), String>>) {
        let (host, device) = UnixStream::pair().unwrap();
        host.set_nonblocking(true).unwrap();
        let (sender, result) = channel();
        let on_result = move |result| {
            // Some tests do not ask.
            let _ = sender.send(result);
        };
        self.handle.connect(device.into(), guest_port, Box::new(on_result));
        (host, result)
    }

    /// The guest connects to the allowed port, and the host grants it.
    fn guest_connects(&mut self) -> Pair {
        self.guest_connects_with(GUEST_BUFFER)
    }

    fn guest_connects_with(&mut self, buf_alloc: u32) -> Pair {
        let guest_port = self.next_port;
        self.next_port += 1;
        let mut request = header(Op::Request, guest_port, ALLOWED);
        request.buf_alloc = buf_alloc;
        self.send(request, &[]);
        let response = self.receive_one();
        assert!(response.is(Op::Response), "{response:?}");
        let (port, host) = self.accepted.try_recv().unwrap();
        assert_eq!(port, ALLOWED);
        Pair { host, host_port: ALLOWED, guest_port }
    }

    fn errors(&self) -> u64 {
        self.driver.transport.health().errors()
    }

    fn is_running(&mut self) -> bool {
        self.driver.status() == RUNNING
    }
}

impl Pair {
    /// A packet of the guest with plenty of credit.
    fn header(&self, op: Op) -> Header {
        header(op, self.guest_port, self.host_port)
    }

    fn data(&self, len: usize) -> Header {
        Header { len: len as u32, ..self.header(Op::Rw) }
    }

    fn shutdown(&self, flags: u32) -> Header {
        Header { flags, ..self.header(Op::Shutdown) }
    }

    /// What the host can read now.
    fn read(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let result = self.host.read_to_end(&mut bytes);
        assert!(result.is_ok() || result.is_err_and(|e| e.kind() == ErrorKind::WouldBlock));
        bytes
    }

    /// Whether the host has read everything and knows that no more comes.
    fn is_at_end(&mut self) -> bool {
        matches!(self.host.read(&mut [0]), Ok(0))
    }

    /// Whether what the host writes is refused.
    fn is_write_refused(&mut self) -> bool {
        matches!(self.host.write(&[0]), Err(e) if e.kind() == ErrorKind::BrokenPipe)
    }
}

fn device() -> (Box<Vsock>, VsockHandle, Receiver<(u32, UnixStream)>) {
    let (sender, accepted) = channel();
    let on_accept = move |port, stream: std::os::fd::OwnedFd| {
        // A test that is over wants no more streams.
        let _ = sender.send((port, UnixStream::from(stream)));
    };
    let (device, handle) = Vsock::new(GUEST as u32, vec![ALLOWED], Box::new(on_accept)).unwrap();
    (Box::new(device), handle, accepted)
}

/// A packet from the guest with plenty of credit and no payload.
fn header(op: Op, guest_port: u32, host_port: u32) -> Header {
    Header {
        src_cid: GUEST,
        dst_cid: HOST,
        src_port: guest_port,
        dst_port: host_port,
        kind: TYPE_STREAM,
        op: op as u16,
        buf_alloc: GUEST_BUFFER,
        ..Header::default()
    }
}

/// Bytes in which every misplaced piece shows: 32-bit numbers that count up, seen as bytes.
fn pattern(len: usize) -> Vec<u8> {
    (0u32..).flat_map(u32::to_le_bytes).take(len).collect()
}
