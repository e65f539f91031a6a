//! Volumes in memory: those of the pod are the guest's memory, those that the host writes to are the host's.

use std::fs;
use std::path::{Path, PathBuf};

use k8s_cri::v1::{ContainerConfig, HugepageLimit, LinuxContainerConfig, LinuxContainerResources, Mount};
use mayu_e2e::cri::private;
use mayu_e2e::mount::HostMount;
use mayu_e2e::shim::eventually;

use super::{failing, idle, mount, pod, script, sleeping};

/// A directory where a kubelet would have a volume of a kind, such as `empty-dir`.
fn volume_dir(pod_dir: &Path, kind: &str, name: &str) -> PathBuf {
    let path = pod_dir.join("volumes").join(format!("kubernetes.io~{kind}")).join(name);
    fs::create_dir_all(&path).unwrap();
    path
}

/// The type of the file system that is mounted on a path.
const TYPE: &str = "awk '$2 == \"/volume\" { print $3 }' /proc/mounts";

#[test]
fn an_empty_dir_in_memory_is_the_guest_s_memory() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let volume = HostMount::tmpfs(&volume_dir(dir.path(), "empty-dir", "cache"), "size=8m,mode=2777");
    let mut pod = pod();
    let with = |name, mounts| ContainerConfig { mounts, ..sleeping(name) };
    let one = pod.run_container(with("one", vec![mount(volume.path(), "/volume")])).unwrap();
    let read_only = Mount { readonly: true, ..mount(volume.path(), "/volume") };
    let other = pod.run_container(with("other", vec![read_only])).unwrap();

    assert_eq!(script(&mut pod, &one, TYPE), "tmpfs");
    let size = "df -k /volume | tail -n 1 | awk '{ print $2 }'";
    assert_eq!(script(&mut pod, &one, size), "8192");
    assert_eq!(script(&mut pod, &one, "stat -c %a:%u:%g /volume"), "2777:0:0");
    script(&mut pod, &one, "echo shared > /volume/file");
    assert_eq!(script(&mut pod, &other, "cat /volume/file"), "shared");
    let refused = failing(&mut pod, &other, "echo no > /volume/file");
    assert!(refused.contains("Read-only file system"), "{refused}");
    let refused = failing(&mut pod, &one, "dd if=/dev/zero of=/volume/large bs=1M count=9");
    assert!(refused.contains("No space left on device"), "{refused}");
    let on_the_host: Vec<_> = fs::read_dir(volume.path()).unwrap().flatten().collect();
    assert!(on_the_host.is_empty(), "on the host: {on_the_host:?}");

    // It outlives the containers that use it.
    pod.remove_container(&one, 0).unwrap();
    let again = pod.run_container(with("again", vec![mount(volume.path(), "/volume")])).unwrap();
    assert_eq!(script(&mut pod, &again, "cat /volume/file"), "shared");
}

#[test]
fn a_part_of_an_empty_dir_in_memory_is_that_of_the_whole() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let volume = HostMount::tmpfs(&volume_dir(dir.path(), "empty-dir", "cache"), "size=8m,mode=777");
    // What a kubelet does for `subPath: logs/web`.
    fs::create_dir_all(volume.path().join("logs/web")).unwrap();
    let place = dir.path().join("volume-subpaths/cache/writer/0");
    fs::create_dir_all(&place).unwrap();
    let part = HostMount::bind(&volume.path().join("logs/web"), &place);
    let mut pod = pod();
    let with = |name, path| ContainerConfig { mounts: vec![mount(path, "/volume")], ..sleeping(name) };
    let writer = pod.run_container(with("writer", part.path())).unwrap();
    let reader = pod.run_container(with("reader", volume.path())).unwrap();

    assert_eq!(script(&mut pod, &writer, TYPE), "tmpfs");
    script(&mut pod, &writer, "echo line > /volume/log");
    assert_eq!(script(&mut pod, &reader, "cat /volume/logs/web/log"), "line");
    assert!(!volume.path().join("logs/web/log").exists(), "on the host");
    // Somebody who writes to the whole cannot lead a part elsewhere.
    script(&mut pod, &reader, "mv /volume/logs /volume/away && ln -s / /volume/logs");
    let again = place.with_file_name("1");
    fs::create_dir(&again).unwrap();
    let again = HostMount::bind(&volume.path().join("logs/web"), &again);
    let refusal = pod.run_container(with("misled", again.path())).expect_err("a link is in the way");
    assert!(refusal.message().contains("part of a volume"), "{refusal}");
}

#[test]
fn an_empty_dir_on_disk_is_a_directory_of_the_host() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let volume = volume_dir(dir.path(), "empty-dir", "data");
    let mut pod = pod();
    let config = ContainerConfig { mounts: vec![mount(&volume, "/volume")], ..sleeping("one") };
    let one = pod.run_container(config).unwrap();
    assert_ne!(script(&mut pod, &one, TYPE), "tmpfs");
    script(&mut pod, &one, "echo kept > /volume/file");
    assert_eq!(fs::read_to_string(volume.join("file")).unwrap(), "kept\n");
}

#[test]
fn a_secret_is_read_from_the_host_s_memory_and_follows_it() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let volume = HostMount::tmpfs(&volume_dir(dir.path(), "secret", "token"), "size=1m");
    fs::write(volume.path().join("token"), "first").unwrap();
    let mut pod = pod();
    let secret = Mount { readonly: true, ..mount(volume.path(), "/volume") };
    let config = ContainerConfig { mounts: vec![secret], ..sleeping("one") };
    let one = pod.run_container(config).unwrap();

    assert_eq!(script(&mut pod, &one, "cat /volume/token"), "first");
    fs::write(volume.path().join("next"), "second").unwrap();
    fs::rename(volume.path().join("next"), volume.path().join("token")).unwrap();
    eventually("the new token is seen", || script(&mut pod, &one, "cat /volume/token") == "second");
}

#[test]
fn shared_memory_is_one_of_64_mib_for_the_pod() {
    let mut pod = pod();
    let (one, other) = (idle(&mut pod, "one"), idle(&mut pod, "other"));
    for one in [&one, &other] {
        let kind = script(&mut pod, one, "awk '$2 == \"/dev/shm\" { print $3 }' /proc/mounts");
        assert_eq!(kind, "tmpfs");
        let size = script(&mut pod, one, "df -k /dev/shm | tail -n 1 | awk '{ print $2 }'");
        assert_eq!(size, "65536");
        assert_eq!(script(&mut pod, one, "stat -c %a /dev/shm"), "1777");
    }
    script(&mut pod, &one, "dd if=/dev/zero of=/dev/shm/file bs=1M count=60");
    let refused = failing(&mut pod, &other, "dd if=/dev/zero of=/dev/shm/more bs=1M count=10");
    assert!(refused.contains("No space left on device"), "{refused}");
}

/// A limit for each size of huge pages that the host knows, which is what a kubelet sends for every container.
fn huge_page_limits(limit: u64) -> ContainerConfig {
    let sizes = fs::read_dir("/sys/kernel/mm/hugepages").into_iter().flatten().flatten();
    let sizes = sizes.map(|entry| {
        let name = entry.file_name().into_string().unwrap();
        // hugepages-2048kB is 2MB to CRI.
        let kilobytes: u64 = name.trim_start_matches("hugepages-").trim_end_matches("kB").parse().unwrap();
        let page_size = match kilobytes >> 10 {
            mib if mib >= 1024 => format!("{}GB", mib >> 10),
            mib => format!("{mib}MB"),
        };
        HugepageLimit { page_size, limit }
    });
    let resources =
        LinuxContainerResources { hugepage_limits: sizes.collect(), ..LinuxContainerResources::default() };
    let linux = LinuxContainerConfig { resources: Some(resources), security_context: Some(private()) };
    ContainerConfig { linux: Some(linux), ..sleeping(&format!("limit-{limit}")) }
}

#[test]
fn huge_pages_that_nobody_asks_for_are_no_matter_and_others_are_refused() {
    let mut pod = pod();
    let none = pod.run_container(huge_page_limits(0)).unwrap();
    assert_eq!(script(&mut pod, &none, "echo runs"), "runs");

    let refusal = pod.run_container(huge_page_limits(4 << 20)).unwrap_err();
    assert!(refusal.message().contains("huge pages of"), "{refusal}");
    assert!(pod.runs(&none), "the pod goes on");
}
