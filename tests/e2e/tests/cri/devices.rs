//! Devices that a container asks for: raw block volumes, and what there is none of.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use k8s_cri::v1::{ContainerConfig, Device};
use mayu_e2e::cri::container;
use mayu_e2e::mount::{HostMount, LoopDevice};
use mayu_e2e::{BUSYBOX, Outcome, run};

use super::{idle, mount, pod, script, sleeping};

/// A volume group of one disk, until the end of the test.
struct VolumeGroup {
    name: String,
    disk: LoopDevice,
}

impl VolumeGroup {
    fn new() -> Self {
        let group = Self { name: format!("mayu-{}", std::process::id()), disk: LoopDevice::new(64 << 20) };
        lvm(&["vgcreate", &group.name, group.disk.path().to_str().unwrap()]).success();
        group
    }

    /// A logical volume of it.
    fn volume(&self, name: &str, size: &str) -> PathBuf {
        lvm(&["lvcreate", "--name", name, "--size", size, "--wipesignatures", "n", &self.name]).success();
        Path::new("/dev").join(&self.name).join(name)
    }
}

impl Drop for VolumeGroup {
    fn drop(&mut self) {
        // What fails here, fails the next test that looks for what is left.
        lvm(&["vgremove", "--force", &self.name]);
    }
}

/// LVM on a machine without udev, where it makes the nodes of its devices by itself.
fn lvm(arguments: &[&str]) -> Outcome {
    let config = "activation { udev_sync = 0 udev_rules = 0 } devices { use_devicesfile = 0 }";
    run(Command::new("lvm").args(arguments).args(["--yes", "--config", config]))
}

fn with_disk(name: &str, disk: &Path, permissions: &str) -> ContainerConfig {
    let device = Device {
        container_path: "/dev/xvda".into(),
        host_path: disk.display().to_string(),
        permissions: permissions.into(),
    };
    ContainerConfig { devices: vec![device], ..container(name, BUSYBOX, &["sleep", "infinity"]) }
}

#[test]
fn a_raw_block_volume_is_a_disk_of_the_guest() {
    let disk = LoopDevice::new(4 << 20);
    disk.backing().write_all_at(b"from the host", 0).unwrap();
    let mut pod = pod();
    // While the pod runs already, as with any container but the first.
    let other = idle(&mut pod, "other");
    let writer = pod.run_container(with_disk("writer", disk.path(), "rwm")).unwrap();
    let size = script(&mut pod, &writer, "blockdev --getsize64 /dev/xvda");
    assert_eq!(size, (4 << 20).to_string());
    assert_eq!(script(&mut pod, &writer, "head -c 13 /dev/xvda"), "from the host");
    script(&mut pod, &writer, "printf 'from the guest' | dd of=/dev/xvda bs=512 seek=8 conv=notrunc,fsync");
    let mut bytes = [0; 14];
    disk.backing().read_exact_at(&mut bytes, 4096).unwrap();
    assert_eq!(&bytes, b"from the guest");

    let reader = pod.run_container(with_disk("reader", disk.path(), "r")).unwrap();
    assert_eq!(
        script(&mut pod, &reader, "dd if=/dev/xvda bs=512 skip=8 count=1 2> /dev/null | head -c 14"),
        "from the guest"
    );
    assert_ne!(pod.exec(&reader, "echo no > /dev/xvda").unwrap().0, 0);
    assert_ne!(pod.exec(&other, "test -b /dev/xvda").unwrap().0, 0, "only who asks for it has it");
    assert_ne!(pod.exec(&other, "mknod /tmp/disk b 254 16 && head -c 1 /tmp/disk").unwrap().0, 0);

    for container in [&reader, &writer] {
        pod.remove_container(container, 0).unwrap();
    }
    // The slot is free again, and another disk has its place.
    let next = LoopDevice::new(1 << 20);
    let writer = pod.run_container(with_disk("next", next.path(), "rwm")).unwrap();
    assert_eq!(script(&mut pod, &writer, "blockdev --getsize64 /dev/xvda"), (1 << 20).to_string());
}

#[test]
fn a_logical_volume_is_a_disk_of_the_guest_or_a_file_system_like_any_other() {
    let group = VolumeGroup::new();
    let (raw, formatted) = (group.volume("raw", "8M"), group.volume("formatted", "24M"));
    let point = tempfile::tempdir_in("/var/tmp").unwrap();
    let files = HostMount::ext4_on(&formatted, point.path());
    fs::write(files.path().join("file"), "of the host").unwrap();
    let mut pod = pod();

    let database = pod.run_container(with_disk("database", &raw, "rwm")).unwrap();
    let config = ContainerConfig { mounts: vec![mount(files.path(), "/volume")], ..sleeping("reader") };
    let reader = pod.run_container(config).unwrap();

    assert_eq!(script(&mut pod, &database, "blockdev --getsize64 /dev/xvda"), (8 << 20).to_string());
    script(&mut pod, &database, "printf 'of the guest' | dd of=/dev/xvda bs=512 seek=3 conv=notrunc,fsync");
    let mut bytes = [0; 12];
    File::open(&raw).unwrap().read_exact_at(&mut bytes, 3 * 512).unwrap();
    assert_eq!(&bytes, b"of the guest");
    assert_eq!(script(&mut pod, &reader, "cat /volume/file"), "of the host");
    script(&mut pod, &reader, "echo of the guest > /volume/new && sync");
    assert_eq!(fs::read_to_string(files.path().join("new")).unwrap(), "of the guest\n");
    pod.remove().unwrap();
}

#[test]
fn more_disks_than_there_are_slots_are_refused_and_named() {
    let disks: Vec<_> = (0..5).map(|_| LoopDevice::new(1 << 20)).collect();
    let mut config = container("many", BUSYBOX, &["sleep", "infinity"]);
    config.devices = (0..)
        .zip(&disks)
        .map(|(number, disk)| Device {
            container_path: format!("/dev/disk{number}"),
            host_path: disk.path().display().to_string(),
            permissions: "rw".into(),
        })
        .collect();
    let mut pod = pod();
    let error = pod.run_container(config).unwrap_err().to_string();
    assert!(error.contains("/dev/disk4") && error.contains("no more than 4"), "{error}");
    let one = idle(&mut pod, "one");
    assert_eq!(script(&mut pod, &one, "echo well"), "well");
}

#[test]
fn a_character_device_of_the_host_is_refused_and_named() {
    let mut pod = pod();
    let device =
        Device { container_path: "/dev/kvm".into(), host_path: "/dev/kvm".into(), permissions: "rw".into() };
    let config =
        ContainerConfig { devices: vec![device], ..container("one", BUSYBOX, &["sleep", "infinity"]) };
    assert!(fs::exists("/dev/kvm").unwrap());
    let error = pod.run_container(config).unwrap_err().to_string();
    assert!(error.contains("/dev/kvm") && error.contains("character device"), "{error}");
}
