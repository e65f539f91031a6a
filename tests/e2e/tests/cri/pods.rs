//! Pods of Kubernetes: one VM, several containers.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::symlink;

use k8s_cri::v1::{
    ContainerConfig, ContainerState, LinuxContainerConfig, LinuxContainerResources, LinuxPodSandboxConfig,
    Mount,
};
use mayu_e2e::BUSYBOX;
use mayu_e2e::cri::{Cri, container, private};
use mayu_e2e::host::processes_named;
use mayu_e2e::shim::eventually;

use super::{idle, pod, script, traces};

#[test]
fn the_containers_of_a_pod_share_a_machine_its_name_and_its_loopback() {
    let mut pod = pod();
    assert!(pod.ready());
    let before = processes_named("mayu-vmm").len();
    let (one, other) = (idle(&mut pod, "one"), idle(&mut pod, "other"));
    assert_eq!(processes_named("mayu-vmm").len(), before, "containers come into the pod's VM");

    let boot_id = "cat /proc/sys/kernel/random/boot_id";
    assert_eq!(script(&mut pod, &one, boot_id), script(&mut pod, &other, boot_id));
    let name = pod.hostname().to_owned();
    assert_eq!(script(&mut pod, &one, "hostname"), name);
    assert_eq!(script(&mut pod, &other, "hostname"), name);
    let memory = "readlink /proc/self/ns/ipc";
    assert_eq!(script(&mut pod, &one, memory), script(&mut pod, &other, memory));
    script(&mut pod, &one, "echo shared > /dev/shm/file");
    assert_eq!(script(&mut pod, &other, "cat /dev/shm/file"), "shared");
    script(&mut pod, &one, "(echo over the loopback | nc -l -p 7777 > /dev/null) > /dev/null 2>&1 &");
    assert_eq!(
        script(&mut pod, &other, "until nc 127.0.0.1 7777 < /dev/null; do :; done"),
        "over the loopback"
    );

    let own = script(&mut pod, &one, "ps | grep -c '[s]leep'");
    assert_eq!(own, "1", "its processes are its own");
    script(&mut pod, &one, "echo mine > /tmp/file");
    assert_eq!(pod.exec(&other, "cat /tmp/file").unwrap().0, 1, "its files are its own");
}

#[test]
fn a_container_comes_and_goes_while_its_pod_lives() {
    let mut pod = pod();
    let steady = idle(&mut pod, "steady");
    let boot_id = "cat /proc/sys/kernel/random/boot_id";
    let machine = script(&mut pod, &steady, boot_id);

    for code in [0, 3] {
        let brief = pod.run("brief", BUSYBOX, &["sh", "-c", &format!("exit {code}")]).unwrap();
        eventually("it has exited", || {
            pod.status(&brief).unwrap().state() == ContainerState::ContainerExited
        });
        assert_eq!(pod.status(&brief).unwrap().exit_code, code);
        pod.remove_container(&brief, 0).unwrap();
    }
    let stubborn = idle(&mut pod, "stubborn");
    pod.remove_container(&stubborn, 0).unwrap();

    assert!(pod.ready() && pod.runs(&steady));
    assert_eq!(script(&mut pod, &steady, boot_id), machine);
}

#[test]
fn a_pod_has_the_kernel_parameters_that_it_asks_for() {
    let sysctls = HashMap::from([
        ("net.ipv4.ip_unprivileged_port_start".to_owned(), "77".to_owned()),
        ("kernel.shm_rmid_forced".to_owned(), "1".to_owned()),
    ]);
    let linux = LinuxPodSandboxConfig { sysctls, ..Default::default() };
    let mut pod = Cri::connect(&[BUSYBOX]).run_pod(linux).unwrap();
    let one = idle(&mut pod, "one");
    let read = "cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/shm_rmid_forced";
    assert_eq!(script(&mut pod, &one, read), "77\n1");
}

#[test]
fn a_volume_is_shared_and_what_changes_on_the_host_is_seen() {
    let volume = tempfile::tempdir().unwrap();
    let write = |version: &str| {
        // As the kubelet updates a ConfigMap: a new directory, and a link that is replaced in one step.
        let data = volume.path().join(version);
        fs::create_dir(&data).unwrap();
        fs::write(data.join("key"), version).unwrap();
        symlink(version, volume.path().join("..next")).unwrap();
        fs::rename(volume.path().join("..next"), volume.path().join("..data")).unwrap();
    };
    write("one");
    symlink("..data/key", volume.path().join("key")).unwrap();
    let mount = |readonly| Mount {
        container_path: "/volume".into(),
        host_path: volume.path().display().to_string(),
        readonly,
        ..Default::default()
    };
    let mut pod = pod();
    let with = |name, readonly| ContainerConfig {
        mounts: vec![mount(readonly)],
        ..container(name, BUSYBOX, &["sleep", "infinity"])
    };
    let writer = pod.run_container(with("writer", false)).unwrap();
    let reader = pod.run_container(with("reader", true)).unwrap();

    assert_eq!(script(&mut pod, &reader, "cat /volume/key"), "one");
    script(&mut pod, &writer, "echo from inside > /volume/file");
    assert_eq!(script(&mut pod, &reader, "cat /volume/file"), "from inside");
    assert_eq!(fs::read_to_string(volume.path().join("file")).unwrap(), "from inside\n");
    assert_ne!(pod.exec(&reader, "echo no > /volume/file").unwrap().0, 0);
    write("two");
    eventually("the new version is seen", || script(&mut pod, &reader, "cat /volume/key") == "two");
    pod.remove().unwrap();
    assert!(volume.path().join("file").exists());
}

#[test]
fn limits_hold_change_and_are_told_when_they_kill() {
    let memory =
        |memory_limit_in_bytes| LinuxContainerResources { memory_limit_in_bytes, ..Default::default() };
    let limited = |name, command: &[&str], bytes| {
        let resources = Some(memory(bytes));
        let linux = LinuxContainerConfig { resources, security_context: Some(private()) };
        ContainerConfig { linux: Some(linux), ..container(name, BUSYBOX, command) }
    };
    let mut pod = pod();
    let one = pod.run_container(limited("one", &["sleep", "infinity"], 32 << 20)).unwrap();
    let greedy = limited("greedy", &["sh", "-c", "tail /dev/zero"], 16 << 20);
    let greedy = pod.run_container(greedy).unwrap();

    eventually("the greedy one is killed", || !pod.runs(&greedy));
    let status = pod.status(&greedy).unwrap();
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "OOMKilled"));
    let max = "cat /sys/fs/cgroup/memory.max";
    assert_eq!(script(&mut pod, &one, max), (32 << 20).to_string());
    pod.update(&one, memory(48 << 20)).unwrap();
    assert_eq!(script(&mut pod, &one, max), (48 << 20).to_string());
    let used = pod.stats(&one).unwrap().memory.unwrap().working_set_bytes.unwrap().value;
    assert!((1..48 << 20).contains(&used), "{used} bytes");
}

#[test]
fn a_probe_that_takes_too_long_is_ended() {
    let mut pod = pod();
    let one = idle(&mut pod, "one");
    let error = pod.exec_for(&one, "sleep 1000", 1).unwrap_err();
    assert_eq!(error.code(), tonic::Code::DeadlineExceeded, "{error}");
    eventually("nothing of it is left", || {
        script(&mut pod, &one, "ps | grep -c '[s]leep 1000' || true") == "0"
    });
}

#[test]
fn a_pod_that_is_removed_leaves_nothing() {
    let before = traces();
    for _ in 0..3 {
        let mut pod = pod();
        let (one, _) = (idle(&mut pod, "one"), idle(&mut pod, "other"));
        assert!(pod.runs(&one));
        pod.stop().unwrap();
        assert!(!pod.ready() && !pod.runs(&one));
        pod.remove().unwrap();
    }
    before.assert_restored(3);
}

#[test]
fn a_pod_whose_vm_dies_is_no_longer_ready_and_can_be_removed() {
    let mut pod = pod();
    let one = idle(&mut pod, "one");
    let [vmm] = &processes_named("mayu-vmm")[..] else { panic!("one VMM") };
    let pid = i32::try_from(vmm.pid).unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();

    eventually("the container has exited", || !pod.runs(&one));
    assert_eq!(pod.status(&one).unwrap().exit_code, 137);
    eventually("the pod is not ready", || !pod.ready());
    pod.remove().unwrap();
    assert!(processes_named("mayu-vmm").is_empty());
}
