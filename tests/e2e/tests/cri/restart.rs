//! containerd killed in the middle of each request: afterwards a pod is whole or gone, and never in the way.

use std::thread;
use std::time::Duration;

use k8s_cri::v1::{LinuxPodSandboxConfig, PodSandboxConfig};
use mayu_e2e::BUSYBOX;
use mayu_e2e::cri::{Cri, Pod, container, pod_config};
use mayu_e2e::host::{processes_named, without_containerd};
use mayu_e2e::shim::eventually;

/// A pod on its way, as far as a request has brought it.
struct Scene {
    config: PodSandboxConfig,
    pod: Option<Pod>,
    container: Option<String>,
}

/// A request, and what comes before it.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Request {
    RunPodSandbox,
    CreateContainer,
    StartContainer,
    StopPodSandbox,
    RemovePodSandbox,
}

impl Request {
    fn prepare(self) -> Scene {
        let config = pod_config(LinuxPodSandboxConfig::default());
        let mut scene = Scene { config: config.clone(), pod: None, container: None };
        if self != Self::RunPodSandbox {
            let mut pod = Cri::connect(&[BUSYBOX]).run(config).unwrap();
            if self != Self::CreateContainer {
                let id = pod.create(container("one", BUSYBOX, &["sleep", "infinity"])).unwrap();
                if self != Self::StartContainer {
                    pod.start(&id).unwrap();
                }
                scene.container = Some(id);
            }
            if self == Self::RemovePodSandbox {
                pod.stop().unwrap();
            }
            scene.pod = Some(pod);
        }
        scene
    }

    /// Returns when the request has begun and, as far as that can be told, has not ended.
    fn under_way(self) {
        match self {
            // A VM that boots takes longer than it takes to see it.
            Self::RunPodSandbox => {
                eventually("its VMM has started", || !processes_named("mayu-vmm").is_empty());
            }
            // They leave no sign on the host half way; none of them is over so soon in the lab.
            Self::CreateContainer | Self::RemovePodSandbox => thread::sleep(Duration::from_millis(50)),
            Self::StartContainer | Self::StopPodSandbox => thread::sleep(Duration::from_millis(300)),
        }
    }

    /// Makes the request. An answer that does not come is nobody's fault here, and the pod is not to be removed when this is
    /// over, whatever came of it.
    fn make(self, cri: Cri, scene: &Scene) {
        if self == Self::RunPodSandbox {
            std::mem::forget(cri.run(scene.config.clone()));
            return;
        }
        let mut pod = cri.adopt(scene.pod.as_ref().unwrap().id(), scene.config.clone());
        let _ = match self {
            Self::CreateContainer => pod.create(container("one", BUSYBOX, &["sleep", "infinity"])).map(drop),
            Self::StartContainer => pod.start(scene.container.as_ref().unwrap()),
            Self::StopPodSandbox => pod.stop(),
            Self::RunPodSandbox | Self::RemovePodSandbox => pod.remove(),
        };
        std::mem::forget(pod);
    }
}

/// What a kubelet does with pods that it has no more use for.
fn remove_all(config: &PodSandboxConfig) {
    for id in Cri::connect(&[]).pods() {
        let mut pod = Cri::connect(&[]).adopt(&id, config.clone());
        eventually("the pod can be removed", || pod.remove().is_ok());
    }
}

fn killed_in(request: Request) {
    let before = super::traces();
    let scene = request.prepare();
    let cri = Cri::connect(&[]);
    thread::scope(|scope| {
        scope.spawn(|| request.make(cri, &scene));
        request.under_way();
        without_containerd(|| ());
    });

    for id in Cri::connect(&[]).pods() {
        let mut pod = Cri::connect(&[]).adopt(&id, scene.config.clone());
        if pod.ready() {
            // Whole: a container can be made in it, at the second attempt at the latest. containerd's overlayfs snapshotter may
            // have put a directory in its place and not written that down; the next snapshot fails on it and takes it away.
            let mut create = || pod.create(container("after", BUSYBOX, &["sleep", "infinity"]));
            let one = match create() {
                Err(error) if error.message().contains("failed to rename") => create(),
                made => made,
            };
            let one = one.unwrap();
            pod.start(&one).unwrap();
            assert_eq!(pod.exec(&one, "echo whole").unwrap(), (0, "whole".to_owned()), "{request:?}");
        }
    }
    remove_all(&scene.config);
    eventually("no VM is left", || processes_named("mayu-vmm").is_empty());
    let mut again = Cri::connect(&[]).run(scene.config.clone()).expect("the name is free again");
    assert!(again.ready());
    again.remove().unwrap();
    drop(scene);
    before.assert_restored(4);
}

#[test]
fn in_run_pod_sandbox() {
    killed_in(Request::RunPodSandbox);
}

#[test]
fn in_create_container() {
    killed_in(Request::CreateContainer);
}

#[test]
fn in_start_container() {
    killed_in(Request::StartContainer);
}

#[test]
fn in_stop_pod_sandbox() {
    killed_in(Request::StopPodSandbox);
}

#[test]
fn in_remove_pod_sandbox() {
    killed_in(Request::RemovePodSandbox);
}
