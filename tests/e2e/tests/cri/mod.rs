//! What a kubelet asks for. Every test here runs once for each way in which containerd drives a pod: its tests make pods with
//! the runtime handler that the environment names.

mod devices;
mod network;
mod pods;
mod resources;
mod restart;
mod service;

use k8s_cri::v1::LinuxPodSandboxConfig;
use mayu_e2e::BUSYBOX;
use mayu_e2e::cri::{Cri, Pod};

/// A pod like any other.
fn pod() -> Pod {
    Cri::connect(&[BUSYBOX]).run_pod(LinuxPodSandboxConfig::default()).unwrap()
}

/// A container of busybox that does nothing.
fn idle(pod: &mut Pod, name: &str) -> String {
    pod.run(name, BUSYBOX, &["sleep", "infinity"]).unwrap()
}

/// What a script writes in a container, where it succeeds.
#[track_caller]
fn script(pod: &mut Pod, container: &str, script: &str) -> String {
    let (code, text) = pod.exec(container, script).unwrap();
    assert_eq!(code, 0, "{text}");
    text
}
