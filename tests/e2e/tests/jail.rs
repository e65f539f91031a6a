//! What the threads of a VMM may do, and do.

use std::collections::HashMap;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::fd::OwnedFd;

use k8s_cri::v1::{
    ContainerConfig, Device, LinuxContainerConfig, LinuxContainerResources, LinuxPodSandboxConfig, Mount,
};
use mayu_e2e::configuration::Configuration;
use mayu_e2e::cri::{Cri, Pod, container, for_privileged, pod_config, privileged};
use mayu_e2e::host::{process_status, processes_named, shim_of};
use mayu_e2e::mount::LoopDevice;
use mayu_e2e::shim::eventually;
use mayu_e2e::template::{current, mayu_template};
use mayu_e2e::trace::{SystemCall, Trace};
use mayu_e2e::{BUSYBOX, PATIENCE, PYTHON};
use mayu_vmm::seccomp::{Allowed, Kind};
use mayu_vmm_api::{Message, Request, send};
use nix::sys::signal::{Signal, kill};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

/// A request of virtio-fs for each system call of its table, on a volume.
const FILES: &str = r#"
import os
os.chdir("/data")
os.umask(0o27)
with open("file", "wb") as f: f.write(b"x" * 10000); f.flush(); os.fsync(f.fileno()); os.fdatasync(f.fileno())
file = os.open("file", os.O_RDWR)
os.read(file, 100); os.lseek(file, 0, os.SEEK_DATA); os.posix_fallocate(file, 0, 20000); os.ftruncate(file, 5000)
os.close(file)
os.mkdir("directory"); os.symlink("file", "link"); os.readlink("link"); os.link("file", "hard"); os.mkfifo("fifo")
os.rename("hard", "directory/hard"); os.chmod("file", 0o4777); os.utime("file", (1, 2)); os.listdir("directory")
os.setxattr("file", "user.name", b"value"); os.getxattr("file", "user.name"); os.listxattr("file")
os.removexattr("file", "user.name"); os.statvfs("."); os.unlink("directory/hard"); os.rmdir("directory")
os.chown("file", 0, 0); os.chmod("file", 0o4777); os.chmod(".", 0o777)
if os.fork() == 0:
    os.setgid(1001); os.setuid(1001)
    with open("file", "ab") as f: f.write(b"the set-user-id bit goes")
    with open("other", "wb") as f: f.write(b"y")
    os._exit(0)
assert os.wait()[1] == 0
assert os.stat("file").st_mode & 0o4000 == 0
"#;

/// Takes a device away from its driver and gives it back: the device is reset, and activated once more.
const REBIND: &str = "cd /sys/bus/virtio/drivers/virtio_net; \
     for device in virtio*; do echo $device > unbind; echo $device > bind; done";

/// Output that nobody takes, and waits in the VMM; and more of it, and then a reset.
const LAST_WORDS: &str = "for word in first last; do \
         while [ ! -e /data/$word ]; do sleep 0.1; done; \
         head -c 4000000 /dev/zero & sleep 5; touch /data/$word.waits; \
     done; echo b > /proc/sysrq-trigger";

fn pod() -> Pod {
    Cri::connect(&[BUSYBOX, PYTHON]).run(pod_config(for_privileged())).unwrap()
}

fn as_privileged(config: ContainerConfig) -> ContainerConfig {
    let linux = LinuxContainerConfig { security_context: Some(privileged()), ..Default::default() };
    ContainerConfig { linux: Some(linux), ..config }
}

/// A template that is made, and a pod whose memory is prefetched.
fn go_on_from_a_new_template() {
    let name = current();
    mayu_template(&["delete", name.file_name().unwrap().to_str().unwrap()]).success();
    current();
    let mut pod = pod();
    pod.run_container(container("idle", BUSYBOX, &["sleep", "1000"])).unwrap();
    pod.remove().unwrap();
}

/// A VMM that cannot build its machine, when its threads for files are there already. They end before it does.
fn refuse_to_build() {
    let _configuration = Configuration::set("vm", "kernel", "\"/etc/hostname\"");
    let refused = Cri::connect(&[]).run(pod_config(LinuxPodSandboxConfig::default()));
    assert!(refused.is_err_and(|error| error.message().contains("kernel")));
}

#[track_caller]
fn done(pod: &mut Pod, container: &str, script: &str) {
    pod.outcome(container, script, 0).unwrap().success();
}

/// Has a VMM pause and go on, as its shim could, by a copy of the shim's end of the control socket.
fn pause_and_resume(pod: &str) {
    let shim = shim_of(pod).pid;
    let process = pidfd_open(Pid::from_raw(shim as i32).unwrap(), PidfdFlags::empty()).unwrap();
    let copies = fs::read_dir(format!("/proc/{shim}/fd")).unwrap().filter_map(|entry| {
        let fd = entry.unwrap().file_name().to_str()?.parse().ok()?;
        pidfd_getfd(&process, fd, PidfdGetfdFlags::empty()).ok()
    });
    let control: Vec<OwnedFd> = copies.filter(is_sequenced).collect();
    let [control] = &control[..] else { panic!("the shim has {} sockets of packets", control.len()) };
    // The shim takes no notice of answers to what it has not asked.
    for (id, body) in [(u64::MAX - 1, Request::Pause), (u64::MAX, Request::Resume)] {
        send(control, &Message::Request { id, body }, &[]).unwrap();
    }
}

/// What happens while the pod's shim hears nothing.
fn unheard(pod: &str, happens: impl FnOnce()) {
    let shim = nix::unistd::Pid::from_raw(shim_of(pod).pid.cast_signed());
    kill(shim, Signal::SIGSTOP).unwrap();
    happens();
    kill(shim, Signal::SIGCONT).unwrap();
}

fn is_sequenced(fd: &OwnedFd) -> bool {
    rustix::net::sockopt::socket_type(fd).is_ok_and(|kind| kind == rustix::net::SocketType::SEQPACKET)
}

/// The kind of a thread, by its name.
fn kind(thread: &str) -> Kind {
    match thread {
        "virtio-fs" => Kind::Fs,
        "block" => Kind::Block,
        _ if thread.starts_with("vcpu") => Kind::Vcpu,
        _ if thread.starts_with("net") => Kind::Net,
        _ => Kind::EventLoop,
    }
}

fn fits(line: &Allowed, call: &SystemCall) -> bool {
    line.number == call.number && line.arguments.iter().all(|argument| argument.fits(&call.arguments))
}

/// The filter that each call went by: that of its own thread, from the time when that has entered it, and before that the one
/// that it has from the event loop.
fn judged(calls: &[SystemCall]) -> Vec<(Kind, &SystemCall)> {
    let seccomp = seccomp();
    let enters = calls.iter().enumerate().filter(|(_, call)| call.number == seccomp);
    // The event loop enters two.
    let entered: HashMap<_, _> = enters.map(|(index, call)| (call.tid, index)).collect();
    let event_loop = calls
        .iter()
        .position(|call| kind(&call.thread) == Kind::EventLoop && call.number == seccomp)
        .expect("the event loop enters its filter");
    let filter = |index: usize, call: &SystemCall| match entered.get(&call.tid) {
        Some(entered) if index > *entered => Some(kind(&call.thread)),
        _ => (index > event_loop).then_some(Kind::EventLoop),
    };
    calls.iter().enumerate().filter_map(|(index, call)| Some((filter(index, call)?, call))).collect()
}

/// Those of any machine, and those of one that is to be saved.
fn lines(kind: Kind) -> impl Iterator<Item = &'static Allowed> {
    kind.table().iter().chain(kind.saving()).copied().flatten()
}

fn seccomp() -> i64 {
    let line = lines(Kind::EventLoop).find(|line| line.name == "SYS_seccomp");
    line.expect("the event loop's threads enter filters").number
}

#[test]
fn no_line_of_a_filter_is_idle() {
    let trace = Trace::of(&["mayu-vmm", "vcpu*", "virtio-fs", "block", "net?", "prefetch"]);
    refuse_to_build();
    go_on_from_a_new_template();
    // From its kernel on, since drivers start devices then.
    let _configuration = Configuration::set("template", "enabled", "false");
    let disk = LoopDevice::new(4 << 20);
    let data = tempfile::tempdir_in("/var/tmp").unwrap();
    let mut pod = pod();
    let volume = Mount {
        container_path: "/data".into(),
        host_path: data.path().display().to_string(),
        ..Default::default()
    };
    let device = Device {
        container_path: "/dev/xvda".into(),
        host_path: disk.path().display().to_string(),
        permissions: "rwm".into(),
    };
    let mounts = vec![volume];
    let python = container("python", PYTHON, &["python3", "-m", "http.server", "8000"]);
    let python = ContainerConfig { mounts: mounts.clone(), devices: vec![device], ..python };
    let python = pod.run_container(as_privileged(python)).unwrap();

    fs::write(data.path().join("program.py"), FILES).unwrap();
    done(&mut pod, &python, "python3 /data/program.py");
    done(
        &mut pod,
        &python,
        "dd if=/dev/zero of=/dev/xvda bs=4k count=4 conv=fsync && head -c 512 /dev/xvda > /dev/null",
    );
    fetch(&mut pod);
    done(&mut pod, &python, REBIND);
    grow_and_shrink(&mut pod, &python);
    pause_and_resume(pod.id());
    done(&mut pod, &python, "true");
    let last = container("last", BUSYBOX, &["sh", "-c", LAST_WORDS]);
    pod.run_container(as_privileged(ContainerConfig { mounts, ..last })).unwrap();
    let [vmm] = &processes_named("mayu-vmm")[..] else { panic!("one VMM") };
    unheard(pod.id(), || {
        fs::write(data.path().join("first"), "").unwrap();
        eventually("output waits for the shim", || data.path().join("first.waits").exists());
    });
    // The VMM answers the shim after it has sent on what waited.
    done(&mut pod, &python, "true");
    unheard(pod.id(), || {
        fs::write(data.path().join("last"), "").unwrap();
        eventually("the VMM has ended by itself", || process_status(vmm.pid, "State").starts_with('Z'));
    });
    pod.remove().unwrap();

    let calls = trace.calls();
    let judged = judged(&calls);
    let used = |line: &Allowed| judged.iter().any(|(kind, call)| fits(line, call) && kind.allows(line));
    let idle: Vec<_> = Kind::ALL
        .into_iter()
        .flat_map(|kind| lines(kind).map(move |line| (kind, line)))
        .filter(|(_, line)| is_seen(line))
        .filter(|(_, line)| !used(line))
        .map(|(kind, line)| format!("{kind}: {} ({})", line.name, line.reason))
        .collect();
    assert!(idle.is_empty(), "nobody does this:\n{}", idle.join("\n"));
}

/// Whether it is a system call that the trace would have.
fn is_seen(line: &Allowed) -> bool {
    !Kind::is_seldom(line)
        // What is refused is so before it is traced.
        && !Kind::refuses(line)
        // These tests are a debug build, and the VMM is not.
        && !line.reason.ends_with("in debug builds")
}

fn fetch(pod: &mut Pod) {
    let address = (pod.address(), 8000);
    eventually("the pod serves", || {
        let Ok(mut stream) = TcpStream::connect(address) else { return false };
        stream.set_read_timeout(Some(PATIENCE / 10)).unwrap();
        let mut answer = String::new();
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n").is_ok()
            && stream.read_to_string(&mut answer).is_ok()
            && answer.contains("200 OK")
    });
}

fn grow_and_shrink(pod: &mut Pod, container: &str) {
    let mut total = |mib: i64| {
        let limits = LinuxContainerResources { memory_limit_in_bytes: mib << 20, ..Default::default() };
        pod.update(container, limits).unwrap();
    };
    total(512);
    total(64);
}
