//! Boots Linux to its init, with the kernel and image that `MAYU_TEST_KERNEL` and `MAYU_TEST_IMAGE` name. The init
//! has to connect to the host's port 1024 and to write a line, as the agent does.

#![allow(clippy::panic, clippy::unwrap_used)]

mod support;

use std::io::{BufRead as _, BufReader};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use mayu_vmm_api::{ExitReason, Request, VmConfig};
use support::{PATIENCE, Vmm, config, guest_files};

/// Boots a machine and returns it together with its init's stream, or nothing where that cannot work.
fn boot(config: VmConfig) -> Option<(Vmm, BufReader<UnixStream>)> {
    let (kernel, image) = guest_files()?;
    let share = tempfile::tempdir().unwrap();
    std::fs::write(share.path().join("hello"), "hello from the share\n").unwrap();
    let (mut vmm, outcome) = Vmm::build(config, &kernel, &image, share.path());
    outcome.unwrap();
    vmm.request(Request::Resume, &[]).unwrap();
    let stream = UnixStream::from(vmm.accept(1024));
    stream.set_nonblocking(false).unwrap();
    Some((vmm, BufReader::new(stream)))
}

fn boots(vcpus: u8, memory_mib: u32) {
    let config = VmConfig { vcpus, max_vcpus: vcpus, memory_mib, max_memory_mib: memory_mib, ..config() };
    boots_with(config);
}

fn boots_with(config: VmConfig) {
    let (vcpus, memory_mib) = (config.vcpus, config.memory_mib);
    let Some((mut vmm, mut stream)) = boot(VmConfig { kernel_args: "loglevel=7".to_owned(), ..config })
    else {
        return;
    };
    let mut line = String::new();
    stream.read_line(&mut line).unwrap();
    let status = vmm.status();
    vmm.request(Request::Shutdown, &[]).unwrap();
    let reason = vmm.exit();
    let console = vmm.whole_console();
    println!("{vcpus} vCPUs, {memory_mib} MiB: guest entry after {:?} us\n{console}", status.guest_entry_us);

    assert!(line.starts_with('{'), "{line}");
    assert!(console.contains(&format!("Brought up 1 node, {vcpus} CPU")), "{console}");
    assert!(status.guest_entry_us.is_some());
    assert!(status.running);
    assert!(status.device_errors.values().all(|errors| *errors == 0), "{:?}", status.device_errors);
    assert_eq!(reason, ExitReason::Requested);
}

#[test]
fn one_vcpu_and_the_least_memory() {
    boots(1, 64);
}

#[test]
fn two_vcpus_and_256_mib() {
    boots(2, 256);
}

#[test]
fn four_vcpus_and_memory_beyond_the_gap() {
    boots(4, 4096);
}

#[test]
fn as_many_vcpus_as_the_guest_is_to_boot_with() {
    boots_with(VmConfig { vcpus: 2, max_vcpus: 8, memory_mib: 256, max_memory_mib: 256, ..config() });
}

#[test]
fn every_network_slot() {
    boots_with(VmConfig { net_slots: 8, max_memory_mib: 1024, ..config() });
}

#[test]
fn memory_grows_and_shrinks_while_linux_runs() {
    let config = VmConfig { memory_mib: 128, max_memory_mib: 640, ..config() };
    let Some((mut vmm, _stream)) = boot(config) else { return };
    let mut resize = |memory_mib, reached: fn(u32) -> bool| {
        vmm.request(Request::ResizeMemory { memory_mib }, &[]).unwrap();
        let deadline = Instant::now() + PATIENCE;
        while !reached(vmm.status().plugged_mib) {
            assert!(Instant::now() < deadline, "{:?}\n{}", vmm.status(), vmm.console());
        }
    };
    resize(300, |plugged_mib| plugged_mib == 172);
    resize(640, |plugged_mib| plugged_mib == 512);
    // What holds memory of the kernel itself may stay.
    resize(128, |plugged_mib| plugged_mib <= 256);
    resize(640, |plugged_mib| plugged_mib == 512);
    assert!(vmm.status().device_errors.values().all(|errors| *errors == 0));
    vmm.request(Request::Shutdown, &[]).unwrap();
    assert_eq!(vmm.exit(), ExitReason::Requested);
}

#[test]
fn a_pause_at_any_moment_of_the_boot_goes_unnoticed() {
    let Some((kernel, image)) = guest_files() else { return };
    let share = tempfile::tempdir().unwrap();
    let config = VmConfig { vcpus: 2, max_vcpus: 2, memory_mib: 128, max_memory_mib: 128, ..config() };
    let (mut vmm, outcome) = Vmm::build(config, &kernel, &image, share.path());
    outcome.unwrap();
    for _ in 0..50 {
        vmm.request(Request::Resume, &[]).unwrap();
        vmm.request(Request::Pause, &[]).unwrap();
    }
    vmm.request(Request::Resume, &[]).unwrap();
    vmm.accept(1024);
    vmm.request(Request::Shutdown, &[]).unwrap();
    assert_eq!(vmm.exit(), ExitReason::Requested);
}

#[test]
fn a_kernel_panic_is_on_the_console_and_ends_the_machine() {
    let Some((kernel, image)) = guest_files() else { return };
    let share = tempfile::tempdir().unwrap();
    let kernel_args = "init=/nowhere".to_owned();
    let (mut vmm, outcome) = Vmm::build(VmConfig { kernel_args, ..config() }, &kernel, &image, share.path());
    outcome.unwrap();
    vmm.request(Request::Resume, &[]).unwrap();
    assert_eq!(vmm.exit(), ExitReason::GuestReset);
    let console = vmm.whole_console();
    assert!(console.contains("Kernel panic"), "{console}");
}

/// Prints what each stage of a quiet boot takes. To be run in the lab's exact mode.
#[test]
fn stages_of_a_boot() {
    let start = Instant::now();
    let Some((mut vmm, mut stream)) = boot(VmConfig { memory_mib: 256, max_memory_mib: 256, ..config() })
    else {
        return;
    };
    let connected = start.elapsed();
    let mut line = String::new();
    stream.read_line(&mut line).unwrap();
    let entry = Duration::from_micros(vmm.status().guest_entry_us.unwrap());
    println!("process start to guest entry: {entry:?}");
    println!("memory of the process beside the guest's: {} KiB private", private_kib(vmm.pid(), 256 * 1024));
    println!("start of the test to the init's connection: {connected:?}");
    vmm.request(Request::Shutdown, &[]).unwrap();
    vmm.exit();
    println!("to the end: {:?}; the init said {line}{}", start.elapsed(), vmm.whole_console());
}

/// Private memory of a process in KiB, without mappings of `guest_kib` or more, from its smaps (proc(5)).
fn private_kib(pid: i32, guest_kib: u64) -> u64 {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let (mut is_guest, mut sum) = (false, 0);
    for line in smaps.lines() {
        let Some((key, value)) = line.split_once(':') else { continue };
        let kib = value.trim().trim_end_matches(" kB").parse().unwrap_or(0);
        match key {
            "Size" => is_guest = kib >= guest_kib,
            "Private_Clean" | "Private_Dirty" if !is_guest => sum += kib,
            _ => {}
        }
    }
    sum
}

#[test]
fn thirty_two_vcpus() {
    boots(32, 512);
}
