//! The process that a shared PID namespace lives by: what it is, that nothing inside ends it, and that it collects what is orphaned.
//!
//! Needs to be root and PID namespaces; elsewhere it says so and passes. All is in one test, because a process can have only one
//! reaper.

#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use mayu_agent::pause::Pause;
use mayu_agent::reaper::{Exit, Reaper};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use slog::{Discard, Logger, o};
use tokio::sync::oneshot::Receiver;

const DEADLINE: Duration = Duration::from_secs(60);

#[test]
fn pause() {
    if let Err(errno) =
        thread::spawn(|| unshare(CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNS)).join().unwrap()
    {
        eprintln!("SKIPPED: needs to make namespaces: {errno}");
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let reaper = Reaper::start(Logger::root(Discard, o!())).unwrap();
        it_has_nothing_to_take_away(&start(&reaper).await);
        nothing_inside_ends_it(&reaper).await;
        it_collects_orphans(&reaper).await;
        its_end_is_the_end_of_all(&reaper).await;
        its_end_is_noticed(&reaper).await;
        a_program_that_is_none_is_reported(&reaper).await;
    });
}

async fn start(reaper: &Arc<Reaper>) -> Pause {
    // Elsewhere than where it was built, it is told where the agent is.
    let program = std::env::var("MAYU_AGENT").unwrap_or_else(|_| env!("CARGO_BIN_EXE_mayu-agent").to_owned());
    start_program(&program, reaper).await.unwrap()
}

async fn start_program(program: &str, reaper: &Arc<Reaper>) -> mayu_agent::Result<Pause> {
    let (program, reaper) = (PathBuf::from(program), Arc::clone(reaper));
    tokio::task::spawn_blocking(move || Pause::start(&program, DEADLINE, &reaper)).await.unwrap()
}

/// Runs a shell in the namespace, as a child of this process.
fn run(pause: &Pause, reaper: &Arc<Reaper>, script: &str) -> Receiver<Exit> {
    let _launching = reaper.launching();
    let namespace = File::open(pause.namespace()).unwrap();
    let script = script.to_owned();
    let spawn = move || {
        setns(namespace, CloneFlags::CLONE_NEWPID).unwrap();
        Command::new("sh").args(["-c", &script]).stdin(Stdio::null()).spawn().unwrap().id()
    };
    let pid = thread::spawn(spawn).join().unwrap();
    reaper.watch(Pid::from_raw(pid.cast_signed()))
}

fn of_process(pid: Pid, file: &str) -> String {
    fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default()
}

/// The pids of the children of `pid`, zombies included.
fn children(pid: Pid) -> Vec<Pid> {
    let list = of_process(pid, &format!("task/{pid}/children"));
    list.split_whitespace().map(|pid| Pid::from_raw(pid.parse().unwrap())).collect()
}

/// Waits until `condition` holds.
async fn until(condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < DEADLINE, "waited too long");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

fn it_has_nothing_to_take_away(pause: &Pause) {
    let pid = pause.pid();
    assert_eq!(
        (of_process(pid, "comm").as_str(), of_process(pid, "cmdline").as_str()),
        ("pause\n", "/pause\0")
    );
    assert_eq!(of_process(pid, "environ"), "");
    if may_lower_oom_scores() {
        assert_eq!(of_process(pid, "oom_score_adj"), "-998\n");
    }
    let status = of_process(pid, "status");
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(field("NSpid:").last().unwrap(), "1");
    assert_eq!(field("Uid:"), ["65535"; 4]);
    assert_eq!(field("Gid:"), ["65535"; 4]);
    assert_eq!(field("Groups:"), [""; 0]);
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
        assert_eq!(field(set), ["0000000000000000"]);
    }
    assert_eq!(field("NoNewPrivs:"), ["1"]);
    assert_eq!(fs::read_dir(format!("/proc/{pid}/root")).unwrap().count(), 0);
    assert!(fs::write(format!("/proc/{pid}/root/file"), "").is_err());
    assert_eq!(of_process(pid, "mounts").lines().count(), 1, "{}", of_process(pid, "mounts"));
    let stream = |number| fs::read_link(format!("/proc/{pid}/fd/{number}")).unwrap().display().to_string();
    assert!(stream(0).starts_with("socket:"));
    assert_eq!((stream(1).as_str(), stream(2).as_str()), ("/dev/null", "/dev/null"));
}

/// Whether this process has CAP_SYS_RESOURCE, number 24 of linux/capability.h.
fn may_lower_oom_scores() -> bool {
    let status = of_process(Pid::this(), "status");
    let set = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
    u64::from_str_radix(set.trim(), 16).unwrap() & (1 << 24) != 0
}

async fn nothing_inside_ends_it(reaper: &Arc<Reaper>) {
    let mut pause = start(reaper).await;

    let script = "for s in HUP INT QUIT USR1 TERM CHLD KILL STOP; do kill -$s 1 || exit 1; done; echo $$ | grep -qx 1 && exit 2; exit 7";
    let exit = run(&pause, reaper, script).await.unwrap();

    assert_eq!(exit.status, 7);
    assert!(pause.lives());
    // And it is not stopped either: it collects orphans still.
    assert!(of_process(pause.pid(), "status").contains("State:\tS"));
}

async fn it_collects_orphans(reaper: &Arc<Reaper>) {
    let pause = start(reaper).await;
    let left_behind = || children(pause.pid());

    run(&pause, reaper, "sleep 1000 & sleep 1000 & exit 0").await.unwrap();
    until(|| left_behind().len() == 2).await;
    for orphan in left_behind() {
        kill(orphan, Signal::SIGKILL).unwrap();
    }

    until(|| left_behind().is_empty()).await;
}

async fn its_end_is_the_end_of_all(reaper: &Arc<Reaper>) {
    let pause = start(reaper).await;
    let inside = run(&pause, reaper, "exec sleep 1000");

    drop(pause);

    assert_eq!(inside.await.unwrap().status, 128 + 9);
}

async fn its_end_is_noticed(reaper: &Arc<Reaper>) {
    let mut pause = start(reaper).await;

    kill(pause.pid(), Signal::SIGKILL).unwrap();
    let pid = pause.pid();
    until(|| !fs::exists(format!("/proc/{pid}")).unwrap()).await;

    assert!(!pause.lives());
}

async fn a_program_that_is_none_is_reported(reaper: &Arc<Reaper>) {
    let died = start_program("/bin/false", reaper).await.unwrap_err().to_string();
    assert!(died.contains("PID namespace died"), "{died}");
    let missing = start_program("/no/such/program", reaper).await.unwrap_err().to_string();
    assert!(missing.contains("/no/such/program"), "{missing}");
}
