//! What there is on the host, to see that a pod is in its VM and leaves nothing behind.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cri::Cri;
use crate::shim::eventually;
use crate::{PATIENCE, ctr, run};

/// A process of the host.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Process {
    /// Its pid.
    pub pid: u32,
    /// Its command name.
    pub name: String,
    /// Its command line, arguments separated by spaces.
    pub command: String,
}

/// All processes of the host.
pub fn processes() -> Vec<Process> {
    let pids = fs::read_dir("/proc").expect("/proc is mounted").flatten();
    pids.filter_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let name = fs::read_to_string(entry.path().join("comm")).ok()?.trim().to_owned();
        let command = fs::read(entry.path().join("cmdline")).ok()?;
        let command = String::from_utf8_lossy(&command).replace('\0', " ").trim().to_owned();
        Some(Process { pid, name, command })
    })
    .collect()
}

/// The processes whose command name is `name`, cut to 15 characters as the kernel does.
pub fn processes_named(name: &str) -> Vec<Process> {
    let name: String = name.chars().take(15).collect();
    processes().into_iter().filter(|process| process.name == name).collect()
}

/// The VMMs in their jails: a VMM begins outside, as a process that forks it and ends.
pub fn vmms() -> Vec<Process> {
    // A PID for each namespace that it is in: proc_pid_status(5).
    let jailed = |process: &Process| {
        let status = fs::read_to_string(format!("/proc/{}/status", process.pid)).unwrap_or_default();
        let pids = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
        pids.is_some_and(|pids| pids.split_whitespace().count() > 1)
    };
    processes_named("mayu-vmm").into_iter().filter(jailed).collect()
}

/// The shim that serves a pod.
///
/// # Panics
/// There is none.
#[track_caller]
pub fn shim_of(pod: &str) -> Process {
    let serves =
        |process: &Process| process.name.starts_with("containerd-shim") && process.command.contains(pod);
    processes().into_iter().find(serves).expect("the pod has a shim")
}

/// How many files a process has open.
///
/// # Panics
/// There is no such process.
#[track_caller]
pub fn descriptors(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).expect("the process is there").count()
}

/// A line of /proc/<pid>/status, such as `Uid`.
///
/// # Panics
/// There is no such process or line.
pub fn process_status(pid: u32, field: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the process is there");
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    line.expect("the field is there").trim().to_owned()
}

/// What a process has of the host's memory, in bytes: what it shares with others is divided among them (`Pss` in proc(5)).
///
/// # Panics
/// There is no such process.
#[track_caller]
pub fn pss(pid: u32) -> u64 {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("the process is there");
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:")?.strip_suffix(" kB"));
    line.expect("a sum").trim().parse::<u64>().expect("a number") << 10
}

/// The processes, mounts, sockets, directories and cgroups that pods make on a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Traces {
    processes: BTreeSet<String>,
    mounts: BTreeSet<String>,
    files: BTreeSet<PathBuf>,
    cgroups: BTreeSet<PathBuf>,
    containerd_descriptors: usize,
}

impl Traces {
    /// What is there now.
    pub fn now() -> Self {
        let ours =
            |process: &Process| process.name.starts_with("containerd-shim") || process.name == "mayu-vmm";
        let processes = processes().into_iter().filter(ours).map(|process| format!("{process:?}")).collect();
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("/proc is mounted");
        // The id and parent id of a mount are no traces; where it is and what it is are.
        let mounts =
            mounts.lines().map(|line| line.split(' ').skip(2).collect::<Vec<_>>().join(" ")).collect();
        let mut files = BTreeSet::new();
        // Not /run/containerd/fifo: those are the client's, who keeps them when somebody else removes its task.
        for root in [
            "/run/mayu",
            "/run/netns",
            "/sys/class/net",
            "/run/containerd/s",
            "/run/containerd/io.containerd.runtime.v2.task",
        ] {
            collect(Path::new(root), &mut files, 3, &|path| !is_hidden(path));
        }
        let mut cgroups = BTreeSet::new();
        collect(Path::new("/sys/fs/cgroup"), &mut cgroups, 6, &|path| path.is_dir());
        Self { processes, mounts, files, cgroups, containerd_descriptors: containerd_descriptors() }
    }

    /// Waits until everything that has come since `self` is gone: containerd cleans up after it has answered.
    /// containerd itself may keep a few descriptors more, but not one a pod.
    ///
    /// # Panics
    /// Something stays.
    #[track_caller]
    pub fn assert_restored(&self, pods: usize) {
        let started = Instant::now();
        loop {
            let left = Self::now().difference(self);
            let descriptors = containerd_descriptors().saturating_sub(self.containerd_descriptors);
            if left.is_empty() && descriptors <= pods / 4 + 4 {
                return;
            }
            assert!(
                started.elapsed() < PATIENCE,
                "left behind: {left:#?}, {descriptors} descriptors in containerd"
            );
            thread::sleep(Duration::from_millis(100));
        }
    }

    fn difference(&self, before: &Self) -> Vec<String> {
        let mut left: Vec<String> = self.processes.difference(&before.processes).cloned().collect();
        left.extend(self.mounts.difference(&before.mounts).cloned());
        left.extend(self.files.difference(&before.files).map(|path| path.display().to_string()));
        left.extend(self.cgroups.difference(&before.cgroups).map(|path| path.display().to_string()));
        left
    }
}

/// containerd gives what it is about to remove such a name. One that is killed then leaves it, and it is nobody's any more.
fn is_hidden(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'))
}

fn collect(dir: &Path, into: &mut BTreeSet<PathBuf>, depth: usize, wanted: &dyn Fn(&Path) -> bool) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for path in entries.flatten().map(|entry| entry.path()).filter(|path| wanted(path)) {
        if depth > 0 && path.is_dir() && !path.is_symlink() {
            collect(&path, into, depth - 1, wanted);
        }
        into.insert(path);
    }
}

fn containerd_descriptors() -> usize {
    let pid = processes_named("containerd").first().map_or(0, |process| process.pid);
    fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

/// Ends a process at once.
///
/// # Panics
/// There is no such process.
pub fn kill_9(pid: u32) {
    let pid = Pid::from_raw(i32::try_from(pid).expect("a pid"));
    kill(pid, Signal::SIGKILL).expect("the process is there");
}

/// Kills containerd, does something, and starts it again the way it was started.
///
/// # Panics
/// It does not come back.
pub fn without_containerd(meanwhile: impl FnOnce()) {
    let containerd = processes_named("containerd").remove(0);
    let program =
        fs::read_link(format!("/proc/{}/exe", containerd.pid)).expect("containerd's program and log");
    let arguments: Vec<_> = containerd.command.split(' ').skip(1).map(str::to_owned).collect();
    kill_9(containerd.pid);
    eventually("containerd is gone", || processes_named("containerd").is_empty());
    meanwhile();
    let log = fs::File::options()
        .append(true)
        .create(true)
        .open("/results/containerd.log")
        .expect("containerd's program and log");
    // A child of the test would stay a zombie when it is killed in its turn.
    let mut restart = Command::new("setsid");
    restart.arg("--fork").arg(program).args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    assert!(restart.status().expect("containerd's program and log").success());
    eventually("containerd is back", || run(&mut ctr(["version"])).code == 0);
    eventually("its CRI service is back", || Cri::connect(&[]).serves());
}
