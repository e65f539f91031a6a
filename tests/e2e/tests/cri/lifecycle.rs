//! The lives of containers and pods: starting, stopping, ending and coming back.

use k8s_cri::v1::{ContainerConfig, ContainerMetadata, ContainerState, LinuxPodSandboxConfig};
use mayu_e2e::cri::{Cri, container, pod_config};
use mayu_e2e::shim::eventually;
use mayu_e2e::{BUSYBOX, NGINX};

use super::{exited, failing, idle, mount, pod, running, script, sleeping, wait_for_output};

const MACHINE: &str = "cat /proc/sys/kernel/random/boot_id";

/// The same container, once more.
fn attempt(number: u32, config: ContainerConfig) -> ContainerConfig {
    let name = config.metadata.as_ref().unwrap().name.clone();
    ContainerConfig {
        log_path: format!("{name}-{number}.log"),
        metadata: Some(ContainerMetadata { name, attempt: number }),
        ..config
    }
}

#[test]
fn a_container_is_asked_to_end_and_killed_when_it_does_not() {
    let mut pod = pod();
    let wait = "echo ready; while :; do sleep 0.1; done";
    let polite = pod.run_container(running("polite", &format!("trap 'exit 7' TERM; {wait}"))).unwrap();
    let stubborn =
        pod.run_container(running("stubborn", &format!("trap 'echo heard' TERM; {wait}"))).unwrap();
    for name in ["polite", "stubborn"] {
        wait_for_output(&pod, name, "ready");
    }

    pod.stop_container(&polite, 170).unwrap();
    let status = exited(&mut pod, &polite);
    assert_eq!((status.exit_code, status.reason.as_str()), (7, "Error"));

    pod.stop_container(&stubborn, 2).unwrap();
    let status = exited(&mut pod, &stubborn);
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "Error"));
    assert!(pod.log("stubborn").contains("heard"), "it was asked first: {}", pod.log("stubborn"));
    // Stopping what has stopped is fine.
    pod.stop_container(&stubborn, 2).unwrap();
}

#[test]
fn a_container_is_asked_to_end_by_the_signal_of_its_image() {
    let mut pod = Cri::connect(&[NGINX]).run_pod(LinuxPodSandboxConfig::default()).unwrap();
    let script = "trap 'exit 9' QUIT; trap 'exit 5' TERM; echo ready; while :; do sleep 0.1; done";
    let one = pod.run("one", NGINX, &["sh", "-c", script]).unwrap();
    wait_for_output(&pod, "one", "ready");
    pod.stop_container(&one, 170).unwrap();
    assert_eq!(exited(&mut pod, &one).exit_code, 9, "{}", pod.log("one"));
}

#[test]
fn times_codes_and_reasons_of_an_end_are_told() {
    let mut pod = pod();
    for (code, reason) in [(0, "Completed"), (1, "Error"), (42, "Error")] {
        let wait = format!("until [ -e /tmp/end ]; do sleep 0.1; done; exit {code}");
        let one = pod.create(running(&format!("one-{code}"), &wait)).unwrap();
        let created = pod.status(&one).unwrap();
        assert_eq!(created.state(), ContainerState::ContainerCreated, "{created:?}");
        assert!(created.created_at > 0 && created.started_at == 0 && created.finished_at == 0, "{created:?}");
        pod.start(&one).unwrap();
        let started = pod.status(&one).unwrap();
        assert_eq!(started.state(), ContainerState::ContainerRunning, "{started:?}");
        assert!(started.started_at > 0 && started.finished_at == 0, "{started:?}");

        // May be ended by the container's end.
        pod.exec(&one, "touch /tmp/end").unwrap();
        let ended = exited(&mut pod, &one);

        assert_eq!((ended.exit_code, ended.reason.as_str()), (code, reason), "{ended:?}");
        assert_eq!((ended.created_at, ended.started_at), (created.created_at, started.started_at));
        assert!(ended.created_at <= ended.started_at, "{ended:?}");
        assert!(ended.started_at <= ended.finished_at, "{ended:?}");
    }
}

#[test]
fn what_runs_to_its_end_first_leaves_its_files_to_those_after_it() {
    let volume = tempfile::tempdir().unwrap();
    let with = |config| ContainerConfig { mounts: vec![mount(volume.path(), "/volume")], ..config };
    let mut pod = pod();

    let init = pod.run_container(with(running("init", "hostname > /volume/made"))).unwrap();
    assert_eq!(exited(&mut pod, &init).exit_code, 0, "{}", pod.log("init"));
    let [one, other] = ["one", "other"].map(|name| pod.run_container(with(sleeping(name))).unwrap());

    let name = pod.hostname().to_owned();
    for one in [&one, &other] {
        assert_eq!(script(&mut pod, one, "cat /volume/made"), name);
    }
    // The pod lives while nothing of it runs.
    pod.remove_container(&init, 0).unwrap();
    pod.remove_container(&one, 0).unwrap();
    pod.remove_container(&other, 0).unwrap();
    assert!(pod.ready());
    let late = pod.run_container(with(sleeping("late"))).unwrap();
    assert_eq!(script(&mut pod, &late, "cat /volume/made"), name);
}

#[test]
fn a_container_that_has_ended_comes_back_into_its_pod() {
    let mut pod = pod();
    let steady = idle(&mut pod, "steady");
    let machine = script(&mut pod, &steady, MACHINE);
    let mut attempts = Vec::new();
    for number in 0..3 {
        let config =
            running("one", &format!("echo attempt {number}; [ {number} = 2 ] && exec sleep 1001; exit 3"));
        attempts.push(pod.run_container(attempt(number, config)).unwrap());
        if number < 2 {
            assert_eq!(exited(&mut pod, &attempts[attempts.len() - 1]).exit_code, 3);
        }
    }

    // The ones before are kept, and told apart by their numbers.
    for (number, one) in (0..3).zip(&attempts) {
        let status = pod.status(one).unwrap();
        assert_eq!(status.metadata.as_ref().unwrap().attempt, number, "{status:?}");
        wait_for_output(&pod, &format!("one-{number}"), &format!("attempt {number}"));
    }
    assert!(pod.runs(&attempts[2]));
    assert_eq!(script(&mut pod, &attempts[2], MACHINE), machine);
    assert!(pod.ready() && pod.runs(&steady));
}

#[test]
fn a_container_is_removed_while_it_runs() {
    let mut pod = pod();
    let steady = idle(&mut pod, "steady");
    let one = pod.run_container(running("one", "trap '' TERM; while :; do sleep 0.1; done")).unwrap();
    pod.delete_container(&one).unwrap();
    assert_eq!(pod.status(&one).unwrap_err().code(), tonic::Code::NotFound);
    // Removing what is gone is fine, and its name is free.
    pod.delete_container(&one).unwrap();
    idle(&mut pod, "one");
    assert!(pod.runs(&steady));
}

#[test]
fn the_name_of_a_pod_is_its_own_until_it_is_removed() {
    let config = pod_config(LinuxPodSandboxConfig::default());
    let run = || Cri::connect(&[BUSYBOX]).run(config.clone());
    let mut first = run().unwrap();
    let one = idle(&mut first, "one");
    let machine = script(&mut first, &one, MACHINE);

    let refusal = run().map(|pod| pod.id().to_owned()).expect_err("the name is taken");
    assert!(refusal.message().contains("reserve"), "{refusal}");
    assert!(first.ready() && first.runs(&one));
    first.stop().unwrap();
    first.remove().unwrap();

    let mut second = run().unwrap();
    assert_ne!(first.id(), second.id());
    let one = idle(&mut second, "one");
    assert_ne!(script(&mut second, &one, MACHINE), machine, "a machine of its own");
}

#[test]
fn a_program_that_is_not_there_is_named_and_harms_nobody() {
    let mut pod = pod();
    let steady = idle(&mut pod, "steady");
    for (name, program, why) in [
        ("unknown", "no-such-program", "executable file not found"),
        ("missing", "/no/such/program", "no such file or directory"),
        ("forbidden", "/etc/passwd", "permission denied"),
    ] {
        let one = pod.create(container(name, BUSYBOX, &[program, "argument"])).unwrap();

        let error = pod.start(&one).expect_err(program);

        let message = error.message();
        assert!(message.contains(program) && message.contains(why), "{message}");
        let status = pod.status(&one).unwrap();
        assert_eq!(status.state(), ContainerState::ContainerExited, "{status:?}");
        assert_eq!((status.exit_code, status.reason.as_str()), (128, "StartError"), "{status:?}");
        assert!(status.message.contains(program), "{status:?}");
        pod.remove_container(&one, 0).unwrap();
    }
    assert!(pod.ready() && pod.runs(&steady));
    failing(&mut pod, &steady, "no-such-program");
}

#[test]
fn a_pod_that_is_stopped_keeps_the_ends_of_its_containers_until_it_is_removed() {
    let mut pod = pod();
    let ended = pod.run_container(running("ended", "exit 4")).unwrap();
    assert_eq!(exited(&mut pod, &ended).exit_code, 4);
    let one = idle(&mut pod, "one");

    pod.stop().unwrap();

    assert!(!pod.ready());
    assert_eq!(exited(&mut pod, &ended).exit_code, 4);
    assert_eq!(exited(&mut pod, &one).exit_code, 137);
    pod.run_container(sleeping("late")).expect_err("the pod has ended");
    // Stopping and removing twice is fine.
    pod.stop().unwrap();
    pod.remove().unwrap();
    pod.remove().unwrap();
    eventually("the containers are forgotten", || pod.status(&one).is_err());
}
