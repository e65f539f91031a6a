//! What dies is cleaned up after, and what lives is kept.

use std::time::{Duration, Instant};

use mayu_e2e::host::{Traces, kill_9, processes, without_containerd};
use mayu_e2e::shim::eventually;
use mayu_e2e::{BUSYBOX, Container};

#[test]
fn a_pod_survives_containerd() {
    let script = "while [ ! -e /tmp/end ]; do sleep 0.1; done; exit 12";
    let container = Container::detached(BUSYBOX, &[], &["sh", "-c", script]);

    without_containerd(|| ());

    assert_eq!(container.status().as_deref(), Some("RUNNING"));
    assert_eq!(container.script("echo still here"), "still here");
    container.exec(&["touch", "/tmp/end"]); // may be ended by the container's end
    eventually("it has stopped", || container.status().as_deref() == Some("STOPPED"));
    assert_eq!(container.delete_task(), 12);
}

#[test]
fn an_exit_while_containerd_is_away_is_not_lost() {
    let dir = tempfile::tempdir().unwrap();
    let mount = format!("type=bind,src={},dst=/data,options=rbind:rw", dir.path().display());
    let script = "while [ ! -e /data/end ]; do sleep 0.1; done; touch /data/ended; exit 13";
    let container = Container::detached(BUSYBOX, &["--mount", &mount], &["sh", "-c", script]);

    without_containerd(|| {
        std::fs::write(dir.path().join("end"), "").unwrap();
        eventually("it has ended", || dir.path().join("ended").exists());
    });

    eventually("it is known to have stopped", || container.status().as_deref() == Some("STOPPED"));
    assert_eq!(container.delete_task(), 13);
}

#[test]
fn the_vmm_dies_with_its_shim_and_nothing_is_left() {
    Container::sh(&[], "true").success();
    let before = Traces::now();
    let container = Container::idle(&[]);
    let vmm = container.pid();
    let shim = processes().into_iter().find(|process| {
        process.name.starts_with("containerd-shim") && process.command.contains(container.id())
    });

    kill_9(shim.expect("there is a shim").pid);

    eventually("the VMM is gone", || !processes().iter().any(|process| process.pid == vmm));
    // containerd runs the shim's `delete` when the connection breaks; what is left in its own books goes here.
    eventually("containerd has no task any more", || {
        container.status().is_none_or(|status| status != "RUNNING")
    });
    drop(container);
    before.assert_restored(1);
}

#[test]
fn a_task_whose_vmm_is_killed_has_exited_with_137_at_once() {
    Container::sh(&[], "true").success();
    let before = Traces::now();
    let container = Container::idle(&[]);
    let started = Instant::now();

    kill_9(container.pid());

    eventually("it has stopped", || container.status().as_deref() == Some("STOPPED"));
    // A second on a real processor; the lab's is some twenty times slower, and `ctr` alone takes most of that.
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
    assert_eq!(container.delete_task(), 137);
    drop(container);
    before.assert_restored(1);
    assert_eq!(Container::sh(&[], "echo the next").success().text(), "the next");
}
