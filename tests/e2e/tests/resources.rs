//! cgroup v2: figures, limits, and what happens at a limit.

use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::sync::mpsc::channel;

use mayu_e2e::shim::eventually;
use mayu_e2e::spec::Bundle;
use mayu_e2e::{BUSYBOX, Container, ctr};
use serde_json::json;

/// A figure of `ctr task metrics`.
fn metric(container: &Container, name: &str) -> u64 {
    let table = container.task("metrics", &[]).success().text();
    let line = table.lines().find(|line| line.split_whitespace().next() == Some(name));
    let line = line.unwrap_or_else(|| panic!("no {name} among:\n{table}"));
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn metrics_are_the_container_s() {
    let container = Container::idle(&[]);
    assert_eq!(metric(&container, "pids.current"), 1);
    let before = metric(&container, "cpu.usage_usec");
    assert!(metric(&container, "memory.usage") > 50_000);

    container.script(
        "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done; head -c 20000000 /dev/zero > /dev/shm/file",
    );

    assert!(metric(&container, "cpu.usage_usec") > before + 10_000);
    assert!(metric(&container, "memory.usage") > 20_000_000);
    assert!(metric(&container, "memory.usage") < 200_000_000);
}

#[test]
fn limits_of_the_spec_hold_in_the_guest() {
    let mut bundle = Bundle::sh(
        "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids.max /sys/fs/cgroup/cpu.max /sys/fs/cgroup/cpu.weight",
    );
    bundle.spec["linux"]["resources"] = json!({
        "memory": { "limit": 67_108_864 }, "pids": { "limit": 33 },
        "cpu": { "quota": 50_000, "period": 100_000, "shares": 1024 },
    });
    bundle.mount_cgroup();
    let text = bundle.run().success().text();
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines[..3], ["67108864", "33", "50000 100000"]);
    let weight: u32 = lines[3].parse().unwrap();
    assert!(
        (30..=110).contains(&weight),
        "1024 shares are the default weight or a little less, not {weight}"
    );
}

#[test]
fn an_update_of_memory_and_pids_takes_effect() {
    let mut bundle = Bundle::sh("sleep infinity");
    bundle.spec["linux"]["resources"] = json!({ "memory": { "limit": 134_217_728 } });
    bundle.mount_cgroup();
    let container = bundle.detached();
    assert_eq!(container.script("cat /sys/fs/cgroup/memory.max"), "134217728");

    let resources = json!({ "memory": { "limit": 50_331_648 }, "pids": { "limit": 20 } });
    mayu_e2e::shim::update(&container, &resources);

    assert_eq!(container.script("cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids.max"), "50331648\n20");
    let forks = "i=0; while [ $i -lt 40 ]; do sleep 1000 & i=$((i+1)); done 2>&1; kill $(jobs -p)";
    let outcome = container.exec(&["sh", "-c", forks]);
    assert!(
        outcome.text().contains("fork"),
        "the 21st process is refused: {} {}",
        outcome.text(),
        outcome.stderr
    );
}

#[test]
fn a_container_out_of_memory_is_killed_alone_and_containerd_is_told() {
    let mut events = ctr(["events"]).stdout(Stdio::piped()).spawn().unwrap();
    let stdout = events.stdout.take().unwrap();
    let (sender, lines) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            if line.contains("/tasks/oom") && sender.send(line).is_err() {
                break;
            }
        }
    });
    let container = Container::unborn();

    let mut command = container.run_command(
        &["--rm", "--memory-limit", "33554432"],
        BUSYBOX,
        &["sh", "-c", "tail /dev/zero"],
    );
    let outcome = mayu_e2e::run(&mut command);

    assert_eq!(outcome.code, 137, "{}", outcome.stderr);
    let event = lines.recv_timeout(mayu_e2e::PATIENCE).expect("a TaskOOM event");
    events.kill().unwrap();
    events.wait().unwrap();
    assert!(event.contains(container.id()), "{event}");
}

#[test]
fn only_the_exec_that_is_out_of_memory_dies() {
    let container = Container::idle(&["--memory-limit", "67108864"]);
    let outcome = container.exec(&["tail", "/dev/zero"]);
    assert_eq!(outcome.code, 137, "{}", outcome.stderr);
    eventually("the container runs on", || container.status().as_deref() == Some("RUNNING"));
    assert_eq!(container.script("echo alive"), "alive");
}
