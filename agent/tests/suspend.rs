//! Containers that are suspended, and go on as what they were or as others. What is said in `containers.rs` of its tests is so here.

#![allow(clippy::unwrap_used, clippy::panic, clippy::cognitive_complexity, missing_docs)]

#[macro_use]
mod support;

use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::Path;
use std::pin::pin;
use std::process::Command;

use futures::TryStreamExt;
use mayu_agent_api::{ADOPT, ENVIRONMENT_FILE, HOOK, WARM};
use serde_json::{Value, json};
use support::{Agent, Output, Process, code_of, message_of, spec};
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use ttrpc::Code;

/// Longer than anything here takes that goes well.
const LONG_MS: u32 = 120_000;
/// The index of the loopback interface in every network namespace.
const LOOPBACK: u32 = 1;

#[test]
fn suspended_containers() {
    scenarios!(
        a_warm_container_writes_to_memory_alone,
        the_environment_is_a_file_that_no_link_leads_astray,
        a_suspended_container_stands_still_and_goes_on,
        an_exec_waits_until_its_container_goes_on,
        a_container_is_suspended_once_its_port_is_listened_on,
        a_container_is_suspended_once_its_file_is_there,
        a_pod_that_does_not_get_ready_goes_on,
        what_cannot_be_saved_is_named,
        a_connection_with_another_host_is_named,
        a_suspended_container_goes_on_as_another,
        an_adopted_container_is_all_that_one_is,
        an_adopted_terminal_works,
        streams_that_differ_end_or_are_thrown_away,
        a_hook_that_fails_ends_the_container,
        an_adopted_container_need_not_be_started,
        only_what_is_suspended_can_be_adopted,
    );
}

/// Answers each line until its input ends.
const SERVER: &str = "echo up; while read line; do echo got $line; done; echo end; exit 7";

fn warm(args: &[&str]) -> Value {
    let mut spec = spec(args);
    spec["annotations"] = json!({WARM: "true"});
    spec["process"]["env"] = json!(["PATH=/bin", "NAME=first"]);
    spec
}

/// The spec of another container that is to be what the suspended container `id` is.
fn adopting(id: &str) -> Value {
    let mut spec = warm(&["no", "such", "program"]);
    spec["annotations"][ADOPT] = json!(id);
    spec["process"]["env"] = json!(["PATH=/bin", "NAME=overridden", "NAME=second", "SECRET=a=b"]);
    spec["hostname"] = json!("other");
    spec
}

async fn start(agent: &Agent, id: &str, spec: Value) -> Process {
    let process = agent.create(id, spec, true).await.unwrap();
    agent.start(id, "").await.unwrap();
    process
}

/// A container that has answered.
async fn start_server(agent: &Agent, id: &str) -> Process {
    let mut process = start(agent, id, warm(&["sh", "-c", SERVER])).await;
    assert_eq!(process.read_text().await, "up\n");
    process
}

async fn end(agent: &Agent, id: &str, process: Process) -> Output {
    agent.kill(id, "", 9, true).await.unwrap();
    let output = agent.finish(id, "", process).await;
    agent.delete(id, "").await.unwrap();
    output
}

fn copy_rootfs(agent: &Agent, to: &Path) {
    let copied = Command::new("cp").args(["-a", "-T"]).arg(agent.path("rootfs")).arg(to).status();
    assert!(copied.unwrap().success());
}

/// What `script` says in the running container `id`.
async fn ask(agent: &Agent, id: &str, script: &str) -> String {
    let output = agent.run_exec(id, "ask", &["sh", "-c", script], b"").await;
    assert_eq!(output.status, 0, "{output:?}");
    output.stdout
}

async fn a_warm_container_writes_to_memory_alone(agent: &Agent) {
    // What cannot be created leaves nothing: its name is free, and `assert_clean` looks.
    let failed = agent.create("warm", warm(&["no-such-program"]), false).await;
    assert!(message_of(failed.map(drop).unwrap_err()).contains("executable file not found"));
    let lower = agent.path("lower, with: separators\\");
    copy_rootfs(agent, &lower);
    fs::set_permissions(&lower, fs::Permissions::from_mode(0o751)).unwrap();
    chown(&lower, Some(7), Some(8)).unwrap();
    let script = "echo changed > /etc/passwd; rm -r /home; mkdir /home; mkdir /new; stat -c '%a %u %g' /; cat /etc/passwd; ls /home";
    let mut spec = warm(&["sh", "-c", script]);
    spec["root"]["path"] = json!(lower);

    let output = agent.run("warm", spec, b"").await;

    assert_eq!(output.stdout, "751 7 8\nchanged\n", "{}", output.stderr);
    assert!(fs::read_to_string(lower.join("etc/passwd")).unwrap().starts_with("root:"));
    assert!(lower.join("home/user").exists() && !lower.join("new").exists() && !lower.join("run").exists());
}

async fn the_environment_is_a_file_that_no_link_leads_astray(agent: &Agent) {
    let rootfs = agent.path("linked");
    let outside = agent.path("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("environment.json"), "untouched").unwrap();
    copy_rootfs(agent, &rootfs);
    // In the container that is /var/run.
    fs::create_dir_all(rootfs.join("var/run/mayu")).unwrap();
    symlink("/var/run", rootfs.join("run")).unwrap();
    let script = format!("cat {ENVIRONMENT_FILE}; echo; stat -c '%a %u %g' {ENVIRONMENT_FILE}; touch /x");
    for readonly in [false, true] {
        let mut spec = warm(&["sh", "-c", &script]);
        spec["root"] = json!({"path": rootfs, "readonly": readonly});
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1001});

        let output = agent.run("env", spec, b"").await;

        assert_eq!(
            output.stdout, "{\"NAME\":\"first\",\"PATH\":\"/bin\"}\n600 1000 1001\n",
            "{}",
            output.stderr
        );
        assert_eq!(output.stderr.contains("Read-only"), readonly, "{}", output.stderr);
    }
    // Links lead nowhere but in the container, and one in its very place is refused.
    let created = |from: &'static str| async move {
        let mut spec = warm(&["true"]);
        spec["root"]["path"] = json!(agent.path("linked"));
        let created = agent.create("env", spec, false).await;
        if created.is_ok() {
            agent.delete("env", "").await.unwrap();
        }
        assert_eq!(
            fs::read_to_string(agent.path("outside/environment.json")).unwrap(),
            "untouched",
            "{from}"
        );
        created.is_ok()
    };
    symlink(outside.join("environment.json"), rootfs.join("var/run/mayu/environment.json")).unwrap();
    assert!(!created("the file").await);
    fs::remove_file(rootfs.join("run")).unwrap();
    symlink(&outside, rootfs.join("run")).unwrap();
    created("the directory").await;
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);

    // What is mounted over its place does not hide it.
    let mut spec = warm(&["sh", "-c", &script]);
    let mounts = spec["mounts"].as_array_mut().unwrap();
    mounts.push(json!({"destination": "/run", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]}));
    let output = agent.run("env", spec, b"").await;
    assert!(output.stdout.starts_with("{\"NAME\":\"first\""), "{output:?}");
}

async fn a_suspended_container_stands_still_and_goes_on(agent: &Agent) {
    let first = start_server(agent, "other").await;
    let count =
        "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); echo $i; done; read line; echo got $line; sleep 1000";
    let mut process = start(agent, "count", warm(&["sh", "-c", count])).await;
    let mut text = process.read_text().await;

    // What has been printed by then arrives although nothing runs any more.
    let mut suspended = pin!(agent.suspend("count"));
    loop {
        tokio::select! {
            suspended = &mut suspended => break suspended.unwrap(),
            more = process.read_text() => text += &more,
        }
    }
    for id in ["count", "other"] {
        assert_eq!(agent.state(id).await, "PAUSED");
        let events = fs::read_to_string(format!("/sys/fs/cgroup/mayu/{id}/cgroup.events")).unwrap();
        assert!(events.contains("frozen 1"), "{events}");
    }
    assert_eq!(code_of(agent.suspend("count").await), Code::FAILED_PRECONDITION);
    agent.resume("count").await.unwrap();
    agent.resume("other").await.unwrap();

    while !text.ends_with("\n20000\n") {
        text += &process.read_text().await;
    }
    let expected: String = (1..=20000).map(|number| format!("{number}\n")).collect();
    assert!(text == expected, "{text}");
    process.write(b"this\n").await;
    assert_eq!(process.read_text().await, "got this\n");
    end(agent, "count", process).await;
    // Its streams are its own again: their end is the end of its input.
    let mut first = first;
    first.close_stdin();
    let output = agent.finish("other", "", first).await;
    assert_eq!((output.stdout.as_str(), output.status), ("end\n", 7));
    agent.delete("other", "").await.unwrap();
}

async fn an_exec_waits_until_its_container_goes_on(agent: &Agent) {
    let process = start_server(agent, "warm").await;
    agent.suspend("warm").await.unwrap();

    let asked = async { ask(agent, "warm", "echo here").await };
    let resumed = async {
        tokio::task::yield_now().await;
        agent.resume("warm").await.unwrap();
    };
    let (said, ()) = tokio::join!(asked, resumed);

    assert_eq!(said, "here\n");
    end(agent, "warm", process).await;
}

async fn a_container_is_suspended_once_its_port_is_listened_on(agent: &Agent) {
    let script = "echo up; read line; exec nc -l -p 18080";
    let mut process = start(agent, "port", warm(&["sh", "-c", script])).await;
    process.read_text().await;
    let late = agent.suspend_when("port", 18080, "", 50).await.unwrap_err();
    assert_eq!(
        message_of(late.clone()),
        "container \"port\" was not ready within 50 ms: nobody listens on TCP port 18080"
    );
    assert_eq!(code_of(Err::<(), _>(late)), Code::DEADLINE_EXCEEDED);
    assert_eq!(agent.state("port").await, "RUNNING");

    let (suspended, ()) =
        tokio::join!(agent.suspend_when("port", 18080, "", LONG_MS), process.write(b"go\n"));

    suspended.unwrap();
    assert_eq!(agent.state("port").await, "PAUSED");
    end(agent, "port", process).await;
}

async fn a_container_is_suspended_once_its_file_is_there(agent: &Agent) {
    let script =
        "ln -s /tmp/below /link; echo up; read line; mkdir -p /tmp/below; : > /tmp/below/ready; sleep 1000";
    let mut process = start(agent, "file", warm(&["sh", "-c", script])).await;
    process.read_text().await;
    // That is one of the host's, to which the container has a link.
    let outside = agent.path("rootfs");
    ask(agent, "file", &format!("mkdir -p /x; ln -s {} /x/out", outside.display())).await;
    for path in ["/link/ready", "/x/out/bin/busybox", "/etc/passwd/file"] {
        assert_eq!(code_of(agent.suspend_when("file", 0, path, 0).await), Code::DEADLINE_EXCEEDED, "{path}");
    }
    for path in ["relative", "/a\0b"] {
        assert_eq!(code_of(agent.suspend_when("file", 0, path, 0).await), Code::INVALID_ARGUMENT, "{path:?}");
    }
    assert_eq!(code_of(agent.suspend_when("file", 65536, "", 0).await), Code::INVALID_ARGUMENT);

    let (suspended, ()) =
        tokio::join!(agent.suspend_when("file", 0, "/link/ready", LONG_MS), process.write(b"go\n"));

    suspended.unwrap();
    assert_eq!(agent.state("file").await, "PAUSED");
    end(agent, "file", process).await;
}

async fn a_pod_that_does_not_get_ready_goes_on(agent: &Agent) {
    let mut process = start_server(agent, "slow").await;

    // Only one waits at a time; and who waits is told at once that it is in vain.
    let mut waiting = pin!(agent.suspend_when("slow", 0, "/never", LONG_MS));
    let refused = tokio::select! {
        biased;
        waited = &mut waiting => panic!("{waited:?}"),
        refused = agent.suspend_when("slow", 0, "/never", 0) => refused,
    };
    process.write(b"x\n").await;
    assert_eq!(process.read_text().await, "got x\n");
    process.close_stdin();

    assert_eq!(message_of(refused.unwrap_err()), "cannot suspend: it is under way already");
    let text = message_of(waiting.await.unwrap_err());
    assert_eq!(text, "cannot suspend: container \"slow\" is stopped");
    assert_eq!(agent.finish("slow", "", process).await.status, 7);
    agent.delete("slow", "").await.unwrap();
}

async fn what_cannot_be_saved_is_named(agent: &Agent) {
    assert_eq!(code_of(agent.suspend("nobody").await), Code::NOT_FOUND);
    let process = start_server(agent, "warm").await;
    let obstacle = async || {
        let error = agent.suspend("warm").await.unwrap_err();
        assert_eq!(agent.state("warm").await, "RUNNING");
        assert_eq!(code_of(Err::<(), _>(error.clone())), Code::FAILED_PRECONDITION);
        message_of(error)
    };

    let exec = agent.exec("warm", "e", &["sleep", "1000"]).await.unwrap();
    assert!(obstacle().await.ends_with("process \"e\" of container \"warm\" is created but not started"));
    agent.start("warm", "e").await.unwrap();
    assert!(obstacle().await.ends_with("process \"e\" of container \"warm\" is running"));
    agent.kill("warm", "e", 9, false).await.unwrap();
    agent.finish("warm", "e", exec).await;
    agent.delete("warm", "e").await.unwrap();

    let cold = agent.create("cold", spec(&["sleep", "1000"]), false).await.unwrap();
    assert!(obstacle().await.contains("container \"cold\" is created but not started"));
    agent.start("cold", "").await.unwrap();
    assert!(obstacle().await.contains("container \"cold\" was not created as one that may be"));
    agent.kill("cold", "", 9, true).await.unwrap();
    agent.finish("cold", "", cold).await;
    assert!(obstacle().await.contains("container \"cold\" is stopped"));
    agent.delete("cold", "").await.unwrap();

    // More than the streams hold, so that there is something left in the pipe.
    let noisy = start(agent, "noisy", warm(&["yes"])).await;
    while agent.suspend("warm").await.is_ok() {
        for id in ["warm", "noisy"] {
            agent.resume(id).await.unwrap();
        }
    }
    assert!(obstacle().await.contains("nobody takes the output of container \"noisy\""));
    assert_eq!(agent.state("noisy").await, "RUNNING");
    end(agent, "noisy", noisy).await;

    agent.suspend("warm").await.unwrap();
    end(agent, "warm", process).await;
}

async fn a_connection_with_another_host_is_named(agent: &Agent) {
    let process = start_server(agent, "connected").await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let within = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    agent.suspend("connected").await.unwrap();
    agent.resume("connected").await.unwrap();
    drop(within);

    // Two addresses look like two hosts.
    let [here, there] = [Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(192, 0, 2, 2)];
    let (connection, netlink, _) = rtnetlink::new_connection().unwrap();
    let connection = tokio::spawn(connection);
    for address in [here, there] {
        netlink.address().add(LOOPBACK, address.into(), 32).execute().await.unwrap();
    }
    let listener = TcpListener::bind((there, 0)).await.unwrap();
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((here, 0).into()).unwrap();
    let open = socket.connect(listener.local_addr().unwrap()).await.unwrap();
    let accepted = listener.accept().await.unwrap();
    let error = agent.suspend("connected").await.unwrap_err();
    let state = agent.state("connected").await;
    // A reset leaves nothing of either end.
    open.set_zero_linger().unwrap();
    drop((open, accepted));
    let suspended = agent.suspend("connected").await;
    let mut addresses = netlink.address().get().set_link_index_filter(LOOPBACK).execute();
    while let Ok(Some(address)) = addresses.try_next().await {
        if address.header.prefix_len == 32 {
            netlink.address().del(address).execute().await.unwrap();
        }
    }
    connection.abort();

    let text = message_of(error);
    assert!(
        text.contains("192.0.2.1:") && text.contains("192.0.2.2:") && text.ends_with(" is open"),
        "{text}"
    );
    assert_eq!(state, "RUNNING");
    suspended.unwrap();
    end(agent, "connected", process).await;
}

async fn a_suspended_container_goes_on_as_another(agent: &Agent) {
    let old = start_server(agent, "template").await;
    ask(agent, "template", "echo kept > /kept").await;
    agent.suspend("template").await.unwrap();
    // That is what a machine looks like that is restored.
    drop(old);

    let mut spec = adopting("template");
    spec["annotations"][HOOK] = json!("/bin/hook");
    spec["process"]["args"] = json!(["ignored"]);
    // The hook is what the image has.
    let hook = agent.path("rootfs").join("bin/hook");
    fs::write(&hook, "#!/bin/sh\n{ echo $NAME $SECRET; cat /run/mayu/environment.json; echo; hostname; id -u; cat /kept; } > /told\n").unwrap();
    fs::set_permissions(&hook, fs::Permissions::from_mode(0o755)).unwrap();
    let mut new = agent.create("function", spec, true).await.unwrap();
    assert_eq!(agent.state("function").await, "CREATED");
    assert_eq!(code_of(agent.resume("function").await), Code::FAILED_PRECONDITION);
    let pid = agent.start("function", "").await.unwrap();
    assert_eq!(agent.state("function").await, "RUNNING");

    let told = ask(agent, "function", "cat /told; stat -c '%a %u' /run/mayu/environment.json").await;
    let expected =
        "second a=b\n{\"NAME\":\"second\",\"PATH\":\"/bin\",\"SECRET\":\"a=b\"}\nother\n0\nkept\n600 0\n";
    assert_eq!(told, expected);
    assert_ne!(nix::unistd::gethostname().unwrap(), "other");
    new.write(b"hello\n").await;
    assert_eq!(new.read_text().await, "got hello\n");
    new.close_stdin();
    let output = agent.finish("function", "", new).await;
    assert_eq!((output.stdout.as_str(), output.status), ("end\n", 7));
    assert!(pid > 0 && agent.delete("function", "").await.unwrap() == 7);
    // Neither the hook nor the old container's end has been told.
    assert_eq!(
        agent.events_of("function").iter().filter(|kind| **kind == "exit").count(),
        2,
        "its own and the exec's"
    );
    assert_eq!(agent.events_of("template").len(), 1, "the exec's");
    fs::remove_file(hook).unwrap();
}

async fn an_adopted_container_is_all_that_one_is(agent: &Agent) {
    let old = start_server(agent, "old").await;
    agent.suspend("old").await.unwrap();
    drop(old);
    // A name is taken for as long as there is something of it.
    let process = agent.create("new", adopting("old"), true).await.unwrap();
    assert_eq!(code_of(agent.create("old", warm(&["true"]), false).await), Code::ALREADY_EXISTS);
    assert_eq!(code_of(agent.create("new", warm(&["true"]), false).await), Code::ALREADY_EXISTS);
    assert_eq!(agent.pids("new").await.len(), 1);
    agent.start("new", "").await.unwrap();

    assert_eq!(code_of(agent.wait("old", "").await), Code::NOT_FOUND);
    assert!(agent.cpu_usage("new").await > 0);
    agent.update("new", json!({})).await.unwrap();
    agent.pause("new").await.unwrap();
    agent.resume("new").await.unwrap();
    let output = agent.run_exec("new", "e", &["sh", "-c", "hostname; exit 3"], b"").await;
    assert_eq!((output.stdout.as_str(), output.status), ("other\n", 3));
    // It can be suspended and be adopted again.
    agent.suspend("new").await.unwrap();
    drop(process);
    let mut process = agent.create("newer", adopting("new"), true).await.unwrap();
    agent.start("newer", "").await.unwrap();
    process.write(b"again\n").await;
    assert_eq!(process.read_text().await, "got again\n");
    assert_eq!(end(agent, "newer", process).await.status, 137);
}

async fn an_adopted_terminal_works(agent: &Agent) {
    let mut spec = warm(&["sh", "-c", "echo up; while read line; do stty size; echo got $line; done"]);
    spec["process"]["terminal"] = json!(true);
    let mut old = agent.create_terminal("old", spec).await;
    agent.start("old", "").await.unwrap();
    old.until("up\r\n").await;
    agent.suspend("old").await.unwrap();
    drop(old);

    assert_eq!(code_of(agent.create("new", adopting("old"), true).await), Code::INVALID_ARGUMENT);
    let mut spec = adopting("old");
    spec["process"]["consoleSize"] = json!({"width": 90, "height": 30});
    let mut new = agent.create_terminal("new", spec).await;
    agent.start("new", "").await.unwrap();
    new.write(b"line\n").await;
    new.until("30 90\r\ngot line\r\n").await;
    // Ctrl-D
    new.write(b"\x04").await;
    new.rest().await;
    assert_eq!(agent.exit_event("new", "").await, 0);
    agent.delete("new", "").await.unwrap();
}

async fn streams_that_differ_end_or_are_thrown_away(agent: &Agent) {
    // The old one has no input, the new one has.
    let old = agent.create("old", warm(&["sleep", "1000"]), false).await.unwrap();
    agent.start("old", "").await.unwrap();
    agent.suspend("old").await.unwrap();
    drop(old);
    let mut new = agent.create("new", adopting("old"), true).await.unwrap();
    agent.start("new", "").await.unwrap();
    new.stdin_closed().await;
    end(agent, "new", new).await;

    // The old one has all, the new one only its errors. Its input ends, and what it prints is more than a pipe holds.
    let script = "cat; seq 50000; echo quiet >&2; exec sleep 1000";
    let old = start(agent, "old", warm(&["sh", "-c", script])).await;
    agent.suspend("old").await.unwrap();
    drop(old);
    let mut errors = agent.create_with_errors_only("new", adopting("old")).await;
    agent.start("new", "").await.unwrap();
    let mut text = [0; 6];
    errors.read_exact(&mut text).await.unwrap();
    assert_eq!(&text, b"quiet\n");
    agent.kill("new", "", 9, false).await.unwrap();
    assert_eq!(agent.exit_event("new", "").await, 137);
    agent.delete("new", "").await.unwrap();
}

async fn a_hook_that_fails_ends_the_container(agent: &Agent) {
    for (hook, reason) in [
        ("/bin/false", "ended with status 1"),
        (
            "/no/such/hook",
            "could not be run: exec: \"/no/such/hook\": stat /no/such/hook: no such file or directory",
        ),
    ] {
        let old = start_server(agent, "old").await;
        agent.suspend("old").await.unwrap();
        drop(old);
        let mut spec = adopting("old");
        spec["annotations"][HOOK] = json!(hook);
        let process = agent.create("new", spec, true).await.unwrap();

        let error = agent.start("new", "").await.unwrap_err();

        assert_eq!(message_of(error), format!("hook {hook:?} of container \"new\" {reason}"));
        assert_eq!(agent.finish("new", "", process).await.status, 137);
        agent.delete("new", "").await.unwrap();
    }
}

async fn an_adopted_container_need_not_be_started(agent: &Agent) {
    let old = start_server(agent, "old").await;
    agent.suspend("old").await.unwrap();
    drop(old);
    let process = agent.create("new", adopting("old"), true).await.unwrap();

    agent.delete("new", "").await.unwrap();

    assert_eq!(agent.exit_event("new", "").await, 137);
    drop(process);
    // Nor adopted: a suspended one is ended as any other.
    let process = start_server(agent, "old").await;
    agent.suspend("old").await.unwrap();
    assert_eq!(end(agent, "old", process).await.status, 137);
    // A stream that is not connected fails the start of an adopted one too.
    let old = start_server(agent, "old").await;
    agent.suspend("old").await.unwrap();
    drop(old);
    agent.create_unconnected("new", adopting("old")).await;
    assert_eq!(code_of(agent.start("new", "").await), Code::DEADLINE_EXCEEDED);
    assert_eq!(agent.exit_event("new", "").await, 137);
    agent.delete("new", "").await.unwrap();
}

async fn only_what_is_suspended_can_be_adopted(agent: &Agent) {
    let adopt = async || agent.create("new", adopting("old"), true).await.map(drop).unwrap_err();
    assert_eq!(code_of(Err::<(), _>(adopt().await)), Code::NOT_FOUND);
    let process = agent.create("old", warm(&["sleep", "1000"]), true).await.unwrap();
    assert_eq!(message_of(adopt().await), "cannot adopt container \"old\": it is created but not started");
    agent.start("old", "").await.unwrap();
    assert_eq!(message_of(adopt().await), "cannot adopt container \"old\": it is running");
    agent.pause("old").await.unwrap();
    let paused = adopt().await;
    assert_eq!(message_of(paused.clone()), "cannot adopt container \"old\": it is not suspended");
    assert_eq!(code_of(Err::<(), _>(paused)), Code::FAILED_PRECONDITION);
    agent.resume("old").await.unwrap();
    agent.suspend("old").await.unwrap();
    agent.resume("old").await.unwrap();
    agent.pause("old").await.unwrap();
    assert_eq!(message_of(adopt().await), "cannot adopt container \"old\": it is not suspended");
    // A refused one is what it was.
    agent.resume("old").await.unwrap();
    agent.suspend("old").await.unwrap();
    let mut bad = adopting("old");
    bad.as_object_mut().unwrap().remove("process");
    assert_eq!(code_of(agent.create("new", bad, true).await), Code::INVALID_ARGUMENT);
    assert_eq!(agent.state("old").await, "PAUSED");
    agent.kill("old", "", 9, false).await.unwrap();
    assert_eq!(agent.wait("old", "").await.unwrap(), 137);
    assert_eq!(message_of(adopt().await), "cannot adopt container \"old\": it is stopped");
    agent.finish("old", "", process).await;
    agent.delete("old", "").await.unwrap();
}
