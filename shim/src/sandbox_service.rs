//! containerd's Sandbox service: pods that are made without a container that stands for them.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::SystemTime;

use async_trait::async_trait;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
    PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
    SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse, StartSandboxRequest,
    StartSandboxResponse, StopSandboxRequest, StopSandboxResponse, WaitSandboxRequest, WaitSandboxResponse,
};
use containerd_shim_protos::sandbox_async::{Sandbox, create_sandbox};
use containerd_shim_protos::types::platform::Platform;
use protobuf::MessageField;
use serde_json::json;
use ttrpc::r#async::{Service, TtrpcContext};

use crate::pod::Pod;
use crate::pod_spec::PodSpec;
use crate::task::complete;
use crate::{Error, stats};

/// CRI's word for a pod that containers can be made in.
const READY: &str = "SANDBOX_READY";

/// CRI's word for any other.
const NOT_READY: &str = "SANDBOX_NOTREADY";

/// The Sandbox service.
pub fn services(pod: &Arc<Pod>) -> HashMap<String, Service> {
    create_sandbox(Arc::new(SandboxService { pod: pod.clone() }))
}

struct SandboxService {
    pod: Arc<Pod>,
}

#[async_trait]
impl Sandbox for SandboxService {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> ttrpc::Result<CreateSandboxResponse> {
        let create = || self.pod.create_sandbox(&request.sandbox_id, PodSpec::from_request(&request)?);
        create()?;
        Ok(CreateSandboxResponse::default())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: StartSandboxRequest,
    ) -> ttrpc::Result<StartSandboxResponse> {
        let pod = self.pod.clone();
        let start = async move {
            pod.check_id(&request.sandbox_id)?;
            let requested = pod.start_sandbox().await?;
            Ok(StartSandboxResponse {
                pid: pod.pid(),
                created_at: MessageField::some(requested.created_at.into()),
                ..Default::default()
            })
        };
        complete("start the sandbox", &self.pod, start).await
    }

    async fn platform(&self, _: &TtrpcContext, request: PlatformRequest) -> ttrpc::Result<PlatformResponse> {
        self.pod.check_id(&request.sandbox_id)?;
        let platform =
            Platform { os: "linux".into(), architecture: architecture().into(), ..Default::default() };
        Ok(PlatformResponse { platform: MessageField::some(platform), ..Default::default() })
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        request: StopSandboxRequest,
    ) -> ttrpc::Result<StopSandboxResponse> {
        let pod = self.pod.clone();
        let stop = async move {
            pod.check_id(&request.sandbox_id)?;
            pod.stop_sandbox().await?;
            Ok(StopSandboxResponse::default())
        };
        complete("stop the sandbox", &self.pod, stop).await
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        request: WaitSandboxRequest,
    ) -> ttrpc::Result<WaitSandboxResponse> {
        self.pod.check_id(&request.sandbox_id)?;
        let exit = self.pod.requested()?.life.wait().await;
        Ok(WaitSandboxResponse {
            exit_status: exit.status,
            exited_at: exit.timestamp(),
            ..Default::default()
        })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: SandboxStatusRequest,
    ) -> ttrpc::Result<SandboxStatusResponse> {
        self.pod.check_id(&request.sandbox_id)?;
        let requested = self.pod.requested()?;
        // A containerd that was killed while the pod started asks when it is back. To it, a pod that is not ready then
        // never is.
        requested.life.settled().await;
        let ready = requested.is_ready();
        Ok(SandboxStatusResponse {
            sandbox_id: request.sandbox_id,
            pid: self.pod.pid(),
            state: if ready { READY } else { NOT_READY }.into(),
            info: if request.verbose { details(&self.pod).await } else { HashMap::new() },
            created_at: MessageField::some(requested.created_at.into()),
            exited_at: requested.life.exit().map(|exit| exit.timestamp()).unwrap_or_default(),
            ..Default::default()
        })
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, request: PingRequest) -> ttrpc::Result<PingResponse> {
        self.pod.check_id(&request.sandbox_id)?;
        match self.pod.running_sandbox() {
            Err(Error::NoSandbox) if self.pod.waits_for_container() => {}
            sandbox => drop(sandbox?.agent.health().await?),
        }
        Ok(PingResponse::default())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        request: ShutdownSandboxRequest,
    ) -> ttrpc::Result<ShutdownSandboxResponse> {
        let pod = self.pod.clone();
        let shutdown = async move {
            pod.check_id(&request.sandbox_id)?;
            pod.shutdown_sandbox().await;
            Ok(ShutdownSandboxResponse::default())
        };
        complete("shut the sandbox down", &self.pod, shutdown).await
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> ttrpc::Result<SandboxMetricsResponse> {
        self.pod.check_id(&request.sandbox_id)?;
        let data = stats::of_pod(&*self.pod.running_sandbox()?)?;
        let mut response = SandboxMetricsResponse::default();
        let metric = response.metrics.mut_or_insert_default();
        metric.timestamp = MessageField::some(SystemTime::now().into());
        metric.id = request.sandbox_id;
        metric.data = MessageField::some(data);
        Ok(response)
    }
}

/// What an operator may want to know: as `crictl inspectp` shows it.
async fn details(pod: &Pod) -> HashMap<String, String> {
    let guest = async {
        let sandbox = pod.running_sandbox()?;
        let health = sandbox.agent.health().await?;
        let size = sandbox.size().await;
        Ok::<_, Error>(json!({
            "vmm_pid": sandbox.pid(),
            "vcpus": size.vcpus,
            "memory_mib": size.memory_mib,
            "kernel": health.kernel_release.chars().take(128).collect::<String>(),
            "agent": health.agent_version.chars().take(128).collect::<String>(),
            "memory_available_bytes": health.memory_available_bytes,
            "containers": health.containers,
        }))
    };
    let guest = guest.await.unwrap_or_else(|error| json!({"error": error.to_string()}));
    HashMap::from([("mayu".to_string(), guest.to_string())])
}

/// Go's name of it, which OCI images use.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}
