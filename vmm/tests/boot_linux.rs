//! Boots Linux to its init, with the kernel and image that `MAYU_TEST_KERNEL` and `MAYU_TEST_IMAGE` name. The init
//! has to connect to the host's port 1024 and to write a line, as the agent does.

#![allow(clippy::panic, clippy::unwrap_used)]

mod support;

use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::os::unix::net::UnixStream;
use std::path::Path;

use mayu_vmm_api::{ExitReason, Request, VmConfig};
use support::{Vmm, config, file_from_environment, no_kvm, skip};

/// Boots a machine and returns it together with its init's stream, or nothing where that cannot work.
fn boot(config: VmConfig) -> Option<(Vmm, BufReader<UnixStream>)> {
    let files = file_from_environment("MAYU_TEST_KERNEL")
        .and_then(|kernel| Ok((kernel, file_from_environment("MAYU_TEST_IMAGE")?)));
    let (kernel, image) = match (no_kvm(), files) {
        (None, Ok(files)) => files,
        (Some(reason), _) | (None, Err(reason)) => {
            skip(&reason);
            return None;
        }
    };
    let share = tempfile::tempdir().unwrap();
    std::fs::write(share.path().join("hello"), "hello from the share\n").unwrap();
    let (mut vmm, outcome) = Vmm::build(config, &open(&kernel), &open(&image), share.path());
    outcome.unwrap();
    vmm.request(Request::Resume, &[]).unwrap();
    let stream = UnixStream::from(vmm.accept(1024));
    stream.set_nonblocking(false).unwrap();
    Some((vmm, BufReader::new(stream)))
}

fn open(path: &Path) -> File {
    File::open(path).unwrap()
}

fn boots(vcpus: u8, memory_mib: u32) {
    let kernel_args = "loglevel=7".to_owned();
    let Some((mut vmm, mut stream)) = boot(VmConfig { vcpus, memory_mib, kernel_args, ..config() }) else {
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
    assert!(console.contains(&format!("{vcpus} CPU")), "{console}");
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
