//! The life of a pod in phases, for what may happen in the middle of each.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use k8s_cri::v1::{ContainerState, LinuxPodSandboxConfig, PodSandboxConfig};
use mayu_e2e::BUSYBOX;
use mayu_e2e::configuration::Configuration;
use mayu_e2e::cri::{Cri, Pod, pod_config, privileged};
use mayu_e2e::host::{Process, processes_named, vmms};
use mayu_e2e::shim::eventually;
use mayu_e2e::template;
use tonic::Status;

use super::{idle, pod, script, secured, sleeping, traces};

const VMM: &str = "mayu-vmm";
const SHIM: &str = "containerd-shim-mayu-v2";

/// How many programs are run in a container at once.
const STORM: usize = 6;

/// Writes to the container's root for some seconds.
const INPUT_AND_OUTPUT: &str = "for i in 1 2 3 4 5 6 7 8; do dd if=/dev/zero of=/file bs=64k count=4 conv=fsync && sleep 0.2 || exit 1; done";

/// A pod on its way, as far as a request has brought it.
pub(super) struct Scene {
    config: PodSandboxConfig,
    /// Once there is one.
    pod: Option<Pod>,
    container: Option<String>,
    /// A container that is root of the guest, where one is wanted.
    saboteur: Option<String>,
    /// What other pods had before it.
    others: Others,
}

struct Others {
    processes: BTreeSet<Process>,
    mounts: Vec<PathBuf>,
    networks: Vec<String>,
}

impl Others {
    fn now() -> Self {
        let processes = processes_named(VMM).into_iter().chain(processes_named(SHIM)).collect();
        Self { processes, mounts: mounts(), networks: networks() }
    }
}

/// A part of a pod's life: a request, or what is done in its container; and what comes before it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Phase {
    RunPodSandbox,
    CreateContainer,
    StartContainer,
    Running,
    ExecStorm,
    StopPodSandbox,
    RemovePodSandbox,
}

/// When something happens.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Moment {
    /// Before the phase, and it is so all the time.
    Before,
    /// In the middle of it.
    Midway,
}

impl Scene {
    /// The pod's VMM, if it has one in its jail at the moment.
    pub(super) fn vmm(&self) -> Option<Process> {
        vmms().into_iter().find(|process| !self.others.processes.contains(process))
    }

    /// The pod's shim, if it has one at the moment.
    pub(super) fn shim(&self) -> Option<Process> {
        processes_named(SHIM).into_iter().find(|process| !self.others.processes.contains(process))
    }

    /// What the pod's shim has mounted, the last first.
    pub(super) fn mounts(&self) -> impl Iterator<Item = PathBuf> {
        mounts().into_iter().rev().filter(|path| !self.others.mounts.contains(path))
    }

    /// The names of the pod's network namespaces: one, or none.
    pub(super) fn networks(&self) -> impl Iterator<Item = String> {
        networks().into_iter().filter(|name| !self.others.networks.contains(name))
    }

    /// The pods that are this one: one, or none any more.
    pub(super) fn pods(&self) -> Vec<Pod> {
        let ids = Cri::connect(&[]).pods(&self.config).into_iter();
        ids.map(|id| Cri::connect(&[]).find(&id, self.config.clone())).collect()
    }

    /// Has the root of the guest do something, who may not live to tell. There is none before there is a pod.
    pub(super) fn sabotage(&self, script: &str) {
        if let (Some(pod), Some(saboteur)) = (&self.pod, &self.saboteur) {
            let mut pod = Cri::connect(&[]).find(pod.id(), self.config.clone());
            drop(pod.exec_for(saboteur, script, 20));
        }
    }

    /// The exit code of its container, if that has ended.
    pub(super) fn exit_code(&self) -> Option<i32> {
        let mut pods = self.pods();
        let status = pods.first_mut()?.status(self.container.as_ref()?).ok()?;
        (status.state() == ContainerState::ContainerExited).then_some(status.exit_code)
    }

    /// What a kubelet does with a pod that it has no more use for.
    pub(super) fn remove(self) {
        for mut pod in self.pods() {
            eventually("the pod can be removed", || pod.remove().is_ok());
        }
        eventually("no VM is left", || self.vmm().is_none());
    }
}

impl Phase {
    /// In the order of a pod's life.
    pub(super) const ALL: [Self; 7] = [
        Self::RunPodSandbox,
        Self::CreateContainer,
        Self::StartContainer,
        Self::Running,
        Self::ExecStorm,
        Self::StopPodSandbox,
        Self::RemovePodSandbox,
    ];

    /// All that has to be there before it. A saboteur is there where the pod may have one.
    pub(super) fn prepare(self, config: PodSandboxConfig) -> Scene {
        let (config_of, others) = (config.clone(), Others::now());
        let mut scene = Scene { config: config_of, pod: None, container: None, saboteur: None, others };
        if self != Self::RunPodSandbox {
            let sabotaged = is_privileged(&config);
            let mut pod = Cri::connect(&[BUSYBOX]).run(config).unwrap();
            scene.saboteur = sabotaged.then(|| pod.run_container(secured("saboteur", privileged())).unwrap());
            if self != Self::CreateContainer {
                let id = pod.create(sleeping("one")).unwrap();
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

    /// Returns when it has begun and, as far as that can be told, has not ended.
    pub(super) fn under_way(self, scene: &Scene) {
        match self {
            // A VM that boots takes longer than it takes to see it.
            Self::RunPodSandbox => eventually("its VMM has started", || scene.vmm().is_some()),
            // They leave no sign on the host half way; none of them is over so soon in the lab.
            Self::CreateContainer | Self::RemovePodSandbox => thread::sleep(Duration::from_millis(50)),
            Self::StartContainer | Self::Running | Self::ExecStorm | Self::StopPodSandbox => {
                thread::sleep(Duration::from_millis(300));
            }
        }
    }

    /// Makes the requests. The pod is not to be removed when this is over, whatever came of it.
    pub(super) fn make(self, cri: Cri, scene: &Scene) -> Result<(), Status> {
        if self == Self::RunPodSandbox {
            return cri.run(scene.config.clone()).map(Pod::leave);
        }
        let mut pod = cri.find(scene.pod.as_ref().unwrap().id(), scene.config.clone());
        let container_of = || scene.container.as_ref().unwrap();
        match self {
            Self::CreateContainer => pod.create(sleeping("one")).map(drop),
            Self::StartContainer => pod.start(container_of()),
            Self::Running => succeeding(&mut pod, container_of(), INPUT_AND_OUTPUT),
            Self::ExecStorm => storm(&pod, container_of()),
            Self::StopPodSandbox => pod.stop(),
            Self::RunPodSandbox | Self::RemovePodSandbox => pod.remove(),
        }
    }

    /// Whether it begins with a container that runs, and leaves it alone.
    pub(super) fn has_a_container(self) -> bool {
        matches!(self, Self::Running | Self::ExecStorm)
    }
}

/// Has something happen in every phase of a pod's life, one pod after another with the same name, while another pod serves.
/// What `happen` gives is dropped when the phase is over; `judge` has the last word on it.
pub(super) fn in_every_phase<U>(
    linux: &LinuxPodSandboxConfig,
    moment: Moment,
    happen: impl Fn(&Scene) -> U,
    judge: impl Fn(Phase, &Scene, Result<(), Status>),
) {
    // A request to a VMM that is stopped is over when its time is.
    let _configuration = Configuration::with(|text| {
        let short = "[timeouts]\nboot = 30\nrequest = 10\nhealth = 5\nshutdown = 5\n";
        format!("{}{short}", &text[..text.find("[timeouts]").expect("a table of time-outs")])
    });
    let before = traces();
    let mut neighbour = pod();
    let other = idle(&mut neighbour, "neighbour");
    let config = pod_config(linux.clone());
    for phase in Phase::ALL {
        // It may have been blamed for what happened to a pod.
        template::current();
        let scene = phase.prepare(config.clone());
        let answer = strike(phase, &scene, moment, &happen);
        judge(phase, &scene, answer);
        scene.remove();
        assert_eq!(script(&mut neighbour, &other, "echo here"), "here", "{phase:?}");
    }
    assert_can_be_run_again(config);
    neighbour.remove().unwrap();
    before.assert_restored(Phase::ALL.len());
}

fn strike<U>(
    phase: Phase,
    scene: &Scene,
    moment: Moment,
    happen: impl Fn(&Scene) -> U,
) -> Result<(), Status> {
    let cri = Cri::connect(&[]);
    if moment == Moment::Before {
        let _so = happen(scene);
        return phase.make(cri, scene);
    }
    thread::scope(|scope| {
        let made = scope.spawn(|| phase.make(cri, scene));
        phase.under_way(scene);
        let _so = happen(scene);
        made.join().unwrap()
    })
}

/// The name is free, and there is nothing in the way.
pub(super) fn assert_can_be_run_again(config: PodSandboxConfig) {
    let mut again = Cri::connect(&[]).run(config).expect("the name is free again");
    assert_whole(&mut again);
    again.remove().unwrap();
}

/// A container can be made and used, at the second attempt at the latest. containerd's overlayfs snapshotter may have put a
/// directory in its place and not written that down; the next snapshot fails on it and takes it away.
pub(super) fn assert_whole(pod: &mut Pod) {
    let mut create = || pod.create(sleeping("after"));
    let one = match create() {
        Err(error) if error.message().contains("failed to rename") => create(),
        made => made,
    };
    let one = one.unwrap();
    pod.start(&one).unwrap();
    assert_eq!(pod.exec(&one, "echo whole").unwrap(), (0, "whole".to_owned()));
}

fn is_privileged(config: &PodSandboxConfig) -> bool {
    let security = config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    security.is_some_and(|security| security.privileged)
}

/// What is mounted for pods on the host, in the order in which it was.
fn mounts() -> Vec<PathBuf> {
    let lines = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let paths = lines.lines().filter_map(|line| line.split(' ').nth(4));
    paths.filter(|path| path.starts_with("/run/mayu/")).map(PathBuf::from).collect()
}

/// The network namespaces that have names.
fn networks() -> Vec<String> {
    let entries = fs::read_dir("/run/netns").into_iter().flatten();
    entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect()
}

/// A script that fails is an error like any other.
fn succeeding(pod: &mut Pod, container: &str, script: &str) -> Result<(), Status> {
    let outcome = pod.outcome(container, script, 60)?;
    if outcome.code == 0 {
        Ok(())
    } else {
        Err(Status::aborted(format!("{}: {}", outcome.code, outcome.stderr)))
    }
}

fn storm(pod: &Pod, container: &str) -> Result<(), Status> {
    let one = || {
        let mut pod = Cri::connect(&[]).find(pod.id(), pod.config().clone());
        succeeding(&mut pod, container, "sleep 1")
    };
    thread::scope(|scope| {
        let programs: Vec<_> = (0..STORM).map(|_| scope.spawn(one)).collect();
        programs.into_iter().try_for_each(|program| program.join().unwrap())
    })
}
