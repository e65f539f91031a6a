//! All connections of one device: who gets which packet, and whose turn it is to send one.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use vmm_sys_util::epoll::EventSet;

use super::connection::{self, Address, Connection};
use super::packet::{HOST_CID, Header, Op, RxBuffer, TYPE_STREAM, TxPacket};
use super::{OnAccept, OnResult};
use crate::devices::virtio::Health;
use crate::event_loop::Registrar;

/// The most connections at a time.
pub const MAX_CONNECTIONS: usize = 1024;

/// The most of them that the guest can ask for, so that it cannot keep the host from connecting.
pub const MAX_ACCEPTED: usize = 256;

/// The receive buffer of a connection in bytes, as large as Linux's (`VIRTIO_VSOCK_DEFAULT_BUF_SIZE`), ...
const BUF_ALLOC: u32 = 256 * 1024;

/// ... until all of them could hold this many bytes together, ...
const MANY_BUFFERED: usize = 16 * 1024 * 1024;

/// ... and from then on, so that a guest can make the device hold 32 MiB at most.
const SMALL_BUF_ALLOC: u32 = 16 * 1024;

/// The most RSTs that wait for a receive buffer. A guest that provokes more without taking them loses the rest.
const MAX_RESETS: usize = MAX_CONNECTIONS;

/// The first port of connections that the host asks for; below are the ports that the guest can ask for.
pub const FIRST_HOST_PORT: u32 = 1 << 30;

/// The guest's way to the host: the ports that it may connect to, and who takes the streams.
pub struct Acceptor {
    /// Allowed ports.
    pub ports: Vec<u32>,
    /// Told the port, and given the host's end of the stream.
    pub on_accept: OnAccept,
}

/// All connections of one device, from its activation to its reset.
pub struct Muxer {
    guest_cid: u64,
    registrar: Registrar,
    health: Health,
    /// By the token under which the event loop watches the stream.
    connections: HashMap<u32, Entry>,
    /// All but those that the guest has ended while the host still has to take bytes.
    tokens: HashMap<Address, u32>,
    /// Whoever has something for the guest, in order.
    ready: VecDeque<u32>,
    resets: VecDeque<Header>,
    /// Connections whose interest in their streams may have changed.
    touched: Vec<u32>,
    last_token: u32,
    next_host_port: u32,
    accepted: usize,
    /// The sum of all receive buffers in bytes.
    granted: usize,
    paused: bool,
}

struct Entry {
    connection: Connection,
    by_guest: bool,
    /// It stands in `ready`.
    queued: bool,
    watched: Option<EventSet>,
}

impl Muxer {
    /// No connections yet; those that the host asks for get ports from `next_host_port` on.
    pub fn new(guest_cid: u64, next_host_port: u32, registrar: Registrar, health: Health) -> Self {
        Self {
            guest_cid,
            registrar,
            health,
            connections: HashMap::new(),
            tokens: HashMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            touched: Vec::new(),
            last_token: 0,
            next_host_port: next_host_port.max(FIRST_HOST_PORT),
            accepted: 0,
            granted: 0,
            paused: false,
        }
    }

    /// The port of the next connection that the host asks for.
    pub fn next_host_port(&self) -> u32 {
        self.next_host_port
    }

    /// The host asks for a connection.
    pub fn connect(&mut self, stream: OwnedFd, guest_port: u32, on_result: OnResult) {
        if self.connections.len() >= MAX_CONNECTIONS {
            on_result(Err(format!("too many connections: {MAX_CONNECTIONS} are open")));
            return;
        }
        let stream = match connection::nonblocking(stream) {
            Ok(stream) => stream,
            Err(error) => {
                on_result(Err(format!("cannot make the stream nonblocking: {error}")));
                return;
            }
        };
        let address =
            Address { guest_cid: self.guest_cid, guest_port, host_port: self.allocate_port(guest_port) };
        let connection = Connection::request(address, stream, self.buf_alloc(), on_result);
        self.add(connection, false);
    }

    /// Takes a packet from the guest.
    pub fn receive(&mut self, packet: TxPacket<'_>, acceptor: &mut Acceptor) {
        let header = &packet.header;
        if header.src_cid != self.guest_cid {
            // Somebody else's name: there is nobody to answer to.
            self.health.count_error();
            return;
        }
        if header.dst_cid != HOST_CID || header.kind != TYPE_STREAM {
            self.refuse(header);
            return;
        }
        let address = self.address(header);
        match (self.tokens.get(&address).copied(), Op::from_raw(header.op)) {
            (None, Some(Op::Request)) => self.accept(address, header, acceptor),
            (None, _) => self.refuse(header),
            (Some(token), Some(op)) => self.deliver(token, op, packet),
            (Some(token), None) => self.abort(token),
        }
    }

    /// The guest sent what is no packet, though perhaps one's header.
    pub fn receive_malformed(&mut self, header: Option<&Header>) {
        let connection = header
            .filter(|header| header.src_cid == self.guest_cid && header.dst_cid == HOST_CID)
            .and_then(|header| self.tokens.get(&self.address(header)).copied());
        match connection {
            // Its stream would have a gap.
            Some(token) => self.abort(token),
            None => self.health.count_error(),
        }
    }

    /// The event loop found a connection's stream ready.
    pub fn on_ready(&mut self, token: u32, readable: bool) {
        if let Some(entry) = self.connections.get_mut(&token) {
            entry.connection.on_ready(readable);
            self.settle(token);
        }
    }

    /// Whether the guest is to be sent something, or may be.
    pub fn has_output(&self) -> bool {
        !self.resets.is_empty() || !self.ready.is_empty()
    }

    /// The next packet for the guest, its payload in `buffer` already; none if there is nothing to say now.
    /// Connections take turns.
    pub fn fill(&mut self, buffer: &RxBuffer<'_>) -> Option<Header> {
        loop {
            if let Some(reset) = self.resets.pop_front() {
                return Some(reset);
            }
            let token = self.ready.pop_front()?;
            let Some(entry) = self.connections.get_mut(&token) else {
                continue;
            };
            entry.queued = false;
            let header = entry.connection.fill(buffer);
            self.settle(token);
            if header.is_some() {
                return header;
            }
        }
    }

    /// Brings the event loop up to date. To be called when all is done for now. Returns whether that ended
    /// connections, of which the guest is to be told.
    pub fn update_interests(&mut self) -> bool {
        let before = self.connections.len();
        while let Some(token) = self.touched.pop() {
            if let Some(entry) = self.connections.get_mut(&token)
                && entry.update_interest(&self.registrar, token, self.paused).is_err()
            {
                // Not a descriptor that can be watched, or no memory to do so.
                entry.connection.fail("its stream cannot be watched");
                self.remove(token);
            }
        }
        self.connections.len() < before
    }

    /// Watches no stream until [`resume`](Self::resume).
    pub fn pause(&mut self) {
        self.paused = true;
        self.touched = self.connections.keys().copied().collect();
        self.update_interests();
    }

    /// Goes on.
    pub fn resume(&mut self) {
        self.paused = false;
        self.touched = self.connections.keys().copied().collect();
    }

    /// Ends all connections without a word to the guest, which has forgotten them.
    pub fn close(mut self, reason: &str) {
        for (token, mut entry) in self.connections.drain() {
            entry.connection.fail(reason);
            entry.unwatch(&self.registrar, token);
        }
    }

    fn address(&self, header: &Header) -> Address {
        Address { guest_cid: self.guest_cid, guest_port: header.src_port, host_port: header.dst_port }
    }

    fn accept(&mut self, address: Address, request: &Header, acceptor: &mut Acceptor) {
        let full = self.connections.len() >= MAX_CONNECTIONS || self.accepted >= MAX_ACCEPTED;
        if full || !acceptor.ports.contains(&address.host_port) {
            self.push_reset(request.refusal());
            return;
        }
        match socketpair() {
            Ok((ours, theirs)) => {
                let connection = Connection::accept(address, ours, self.buf_alloc(), request);
                self.add(connection, true);
                (acceptor.on_accept)(address.host_port, theirs.into());
            }
            // Out of descriptors: the guest can try again.
            Err(_) => self.push_reset(request.refusal()),
        }
    }

    fn deliver(&mut self, token: u32, op: Op, packet: TxPacket<'_>) {
        let Some(entry) = self.connections.get_mut(&token) else {
            return;
        };
        let address = entry.connection.address();
        if entry.connection.receive(op, packet).is_err() {
            self.abort(token);
            return;
        }
        if entry.connection.is_guest_gone() {
            self.tokens.remove(&address);
        }
        self.settle(token);
    }

    /// Refuses a packet that belongs nowhere; a RST for a RST would never end.
    fn refuse(&mut self, header: &Header) {
        if header.op == Op::Reset as u16 {
            return;
        }
        self.health.count_error();
        self.push_reset(header.refusal());
    }

    /// Ends a connection whose guest broke the protocol.
    fn abort(&mut self, token: u32) {
        self.health.count_error();
        if let Some(entry) = self.connections.get_mut(&token) {
            entry.connection.fail("the guest broke the protocol");
        }
        self.remove(token);
    }

    fn push_reset(&mut self, reset: Header) {
        if self.resets.len() < MAX_RESETS {
            self.resets.push_back(reset);
        } else {
            self.health.count_error();
        }
    }

    fn add(&mut self, connection: Connection, by_guest: bool) {
        let token = self.allocate_token();
        self.granted += connection.buf_alloc() as usize;
        self.accepted += usize::from(by_guest);
        self.tokens.insert(connection.address(), token);
        let entry = Entry { connection, by_guest, queued: false, watched: None };
        self.connections.insert(token, entry);
        self.settle(token);
    }

    /// After each change of a connection: is it over, and does it want to send?
    fn settle(&mut self, token: u32) {
        let Some(entry) = self.connections.get_mut(&token) else {
            return;
        };
        if entry.connection.is_over() {
            self.remove(token);
            return;
        }
        if !entry.queued && entry.connection.has_output() {
            entry.queued = true;
            self.ready.push_back(token);
        }
        self.touched.push(token);
    }

    /// Forgets a connection, and has the guest forget it.
    fn remove(&mut self, token: u32) {
        let Some(mut entry) = self.connections.remove(&token) else {
            return;
        };
        entry.unwatch(&self.registrar, token);
        self.granted -= entry.connection.buf_alloc() as usize;
        self.accepted -= usize::from(entry.by_guest);
        if !entry.connection.is_guest_gone() {
            let address = entry.connection.address();
            self.tokens.remove(&address);
            self.push_reset(address.header(Op::Reset));
        }
    }

    fn buf_alloc(&self) -> u32 {
        if self.granted < MANY_BUFFERED { BUF_ALLOC } else { SMALL_BUF_ALLOC }
    }

    /// Ports are taken in turn, so that the packets of an old connection do not reach a new one.
    fn allocate_port(&mut self, guest_port: u32) -> u32 {
        loop {
            let host_port = self.next_host_port;
            // The last number stands for any port (VMADDR_PORT_ANY).
            self.next_host_port = match host_port + 1 {
                u32::MAX => FIRST_HOST_PORT,
                next => next,
            };
            let address = Address { guest_cid: self.guest_cid, guest_port, host_port };
            if !self.tokens.contains_key(&address) {
                return host_port;
            }
        }
    }

    /// Tokens are taken in turn, so that a late event does not reach a new connection. 0 is the device's own.
    fn allocate_token(&mut self) -> u32 {
        loop {
            self.last_token = self.last_token.wrapping_add(1).max(1);
            if !self.connections.contains_key(&self.last_token) {
                return self.last_token;
            }
        }
    }
}

impl Entry {
    fn update_interest(
        &mut self,
        registrar: &Registrar,
        token: u32,
        paused: bool,
    ) -> crate::error::Result<()> {
        let wanted = match paused {
            true => None,
            false => self.connection.interest(),
        };
        if wanted == self.watched {
            return Ok(());
        }
        let stream = self.connection.stream();
        match (self.watched, wanted) {
            (None, Some(interest)) => registrar.watch(stream, interest, token)?,
            (Some(_), Some(interest)) => registrar.change(stream, interest, token)?,
            (_, None) => registrar.forget(stream)?,
        }
        self.watched = wanted;
        Ok(())
    }

    fn unwatch(&mut self, registrar: &Registrar, token: u32) {
        // A refusal means that it is not watched; closing the stream ends the watch as well.
        let _ = self.update_interest(registrar, token, true);
    }
}

/// The two ends of a guest's connection: the device's and the host's.
fn socketpair() -> io::Result<(UnixStream, UnixStream)> {
    let (ours, theirs) = UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    theirs.set_nonblocking(true)?;
    Ok((ours, theirs))
}
