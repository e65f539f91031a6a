//! The whole process, as the shim sees it: what it refuses, how it is confined, and how it ends.

#![allow(clippy::panic, clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Seek as _, Write as _};
use std::num::NonZeroU64;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use mayu_vmm_api::{BLOCK_SLOTS, ExitReason, RateLimit, Request, VmConfig};
use nix::mount::{MsFlags, mount, umount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use support::network::{cable, no_tap};
use support::payload::{COUNT_FOREVER, RESET, elf, print};
use support::{PATIENCE, Vmm, config, image, unable};

fn build(config: VmConfig, kernel: &File) -> (Vmm, Result<(), String>) {
    Vmm::build(config, kernel, &image(), tempfile::tempdir().unwrap().path())
}

/// Starts a guest that counts forever, and returns the pid of its process too.
fn start(share: &Path) -> (Vmm, i32) {
    let (mut vmm, outcome) =
        Vmm::build(VmConfig { vcpus: 2, max_vcpus: 2, ..config() }, &elf(&COUNT_FOREVER), &image(), share);
    outcome.unwrap();
    let pid = vmm.pid();
    vmm.request(Request::Resume, &[]).unwrap();
    (vmm, pid)
}

#[test]
fn a_guest_prints_and_resets() {
    if unable() {
        return;
    }
    let (mut vmm, outcome) = build(config(), &elf(&[print("hello"), RESET.to_vec()].concat()));
    outcome.unwrap();
    vmm.request(Request::Resume, &[]).unwrap();
    assert_eq!(vmm.exit(), ExitReason::GuestReset);
    assert_eq!(vmm.whole_console(), "hello");
}

#[test]
fn what_cannot_be_built_is_refused_with_the_reason_and_ends_the_process() {
    if unable() {
        return;
    }
    let reset = || elf(&RESET);
    let mut garbage = tempfile::tempfile().unwrap();
    garbage.write_all(&[0; 4096]).unwrap();
    garbage.rewind().unwrap();
    let cases = [
        (VmConfig { memory_mib: 63, ..config() }, reset(), "at least 64"),
        (VmConfig { memory_mib: 65_537, ..config() }, reset(), "at most 65536"),
        (VmConfig { max_memory_mib: 63, ..config() }, reset(), "cannot end up with 63"),
        (VmConfig { max_memory_mib: 65_537, ..config() }, reset(), "64 to 65536 MiB are possible"),
        (VmConfig { vcpus: 0, ..config() }, reset(), "0 vCPUs"),
        (VmConfig { max_vcpus: 33, ..config() }, reset(), "1 to 32"),
        (VmConfig { vcpus: 3, max_vcpus: 2, ..config() }, reset(), "3 vCPUs in a machine that has 2"),
        (VmConfig { net_slots: 0, ..config() }, reset(), "0 network slots"),
        (VmConfig { net_slots: 9, ..config() }, reset(), "1 to 8"),
        (VmConfig { guest_cid: 2, ..config() }, reset(), "context id"),
        (VmConfig { uid: 0, ..config() }, reset(), "change its user"),
        (VmConfig { kernel_args: "x".repeat(2048), ..config() }, reset(), "command line"),
        (VmConfig { kernel_args: "a\nb".into(), ..config() }, reset(), "command line"),
        (config(), garbage, "no ELF file"),
    ];
    for (config, kernel, reason) in cases {
        let (mut vmm, outcome) = build(config, &kernel);
        let refusal = outcome.unwrap_err();
        assert!(refusal.contains(reason), "{refusal:?} does not say {reason:?}");
        vmm.wait_for_end();
    }
}

#[test]
fn the_process_has_no_privileges_and_sees_nothing_but_the_share() {
    if unable() {
        return;
    }
    let share = tempfile::tempdir().unwrap();
    fs::write(share.path().join("file"), "").unwrap();
    let (_vmm, pid) = start(share.path());
    let process = Path::new("/proc").join(pid.to_string());

    let namespaces = ["cgroup", "ipc", "mnt", "net", "pid", "user", "uts"];
    let own = |name: &&str| {
        let read = |process: &Path| fs::read_link(process.join("ns").join(name)).unwrap();
        read(&process) != read(Path::new("/proc/self"))
    };
    let separate: Vec<_> = namespaces.into_iter().filter(own).collect();
    assert_eq!(separate, ["ipc", "mnt", "net", "pid", "user", "uts"]);

    let root = process.join("root");
    assert_eq!(names(&root), ["proc", "share"]);
    assert_eq!(names(&root.join("share")), ["file"]);
    assert!(File::create(root.join("new")).is_err());

    for task in fs::read_dir(process.join("task")).unwrap() {
        let task = task.unwrap().path();
        let name = fs::read_to_string(task.join("comm")).unwrap();
        let status = status(&task);
        assert_eq!(status["Uid"], "65534\t65534\t65534\t65534", "{name}");
        assert_eq!(status["Gid"], "65534\t65534\t65534\t65534", "{name}");
        assert_eq!(status["Groups"], "", "{name}");
        assert_eq!(status["NoNewPrivs"], "1", "{name}");
        let capabilities = u64::from_str_radix(&status["CapEff"], 16).unwrap();
        let allowed = if name.starts_with("virtio-fs") { FILE_CAPABILITIES } else { 0 };
        assert_eq!(capabilities & !allowed, 0, "{name}");
    }
}

/// CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, FSETID, SETGID, SETUID, MKNOD, SETFCAP (linux/capability.h).
const FILE_CAPABILITIES: u64 = 0b1_1111 | 1 << 6 | 1 << 7 | 1 << 27 | 1 << 31;

/// A directory that is a shared mount, in a mount namespace of this thread's own.
fn shared_mount() -> tempfile::TempDir {
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_SLAVE | MsFlags::MS_REC, none).unwrap();
    let share = tempfile::tempdir().unwrap();
    mount(Some(share.path()), share.path(), none, MsFlags::MS_BIND, none).unwrap();
    mount(none, share.path(), none, MsFlags::MS_SHARED, none).unwrap();
    share
}

/// Mounts a tmpfs with a file in it.
fn mount_volume(directory: &Path) {
    fs::create_dir(directory).unwrap();
    mount(Some("tmpfs"), directory, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
    fs::write(directory.join("file"), "").unwrap();
}

fn share_inside(pid: i32) -> PathBuf {
    Path::new("/proc").join(pid.to_string()).join("root/share")
}

#[test]
fn what_is_mounted_in_the_share_later_appears_inside_and_goes_again() {
    if unable() {
        return;
    }
    let share = shared_mount();
    let (_vmm, pid) = start(share.path());
    let inside = share_inside(pid).join("volume");
    mount_volume(&share.path().join("volume"));
    assert_eq!(names(&inside), ["file"]);
    umount(&share.path().join("volume")).unwrap();
    assert!(names(&inside).is_empty());
}

#[test]
fn what_is_mounted_in_the_share_while_the_process_confines_itself_is_not_lost() {
    if unable() {
        return;
    }
    let share = shared_mount();
    let started = AtomicBool::new(false);
    let (vmm, volumes) = std::thread::scope(|scope| {
        let mounter = scope.spawn(|| {
            let mut volumes = Vec::new();
            while !started.load(Ordering::SeqCst) {
                volumes.push(format!("volume{}", volumes.len()));
                mount_volume(&share.path().join(volumes.last().unwrap()));
            }
            volumes
        });
        let vmm = start(share.path());
        started.store(true, Ordering::SeqCst);
        (vmm, mounter.join().unwrap())
    });
    assert!(!volumes.is_empty());
    for volume in volumes {
        assert_eq!(names(&share_inside(vmm.1).join(&volume)), ["file"], "{volume}");
    }
}

#[test]
fn memory_that_may_come_later_costs_nothing_and_can_be_asked_for() {
    if unable() {
        return;
    }
    let share = tempfile::tempdir().unwrap();
    let config = VmConfig { max_memory_mib: 65_536, ..config() };
    let (mut vmm, outcome) = Vmm::build(config, &elf(&COUNT_FOREVER), &image(), share.path());
    outcome.unwrap();
    let process = Path::new("/proc").join(vmm.pid().to_string());
    vmm.request(Request::Resume, &[]).unwrap();
    vmm.request(Request::ResizeMemory { memory_mib: 128 }, &[]).unwrap();
    let refusal = vmm.request(Request::ResizeMemory { memory_mib: 63 }, &[]).unwrap_err();
    assert!(refusal.contains("64 to 65536 MiB"), "{refusal}");
    // This guest has no driver.
    assert_eq!(vmm.status().plugged_mib, 0);
    assert!(vmm.status().device_errors.contains_key("memory"));
    let resident: u64 = status(&process)["VmRSS"].strip_suffix(" kB").unwrap().parse().unwrap();
    assert!(resident < 64 << 10, "{resident} KiB");
}

#[test]
fn a_vcpu_is_a_thread_from_when_on_the_guest_may_use_it_and_sleeps_until_it_does() {
    if unable() {
        return;
    }
    let share = tempfile::tempdir().unwrap();
    let config = VmConfig { vcpus: 1, max_vcpus: 4, ..config() };
    let (mut vmm, outcome) = Vmm::build(config, &elf(&COUNT_FOREVER), &image(), share.path());
    outcome.unwrap();
    let process = Path::new("/proc").join(vmm.pid().to_string());
    let sleepers = || -> Vec<_> {
        let tasks = fs::read_dir(process.join("task")).unwrap().map(|task| task.unwrap().path());
        let name = |task: &PathBuf| fs::read_to_string(task.join("comm")).unwrap().trim().to_owned();
        tasks.filter(|task| ["vcpu1", "vcpu2", "vcpu3"].contains(&name(task).as_str())).collect()
    };
    // One while the machine stands, the others while it runs; of those that are there already none is started again.
    vmm.request(Request::StartVcpus { vcpus: 2 }, &[]).unwrap();
    assert_eq!(sleepers().len(), 1);
    vmm.request(Request::Resume, &[]).unwrap();
    vmm.request(Request::StartVcpus { vcpus: 4 }, &[]).unwrap();
    vmm.request(Request::StartVcpus { vcpus: 1 }, &[]).unwrap();
    let refusal = vmm.request(Request::StartVcpus { vcpus: 5 }, &[]).unwrap_err();
    assert!(refusal.contains("the machine has 4"), "{refusal}");
    let mut sleepers = sleepers();
    assert_eq!(sleepers.len(), 3);
    // All of them come to rest: asleep, and on no processor between two looks.
    let look = |task: &Path| {
        let status = status(task);
        (status["State"].starts_with('S'), status["voluntary_ctxt_switches"].clone())
    };
    let deadline = Instant::now() + PATIENCE;
    while let Some(task) = sleepers.pop() {
        assert!(Instant::now() < deadline, "{} does not sleep", task.display());
        let (before, after) = (look(&task), look(&task));
        if !before.0 || before != after {
            sleepers.push(task);
        }
    }
    // They obey all the same.
    vmm.request(Request::Pause, &[]).unwrap();
    vmm.request(Request::Resume, &[]).unwrap();
    assert!(vmm.status().running);
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn status(task: &Path) -> BTreeMap<String, String> {
    let text = fs::read_to_string(task.join("status")).unwrap();
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(key, value)| (key.to_owned(), value.trim().to_owned()))
        .collect()
}

#[test]
fn requests_that_make_no_sense_are_refused_and_harm_nothing() {
    if unable() {
        return;
    }
    let (mut vmm, _) = start(tempfile::tempdir().unwrap().path());
    let build = vmm.request(Request::Build(config()), &[]).unwrap_err();
    assert!(build.contains("built already"), "{build}");
    let resume = vmm.request(Request::Resume, &[]).unwrap_err();
    assert!(resume.contains("are running"), "{resume}");
    let attach = vmm.request(Request::AttachBlock { slot: 0, read_only: true }, &[]).unwrap_err();
    assert!(attach.contains("0 descriptors, not 1"), "{attach}");
    let detach = vmm.request(Request::DetachBlock { slot: 9 }, &[]).unwrap_err();
    assert!(detach.contains("no block slot 9"), "{detach}");
    vmm.request(Request::AttachBlock { slot: 3, read_only: true }, &[image().into()]).unwrap();
    vmm.request(Request::DetachBlock { slot: 3 }, &[]).unwrap();
    let attach = vmm.request(Request::AttachNet { slot: 1 }, &[image().into()]).unwrap_err();
    assert!(attach.contains("no network slot 1, only 1"), "{attach}");
    let attach = vmm.request(Request::AttachNet { slot: 0 }, &[image().into()]).unwrap_err();
    assert!(attach.contains("not of a usable TAP device"), "{attach}");
    let resize = vmm.request(Request::ResizeMemory { memory_mib: 65 }, &[]).unwrap_err();
    assert!(resize.contains("cannot have 65 MiB of memory, but 64 to 64 MiB"), "{resize}");
    vmm.request(Request::ResizeMemory { memory_mib: 64 }, &[]).unwrap();
    vmm.request(Request::Pause, &[]).unwrap();
    assert!(!vmm.status().running);
    vmm.request(Request::Resume, &[]).unwrap();
    assert!(vmm.status().running);
    vmm.request(Request::Shutdown, &[]).unwrap();
    assert_eq!(vmm.exit(), ExitReason::Requested);
}

#[test]
fn a_tap_from_another_network_namespace_is_taken_without_privileges_and_once() {
    if unable() || no_tap() {
        return;
    }
    let share = tempfile::tempdir().unwrap();
    let config = VmConfig { net_slots: 8, ..config() };
    let (mut vmm, outcome) = Vmm::build(config, &elf(&COUNT_FOREVER), &image(), share.path());
    outcome.unwrap();
    let tap = OwnedFd::from(cable().tap);
    vmm.request(Request::AttachNet { slot: 7 }, &[tap.try_clone().unwrap()]).unwrap();
    let again = vmm.request(Request::AttachNet { slot: 7 }, &[tap]).unwrap_err();
    assert!(again.contains("network slot 7 has a TAP device already"), "{again}");
    vmm.request(Request::Resume, &[]).unwrap();
    let names: Vec<_> =
        vmm.status().device_errors.into_keys().filter(|name| name.starts_with("net")).collect();
    assert_eq!(names, ["net0", "net1", "net2", "net3", "net4", "net5", "net6", "net7"]);
}

#[test]
fn each_direction_and_disk_that_is_limited_has_a_timer() {
    if unable() {
        return;
    }
    let limited = RateLimit { bandwidth: NonZeroU64::new(1_000_000), operations: None, burst_ms: 1000 };
    let slots = usize::from(BLOCK_SLOTS);
    for (net_limit, block_limit, expected) in [
        (RateLimit::default(), RateLimit::default(), 0),
        (limited, RateLimit::default(), 2 * 8),
        (RateLimit::default(), limited, slots),
    ] {
        let share = tempfile::tempdir().unwrap();
        let config = VmConfig { net_slots: 8, net_limit, block_limit, ..config() };
        let (mut vmm, outcome) = Vmm::build(config, &elf(&COUNT_FOREVER), &image(), share.path());
        outcome.unwrap();
        let descriptors = fs::read_dir(format!("/proc/{}/fd", vmm.pid())).unwrap();
        let targets = descriptors.filter_map(|entry| fs::read_link(entry.unwrap().path()).ok());
        let timers = targets.filter(|target| target.to_str() == Some("anon_inode:[timerfd]")).count();
        assert_eq!(timers, expected);
    }
}

#[test]
fn the_process_ends_with_the_control_socket() {
    if unable() {
        return;
    }
    let (vmm, pid) = start(tempfile::tempdir().unwrap().path());
    vmm.hang_up();
    let pid = nix::unistd::Pid::from_raw(pid);
    assert_eq!(waitpid(pid, None).unwrap(), WaitStatus::Exited(pid, 0));
}

#[test]
fn a_message_that_is_none_ends_the_machine() {
    if unable() {
        return;
    }
    let (mut vmm, _) = start(tempfile::tempdir().unwrap().path());
    vmm.send_raw(b"{}");
    let ExitReason::Failed(reason) = vmm.exit() else { panic!("not a failure") };
    assert!(reason.contains("malformed frame"), "{reason}");
}

/// Not a test: the shim of the test below, in a process of its own.
#[test]
#[ignore = "run by the_process_dies_with_the_shim"]
fn a_shim_that_waits_to_be_killed() {
    let (mut vmm, pid) = start(tempfile::tempdir().unwrap().path());
    // Holds the control socket for longer than this process lives, so that its end is not what ends the machine.
    #[allow(clippy::zombie_processes)]
    let holder = Command::new("sleep").arg("60").stdin(vmm.control_socket()).spawn().unwrap();
    println!("\nmachine {pid} holder {}", holder.id());
    vmm.wait_for_end();
}

#[test]
fn the_process_dies_with_the_shim() {
    if unable() {
        return;
    }
    nix::sys::prctl::set_child_subreaper(true).unwrap();
    let mut shim = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "a_shim_that_waits_to_be_killed", "--nocapture"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(shim.stdout.take().unwrap()).lines();
    let line = lines.map(Result::unwrap).find(|line| line.starts_with("machine")).unwrap();
    let pids: Vec<_> =
        line.split(' ').filter_map(|word| word.parse().ok()).map(nix::unistd::Pid::from_raw).collect();

    shim.kill().unwrap();
    shim.wait().unwrap();

    let end = waitpid(pids[0], None).unwrap();
    kill(pids[1], Signal::SIGKILL).unwrap();
    waitpid(pids[1], None).unwrap();
    assert_eq!(end, WaitStatus::Signaled(pids[0], Signal::SIGKILL, false));
}
