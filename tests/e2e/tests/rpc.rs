//! The codes that the shim answers with. containerd acts on them, so they are part of the interface.

use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, DeleteRequest, ExecProcessRequest, KillRequest,
    PauseRequest, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StateRequest, Status,
    WaitRequest,
};
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::sandbox_api::{PingRequest, PlatformRequest, SandboxMetricsRequest};
use containerd_shim_protos::shim_async::TaskClient;
use mayu_e2e::shim::{code, connect, connect_to_sandbox, patiently};
use mayu_e2e::{BUSYBOX, Container};
use serde_json::json;
use ttrpc::Code;

fn exec(id: &str, exec_id: &str, args: &[&str]) -> ExecProcessRequest {
    let process = json!({ "args": args, "cwd": "/", "env": ["PATH=/bin"], "user": { "uid": 0, "gid": 0 } });
    let spec = Any {
        type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".to_owned(),
        value: process.to_string().into_bytes(),
        ..Any::default()
    };
    ExecProcessRequest {
        id: id.to_owned(),
        exec_id: exec_id.to_owned(),
        spec: Some(spec).into(),
        ..Default::default()
    }
}

fn start(id: &str, exec_id: &str) -> StartRequest {
    StartRequest { id: id.to_owned(), exec_id: exec_id.to_owned(), ..Default::default() }
}

fn delete(id: &str, exec_id: &str) -> DeleteRequest {
    DeleteRequest { id: id.to_owned(), exec_id: exec_id.to_owned(), ..Default::default() }
}

fn kill(id: &str, exec_id: &str, signal: u32) -> KillRequest {
    KillRequest { id: id.to_owned(), exec_id: exec_id.to_owned(), signal, ..Default::default() }
}

fn wait(id: &str, exec_id: &str) -> WaitRequest {
    WaitRequest { id: id.to_owned(), exec_id: exec_id.to_owned(), ..Default::default() }
}

async fn status(shim: &TaskClient, id: &str, exec_id: &str) -> Status {
    let request = StateRequest { id: id.to_owned(), exec_id: exec_id.to_owned(), ..Default::default() };
    shim.state(patiently(), &request).await.unwrap().status()
}

#[tokio::test]
async fn the_sandbox_service_describes_the_vm() {
    let container = Container::idle(&[]);
    let sandbox = connect_to_sandbox(&container).await;
    let id = container.id().to_owned();

    let request = PlatformRequest { sandbox_id: id.clone(), ..Default::default() };
    let platform = sandbox.platform(patiently(), &request).await.unwrap().platform;
    assert_eq!((platform.os.as_str(), platform.architecture.as_str()), ("linux", "amd64"));

    let request = SandboxMetricsRequest { sandbox_id: id.clone(), ..Default::default() };
    let metrics = sandbox.sandbox_metrics(patiently(), &request).await.unwrap().metrics;
    assert_eq!(metrics.id, id);
    assert_eq!(metrics.data.type_url, "io.containerd.cgroups.v2.Metrics");
    let figures = Metrics::parse_from_bytes(&metrics.data.value).unwrap();
    assert!(figures.cpu.usage_usec > 0);

    let other = SandboxMetricsRequest { sandbox_id: "other".into(), ..Default::default() };
    assert_eq!(code(sandbox.sandbox_metrics(patiently(), &other).await), Code::NOT_FOUND);
    let request = PingRequest { sandbox_id: id, ..Default::default() };
    sandbox.ping_sandbox(patiently(), &request).await.unwrap();
}

#[tokio::test]
async fn what_is_not_there_is_not_found() {
    let container = Container::idle(&[]);
    let shim = connect(&container).await;
    let id = container.id();
    for (id, exec_id) in [("other", ""), (id, "other")] {
        let state = StateRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        assert_eq!(code(shim.state(patiently(), &state).await), Code::NOT_FOUND);
        assert_eq!(code(shim.start(patiently(), &start(id, exec_id)).await), Code::NOT_FOUND);
        assert_eq!(code(shim.delete(patiently(), &delete(id, exec_id)).await), Code::NOT_FOUND);
        assert_eq!(code(shim.kill(patiently(), &kill(id, exec_id, 15)).await), Code::NOT_FOUND);
        assert_eq!(code(shim.wait(patiently(), &wait(id, exec_id)).await), Code::NOT_FOUND);
        let resize = ResizePtyRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            width: 1,
            height: 1,
            ..Default::default()
        };
        assert_eq!(code(shim.resize_pty(patiently(), &resize).await), Code::NOT_FOUND);
        let close =
            CloseIORequest { id: id.into(), exec_id: exec_id.into(), stdin: true, ..Default::default() };
        assert_eq!(code(shim.close_io(patiently(), &close).await), Code::NOT_FOUND);
    }
}

#[tokio::test]
async fn a_running_task_is_not_to_be_started_deleted_or_resumed() {
    let container = Container::idle(&[]);
    let shim = connect(&container).await;
    let id = container.id();
    assert_eq!(code(shim.start(patiently(), &start(id, "")).await), Code::FAILED_PRECONDITION);
    assert_eq!(code(shim.delete(patiently(), &delete(id, "")).await), Code::FAILED_PRECONDITION);
    let resume = ResumeRequest { id: id.into(), ..Default::default() };
    assert_eq!(code(shim.resume(patiently(), &resume).await), Code::FAILED_PRECONDITION);
    assert_eq!(status(&shim, id, "").await, Status::RUNNING);
}

#[tokio::test]
async fn an_exec_goes_through_its_states() {
    let container = Container::idle(&[]);
    let shim = connect(&container).await;
    let id = container.id();
    shim.exec(patiently(), &exec(id, "one", &["sleep", "1000"])).await.unwrap();
    assert_eq!(code(shim.exec(patiently(), &exec(id, "one", &["true"])).await), Code::ALREADY_EXISTS);
    assert_eq!(status(&shim, id, "one").await, Status::CREATED);

    assert_ne!(shim.start(patiently(), &start(id, "one")).await.unwrap().pid, 0);
    assert_eq!(status(&shim, id, "one").await, Status::RUNNING);
    assert_eq!(code(shim.start(patiently(), &start(id, "one")).await), Code::FAILED_PRECONDITION);
    assert_eq!(code(shim.delete(patiently(), &delete(id, "one")).await), Code::FAILED_PRECONDITION);

    shim.kill(patiently(), &kill(id, "one", 9)).await.unwrap();
    assert_eq!(shim.wait(patiently(), &wait(id, "one")).await.unwrap().exit_status, 137);
    assert_eq!(status(&shim, id, "one").await, Status::STOPPED);
    assert_eq!(code(shim.kill(patiently(), &kill(id, "one", 9)).await), Code::NOT_FOUND);
    assert_eq!(shim.delete(patiently(), &delete(id, "one")).await.unwrap().exit_status, 137);
    assert_eq!(code(shim.delete(patiently(), &delete(id, "one")).await), Code::NOT_FOUND);
}

#[tokio::test]
async fn a_stopped_container_takes_no_exec_and_remembers_its_end() {
    let container = Container::detached(BUSYBOX, &[], &["sh", "-c", "exit 6"]);
    let shim = connect(&container).await;
    let id = container.id();
    assert_eq!(shim.wait(patiently(), &wait(id, "")).await.unwrap().exit_status, 6);

    assert_eq!(status(&shim, id, "").await, Status::STOPPED);
    assert_eq!(code(shim.exec(patiently(), &exec(id, "late", &["true"])).await), Code::FAILED_PRECONDITION);
    assert_eq!(code(shim.kill(patiently(), &kill(id, "", 15)).await), Code::NOT_FOUND);
    let pause = PauseRequest { id: id.into(), ..Default::default() };
    assert_eq!(code(shim.pause(patiently(), &pause).await), Code::FAILED_PRECONDITION);
    assert_eq!(shim.wait(patiently(), &wait(id, "")).await.unwrap().exit_status, 6);
}

#[tokio::test]
async fn what_makes_no_sense_is_an_invalid_argument() {
    let container = Container::idle(&[]);
    let shim = connect(&container).await;
    let id = container.id();
    assert_eq!(code(shim.exec(patiently(), &exec(id, "../up", &["true"])).await), Code::INVALID_ARGUMENT);
    let mut malformed = exec(id, "malformed", &["true"]);
    malformed.spec.as_mut().unwrap().value = b"{ not json".to_vec();
    assert_eq!(code(shim.exec(patiently(), &malformed).await), Code::INVALID_ARGUMENT);
    assert_eq!(code(shim.kill(patiently(), &kill(id, "", 999)).await), Code::INVALID_ARGUMENT);
}

#[tokio::test]
async fn checkpoints_are_unimplemented_and_say_so() {
    let container = Container::idle(&[]);
    let shim = connect(&container).await;
    let request =
        CheckpointTaskRequest { id: container.id().into(), path: "/tmp".into(), ..Default::default() };
    assert_eq!(code(shim.checkpoint(patiently(), &request).await), Code::UNIMPLEMENTED);
}

#[tokio::test]
async fn a_shim_with_a_task_does_not_shut_down() {
    let container = Container::idle(&[]);
    let shim = connect(&container).await;
    let request = ShutdownRequest { id: container.id().into(), ..Default::default() };
    shim.shutdown(patiently(), &request).await.unwrap();
    assert_eq!(status(&shim, container.id(), "").await, Status::RUNNING);
    let connected = shim
        .connect(patiently(), &ConnectRequest { id: container.id().into(), ..Default::default() })
        .await
        .unwrap();
    assert_eq!(connected.task_pid, container.pid());
    assert_ne!(connected.shim_pid, 0);
}

#[tokio::test]
async fn a_program_that_is_not_there_is_named() {
    let container = Container::idle(&[]);
    let shim = connect(&container).await;
    shim.exec(patiently(), &exec(container.id(), "none", &["no-such-program"])).await.unwrap();
    let error = shim.start(patiently(), &start(container.id(), "none")).await.unwrap_err();
    assert!(error.to_string().contains("no-such-program"), "{error}");
    assert_eq!(container.script("echo alive"), "alive");
}
