//! From activation to reset, and what lies between.

use std::fs;
use std::path::Path;

use fuse_backend_rs::abi::fuse_abi::{Opcode, ROOT_ID};
use libc::{EBADF, ENFILE, EPROTO, O_RDONLY};

use serde_json::Value;

use super::*;
use crate::error::Error;

impl Client {
    /// What the device says that the driver holds, in number.
    pub(super) fn held(&mut self) -> usize {
        let state = self.state();
        ["inodes", "handles"].iter().map(|held| state[held].as_array().unwrap().len()).sum()
    }

    /// The device's own state.
    pub(super) fn state(&mut self) -> Value {
        self.driver.transport.pause();
        let state = serde_json::to_value(self.driver.transport.save().unwrap()).unwrap();
        self.driver.transport.resume();
        state["device"]["Fs"].clone()
    }
}

#[test]
fn the_configuration_names_the_share() {
    let mut client = Client::started(|share| Fs::new("share", share.path(), &Confinement::none()));

    let mut expected = b"share".to_vec();
    expected.resize(36, 0);
    expected.extend([1, 0, 0, 0, 0, 0, 0, 0]);

    assert_eq!(client.driver.config(0, 44), expected);
    assert_eq!(client.driver.config(36, 4), [1, 0, 0, 0]);
    assert_eq!(client.driver.config(u64::from(u32::MAX), 4), [0; 4]);
}

#[test]
fn a_share_without_a_name_or_a_directory_is_refused() {
    let share = TempDir::new().unwrap();
    let refused = |tag: &str, path: &Path| match Fs::new(tag, path, &Confinement::none()) {
        Err(Error::Device { device: "fs", operation, .. }) => operation,
        _ => panic!("not refused"),
    };

    assert_eq!(refused("", share.path()), "name the share");
    assert_eq!(refused(&"x".repeat(37), share.path()), "name the share");
    assert_eq!(refused("share", &share.path().join("none")), "open the shared directory");
    assert!(Fs::new(&"x".repeat(36), share.path(), &Confinement::none()).is_ok());
}

#[test]
fn both_sides_agree_on_what_fits_a_share_that_others_change() {
    let mut client = Client::started(|share| Fs::new("share", share.path(), &Confinement::none()));

    let agreed = client.init().unwrap();

    let options = FsOptions::from_bits_truncate(u64::from(agreed.flags) | u64::from(agreed.flags2) << 32);
    let wanted = FsOptions::AUTO_INVAL_DATA
        | FsOptions::HANDLE_KILLPRIV_V2
        | FsOptions::POSIX_ACL
        | FsOptions::SUBMOUNTS
        | FsOptions::PARALLEL_DIROPS;
    let unwanted = FsOptions::WRITEBACK_CACHE
        | FsOptions::POSIX_LOCKS
        | FsOptions::FLOCK_LOCKS
        | FsOptions::EXPLICIT_INVAL_DATA
        | FsOptions::ZERO_MESSAGE_OPEN
        | FsOptions::EXPORT_SUPPORT;
    assert!(options.contains(wanted));
    assert!(!options.intersects(unwanted));
    assert_eq!((agreed.major, agreed.max_write, agreed.max_pages), (7, 1 << 20, 256));
}

#[test]
fn a_driver_of_the_wrong_age_is_refused() {
    let mut client = Client::started(|share| Fs::new("share", share.path(), &Confinement::none()));

    let old = InitIn { major: 6, ..Default::default() };
    assert_eq!(client.call(Opcode::Init, 0, &[old.as_slice()]), Err(EPROTO));
    let new = InitIn { major: 8, ..Default::default() };
    let offered = client.call(Opcode::Init, 0, &[new.as_slice()]).unwrap();
    assert_eq!(object::<InitOut>(&offered).major, 7);
    // The reply has grown twice.
    for (minor, length) in [(0, 8), (5, 24), (22, 24), (23, 64), (u32::MAX, 64)] {
        let init = InitIn { major: 7, minor, ..Default::default() };
        assert_eq!(client.call(Opcode::Init, 0, &[init.as_slice()]).unwrap().len(), length, "7.{minor}");
    }
}

#[test]
fn what_is_forgotten_is_closed() {
    let mut client = Client::mounted();
    fs::write(client.path("data"), "").unwrap();
    let node = client.node("data");
    client.node("data");

    client.forget(node, 1);
    assert!(client.getattr(node).is_ok());
    client.forget(node, u64::MAX);
    assert_eq!(client.getattr(node).err(), Some(EBADF));
    client.forget(node, 1);
    client.forget(ROOT_ID, u64::MAX);

    assert_eq!(client.held(), 0);
    client.assert_serving();
    assert_ne!(client.node("data"), node, "a node must not be named anew");
}

#[test]
fn many_are_forgotten_at_once() {
    let mut client = Client::mounted();
    let mut request = 20_u32.to_le_bytes().to_vec();
    request.extend([0; 4]);
    for number in 0..20 {
        let name = format!("file-{number}");
        fs::write(client.path(&name), "").unwrap();
        request.extend(client.node(&name).to_le_bytes());
        request.extend(1_u64.to_le_bytes());
    }
    assert_eq!(client.held(), 20);

    let header = client.header(Opcode::BatchForget as u32, 0, request.len());
    client.send(HIGH_PRIORITY, &[header.as_slice(), &request].concat(), 0);

    assert_eq!(client.held(), 0);
}

#[test]
fn a_driver_that_holds_too_much_is_told_so() {
    // The root, three files, and one to open something with.
    let mut client = Client::mounted_with_budget(5);
    for name in ["a", "b", "c", "d", "e"] {
        fs::write(client.path(name), name).unwrap();
    }
    let a = client.node("a");
    client.node("b");
    client.node("c");
    let handle = client.open(a, O_RDONLY).unwrap().fh;

    assert_eq!(client.lookup(ROOT_ID, "d").err(), Some(ENFILE));
    assert_eq!(client.open(a, O_RDONLY).err(), Some(ENFILE));
    assert_eq!(client.open_directory(ROOT_ID).err(), Some(ENFILE));
    assert_eq!(client.create(ROOT_ID, "new", O_RDONLY, 0o644).err(), Some(ENFILE));
    assert_eq!(client.read(a, handle, 0, 1).unwrap(), b"a");

    client.release(a, handle).unwrap();
    let directory = client.open_directory(ROOT_ID).unwrap();
    let listed = client.read_directory(ROOT_ID, directory, 0, 4096).unwrap();
    let names: Vec<_> = listed.iter().map(|entry| entry.name.as_str()).collect();
    assert!(["a", "b", "c", "d", "e"].iter().all(|name| names.contains(name)), "{names:?}");
}

#[test]
fn a_reset_closes_everything() {
    let mut client = Client::mounted();
    fs::write(client.path("data"), "data").unwrap();
    let node = client.node("data");
    let handle = client.open(node, O_RDONLY).unwrap().fh;

    client.driver.start(0);
    assert_eq!(client.held(), 0);
    client.init().unwrap();

    assert_eq!(client.read(node, handle, 0, 1), Err(EBADF));
    assert_eq!(client.getattr(node).err(), Some(EBADF));
    assert_eq!(client.lookup(ROOT_ID, "data").unwrap().attr.size, 4);
}

#[test]
fn unmounting_closes_everything() {
    let mut client = Client::mounted();
    fs::write(client.path("data"), "data").unwrap();
    let node = client.node("data");
    client.open(node, O_RDONLY).unwrap();

    client.call(Opcode::Destroy, 0, &[]).unwrap();

    assert_eq!((client.held(), client.state()["options"].as_u64()), (0, Some(0)));
}

#[test]
fn a_paused_device_keeps_what_it_has_not_begun() {
    let mut client = Client::mounted();
    client.driver.transport.pause();

    let header = client.header(Opcode::Statfs as u32, ROOT_ID, 0);
    let request = client.driver.alloc_bytes(header.as_slice());
    let chain = [Descriptor::readable(request, 40), Descriptor::writable(client.reply, 1000)];
    client.driver.queues[1].add(&chain);
    client.driver.kick(REQUESTS);
    let state = client.driver.transport.save().unwrap();
    assert_eq!(client.driver.transport.save().unwrap(), state);
    assert_eq!(client.driver.queues[1].pending(), 0);

    client.driver.transport.resume();
    client.driver.run_until(|driver| driver.queues[1].pending() == 1);
    client.driver.queues[1].used();
    client.assert_serving();
}

#[test]
fn many_requests_at_once_are_all_answered() {
    let mut client = Client::mounted();
    let mut heads = Vec::new();
    for _ in 0..200 {
        let header = client.header(Opcode::Statfs as u32, ROOT_ID, 0);
        let request = client.driver.alloc_bytes(header.as_slice());
        let reply = client.driver.alloc(128);
        let chain = [Descriptor::readable(request, 40), Descriptor::writable(reply, 128)];
        heads.push((client.driver.queues[1].add(&chain), reply, client.unique));
    }

    let used = client.driver.exchange(REQUESTS, 200);

    assert_eq!(used.len(), 200);
    for (head, reply, unique) in heads {
        assert!(used.iter().any(|used| used.head == u32::from(head) && used.length == 96));
        let header: OutHeader = object(&client.driver.read(reply, 16));
        assert_eq!((header.unique, header.error), (unique, 0));
    }
}
