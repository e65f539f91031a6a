//! What pods and containers may use, and what they do.

use std::collections::HashMap;
use std::fs;

use k8s_cri::v1::{ContainerConfig, LinuxContainerConfig, LinuxContainerResources, LinuxPodSandboxConfig};
use mayu_e2e::BUSYBOX;
use mayu_e2e::cri::{Cri, Pod, container, pod_config, private};
use mayu_e2e::host::processes_named;
use mayu_e2e::shim::eventually;
use tonic::Code;

use super::{LimitedCgroup, idle, script};

/// The memory that a VM has on top of its pod's limits: `vm.memory_mib`.
const BASE_MIB: u64 = 256;

fn resources(cpu_millis: i64, memory: i64) -> LinuxContainerResources {
    LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: cpu_millis * 100,
        memory_limit_in_bytes: memory,
        ..Default::default()
    }
}

/// A pod as a kubelet asks for it: with the sum of its containers' limits.
fn sized(resources: LinuxContainerResources) -> Pod {
    let linux = LinuxPodSandboxConfig { resources: Some(resources), ..Default::default() };
    Cri::connect(&[BUSYBOX]).run(pod_config(linux)).unwrap()
}

fn limited(name: &str, resources: LinuxContainerResources) -> ContainerConfig {
    let linux = LinuxContainerConfig { resources: Some(resources), security_context: Some(private()) };
    ContainerConfig { linux: Some(linux), ..container(name, BUSYBOX, &["sleep", "infinity"]) }
}

fn memory_mib(pod: &mut Pod, container: &str) -> u64 {
    let total = script(pod, container, "awk '/^MemTotal/ { print $2 }' /proc/meminfo");
    total.parse::<u64>().unwrap() / 1024
}

#[test]
fn a_vm_is_as_large_as_its_pod_and_grows_with_it() {
    let mut pod = sized(resources(1500, 128 << 20));
    let one = pod.run_container(limited("one", resources(1500, 128 << 20))).unwrap();
    assert_eq!(script(&mut pod, &one, "nproc"), "2");
    let before = memory_mib(&mut pod, &one);
    // The kernel keeps some of it for itself.
    assert!((BASE_MIB + 128 - 64..=BASE_MIB + 128).contains(&before), "{before} MiB");
    let machine = script(&mut pod, &one, "cat /proc/sys/kernel/random/boot_id");

    pod.update(&one, resources(2500, 512 << 20)).unwrap();

    eventually("it has another CPU", || script(&mut pod, &one, "nproc") == "3");
    eventually("it has more memory", || memory_mib(&mut pod, &one) >= before + 320);
    let limits = script(&mut pod, &one, "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max");
    assert_eq!(limits, format!("{}\n250000 100000", 512 << 20));
    // More than there was before, and it can be used.
    script(&mut pod, &one, "dd if=/dev/zero of=/dev/shm/fill bs=1M count=40 2> /dev/null; rm /dev/shm/fill");
    assert_eq!(script(&mut pod, &one, "cat /proc/sys/kernel/random/boot_id"), machine);
}

#[test]
fn every_limit_of_a_container_is_kept_by_the_guest() {
    let unified = HashMap::from([
        ("memory.high".to_owned(), (24 << 20).to_string()),
        ("memory.min".to_owned(), (4 << 20).to_string()),
        ("pids.max".to_owned(), "33".to_owned()),
    ]);
    let all = LinuxContainerResources {
        cpu_shares: 512,
        cpuset_cpus: "0".into(),
        unified,
        ..resources(500, 32 << 20)
    };
    let mut pod = sized(resources(500, 32 << 20));
    let one = pod.run_container(limited("one", all)).unwrap();
    let read =
        "cd /sys/fs/cgroup; cat cpu.max cpu.weight cpuset.cpus memory.max memory.high memory.min pids.max";
    let shown = script(&mut pod, &one, read);
    let lines: Vec<_> = shown.lines().collect();
    assert_eq!(lines[0], "50000 100000");
    let weight: u32 = lines[1].parse().unwrap();
    assert!((15..=60).contains(&weight), "512 shares are less than the default of 1024: {weight}");
    assert_eq!(lines[2..], ["0", "33554432", "25165824", "4194304", "33"]);
}

/// A pod in a cgroup of its own that the host counts for.
fn counted(parent: &str) -> Pod {
    // As systemd and a kubelet have it on every node; without, the kernel does not count for those below.
    fs::write("/sys/fs/cgroup/cgroup.subtree_control", "+cpu +memory +pids").unwrap();
    let linux = LinuxPodSandboxConfig { cgroup_parent: parent.into(), ..Default::default() };
    Cri::connect(&[BUSYBOX]).run(pod_config(linux)).unwrap()
}

#[test]
fn the_host_accounts_for_the_vm_in_its_pods_cgroup() {
    let parent = format!("/mayu-test-{}", std::process::id());
    let mut pod = counted(&parent);
    let one = idle(&mut pod, "one");
    let [vmm] = &processes_named("mayu-vmm")[..] else { panic!("one VMM") };
    let cgroup = fs::read_to_string(format!("/proc/{}/cgroup", vmm.pid)).unwrap();
    assert_eq!(cgroup.trim(), format!("0::{parent}/{}", pod.id()));
    let threads = fs::read_to_string(format!("/sys/fs/cgroup{parent}/{}/pids.max", pod.id())).unwrap();
    assert_eq!(threads.trim(), "512");

    // What it has of a template is not its own.
    script(&mut pod, &one, "dd if=/dev/zero of=/dev/shm/fill bs=1M count=20 2> /dev/null");
    let stats = pod.pod_stats().unwrap().linux.expect("figures of Linux");
    let used = stats.memory.unwrap().working_set_bytes.unwrap().value;
    let guest = memory_mib(&mut pod, &one) << 20;
    assert!((16 << 20..guest + (64 << 20)).contains(&used), "{used} bytes");
    assert!(stats.cpu.unwrap().usage_core_nano_seconds.unwrap().value > 0);
    let network = stats.network.expect("figures of the network").default_interface.expect("eth0");
    let received = script(&mut pod, &one, "cat /sys/class/net/eth0/statistics/rx_packets");
    assert!(received.parse::<u64>().is_ok(), "{received}");
    assert_eq!(network.name, "eth0");

    let parent = format!("/sys/fs/cgroup{parent}");
    pod.remove().unwrap();
    eventually("the cgroup that was made is gone", || !fs::exists(&parent).unwrap());
}

#[test]
fn a_containers_figures_are_the_guests_own() {
    let mut pod = sized(resources(1000, 64 << 20));
    let busy = "dd if=/dev/zero of=/dev/shm/fill bs=1M count=20 2> /dev/null; \
                i=0; while [ $i -lt 20000 ]; do i=$((i + 1)); done; touch /done; exec sleep infinity";
    let config = ContainerConfig {
        command: ["sh", "-c", busy].map(str::to_owned).to_vec(),
        ..limited("one", resources(1000, 64 << 20))
    };
    let one = pod.run_container(config).unwrap();
    eventually("it has done its work", || pod.exec(&one, "test -e /done").is_ok_and(|(code, _)| code == 0));
    let own = "cd /sys/fs/cgroup; cat memory.current; awk '/^inactive_file/ { print $2 }' memory.stat; \
               awk '/^usage_usec/ { print $2 }' cpu.stat";
    let mut close = false;
    eventually("the figures agree within 5 %", || {
        let stats = pod.stats(&one).unwrap();
        let shown = script(&mut pod, &one, own);
        let own: Vec<f64> = shown.lines().map(|line| line.parse().unwrap()).collect();
        let memory = stats.memory.unwrap().working_set_bytes.unwrap().value as f64;
        let cpu = stats.cpu.unwrap().usage_core_nano_seconds.unwrap().value as f64 / 1000.0;
        let near = |one: f64, other: f64| (one - other).abs() <= other * 0.05;
        // The script that reads them uses some itself.
        close = near(memory, own[0] - own[1]) && near(cpu, own[2]);
        close
    });
    assert!(close);
}

#[test]
fn a_pod_of_the_systemd_driver_has_the_scope_that_systemd_would_make() {
    // A kubelet gives the whole path of the pod's slice; containerd hands on what systemd would be asked for.
    let slice = "/mayu.slice/mayu-e2e.slice";
    let mut pod = counted(slice);
    let [vmm] = &processes_named("mayu-vmm")[..] else { panic!("one VMM") };
    let cgroup = fs::read_to_string(format!("/proc/{}/cgroup", vmm.pid)).unwrap();
    assert_eq!(cgroup.trim(), format!("0::{slice}/cri-containerd-{}.scope", pod.id()));
    pod.remove().unwrap();
    eventually("the slices that were made are gone", || !fs::exists("/sys/fs/cgroup/mayu.slice").unwrap());
}

#[test]
fn lists_of_figures_have_every_pod_and_container() {
    // Without a cgroup of their own, containerd has no figures of any pod.
    let mut pods = ["/mayu-one", "/mayu-other"].map(counted);
    let [one, other] = pods.each_mut().map(|pod| (pod.id().to_owned(), idle(pod, "one")));
    let [pod, _] = &mut pods;

    let of_pods = pod.list_pod_stats();
    let of_containers = pod.list_stats();

    for (sandbox, container) in [one, other] {
        let found =
            of_pods.iter().find(|stats| stats.attributes.as_ref().is_some_and(|pod| pod.id == sandbox));
        let linux = found.expect("the pod").linux.clone().expect("figures of Linux");
        assert!(linux.memory.unwrap().working_set_bytes.unwrap().value > 0);
        let inner: Vec<_> = linux.containers.iter().filter_map(|stats| stats.attributes.as_ref()).collect();
        assert!(inner.iter().any(|one| one.id == container), "{inner:?}");
        let found = of_containers
            .iter()
            .find(|stats| stats.attributes.as_ref().is_some_and(|one| one.id == container));
        assert!(found.expect("the container").memory.unwrap().working_set_bytes.unwrap().value > 0);
    }
    match pod.metric_descriptors() {
        Ok(descriptors) => assert!(!descriptors.is_empty()),
        // containerd before 2.2 has it for no runtime.
        Err(status) => assert_eq!(status.code(), Code::Unimplemented, "{status}"),
    }
}

#[test]
fn a_vm_at_its_limit_on_the_host_ends_with_a_reason_and_nothing_else_does() {
    let cgroup = LimitedCgroup::new("limit");
    let mut other = super::pod();
    let bystander = idle(&mut other, "bystander");
    let mut pod = Cri::connect(&[BUSYBOX]).run(pod_config(cgroup.config())).unwrap();
    let greedy = idle(&mut pod, "greedy");
    cgroup.limit("96M");

    // The answer is lost with the VM.
    let _ = pod.exec(
        &greedy,
        "dd if=/dev/zero of=/tmp/fill bs=1M count=200; cat /tmp/fill | md5sum; tail /dev/zero",
    );

    eventually("the pod is over", || !pod.ready());
    eventually("its container has ended", || !pod.runs(&greedy));
    let status = pod.status(&greedy).unwrap();
    assert_eq!(status.exit_code, 137);
    assert!(other.ready() && other.runs(&bystander));
    drop(pod);
    cgroup.remove();
}
