//! Requests to the memory device, whose region is half of the guest's memory.

#![no_main]

use libfuzzer_sys::fuzz_target;
use mayu_fuzz::guest::Guest;
use mayu_fuzz::{Action, Piece, plant};
use mayu_vmm::devices::virtio::mem::Mem;
use mayu_vmm::devices::virtio::testing::{Descriptor, LOW_MEMORY};
use mayu_vmm::memory::{BLOCK_SIZE, Pluggable};
use vm_memory::GuestAddress;

const START: u64 = LOW_MEMORY / 2;
const BLOCKS: u64 = 16;

/// How many of them may be plugged.
const LIMIT: u64 = 12;

/// Types of requests (virtio 1.2, 5.15.6).
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

fuzz_target!(init: plant(seeds()), |input: &[u8]| {
    let place =
        Pluggable { start: GuestAddress(START), size: BLOCKS * BLOCK_SIZE, limit: LIMIT * BLOCK_SIZE };
    let (device, handle) = Mem::new(place);
    handle.resize(LIMIT * BLOCK_SIZE).unwrap();
    let mut guest = Guest::new(Box::new(device), &[0]);
    guest.play(Action::decode(input), |what, _| {
        // More than there may be is refused.
        let _ = handle.resize(u64::from(what % 16) * BLOCK_SIZE);
    });
    assert!(handle.plugged() <= LIMIT * BLOCK_SIZE);

    guest.start_anew();
    let (sent, response) = (guest.driver.alloc_bytes(&request(UNPLUG_ALL, 0, 0)), guest.driver.alloc(10));
    guest.driver.queues[0].add(&[Descriptor::readable(sent, 24), Descriptor::writable(response, 10)]);
    assert_eq!(guest.driver.exchange(0, 1)[0].length, 10);
    assert_eq!(handle.plugged(), 0);
});

/// A request for `count` blocks from number `block` on.
fn request(kind: u16, block: u64, count: u16) -> Vec<u8> {
    let mut request = kind.to_le_bytes().to_vec();
    request.extend([0; 6]);
    request.extend((START + block * BLOCK_SIZE).to_le_bytes());
    request.extend(count.to_le_bytes());
    request.extend([0; 6]);
    request
}

fn seeds() -> Vec<Vec<u8>> {
    use Action::{Chain, Host, Kick, Read, Run, Start};

    let ask = |kind, block, count| {
        Chain(0, vec![Piece::Readable(request(kind, block, count)), Piece::Writable(10)])
    };
    [
        vec![
            Start(u64::MAX),
            ask(PLUG, 0, 4),
            ask(STATE, 0, 16),
            Kick(0),
            Run,
            ask(UNPLUG, 1, 2),
            Run,
            Read(0x100, 56),
        ],
        vec![
            Start(0),
            ask(PLUG, 0, 12),
            Kick(0),
            Run,
            Host(2, vec![]),
            ask(UNPLUG_ALL, 0, 0),
            ask(PLUG, 15, 1),
            Run,
        ],
    ]
    .iter()
    .map(|actions| Action::encode(actions))
    .collect()
}
