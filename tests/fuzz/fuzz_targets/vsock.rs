//! Packets of a guest to its socket device, and what the host does with its ends of the streams.

#![no_main]

use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};

use libfuzzer_sys::fuzz_target;
use mayu_fuzz::guest::Guest;
use mayu_fuzz::{Action, Piece, plant};
use mayu_vmm::devices::virtio::testing::Descriptor;
use mayu_vmm::devices::virtio::vsock::{Vsock, VsockHandle};

const GUEST: u64 = 3;
const HOST: u64 = 2;

/// The one port of the host that the guest may connect to, and one of the guest.
const ALLOWED: u32 = 700;
const GUEST_PORT: u32 = 5000;

/// The port of the host's first own connection.
const FIRST_HOST_PORT: u32 = 1 << 30;

/// Operations (virtio 1.2, 5.10.6), and where a packet says which one it is.
const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RESET: u16 = 3;
const SHUTDOWN: u16 = 4;
const DATA: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;
const OP: u64 = 30;

/// The most streams that the host holds, and the most for which it asks.
const MAX_STREAMS: usize = 16;

fuzz_target!(init: plant(seeds()), |input: &[u8]| {
    let (sender, accepted) = channel();
    let on_accept = move |port: u32, stream: OwnedFd| {
        assert_eq!(port, ALLOWED);
        // Taken by nobody once the input is at its end.
        let _ = sender.send(UnixStream::from(stream));
    };
    let (device, handle) = Vsock::new(GUEST as u32, vec![ALLOWED], Box::new(on_accept)).unwrap();
    let mut guest = Guest::new(Box::new(device), &[1]);
    let mut host = Host { handle, accepted, streams: Vec::new(), asked: 0 };
    guest.play(Action::decode(input), |what, bytes| host.act(what, bytes));

    drop(host.streams);
    guest.start_anew();
    let request = packet(REQUEST, GUEST_PORT, ALLOWED, &[]);
    let sent = guest.driver.alloc_bytes(&request);
    guest.driver.queues[1].add(&[Descriptor::readable(sent, request.len() as u32)]);
    guest.driver.kick(1);
    let buffer = guest.driver.alloc(4096);
    // Connections for which the host has asked meanwhile may come first.
    while guest.driver.read(buffer + OP, 2) != RESPONSE.to_le_bytes() {
        guest.driver.queues[0].add(&[Descriptor::writable(buffer, 4096)]);
        guest.driver.exchange(0, 1);
    }
});

struct Host {
    handle: VsockHandle,
    accepted: Receiver<UnixStream>,
    streams: Vec<UnixStream>,
    asked: usize,
}

impl Host {
    fn act(&mut self, what: u8, bytes: &[u8]) {
        self.streams.extend(self.accepted.try_iter());
        self.streams.truncate(MAX_STREAMS);
        let (what, which) = (what % 6, usize::from(what / 6));
        if what == 0 {
            return self.connect(bytes);
        }
        let count = self.streams.len();
        let Some(stream) = (count > 0).then(|| &mut self.streams[which % count]) else {
            return;
        };
        // Refused or taken in part, as it may be.
        let _ = match what {
            1 => stream.write(bytes).map(drop),
            2 => stream.read(&mut vec![0; 1 << 16]).map(drop),
            3 => stream.shutdown(Shutdown::Write),
            4 => stream.shutdown(Shutdown::Read),
            _ => {
                self.streams.remove(which % count);
                Ok(())
            }
        };
    }

    fn connect(&mut self, bytes: &[u8]) {
        if self.asked == MAX_STREAMS {
            return;
        }
        self.asked += 1;
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let port = u32::from(bytes.first().copied().unwrap_or_default());
        self.handle.connect(theirs.into(), port, Box::new(|_| {}));
        self.streams.push(ours);
    }
}

/// A packet of the guest (virtio 1.2, 5.10.6) with plenty of credit.
fn packet(op: u16, guest_port: u32, host_port: u32, payload: &[u8]) -> Vec<u8> {
    let mut packet = [GUEST, HOST].map(u64::to_le_bytes).concat();
    packet.extend([guest_port, host_port, payload.len() as u32].map(u32::to_le_bytes).concat());
    packet.extend([1, op].map(u16::to_le_bytes).concat());
    packet.extend([0, 1 << 20, 0].map(u32::to_le_bytes).concat());
    packet.extend(payload);
    packet
}

fn seeds() -> Vec<Vec<u8>> {
    use Action::{Chain, Host, Kick, PauseAndResume, Reset, Run, Start};

    let send = |op, host_port, payload: &[u8]| {
        Chain(1, vec![Piece::Readable(packet(op, GUEST_PORT, host_port, payload))])
    };
    let to_host = |op, payload: &[u8]| send(op, ALLOWED, payload);
    // As a guest of the port 0 answers the host's first connection.
    let answer =
        |op, payload: &[u8]| Chain(1, vec![Piece::Readable(packet(op, 0, FIRST_HOST_PORT, payload))]);
    let room = || Chain(0, vec![Piece::Writable(4096)]);
    let write = |bytes: &[u8]| Host(1, bytes.to_vec());
    [
        vec![
            Start(0),
            room(),
            to_host(REQUEST, b""),
            Kick(1),
            Run,
            write(b"down"),
            to_host(DATA, b"up"),
            room(),
            Run,
            Host(2, vec![]),
        ],
        vec![
            Start(0),
            Host(0, vec![0]),
            room(),
            Run,
            answer(RESPONSE, b""),
            Run,
            write(b"hello"),
            room(),
            answer(DATA, b"back"),
            Run,
        ],
        vec![
            Start(0),
            room(),
            room(),
            to_host(REQUEST, b""),
            to_host(SHUTDOWN, b""),
            Run,
            to_host(CREDIT_UPDATE, b""),
            to_host(CREDIT_REQUEST, b""),
            Run,
            Reset,
        ],
        vec![
            Start(1 << 29),
            room(),
            to_host(REQUEST, b""),
            Run,
            Host(3, vec![]),
            room(),
            Run,
            Host(5, vec![]),
            PauseAndResume,
        ],
        vec![
            Start(0),
            to_host(DATA, b"no connection"),
            to_host(RESET, b""),
            send(REQUEST, 9, b""),
            room(),
            room(),
            Run,
            Host(4, vec![]),
        ],
    ]
    .iter()
    .map(|actions| Action::encode(actions))
    .collect()
}
