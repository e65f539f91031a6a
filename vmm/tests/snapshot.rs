//! A machine that is saved, and others that go on from there, each in a process of its own.

#![allow(clippy::panic, clippy::unwrap_used)]

mod support;

use std::fs::{self, File};
use std::io::{Read as _, Seek as _, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use mayu_vmm::snapshot::Snapshot;
use mayu_vmm_api::{ExitReason, Pages, Request, VmConfig, WorkingSet};
use support::payload::{COUNT, COUNT_FOREVER, RESET, elf, print, wait_for_disk};
use support::{PATIENCE, Vmm, config, hostile_guest, image, memory_file, read_only, unable};

/// What a saved machine consists of.
struct Saved {
    state: tempfile::NamedTempFile,
    memory: File,
}

impl Saved {
    /// A guest that has said "first" and says "second" once it has a disk.
    fn midway() -> Self {
        let (saved, mut vmm) = Self::begun();
        vmm.request(Request::Pause, &[]).unwrap();
        saved.save(&mut vmm).unwrap();
        vmm.request(Request::Shutdown, &[]).unwrap();
        assert_eq!(vmm.exit(), ExitReason::Requested);
        assert_eq!(vmm.whole_console(), "first\n");
        saved
    }

    /// The same guest, which runs and is not saved yet.
    fn begun() -> (Self, Vmm) {
        let parts = [print("first\n"), wait_for_disk(), print("second\n"), COUNT.into(), RESET.into()];
        let guest = elf(&parts.concat());
        let state = tempfile::NamedTempFile::new().unwrap();
        let memory = memory_file(&config());
        let share = tempfile::tempdir().unwrap();
        let extra = [memory.as_fd()];
        let (mut vmm, outcome) =
            Vmm::begin(Request::BuildTemplate(described()), [&guest, &image()], share.path(), &extra);
        outcome.unwrap();
        vmm.request(Request::Resume, &[]).unwrap();
        vmm.wait_for_console("first\n");
        (Self { state, memory }, vmm)
    }

    fn save(&self, vmm: &mut Vmm) -> Result<(), String> {
        vmm.request(Request::Save, &[self.state.reopen().unwrap().into(), read_only(&self.memory).into()])
    }

    fn restore(&self, config: VmConfig, share: &Path) -> (Vmm, Result<(), String>) {
        self.restore_with(config, share, &[])
    }

    fn restore_with(
        &self,
        config: VmConfig,
        share: &Path,
        extra: &[BorrowedFd<'_>],
    ) -> (Vmm, Result<(), String>) {
        let (state, image) = (self.state.reopen().unwrap(), image());
        let extra = [&[image.as_fd()], extra].concat();
        Vmm::begin(Request::Restore(config), [&state, &self.memory], share, &extra)
    }

    /// Why a machine with this description cannot go on from here.
    fn refusal(&self, config: VmConfig) -> String {
        let share = tempfile::tempdir().unwrap();
        let (mut vmm, outcome) = self.restore(config, share.path());
        vmm.wait_for_end();
        outcome.unwrap_err()
    }

    fn memory(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        (&self.memory).rewind().unwrap();
        (&self.memory).read_to_end(&mut bytes).unwrap();
        bytes
    }
}

fn described() -> VmConfig {
    VmConfig { made_of: [("kernel".to_owned(), "of today".to_owned())].into(), ..config() }
}

#[test]
fn any_number_of_machines_go_on_from_where_one_was_saved() {
    if unable() {
        return;
    }
    let saved = Saved::midway();
    let memory = saved.memory();
    let share = tempfile::tempdir().unwrap();
    let mut machines: Vec<_> = (0..3)
        .map(|number| {
            let of_pod =
                VmConfig { sandbox_id: format!("pod-{number}"), uid: 65_000 + number, ..described() };
            let (mut vmm, outcome) = saved.restore(of_pod, share.path());
            outcome.unwrap();
            vmm.request(Request::Resume, &[]).unwrap();
            vmm
        })
        .collect();
    for vmm in &mut machines {
        let disk = image().into();
        vmm.request(Request::AttachBlock { slot: 0, read_only: true }, &[disk]).unwrap();
        assert_eq!(vmm.exit(), ExitReason::GuestReset);
        assert_eq!(vmm.whole_console(), "second\n");
    }
    assert!(saved.memory() == memory, "what they have written is their own");
}

/// Has the guest say its second word, and end.
fn end(vmm: &mut Vmm) {
    vmm.request(Request::AttachBlock { slot: 0, read_only: true }, &[image().into()]).unwrap();
    assert_eq!(vmm.exit(), ExitReason::GuestReset);
}

#[test]
fn a_machine_goes_on_after_it_was_saved_and_leaves_the_saved_one_alone() {
    if unable() {
        return;
    }
    let (saved, mut vmm) = Saved::begun();
    vmm.request(Request::Pause, &[]).unwrap();
    saved.save(&mut vmm).unwrap();
    let memory = saved.memory();
    vmm.request(Request::Resume, &[]).unwrap();
    vmm.request(Request::Pause, &[]).unwrap();
    let refusal = saved.save(&mut vmm).unwrap_err();
    assert!(refusal.contains("saved already"), "{refusal}");
    vmm.request(Request::Resume, &[]).unwrap();
    // It writes to memory after its second word.
    end(&mut vmm);
    assert_eq!(vmm.whole_console(), "first\nsecond\n");

    assert!(saved.memory() == memory, "what it has written since is its own");
    let share = tempfile::tempdir().unwrap();
    let (mut other, outcome) = saved.restore(described(), share.path());
    outcome.unwrap();
    other.request(Request::Resume, &[]).unwrap();
    end(&mut other);
    assert_eq!(other.whole_console(), "second\n");
}

#[test]
fn a_machine_that_is_to_be_saved_is_confined() {
    if unable() {
        return;
    }
    let (_saved, mut vmm) = Saved::begun();
    let tasks = format!("/proc/{}/task", vmm.pid());
    let filtered = fs::read_dir(tasks).unwrap().map(|task| {
        let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        status.lines().any(|line| line == "Seccomp:\t2")
    });
    let filtered: Vec<_> = filtered.collect();
    // The event loop, a vCPU, and those for files.
    assert!(filtered.len() >= 4 && filtered.iter().all(|filtered| *filtered), "{filtered:?}");
    end(&mut vmm);
}

#[test]
fn an_obstacle_is_named_and_the_machine_goes_on_and_is_saved_without_it() {
    if unable() {
        return;
    }
    let (saved, mut vmm) = Saved::begun();
    let refusal = saved.save(&mut vmm).unwrap_err();
    assert!(refusal.contains("are running"), "{refusal}");
    vmm.request(Request::AttachBlock { slot: 2, read_only: true }, &[image().into()]).unwrap();
    vmm.request(Request::Pause, &[]).unwrap();
    let refusal = saved.save(&mut vmm).unwrap_err();
    assert!(refusal.contains("while block slot 2 is filled"), "{refusal}");
    // A state that cannot be written is none.
    let full = File::options().write(true).open("/dev/full").unwrap();
    vmm.request(Request::DetachBlock { slot: 2 }, &[]).unwrap();
    let refusal = vmm.request(Request::Save, &[full.into(), read_only(&saved.memory).into()]).unwrap_err();
    assert!(refusal.contains("cannot write the state"), "{refusal}");
    vmm.request(Request::Resume, &[]).unwrap();
    vmm.request(Request::Pause, &[]).unwrap();
    saved.save(&mut vmm).unwrap();
    vmm.request(Request::Resume, &[]).unwrap();
    end(&mut vmm);
}

#[test]
fn what_is_not_the_same_is_named() {
    if unable() {
        return;
    }
    let saved = Saved::midway();
    let of = |name: &str, value: &str| [(name.to_owned(), value.to_owned())].into();
    for (config, expected) in [
        (VmConfig { vcpus: 1, max_vcpus: 2, ..described() }, "number of vCPUs: 1, not 2"),
        (VmConfig { max_memory_mib: 128, ..described() }, "size of memory, in MiB: 64, not 128"),
        (VmConfig { net_slots: 2, ..described() }, "network slots: 1, not 2"),
        (VmConfig { guest_cid: 4, ..described() }, "context id: 3, not 4"),
        (VmConfig { kernel_args: "quiet".into(), ..described() }, "command line: , not quiet"),
        (
            VmConfig { made_of: of("kernel", "of tomorrow"), ..described() },
            "kernel: of today, not of tomorrow",
        ),
        (VmConfig { made_of: of("image", "a"), ..described() }, "kernel: of today, not "),
        (
            VmConfig { memory_mib: 65, max_memory_mib: 65, ..described() },
            "memory at boot, in MiB: 64, not 65",
        ),
    ] {
        let refusal = saved.refusal(config);
        assert!(refusal.contains(expected), "{refusal:?} does not say {expected:?}");
    }
}

#[test]
fn a_state_that_is_damaged_and_a_memory_that_is_cut_are_refused() {
    if unable() {
        return;
    }
    let saved = Saved::midway();
    let whole = fs::read(saved.state.path()).unwrap();
    let read = |bytes: &[u8]| {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file.rewind().unwrap();
        Snapshot::read(file)
    };
    assert!(read(&whole).is_ok());
    for (index, _) in whole.iter().enumerate() {
        let mut damaged = whole.clone();
        damaged[index] ^= 1 << (index % 8);
        let error = read(&damaged).unwrap_err().to_string();
        assert!(error.contains("cannot be used"), "byte {index}: {error}");
    }
    for length in [0, 1, 23, 24, whole.len() - 1] {
        assert!(read(&whole[..length]).is_err(), "{length} bytes");
    }
    assert!(read(&[whole.as_slice(), b"x"].concat()).is_err());

    fs::write(saved.state.path(), &whole[..100]).unwrap();
    assert!(saved.refusal(described()).contains("cannot be used"));
    fs::write(saved.state.path(), &whole).unwrap();
    saved.memory.set_len(4096).unwrap();
    assert!(saved.refusal(described()).contains("4096 bytes, not 67108864"));
}

#[test]
fn what_a_machine_like_this_has_touched_is_there_before_it_does_and_a_wrong_word_of_it_does_no_harm() {
    if unable() {
        return;
    }
    let saved = Saved::midway();
    let share = tempfile::tempdir().unwrap();
    let pages = |first, written| Pages { first, count: 1000, written };
    let set = WorkingSet {
        answer: vec![pages(1000, true), pages(u32::MAX, true)],
        container: vec![pages(0, true), pages(2000, true), pages(u32::MAX, true)],
    };
    for (bytes, at_once, then) in [(set.to_bytes().unwrap(), 4000, 12_000), (b"nothing".to_vec(), 0, 0)] {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        file.rewind().unwrap();
        let (mut vmm, outcome) = saved.restore_with(described(), share.path(), &[file.as_fd()]);
        outcome.unwrap();
        let status = format!("/proc/{}/status", vmm.pid());
        // Its own memory: the file's is shared, and does not count.
        let own = || -> u64 {
            let status = fs::read_to_string(&status).unwrap();
            let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
            line.trim().strip_suffix(" kB").unwrap().parse().unwrap()
        };
        let built = own();
        assert!((at_once..at_once + 4000).contains(&built), "{built} KiB");
        vmm.request(Request::Resume, &[]).unwrap();
        vmm.request(Request::Prefetch, &[]).unwrap();
        vmm.request(Request::Prefetch, &[]).unwrap();
        let deadline = Instant::now() + PATIENCE;
        while own() < then {
            assert!(Instant::now() < deadline, "{} KiB", own());
        }
        vmm.request(Request::AttachBlock { slot: 0, read_only: true }, &[image().into()]).unwrap();
        vmm.wait_for_console("second\n");
        assert_eq!(vmm.exit(), ExitReason::GuestReset);
    }
}

#[test]
fn a_machine_that_runs_pods_cannot_be_saved() {
    if unable() {
        return;
    }
    let share = tempfile::tempdir().unwrap();
    let (mut vmm, outcome) = Vmm::build(config(), &elf(&COUNT_FOREVER), &image(), share.path());
    outcome.unwrap();
    let state = tempfile::tempfile().unwrap();
    let memory = read_only(&state);
    let refusal = vmm.request(Request::Save, &[state.into(), memory.into()]).unwrap_err();
    assert!(refusal.contains("as a template"), "{refusal}");
    let outcome = vmm.request(Request::Restore(config()), &[]);
    assert!(outcome.unwrap_err().contains("built already"));
}

/// A guest that keeps requests under way on all its devices at every moment: `tests/hostile-guest`. Disk, entropy, files and free
/// pages go on wherever it does. Its connection to the host and its frames on the link are echoed here: both lose nothing in the machine
/// that was saved; another one has to connect anew, and loses what was on the link, but nothing that waited for one.
mod diligent {
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;
    use std::thread::{self, JoinHandle};

    use super::*;
    use support::network::{cable, no_tap};

    const MIB: u32 = 128;

    /// Where the text of a frame begins, whose first word is the frame's number, above so many bits.
    const TEXT: usize = 20;
    const NUMBER_SHIFT: u64 = 8;

    /// Each word of it is its own offset.
    fn pattern(length: u64) -> Vec<u8> {
        (0..length).step_by(8).flat_map(u64::to_le_bytes).collect()
    }

    fn share() -> tempfile::TempDir {
        let share = tempfile::tempdir().unwrap();
        fs::write(share.path().join("data"), pattern(64 * 4096)).unwrap();
        share
    }

    /// How many requests the slowest slot of the guest has had answered, once it has said so.
    fn answered(console: &str) -> Option<u64> {
        let count = |line: &str| line.strip_prefix("diligent: ")?.split_once(" of ")?.0.parse().ok();
        console.lines().rev().find_map(count)
    }

    /// A machine with who echoes what its guest sends. They end when it does.
    struct Echoed {
        vmm: Vmm,
        echoes: Vec<JoinHandle<()>>,
    }

    impl Echoed {
        /// Gives the machine a link, on which frames come in order.
        fn plug_in(&mut self) {
            let cable = cable();
            self.vmm.request(Request::AttachNet { slot: 0 }, &[cable.tap.into()]).unwrap();
            let mut host = cable.host;
            self.echoes.push(thread::spawn(move || {
                let (mut frame, mut expected) = ([0; 2048], None);
                while let Ok(length) = host.read(&mut frame) {
                    let first = frame[TEXT..].first_chunk().copied().map(u64::from_le_bytes).unwrap();
                    let number = first >> NUMBER_SHIFT;
                    assert_eq!(number, *expected.get_or_insert(number), "the frame's number");
                    expected = Some(number + 1);
                    if host.write_all(&frame[..length]).is_err() {
                        break;
                    }
                }
            }));
        }

        /// Waits for the guest's connection.
        fn accept(&mut self) {
            let stream = UnixStream::from(self.vmm.accept(1024));
            stream.set_nonblocking(false).unwrap();
            self.echoes.push(thread::spawn(move || {
                // Until the machine is gone.
                let _ = std::io::copy(&mut &stream, &mut &stream);
            }));
        }

        /// Waits until every request slot of the guest has got many more answers.
        fn assert_goes_on(&self) {
            let (mut before, deadline) = (None, Instant::now() + PATIENCE);
            loop {
                let console = self.vmm.console();
                assert!(!console.contains("wrong: ") && Instant::now() < deadline, "{console}");
                if let Some(now) = answered(&console)
                    && now >= before.get_or_insert(now).saturating_add(100)
                {
                    return;
                }
                thread::sleep(Duration::from_millis(1));
            }
        }

        fn end(mut self) {
            assert!(self.vmm.status().reported_mib > 0, "free pages are taken back");
            self.vmm.request(Request::Shutdown, &[]).unwrap();
            assert_eq!(self.vmm.exit(), ExitReason::Requested);
            drop(self.vmm);
            self.echoes.into_iter().for_each(|echo| echo.join().unwrap());
        }
    }

    #[test]
    fn a_guest_with_requests_under_way_loses_none_where_it_goes_on() {
        let (Some(guest), false) = (hostile_guest(), unable() || no_tap()) else { return };
        let config =
            VmConfig { memory_mib: MIB, max_memory_mib: MIB, kernel_args: "diligent".into(), ..config() };
        let mut image = tempfile::tempfile().unwrap();
        image.write_all(&pattern(1024 * 512)).unwrap();
        let first = share();
        for _ in 0..5 {
            let (memory, mut state) = (memory_file(&config), tempfile::tempfile().unwrap());
            let guest = File::open(&guest).unwrap();
            let build = Request::BuildTemplate(config.clone());
            let (vmm, outcome) = Vmm::begin(build, [&guest, &image], first.path(), &[memory.as_fd()]);
            outcome.unwrap();
            let mut saved = Echoed { vmm, echoes: vec![] };
            saved.plug_in();
            saved.vmm.request(Request::Resume, &[]).unwrap();
            saved.accept();
            saved.assert_goes_on();
            saved.vmm.request(Request::Pause, &[]).unwrap();
            let files = [OwnedFd::from(state.try_clone().unwrap()), read_only(&memory).into()];
            saved.vmm.request(Request::Save, &files).unwrap();
            saved.vmm.request(Request::Resume, &[]).unwrap();
            saved.assert_goes_on();
            let console = saved.vmm.console();
            assert!(!console.contains(" lost"), "{console}");
            saved.end();

            // The file comes after the answer, as a pod's do.
            let second = tempfile::tempdir().unwrap();
            state.rewind().unwrap();
            let extra = [image.as_fd()];
            let restore = Request::Restore(config.clone());
            let (vmm, outcome) = Vmm::begin(restore, [&state, &memory], second.path(), &extra);
            outcome.unwrap();
            let mut restored = Echoed { vmm, echoes: vec![] };
            let refusal = restored.vmm.request(Request::Resume, &[]).unwrap_err();
            assert!(refusal.contains(r#""data""#), "{refusal}");
            fs::copy(first.path().join("data"), second.path().join("data")).unwrap();
            restored.vmm.request(Request::Resume, &[]).unwrap();
            restored.vmm.wait_for_console("link lost");
            restored.plug_in();
            restored.accept();
            restored.assert_goes_on();
            let console = restored.vmm.console();
            assert_eq!(console.matches("connection lost").count(), 1, "{console}");
            restored.end();
        }
    }
}
