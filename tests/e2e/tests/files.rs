//! Root filesystem and mounts.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use mayu_e2e::mount::HostMount;
use mayu_e2e::spec::Bundle;
use mayu_e2e::{BUSYBOX, Container};
use serde_json::json;

#[test]
fn a_read_only_root_refuses_writes() {
    let outcome = Container::sh(&["--read-only"], "touch /file");
    assert_ne!(outcome.code, 0);
    assert!(outcome.stderr.contains("Read-only file system"), "{}", outcome.stderr);
}

#[test]
fn masked_paths_are_empty_and_read_only_paths_refuse_writes() {
    let mut bundle =
        Bundle::sh("cat /proc/version | wc -c; ls /sys/kernel | wc -l; echo 1 > /proc/sys/vm/drop_caches");
    bundle.spec["linux"]["maskedPaths"] = json!(["/proc/version", "/sys/kernel"]);
    bundle.spec["linux"]["readonlyPaths"] = json!(["/proc/sys"]);
    let outcome = bundle.run();
    assert_eq!(outcome.text(), "0\n0");
    assert_ne!(outcome.code, 0);
    assert!(outcome.stderr.contains("Read-only file system"), "{}", outcome.stderr);
}

#[test]
fn bind_mounts_of_directories_are_shared_with_the_host_both_ways() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("from-host"), "from the host").unwrap();
    let mount = format!("type=bind,src={},dst=/data,options=rbind:rw", dir.path().display());

    let text =
        Container::sh(&["--mount", &mount], "cat /data/from-host; echo from the guest > /data/from-guest")
            .success()
            .text();

    assert_eq!(text, "from the host");
    assert_eq!(fs::read_to_string(dir.path().join("from-guest")).unwrap(), "from the guest\n");
}

#[test]
fn a_directory_of_many_files_is_read_whole() {
    // More than the files that a process may have open, unless somebody raises that limit.
    const FILES: usize = 4500;
    let dir = tempfile::tempdir().unwrap();
    for number in 0..FILES {
        fs::write(dir.path().join(number.to_string()), "").unwrap();
    }
    let mount = format!("type=bind,src={},dst=/data,options=rbind:ro", dir.path().display());
    let text = Container::sh(&["--mount", &mount], "ls -l /data | grep -c root").success().text();
    assert_eq!(text, FILES.to_string());
}

#[test]
fn read_only_bind_mounts_refuse_writes() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "kept").unwrap();
    let mount = format!("type=bind,src={},dst=/data,options=rbind:ro", dir.path().display());
    let outcome = Container::sh(&["--mount", &mount], "cat /data/file; echo no > /data/file");
    assert_ne!(outcome.code, 0);
    assert_eq!(outcome.text(), "kept");
    assert!(outcome.stderr.contains("Read-only file system"), "{}", outcome.stderr);
    assert_eq!(fs::read_to_string(dir.path().join("file")).unwrap(), "kept");
}

/// Not by CRI: containerd 2.1 offers such mounts for runc alone, whatever a shim tells of itself, and a kubelet asks for nothing
/// that is not offered.
#[test]
fn a_recursively_read_only_mount_has_nothing_writable_below_it() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("below")).unwrap();
    let below = HostMount::tmpfs(&dir.path().join("below"), "size=1m");
    fs::write(below.path().join("file"), "kept").unwrap();
    let mount = format!("type=bind,src={},dst=/data,options=rbind:rro", dir.path().display());

    let outcome = Container::sh(
        &["--mount", &mount],
        "cat /data/below/file; for f in /data/file /data/below/file; do (echo no > $f) 2>&1; done; true",
    );

    let text = outcome.success().text();
    assert_eq!(text.matches("Read-only file system").count(), 2, "{text}");
    assert_eq!(fs::read_to_string(below.path().join("file")).unwrap(), "kept");
}

#[test]
fn bind_mounts_of_files() {
    let dir = tempfile::tempdir().unwrap();
    let (read_only, writable) = (dir.path().join("ro"), dir.path().join("rw"));
    fs::write(&read_only, "one").unwrap();
    fs::write(&writable, "two").unwrap();
    let mounts = [
        format!("type=bind,src={},dst=/etc/ro,options=bind:ro", read_only.display()),
        format!("type=bind,src={},dst=/etc/rw,options=bind:rw", writable.display()),
    ];
    let flags = ["--mount", &mounts[0], "--mount", &mounts[1]];

    let outcome = Container::sh(&flags, "cat /etc/ro /etc/rw; echo three > /etc/rw; echo four > /etc/ro");

    assert_ne!(outcome.code, 0);
    assert_eq!(outcome.text(), "onetwo");
    assert_eq!(fs::read_to_string(&writable).unwrap(), "three\n");
    assert_eq!(fs::read_to_string(&read_only).unwrap(), "one");
}

#[test]
fn a_change_on_the_host_is_seen_inside() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config"), "before").unwrap();
    let mount = format!("type=bind,src={},dst=/data,options=rbind:ro", dir.path().display());
    let container = Container::idle(&["--mount", &mount]);
    assert_eq!(container.script("cat /data/config"), "before");

    fs::write(dir.path().join("next"), "after, and longer").unwrap();
    fs::rename(dir.path().join("next"), dir.path().join("config")).unwrap();

    mayu_e2e::shim::eventually("the new content is there", || {
        container.script("cat /data/config") == "after, and longer"
    });
}

#[test]
fn tmpfs_mounts_have_their_size_and_mode() {
    let mut bundle = Bundle::sh(
        "df -k /scratch | tail -n 1 | awk '{print $2}'; stat -c %a /scratch; touch /scratch/file && echo written",
    );
    let mount = json!({ "destination": "/scratch", "type": "tmpfs", "source": "tmpfs",
                        "options": ["nosuid", "size=8192k", "mode=1750"] });
    bundle.mount(mount);
    assert_eq!(bundle.run().success().text(), "8192\n1750\nwritten");
}

#[test]
fn the_kernel_s_own_filesystems_are_mounted() {
    let text = Container::sh(&[], "awk '{print $2, $3}' /proc/mounts").success().text();
    for mount in
        ["/proc proc", "/dev tmpfs", "/dev/pts devpts", "/dev/shm tmpfs", "/dev/mqueue mqueue", "/sys sysfs"]
    {
        assert!(text.lines().any(|line| line == mount), "no {mount} among:\n{text}");
    }
}

#[test]
fn a_cgroup_mount_is_cgroup_v2() {
    let mut bundle = Bundle::sh("cat /proc/self/cgroup; cat /sys/fs/cgroup/cgroup.controllers");
    bundle.mount_cgroup();
    let text = bundle.run().success().text();
    let mut lines = text.lines();
    assert_eq!(lines.next(), Some("0::/"), "the container sees its own cgroup as the root");
    let controllers = lines.next().unwrap_or_default();
    for controller in ["cpu", "memory", "pids"] {
        assert!(controllers.split(' ').any(|name| name == controller), "{controllers}");
    }
}

#[test]
fn sysctls_are_set_in_the_container_s_namespaces() {
    let mut bundle = Bundle::sh("cat /proc/sys/kernel/shm_rmid_forced /proc/sys/kernel/msgmax");
    bundle.spec["linux"]["sysctl"] = json!({ "kernel.shm_rmid_forced": "1", "kernel.msgmax": "16384" });
    assert_eq!(bundle.run().success().text(), "1\n16384");
}

#[test]
fn file_operations_that_programs_rely_on() {
    let script = "set -e; cd /tmp
        echo a > one; ln one two; ln -s one three; [ $(stat -c %h one) = 2 ]; [ \"$(readlink three)\" = one ]
        mv two four; chmod 4755 four; [ $(stat -c %a four) = 4755 ]; chown 12:34 four; [ $(stat -c %u:%g four) = 12:34 ]
        mkdir dir; ! rmdir /tmp 2>/dev/null; touch -d '2001-02-03 04:05:06' dir; [ \"$(stat -c %Y dir)\" = 981173106 ]
        mkfifo fifo; [ -p fifo ]; exec 3>gone; rm gone; echo still >&3; truncate -s 1M one; [ $(stat -c %s one) = 1048576 ]
        for i in $(seq 500); do echo $i > dir/$i; done; [ $(ls dir | wc -l) = 500 ]; rm -r dir; echo all well";
    assert_eq!(Container::sh(&[], script).success().text(), "all well");
}

#[test]
fn an_executable_without_permission_is_refused() {
    let bundle = Bundle::sh("");
    fs::write(bundle.rootfs().join("bin/plain"), "#!/bin/sh\n").unwrap();
    fs::set_permissions(bundle.rootfs().join("bin/plain"), fs::Permissions::from_mode(0o644)).unwrap();
    let mut bundle = bundle;
    bundle.spec["process"]["args"] = json!(["/bin/plain"]);
    assert!(bundle.run().failure().to_lowercase().contains("permission denied"));
}

#[test]
fn the_root_filesystem_of_a_container_is_its_own() {
    let (one, two) = (Container::idle(&[]), Container::idle(&[]));
    one.script("echo mine > /tmp/file");
    assert_ne!(two.exec(&["cat", "/tmp/file"]).code, 0);
    assert_eq!(one.script("cat /tmp/file"), "mine");
    assert_eq!(Container::run(BUSYBOX, &[], &["ls", "/tmp"]).success().text(), "");
}
