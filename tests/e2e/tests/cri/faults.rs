//! A pod's shim, VMM or guest ended or stopped in the middle of each phase: the pod is told to have ended, leaves nothing, and no
//! other notices.

use std::thread;
use std::time::Duration;

use k8s_cri::v1::LinuxPodSandboxConfig;
use mayu_e2e::BUSYBOX;
use mayu_e2e::cri::{container, for_privileged};
use mayu_e2e::host::{Process, processes_named, shim_of};
use mayu_e2e::shim::eventually;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::phases::{Moment, Phase, Scene, in_every_phase};
use super::{LimitedCgroup, pod};

/// A process that is gone by now has nothing to fear.
fn signal(victim: Option<Process>, signal: Signal) {
    if let Some(victim) = victim {
        let _ = kill(Pid::from_raw(victim.pid.cast_signed()), signal);
    }
}

/// The exit code of who was killed.
const KILLED: i32 = 137;

/// What containerd tells where nobody has told it (its `UnknownExitStatus`).
const UNKNOWN: i32 = 255;

fn ends_in_every_phase(linux: &LinuxPodSandboxConfig, codes: &[i32], end: impl Fn(&Scene)) {
    in_every_phase(linux, Moment::Midway, end, |phase, scene, answer| {
        if let Err(error) = answer {
            assert!(!error.message().is_empty(), "{phase:?}");
        }
        assert_ended(phase, scene, codes);
    });
}

fn assert_ended(phase: Phase, scene: &Scene, codes: &[i32]) {
    for mut pod in scene.pods() {
        eventually("the pod is told to have ended", || !pod.ready());
    }
    if phase.has_a_container() {
        eventually("its container is told to have ended", || scene.exit_code().is_some());
        let code = scene.exit_code().unwrap();
        assert!(codes.contains(&code), "{phase:?}: {code}");
    }
}

#[test]
fn the_shim_is_killed() {
    // containerd asks the shim for the code as soon as it hears of the end, and may not hear it before the shim is no more.
    let codes = [KILLED, UNKNOWN];
    ends_in_every_phase(&LinuxPodSandboxConfig::default(), &codes, |scene| {
        signal(scene.shim(), Signal::SIGKILL);
    });
}

#[test]
fn the_vmm_is_killed() {
    ends_in_every_phase(&LinuxPodSandboxConfig::default(), &[KILLED], |scene| {
        signal(scene.vmm(), Signal::SIGKILL);
    });
}

#[test]
fn a_stop_that_meets_the_end_of_the_vmm_succeeds() {
    for _ in 0..3 {
        let mut pod = pod();
        pod.run_container(container("idle", BUSYBOX, &["sleep", "1000"])).unwrap();
        let shim = Pid::from_raw(shim_of(pod.id()).pid.cast_signed());
        kill(shim, Signal::SIGSTOP).unwrap();
        thread::scope(|scope| {
            let stop = scope.spawn(|| pod.remove());
            signal(processes_named("mayu-vmm").pop(), Signal::SIGKILL);
            // The shim is to find the request and the end of its VMM at once.
            thread::sleep(Duration::from_millis(500));
            kill(shim, Signal::SIGCONT).unwrap();
            stop.join().unwrap().unwrap();
        });
    }
}

#[test]
fn the_vmm_is_stopped() {
    ends_in_every_phase(&LinuxPodSandboxConfig::default(), &[KILLED], |scene| {
        signal(scene.vmm(), Signal::SIGSTOP);
    });
}

#[test]
fn the_vmm_is_at_its_limit_on_the_host() {
    let cgroup = LimitedCgroup::new("faults");

    ends_in_every_phase(&cgroup.config(), &[KILLED], |scene| {
        cgroup.limit("1M");
        eventually("the kernel has ended the VMM", || scene.vmm().is_none());
        cgroup.limit("max");
    });

    cgroup.remove();
}

#[test]
fn the_guests_kernel_panics() {
    // It takes the agent with it, as the agent's end does the kernel: that is its init.
    let panic = |scene: &Scene| scene.sabotage("echo c > /proc/sysrq-trigger");
    in_every_phase(&for_privileged(), Moment::Midway, panic, |phase, scene, answer| match phase {
        // Nobody is in the guest yet who could.
        Phase::RunPodSandbox => answer.unwrap(),
        _ => assert_ended(phase, scene, &[KILLED]),
    });
}
