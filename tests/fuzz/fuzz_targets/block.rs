//! Requests to a disk, whose backend comes and goes.

#![no_main]

use std::fs::File;
use std::os::unix::fs::FileExt;

use libfuzzer_sys::fuzz_target;
use mayu_fuzz::guest::Guest;
use mayu_fuzz::{Action, Piece, plant};
use mayu_vmm::devices::virtio::block::{Block, BlockSlot};
use mayu_vmm::devices::virtio::testing::Descriptor;

const SECTORS: u64 = 16;

/// What every byte of the read-only disk is.
const MARK: u8 = 0xa5;

fuzz_target!(init: plant(seeds()), |input: &[u8]| {
    let files = [disk(0), disk(MARK)];
    let (block, slot) = Block::new(Some((files[0].try_clone().unwrap(), false))).unwrap();
    let mut guest = Guest::new(Box::new(block), &[0]);
    guest.play(Action::decode(input), |what, _| swap(&slot, &files, what));

    // Nothing was written where nothing may be, and nothing beyond the end.
    let mut read_only = vec![0; SECTORS as usize * 512];
    files[1].read_exact_at(&mut read_only, 0).unwrap();
    assert!(read_only.iter().all(|&byte| byte == MARK));
    assert!(files.iter().all(|file| file.metadata().unwrap().len() == SECTORS * 512));

    slot.attach(files[1].try_clone().unwrap(), true).unwrap();
    guest.start_anew();
    let header = guest.driver.alloc_bytes(&request(0, 3));
    let (data, status) = (guest.driver.alloc(512), guest.driver.alloc_bytes(&[0xee]));
    guest.driver.queues[0].add(&[
        Descriptor::readable(header, 16),
        Descriptor::writable(data, 512),
        Descriptor::writable(status, 1),
    ]);
    assert_eq!(guest.driver.exchange(0, 1)[0].length, 513);
    assert_eq!((guest.driver.read(data, 512), guest.driver.read(status, 1)), (vec![MARK; 512], vec![0]));
});

/// A file in which every byte is `mark`.
fn disk(mark: u8) -> File {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&[mark; SECTORS as usize * 512], 0).unwrap();
    file
}

/// The host takes the disk away, or puts another in its place.
fn swap(slot: &BlockSlot, files: &[File], what: u8) {
    match what % 3 {
        0 => slot.detach().unwrap(),
        1 => slot.attach(files[0].try_clone().unwrap(), false).unwrap(),
        _ => slot.attach(files[1].try_clone().unwrap(), true).unwrap(),
    }
}

/// The header of a request (virtio 1.2, 5.2.6).
fn request(kind: u32, sector: u64) -> Vec<u8> {
    [kind.to_le_bytes().as_slice(), &[0; 4], &sector.to_le_bytes()].concat()
}

fn seeds() -> Vec<Vec<u8>> {
    use Action::{Chain, Host, Kick, PauseAndResume, Run, Start};

    let read = |sector| vec![Piece::Readable(request(0, sector)), Piece::Writable(1024), Piece::Writable(1)];
    let write =
        |sector| vec![Piece::Readable(request(1, sector)), Piece::Readable(vec![7; 512]), Piece::Writable(1)];
    let other =
        |kind, room| vec![Piece::Readable(request(kind, 0)), Piece::Writable(room), Piece::Writable(1)];
    [
        vec![
            Start(0),
            Chain(0, read(0)),
            Kick(0),
            Run,
            Chain(0, write(15)),
            Chain(0, read(15)),
            Kick(0),
            Run,
        ],
        vec![
            Start(u64::MAX),
            Chain(0, other(4, 0)),
            Chain(0, other(8, 20)),
            Kick(0),
            Chain(0, other(99, 9)),
            Run,
        ],
        vec![
            Start(0),
            Host(2, vec![]),
            Chain(0, write(2)),
            Kick(0),
            PauseAndResume,
            Host(0, vec![]),
            Chain(0, read(1)),
        ],
    ]
    .iter()
    .map(|actions| Action::encode(actions))
    .collect()
}
