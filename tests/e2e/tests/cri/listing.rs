//! What a kubelet learns of pods and containers that it does not ask for by name: lists and events.

use std::collections::HashMap;
use std::iter;
use std::time::{Duration, Instant};

use k8s_cri::v1::{
    ContainerConfig, ContainerEventType, ContainerFilter, ContainerState, ContainerStateValue,
    LinuxPodSandboxConfig, PodSandboxConfig, PodSandboxFilter, PodSandboxState, PodSandboxStateValue,
};
use mayu_e2e::cri::{Cri, Pod, events, pod_config};
use mayu_e2e::{BUSYBOX, PATIENCE};

use super::{exited, idle, pod, running, sleeping};

fn labels(app: &str) -> HashMap<String, String> {
    HashMap::from([("app".to_owned(), app.to_owned())])
}

fn containers(pod: &mut Pod, filter: ContainerFilter) -> Vec<String> {
    let mut ids: Vec<_> = pod.list_containers(filter).into_iter().map(|container| container.id).collect();
    ids.sort();
    ids
}

fn pods(pod: &mut Pod, filter: PodSandboxFilter) -> Vec<String> {
    let mut ids: Vec<_> = pod.list_pods(filter).into_iter().map(|pod| pod.id).collect();
    ids.sort();
    ids
}

#[test]
fn pods_and_containers_are_listed_by_id_state_and_label() {
    let run = |app: &str| {
        let config = PodSandboxConfig { labels: labels(app), ..pod_config(LinuxPodSandboxConfig::default()) };
        Cri::connect(&[BUSYBOX]).run(config).unwrap()
    };
    let (mut web, mut database) = (run("web"), run("database"));
    let with = |config, app| ContainerConfig { labels: labels(app), ..config };
    let server = web.run_container(with(sleeping("server"), "server")).unwrap();
    let sidecar = web.run_container(with(sleeping("sidecar"), "sidecar")).unwrap();
    let job = web.run_container(with(running("job", "exit 0"), "job")).unwrap();
    let waiting = web.create(with(sleeping("waiting"), "waiting")).unwrap();
    let store = idle(&mut database, "store");
    exited(&mut web, &job);
    let sorted = |ids: &[&str]| {
        let mut ids: Vec<_> = ids.iter().map(ToString::to_string).collect();
        ids.sort();
        ids
    };

    let of = |pod: &Pod| ContainerFilter { pod_sandbox_id: pod.id().to_owned(), ..Default::default() };
    let of_web = of(&web);
    assert_eq!(containers(&mut web, of_web.clone()), sorted(&[&server, &sidecar, &job, &waiting]));
    let of_database = of(&database);
    assert_eq!(containers(&mut web, of_database), [store]);
    for (state, expected) in [
        (ContainerState::ContainerRunning, sorted(&[&server, &sidecar])),
        (ContainerState::ContainerExited, sorted(&[&job])),
        (ContainerState::ContainerCreated, sorted(&[&waiting])),
    ] {
        let state = Some(ContainerStateValue { state: state.into() });
        assert_eq!(containers(&mut web, ContainerFilter { state, ..of_web.clone() }), expected);
    }
    let labelled = ContainerFilter { label_selector: labels("sidecar"), ..of_web };
    assert_eq!(containers(&mut web, labelled), sorted(&[&sidecar]));
    let filter = ContainerFilter { id: server.clone(), ..Default::default() };
    assert_eq!(containers(&mut web, filter), sorted(&[&server]));

    let labelled = PodSandboxFilter { label_selector: labels("database"), ..Default::default() };
    assert_eq!(pods(&mut web, labelled), [database.id().to_owned()]);
    database.stop().unwrap();
    let not_ready = PodSandboxStateValue { state: PodSandboxState::SandboxNotready.into() };
    for (app, expected) in [("database", vec![database.id().to_owned()]), ("web", vec![])] {
        let filter =
            PodSandboxFilter { state: Some(not_ready), label_selector: labels(app), ..Default::default() };
        assert_eq!(pods(&mut web, filter), expected, "{app}");
    }
    let filter = PodSandboxFilter { id: web.id().to_owned(), ..Default::default() };
    assert_eq!(pods(&mut database, filter), [web.id().to_owned()]);
}

#[test]
fn the_events_of_a_container_come_in_order() {
    let events = events();
    let mut pod = pod();
    // Containers come and go until an event of one shows that the stream has begun. Before it there may be hundreds of others:
    // containerd 1.7 keeps a thousand of them for whoever reads them first.
    let started = Instant::now();
    let mut known = Vec::new();
    let next = || events.recv_timeout(Duration::from_secs(1)).ok();
    loop {
        assert!(started.elapsed() < PATIENCE, "no events come");
        let probe = pod.create(sleeping(&format!("probe-{}", known.len()))).unwrap();
        pod.delete_container(&probe).unwrap();
        known.push(probe);
        if iter::from_fn(next).any(|event| known.contains(&event.container_id)) {
            break;
        }
    }

    let one = pod.run_container(running("one", "exit 3")).unwrap();
    exited(&mut pod, &one);
    pod.delete_container(&one).unwrap();

    let mut seen = Vec::new();
    while seen.last() != Some(&ContainerEventType::ContainerDeletedEvent) {
        let event = events.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("only these came: {seen:?}"));
        if event.container_id == one {
            seen.push(event.container_event_type());
        }
    }
    let expected = [
        ContainerEventType::ContainerCreatedEvent,
        ContainerEventType::ContainerStartedEvent,
        ContainerEventType::ContainerStoppedEvent,
        ContainerEventType::ContainerDeletedEvent,
    ];
    assert_eq!(seen, expected);
}
