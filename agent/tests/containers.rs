//! Real containers, run by the agent on this machine instead of in a virtual machine: the agent's services
//! listen on Unix sockets, and this process stands in for PID 1.
//!
//! Needs root, cgroup v2 and a static busybox, which the lab has; elsewhere it says loudly what is missing and passes. All runs in
//! one test, because a process can have only one reaper. `MAYU_AGENT` names another agent binary to launch with, `ONLY` a
//! part of the names of the scenarios to run, `REPEAT` how many execs to try in a row.

#![allow(clippy::unwrap_used, clippy::panic, clippy::cognitive_complexity, missing_docs)]

#[macro_use]
mod support;

use std::collections::BTreeSet;
use std::time::Duration;

use mayu_agent_api::{CONTAINER_PID_NAMESPACE, POD_PID_NAMESPACE};
use serde_json::json;
use support::{Agent, Output, Terminal, code_of, spec};
use ttrpc::Code;

#[test]
fn containers() {
    scenarios!(
        output_and_exit_status_arrive,
        the_process_is_what_the_spec_says,
        the_root_is_confined,
        input_reaches_the_process_and_ends,
        closing_input_ends_it,
        failures_to_start_are_explained,
        bad_requests_have_the_right_code,
        wrong_states_have_the_right_code,
        signals_end_a_process,
        an_exec_runs_beside_the_init,
        an_exec_is_confined_as_its_container,
        a_container_may_divide_its_cgroup,
        a_terminal_works,
        a_pause_stops_and_a_resume_continues,
        limits_are_set_and_changed_and_read,
        out_of_memory_is_told_before_the_exit,
        too_little_memory_to_start_is_explained,
        devices_are_filtered,
        a_volume_is_shared,
        a_shared_pid_namespace_dies_with_its_init,
        containers_share_the_pods_pid_namespace,
        the_pods_pid_namespace_is_made_anew_when_it_has_died,
        a_container_joins_the_pid_namespace_of_another,
        output_of_what_is_left_behind_still_arrives,
        a_stream_that_is_not_connected_fails_the_start,
        many_execs_leave_nothing,
    );
}

async fn output_and_exit_status_arrive(agent: &Agent) {
    let Output { stdout, stderr, status } =
        agent.run("out", spec(&["sh", "-c", "echo to stdout; echo to stderr >&2; exit 42"]), b"").await;

    assert_eq!((stdout.as_str(), stderr.as_str(), status), ("to stdout\n", "to stderr\n", 42));
    for expected in [0, 1] {
        let output = agent.run("out", spec(&["sh", "-c", &format!("exit {expected}")]), b"").await;
        assert_eq!(output.status, expected);
    }
}

async fn the_process_is_what_the_spec_says(agent: &Agent) {
    let mut spec = spec(&[
        "sh",
        "-c",
        "pwd; id -u; id -g; id -G; hostname; grep -E 'SigIgn|SigBlk|NoNewPrivs|CapEff|CapBnd' /proc/self/status; \
         ulimit -n; cat /proc/self/oom_score_adj; echo hello > /dev/stdout; ls /proc/self/fd | wc -l; umask",
    ]);
    spec["process"]["cwd"] = json!("/tmp");
    spec["process"]["user"] = json!({"uid": 1000, "gid": 1000, "additionalGids": [10, 20]});
    spec["process"]["env"] = json!(["PATH=/bin", "Z=1", "A=2", "Z=3"]);
    spec["process"]["oomScoreAdj"] = json!(500);
    spec["process"]["noNewPrivileges"] = json!(true);
    spec["hostname"] = json!("cocoon");

    let output = agent.run("process", spec, b"").await;

    let expected = "/tmp\n1000\n1000\n1000 10 20\ncocoon\nSigBlk:\t0000000000000000\n\
                    SigIgn:\t0000000000000000\nCapEff:\t0000000000000000\nCapBnd:\t00000000a80425fb\nNoNewPrivs:\t1\n\
                    1024\n500\nhello\n4\n0022\n";
    assert_eq!(output.stdout, expected, "stderr: {}", output.stderr);
    let mut spec = support::spec(&["env"]);
    spec["process"]["env"] = json!(["Z=1", "PATH=/bin", "A=2", "Z=3"]);
    assert_eq!(agent.run("process", spec, b"").await.stdout, "PATH=/bin\nA=2\nZ=3\nHOME=/root\n");
}

async fn the_root_is_confined(agent: &Agent) {
    let mut spec = spec(&[
        "sh",
        "-c",
        "touch /x; cat /proc/kcore | wc -c; echo 1 > /proc/sys/vm/swappiness; cat /bound/file; touch /bound/file; \
         touch /scratch/x && echo scratch; cat /proc/sys/kernel/shm_rmid_forced; cat /proc/sys/net/ipv4/ping_group_range",
    ]);
    let bound = agent.path("bound");
    std::fs::create_dir_all(&bound).unwrap();
    std::fs::write(bound.join("file"), "from outside\n").unwrap();
    spec["root"]["readonly"] = json!(true);
    spec["linux"]["maskedPaths"] = json!(["/proc/kcore", "/proc/acpi"]);
    spec["linux"]["readonlyPaths"] = json!(["/proc/sys"]);
    spec["linux"]["sysctl"] = json!({"kernel.shm_rmid_forced": "1", "net.ipv4.ping_group_range": "0 1234"});
    let mounts = spec["mounts"].as_array_mut().unwrap();
    mounts
        .push(json!({"destination": "/bound", "type": "bind", "source": bound, "options": ["rbind", "ro"]}));
    mounts.push(
        json!({"destination": "/scratch", "type": "tmpfs", "source": "tmpfs", "options": ["size=64k"]}),
    );

    let output = agent.run("root", spec, b"").await;

    assert_eq!(output.stdout, "0\nfrom outside\nscratch\n1\n0\t1234\n", "stderr: {}", output.stderr);
    assert_eq!(output.stderr.matches("Read-only file system").count(), 3, "{}", output.stderr);
}

async fn input_reaches_the_process_and_ends(agent: &Agent) {
    let input: Vec<u8> = (0..10_000_000_u32).map(|number| (number % 251) as u8).collect();

    let output = agent.run_bytes("input", spec(&["cat"]), &input).await;

    assert!(output.0 == input, "{} bytes of {} came back", output.0.len(), input.len());
    assert_eq!(output.1, 0);
}

async fn closing_input_ends_it(agent: &Agent) {
    let mut process = agent.create("close", spec(&["cat"]), true).await.unwrap();
    agent.start("close", "").await.unwrap();
    process.write(b"before\n").await;
    process.read_some().await;

    agent.close_io("close").await.unwrap();

    let output = agent.finish("close", "", process).await;
    assert_eq!((output.stdout.as_str(), output.status), ("", 0));
    agent.delete("close", "").await.unwrap();
}

async fn failures_to_start_are_explained(agent: &Agent) {
    let message = |result: Result<_, ttrpc::Error>| support::message_of(result.map(drop).unwrap_err());
    let create = async |args: &[&str]| agent.create("fail", spec(args), false).await;

    assert_eq!(
        message(create(&["no-such-program"]).await),
        r#"exec: "no-such-program": executable file not found in $PATH"#
    );
    assert_eq!(
        message(create(&["/no/such/program"]).await),
        r#"exec: "/no/such/program": stat /no/such/program: no such file or directory"#
    );
    assert_eq!(message(create(&["/etc/passwd"]).await), r#"exec: "/etc/passwd": permission denied"#);
    assert_eq!(message(create(&["/tmp"]).await), r#"exec: "/tmp": is a directory"#);

    let mut bad_mount = spec(&["true"]);
    let mount = json!({"destination": "/m", "type": "bind", "source": "/no/such", "options": ["rbind"]});
    bad_mount["mounts"].as_array_mut().unwrap().push(mount);
    let text = message(agent.create("fail", bad_mount, false).await);
    assert!(text.contains("mount source /no/such of /m: No such file"), "{text}");

    let mut bad_type = spec(&["true"]);
    let mount = json!({"destination": "/m", "type": "nosuchfs", "source": "x"});
    bad_type["mounts"].as_array_mut().unwrap().push(mount);
    let text = message(agent.create("fail", bad_type, false).await);
    assert!(text.contains("nosuchfs"), "{text}");

    let mut bad_namespace = spec(&["true"]);
    let namespace = json!({"type": "ipc", "path": "/proc/999999/ns/ipc"});
    bad_namespace["linux"]["namespaces"].as_array_mut().unwrap()[2] = namespace;
    let text = message(agent.create("fail", bad_namespace, false).await);
    assert!(text.contains("/proc/999999/ns/ipc, which does not exist"), "{text}");

    let mut bad_directory = spec(&["true"]);
    bad_directory["process"]["cwd"] = json!("/no/such/directory");
    let text = message(agent.create("fail", bad_directory, false).await);
    assert!(text.contains("chdir"), "{text}");

    // What no look at the file tells: the kernel refuses to execute it.
    let process = create(&["/bin/not-a-program"]).await.unwrap();
    let text = support::message_of(agent.start("fail", "").await.unwrap_err());
    assert_eq!(text, "exec /bin/not-a-program: exec format error");
    agent.finish("fail", "", process).await;
    agent.delete("fail", "").await.unwrap();
}

async fn bad_requests_have_the_right_code(agent: &Agent) {
    let too_long = "a".repeat(77);
    for id in ["", "..", "../x", "a/b", "a b", "-a", "a..b", "a\0b", too_long.as_str()] {
        let result = agent.create(id, spec(&["true"]), false).await;
        assert_eq!(code_of(result), Code::INVALID_ARGUMENT, "{id:?}");
    }
    let mut without_process = spec(&["true"]);
    without_process.as_object_mut().unwrap().remove("process");
    let mut empty_arguments = spec(&["true"]);
    empty_arguments["process"]["args"] = json!([]);
    let mut no_root = spec(&["true"]);
    no_root["root"]["path"] = json!("/no/such/root");
    for spec in [without_process, empty_arguments, no_root, json!("nonsense"), json!(null)] {
        let result = agent.create("bad", spec.clone(), false).await;
        assert_eq!(code_of(result), Code::INVALID_ARGUMENT, "{spec}");
    }
    assert_eq!(code_of(agent.start("nobody", "").await), Code::NOT_FOUND);
    assert_eq!(code_of(agent.kill("nobody", "", 9, false).await), Code::NOT_FOUND);
    assert_eq!(code_of(agent.delete("nobody", "").await), Code::NOT_FOUND);
    assert_eq!(code_of(agent.checkpoint("nobody").await), Code::UNIMPLEMENTED);
}

async fn wrong_states_have_the_right_code(agent: &Agent) {
    let process = agent.create("state", spec(&["sleep", "1000"]), false).await.unwrap();
    assert_eq!(code_of(agent.create("state", spec(&["true"]), false).await), Code::ALREADY_EXISTS);
    assert_eq!(code_of(agent.pause("state").await), Code::FAILED_PRECONDITION);
    assert_eq!(code_of(agent.exec("state", "e", &["true"]).await), Code::FAILED_PRECONDITION);

    agent.start("state", "").await.unwrap();
    assert_eq!(code_of(agent.start("state", "").await), Code::FAILED_PRECONDITION);
    assert_eq!(code_of(agent.delete("state", "").await), Code::FAILED_PRECONDITION);
    assert_eq!(code_of(agent.resume("state").await), Code::FAILED_PRECONDITION);
    assert_eq!(code_of(agent.kill("state", "", 4000, false).await), Code::INVALID_ARGUMENT);
    assert_eq!(code_of(agent.start("state", "nobody").await), Code::NOT_FOUND);
    assert_eq!(code_of(agent.resize("state", "", 80, 25).await), Code::INVALID_ARGUMENT);
    let exec = agent.exec("state", "e", &["true"]).await.unwrap();
    assert_eq!(code_of(agent.exec("state", "e", &["true"]).await), Code::ALREADY_EXISTS);
    assert_eq!(code_of(agent.kill("state", "e", 9, false).await), Code::FAILED_PRECONDITION);
    agent.delete("state", "e").await.unwrap();
    drop(exec);

    agent.kill("state", "", 9, false).await.unwrap();
    agent.finish("state", "", process).await;
    assert_eq!(code_of(agent.exec("state", "e", &["true"]).await), Code::FAILED_PRECONDITION);
    assert_eq!(code_of(agent.kill("state", "", 9, false).await), Code::NOT_FOUND);
    assert_eq!(code_of(agent.kill("state", "", 9, true).await), Code::NOT_FOUND);
    assert_eq!(code_of(agent.start("state", "").await), Code::FAILED_PRECONDITION);
    agent.delete("state", "").await.unwrap();
    assert_eq!(code_of(agent.wait("state", "").await), Code::NOT_FOUND);

    // A container that was never started can be removed.
    let process = agent.create("state", spec(&["true"]), false).await.unwrap();
    agent.delete("state", "").await.unwrap();
    assert_eq!(agent.exit_event("state", "").await, 137);
    drop(process);
}

async fn signals_end_a_process(agent: &Agent) {
    let loop_forever = "trap 'exit 7' TERM; echo ready; while :; do sleep 0.1; done";
    for (signal, all, expected) in [(15, false, 7), (9, false, 137), (9, true, 137)] {
        let mut process = agent.create("signal", spec(&["sh", "-c", loop_forever]), false).await.unwrap();
        agent.start("signal", "").await.unwrap();
        process.read_some().await;

        agent.kill("signal", "", signal, all).await.unwrap();

        assert_eq!(agent.wait("signal", "").await.unwrap(), expected);
        assert_eq!(agent.finish("signal", "", process).await.status, expected);
        agent.delete("signal", "").await.unwrap();
    }
    // Death by a real-time signal, which the wrapper crates do not know.
    let output = agent.run("signal", spec(&["sh", "-c", "sh -c 'kill -40 $$'; exit $?"]), b"").await;
    assert_eq!(output.status, 128 + 40);
}

async fn an_exec_runs_beside_the_init(agent: &Agent) {
    let init = agent.create("exec", spec(&["sleep", "1000"]), false).await.unwrap();
    agent.start("exec", "").await.unwrap();

    let output = agent.run_exec("exec", "e1", &["sh", "-c", "cat; hostname; exit 3"], b"input\n").await;
    assert_eq!((output.stdout.as_str(), output.status), ("input\ntest\n", 3));
    let output = agent
        .run_exec("exec", "e2", &["sh", "-c", "echo $$; cat /proc/self/cgroup; env | grep HOME"], b"")
        .await;
    assert!(output.stdout.ends_with("0::/\nHOME=/root\n"), "{}", output.stdout);

    let exec = agent.exec("exec", "e3", &["no-such-program"]).await.unwrap();
    let text = support::message_of(agent.start("exec", "e3").await.map(drop).unwrap_err());
    assert_eq!(text, r#"exec: "no-such-program": executable file not found in $PATH"#);
    agent.delete("exec", "e3").await.unwrap();
    drop(exec);

    // The end of the init is the end of its execs.
    let exec = agent.exec("exec", "e4", &["sleep", "1000"]).await.unwrap();
    agent.start("exec", "e4").await.unwrap();
    assert_eq!(agent.pids("exec").await.len(), 2);
    agent.kill("exec", "", 9, false).await.unwrap();
    assert_eq!(agent.finish("exec", "e4", exec).await.status, 137);
    assert_eq!(agent.finish("exec", "", init).await.status, 137);
    agent.delete("exec", "e4").await.unwrap();
    agent.delete("exec", "").await.unwrap();
}

async fn an_exec_is_confined_as_its_container(agent: &Agent) {
    for no_new_privileges in [false, true] {
        let mut spec = spec(&["sh", "-c", "mkdir /tmp/d; echo $?; exec sleep 1000"]);
        spec["process"]["noNewPrivileges"] = json!(no_new_privileges);
        spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}],
        });
        let init = agent.create("seccomp", spec, false).await.unwrap();
        agent.start("seccomp", "").await.unwrap();

        let status = "grep -E 'Cap(Eff|Bnd|Prm)|NoNewPrivs|^Seccomp:' /proc/self/status; mkdir /tmp/d";
        let output = agent.run_exec("seccomp", "e", &["sh", "-c", status], b"").await;

        let caps = "00000000a80425fb";
        assert_eq!(
            output.stdout,
            format!("CapPrm:\t{caps}\nCapEff:\t{caps}\nCapBnd:\t{caps}\nNoNewPrivs:\t0\nSeccomp:\t2\n"),
            "{}",
            output.stderr
        );
        assert!(output.stderr.contains("Operation not supported"), "{}", output.stderr);
        let mut as_user = support::spec(&["sh", "-c", status])["process"].take();
        as_user["user"] = json!({"uid": 1000, "gid": 1000});
        let output = agent.run_process("seccomp", "u", as_user, b"").await;
        let none = "0000000000000000";
        assert_eq!(
            output.stdout,
            format!("CapPrm:\t{none}\nCapEff:\t{none}\nCapBnd:\t{caps}\nNoNewPrivs:\t0\nSeccomp:\t2\n"),
        );
        agent.kill("seccomp", "", 9, false).await.unwrap();
        let output = agent.finish("seccomp", "", init).await;
        assert_eq!(output.stdout, "1\n", "{}", output.stderr);
        agent.delete("seccomp", "").await.unwrap();
    }
}

async fn a_container_may_divide_its_cgroup(agent: &Agent) {
    let script = "cd /sys/fs/cgroup && mkdir -p own/below && echo 1 > own/cgroup.procs && \
                  echo +memory > cgroup.subtree_control && echo divided && exec sleep 1000";
    let mut spec = spec(&["sh", "-c", script]);
    for mount in spec["mounts"].as_array_mut().unwrap() {
        if mount["type"] == "cgroup" {
            mount["options"] = json!(["rw"]);
        }
    }
    let mut init = agent.create("divided", spec, false).await.unwrap();
    agent.start("divided", "").await.unwrap();
    assert_eq!(init.read_some().await, "divided\n".len());

    // A cgroup with controllers for its children takes no processes: the exec joins the init.
    let output = agent.run_exec("divided", "e", &["cat", "/proc/self/cgroup"], b"").await;

    assert_eq!(output.stdout, "0::/own\n");
    assert_eq!(agent.pids("divided").await.len(), 1);
    agent.kill("divided", "", 9, true).await.unwrap();
    agent.finish("divided", "", init).await;
    agent.delete("divided", "").await.unwrap();
}

async fn a_terminal_works(agent: &Agent) {
    let mut spec = spec(&[
        "sh",
        "-c",
        "tty; stty size; read line; stty size; echo got $line; sleep 1000; echo unreached",
    ]);
    spec["process"]["terminal"] = json!(true);
    spec["process"]["consoleSize"] = json!({"width": 120, "height": 40});
    let mut terminal: Terminal = agent.create_terminal("tty", spec).await;
    agent.start("tty", "").await.unwrap();
    terminal.until("40 120\r\n").await;
    agent.resize("tty", "", 100, 30).await.unwrap();

    terminal.write(b"line\n").await;
    terminal.until("30 100\r\ngot line\r\n").await;
    // Ctrl-C
    terminal.write(b"\x03").await;

    let rest = terminal.rest().await;
    assert!(!rest.contains("unreached"), "{rest}");
    assert_eq!(agent.wait("tty", "").await.unwrap(), 130);
    assert_eq!(agent.exit_event("tty", "").await, 130);
    agent.delete("tty", "").await.unwrap();

    let init = agent.create("tty", support::spec(&["sleep", "1000"]), false).await.unwrap();
    agent.start("tty", "").await.unwrap();
    let terminal = agent
        .exec_terminal("tty", "e", &["sh", "-c", "test -t 0 && id -u && echo a > /dev/tty; exit 5"])
        .await;
    agent.start("tty", "e").await.unwrap();
    assert_eq!(terminal.rest().await, "1000\r\na\r\n");
    assert_eq!(agent.exit_event("tty", "e").await, 5);
    agent.delete("tty", "e").await.unwrap();
    agent.kill("tty", "", 9, true).await.unwrap();
    agent.finish("tty", "", init).await;
    agent.delete("tty", "").await.unwrap();
}

async fn a_pause_stops_and_a_resume_continues(agent: &Agent) {
    let count = "i=0; while :; do i=$((i+1)); echo $i; done";
    let mut init = agent.create("pause", spec(&["sh", "-c", count]), false).await.unwrap();
    agent.start("pause", "").await.unwrap();
    init.read_some().await;

    agent.pause("pause").await.unwrap();
    assert_eq!(agent.state("pause").await, "PAUSED");
    let frozen = agent.cpu_usage("pause").await;
    assert_eq!(code_of(agent.exec("pause", "e", &["true"]).await), Code::FAILED_PRECONDITION);
    assert_eq!(agent.cpu_usage("pause").await, frozen);
    agent.resume("pause").await.unwrap();
    assert_eq!(agent.state("pause").await, "RUNNING");
    while agent.cpu_usage("pause").await == frozen {
        init.read_some().await;
    }

    // A paused container can be killed.
    agent.pause("pause").await.unwrap();
    agent.kill("pause", "", 9, false).await.unwrap();
    assert_eq!(agent.finish("pause", "", init).await.status, 137);
    agent.delete("pause", "").await.unwrap();
}

async fn limits_are_set_and_changed_and_read(agent: &Agent) {
    let mut spec = spec(&["sleep", "1000"]);
    spec["linux"]["resources"]["memory"] = json!({"limit": 64 << 20, "swap": 64 << 20});
    spec["linux"]["resources"]["pids"] = json!({"limit": 10});
    spec["linux"]["resources"]["cpu"] = json!({"shares": 512, "quota": 50000, "period": 100_000});
    let init = agent.create("limits", spec, false).await.unwrap();
    agent.start("limits", "").await.unwrap();
    let metrics = agent.metrics("limits").await;
    assert_eq!((metrics.memory.usage_limit, metrics.pids.limit, metrics.pids.current), (64 << 20, 10, 1));
    assert!(metrics.memory.usage > 0 && metrics.memory.usage < 64 << 20, "{}", metrics.memory.usage);
    assert!(metrics.cpu.usage_usec > 0);
    let file = |name: &str| std::fs::read_to_string(format!("/sys/fs/cgroup/mayu/limits/{name}")).unwrap();
    assert_eq!(file("cpu.max"), "50000 100000\n");

    agent.update("limits", json!({"memory": {"limit": 128 << 20}, "pids": {"limit": 3}})).await.unwrap();

    let metrics = agent.metrics("limits").await;
    assert_eq!((metrics.memory.usage_limit, metrics.pids.limit), (128 << 20, 3));
    assert_eq!(file("cpu.max"), "50000 100000\n");
    let output =
        agent.run_exec("limits", "e", &["sh", "-c", "sleep 9 & sleep 9 & sleep 9 & wait"], b"").await;
    assert!(output.stderr.contains("can't fork"), "{}", output.stderr);
    agent.kill("limits", "", 9, true).await.unwrap();
    agent.finish("limits", "", init).await;
    agent.delete("limits", "").await.unwrap();
}

async fn out_of_memory_is_told_before_the_exit(agent: &Agent) {
    let mut spec = spec(&["sh", "-c", "exec tail /dev/zero"]);
    spec["linux"]["resources"]["memory"] = json!({"limit": 32 << 20});

    let process = agent.create("oom", spec, false).await.unwrap();
    agent.start("oom", "").await.unwrap();

    assert_eq!(agent.finish("oom", "", process).await.status, 137);
    assert_eq!(agent.events_of("oom"), ["oom", "exit"]);
    agent.delete("oom", "").await.unwrap();
}

async fn too_little_memory_to_start_is_explained(agent: &Agent) {
    let mut spec = spec(&["true"]);
    spec["linux"]["resources"]["memory"] = json!({"limit": 4 << 10});

    let error = agent.create("little", spec, false).await.map(drop).unwrap_err();

    let text = support::message_of(error);
    assert!(text.contains("out of memory"), "{text}");
}

async fn devices_are_filtered(agent: &Agent) {
    let script = "mknod /tmp/kmsg c 1 11; head -c1 /tmp/kmsg; mknod /tmp/n c 1 3 && echo x > /tmp/n && echo null; \
                  head -c3 /dev/zero | wc -c; rm /tmp/kmsg /tmp/n";

    let output = agent.run("devices", spec(&["sh", "-c", script]), b"").await;

    assert_eq!(output.stdout, "null\n3\n", "{}", output.stderr);
    assert!(output.stderr.contains("/tmp/kmsg: Operation not permitted"), "{}", output.stderr);
}

async fn a_volume_is_shared(agent: &Agent) {
    let volume = agent.path("volumes").join("cache");
    agent.create_volume("cache", 1 << 20).await.unwrap();
    assert_eq!(code_of(agent.create_volume("cache", 1 << 20).await), Code::ALREADY_EXISTS);
    assert_eq!(code_of(agent.create_volume("a/b", 0).await), Code::INVALID_ARGUMENT);
    let with_volume = |script: &str| {
        let mut spec = spec(&["sh", "-c", script]);
        let mount =
            json!({"destination": "/bound", "type": "bind", "source": volume, "options": ["rbind", "rw"]});
        spec["mounts"].as_array_mut().unwrap().push(mount);
        spec
    };

    let write = with_volume("echo shared > /bound/file; dd if=/dev/zero of=/bound/more bs=4096 count=500");
    let written = agent.run("writer", write, b"").await;
    assert!(written.stderr.contains("No space left on device"), "{written:?}");
    let read = agent.run("reader", with_volume("cat /bound/file"), b"").await;
    assert_eq!(read.stdout, "shared\n", "{}", read.stderr);

    nix::mount::umount(&volume).unwrap();
}

async fn a_shared_pid_namespace_dies_with_its_init(agent: &Agent) {
    let mut spec = spec(&["sh", "-c", "sleep 1000 > /dev/null 2>&1 & exit 0"]);
    let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.retain(|namespace| namespace["type"] != "pid");
    let process = agent.create("shared", spec, false).await.unwrap();
    agent.start("shared", "").await.unwrap();

    assert_eq!(agent.finish("shared", "", process).await.status, 0);

    assert_eq!(std::fs::read_to_string("/sys/fs/cgroup/mayu/shared/cgroup.procs").unwrap(), "");
    agent.delete("shared", "").await.unwrap();
}

/// A spec whose PID namespace is the one of this name.
fn in_pid_namespace(name: &str, args: &[&str]) -> serde_json::Value {
    let mut spec = spec(args);
    for namespace in spec["linux"]["namespaces"].as_array_mut().unwrap() {
        if namespace["type"] == "pid" {
            namespace["path"] = json!(name);
        }
    }
    spec
}

async fn containers_share_the_pods_pid_namespace(agent: &Agent) {
    let script = "sleep 1000 & echo $$; exec sleep 2000";
    let spec = in_pid_namespace(POD_PID_NAMESPACE, &["sh", "-c", script]);
    let mut first = agent.create("first", spec, false).await.unwrap();
    let pid = agent.start("first", "").await.unwrap();
    let inside = first.read_text().await;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap();
    assert_eq!(line.split_whitespace().last(), Some(inside.trim()), "{pid} is not the init's pid");
    assert_ne!(inside.trim(), "1");

    let look = ["sh", "-c", "ps -o pid,args; test $$ -gt 1"];
    let second = agent.run("second", in_pid_namespace(POD_PID_NAMESPACE, &look), b"").await;
    assert_eq!(second.status, 0, "{second:?}");
    for expected in ["    1 /pause\n", " sleep 1000\n", " sleep 2000\n"] {
        assert!(second.stdout.contains(expected), "no {expected:?} in {}", second.stdout);
    }
    let exec = agent.run_exec("first", "e", &["cat", "/proc/1/comm"], b"").await;
    assert_eq!(exec.stdout, "pause\n");

    // The end of one's init takes along what it left behind, and nothing of the other's.
    let third = in_pid_namespace(POD_PID_NAMESPACE, &["sleep", "3000"]);
    let third = agent.create("third", third, false).await.unwrap();
    agent.start("third", "").await.unwrap();
    agent.kill("first", "", 9, false).await.unwrap();
    assert_eq!(agent.finish("first", "", first).await.status, 137);
    assert_eq!(std::fs::read_to_string("/sys/fs/cgroup/mayu/first/cgroup.procs").unwrap(), "");
    assert_eq!(agent.state("third").await, "RUNNING");
    agent.delete("first", "").await.unwrap();
    // It is not PID 1, so that a signal has its usual effect.
    agent.kill("third", "", 15, true).await.unwrap();
    assert_eq!(agent.finish("third", "", third).await.status, 128 + 15);
    agent.delete("third", "").await.unwrap();
}

async fn the_pods_pid_namespace_is_made_anew_when_it_has_died(agent: &Agent) {
    let spec = |args: &[&str]| in_pid_namespace(POD_PID_NAMESPACE, args);
    let process = agent.create("before", spec(&["sleep", "1000"]), false).await.unwrap();
    agent.start("before", "").await.unwrap();

    nix::sys::signal::kill(support::pause().unwrap(), nix::sys::signal::Signal::SIGKILL).unwrap();
    assert_eq!(agent.finish("before", "", process).await.status, 137);
    agent.delete("before", "").await.unwrap();

    assert_eq!(agent.run("after", spec(&["cat", "/proc/1/comm"]), b"").await.stdout, "pause\n");
}

async fn a_container_joins_the_pid_namespace_of_another(agent: &Agent) {
    let join = |args: &[&str]| in_pid_namespace(&format!("{CONTAINER_PID_NAMESPACE}target"), args);
    assert_eq!(code_of(agent.create("debug", join(&["true"]), false).await), Code::NOT_FOUND);
    let wait = "trap 'exit 9' TERM; echo ready; while :; do sleep 0.1; done";
    let mut target = agent.create("target", spec(&["sh", "-c", wait]), false).await.unwrap();
    assert_eq!(code_of(agent.create("debug", join(&["true"]), false).await), Code::FAILED_PRECONDITION);
    agent.start("target", "").await.unwrap();
    target.read_some().await;

    let look = agent.run("look", join(&["sh", "-c", "tr '\\0' ' ' < /proc/1/cmdline"]), b"").await;
    assert!(look.stdout.starts_with("sh -c trap 'exit 9' TERM"), "{look:?}");

    // The namespace ends with its PID 1, and so do those who joined it.
    let debug = join(&["sh", "-c", "kill -TERM 1; sleep 1000"]);
    let debug = agent.create("debug", debug, false).await.unwrap();
    agent.start("debug", "").await.unwrap();
    assert_eq!(agent.finish("target", "", target).await.status, 9);
    assert_eq!(agent.finish("debug", "", debug).await.status, 137);
    assert_eq!(code_of(agent.create("late", join(&["true"]), false).await), Code::FAILED_PRECONDITION);
    agent.delete("debug", "").await.unwrap();
    agent.delete("target", "").await.unwrap();
}

async fn output_of_what_is_left_behind_still_arrives(agent: &Agent) {
    let init = agent.create("behind", spec(&["sleep", "1000"]), false).await.unwrap();
    agent.start("behind", "").await.unwrap();
    let script = "mkfifo /tmp/go; (read go < /tmp/go; echo late) & exit 9";
    let exec = agent.exec("behind", "e", &["sh", "-c", script]).await.unwrap();
    agent.start("behind", "e").await.unwrap();
    assert_eq!(agent.wait("behind", "e").await.unwrap(), 9);

    agent.run_exec("behind", "f", &["sh", "-c", "echo > /tmp/go"], b"").await;

    let output = agent.finish("behind", "e", exec).await;
    assert_eq!((output.stdout.as_str(), output.status), ("late\n", 9));
    agent.delete("behind", "e").await.unwrap();
    agent.kill("behind", "", 9, true).await.unwrap();
    agent.finish("behind", "", init).await;
    agent.delete("behind", "").await.unwrap();
}

async fn a_stream_that_is_not_connected_fails_the_start(agent: &Agent) {
    agent.create_unconnected("missing", spec(&["true"])).await;

    let error = agent.start("missing", "").await.unwrap_err();

    let text = support::message_of(error.clone());
    assert!(text.contains("stdout (stream:"), "{text}");
    assert_eq!(code_of(Err::<(), _>(error)), Code::DEADLINE_EXCEEDED);
    assert_eq!(agent.exit_event("missing", "").await, 137);
    agent.delete("missing", "").await.unwrap();
}

async fn many_execs_leave_nothing(agent: &Agent) {
    let init = agent.create("many", spec(&["sleep", "1000"]), false).await.unwrap();
    agent.start("many", "").await.unwrap();
    let output = agent.run_exec("many", "warm", &["echo", "warm"], b"").await;
    assert_eq!(output.stdout, "warm\n");
    let (files, memory) = (support::open_files(), agent.health().await.agent_rss_bytes);
    let paths = agent.paths_in_use();

    for number in 0..agent.repetitions() {
        let text = format!("number {number}");
        let output = agent.run_exec("many", &format!("e{number}"), &["echo", &text], b"").await;
        assert_eq!((output.stdout, output.status), (format!("{text}\n"), 0));
    }
    let together = (0..50).map(|number| async move {
        let text = format!("together {number}");
        agent.run_exec("many", &format!("t{number}"), &["echo", &text], b"").await.stdout
    });
    let outputs: BTreeSet<String> = futures::future::join_all(together).await.into_iter().collect();
    assert_eq!(outputs.len(), 50);

    assert_eq!(support::open_files(), files);
    assert_eq!(agent.paths_in_use(), paths);
    let grown = agent.health().await.agent_rss_bytes.saturating_sub(memory);
    assert!(grown < 4 << 20, "grown by {grown} bytes");
    agent.kill("many", "", 9, true).await.unwrap();
    agent.finish("many", "", init).await;
    agent.delete("many", "").await.unwrap();
    // Nothing is waited for here; a call without a limit would wait for ever.
    tokio::time::timeout(Duration::from_secs(60), agent.health()).await.unwrap();
}
