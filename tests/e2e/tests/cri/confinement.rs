//! What a container is kept from: system calls, devices, the host's users. And what confines it on a host without virtual
//! machines and has no counterpart in a guest.

use std::path::Path;

use k8s_cri::v1::security_profile::ProfileType;
use k8s_cri::v1::{
    ContainerConfig, Device, IdMapping, LinuxContainerSecurityContext, LinuxPodSandboxConfig,
    LinuxSandboxSecurityContext, NamespaceMode, NamespaceOption, SeLinuxOption, SecurityProfile,
    UserNamespace,
};
use mayu_e2e::BUSYBOX;
use mayu_e2e::cri::{Cri, private};
use serde_json::json;

use super::{failing, idle, pod, script, secured, sleeping};

fn profile(kind: ProfileType) -> Option<SecurityProfile> {
    Some(SecurityProfile { profile_type: kind.into(), ..Default::default() })
}

fn local_profile(name: &str) -> Option<SecurityProfile> {
    Some(SecurityProfile { profile_type: ProfileType::Localhost.into(), localhost_ref: name.into() })
}

#[test]
fn a_seccomp_profile_confines_a_container_and_what_is_executed_in_it() {
    let file = tempfile::NamedTempFile::new().unwrap();
    // EDOM: nothing but the profile would answer mkdir with it.
    let local = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 33 }],
    });
    std::fs::write(file.path(), local.to_string()).unwrap();
    let mut pod = pod();
    let mut confined = |name, seccomp| {
        let one = secured(name, LinuxContainerSecurityContext { seccomp, ..private() });
        pod.run_container(one).unwrap()
    };
    let default = confined("default", profile(ProfileType::RuntimeDefault));
    let local = confined("local", local_profile(file.path().to_str().unwrap()));
    let unconfined = confined("unconfined", profile(ProfileType::Unconfined));

    // Modes of seccomp(2), in proc_pid_status(5): 2 is a filter.
    for (one, mode) in [(&default, 2), (&local, 2), (&unconfined, 0)] {
        for process in ["1", "self"] {
            let is = script(&mut pod, one, &format!("grep Seccomp: /proc/{process}/status"));
            assert_eq!(is, format!("Seccomp:\t{mode}"), "of {process}");
        }
    }
    let unshare = "unshare -U true";
    let refused = failing(&mut pod, &default, unshare);
    assert!(refused.contains("Operation not permitted"), "{refused}");
    script(&mut pod, &unconfined, unshare);
    let refused = failing(&mut pod, &local, "touch /tmp/file && mkdir /tmp/dir");
    assert!(refused.contains("Numerical argument out of domain"), "{refused}");
    script(&mut pod, &default, "mkdir /tmp/dir");
}

#[test]
fn security_modules_that_only_the_host_has_do_not_stop_a_container() {
    let mut pod = pod();
    let text = str::to_owned;
    let label = SeLinuxOption {
        user: text("system_u"),
        role: text("system_r"),
        r#type: text("container_t"),
        level: text("s0:c1,c2"),
    };
    let security = LinuxContainerSecurityContext { selinux_options: Some(label), ..private() };
    let labelled = pod.run_container(secured("labelled", security)).unwrap();
    assert_eq!(script(&mut pod, &labelled, "echo runs"), "runs");

    // Where the host has no AppArmor, containerd refuses a profile by itself and the shim is never asked.
    for (name, apparmor) in
        [("unconfined", profile(ProfileType::Unconfined)), ("default", profile(ProfileType::RuntimeDefault))]
    {
        let security = LinuxContainerSecurityContext { apparmor, ..private() };
        match pod.run_container(secured(name, security)) {
            Ok(one) => assert_eq!(script(&mut pod, &one, "echo runs"), "runs", "{name}"),
            Err(error) => {
                assert!(error.message().contains("apparmor is not supported"), "{name}: {error}");
                assert!(!Path::new("/sys/kernel/security/apparmor").exists(), "{name}: {error}");
                assert_ne!(name, "unconfined", "{error}");
            }
        }
    }
}

#[test]
fn a_pod_with_users_of_its_own_is_refused() {
    let mapping = IdMapping { host_id: 100_000, container_id: 0, length: 65536 };
    let users = UserNamespace { mode: NamespaceMode::Pod.into(), uids: vec![mapping], gids: vec![mapping] };
    let options = NamespaceOption {
        pid: NamespaceMode::Container.into(),
        userns_options: Some(users),
        ..Default::default()
    };
    let security = LinuxSandboxSecurityContext { namespace_options: Some(options), ..Default::default() };
    let linux = LinuxPodSandboxConfig { security_context: Some(security), ..Default::default() };

    let refusal = Cri::connect(&[BUSYBOX]).run_pod(linux).map(|pod| pod.id().to_owned());

    let message = refusal.expect_err("the pod runs").message().to_owned();
    assert!(message.contains("user namespace"), "{message}");
}

#[test]
fn a_device_of_the_host_is_refused_by_its_name_and_the_reason() {
    let mut pod = pod();
    let steady = idle(&mut pod, "steady");
    let device = |host: &str, inside: &str| Device {
        host_path: host.into(),
        container_path: inside.into(),
        permissions: "rwm".into(),
    };
    let with = |name, device| ContainerConfig { devices: vec![device], ..sleeping(name) };

    let error = pod.run_container(with("kvm", device("/dev/kvm", "/dev/kvm"))).expect_err("it has a KVM");
    let message = error.message();
    assert!(message.contains("/dev/kvm") && message.contains("host"), "{message}");

    // One that the guest has as well may come under another name, but is never silently missing.
    match pod.run_container(with("null", device("/dev/null", "/dev/nothing"))) {
        Ok(one) => drop(script(&mut pod, &one, "[ -c /dev/nothing ] && echo x > /dev/nothing")),
        Err(error) => assert!(error.message().contains("/dev/nothing"), "{error}"),
    }
    assert!(pod.runs(&steady), "the pod goes on");
}
