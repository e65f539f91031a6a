//! Who a container's processes are and what they may do: `securityContext` of pods and containers.

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};

use k8s_cri::v1::{
    Capability, ContainerConfig, Int64Value, LinuxContainerSecurityContext, SupplementalGroupsPolicy,
};
use mayu_e2e::BUSYBOX;
use mayu_e2e::cri::{Cri, Pod, container, for_privileged, private, privileged};
use mayu_e2e::image::Image;

use super::{failing, idle, mount, pod, script, secured};

/// What containerd gives every container: CHOWN, DAC_OVERRIDE, FOWNER, FSETID, KILL, SETGID, SETUID, SETPCAP,
/// NET_BIND_SERVICE, NET_RAW, SYS_CHROOT, MKNOD, AUDIT_WRITE and SETFCAP, as bits of capabilities(7).
const DEFAULT_CAPABILITIES: u64 = 0xa804_25fb;

const CHOWN: u64 = 1;
const NET_BIND_SERVICE: u64 = 1 << 10;
const SYS_TIME: u64 = 1 << 25;

/// All that Linux 6.12 has.
const ALL_CAPABILITIES: u64 = (1 << 41) - 1;

fn user(uid: i64, gid: i64, groups: &[i64]) -> LinuxContainerSecurityContext {
    LinuxContainerSecurityContext {
        run_as_user: Some(Int64Value { value: uid }),
        run_as_group: Some(Int64Value { value: gid }),
        supplemental_groups: groups.to_vec(),
        ..private()
    }
}

/// The groups that `id -G` names, or the line `Groups` of proc_pid_status(5).
fn groups(text: &str) -> BTreeSet<u32> {
    text.split_whitespace().filter_map(|word| word.parse().ok()).collect()
}

/// A set of capabilities of /proc/<pid>/status, proc_pid_status(5).
#[track_caller]
fn capabilities(pod: &mut Pod, container: &str, process: &str, set: &str) -> u64 {
    let line = script(pod, container, &format!("grep {set}: /proc/{process}/status"));
    u64::from_str_radix(line.split_whitespace().nth(1).unwrap(), 16).unwrap()
}

#[test]
fn processes_have_the_user_and_the_groups_that_they_are_given() {
    let mut pod = pod();
    let one = pod.run_container(secured("one", user(1000, 2000, &[3000, 4000]))).unwrap();

    assert_eq!(script(&mut pod, &one, "id -u; id -g"), "1000\n2000");
    let expected = BTreeSet::from([2000, 3000, 4000]);
    assert_eq!(groups(&script(&mut pod, &one, "id -G")), expected);
    let of_the_first = script(&mut pod, &one, "grep -E '^(Uid|Gid):' /proc/1/status");
    assert_eq!(of_the_first, "Uid:\t1000\t1000\t1000\t1000\nGid:\t2000\t2000\t2000\t2000");
    let mut of_the_first = groups(&script(&mut pod, &one, "grep ^Groups: /proc/1/status"));
    of_the_first.insert(2000);
    assert_eq!(of_the_first, expected);
    let made = script(&mut pod, &one, "touch /tmp/file && stat -c %u:%g /tmp/file");
    assert_eq!(made, "1000:2000");
}

#[test]
fn groups_of_the_image_are_merged_unless_the_policy_is_strict() {
    let image = Image::with_groups();
    let mut pod = pod();
    let run = |pod: &mut Pod, name: &str, policy: SupplementalGroupsPolicy| {
        let security = LinuxContainerSecurityContext {
            supplemental_groups_policy: policy.into(),
            ..user(65534, 65534, &[3000])
        };
        let config = secured(name, security).linux;
        let one = container(name, image.name(), &["sleep", "infinity"]);
        let one = pod.run_container(ContainerConfig { linux: config, ..one }).unwrap();
        groups(&script(pod, &one, "id -G"))
    };

    let merged = run(&mut pod, "merged", SupplementalGroupsPolicy::Merge);
    assert_eq!(merged, BTreeSet::from([1234, 3000, 65534]));
    if !pod.features().supplemental_groups_policy {
        eprintln!("SKIPPED: needs a containerd with supplementalGroupsPolicy: the policy Strict");
        return;
    }
    let strict = run(&mut pod, "strict", SupplementalGroupsPolicy::Strict);
    assert_eq!(strict, BTreeSet::from([3000, 65534]));
}

#[test]
fn a_volume_of_the_pod_s_group_is_the_group_s() {
    let volume = tempfile::tempdir().unwrap();
    // As a kubelet prepares a volume for a pod with an fsGroup.
    chown(volume.path(), None, Some(4321)).unwrap();
    fs::set_permissions(volume.path(), Permissions::from_mode(0o2775)).unwrap();
    let mut pod = pod();
    let with = |pod: &mut Pod, name: &str, groups: &[i64]| {
        let config = secured(name, user(1000, 1000, groups));
        let config = ContainerConfig { mounts: vec![mount(volume.path(), "/volume")], ..config };
        pod.run_container(config).unwrap()
    };
    let member = with(&mut pod, "member", &[4321]);
    let stranger = with(&mut pod, "stranger", &[]);

    script(&mut pod, &member, "mkdir /volume/dir && echo member > /volume/dir/file");
    let refused = failing(&mut pod, &stranger, "echo stranger > /volume/other");
    assert!(refused.contains("Permission denied"), "{refused}");
    let of = script(&mut pod, &stranger, "stat -c %u:%g /volume /volume/dir /volume/dir/file");
    assert_eq!(of, "0:4321\n1000:4321\n1000:4321");
    for name in ["dir", "dir/file"] {
        let on_the_host = fs::metadata(volume.path().join(name)).unwrap();
        assert_eq!((on_the_host.uid(), on_the_host.gid()), (1000, 4321), "{name}");
    }
}

#[test]
fn capabilities_are_the_usual_ones_with_what_is_added_and_dropped() {
    let with = |add: &[&str], drop: &[&str]| {
        let owned = |names: &[&str]| names.iter().map(ToString::to_string).collect();
        let capability =
            Capability { add_capabilities: owned(add), drop_capabilities: owned(drop), ..Default::default() };
        LinuxContainerSecurityContext { capabilities: Some(capability), ..private() }
    };
    let mut pod = pod();
    for (name, security, expected) in [
        ("usual", private(), DEFAULT_CAPABILITIES),
        ("changed", with(&["SYS_TIME"], &["CHOWN"]), (DEFAULT_CAPABILITIES | SYS_TIME) & !CHOWN),
        ("restricted", with(&["NET_BIND_SERVICE"], &["ALL"]), NET_BIND_SERVICE),
        ("none", with(&[], &["ALL"]), 0),
    ] {
        let one = pod.run_container(secured(name, security)).unwrap();
        for process in ["1", "self"] {
            for set in ["CapEff", "CapPrm", "CapBnd"] {
                let has = capabilities(&mut pod, &one, process, set);
                assert_eq!(has, expected, "{name}: {set} of {process} is {has:x}, not {expected:x}");
            }
        }
        let may_chown = pod.exec(&one, "touch /tmp/file; chown 1:1 /tmp/file").unwrap().0 == 0;
        assert_eq!(may_chown, expected & CHOWN != 0, "{name}");
    }
    // A user has what he may get, but has got nothing.
    let somebody = pod.run_container(secured("somebody", user(1000, 1000, &[]))).unwrap();
    assert_eq!(capabilities(&mut pod, &somebody, "1", "CapEff"), 0);
    assert_eq!(capabilities(&mut pod, &somebody, "1", "CapBnd"), DEFAULT_CAPABILITIES);
}

#[test]
fn a_privileged_container_may_do_all_in_the_guest_and_has_nothing_of_the_host() {
    let mut pod = Cri::connect(&[BUSYBOX]).run_pod(for_privileged()).unwrap();
    let one = pod.run_container(secured("one", privileged())).unwrap();

    assert_eq!(capabilities(&mut pod, &one, "1", "CapEff"), ALL_CAPABILITIES);
    script(&mut pod, &one, "mkdir /mnt && mount -t tmpfs none /mnt && echo mounted > /mnt/file");
    script(
        &mut pod,
        &one,
        "cat /proc/sys/vm/overcommit_memory > /tmp/x; cat /tmp/x > /proc/sys/vm/overcommit_memory",
    );

    let devices = script(&mut pod, &one, "ls -l /dev");
    assert!(!devices.lines().any(|line| line.starts_with('b')), "block devices:\n{devices}");
    for device in ["kvm", "mem", "fuse", "loop-control", "vhost-vsock"] {
        assert!(!devices.lines().any(|line| line.ends_with(&format!(" {device}"))), "{device}:\n{devices}");
    }
    // The host's root disk, by its number.
    let root = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let root = root.lines().map(|line| line.split(' ').collect::<Vec<_>>()).find(|fields| fields[4] == "/");
    let number = root.unwrap()[2].replace(':', " ");
    script(&mut pod, &one, &format!("mknod /dev/disk b {number}"));
    let refused = failing(&mut pod, &one, "head -c 512 /dev/disk");
    assert!(refused.contains("Operation not permitted"), "{refused}");

    let processes = script(&mut pod, &one, "ps -o args");
    for name in ["containerd", "mayu-vmm", "e2e"] {
        assert!(!processes.contains(name), "{name} of the host:\n{processes}");
    }
}

#[test]
fn privileges_are_not_gained_and_the_root_is_not_written_to_where_that_is_forbidden() {
    let volume = tempfile::tempdir().unwrap();
    let mut pod = pod();
    let security = LinuxContainerSecurityContext { no_new_privs: true, readonly_rootfs: true, ..private() };
    let config =
        ContainerConfig { mounts: vec![mount(volume.path(), "/volume")], ..secured("strict", security) };
    let strict = pod.run_container(config).unwrap();
    let usual = idle(&mut pod, "usual");

    for (one, expected) in [(&strict, "NoNewPrivs:\t1"), (&usual, "NoNewPrivs:\t0")] {
        for process in ["1", "self"] {
            let is = script(&mut pod, one, &format!("grep NoNewPrivs /proc/{process}/status"));
            assert_eq!(is, expected, "of {process}");
        }
    }
    for path in ["/file", "/tmp/file", "/etc/hosts"] {
        let refused = failing(&mut pod, &strict, &format!("echo x >> {path}"));
        assert!(refused.contains("Read-only file system"), "{path}: {refused}");
    }
    script(&mut pod, &strict, "echo x > /volume/file && echo x > /dev/shm/file");
    script(&mut pod, &usual, "echo x > /file && echo '# x' >> /etc/hosts");
}

#[test]
fn kernel_files_are_masked_and_read_only_as_asked() {
    let strings = |paths: &[&str]| paths.iter().map(ToString::to_string).collect();
    let security = LinuxContainerSecurityContext {
        // A kubelet's, for the usual procMount.
        masked_paths: strings(&[
            "/proc/asound",
            "/proc/acpi",
            "/proc/interrupts",
            "/proc/kcore",
            "/proc/keys",
            "/proc/latency_stats",
            "/proc/timer_list",
            "/proc/timer_stats",
            "/proc/sched_debug",
            "/proc/scsi",
            "/sys/firmware",
            "/sys/devices/virtual/powercap",
        ]),
        readonly_paths: strings(&["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]),
        ..private()
    };
    let mut pod = pod();
    let masked = pod.run_container(secured("masked", security)).unwrap();
    let unmasked = idle(&mut pod, "unmasked");

    let bytes = "for f in kcore keys interrupts timer_list; do head -c 1 /proc/$f 2> /dev/null | wc -c; done";
    assert_eq!(script(&mut pod, &masked, bytes), "0\n0\n0\n0");
    assert_eq!(script(&mut pod, &masked, "[ -d /sys/firmware ] && ls -A /sys/firmware"), "");
    let write = "cat /proc/sys/vm/overcommit_memory > /tmp/x; cat /tmp/x > /proc/sys/vm/overcommit_memory";
    let refused = failing(&mut pod, &masked, write);
    assert!(refused.contains("Read-only file system"), "{refused}");
    let refused = failing(&mut pod, &masked, "echo h > /proc/sysrq-trigger");
    assert!(refused.contains("Read-only file system"), "{refused}");

    assert_eq!(script(&mut pod, &unmasked, "head -c 1 /proc/interrupts | wc -c"), "1");
    script(&mut pod, &unmasked, "head -c 100 /proc/timer_list");
    script(&mut pod, &unmasked, write);
}
