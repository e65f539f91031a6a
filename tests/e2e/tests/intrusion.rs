//! Whoever has taken over a VMM has its pod, and nothing else.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Stdio;

use mayu_agent_api::{FORWARD_PORT, RPC_PORT, STREAM_PORT};
use mayu_e2e::configuration::Configuration;
use mayu_e2e::host::{Traces, process_status, processes_named};
use mayu_e2e::intruder::{Answer, Intruder};
use mayu_e2e::mount::LoopDevice;
use mayu_e2e::shim::eventually;
use mayu_e2e::{BUSYBOX, Container, PYTHON};
use nix::errno::Errno;
use nix::libc;
use nix::sys::signal::Signal;
use nix::sys::stat::{Mode, SFlag, makedev, mknod};

/// The threads that serve files: those that may do the most.
const FILES: &str = "virtio-fs";

/// What `openat` takes for the working directory.
const HERE: u64 = libc::AT_FDCWD as u64;

fn open(intruder: &Intruder, path: &str, flags: i32) -> Answer {
    let path = intruder.text(path);
    intruder.call(libc::SYS_openat, [HERE, path, flags as u64, 0, 0, 0])
}

/// What a directory of the VMM has in it.
fn list(intruder: &Intruder, path: &str) -> String {
    let Answer::Value(directory) = open(intruder, path, libc::O_DIRECTORY) else {
        panic!("{path} is no directory")
    };
    let call = [directory, intruder.scratch(), 2048, 0, 0, 0];
    let Answer::Value(length) = intruder.call(libc::SYS_getdents64, call) else {
        panic!("{path} has no entries")
    };
    String::from_utf8_lossy(&intruder.read(length as usize)).into_owned()
}

/// A directory with whatever leads out of directories.
fn ways_out(disk: &Path) -> tempfile::TempDir {
    let volume = tempfile::tempdir_in("/var/tmp").unwrap();
    symlink("/etc/shadow", volume.path().join("link")).unwrap();
    symlink("../../../../../../../../etc/shadow", volume.path().join("relative")).unwrap();
    let disk = nix::sys::stat::stat(disk).unwrap().st_rdev;
    let everybody = Mode::from_bits_truncate(0o666);
    mknod(&volume.path().join("disk"), SFlag::S_IFBLK, everybody, disk).unwrap();
    mknod(&volume.path().join("kmsg"), SFlag::S_IFCHR, everybody, makedev(1, 11)).unwrap();
    fs::write(volume.path().join("own"), "the pod's").unwrap();
    volume
}

#[test]
fn the_threads_for_files_reach_the_share_and_no_more() {
    let disk = LoopDevice::new(1 << 20);
    let volume = ways_out(disk.path());
    let neighbour = Container::idle(&[]);
    let mount = format!("type=bind,src={},dst=/volume,options=rbind:rw", volume.path().display());
    let container = Container::idle(&["--mount", &mount]);
    let intruder = Intruder::of(container.pid(), FILES);

    let share = list(&intruder, "/share");
    assert!(share.contains(container.id()) && !share.contains(neighbour.id()), "{share}");
    let volume = format!("/share/{}/mounts/0", container.id());
    assert!(matches!(open(&intruder, &format!("{volume}/own"), libc::O_RDWR), Answer::Value(_)));

    let elsewhere = [
        "/",
        "/proc",
        "/proc/1/root",
        "/proc/self/cwd",
        "/etc/shadow",
        "/run/mayu",
        "/run/containerd/containerd.sock",
        "/dev/kvm",
        "/sys/fs/cgroup",
        "/share/..",
        "/share/../../etc/shadow",
    ];
    let inside = ["link", "relative", "disk", "kmsg"].map(|name| format!("{volume}/{name}"));
    for path in elsewhere.into_iter().map(str::to_owned).chain(inside) {
        for flags in [libc::O_RDONLY, libc::O_RDWR] {
            let answer = open(&intruder, &path, flags | libc::O_NONBLOCK);
            let refused = [Errno::EACCES, Errno::ENOENT, Errno::EISDIR, Errno::ENXIO, Errno::EROFS];
            assert!(
                matches!(answer, Answer::Refused(error) if refused.contains(&error)),
                "{path}: {answer:?}"
            );
        }
    }

    for (kind, device) in [(libc::S_IFBLK, makedev(7, 0)), (libc::S_IFCHR, makedev(1, 1))] {
        let path = intruder.text(&format!("{volume}/new"));
        let answer = intruder.call(libc::SYS_mknodat, [HERE, path, u64::from(kind | 0o666), device, 0, 0]);
        assert!(matches!(answer, Answer::Refused(Errno::EPERM | Errno::EACCES)), "{answer:?}");
    }

    drop(intruder);
    assert_eq!(container.script("cat /volume/own"), "the pod's", "the VMM goes on");
    assert_eq!(neighbour.script("echo here"), "here");
}

#[test]
fn whoever_asks_for_more_has_asked_for_the_last_time() {
    let neighbour = Container::idle(&[]);
    let victim = u64::from(neighbour.pid());
    let stream = [libc::AF_UNIX as u64, libc::SOCK_STREAM as u64, 0, 0, 0, 0];
    let table = [
        ("connect", "mayu-vmm", libc::SYS_socket, stream),
        ("open", "vcpu", libc::SYS_openat, [HERE, 0, 0, 0, 0, 0]),
        ("trace", FILES, libc::SYS_ptrace, [libc::PTRACE_ATTACH.into(), victim, 0, 0, 0, 0]),
        ("signal", FILES, libc::SYS_kill, [victim, libc::SIGKILL as u64, 0, 0, 0, 0]),
        ("execute", FILES, libc::SYS_execve, [0; 6]),
    ];
    for (what, thread, number, arguments) in table {
        let container = Container::idle(&[]);
        let vmm = container.pid();
        let intruder = Intruder::of(vmm, thread);

        assert_eq!(intruder.call(number, arguments), Answer::Killed(Signal::SIGSYS), "{what}");

        drop(intruder);
        eventually("the pod has ended", || !Path::new(&format!("/proc/{vmm}")).exists());
    }
    assert_eq!(neighbour.script("echo here"), "here");
}

/// As a neighbour sees it: it answers all the time, and the attacker ends when its time for booting is over, not before.
#[test]
fn a_guest_that_attacks_its_machine_disturbs_no_neighbour() {
    let guest = std::env::var("MAYU_TEST_HOSTILE_GUEST").expect("the environment names the hostile guest");
    let seconds = std::env::var("MAYU_TEST_HOSTILE_SECONDS").unwrap_or("30".into());
    let neighbour = Container::idle(&[]);
    let before = Traces::now();
    let container = Container::unborn();
    let attacker = {
        let _configuration = Configuration::with(|text| {
            let kept =
                text.lines().filter(|line| !line.starts_with("kernel =") && !line.starts_with("boot ="));
            let text = kept.collect::<Vec<_>>().join("\n");
            text.replacen("[vm]", &format!("[vm]\nkernel = {guest:?}"), 1).replacen(
                "[timeouts]",
                &format!("[timeouts]\nboot = {seconds}"),
                1,
            )
        });
        let mut command = container.run_command(&[], BUSYBOX, &["true"]);
        let attacker = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        eventually("the attacker runs", || processes_named("mayu-vmm").len() > 1);
        attacker
    };

    let mut answers = 0;
    while processes_named("mayu-vmm").len() > 1 {
        assert_eq!(neighbour.script("echo here"), "here");
        answers += 1;
    }

    let outcome = attacker.wait_with_output().unwrap();
    let error = String::from_utf8_lossy(&outcome.stderr);
    assert!(error.contains(&format!("within {seconds} s")), "{error}");
    assert!(answers > 0);
    drop(container);
    before.assert_restored(1);
}

/// Its ports, from inside: by the guest's own context id, by that of loopback, and by that of the host.
#[test]
fn containers_do_not_reach_the_agent() {
    let script = format!(
        "import socket\nfor cid in (1, 3, 2):\n for port in ({RPC_PORT}, {STREAM_PORT}, {FORWARD_PORT}):\n  \
         s = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM); s.settimeout(20)\n  \
         try: s.connect((cid, port)); print('reached', cid, port)\n  \
         except OSError as error: print(error.errno)\n"
    );
    let outcome = Container::run(PYTHON, &[], &["python3", "-c", &script]).success();
    assert!(!outcome.text().contains("reached"), "{}", outcome.text());
    assert_eq!(outcome.text().lines().count(), 9);
}

/// The image is every pod's. A container has no way to its device, and the guest's root, who has, cannot write to it.
#[test]
fn the_guests_image_is_written_by_nobody() {
    const NODE: &str = "mknod /dev/image b $(tr : ' ' < /sys/block/vda/dev)";
    const IMAGE: &str = "/usr/share/mayu/guest.erofs";
    let before = fs::read(IMAGE).unwrap();

    let outcome = Container::sh(&[], &format!("{NODE} && head -c 1 /dev/image"));
    assert!(outcome.code != 0 && outcome.stderr.contains("Operation not permitted"), "{}", outcome.stderr);

    let root = Container::idle(&["--privileged"]);
    assert_eq!(root.script(&format!("{NODE}; head -c 4096 /dev/image | wc -c")), "4096");
    let write = "blockdev --setrw /dev/image; dd if=/dev/zero of=/dev/image bs=4096 count=1 conv=fsync";
    assert_ne!(root.exec(&["sh", "-c", write]).code, 0);
    assert!(fs::read(IMAGE).unwrap() == before, "the image on the host is as it was");
}

#[test]
fn every_thread_is_confined() {
    let container = Container::idle(&[]);
    let threads = fs::read_dir(format!("/proc/{}/task", container.pid())).unwrap();
    for thread in threads {
        let thread = thread.unwrap().file_name().to_str().unwrap().parse().unwrap();
        let name = process_status(thread, "Name");
        assert_eq!(process_status(thread, "Seccomp"), "2", "{name}");
        assert_eq!(process_status(thread, "NoNewPrivs"), "1", "{name}");
        if name != FILES {
            assert_eq!(process_status(thread, "CapEff"), "0000000000000000", "{name}");
        }
    }
}
