//! FUSE requests to a shared directory, and a host that moves things in it. What lies beside the share is not touched.

#![no_main]

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;

use libfuzzer_sys::fuzz_target;
use mayu_fuzz::guest::Guest;
use mayu_fuzz::{Action, Piece, plant};
use mayu_vmm::devices::virtio::fs::Fs;
use mayu_vmm::devices::virtio::testing::Descriptor;
use mayu_vmm::seccomp::Confinement;

/// What the file beside the share holds.
const SECRET: &[u8] = b"of the host";

const ROOT: u64 = 1;

/// Opcodes of `include/uapi/linux/fuse.h`.
const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const SETATTR: u32 = 4;
const READLINK: u32 = 5;
const SYMLINK: u32 = 6;
const MKNOD: u32 = 8;
const MKDIR: u32 = 9;
const UNLINK: u32 = 10;
const LINK: u32 = 13;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const RELEASE: u32 = 18;
const SETXATTR: u32 = 21;
const GETXATTR: u32 = 22;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const CREATE: u32 = 35;
const BATCH_FORGET: u32 = 42;
const FALLOCATE: u32 = 43;
const READDIRPLUS: u32 = 44;
const RENAME2: u32 = 45;

fuzz_target!(init: plant(seeds()), |input: &[u8]| {
    let home = tempfile::tempdir().unwrap();
    let (share, beside) = (home.path().join("share"), home.path().join("beside"));
    fs::create_dir(&share).unwrap();
    fs::write(&beside, SECRET).unwrap();
    let before = state(&beside);

    let mut guest = Guest::new(Box::new(Fs::new("share", &share, &Confinement::none()).unwrap()), &[0, 1]);
    guest.play(Action::decode(input), |what, bytes| meddle(&share, what, bytes));

    assert_eq!(state(&beside), before);
    assert_eq!(fs::read(&beside).unwrap(), SECRET);
    assert_eq!(fs::read_dir(home.path()).unwrap().count(), 2);

    guest.start_anew();
    for (request, length) in [(init(), 80), (request(GETATTR, ROOT, &[&[0; 16]]), 120)] {
        let (sent, reply) = (guest.driver.alloc_bytes(&request), guest.driver.alloc(4096));
        guest.driver.queues[1]
            .add(&[Descriptor::readable(sent, request.len() as u32), Descriptor::writable(reply, 4096)]);
        assert_eq!(guest.driver.exchange(1, 1)[0].length, length);
    }
});

/// Everything that shows that somebody has touched a file.
fn state(path: &Path) -> impl PartialEq + std::fmt::Debug + use<> {
    let metadata = fs::metadata(path).unwrap();
    let times = (metadata.atime_nsec(), metadata.mtime_nsec(), metadata.ctime_nsec());
    (metadata.ino(), metadata.nlink(), metadata.mode(), metadata.uid(), metadata.len(), times)
}

/// The host puts something in the way, which may fail where the guest was faster.
fn meddle(share: &Path, what: u8, bytes: &[u8]) {
    let _ = match what % 4 {
        0 => symlink("../beside", share.join("link")),
        1 => symlink("..", share.join("up")),
        // Not through a link that the guest has put there.
        2 => File::create_new(share.join("file")).and_then(|mut file| file.write_all(bytes)),
        _ => fs::rename(share.join("directory"), share.join("elsewhere")),
    };
}

/// A request of root to a node.
fn request(opcode: u32, node: u64, body: &[&[u8]]) -> Vec<u8> {
    let body = body.concat();
    let mut request = [40 + body.len() as u32, opcode].map(u32::to_le_bytes).concat();
    request.extend([2, node].map(u64::to_le_bytes).concat());
    // Whose it is: user, group, process; and what is reserved.
    request.extend([0_u32, 0, 1, 0].map(u32::to_le_bytes).concat());
    request.extend(body);
    request
}

fn init() -> Vec<u8> {
    // Version 7.41, and all options there are.
    request(INIT, 0, &[&[7, 41, 1 << 17, u32::MAX, u32::MAX].map(u32::to_le_bytes).concat(), &[0; 44]])
}

fn seeds() -> Vec<Vec<u8>> {
    use Action::{Chain, Host, Kick, PauseAndResume, Run, Start};

    let send = |queue, request| Chain(queue, vec![Piece::Readable(request), Piece::Writable(4096)]);
    let ask = |opcode, node, body: &[&[u8]]| send(1, request(opcode, node, body));
    let words = |words: &[u32]| words.iter().copied().flat_map(u32::to_le_bytes).collect::<Vec<_>>();
    let longs = |longs: &[u64]| longs.iter().copied().flat_map(u64::to_le_bytes).collect::<Vec<_>>();
    // Node 2, and the first handle.
    let create = |name: &[u8]| ask(CREATE, ROOT, &[&words(&[2, 0o100_644, 0, 0]), name]);
    let io = |size: u32| [longs(&[1, 0]), words(&[size, 0]), longs(&[0, 0])].concat();
    let mount = || vec![Start(0), send(1, init()), Kick(1), Run];
    let pods = [
        vec![
            create(b"file\0"),
            Run,
            ask(WRITE, 2, &[&io(4), b"data"]),
            Run,
            ask(READ, 2, &[&io(64)]),
            Run,
            ask(FALLOCATE, 2, &[&longs(&[1, 0, 4096]), &words(&[0, 0])]),
            ask(RELEASE, 2, &[&longs(&[1, 0, 0])]),
            Run,
        ],
        vec![
            ask(MKDIR, ROOT, &[&words(&[0o755, 0]), b"directory\0"]),
            Run,
            Host(3, vec![]),
            ask(OPENDIR, ROOT, &[&[0; 8]]),
            Run,
            ask(READDIRPLUS, ROOT, &[&io(2048)]),
            Run,
        ],
        vec![
            ask(SYMLINK, ROOT, &[b"link\0../beside\0"]),
            Run,
            ask(READLINK, 2, &[]),
            ask(OPEN, 2, &[&words(&[2, 0])]),
            Run,
            ask(LINK, ROOT, &[&longs(&[2]), b"other\0"]),
            ask(UNLINK, ROOT, &[b"link\0"]),
            Run,
        ],
        vec![
            Host(0, vec![]),
            Host(1, vec![]),
            ask(LOOKUP, ROOT, &[b"link\0"]),
            ask(LOOKUP, ROOT, &[b"up\0"]),
            Run,
            ask(LOOKUP, 3, &[b"beside\0"]),
            ask(LOOKUP, ROOT, &[b"..\0"]),
            ask(LOOKUP, ROOT, &[b"/etc\0"]),
            Run,
        ],
        vec![
            create(b"a\0"),
            Run,
            ask(RENAME2, ROOT, &[&longs(&[1]), &words(&[0, 0]), b"a\0b\0"]),
            ask(SETATTR, 2, &[&words(&[1, 0]), &[0; 60], &words(&[0o600]), &[0; 16]]),
            Run,
            ask(SETXATTR, 2, &[&words(&[5, 0]), b"user.x\0value"]),
            ask(GETXATTR, 2, &[&words(&[64, 0]), b"user.x\0"]),
            Run,
        ],
        vec![
            ask(MKNOD, ROOT, &[&words(&[0o010_644, 0, 0, 0]), b"pipe\0"]),
            Run,
            ask(OPEN, 2, &[&words(&[0, 0])]),
            send(0, request(FORGET, 2, &[&longs(&[1])])),
            send(0, request(BATCH_FORGET, 0, &[&words(&[1, 0]), &longs(&[2, 1])])),
            Kick(0),
            PauseAndResume,
            Run,
            Host(2, b"by the host".to_vec()),
            ask(LOOKUP, ROOT, &[b"file\0"]),
            Run,
        ],
    ];
    pods.into_iter().map(|steps| Action::encode(&[mount(), steps].concat())).collect()
}
