//! One connection: a stream of the host on one side, packets from and to the guest on the other.
//!
//! Its two directions end independently of each other. Each ends either by the host, whose stream then stands at its
//! end or takes no more, or by the guest, which then sent a SHUTDOWN. A direction that has ended still delivers what
//! was sent before. The connection is over when both have ended and nothing waits.

use std::io::{self, ErrorKind};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::epoll::EventSet;

use super::OnResult;
use super::backlog::Backlog;
use super::credit::{Granted, Overrun, Peer};
use super::packet::{
    self, HOST_CID, Header, MAX_PAYLOAD, Op, RxBuffer, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM, TxPacket,
};
use crate::devices::virtio::chain::Buffers;

/// What tells one connection from another. The host's context id is always [`HOST_CID`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Address {
    /// The guest's context id.
    pub guest_cid: u64,
    /// The guest's port.
    pub guest_port: u32,
    /// The host's port.
    pub host_port: u32,
}

impl Address {
    /// A packet to the guest without payload and credit.
    pub fn header(&self, op: Op) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: self.host_port,
            dst_port: self.guest_port,
            kind: TYPE_STREAM,
            op: op as u16,
            ..Header::default()
        }
    }
}

/// The guest broke the protocol; the connection cannot go on.
#[derive(Debug)]
pub struct Violation;

/// One direction of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    Open,
    EndedByHost,
    EndedByGuest,
}

/// One connection.
pub struct Connection {
    address: Address,
    stream: UnixStream,
    /// REQUEST or RESPONSE until it is sent.
    greeting: Option<Op>,
    /// Who waits for the guest's RESPONSE.
    on_result: Option<OnResult>,
    to_guest: Direction,
    to_host: Direction,
    /// The guest has forgotten the connection and is told nothing more.
    guest_gone: bool,
    /// The flags of the last SHUTDOWN that the guest was sent.
    told: u32,
    /// The stream may hold data; while it does not, the event loop watches for some.
    readable: bool,
    /// What the stream did not take yet.
    backlog: Backlog,
    granted: Granted,
    peer: Peer,
    /// The guest asked for a CREDIT_UPDATE.
    credit_asked: bool,
    /// The guest was sent a CREDIT_REQUEST since it last granted credit.
    credit_requested: bool,
}

impl Connection {
    /// A connection that the host asks for: `on_result` is told whether the guest grants it.
    pub fn request(address: Address, stream: UnixStream, buf_alloc: u32, on_result: OnResult) -> Self {
        Self::new(address, stream, buf_alloc, Op::Request, Some(on_result))
    }

    /// A connection that the guest asked for by `request`, and is granted.
    pub fn accept(address: Address, stream: UnixStream, buf_alloc: u32, request: &Header) -> Self {
        let mut connection = Self::new(address, stream, buf_alloc, Op::Response, None);
        connection.peer.update(request.buf_alloc, request.fwd_cnt);
        connection
    }

    fn new(
        address: Address,
        stream: UnixStream,
        buf_alloc: u32,
        greeting: Op,
        on_result: Option<OnResult>,
    ) -> Self {
        Self {
            address,
            stream,
            greeting: Some(greeting),
            on_result,
            to_guest: Direction::Open,
            to_host: Direction::Open,
            guest_gone: false,
            told: 0,
            readable: false,
            backlog: Backlog::default(),
            granted: Granted::new(buf_alloc),
            peer: Peer::default(),
            credit_asked: false,
            credit_requested: false,
        }
    }

    /// Its ports.
    pub fn address(&self) -> Address {
        self.address
    }

    /// The host's stream, for the event loop.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// The most bytes that it ever buffers for the host.
    pub fn buf_alloc(&self) -> u32 {
        self.granted.buf_alloc()
    }

    /// Whether the guest has ended it and is to be told nothing more.
    pub fn is_guest_gone(&self) -> bool {
        self.guest_gone
    }

    /// Whether both directions have ended and everything is delivered.
    pub fn is_over(&self) -> bool {
        self.to_guest != Direction::Open && self.to_host != Direction::Open && self.backlog.is_empty()
    }

    /// Tells whoever waits for the guest's RESPONSE that there will be none.
    pub fn fail(&mut self, reason: &str) {
        if let Some(on_result) = self.on_result.take() {
            on_result(Err(reason.to_owned()));
        }
    }

    /// What the event loop has to watch the stream for. An empty set: only its closing. None: not at all, since the
    /// closing of a stream that cannot be read on would be reported without end.
    pub fn interest(&self) -> Option<EventSet> {
        let mut interest = EventSet::empty();
        if self.on_result.is_some() {
            return Some(interest);
        }
        if self.to_guest == Direction::Open && !self.readable {
            interest |= EventSet::IN;
        }
        if !self.backlog.is_empty() {
            interest |= EventSet::OUT;
        }
        let only_closing = self.to_host == Direction::Open && self.to_guest != Direction::Open;
        (!interest.is_empty() || only_closing).then_some(interest)
    }

    /// The event loop found the stream ready.
    pub fn on_ready(&mut self, readable: bool) {
        if self.on_result.is_some() {
            if self.is_closed_by_host() {
                self.fail("given up by the host");
                self.end_by_host();
            }
            return;
        }
        self.flush();
        if self.to_guest == Direction::Open {
            self.readable |= readable;
        } else if self.is_closed_by_host() {
            self.end_by_host();
        }
    }

    /// Takes a packet from the guest.
    ///
    /// # Errors
    /// It has no place here.
    pub fn receive(&mut self, op: Op, packet: TxPacket<'_>) -> Result<(), Violation> {
        let TxPacket { header, payload } = packet;
        self.peer.update(header.buf_alloc, header.fwd_cnt);
        if self.peer.space() > 0 {
            // Not before: a guest answers at once, and would be asked again without end.
            self.credit_requested = false;
        }
        match (op, self.on_result.is_some()) {
            (Op::Reset, _) => self.guest_reset(),
            (Op::Response, true) if self.greeting.is_none() => self.granted_by_guest(),
            (_, true) | (Op::Request | Op::Response, false) => return Err(Violation),
            (Op::Rw, false) => self.receive_data(payload)?,
            (Op::Shutdown, false) => self.guest_shutdown(header.flags),
            (Op::CreditUpdate, false) => {}
            (Op::CreditRequest, false) => self.credit_asked = true,
        }
        Ok(())
    }

    /// Whether the guest is to be sent something, or may be.
    pub fn has_output(&self) -> bool {
        if self.on_result.is_some() || self.greeting.is_some() {
            return self.greeting.is_some();
        }
        !self.guest_gone
            && (self.shutdown_flags() != self.told
                || self.can_send_data()
                || self.credit_update_due()
                || self.credit_request_due())
    }

    /// The next packet for the guest, its payload in `buffer` already; none if there is nothing to say now.
    pub fn fill(&mut self, buffer: &RxBuffer<'_>) -> Option<Header> {
        if let Some(greeting) = self.greeting.take() {
            return Some(self.header(greeting, 0, 0));
        }
        if self.on_result.is_some() || self.guest_gone {
            return None;
        }
        if self.shutdown_flags() != self.told {
            return Some(self.shutdown());
        }
        if self.can_send_data() {
            let len = self.read_data(buffer);
            if len > 0 {
                return Some(self.header(Op::Rw, len, 0));
            }
            if self.shutdown_flags() != self.told && !self.is_over() {
                return Some(self.shutdown());
            }
        }
        if self.credit_update_due() {
            return Some(self.header(Op::CreditUpdate, 0, 0));
        }
        if self.credit_request_due() {
            self.credit_requested = true;
            return Some(self.header(Op::CreditRequest, 0, 0));
        }
        None
    }

    fn shutdown(&mut self) -> Header {
        self.told = self.shutdown_flags();
        self.header(Op::Shutdown, 0, self.told)
    }

    fn header(&mut self, op: Op, len: u32, flags: u32) -> Header {
        let (buf_alloc, fwd_cnt) = self.granted.advertise();
        self.credit_asked = false;
        Header { len, flags, buf_alloc, fwd_cnt, ..self.address.header(op) }
    }

    /// What the guest has to know about the host's side.
    fn shutdown_flags(&self) -> u32 {
        let mut flags = 0;
        if self.to_guest == Direction::EndedByHost {
            flags |= SHUTDOWN_SEND;
        }
        if self.to_host == Direction::EndedByHost {
            flags |= SHUTDOWN_RECEIVE;
        }
        flags
    }

    fn can_send_data(&self) -> bool {
        self.readable && self.to_guest == Direction::Open && self.peer.space() > 0
    }

    fn credit_update_due(&self) -> bool {
        self.credit_asked || self.granted.update_due()
    }

    fn credit_request_due(&self) -> bool {
        self.readable && self.to_guest == Direction::Open && self.peer.space() == 0 && !self.credit_requested
    }

    /// Reads as much from the stream as the guest can take. Returns how many bytes that was.
    fn read_data(&mut self, buffer: &RxBuffer<'_>) -> u32 {
        let limit = MAX_PAYLOAD.min(self.peer.space() as usize);
        match buffer.read_from(&self.stream, limit) {
            Ok((0, _)) => {
                self.to_guest = Direction::EndedByHost;
                if self.is_closed_by_host() {
                    self.end_by_host();
                }
                0
            }
            Ok((read, asked)) => {
                self.readable = read == asked;
                // At most MAX_PAYLOAD.
                let len = read as u32;
                self.peer.send(len);
                len
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                self.readable = false;
                0
            }
            Err(_) => {
                self.end_by_host();
                0
            }
        }
    }

    fn granted_by_guest(&mut self) {
        if let Some(on_result) = self.on_result.take() {
            on_result(Ok(()));
        }
    }

    fn receive_data(&mut self, payload: Buffers<'_>) -> Result<(), Violation> {
        // At most MAX_PAYLOAD.
        let len = payload.len() as u32;
        self.granted.receive(len).map_err(|Overrun| Violation)?;
        match self.to_host {
            Direction::Open => {}
            Direction::EndedByGuest => return Err(Violation),
            Direction::EndedByHost => {
                self.granted.forward_all();
                return Ok(());
            }
        }
        if self.deliver(payload).is_err() {
            self.host_reads_no_more();
        }
        Ok(())
    }

    /// Writes `payload` straight to the stream unless earlier bytes wait, and keeps what it does not take.
    fn deliver(&mut self, mut payload: Buffers<'_>) -> io::Result<()> {
        if self.backlog.is_empty() {
            let written = packet::write_to(&self.stream, &payload)?;
            self.granted.forward(written as u32);
            payload.split_front(written);
        }
        self.backlog.append(&payload)
    }

    /// Writes what waits for the stream.
    fn flush(&mut self) {
        if self.backlog.is_empty() {
            return;
        }
        match self.backlog.write_to(&self.stream) {
            Ok(written) => {
                self.granted.forward(written as u32);
                self.shut_drained();
            }
            Err(_) => self.host_reads_no_more(),
        }
    }

    /// Tells the host of the guest's end of sending once it has got all that was sent.
    fn shut_drained(&self) {
        if self.to_host == Direction::EndedByGuest && self.backlog.is_empty() {
            // Fails only if the host has closed its end, when there is nobody to tell.
            let _ = self.stream.shutdown(Shutdown::Write);
        }
    }

    fn host_reads_no_more(&mut self) {
        self.backlog.discard();
        self.granted.forward_all();
        if self.to_host == Direction::Open {
            self.to_host = Direction::EndedByHost;
        }
    }

    fn guest_shutdown(&mut self, flags: u32) {
        if flags & SHUTDOWN_RECEIVE != 0 && self.to_guest == Direction::Open {
            self.to_guest = Direction::EndedByGuest;
            // As above; the host's next write fails.
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        if flags & SHUTDOWN_SEND != 0 && self.to_host == Direction::Open {
            self.to_host = Direction::EndedByGuest;
            self.shut_drained();
        }
    }

    /// The guest ends the connection. What it sent before is still delivered.
    fn guest_reset(&mut self) {
        self.guest_gone = true;
        self.fail("refused by the guest");
        self.guest_shutdown(SHUTDOWN_RECEIVE | SHUTDOWN_SEND);
    }

    fn end_by_host(&mut self) {
        if self.to_guest == Direction::Open {
            self.to_guest = Direction::EndedByHost;
        }
        self.host_reads_no_more();
    }

    /// Whether the host has closed its end, rather than one direction of it.
    fn is_closed_by_host(&self) -> bool {
        let mut fds = [PollFd::new(self.stream.as_fd(), PollFlags::empty())];
        // Does not wait; an error would be one of memory, and the next event asks again.
        let _ = poll(&mut fds, PollTimeout::ZERO);
        fds[0].revents().is_some_and(|events| events.intersects(PollFlags::POLLHUP | PollFlags::POLLERR))
    }
}

/// A host stream that never blocks the event loop.
///
/// # Errors
/// The kernel refuses.
pub fn nonblocking(stream: OwnedFd) -> io::Result<UnixStream> {
    let stream = UnixStream::from(stream);
    stream.set_nonblocking(true)?;
    Ok(stream)
}
