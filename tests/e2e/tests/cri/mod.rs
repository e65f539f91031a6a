//! What a kubelet asks for. Every test here runs once for each way in which containerd drives a pod: its tests make pods with
//! the runtime handler that the environment names.

mod confinement;
mod devices;
mod faults;
mod lifecycle;
mod limits;
mod listing;
mod memory;
mod namespaces;
mod network;
mod phases;
mod pods;
mod policy;
mod refusals;
mod resources;
mod restart;
mod scarcity;
mod security;
mod service;
mod streams;
mod volumes;
mod warm;

use std::fs;
use std::path::{Path, PathBuf};

use k8s_cri::v1::{
    ContainerConfig, ContainerState, ContainerStatus, LinuxContainerConfig, LinuxContainerSecurityContext,
    LinuxPodSandboxConfig, Mount, PodSandboxConfig,
};
use mayu_e2e::cri::{Cri, Pod, container, pod_config};
use mayu_e2e::host::Traces;
use mayu_e2e::shim::eventually;
use mayu_e2e::{BUSYBOX, Outcome};
use tonic::Status;

/// A pod like any other.
#[track_caller]
fn pod() -> Pod {
    Cri::connect(&[BUSYBOX]).run_pod(LinuxPodSandboxConfig::default()).unwrap()
}

/// A pod with annotations.
fn annotated(annotations: &[(&str, &str)]) -> Result<Pod, Status> {
    let annotations = annotations.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    let config = pod_config(LinuxPodSandboxConfig::default());
    Cri::connect(&[BUSYBOX]).run(PodSandboxConfig { annotations: annotations.collect(), ..config })
}

/// A container of busybox that does nothing, to be changed before it is created.
fn sleeping(name: &str) -> ContainerConfig {
    container(name, BUSYBOX, &["sleep", "infinity"])
}

/// A container of busybox that does nothing.
#[track_caller]
fn idle(pod: &mut Pod, name: &str) -> String {
    pod.run_container(sleeping(name)).unwrap()
}

/// What there is on the host, for a pod that is to leave nothing. The first pod and the first container leave directories of
/// containerd's own.
#[track_caller]
fn traces() -> Traces {
    let mut first = pod();
    idle(&mut first, "first");
    first.remove().unwrap();
    Traces::now()
}

/// A container of busybox that runs a script.
fn running(name: &str, script: &str) -> ContainerConfig {
    container(name, BUSYBOX, &["sh", "-c", script])
}

/// A container of busybox that does nothing, with a security context.
fn secured(name: &str, security: LinuxContainerSecurityContext) -> ContainerConfig {
    let linux = LinuxContainerConfig { security_context: Some(security), ..Default::default() };
    ContainerConfig { linux: Some(linux), ..sleeping(name) }
}

/// A path of the host in a container, where it may write.
fn mount(host: &Path, inside: &str) -> Mount {
    let host_path = host.display().to_string();
    Mount { container_path: inside.into(), host_path, ..Default::default() }
}

/// A cgroup of the host that bounds the memory of the pods below it.
struct LimitedCgroup {
    parent: String,
}

impl LimitedCgroup {
    fn new(name: &str) -> Self {
        let cgroup = Self { parent: format!("/mayu-{name}-{}", std::process::id()) };
        fs::create_dir(cgroup.directory()).unwrap();
        for controller in [Path::new("/sys/fs/cgroup"), &cgroup.directory()] {
            fs::write(controller.join("cgroup.subtree_control"), "+memory").unwrap();
        }
        cgroup
    }

    fn directory(&self) -> PathBuf {
        format!("/sys/fs/cgroup{}", self.parent).into()
    }

    /// Of a pod below it.
    fn config(&self) -> LinuxPodSandboxConfig {
        LinuxPodSandboxConfig { cgroup_parent: self.parent.clone(), ..Default::default() }
    }

    /// Bounds it, as `memory.max` has it.
    fn limit(&self, bytes: &str) {
        fs::write(self.directory().join("memory.max"), bytes).unwrap();
    }

    /// Takes it away, once nothing is in it.
    fn remove(self) {
        eventually("the limit's cgroup is empty", || fs::remove_dir(self.directory()).is_ok());
    }
}

/// What became of a script in a container.
#[track_caller]
fn outcome(pod: &mut Pod, container: &str, script: &str) -> Outcome {
    pod.outcome(container, script, 0).unwrap()
}

/// What a script writes in a container, where it succeeds.
#[track_caller]
fn script(pod: &mut Pod, container: &str, script: &str) -> String {
    outcome(pod, container, script).success().text()
}

/// What a script complains of in a container, where it fails.
#[track_caller]
fn failing(pod: &mut Pod, container: &str, script: &str) -> String {
    outcome(pod, container, script).failure()
}

/// The status of a container that ends by itself, or is ending, when it has.
#[track_caller]
fn exited(pod: &mut Pod, container: &str) -> ContainerStatus {
    eventually("the container has exited", || {
        pod.status(container).unwrap().state() == ContainerState::ContainerExited
    });
    pod.status(container).unwrap()
}

/// Waits until a container has written something.
#[track_caller]
fn wait_for_output(pod: &Pod, name: &str, text: &str) {
    eventually(&format!("{name} writes {text}"), || pod.log(name).contains(text));
}
