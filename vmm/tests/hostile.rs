//! A guest that attacks every device from the other side of a real KVM: `tests/hostile-guest`.

#![allow(clippy::panic, clippy::unwrap_used)]

mod support;

use std::fs::{self, File};
use std::thread;
use std::time::{Duration, Instant};

use mayu_vmm_api::{Request, VmConfig};
use support::{Vmm, config, hostile_guest, hostile_seconds};

const GUEST_MIB: u32 = 128;

/// What a VMM may have for itself, whatever its guest does.
const OWN_KIB: u64 = 64 << 10;

/// A line of /proc/<pid>/status that is a number.
fn status(pid: i32, field: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn a_machine_under_attack_answers_counts_and_stays_small() {
    let Some(guest) = hostile_guest() else { return };
    let parent = tempfile::tempdir().unwrap();
    let share = parent.path().join("share");
    fs::create_dir(&share).unwrap();
    for file in [share.join("inside"), parent.path().join("beside")] {
        fs::write(file, "untouched").unwrap();
    }
    let image = tempfile::tempfile().unwrap();
    image.set_len(1 << 20).unwrap();
    let machine = VmConfig { memory_mib: GUEST_MIB, max_memory_mib: GUEST_MIB, ..config() };
    let (mut vmm, built) = Vmm::build(machine, &File::open(guest).unwrap(), &image, &share);
    built.unwrap();
    let pid = vmm.pid();
    let threads = status(pid, "Threads");

    vmm.request(Request::Resume, &[]).unwrap();
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(hostile_seconds()) {
        vmm.status();
        assert!(status(pid, "VmRSS") < u64::from(GUEST_MIB << 10) + OWN_KIB);
        thread::sleep(Duration::from_secs(1));
    }

    // Block devices start a thread when they are used first.
    assert!(status(pid, "Threads") <= threads + 16);
    let errors = vmm.status().device_errors;
    assert!(errors.values().filter(|count| **count > 0).count() >= 3, "{errors:?}");
    let console = vmm.console();
    assert!(console.contains("hostile: "), "it does not run: {console:?}");
    eprintln!("{}, {errors:?}", console.rsplit("hostile: ").next().unwrap().lines().next().unwrap());
    assert_eq!(fs::read_to_string(parent.path().join("beside")).unwrap(), "untouched");
}
