//! Packets of a guest and to it, over a cable whose other end the host holds.

#![no_main]

use std::fs::File;
use std::io::{Read as _, Write as _};

use libfuzzer_sys::fuzz_target;
use mayu_fuzz::guest::Guest;
use mayu_fuzz::{Action, Piece, plant};
use mayu_vmm::devices::virtio::net::Net;
use mayu_vmm::devices::virtio::testing::Descriptor;
use mayu_vmm_api::RateLimit;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

/// The length of `struct virtio_net_hdr_v1` (virtio 1.2, 5.1.6).
const HEADER: usize = 12;

/// Larger than any packet.
const PACKET: usize = 1 << 17;

fuzz_target!(init: plant(seeds()), |input: &[u8]| {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
    let (mut host, theirs) = (File::from(ours), File::from(theirs));
    let (device, slot) = Net::new(3, &RateLimit::default()).unwrap();
    slot.attach_stand_in(theirs).unwrap();
    let mut guest = Guest::new(Box::new(device), &[1]);
    // Or a cable that is full would hold up what the device owes its driver.
    let mut end = host.try_clone().unwrap();
    guest.meanwhile(move || while end.read(&mut [0]).is_ok_and(|length| length > 0) {});
    guest.play(Action::decode(input), |_, bytes| {
        // One more than the cable takes is lost.
        let _ = host.write(bytes);
    });

    guest.start_anew();
    let packet = [&[0; HEADER][..], b"the last one"].concat();
    let sent = guest.driver.alloc_bytes(&packet);
    guest.driver.queues[1].add(&[Descriptor::readable(sent, packet.len() as u32)]);
    guest.driver.exchange(1, 1);
    let mut received = vec![0; PACKET];
    while !host.read(&mut received).is_ok_and(|length| received[..length] == packet) {
        std::thread::yield_now();
    }
});

fn seeds() -> Vec<Vec<u8>> {
    use Action::{Chain, Host, Kick, PauseAndResume, Run, Start};

    let packet = |length| Piece::Readable([vec![0; HEADER], vec![7; length]].concat());
    let send = |length| Chain(1, vec![packet(length)]);
    let room = |length| Chain(0, vec![Piece::Writable(length)]);
    let receive = |length| Host(0, [vec![0; HEADER], vec![9; length]].concat());
    [
        vec![Start(0), send(60), Kick(1), Run, room(2000), receive(100), Kick(0), Run, send(60), Run],
        // VIRTIO_NET_F_MRG_RXBUF, and then all there are.
        vec![Start(1 << 15), room(100), room(100), room(1000), Kick(0), receive(700), Run, send(9), Run],
        vec![
            Start(u64::MAX),
            receive(3000),
            room(50),
            Kick(0),
            Run,
            room(70_000),
            PauseAndResume,
            receive(0),
            Run,
        ],
        vec![
            Start(0),
            Chain(1, vec![Piece::Writable(100)]),
            Chain(1, vec![packet(0)]),
            Chain(0, vec![packet(9)]),
            Run,
        ],
    ]
    .iter()
    .map(|actions| Action::encode(actions))
    .collect()
}
