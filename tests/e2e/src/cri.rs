//! Pods as a kubelet makes them: through containerd's CRI service.

mod events;
mod list;
mod stream;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use k8s_cri::v1::{
    AttachRequest, ContainerConfig, ContainerMetadata, ContainerState, ContainerStats, ContainerStatsRequest,
    ContainerStatus, ContainerStatusRequest, CreateContainerRequest, ExecRequest, ExecSyncRequest, ImageSpec,
    LinuxContainerConfig, LinuxContainerResources, LinuxContainerSecurityContext, LinuxPodSandboxConfig,
    LinuxSandboxSecurityContext, ListPodSandboxRequest, NamespaceMode, NamespaceOption, PodSandboxConfig,
    PodSandboxMetadata, PodSandboxState, PodSandboxStats, PodSandboxStatsRequest, PodSandboxStatusRequest,
    PodSandboxStatusResponse, PortForwardRequest, RemoveContainerRequest, RemovePodSandboxRequest,
    ReopenContainerLogRequest, RunPodSandboxRequest, StartContainerRequest, StopContainerRequest,
    StopPodSandboxRequest, UpdateContainerResourcesRequest,
};
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

use crate::{Outcome, PATIENCE, PAUSE, ctr, run};

pub use events::events;
pub use stream::{Finished, Forward, Session};

/// The runtime handler of mayu in containerd's configuration, as a RuntimeClass names it.
const HANDLER: &str = "mayu";

/// The environment variable that names another handler, for the same tests on another way of driving pods.
const HANDLER_VARIABLE: &str = "MAYU_TEST_HANDLER";

/// Where containerd serves CRI.
const ENDPOINT: &str = "unix:///run/containerd/containerd.sock";

/// containerd's namespace of CRI.
pub(crate) const NAMESPACE: &str = "k8s.io";

/// A connection to containerd's CRI service.
pub struct Cri {
    runtime: Runtime,
    client: RuntimeServiceClient<Channel>,
}

/// A pod. Dropping it removes it, unless it is another's.
pub struct Pod {
    cri: Cri,
    id: String,
    config: PodSandboxConfig,
    is_mine: bool,
}

impl Cri {
    /// Connects, and gives CRI the images that it is to have.
    ///
    /// # Panics
    /// containerd does not answer.
    pub fn connect(images: &[&str]) -> Self {
        for image in images.iter().chain([&PAUSE]) {
            provide(image);
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let endpoint = Endpoint::from_static(ENDPOINT).timeout(PATIENCE);
        let channel = runtime.block_on(endpoint.connect()).expect("containerd serves CRI");
        Self { runtime, client: RuntimeServiceClient::new(channel) }
    }

    /// Runs a pod with the handler under test.
    ///
    /// # Errors
    /// containerd's answer.
    pub fn run_pod(self, linux: LinuxPodSandboxConfig) -> Result<Pod, Status> {
        self.run(pod_config(linux))
    }

    /// Runs a pod with the handler under test, to the last detail.
    ///
    /// # Errors
    /// containerd's answer.
    pub fn run(self, config: PodSandboxConfig) -> Result<Pod, Status> {
        self.run_as(config, &handler())
    }

    /// Whether containerd's CRI service has come up: after a restart it looks at every pod first.
    pub fn serves(&mut self) -> bool {
        let request = ListPodSandboxRequest::default();
        self.runtime.block_on(self.client.list_pod_sandbox(request)).is_ok()
    }

    /// The ids of the pods that were made from this: one, or none any more.
    ///
    /// # Panics
    /// containerd does not answer.
    pub fn pods(&mut self, config: &PodSandboxConfig) -> Vec<String> {
        let request = ListPodSandboxRequest::default();
        let answer = self.runtime.block_on(self.client.list_pod_sandbox(request)).expect("a list of pods");
        let pods = answer.into_inner().items.into_iter();
        pods.filter(|pod| pod.metadata == config.metadata).map(|pod| pod.id).collect()
    }

    /// A pod that somebody else has run.
    pub fn find(self, id: &str, config: PodSandboxConfig) -> Pod {
        Pod { cri: self, id: id.into(), config, is_mine: false }
    }

    /// Runs a pod with another handler.
    ///
    /// # Errors
    /// containerd's answer.
    pub fn run_as(mut self, config: PodSandboxConfig, handler: &str) -> Result<Pod, Status> {
        let request = RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: handler.into() };
        let answer = self.runtime.block_on(self.client.run_pod_sandbox(Request::new(request)))?;
        Ok(Pod { cri: self, id: answer.into_inner().pod_sandbox_id, config, is_mine: true })
    }
}

/// A pod that is to be run, with a name that no other has.
pub fn pod_config(linux: LinuxPodSandboxConfig) -> PodSandboxConfig {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = format!("pod-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let metadata =
        PodSandboxMetadata { uid: name.clone(), namespace: "test".into(), name: name.clone(), attempt: 0 };
    PodSandboxConfig {
        metadata: Some(metadata),
        hostname: name.clone(),
        log_directory: format!("/var/log/pods/{name}"),
        linux: Some(linux),
        ..Default::default()
    }
}

/// Whether containerd drives the pods under test by the Sandbox API.
pub fn by_sandbox_api() -> bool {
    handler() != HANDLER
}

/// The handler under test.
fn handler() -> String {
    std::env::var(HANDLER_VARIABLE).unwrap_or_else(|_| HANDLER.to_owned())
}

/// What a kubelet says of every container's security: that its processes are its own. CRI's default is that the containers
/// of a pod see each other's.
pub fn private() -> LinuxContainerSecurityContext {
    let options = NamespaceOption { pid: NamespaceMode::Container.into(), ..Default::default() };
    LinuxContainerSecurityContext { namespace_options: Some(options), ..Default::default() }
}

/// What it says of a container that is privileged.
pub fn privileged() -> LinuxContainerSecurityContext {
    LinuxContainerSecurityContext { privileged: true, ..private() }
}

/// A pod that may have privileged containers, as far as containerd goes.
pub fn for_privileged() -> LinuxPodSandboxConfig {
    let security = LinuxSandboxSecurityContext { privileged: true, ..Default::default() };
    LinuxPodSandboxConfig { security_context: Some(security), ..Default::default() }
}

/// A container that is to be created.
pub fn container(name: &str, image: &str, command: &[&str]) -> ContainerConfig {
    ContainerConfig {
        metadata: Some(ContainerMetadata { name: name.into(), attempt: 0 }),
        image: Some(ImageSpec { image: image.into(), ..Default::default() }),
        command: command.iter().map(ToString::to_string).collect(),
        log_path: format!("{name}.log"),
        linux: Some(LinuxContainerConfig { security_context: Some(private()), ..Default::default() }),
        ..Default::default()
    }
}

/// Has an image of the default namespace in CRI's as well.
fn provide(image: &str) {
    static PROVIDED: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let mut provided = PROVIDED.lock().unwrap_or_else(PoisonError::into_inner);
    if provided.contains(image) {
        return;
    }
    let there = run(&mut ctr(["-n", NAMESPACE, "images", "ls", "-q"])).success().text();
    provided.extend(there.lines().map(str::to_owned));
    if provided.insert(image.to_owned()) {
        let archive = tempfile::NamedTempFile::new().expect("a temporary file");
        let path = archive.path().to_str().expect("a path of text");
        run(&mut ctr(["images", "export", path, image])).success();
        run(&mut ctr(["-n", NAMESPACE, "images", "import", path])).success();
    }
}

impl Pod {
    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Lets go of it, and it stays.
    pub fn leave(mut self) {
        self.is_mine = false;
    }

    /// What it was made from.
    pub fn config(&self) -> &PodSandboxConfig {
        &self.config
    }

    /// Its host name.
    pub fn hostname(&self) -> &str {
        &self.config.hostname
    }

    /// What CRI says of it, with the details for operators.
    ///
    /// # Panics
    /// containerd does not know it.
    pub fn describe(&mut self) -> PodSandboxStatusResponse {
        let request = PodSandboxStatusRequest { pod_sandbox_id: self.id.clone(), verbose: true };
        let call = self.cri.client.pod_sandbox_status(request);
        self.cri.runtime.block_on(call).expect("the pod is known").into_inner()
    }

    /// Whether CRI says that it is ready. It may have no answer while a pod's shim is just ending, which is no yes.
    pub fn ready(&mut self) -> bool {
        let request = PodSandboxStatusRequest { pod_sandbox_id: self.id.clone(), verbose: false };
        let answer = self.cri.runtime.block_on(self.cri.client.pod_sandbox_status(request));
        let status = answer.ok().and_then(|answer| answer.into_inner().status);
        status.is_some_and(|status| status.state() == PodSandboxState::SandboxReady)
    }

    /// Its addresses, the preferred one first.
    ///
    /// # Panics
    /// It has no network.
    pub fn addresses(&mut self) -> Vec<IpAddr> {
        let network = self.describe().status.and_then(|status| status.network).expect("a network");
        let more = network.additional_ips.into_iter().map(|ip| ip.ip);
        [network.ip].into_iter().chain(more).map(|ip| ip.parse().expect("an address")).collect()
    }

    /// Its first address.
    ///
    /// # Panics
    /// As [`Pod::addresses`].
    pub fn address(&mut self) -> IpAddr {
        self.addresses()[0]
    }

    /// The file of a container's output.
    pub fn log_path(&self, name: &str) -> PathBuf {
        format!("{}/{name}.log", self.config.log_directory).into()
    }

    /// What containerd has written of a container's output, in the format of CRI.
    ///
    /// # Panics
    /// There is no such file.
    pub fn log(&self, name: &str) -> String {
        std::fs::read_to_string(self.log_path(name)).expect("a log")
    }

    /// Has containerd write a container's output to a new file, the old one having been renamed.
    ///
    /// # Errors
    /// containerd's answer.
    pub fn reopen_log(&mut self, container: &str) -> Result<(), Status> {
        let request = ReopenContainerLogRequest { container_id: container.into() };
        self.cri.runtime.block_on(self.cri.client.reopen_container_log(request)).map(drop)
    }

    /// What it uses.
    ///
    /// # Errors
    /// containerd's answer.
    pub fn pod_stats(&mut self) -> Result<PodSandboxStats, Status> {
        let request = PodSandboxStatsRequest { pod_sandbox_id: self.id.clone() };
        let answer = self.cri.runtime.block_on(self.cri.client.pod_sandbox_stats(request))?;
        Ok(answer.into_inner().stats.expect("statistics"))
    }

    /// Opens a stream to a program that is started in a container.
    ///
    /// # Errors
    /// containerd's answer.
    pub fn stream_exec(&mut self, container: &str, command: &[&str], tty: bool) -> Result<Session, Status> {
        let request = ExecRequest {
            container_id: container.into(),
            cmd: command.iter().map(ToString::to_string).collect(),
            tty,
            stdin: true,
            stdout: true,
            stderr: !tty,
        };
        let answer = self.cri.runtime.block_on(self.cri.client.exec(request))?;
        Ok(Session::open(&answer.into_inner().url))
    }

    /// Opens a stream to the first program of a container.
    ///
    /// # Errors
    /// containerd's answer.
    pub fn attach(&mut self, container: &str, tty: bool) -> Result<Session, Status> {
        let request =
            AttachRequest { container_id: container.into(), stdin: true, tty, stdout: true, stderr: !tty };
        let answer = self.cri.runtime.block_on(self.cri.client.attach(request))?;
        Ok(Session::open(&answer.into_inner().url))
    }

    /// Opens a stream to a port of the pod's loopback.
    ///
    /// # Errors
    /// containerd's answer.
    pub fn forward(&mut self, port: u16) -> Result<Forward, Status> {
        let request = PortForwardRequest { pod_sandbox_id: self.id.clone(), port: vec![port.into()] };
        let answer = self.cri.runtime.block_on(self.cri.client.port_forward(request))?;
        Ok(Forward::open(&answer.into_inner().url))
    }

    /// Creates and starts a container of it.
    ///
    /// # Errors
    /// containerd's answer.
    pub fn run(&mut self, name: &str, image: &str, command: &[&str]) -> Result<String, Status> {
        self.run_container(container(name, image, command))
    }

    /// Creates and starts a container of it, to the last detail.
    ///
    /// # Errors
    /// containerd's answer.
    pub fn run_container(&mut self, config: ContainerConfig) -> Result<String, Status> {
        let id = self.create(config)?;
        self.start(&id)?;
        Ok(id)
    }

    /// Creates a container of it.
    ///
    /// # Errors
    /// containerd's answer.
    pub fn create(&mut self, config: ContainerConfig) -> Result<String, Status> {
        let request = CreateContainerRequest {
            pod_sandbox_id: self.id.clone(),
            config: Some(config),
            sandbox_config: Some(self.config.clone()),
        };
        let call = self.cri.client.create_container(request);
        Ok(self.cri.runtime.block_on(call)?.into_inner().container_id)
    }

    /// Starts a container that was created.
    ///
    /// # Errors
    /// containerd's answer.
    pub fn start(&mut self, container: &str) -> Result<(), Status> {
        let request = StartContainerRequest { container_id: container.into() };
        self.cri.runtime.block_on(self.cri.client.start_container(request)).map(drop)
    }

    /// Runs a shell script in a container: its exit code and its standard output.
    ///
    /// # Errors
    /// containerd's answer.
    pub fn exec(&mut self, container: &str, script: &str) -> Result<(i32, String), Status> {
        self.exec_for(container, script, 0)
    }

    /// Runs a shell script in a container for at most so many seconds; 0 is no limit.
    ///
    /// # Errors
    /// containerd's answer.
    pub fn exec_for(&mut self, container: &str, script: &str, seconds: i64) -> Result<(i32, String), Status> {
        let outcome = self.outcome(container, script, seconds)?;
        Ok((outcome.code, outcome.text()))
    }

    /// Runs a shell script in a container for at most so many seconds; 0 is no limit. Tells all that is known of it.
    ///
    /// # Errors
    /// containerd's answer.
    pub fn outcome(&mut self, container: &str, script: &str, seconds: i64) -> Result<Outcome, Status> {
        let request = ExecSyncRequest {
            container_id: container.into(),
            cmd: ["sh", "-c", script].map(str::to_owned).to_vec(),
            timeout: seconds,
        };
        let call = self.cri.client.exec_sync(request);
        let answer = self.cri.runtime.block_on(call)?.into_inner();
        let stderr = String::from_utf8_lossy(&answer.stderr).into_owned();
        Ok(Outcome { code: answer.exit_code, stdout: answer.stdout, stderr })
    }

    /// What CRI knows of a container.
    ///
    /// # Errors
    /// containerd's answer.
    pub fn status(&mut self, container: &str) -> Result<ContainerStatus, Status> {
        let request = ContainerStatusRequest { container_id: container.into(), verbose: false };
        let answer = self.cri.runtime.block_on(self.cri.client.container_status(request))?;
        Ok(answer.into_inner().status.expect("a status"))
    }

    /// Changes a container's limits.
    ///
    /// # Errors
    /// containerd's answer.
    pub fn update(&mut self, container: &str, limits: LinuxContainerResources) -> Result<(), Status> {
        let request = UpdateContainerResourcesRequest {
            container_id: container.into(),
            linux: Some(limits),
            ..Default::default()
        };
        let call = self.cri.client.update_container_resources(request);
        self.cri.runtime.block_on(call).map(drop)
    }

    /// What a container uses.
    ///
    /// # Errors
    /// containerd's answer.
    pub fn stats(&mut self, container: &str) -> Result<ContainerStats, Status> {
        let request = ContainerStatsRequest { container_id: container.into() };
        let answer = self.cri.runtime.block_on(self.cri.client.container_stats(request))?;
        Ok(answer.into_inner().stats.expect("statistics"))
    }

    /// Whether a container runs.
    pub fn runs(&mut self, container: &str) -> bool {
        self.status(container).is_ok_and(|status| status.state() == ContainerState::ContainerRunning)
    }

    /// Stops a container with a grace period of so many seconds, and removes it.
    ///
    /// # Errors
    /// containerd's answer.
    pub fn remove_container(&mut self, container: &str, grace: i64) -> Result<(), Status> {
        self.stop_container(container, grace)?;
        self.delete_container(container)
    }

    /// Stops a container with a grace period of so many seconds.
    ///
    /// # Errors
    /// containerd's answer.
    pub fn stop_container(&mut self, container: &str, grace: i64) -> Result<(), Status> {
        let request = StopContainerRequest { container_id: container.into(), timeout: grace };
        self.cri.runtime.block_on(self.cri.client.stop_container(request)).map(drop)
    }

    /// Removes a container, whether it runs or not.
    ///
    /// # Errors
    /// containerd's answer.
    pub fn delete_container(&mut self, container: &str) -> Result<(), Status> {
        let request = RemoveContainerRequest { container_id: container.into() };
        self.cri.runtime.block_on(self.cri.client.remove_container(request)).map(drop)
    }

    /// Stops the pod.
    ///
    /// # Errors
    /// containerd's answer.
    pub fn stop(&mut self) -> Result<(), Status> {
        let request = StopPodSandboxRequest { pod_sandbox_id: self.id.clone() };
        self.cri.runtime.block_on(self.cri.client.stop_pod_sandbox(request)).map(drop)
    }

    /// Removes the pod, which stops it first where it still runs.
    ///
    /// # Errors
    /// containerd's answer.
    pub fn remove(&mut self) -> Result<(), Status> {
        self.stop()?;
        let request = RemovePodSandboxRequest { pod_sandbox_id: self.id.clone() };
        self.cri.runtime.block_on(self.cri.client.remove_pod_sandbox(request)).map(drop)
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        // Most are gone already; removing one that is not there succeeds.
        if self.is_mine {
            drop(self.remove());
        }
    }
}
