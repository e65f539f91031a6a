//! What a pod needs of its host is taken away or used up, in each phase: a request may fail, with a reason; the pod can be removed,
//! leaves nothing, and no other notices.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use k8s_cri::v1::LinuxPodSandboxConfig;
use mayu_e2e::cri::for_privileged;
use mayu_e2e::host::{Process, descriptors};
use mayu_e2e::mount::HostMount;
use mayu_e2e::run;
use nix::errno::Errno;
use nix::fcntl::posix_fallocate;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statvfs::statvfs;
use nix::sys::time::{TimeSpec, TimeValLike as _};
use nix::time::{ClockId, clock_settime};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use tonic::Status;

use super::phases::{Moment, Phase, Scene, assert_whole, in_every_phase};

/// `strerror(ENOSPC)`.
const NO_SPACE: &str = "No space left on device";

/// Longer than all deadlines.
const JUMP: Duration = Duration::from_secs(2 * 3600);

/// The request may have failed.
fn answered(phase: Phase, _scene: &Scene, answer: Result<(), Status>) {
    if let Err(error) = answer {
        assert!(!error.message().is_empty(), "{phase:?}");
    }
}

/// The request has failed for this reason in this phase, and may have in others.
fn felt_in(felt: Phase, reason: &str) -> impl Fn(Phase, &Scene, Result<(), Status>) {
    move |phase, scene, answer| {
        if phase == felt {
            let error = answer.as_ref().expect_err("it has to fail");
            assert!(error.message().contains(reason), "{phase:?}: {error}");
        }
        answered(phase, scene, answer);
    }
}

/// The request has not failed, and the pod is as it would be.
fn unmoved(phase: Phase, scene: &Scene, answer: Result<(), Status>) {
    if let Err(error) = answer {
        panic!("{phase:?}: {error}");
    }
    if !matches!(phase, Phase::StopPodSandbox | Phase::RemovePodSandbox) {
        scene.pods().iter_mut().for_each(assert_whole);
    }
}

/// Uses up all the room of a file system on a disk, as long as it lives.
struct Filler(PathBuf);

impl Filler {
    fn new(directory: &Path) -> Self {
        let path = directory.join("filler");
        let file = File::create_new(&path).unwrap();
        // In ever smaller pieces, for the file system's own tables grow with it.
        let (mut length, mut piece) = (0, 1 << 32);
        while piece >= 4096 {
            match posix_fallocate(&file, length, piece) {
                Ok(()) => length += piece,
                Err(Errno::ENOSPC) => piece /= 2,
                Err(error) => panic!("{error}"),
            }
        }
        Self(path)
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        fs::remove_file(&self.0).unwrap();
    }
}

/// A tmpfs(5) has no more room than what is used of it, as long as this lives.
struct Shrunk {
    path: &'static Path,
    size: u64,
}

impl Shrunk {
    fn new(path: &'static str) -> Self {
        let before = statvfs(path).unwrap();
        let shrunk = Self { path: Path::new(path), size: before.blocks() * before.block_size() };
        shrunk.set_size((before.blocks() - before.blocks_free()) * before.block_size());
        shrunk
    }

    fn set_size(&self, size: u64) {
        let options = format!("size={size}");
        mount(None::<&str>, self.path, None::<&str>, MsFlags::MS_REMOUNT, Some(&options[..])).unwrap();
    }
}

impl Drop for Shrunk {
    fn drop(&mut self) {
        self.set_size(self.size);
    }
}

/// The host's wall clock is wrong, as long as this lives.
struct WrongTime;

impl WrongTime {
    fn new() -> Self {
        set_clock(SystemTime::now() + JUMP);
        Self
    }
}

impl Drop for WrongTime {
    fn drop(&mut self) {
        set_clock(SystemTime::now() - JUMP);
    }
}

fn set_clock(time: SystemTime) {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap();
    clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::nanoseconds(since.as_nanos().try_into().unwrap()))
        .unwrap();
}

/// No descriptor more than it has.
fn take_descriptors(process: Option<Process>) {
    let Some(process) = process else { return };
    let now = Some(descriptors(process.pid) as u64);
    let pid = Pid::from_raw(process.pid.cast_signed());
    prlimit(pid, Resource::Nofile, Rlimit { current: now, maximum: now }).unwrap();
}

#[test]
fn the_disk_is_full() {
    // That of the images, of what containers write, of containerd's own records and of the logs.
    let fill = |_: &Scene| Filler::new(Path::new("/var/lib/containerd"));
    let judge = felt_in(Phase::Running, NO_SPACE);
    in_every_phase(&LinuxPodSandboxConfig::default(), Moment::Before, fill, judge);
}

#[test]
fn the_file_system_of_the_state_is_full() {
    // One of its own, for containerd's state is beside it.
    let state = Path::new("/run/mayu");
    fs::create_dir_all(state).unwrap();
    let _own = HostMount::tmpfs(state, "mode=711");
    let judge = felt_in(Phase::RunPodSandbox, NO_SPACE);
    in_every_phase(&LinuxPodSandboxConfig::default(), Moment::Before, |_| Shrunk::new("/run/mayu"), judge);
}

#[test]
fn the_shim_has_no_more_descriptors() {
    let take = |scene: &Scene| take_descriptors(scene.shim());
    in_every_phase(&LinuxPodSandboxConfig::default(), Moment::Midway, take, answered);
}

#[test]
fn the_vmm_has_no_more_descriptors() {
    let take = |scene: &Scene| take_descriptors(scene.vmm());
    in_every_phase(&LinuxPodSandboxConfig::default(), Moment::Midway, take, answered);
}

#[test]
fn the_network_namespace_is_deleted() {
    let delete = |scene: &Scene| {
        for name in scene.networks() {
            // The pod may be quicker.
            let _ = run(Command::new("ip").args(["netns", "delete", &name]));
        }
    };
    in_every_phase(&LinuxPodSandboxConfig::default(), Moment::Midway, delete, answered);
}

#[test]
fn the_network_device_is_deleted() {
    let delete = |scene: &Scene| {
        for name in scene.networks() {
            let links = run(Command::new("ip").args(["-n", &name, "-brief", "link"])).text();
            let names = links.lines().filter_map(|line| line.split([' ', '@']).next());
            for tap in names.filter(|link| link.starts_with("mayu")) {
                let _ = run(Command::new("ip").args(["-n", &name, "link", "delete", tap]));
            }
        }
    };
    in_every_phase(&LinuxPodSandboxConfig::default(), Moment::Midway, delete, answered);
}

#[test]
fn the_share_is_unmounted() {
    let unmount = |scene: &Scene| {
        for path in scene.mounts() {
            // It may have gone with another one.
            let _ = umount2(&path, MntFlags::MNT_DETACH);
        }
    };
    in_every_phase(&LinuxPodSandboxConfig::default(), Moment::Midway, unmount, answered);
}

#[test]
fn the_clock_jumps() {
    in_every_phase(&LinuxPodSandboxConfig::default(), Moment::Midway, |_| WrongTime::new(), unmoved);
}

#[test]
fn the_guest_has_no_more_memory() {
    // The guest's kernel ends whoever has most of it.
    in_every_phase(&for_privileged(), Moment::Midway, |scene| scene.sabotage("tail /dev/zero"), unmoved);
}
