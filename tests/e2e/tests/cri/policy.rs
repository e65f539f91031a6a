//! What the operator's policy denies does not begin, and a kubelet is told why.

use std::fs;

use k8s_cri::v1::security_profile::ProfileType;
use k8s_cri::v1::{
    Capability, ContainerConfig, Int64Value, LinuxContainerConfig, LinuxContainerResources,
    LinuxContainerSecurityContext, LinuxPodSandboxConfig, SecurityProfile,
};
use mayu_e2e::BUSYBOX;
use mayu_e2e::configuration::Configuration;
use mayu_e2e::cri::{Cri, for_privileged, private, privileged};
use mayu_e2e::host::processes_named;
use tonic::Status;

use super::{idle, mount, pod, script, secured, sleeping, traces};

/// The policy that comes with mayu.
const RESTRICTED: &str = "/usr/share/mayu/policies/restricted.rego";

/// Has the configuration name a policy for as long as both live.
struct Policy {
    _configuration: Configuration,
    _file: tempfile::NamedTempFile,
}

impl Policy {
    fn new(text: &str) -> Self {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), text).unwrap();
        Self { _configuration: named(file.path().to_str().unwrap()), _file: file }
    }
}

fn named(path: &str) -> Configuration {
    Configuration::with(|text| format!("policy = \"{path}\"\n{text}"))
}

#[track_caller]
fn assert_denied<T>(result: Result<T, Status>, reason: &str) {
    let Err(status) = result else { panic!("it is allowed, and was to be denied: {reason}") };
    let message = status.message();
    assert!(
        message.contains("denied by policy /") && message.contains(reason),
        "no {reason:?} in: {message}"
    );
}

#[test]
fn what_is_denied_is_told_by_rule_field_and_value_and_leaves_nothing() {
    let before = traces();
    let policy = Policy::new(
        r#"
        package mayu

        deny contains {"rule": "no SYS_ADMIN", "field": "spec.process.capabilities.bounding", "value": "CAP_SYS_ADMIN", "message": "run it elsewhere"} if {
            "CAP_SYS_ADMIN" in input.spec.process.capabilities.bounding
        }

        deny contains {"rule": "no ls", "field": "process.args", "value": input.process.args, "message": "look away"} if {
            "ls" in input.process.args
        }

        deny contains {"rule": "images", "field": "image", "value": input.image, "message": "not ours"} if {
            input.request == "container"
            not contains(input.image, "busybox")
        }
        "#,
    );
    let mut pod = Cri::connect(&[BUSYBOX]).run_pod(for_privileged()).unwrap();
    let machines = processes_named("mayu-vmm").len();

    let sys_admin =
        r#"no SYS_ADMIN: spec.process.capabilities.bounding is "CAP_SYS_ADMIN": run it elsewhere"#;
    assert_denied(pod.run_container(secured("privileged", privileged())), sys_admin);
    let one = idle(&mut pod, "one");
    assert_denied(pod.outcome(&one, "ls", 0), r#"no ls: process.args is ["sh","-c","ls"]: look away"#);

    assert_eq!(script(&mut pod, &one, "echo runs"), "runs");
    assert!(pod.runs(&one) && pod.ready());
    assert_eq!(processes_named("mayu-vmm").len(), machines);
    pod.remove().unwrap();
    drop(policy);
    before.assert_restored(1);
}

/// What a container has to say of itself to be allowed by the restricted standard, and what a kubelet adds.
fn good() -> LinuxContainerSecurityContext {
    let masked = [
        "/proc/acpi",
        "/proc/kcore",
        "/proc/keys",
        "/proc/timer_list",
        "/proc/sched_debug",
        "/proc/scsi",
        "/sys/firmware",
    ];
    LinuxContainerSecurityContext {
        run_as_user: Some(Int64Value { value: 1000 }),
        no_new_privs: true,
        capabilities: Some(Capability { drop_capabilities: vec!["ALL".into()], ..Default::default() }),
        seccomp: Some(SecurityProfile {
            profile_type: ProfileType::RuntimeDefault.into(),
            ..Default::default()
        }),
        masked_paths: masked.map(str::to_owned).to_vec(),
        ..private()
    }
}

#[test]
fn a_container_that_keeps_to_the_restricted_standard_runs_and_others_do_not() {
    let _policy = named(RESTRICTED);
    let mut pod = Cri::connect(&[BUSYBOX]).run_pod(for_privileged()).unwrap();

    let one = pod.run_container(secured("good", good())).unwrap();

    assert_eq!(script(&mut pod, &one, "id -u"), "1000");
    for (name, security, reason) in [
        ("root", LinuxContainerSecurityContext { run_as_user: None, ..good() }, "running as non-root: "),
        (
            "escalating",
            LinuxContainerSecurityContext { no_new_privs: false, ..good() },
            "privilege escalation: ",
        ),
        ("capable", LinuxContainerSecurityContext { capabilities: None, ..good() }, "capabilities: "),
        ("unfiltered", LinuxContainerSecurityContext { seccomp: None, ..good() }, "seccomp: "),
        (
            "unmasked",
            LinuxContainerSecurityContext { masked_paths: Vec::new(), ..good() },
            "/proc mount type: ",
        ),
        ("privileged", privileged(), "privileged containers: "),
    ] {
        assert_denied(pod.run_container(secured(name, security)), reason);
    }
    let folder = tempfile::tempdir().unwrap();
    let of_host =
        ContainerConfig { mounts: vec![mount(folder.path(), "/host")], ..secured("volume", good()) };
    let reason = format!("hostPath volumes: spec.mounts[/host].source is {:?}", folder.path());
    assert_denied(pod.run_container(of_host), &reason);
    assert!(pod.runs(&one) && pod.ready());
}

#[test]
fn limits_grow_no_further_than_the_policy_allows() {
    let _policy = Policy::new(
        r#"
        package mayu
        deny contains {"rule": "size", "field": "size.vcpus", "value": input.size.vcpus, "message": "two at most"} if {
            input.size.vcpus > 2
        }
        "#,
    );
    let limits = |cpus: i64| LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: cpus * 100_000,
        ..Default::default()
    };
    let limited = |name, cpus| {
        let linux = LinuxContainerConfig { resources: Some(limits(cpus)), security_context: Some(private()) };
        ContainerConfig { linux: Some(linux), ..sleeping(name) }
    };
    let mut pod = pod();
    let one = pod.run_container(limited("one", 1)).unwrap();

    let reason = "size: size.vcpus is 3: two at most";
    assert_denied(pod.run_container(limited("other", 2)), reason);
    assert_denied(pod.update(&one, limits(3)), reason);
    assert_eq!(script(&mut pod, &one, "nproc; cat /sys/fs/cgroup/cpu.max"), "1\n100000 100000");
    pod.update(&one, limits(2)).unwrap();
    assert_eq!(script(&mut pod, &one, "cat /sys/fs/cgroup/cpu.max"), "200000 100000");
}

#[test]
fn with_a_broken_policy_no_pod_starts_and_the_line_is_told() {
    let before = traces();
    let policy = Policy::new("package mayu\n\ndeny contains if\n");

    let refusal = Cri::connect(&[BUSYBOX]).run_pod(LinuxPodSandboxConfig::default());

    let refusal = refusal.map(|pod| pod.id().to_owned()).expect_err("nothing can be allowed");
    assert!(refusal.message().contains(": line 3, column "), "{refusal}");
    drop(policy);
    before.assert_restored(1);
    idle(&mut pod(), "one");
}
