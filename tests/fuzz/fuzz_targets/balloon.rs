//! Reports of free pages to the balloon.

#![no_main]

use libfuzzer_sys::fuzz_target;
use mayu_fuzz::guest::Guest;
use mayu_fuzz::{Action, Piece, plant};
use mayu_vmm::devices::virtio::balloon::Balloon;
use mayu_vmm::devices::virtio::testing::{Descriptor, HIGH_MEMORY, WRITE};

/// The queue with the reports.
const REPORTING: u16 = 2;

const PAGE: u64 = 4096;

fuzz_target!(init: plant(seeds()), |input: &[u8]| {
    let mut guest = Guest::new(Box::new(Balloon::new().0), &[0, 1, REPORTING]);
    guest.play(Action::decode(input), |_, _| {});

    // A page is taken back, and none beside it.
    guest.start_anew();
    guest.driver.write(HIGH_MEMORY, &[1; 3 * PAGE as usize]);
    guest.driver.queues[usize::from(REPORTING)].add(&[Descriptor::writable(HIGH_MEMORY + PAGE, PAGE as u32)]);
    assert_eq!(guest.driver.exchange(REPORTING, 1)[0].length, 0);
    let found = [0, 1, 2].map(|page| guest.driver.read(HIGH_MEMORY + page * PAGE, PAGE as usize));
    assert_eq!(found, [1, 0, 1].map(|byte| vec![byte; PAGE as usize]));
});

fn seeds() -> Vec<Vec<u8>> {
    use Action::{Chain, Kick, Read, Run, Start};

    // The first two are where a driver has nothing else, and of whole pages.
    let report = |lengths: &[u32]| Chain(2, lengths.iter().map(|length| Piece::Writable(*length)).collect());
    let wild = |address, pages: u32| Piece::Wild(address, pages * PAGE as u32, WRITE, 0);
    [
        vec![Start(u64::MAX), report(&[8192, 4096]), Kick(2), Run, report(&[4095]), Run, Read(0x100, 16)],
        vec![
            Start(0),
            Chain(0, vec![Piece::Readable(vec![0; 8])]),
            Kick(0),
            Run,
            Chain(2, vec![wild(2 << 20, 3), wild(HIGH_MEMORY, 1), wild(2 << 20, 1)]),
            Chain(2, vec![wild(u64::MAX - 4095, 2)]),
            Kick(2),
            Run,
        ],
    ]
    .iter()
    .map(|actions| Action::encode(actions))
    .collect()
}
