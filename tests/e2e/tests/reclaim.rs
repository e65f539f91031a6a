//! Memory that a pod has used and needs no longer, back at the host: of a pod that goes on from a template, of one that has
//! booted, and of one that has grown, since each has its memory mapped in another way.

use std::time::Instant;

use mayu_e2e::configuration::Configuration;
use mayu_e2e::host::pss;
use mayu_e2e::shim::eventually;
use mayu_e2e::{Container, PYTHON, run};

const MIB: u64 = 1 << 20;

/// How much a pod may use at its peak that has no limit: less than it starts with.
const SMALL_PEAK: u64 = 128 * MIB;

/// And one that has a limit, most of it in memory that was plugged in.
const LARGE_PEAK: u64 = 512 * MIB;

/// A container of python that does nothing. What its programs need of their files is in the guest's cache, and stays there.
fn idle(flags: &[&str]) -> Container {
    let container = Container::detached(PYTHON, flags, &["sleep", "infinity"]);
    peak(&container, MIB);
    container
}

/// What the VMM has of the host's memory before a process has filled some and at the peak, in bytes, and when that process was told to
/// end, which it has.
struct Peak {
    before: u64,
    height: u64,
    over: Instant,
}

/// Has a process fill so many bytes and end.
fn peak(container: &Container, bytes: u64) -> Peak {
    let program = format!(
        "import os, time\n\
         memory = b'x' * {bytes}\n\
         assert memory.count(b'x') == {bytes}\n\
         open('/dev/shm/full', 'w').close()\n\
         while not os.path.exists('/dev/shm/enough'): time.sleep(0.1)\n\
         os.remove('/dev/shm/enough')\n\
         os.remove('/dev/shm/full')\n"
    );
    let before = pss(container.pid());
    run(&mut container.exec_command(&["--detach"], &["python3", "-c", &program])).success();
    let has = |path: &str| container.exec(&["test", "-e", path]).code == 0;
    eventually("memory is full", || has("/dev/shm/full"));
    let height = pss(container.pid());
    let over = Instant::now();
    container.script("touch /dev/shm/enough");
    eventually("the process has ended", || !has("/dev/shm/full"));
    Peak { before, height, over }
}

/// Peaks twice, the second time in memory that was taken back.
#[track_caller]
fn assert_goes_back(container: &Container, bytes: u64) {
    for _ in 0..2 {
        let Peak { before, height, over } = peak(container, bytes);
        let added = height - before;
        assert!(added > bytes / 10 * 9, "{} of {} MiB", added / MIB, bytes / MIB);
        eventually("nine tenths of it are the host's again", || pss(container.pid()) < before + added / 10);
        println!("{} MiB: nine tenths back within {:.1} s", added / MIB, over.elapsed().as_secs_f32());
    }
}

#[test]
fn what_a_pod_has_peaked_at_goes_back_to_the_host() {
    assert_goes_back(&idle(&[]), SMALL_PEAK);
}

#[test]
fn what_a_pod_has_grown_by_and_peaked_at_goes_back_to_the_host() {
    assert_goes_back(&idle(&["--memory-limit", &(LARGE_PEAK + 64 * MIB).to_string()]), LARGE_PEAK);
}

#[test]
fn what_a_pod_that_has_booted_has_peaked_at_goes_back_to_the_host() {
    let _configuration = Configuration::set("template", "enabled", "false");
    assert_goes_back(&idle(&[]), SMALL_PEAK);
}
