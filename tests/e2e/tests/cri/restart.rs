//! containerd killed in the middle of each phase: afterwards a pod is whole or gone, and never in the way.

use std::thread;

use k8s_cri::v1::LinuxPodSandboxConfig;
use mayu_e2e::cri::{Cri, pod_config};
use mayu_e2e::host::without_containerd;

use super::phases::{Phase, assert_can_be_run_again, assert_whole};
use super::traces;

fn killed_in(phase: Phase) {
    let before = traces();
    let config = pod_config(LinuxPodSandboxConfig::default());
    let scene = phase.prepare(config.clone());
    let cri = Cri::connect(&[]);
    thread::scope(|scope| {
        // An answer that does not come is nobody's fault here.
        scope.spawn(|| drop(phase.make(cri, &scene)));
        phase.under_way(&scene);
        without_containerd(|| ());
    });

    for mut pod in scene.pods() {
        if pod.ready() {
            assert_whole(&mut pod);
        }
    }
    scene.remove();
    assert_can_be_run_again(config);
    before.assert_restored(4);
}

#[test]
fn in_run_pod_sandbox() {
    killed_in(Phase::RunPodSandbox);
}

#[test]
fn in_create_container() {
    killed_in(Phase::CreateContainer);
}

#[test]
fn in_start_container() {
    killed_in(Phase::StartContainer);
}

#[test]
fn in_an_exec_storm() {
    killed_in(Phase::ExecStorm);
}

#[test]
fn in_stop_pod_sandbox() {
    killed_in(Phase::StopPodSandbox);
}

#[test]
fn in_remove_pod_sandbox() {
    killed_in(Phase::RemovePodSandbox);
}
