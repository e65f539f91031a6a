//! A share that spans mounts which come and go, as those of containers do.

use std::fs;
use std::path::Path;

use fuse_backend_rs::abi::fuse_abi::{ROOT_ID, ReleaseIn};
use libc::{ENOENT, EROFS, O_RDONLY, O_RDWR};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

use super::*;

/// The directory is the root of another mount.
const SUBMOUNT: u32 = 1;

/// Runs a test in a thread with a mount namespace of its own, which the device's workers inherit. Needs root.
fn with_mounts(name: &str, test: impl FnOnce() + Send) {
    if !is_root(name) {
        return;
    }
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNS).unwrap();
            let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
            mount(None::<&Path>, "/", None::<&Path>, private, None::<&Path>).unwrap();
            test();
        });
        thread.join().unwrap();
    });
}

fn mount_tmpfs(target: &Path) {
    fs::create_dir_all(target).unwrap();
    mount(Some("tmpfs"), target, Some("tmpfs"), MsFlags::empty(), None::<&Path>).unwrap();
}

fn bind(source: &Path, target: &Path) {
    fs::create_dir_all(target).unwrap();
    mount(Some(source), target, None::<&Path>, MsFlags::MS_BIND, None::<&Path>).unwrap();
}

#[test]
fn files_of_different_mounts_are_never_confused() {
    with_mounts("files_of_different_mounts_are_never_confused", || {
        let mut client = Client::mounted();
        for name in ["one", "two"] {
            // After the guest has mounted the share. A fresh tmpfs numbers its inodes like any other.
            mount_tmpfs(&client.path(name));
            fs::write(client.path(&format!("{name}/data")), name).unwrap();
        }

        let (one, two) = (client.lookup(ROOT_ID, "one").unwrap(), client.lookup(ROOT_ID, "two").unwrap());
        let (a, b) = (client.lookup(one.nodeid, "data").unwrap(), client.lookup(two.nodeid, "data").unwrap());

        assert_eq!(a.attr.ino, b.attr.ino, "this test needs equal inode numbers");
        assert_ne!((one.nodeid, a.nodeid), (two.nodeid, b.nodeid));
        for (entry, content) in [(a, "one"), (b, "two")] {
            let handle = client.open(entry.nodeid, O_RDONLY).unwrap().fh;
            assert_eq!(client.read(entry.nodeid, handle, 0, 9).unwrap(), content.as_bytes());
        }
        assert_eq!((one.attr.flags, a.attr.flags), (SUBMOUNT, 0));
    });
}

#[test]
fn one_file_in_two_mounts_has_the_rights_of_each() {
    with_mounts("one_file_in_two_mounts_has_the_rights_of_each", || {
        let mut client = Client::mounted();
        fs::create_dir(client.path("volume")).unwrap();
        fs::write(client.path("volume/data"), "data").unwrap();
        bind(&client.path("volume"), &client.path("constant"));
        let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount(None::<&Path>, &client.path("constant"), None::<&Path>, flags, None::<&Path>).unwrap();

        let constant = client.node("constant");
        let constant = client.lookup(constant, "data").unwrap().nodeid;
        let volume = client.node("volume");
        let volume = client.lookup(volume, "data").unwrap().nodeid;

        assert_eq!(client.open(constant, O_RDWR).err(), Some(EROFS));
        assert!(client.open(constant, O_RDONLY).is_ok());
        assert!(client.open(volume, O_RDWR).is_ok());
    });
}

#[test]
fn an_unmounted_file_stays_until_it_is_let_go() {
    with_mounts("an_unmounted_file_stays_until_it_is_let_go", || {
        let mut client = Client::mounted();
        mount_tmpfs(&client.path("rootfs"));
        fs::write(client.path("rootfs/data"), "data").unwrap();
        let rootfs = client.node("rootfs");
        let data = client.lookup(rootfs, "data").unwrap().nodeid;
        let handle = client.open(data, O_RDONLY).unwrap().fh;

        umount2(&client.path("rootfs"), MntFlags::MNT_DETACH).unwrap();
        let beneath = client.node("rootfs");

        assert_eq!(client.read(data, handle, 0, 9).unwrap(), b"data");
        assert_ne!(beneath, rootfs);
        assert_eq!(client.lookup(beneath, "data").err(), Some(ENOENT));
        client
            .call(Opcode::Release, data, &[ReleaseIn { fh: handle, ..Default::default() }.as_slice()])
            .unwrap();
        for node in [data, rootfs, beneath] {
            client.forget(node, 1);
        }
        assert_eq!(client.held(), 0);
    });
}
