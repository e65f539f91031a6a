//! A task's way from start to deletion.

use std::process::Stdio;
use std::time::Duration;

use mayu_e2e::shim::eventually;
use mayu_e2e::{BUSYBOX, Container, ctr};

#[test]
fn a_detached_container_runs_stops_and_is_deleted() {
    let container = Container::detached(
        BUSYBOX,
        &[],
        &["sh", "-c", "while [ ! -e /tmp/end ]; do sleep 0.1; done; exit 3"],
    );
    assert_eq!(container.status().as_deref(), Some("RUNNING"));

    container.exec(&["touch", "/tmp/end"]); // may be ended by the container's end

    eventually("it has stopped", || container.status().as_deref() == Some("STOPPED"));
    assert_eq!(container.delete_task(), 3);
    assert_eq!(container.status(), None);
}

#[test]
fn kill_9_of_the_init_gives_137() {
    let container = Container::idle(&[]);
    container.task("kill", &["--signal", "KILL"]).success();
    eventually("it has stopped", || container.status().as_deref() == Some("STOPPED"));
    assert_eq!(container.delete_task(), 137);
}

#[test]
fn kill_all_ends_every_process() {
    let container = Container::idle(&[]);
    container.script("sleep 1000 > /dev/null 2>&1 < /dev/null & sleep 1001 > /dev/null 2>&1 < /dev/null &");
    container.task("kill", &["--all", "--signal", "KILL"]).success();
    eventually("it has stopped", || container.status().as_deref() == Some("STOPPED"));
}

#[test]
fn pause_stops_real_work_and_resume_continues_it() {
    let counter =
        "i=0; while :; do i=$((i+1)); echo $i > /data/count.new; mv /data/count.new /data/count; done";
    let dir = tempfile::tempdir().unwrap();
    let mount = format!("type=bind,src={},dst=/data,options=rbind:rw", dir.path().display());
    let container = Container::detached(BUSYBOX, &["--mount", &mount], &["sh", "-c", counter]);
    let count = || -> u64 {
        let text = std::fs::read_to_string(dir.path().join("count")).unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    };
    eventually("it counts", || count() > 10);

    container.task("pause", &[]).success();
    assert_eq!(container.status().as_deref(), Some("PAUSED"));
    let paused_at = count();
    // What proves that nothing runs is that time passes and the count does not.
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(count(), paused_at);

    container.task("resume", &[]).success();
    assert_eq!(container.status().as_deref(), Some("RUNNING"));
    eventually("it counts on", || count() > paused_at + 10);
}

#[test]
fn the_processes_of_a_task_are_listed() {
    let container = Container::idle(&[]);
    let list = container.task("ps", &[]).success().text();
    assert_eq!(list.lines().skip(1).filter(|line| !line.trim().is_empty()).count(), 1, "{list}");
}

#[test]
fn events_come_in_order() {
    let mut events = ctr(["events"]).stdout(Stdio::piped()).spawn().unwrap();
    let container = Container::unborn();
    // ctr says nothing when it has subscribed. A container's own events are complete once its predecessor's are seen.
    let stdout = events.stdout.take().unwrap();
    let (sender, lines) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for line in std::io::BufRead::lines(std::io::BufReader::new(stdout)).map_while(Result::ok) {
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    wait_for_subscription(&lines);

    mayu_e2e::run(&mut container.run_command(&["--detach"], BUSYBOX, &["sleep", "infinity"])).success();
    container.exec(&["true"]).success();
    container.task("pause", &[]).success();
    container.task("resume", &[]).success();
    container.task("kill", &["--signal", "KILL"]).success();
    eventually("it has stopped", || container.status().as_deref() == Some("STOPPED"));
    container.delete_task();

    let wanted = [
        "/tasks/create",
        "/tasks/start",
        "/tasks/exec-added",
        "/tasks/exec-started",
        "/tasks/exit",
        "/tasks/paused",
        "/tasks/resumed",
        "/tasks/exit",
        "/tasks/delete",
    ];
    let mut seen = Vec::new();
    while seen.len() < wanted.len() {
        let line = lines
            .recv_timeout(mayu_e2e::PATIENCE)
            .unwrap_or_else(|_| panic!("only these events came: {seen:?}"));
        if line.contains(container.id())
            && let Some(topic) = line.split_whitespace().find(|word| word.starts_with("/tasks/"))
        {
            seen.push(topic.to_owned());
        }
    }
    events.kill().unwrap();
    events.wait().unwrap();
    assert_eq!(seen, wanted);
}

/// Makes containerd publish until the subscriber has seen something.
fn wait_for_subscription(lines: &std::sync::mpsc::Receiver<String>) {
    let label =
        |value: &str| mayu_e2e::run(&mut ctr(["namespaces", "label", "default", &format!("e2e={value}")]));
    for round in 0..600 {
        label(&round.to_string()).success();
        if lines.recv_timeout(Duration::from_millis(200)).is_ok() {
            return;
        }
    }
    panic!("containerd publishes no events");
}
