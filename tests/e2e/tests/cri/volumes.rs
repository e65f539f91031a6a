//! Files and directories of the host in containers.

use std::fs;
use std::os::unix::fs::symlink;

use k8s_cri::v1::{ContainerConfig, Mount, MountPropagation};
use mayu_e2e::cri::Pod;
use mayu_e2e::mount::HostMount;
use mayu_e2e::shim::eventually;

use super::{exited, failing, idle, mount, pod, running, script, sleeping};

fn with(name: &str, mounts: Vec<Mount>) -> ContainerConfig {
    ContainerConfig { mounts, ..sleeping(name) }
}

#[test]
fn files_and_directories_of_the_host_are_mounted_and_missing_ones_are_made() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, file, missing) =
        (dir.path().join("folder"), dir.path().join("file"), dir.path().join("not/there"));
    fs::create_dir(&folder).unwrap();
    fs::write(&file, "of the host").unwrap();
    symlink(&folder, dir.path().join("link")).unwrap();
    let mut pod = pod();
    let mounts = vec![
        mount(&folder, "/folder"),
        mount(&file, "/etc/deep/er/file"),
        mount(&missing, "/missing"),
        mount(&dir.path().join("link"), "/link"),
    ];
    let one = pod.run_container(with("one", mounts)).unwrap();

    assert_eq!(script(&mut pod, &one, "cat /etc/deep/er/file"), "of the host");
    script(
        &mut pod,
        &one,
        "echo of the guest > /etc/deep/er/file; echo x > /folder/file; echo y > /missing/file",
    );
    assert_eq!(fs::read_to_string(&file).unwrap(), "of the guest\n");
    assert_eq!(fs::read_to_string(folder.join("file")).unwrap(), "x\n");
    assert_eq!(script(&mut pod, &one, "cat /link/file"), "x");
    assert_eq!(fs::read_to_string(missing.join("file")).unwrap(), "y\n", "containerd makes it a directory");
}

#[test]
fn a_part_of_a_volume_is_mounted_and_no_more_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let volume = dir.path().join("volume");
    let subpaths = dir.path().join("volume-subpaths");
    fs::create_dir_all(volume.join("part")).unwrap();
    fs::create_dir(&subpaths).unwrap();
    fs::write(volume.join("config"), "first").unwrap();
    fs::write(volume.join("secret"), "not to be seen").unwrap();
    // As a kubelet mounts a subPath: bound to a place of the pod's, since the volume may change under its feet.
    let (folder, file) = (subpaths.join("0"), subpaths.join("1"));
    fs::create_dir(&folder).unwrap();
    fs::write(&file, "").unwrap();
    let folder = HostMount::bind(&volume.join("part"), &folder);
    let file = HostMount::bind(&volume.join("config"), &file);
    let mut pod = pod();
    let mounts = || vec![mount(folder.path(), "/part"), mount(file.path(), "/etc/config")];
    let one = pod.run_container(with("one", mounts())).unwrap();
    let other = pod.run_container(with("other", mounts())).unwrap();

    script(&mut pod, &one, "echo shared > /part/file; echo second > /etc/config");
    // They come by different mounts, so each may believe for a moment what it has seen before.
    eventually("the other sees it", || {
        script(&mut pod, &other, "cat /part/file /etc/config") == "shared\nsecond"
    });
    assert_eq!(fs::read_to_string(volume.join("part/file")).unwrap(), "shared\n");
    assert_eq!(fs::read_to_string(volume.join("config")).unwrap(), "second\n");
    failing(&mut pod, &other, "cat /part/../secret || cat /part/../volume/secret");
}

#[test]
fn what_the_host_mounts_later_is_seen_only_where_it_is_to_come_in() {
    let volume = tempfile::tempdir().unwrap();
    let late = volume.path().join("late");
    fs::create_dir(&late).unwrap();
    let propagating = |propagation: MountPropagation| {
        vec![Mount { propagation: propagation.into(), ..mount(volume.path(), "/volume") }]
    };
    let mut pod = pod();
    let closed =
        pod.run_container(with("closed", propagating(MountPropagation::PropagationPrivate))).unwrap();
    let open = propagating(MountPropagation::PropagationHostToContainer);
    let open = pod.run_container(with("open", open)).unwrap();
    let list = "ls /volume/late";
    for one in [&closed, &open] {
        assert_eq!(script(&mut pod, one, list), "");
    }

    let mounted = HostMount::tmpfs(&late, "size=1m");
    fs::write(late.join("file"), "x").unwrap();

    eventually("the mount comes in", || script(&mut pod, &open, list) == "file");
    // One that starts now has it in any case. Meanwhile the guest has forgotten what it knew of the others.
    let after = pod.run_container(with("after", propagating(MountPropagation::PropagationPrivate))).unwrap();
    assert_eq!(script(&mut pod, &after, list), "file");
    assert_eq!(script(&mut pod, &closed, list), "", "propagation None");
    drop(mounted);
    eventually("the mount goes away", || script(&mut pod, &open, list).is_empty());
}

#[test]
fn what_a_container_says_as_it_ends_is_read_on_the_host() {
    let dir = tempfile::tempdir().unwrap();
    let message = dir.path().join("termination-log");
    fs::write(&message, "").unwrap();
    let mut pod = pod();
    let config = ContainerConfig {
        mounts: vec![mount(&message, "/dev/termination-log")],
        ..running("one", "echo out of luck > /dev/termination-log; exit 1")
    };
    let one = pod.run_container(config).unwrap();
    assert_eq!(exited(&mut pod, &one).exit_code, 1);
    assert_eq!(fs::read_to_string(&message).unwrap(), "out of luck\n");
}

#[test]
fn a_link_in_a_volume_leads_nowhere_on_the_host() {
    let host = tempfile::tempdir().unwrap();
    let volume = host.path().join("volume");
    fs::create_dir(&volume).unwrap();
    let precious = host.path().join("precious");
    fs::write(&precious, "of the host").unwrap();
    let mut pod = pod();
    let run = |pod: &mut Pod, name| pod.run_container(with(name, vec![mount(&volume, "/volume")])).unwrap();
    let (hostile, innocent) = (run(&mut pod, "hostile"), run(&mut pod, "innocent"));
    let shadow = fs::read_to_string("/etc/shadow").unwrap();
    let links = format!(
        "cd /volume; ln -s {precious} absolute; ln -s ../precious relative; ln -s ../../../../../../../etc/shadow up; \
         ln -s {parent} folder; ln -s /etc/shadow shadow; ln -s ../new new",
        precious = precious.display(),
        parent = host.path().display(),
    );
    script(&mut pod, &hostile, &links);

    for name in ["absolute", "relative", "folder/precious"] {
        let read = pod.exec(&innocent, &format!("cat /volume/{name}")).unwrap().1;
        assert!(!read.contains("of the host"), "{name}: {read}");
    }
    for name in ["up", "shadow"] {
        let read = pod.exec(&innocent, &format!("cat /volume/{name}")).unwrap().1;
        assert_ne!(read, shadow.trim_end(), "{name}");
    }
    for name in ["absolute", "relative", "folder/precious", "folder/new", "up", "shadow", "new"] {
        // Some are made in the container itself, which is where its links lead.
        drop(pod.exec(&innocent, &format!("echo overwritten > /volume/{name}")).unwrap());
    }
    // A directory that becomes a link while another container writes below it.
    script(
        &mut pod,
        &hostile,
        "mkdir /volume/turncoat && rmdir /volume/turncoat && ln -s .. /volume/turncoat",
    );
    drop(pod.exec(&innocent, "echo overwritten > /volume/turncoat/precious").unwrap());

    assert_eq!(fs::read_to_string(&precious).unwrap(), "of the host");
    assert_eq!(fs::read_to_string("/etc/shadow").unwrap(), shadow);
    let mut names: Vec<_> =
        fs::read_dir(host.path()).unwrap().flatten().map(|entry| entry.file_name()).collect();
    names.sort();
    assert_eq!(names, ["precious", "volume"], "nothing new beside the volume");
}

#[test]
fn a_file_system_of_its_own_is_a_volume_like_any_other() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let point = dir.path().join("mounted");
    fs::create_dir(&point).unwrap();
    let disk = HostMount::ext4(&dir.path().join("disk.img"), 32 << 20, &point);
    fs::write(disk.path().join("file"), "of the host").unwrap();
    let mut pod = pod();
    let one = pod.run_container(with("one", vec![mount(disk.path(), "/volume")])).unwrap();

    assert_eq!(script(&mut pod, &one, "cat /volume/file"), "of the host");
    script(&mut pod, &one, "mkdir /volume/dir && echo of the guest > /volume/dir/file && sync");
    assert_eq!(fs::read_to_string(point.join("dir/file")).unwrap(), "of the guest\n");
    let size = script(&mut pod, &one, "df -k /volume | tail -n 1 | awk '{ print $2 }'");
    let size: u64 = size.parse().unwrap();
    assert!((20_000..33_000).contains(&size), "{size} KiB of a disk of 32 MiB");
    let refused = failing(&mut pod, &one, "dd if=/dev/zero of=/volume/large bs=1M count=40");
    assert!(refused.contains("No space left on device"), "{refused}");
}

#[test]
fn a_volume_that_is_read_only_for_one_is_written_by_another() {
    let volume = tempfile::tempdir().unwrap();
    let mut pod = pod();
    let read_only = Mount { readonly: true, ..mount(volume.path(), "/volume") };
    let reader = pod.run_container(with("reader", vec![read_only])).unwrap();
    let writer = pod.run_container(with("writer", vec![mount(volume.path(), "/volume")])).unwrap();
    let steady = idle(&mut pod, "steady");

    script(&mut pod, &writer, "mkdir /volume/dir && echo x > /volume/dir/file");
    assert_eq!(script(&mut pod, &reader, "cat /volume/dir/file"), "x");
    for attempt in
        ["echo y > /volume/dir/file", "rm /volume/dir/file", "mkdir /volume/new", "chmod 777 /volume"]
    {
        let refused = failing(&mut pod, &reader, attempt);
        assert!(refused.contains("Read-only file system"), "{attempt}: {refused}");
    }
    failing(&mut pod, &steady, "ls /volume");
}
