//! Registers, rings and descriptor chains, in front of the smallest device: the one that fills buffers with random bytes.

#![no_main]

use libfuzzer_sys::fuzz_target;
use mayu_fuzz::guest::Guest;
use mayu_fuzz::{Action, Area, Piece, plant};
use mayu_vmm::devices::virtio::rng::Rng;
use mayu_vmm::devices::virtio::testing::Descriptor;

fuzz_target!(init: plant(seeds()), |input: &[u8]| {
    // It answers a greedy guest later, so that nothing has to be answered at once.
    let mut guest = Guest::new(Box::new(Rng::new()), &[]);
    guest.play(Action::decode(input), |_, _| {});

    guest.start_anew();
    let buffer = guest.driver.alloc(64);
    let queue = &mut guest.driver.queues[0];
    queue.add(&[Descriptor::writable(buffer, 64)]);
    assert_eq!(guest.driver.exchange(0, 1)[0].length, 64);
});

fn seeds() -> Vec<Vec<u8>> {
    use Action::{Chain, Kick, PauseAndResume, Read, Reset, Run, SetAvailable, Start, Write, WriteRegister};

    // What `Start` does, register by register: their words' numbers, and what is written.
    let by_hand = [(28, 0), (28, 1), (28, 3), (9, 1), (8, 1), (28, 11), (12, 0), (14, 16), (32, 0x1_0000)];
    let rings = [(36, 0x1_8000), (40, 0x1_c000), (17, 1), (28, 15)];
    let set_up = by_hand.into_iter().chain(rings).map(|(register, value)| WriteRegister(register, value));
    let table = vec![(1 << 21, 64, 2, 0), (1 << 22, 64, 3, 0)];
    [
        vec![Start(u64::MAX), Chain(0, vec![Piece::Writable(100), Piece::Writable(7)]), Kick(0), Run, Reset],
        set_up.chain([Chain(0, vec![Piece::Writable(9)]), Kick(0), Run, Read(0x60, 4)]).collect(),
        vec![
            Start(1 << 28),
            Chain(0, vec![Piece::Table(table)]),
            Kick(0),
            PauseAndResume,
            Run,
            Read(0x100, 8),
        ],
        vec![
            Start(0),
            Chain(0, vec![Piece::Wild(1 << 21, 8, 3, 0)]),
            Kick(0),
            Run,
            SetAvailable(0, 300),
            Kick(0),
            Run,
        ],
        vec![
            Start(0),
            Write(0, Area::Available, 2, vec![1, 0, 5, 0]),
            Write(0, Area::Table, 80, vec![0; 16]),
            Kick(0),
        ],
    ]
    .iter()
    .map(|actions| Action::encode(actions))
    .collect()
}
