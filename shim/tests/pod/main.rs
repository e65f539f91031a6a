//! The shim with everything but a machine: containerd's requests on one side, a scripted VMM and agent on the other.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used, reason = "a test's way to fail")]

mod host;
mod hostile;
mod policy;
mod sandbox_api;
mod stand_in;
mod warm;

use containerd_shim_protos::api::{
    CloseIORequest, CreateTaskRequest, DeleteRequest, ExecProcessRequest, KillRequest, ShutdownRequest,
    StartRequest, StateRequest, WaitRequest,
};
use containerd_shim_protos::shim_async::TaskClient;
use containerd_shim_protos::types::task::Status;
use host::Host;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use ttrpc::Code;
use ttrpc::context::Context;

/// Not a test: the VMM and the agent of the others.
#[tokio::test]
async fn the_stand_in() {
    if std::env::var_os(stand_in::VARIABLE).is_some() {
        stand_in::run().await;
    }
}

fn cx() -> Context {
    Context::default()
}

async fn start(task: &TaskClient, id: &str, exec_id: &str) -> ttrpc::Result<()> {
    let request = StartRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
    task.start(cx(), &request).await.map(drop)
}

async fn wait(task: &TaskClient, id: &str, exec_id: &str) -> u32 {
    let request = WaitRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
    task.wait(cx(), &request).await.unwrap().exit_status
}

async fn delete(task: &TaskClient, id: &str, exec_id: &str) -> ttrpc::Result<u32> {
    let request = DeleteRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
    task.delete(cx(), &request).await.map(|response| response.exit_status)
}

async fn state(task: &TaskClient, id: &str) -> Status {
    let request = StateRequest { id: id.into(), ..Default::default() };
    task.state(cx(), &request).await.unwrap().status.unwrap()
}

async fn shutdown(host: &Host) {
    host.task.shutdown(cx(), &ShutdownRequest::default()).await.unwrap();
    assert!(host.pod.exit.is_cancelled());
    host.assert_nothing_left();
}

fn exec(id: &str, exec_id: &str, arguments: &[&str]) -> ExecProcessRequest {
    let process = json!({"cwd": "/", "args": arguments, "user": {"uid": 0, "gid": 0}});
    let spec = Any { value: process.to_string().into_bytes(), ..Default::default() };
    ExecProcessRequest {
        id: id.into(),
        exec_id: exec_id.into(),
        spec: MessageField::some(spec),
        ..Default::default()
    }
}

#[track_caller]
fn code<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (Code, String) {
    match result.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message),
        other => panic!("not a status: {other}"),
    }
}

#[tokio::test]
async fn a_container_runs_from_create_to_shutdown_and_leaves_nothing() {
    let Some(mut host) = Host::new("").await else { return };
    let stdout = host.fifo("stdout");
    let mut reader = pipe::OpenOptions::new().open_receiver(&stdout).unwrap();
    let request = CreateTaskRequest { stdout, ..host.container("c", &["echo", "hello"]) };

    let created = host.task.create(cx(), &request).await.unwrap();
    assert_eq!(i32::try_from(created.pid).unwrap(), host.vmm());
    assert_eq!(state(&host.task, "c").await, Status::CREATED);
    start(&host.task, "c", "").await.unwrap();
    let mut text = String::new();
    reader.read_to_string(&mut text).await.unwrap();

    assert_eq!(text, "hello\n");
    assert_eq!(wait(&host.task, "c", "").await, 0);
    assert_eq!(state(&host.task, "c").await, Status::STOPPED);
    assert_eq!(delete(&host.task, "c", "").await.unwrap(), 0);
    shutdown(&host).await;
    for topic in ["/tasks/create", "/tasks/start", "/tasks/exit c 0", "/tasks/delete"] {
        assert_eq!(host.event().await, topic);
    }
}

#[tokio::test]
async fn an_end_before_the_answer_to_start_is_published_after_the_start() {
    let Some(mut host) = Host::new("").await else { return };
    host.task.create(cx(), &host.container("c", &["exit", "42"])).await.unwrap();
    start(&host.task, "c", "").await.unwrap();
    assert_eq!(wait(&host.task, "c", "").await, 42);
    for topic in ["/tasks/create", "/tasks/start", "/tasks/exit c 42"] {
        assert_eq!(host.event().await, topic);
    }
    delete(&host.task, "c", "").await.unwrap();
    shutdown(&host).await;
}

#[tokio::test]
async fn an_exec_copies_its_stdin_until_it_is_closed() {
    let Some(mut host) = Host::new("").await else { return };
    host.task.create(cx(), &host.container("c", &["sleep"])).await.unwrap();
    start(&host.task, "c", "").await.unwrap();
    let (stdin, stdout) = (host.fifo("stdin"), host.fifo("stdout"));
    let mut reader = pipe::OpenOptions::new().open_receiver(&stdout).unwrap();
    let request = ExecProcessRequest { stdin: stdin.clone(), stdout, ..exec("c", "e", &["cat"]) };

    host.task.exec(cx(), &request).await.unwrap();
    start(&host.task, "c", "e").await.unwrap();
    let mut writer = pipe::OpenOptions::new().open_sender(&stdin).unwrap();
    writer.write_all(b"through and back").await.unwrap();
    let request = CloseIORequest { id: "c".into(), exec_id: "e".into(), stdin: true, ..Default::default() };
    host.task.close_io(cx(), &request).await.unwrap();
    drop(writer);
    let mut text = String::new();
    reader.read_to_string(&mut text).await.unwrap();

    assert_eq!(text, "through and back");
    assert_eq!(wait(&host.task, "c", "e").await, 0);
    let topics =
        ["/tasks/create", "/tasks/start", "/tasks/exec-added e", "/tasks/exec-started e", "/tasks/exit e 0"];
    for topic in topics {
        assert_eq!(host.event().await, topic);
    }
    assert_eq!(delete(&host.task, "c", "e").await.unwrap(), 0);
    let request = KillRequest { id: "c".into(), signal: 9, ..Default::default() };
    host.task.kill(cx(), &request).await.unwrap();
    assert_eq!(wait(&host.task, "c", "").await, 137);
    delete(&host.task, "c", "").await.unwrap();
    shutdown(&host).await;
}

#[tokio::test]
async fn a_pod_is_its_vm_and_its_containers_come_and_go() {
    let Some(mut host) = Host::new("").await else { return };
    let created = host.task.create(cx(), &host.sandbox("pod")).await.unwrap();
    assert_eq!(i32::try_from(created.pid).unwrap(), host.vmm());
    start(&host.task, "pod", "").await.unwrap();
    let vmm = host.vmm();
    let signal = |id: &str, signal| KillRequest { id: id.into(), signal, ..Default::default() };

    for round in ["first", "second"] {
        host.task.create(cx(), &host.container(round, &["sleep"])).await.unwrap();
        start(&host.task, round, "").await.unwrap();
        host.task.kill(cx(), &signal(round, 9)).await.unwrap();
        assert_eq!(wait(&host.task, round, "").await, 137);
        delete(&host.task, round, "").await.unwrap();
        host.task.shutdown(cx(), &ShutdownRequest::default()).await.unwrap();
        assert!(!host.pod.exit.is_cancelled(), "the pod lives on");
        assert_eq!(host.vmm(), vmm);
    }

    let (refused, message) = code(host.task.exec(cx(), &exec("pod", "e", &["sh"])).await);
    assert_eq!(refused, Code::UNIMPLEMENTED);
    assert!(message.contains("\"pod\"") && message.contains("exec"), "{message}");
    host.task.kill(cx(), &signal("pod", 1)).await.unwrap();
    assert_eq!(state(&host.task, "pod").await, Status::RUNNING);
    host.task.kill(cx(), &signal("pod", 9)).await.unwrap();
    assert_eq!(wait(&host.task, "pod", "").await, 137);
    assert_eq!(delete(&host.task, "pod", "").await.unwrap(), 137);
    shutdown(&host).await;
    for topic in ["/tasks/create", "/tasks/start", "/tasks/create"] {
        assert_eq!(host.event().await, topic);
    }
}

#[tokio::test]
async fn every_process_ends_with_137_when_the_vmm_is_killed() {
    let Some(mut host) = Host::new("").await else { return };
    host.task.create(cx(), &host.container("c", &["sleep"])).await.unwrap();
    start(&host.task, "c", "").await.unwrap();
    host.task.exec(cx(), &exec("c", "e", &["sleep"])).await.unwrap();
    start(&host.task, "c", "e").await.unwrap();

    kill(Pid::from_raw(host.vmm()), Signal::SIGKILL).unwrap();

    let (init, exec) = tokio::join!(wait(&host.task, "c", ""), wait(&host.task, "c", "e"));
    assert_eq!((init, exec), (137, 137));
    for _ in ["create", "start", "exec-added", "exec-started"] {
        host.event().await;
    }
    assert_eq!(host.event().await, "/tasks/exit e 137");
    assert_eq!(host.event().await, "/tasks/exit c 137");
    let (gone, message) = code(host.task.create(cx(), &host.container("d", &["sleep"])).await);
    assert_eq!(gone, Code::FAILED_PRECONDITION);
    assert!(message.starts_with("the pod's VM is gone: "), "{message}");
    assert_eq!(delete(&host.task, "c", "").await.unwrap(), 137);
    shutdown(&host).await;
}

#[tokio::test]
async fn requests_at_the_wrong_time_have_their_codes() {
    let Some(host) = Host::new("").await else { return };
    assert_eq!(code(start(&host.task, "c", "").await).0, Code::NOT_FOUND);
    let request = host.container("c", &["sleep"]);
    host.task.create(cx(), &request).await.unwrap();
    assert_eq!(code(host.task.create(cx(), &request).await).0, Code::ALREADY_EXISTS);
    start(&host.task, "c", "").await.unwrap();
    assert_eq!(code(start(&host.task, "c", "").await).0, Code::FAILED_PRECONDITION);
    assert_eq!(code(delete(&host.task, "c", "").await).0, Code::FAILED_PRECONDITION);
    assert_eq!(code(start(&host.task, "c", "e").await).0, Code::NOT_FOUND);
    host.task.exec(cx(), &exec("c", "e", &["sleep"])).await.unwrap();
    assert_eq!(code(host.task.exec(cx(), &exec("c", "e", &["sleep"])).await).0, Code::ALREADY_EXISTS);
    let signal = |exec_id: &str| KillRequest {
        id: "c".into(),
        exec_id: exec_id.into(),
        signal: 9,
        ..Default::default()
    };
    assert_eq!(code(host.task.kill(cx(), &signal("e")).await).0, Code::FAILED_PRECONDITION);
    host.task.shutdown(cx(), &ShutdownRequest::default()).await.unwrap();
    assert!(!host.pod.exit.is_cancelled());
    host.task.kill(cx(), &signal("")).await.unwrap();
    wait(&host.task, "c", "").await;
    assert_eq!(
        code(host.task.kill(cx(), &signal("")).await),
        (Code::NOT_FOUND, "process already finished".into())
    );
    assert_eq!(code(host.task.exec(cx(), &exec("c", "f", &["sleep"])).await).0, Code::FAILED_PRECONDITION);
    delete(&host.task, "c", "").await.unwrap();
    shutdown(&host).await;
}

#[tokio::test]
async fn a_start_that_fails_ends_an_exec_quietly() {
    let Some(host) = Host::new("").await else { return };
    host.task.create(cx(), &host.container("c", &["sleep"])).await.unwrap();
    start(&host.task, "c", "").await.unwrap();
    host.task.exec(cx(), &exec("c", "e", &["missing"])).await.unwrap();
    assert_eq!(
        code(start(&host.task, "c", "e").await),
        (Code::INVALID_ARGUMENT, "missing: no such file".into())
    );
    assert_eq!(wait(&host.task, "c", "e").await, 255);
    delete(&host.task, "c", "e").await.unwrap();
    host.pod.tear_down().await;
    host.assert_nothing_left();
}

#[tokio::test]
async fn containers_after_the_first_share_the_vm() {
    let Some(host) = Host::new("").await else { return };
    let first = host.task.create(cx(), &host.container("c", &["sleep"])).await.unwrap().pid;
    let second = host.task.create(cx(), &host.container("d", &["exit", "3"])).await.unwrap().pid;
    assert_eq!(first, second);
    start(&host.task, "d", "").await.unwrap();
    assert_eq!(wait(&host.task, "d", "").await, 3);
    delete(&host.task, "d", "").await.unwrap();
    assert!(!host.path("state/ns/pod/tree/d").exists());
    delete(&host.task, "c", "").await.unwrap();
    shutdown(&host).await;
}

#[tokio::test]
async fn a_failed_create_says_why_and_leaves_nothing() {
    let table = [
        ("refuse", "sleep", Code::INTERNAL, "VMM: build the machine: the kernel is no ELF file"),
        ("silent", "sleep", Code::DEADLINE_EXCEEDED, "Linux version 6.12 (stand-in)"),
        ("old-agent", "sleep", Code::INTERNAL, "the guest image has agent 0.0.0"),
        ("", "uncreatable", Code::INVALID_ARGUMENT, "no user \"nobody2\""),
    ];
    for (behaviour, program, expected, words) in table {
        let Some(host) = Host::new(behaviour).await else { return };
        let (code, message) = code(host.task.create(cx(), &host.container("c", &[program])).await);
        assert_eq!(code, expected, "{behaviour}: {message}");
        assert!(message.contains(words), "{behaviour}: {message}");
        host.assert_nothing_left();
    }
}

#[tokio::test]
async fn a_bad_bundle_leaves_nothing() {
    let Some(host) = Host::new("").await else { return };
    let request = host.container("c", &["sleep"]);
    let config = std::path::Path::new(&request.bundle).join("config.json");
    std::fs::write(&config, "{").unwrap();
    let (malformed, message) = code(host.task.create(cx(), &request).await);
    assert_eq!(malformed, Code::INVALID_ARGUMENT);
    assert!(message.contains("config.json") && message.contains("line 1"), "{message}");
    let spec = json!({
        "ociVersion": "1.1.0",
        "root": {"path": host.path("rootfs")},
        "process": {"cwd": "/", "args": ["sleep"], "user": {"uid": 0, "gid": 0}},
        "mounts": [{"destination": "/data", "source": "/nonexistent", "options": ["rbind"]}],
        "linux": {"namespaces": [{"type": "network"}, {"type": "pid"}, {"type": "ipc"}]},
    });
    std::fs::write(&config, spec.to_string()).unwrap();
    let (missing, message) = code(host.task.create(cx(), &request).await);
    assert_eq!(missing, Code::INVALID_ARGUMENT);
    assert!(message.starts_with("mount on /data: source /nonexistent: No such file"), "{message}");
    host.assert_nothing_left();
}
