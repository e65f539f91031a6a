//! Pods that are made with the Sandbox API.

use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, PingRequest, PlatformRequest, SandboxStatusRequest, ShutdownSandboxRequest,
    StartSandboxRequest, StopSandboxRequest, WaitSandboxRequest,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use ttrpc::Code;

use crate::host::Host;
use crate::{code, cx, delete, start, wait};

/// The pod of every [`Host`].
const POD: &str = "pod";

/// A `PodSandboxConfig` that says nothing but `linux.security_context.namespace_options.network = NODE`.
const HOST_NETWORK: [u8; 8] = [0x42, 6, 0x12, 4, 0x0a, 2, 0x08, 2];

fn create_request() -> CreateSandboxRequest {
    CreateSandboxRequest { sandbox_id: POD.into(), ..Default::default() }
}

async fn create_and_start(host: &Host) {
    host.sandboxes.create_sandbox(cx(), &create_request()).await.unwrap();
    let request = StartSandboxRequest { sandbox_id: POD.into(), ..Default::default() };
    let started = host.sandboxes.start_sandbox(cx(), &request).await.unwrap();
    assert_eq!(i32::try_from(started.pid).unwrap(), host.vmm());
    assert!(started.created_at.is_some());
}

async fn status(host: &Host) -> String {
    let request = SandboxStatusRequest { sandbox_id: POD.into(), verbose: true, ..Default::default() };
    let status = host.sandboxes.sandbox_status(cx(), &request).await.unwrap();
    assert!(status.info.contains_key("mayu"));
    status.state
}

async fn exit_status(host: &Host) -> u32 {
    let request = WaitSandboxRequest { sandbox_id: POD.into(), ..Default::default() };
    host.sandboxes.wait_sandbox(cx(), &request).await.unwrap().exit_status
}

async fn shutdown(host: &Host) {
    let request = ShutdownSandboxRequest { sandbox_id: POD.into(), ..Default::default() };
    host.sandboxes.shutdown_sandbox(cx(), &request).await.unwrap();
    assert!(host.pod.exit.is_cancelled());
    host.assert_nothing_left();
}

#[tokio::test]
async fn a_pod_lives_without_a_container_and_ends_when_it_is_told_to() {
    let Some(mut host) = Host::new("").await else { return };
    create_and_start(&host).await;
    assert_eq!(status(&host).await, "SANDBOX_READY");
    let ping = PingRequest { sandbox_id: POD.into(), ..Default::default() };
    host.sandboxes.ping_sandbox(cx(), &ping).await.unwrap();
    let platform = PlatformRequest { sandbox_id: POD.into(), ..Default::default() };
    let platform = host.sandboxes.platform(cx(), &platform).await.unwrap().platform.unwrap();
    assert_eq!((platform.os.as_str(), platform.architecture.as_str()), ("linux", "amd64"));

    host.task.create(cx(), &host.container("c", &["exit", "3"])).await.unwrap();
    start(&host.task, "c", "").await.unwrap();
    assert_eq!(wait(&host.task, "c", "").await, 3);
    assert_eq!(delete(&host.task, "c", "").await.unwrap(), 3);
    assert_eq!(status(&host).await, "SANDBOX_READY", "the last container's end is not the pod's");

    let request = StopSandboxRequest { sandbox_id: POD.into(), ..Default::default() };
    host.sandboxes.stop_sandbox(cx(), &request).await.unwrap();
    assert_eq!(status(&host).await, "SANDBOX_NOTREADY");
    assert_eq!(exit_status(&host).await, 0);
    host.sandboxes.stop_sandbox(cx(), &request).await.unwrap();
    let ended = code(host.sandboxes.ping_sandbox(cx(), &ping).await);
    assert_eq!(ended.0, Code::FAILED_PRECONDITION, "{}", ended.1);
    for topic in ["/tasks/create", "/tasks/start", "/tasks/exit c 3", "/tasks/delete"] {
        assert_eq!(host.event().await, topic);
    }
    shutdown(&host).await;
}

#[tokio::test]
async fn containers_end_with_their_pod() {
    let Some(host) = Host::new("").await else { return };
    create_and_start(&host).await;
    host.task.create(cx(), &host.container("c", &["sleep"])).await.unwrap();
    start(&host.task, "c", "").await.unwrap();
    let request = StopSandboxRequest { sandbox_id: POD.into(), ..Default::default() };
    host.sandboxes.stop_sandbox(cx(), &request).await.unwrap();
    assert_eq!(wait(&host.task, "c", "").await, 137);
    assert_eq!(delete(&host.task, "c", "").await.unwrap(), 137);
    shutdown(&host).await;
}

#[tokio::test]
async fn the_death_of_the_vm_is_that_of_the_pod() {
    let Some(host) = Host::new("").await else { return };
    create_and_start(&host).await;
    kill(Pid::from_raw(host.vmm()), Signal::SIGKILL).unwrap();
    assert_eq!(exit_status(&host).await, 137);
    assert_eq!(status(&host).await, "SANDBOX_NOTREADY");
    shutdown(&host).await;
}

/// A containerd that was killed meanwhile asks when it is back, and believes the answer for good.
#[tokio::test]
async fn who_asks_while_the_pod_starts_is_told_how_that_ends() {
    for (behaviour, answer) in [("", "SANDBOX_READY"), ("old-agent", "SANDBOX_NOTREADY")] {
        let Some(host) = Host::new(behaviour).await else { return };
        host.sandboxes.create_sandbox(cx(), &create_request()).await.unwrap();
        assert_eq!(status(&host).await, "SANDBOX_NOTREADY");
        let request = StartSandboxRequest { sandbox_id: POD.into(), ..Default::default() };
        let (_, told) = tokio::join!(host.sandboxes.start_sandbox(cx(), &request), status(&host));
        assert_eq!(told, answer);
        shutdown(&host).await;
    }
}

#[tokio::test]
async fn what_does_not_fit_is_refused() {
    let Some(host) = Host::new("").await else { return };
    let start_request = StartSandboxRequest { sandbox_id: POD.into(), ..Default::default() };
    let early = code(host.sandboxes.start_sandbox(cx(), &start_request).await);
    assert_eq!(early.0, Code::NOT_FOUND, "{}", early.1);
    let other = CreateSandboxRequest { sandbox_id: "other".into(), ..Default::default() };
    assert_eq!(code(host.sandboxes.create_sandbox(cx(), &other).await).0, Code::NOT_FOUND);
    let mut wishful = create_request();
    wishful.options = MessageField::some(Any {
        type_url: "runtime.v1.PodSandboxConfig".into(),
        value: HOST_NETWORK.to_vec(),
        ..Default::default()
    });
    let refused = code(host.sandboxes.create_sandbox(cx(), &wishful).await);
    assert_eq!(refused.0, Code::INVALID_ARGUMENT);
    assert!(refused.1.starts_with("hostNetwork: "), "{}", refused.1);

    host.sandboxes.create_sandbox(cx(), &create_request()).await.unwrap();
    let twice = code(host.sandboxes.create_sandbox(cx(), &create_request()).await);
    assert_eq!(twice.0, Code::ALREADY_EXISTS, "{}", twice.1);
    let early = code(host.task.create(cx(), &host.container("c", &["sleep"])).await);
    assert_eq!(early.0, Code::FAILED_PRECONDITION, "{}", early.1);
    host.sandboxes.start_sandbox(cx(), &start_request).await.unwrap();
    let again = code(host.sandboxes.start_sandbox(cx(), &start_request).await);
    assert_eq!(again.0, Code::FAILED_PRECONDITION, "{}", again.1);
    shutdown(&host).await;
}

#[tokio::test]
async fn a_pod_that_cannot_start_says_why_and_is_over() {
    let Some(host) = Host::new("refuse").await else { return };
    host.sandboxes.create_sandbox(cx(), &create_request()).await.unwrap();
    let request = StartSandboxRequest { sandbox_id: POD.into(), ..Default::default() };
    let refused = code(host.sandboxes.start_sandbox(cx(), &request).await);
    assert!(refused.1.contains("no ELF file"), "{}", refused.1);
    assert_ne!(exit_status(&host).await, 0);
    shutdown(&host).await;
}
