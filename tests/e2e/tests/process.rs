//! What the OCI spec says of a container's process.

use mayu_e2e::spec::Bundle;
use mayu_e2e::{BUSYBOX, Container};
use serde_json::json;

#[test]
fn environment_and_working_directory() {
    let flags = ["--env", "COLOUR=deep blue", "--cwd", "/tmp"];
    let text = Container::sh(&flags, "echo \"$COLOUR\"; pwd").success().text();
    assert_eq!(text, "deep blue\n/tmp");
}

#[test]
fn user_group_and_supplementary_groups() {
    let mut bundle = Bundle::sh("id -u; id -g; id -G");
    bundle.spec["process"]["user"] = json!({ "uid": 65534, "gid": 65533, "additionalGids": [1234, 5678] });
    assert_eq!(bundle.run().success().text(), "65534\n65533\n65533 1234 5678");
}

#[test]
fn files_belong_to_the_user_that_makes_them() {
    let mut bundle = Bundle::sh("touch /tmp/mine && stat -c %u:%g /tmp/mine");
    bundle.spec["process"]["user"] = json!({ "uid": 4711, "gid": 4712 });
    std::fs::set_permissions(
        bundle.rootfs().join("tmp"),
        std::os::unix::fs::PermissionsExt::from_mode(0o1777),
    )
    .unwrap();

    assert_eq!(bundle.run().success().text(), "4711:4712");

    let metadata = std::fs::metadata(bundle.rootfs().join("tmp/mine")).unwrap();
    let owner =
        (std::os::unix::fs::MetadataExt::uid(&metadata), std::os::unix::fs::MetadataExt::gid(&metadata));
    assert_eq!(owner, (4711, 4712));
}

#[test]
fn host_name() {
    let mut bundle = Bundle::sh("hostname");
    bundle.spec["hostname"] = json!("cocoon");
    assert_eq!(bundle.run().success().text(), "cocoon");
}

#[test]
fn resource_limits() {
    let mut bundle = Bundle::sh("ulimit -Sn; ulimit -Hn");
    bundle.spec["process"]["rlimits"] = json!([{ "type": "RLIMIT_NOFILE", "soft": 512, "hard": 768 }]);
    assert_eq!(bundle.run().success().text(), "512\n768");
}

#[test]
fn capabilities_are_just_those_of_the_spec() {
    let mut bundle = Bundle::sh(
        "grep Cap /proc/self/status; chown 1:1 /etc/passwd && echo chowned; mount -t tmpfs none /tmp",
    );
    let just = json!(["CAP_CHOWN"]);
    bundle.spec["process"]["capabilities"] =
        json!({ "bounding": just, "effective": just, "permitted": just });
    let outcome = bundle.run();
    let text = outcome.text();
    assert_ne!(outcome.code, 0, "mount needs CAP_SYS_ADMIN");
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        assert!(text.contains(&format!("{set}:\t0000000000000001")), "{text}");
    }
    assert!(text.contains("chowned"), "{text}");
}

#[test]
fn no_new_privileges() {
    for wanted in [true, false] {
        let mut bundle = Bundle::sh("grep NoNewPrivs /proc/self/status");
        bundle.spec["process"]["noNewPrivileges"] = json!(wanted);
        assert_eq!(bundle.run().success().text(), format!("NoNewPrivs:\t{}", u8::from(wanted)));
    }
}

#[test]
fn security_modules_that_only_the_host_has_do_not_stop_a_container() {
    let mut bundle = Bundle::sh("cat /proc/self/attr/current 2> /dev/null; echo runs");
    bundle.spec["process"]["apparmorProfile"] = json!("cri-containerd.apparmor.d");
    bundle.spec["process"]["selinuxLabel"] = json!("system_u:system_r:container_t:s0:c1,c2");
    bundle.spec["linux"]["mountLabel"] = json!("system_u:object_r:container_file_t:s0:c1,c2");
    assert_eq!(bundle.run().success().text(), "runs");
}

#[test]
fn a_seccomp_profile_refuses_a_syscall_with_its_errno() {
    let mut bundle = Bundle::sh("mkdir /tmp/refused; touch /tmp/allowed && echo allowed");
    bundle.spec["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64"],
        // EDOM: nothing but the profile would answer mkdir with it.
        "syscalls": [{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 33 }],
    });
    let outcome = bundle.run().success();
    assert_eq!(outcome.text(), "allowed");
    assert!(outcome.stderr.contains("Numerical argument out of domain"), "{}", outcome.stderr);
}

#[test]
fn signals_reach_the_init() {
    let container = Container::detached(
        BUSYBOX,
        &[],
        &["sh", "-c", "trap 'exit 9' TERM; touch /tmp/ready; while :; do sleep 0.1; done"],
    );
    mayu_e2e::shim::eventually("the trap is set", || container.exec(&["test", "-e", "/tmp/ready"]).code == 0);

    container.task("kill", &["--signal", "TERM"]).success();

    mayu_e2e::shim::eventually("it has stopped", || container.status().as_deref() == Some("STOPPED"));
    assert_eq!(container.delete_task(), 9);
}
