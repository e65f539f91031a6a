//! What the containers of a pod share and what is each one's own: processes, names, addresses of servers.

use std::fs;

use k8s_cri::v1::{
    ContainerConfig, ContainerMetadata, DnsConfig, LinuxContainerConfig, LinuxContainerSecurityContext,
    LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceMode, NamespaceOption, PodSandboxConfig,
};
use mayu_e2e::BUSYBOX;
use mayu_e2e::cri::{Cri, Pod, pod_config};
use mayu_e2e::shim::eventually;

use super::{exited, idle, mount, pod, running, script, sleeping};

const PROCESSES: &str = "ps -o args";

const FIRST_PROCESS: &str = "tr '\\0' ' ' < /proc/1/cmdline";

/// A pod with `shareProcessNamespace`.
#[track_caller]
fn sharing_pod() -> Pod {
    let options = NamespaceOption { pid: NamespaceMode::Pod.into(), ..Default::default() };
    let security = LinuxSandboxSecurityContext { namespace_options: Some(options), ..Default::default() };
    let linux = LinuxPodSandboxConfig { security_context: Some(security), ..Default::default() };
    Cri::connect(&[BUSYBOX]).run_pod(linux).unwrap()
}

/// A container that sees other processes than its own.
fn seeing(config: ContainerConfig, pid: NamespaceMode, target: &str) -> ContainerConfig {
    let options = NamespaceOption { pid: pid.into(), target_id: target.to_owned(), ..Default::default() };
    let security = LinuxContainerSecurityContext { namespace_options: Some(options), ..Default::default() };
    let linux = LinuxContainerConfig { security_context: Some(security), ..Default::default() };
    ContainerConfig { linux: Some(linux), ..config }
}

#[test]
fn processes_are_a_container_s_own_by_default() {
    let mut pod = pod();
    let one = pod.run_container(running("one", "sleep 1111 & exec sleep 1001")).unwrap();
    let other = idle(&mut pod, "other");

    assert_eq!(script(&mut pod, &one, FIRST_PROCESS), "sleep 1001");
    let seen = script(&mut pod, &one, PROCESSES);
    assert!(seen.contains("sleep 1111") && !seen.contains("sleep infinity"), "{seen}");
    let seen = script(&mut pod, &other, PROCESSES);
    assert!(seen.contains("sleep infinity") && !seen.contains("sleep 1"), "{seen}");
    let namespace = "readlink /proc/self/ns/pid";
    assert_ne!(script(&mut pod, &one, namespace), script(&mut pod, &other, namespace));
}

#[test]
fn containers_that_share_processes_see_and_signal_each_other_and_end_alone() {
    let mut pod = sharing_pod();
    let shared = |config| seeing(config, NamespaceMode::Pod, "");
    let one = pod.run_container(shared(running("one", "sleep 1111 & exec sleep 1001"))).unwrap();
    let other = pod.run_container(shared(running("other", "exec sleep 2002"))).unwrap();

    for (container, who) in [(&one, "one"), (&other, "other")] {
        let seen = script(&mut pod, container, PROCESSES);
        for program in ["sleep 1001", "sleep 1111", "sleep 2002"] {
            assert!(seen.contains(program), "{who} sees no {program} among:\n{seen}");
        }
        let first = script(&mut pod, container, FIRST_PROCESS);
        assert!(!first.contains("1001") && !first.contains("2002"), "process 1 of {who} is {first}");
    }

    // The end of one takes all its processes along, and none of the other's.
    pod.stop_container(&one, 1).unwrap();
    exited(&mut pod, &one);
    eventually("nothing of it is left", || {
        let seen = script(&mut pod, &other, PROCESSES);
        !seen.contains("sleep 1001") && !seen.contains("sleep 1111")
    });
    assert!(pod.runs(&other));

    // It comes back into the same company.
    let again = ContainerConfig {
        metadata: Some(ContainerMetadata { name: "one".into(), attempt: 1 }),
        ..running("one", "exec sleep 1001")
    };
    let again = pod.run_container(shared(again)).unwrap();
    let seen = script(&mut pod, &again, PROCESSES);
    assert!(seen.contains("sleep 2002"), "{seen}");
    script(&mut pod, &other, "kill -TERM $(ps -o pid,args | awk '/[s]leep 1001/ { print $1 }')");
    assert_eq!(exited(&mut pod, &again).exit_code, 143);
    assert!(pod.runs(&other) && pod.ready());
}

#[test]
fn a_debugger_sees_the_processes_of_its_target() {
    let mut pod = pod();
    let target = pod.run_container(running("target", "exec sleep 1001")).unwrap();
    let debugger = seeing(running("debugger", "exec sleep 3003"), NamespaceMode::Target, &target);
    let debugger = pod.run_container(debugger).unwrap();

    assert_eq!(script(&mut pod, &debugger, FIRST_PROCESS), "sleep 1001");
    let seen = script(&mut pod, &debugger, PROCESSES);
    assert!(seen.contains("sleep 3003"), "its own:\n{seen}");
    script(&mut pod, &debugger, "[ -d /proc/1/root/bin ]");

    pod.remove_container(&debugger, 0).unwrap();
    assert!(pod.runs(&target));
    let seen = script(&mut pod, &target, PROCESSES);
    assert!(!seen.contains("sleep 3003"), "{seen}");
}

#[test]
fn a_target_that_cannot_be_told_from_others_is_refused_with_a_way_out() {
    let mut pod = pod();
    let (target, other) = (idle(&mut pod, "target"), idle(&mut pod, "other"));
    let debugger = seeing(sleeping("debugger"), NamespaceMode::Target, &target);

    let error = pod.run_container(debugger).expect_err("containerd names the target by the VM");

    assert!(error.message().contains("shareProcessNamespace"), "{error}");
    assert!(pod.runs(&target) && pod.runs(&other));
}

#[test]
fn names_and_servers_are_those_of_the_pod() {
    let text = |words: &[&str]| words.iter().map(ToString::to_string).collect();
    let dns_config = DnsConfig {
        servers: text(&["10.96.0.10", "fd00::a"]),
        searches: text(&["test.svc.cluster.local", "svc.cluster.local", "cluster.local"]),
        options: text(&["ndots:5", "edns0"]),
    };
    let config = PodSandboxConfig {
        hostname: "web-0".into(),
        dns_config: Some(dns_config),
        ..pod_config(LinuxPodSandboxConfig::default())
    };
    let mut pod = Cri::connect(&[BUSYBOX]).run(config).unwrap();
    let one = idle(&mut pod, "one");
    let hosts = tempfile::NamedTempFile::new().unwrap();
    fs::write(hosts.path(), "10.1.2.3 web-0.test.svc.cluster.local web-0\n").unwrap();
    let config = ContainerConfig { mounts: vec![mount(hosts.path(), "/etc/hosts")], ..sleeping("other") };
    let other = pod.run_container(config).unwrap();

    for one in [&one, &other] {
        assert_eq!(
            script(&mut pod, one, "hostname; cat /etc/hostname; echo $HOSTNAME"),
            "web-0\nweb-0\nweb-0"
        );
        let resolver = script(&mut pod, one, "cat /etc/resolv.conf");
        let expected = "search test.svc.cluster.local svc.cluster.local cluster.local\n\
                        nameserver 10.96.0.10\nnameserver fd00::a\noptions ndots:5 edns0";
        assert_eq!(resolver, expected);
    }
    let of_the_host = fs::read_to_string("/etc/hosts").unwrap();
    assert_eq!(script(&mut pod, &one, "cat /etc/hosts"), of_the_host.trim_end());
    // A kubelet writes the file itself, and adds to it while the pod lives.
    assert_eq!(
        script(&mut pod, &other, "cat /etc/hosts"),
        fs::read_to_string(hosts.path()).unwrap().trim_end()
    );
    fs::write(hosts.path(), "10.1.2.3 web-0\n10.9.9.9 registry.test\n").unwrap();
    eventually("the new name is seen", || {
        script(&mut pod, &other, "cat /etc/hosts").contains("registry.test")
    });
}
