//! The shim's own Task service, for what `ctr` does not show.

use std::fs;
use std::time::Duration;

use containerd_shim_protos::sandbox_async::SandboxClient;
use containerd_shim_protos::shim_async::TaskClient;
use ttrpc::r#async::Client;
use ttrpc::context::{self, Context};

use crate::{Container, PATIENCE};

/// Connects to the shim of a container, as containerd does.
///
/// # Panics
/// It has none, or it does not answer.
pub async fn connect(container: &Container) -> TaskClient {
    TaskClient::new(client(container).await)
}

/// Connects to the Sandbox service beside it.
///
/// # Panics
/// As [`connect`].
pub async fn connect_to_sandbox(container: &Container) -> SandboxClient {
    SandboxClient::new(client(container).await)
}

async fn client(container: &Container) -> Client {
    let bundle = container.bundle();
    // containerd 2.x keeps the start reply as JSON, 1.7 the bare address.
    let address = fs::read_to_string(bundle.join("bootstrap.json"))
        .ok()
        .and_then(|text| serde_json::from_str::<serde_json::Value>(&text).ok())
        .and_then(|reply| reply.get("address")?.as_str().map(str::to_owned))
        .or_else(|| fs::read_to_string(bundle.join("address")).ok())
        .expect("the bundle has the shim's address");
    Client::connect(address.trim()).await.expect("the shim listens")
}

/// A request context with the tests' deadline.
pub fn patiently() -> Context {
    context::with_duration(PATIENCE)
}

/// The RPC code of a failed call.
///
/// # Panics
/// It succeeded, or failed without a code.
#[track_caller]
pub fn code<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> ttrpc::Code {
    match result.expect_err("the call must fail") {
        ttrpc::Error::RpcStatus(status) => status.code(),
        other => panic!("not a status: {other}"),
    }
}

/// Asks again until the answer is right, or the deadline has passed.
///
/// # Panics
/// It never is.
#[track_caller]
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let started = std::time::Instant::now();
    while !holds() {
        assert!(started.elapsed() < PATIENCE, "never came true: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Changes a running container's resources, as the CRI plugin does. `ctr` has no command for it.
///
/// # Panics
/// The shim refuses.
#[track_caller]
pub fn update(container: &Container, resources: &serde_json::Value) {
    use containerd_shim_protos::api::UpdateTaskRequest;
    use containerd_shim_protos::protobuf::well_known_types::any::Any;
    let resources = Any {
        type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".to_owned(),
        value: resources.to_string().into_bytes(),
        ..Any::default()
    };
    let request = UpdateTaskRequest {
        id: container.id().to_owned(),
        resources: Some(resources).into(),
        ..Default::default()
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        connect(container).await.update(patiently(), &request).await.expect("the update is accepted");
    });
}
