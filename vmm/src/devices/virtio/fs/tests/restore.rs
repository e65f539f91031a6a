//! The driver goes on with another device, whose share has files like those of the first.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use fuse_backend_rs::abi::fuse_abi::{Opcode, ROOT_ID};
use libc::{EBADF, O_RDONLY, O_RDWR, O_WRONLY};
use serde_json::{Value, json};

use super::*;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::fs::FsHandle;
use crate::error::Error;

/// What both shares hold: a file in a directory and one beside it, a link, and more of each.
fn populate(share: &Path) {
    fs::create_dir_all(share.join("lib/python")).unwrap();
    fs::write(share.join("lib/python/module.py"), "import this").unwrap();
    fs::write(share.join("lib-python"), "beside").unwrap();
    symlink("lib/python", share.join("python")).unwrap();
    fs::write(share.join("data"), "data").unwrap();
}

fn populated() -> Client {
    let client = Client::mounted();
    populate(client.share.path());
    client
}

/// What the driver of these tests holds.
struct Held {
    directory: u64,
    module: u64,
    link: u64,
    handle: u64,
    listing: u64,
}

impl Held {
    fn by(client: &mut Client) -> Self {
        let lib = client.node("lib");
        let directory = client.lookup(lib, "python").unwrap().nodeid;
        let module = client.lookup(directory, "module.py").unwrap().nodeid;
        client.lookup(directory, "module.py").unwrap();
        // Numbers that were given and taken back are not given again.
        let beside = client.node("lib-python");
        client.forget(beside, 1);
        let closed = client.open(module, O_RDONLY).unwrap().fh;
        let handle = client.open(module, O_RDONLY).unwrap().fh;
        client.release(module, closed).unwrap();
        let listing = client.open_directory(directory).unwrap();
        Self { directory, module, link: client.node("python"), handle, listing }
    }
}

/// The state of the device, and whatever refuses it.
fn saved(client: &mut Client) -> Result<Value> {
    client.driver.transport.pause();
    let state = client.driver.transport.save().map(|state| serde_json::to_value(state).unwrap());
    client.driver.transport.resume();
    state
}

/// The driver with another device, which is paused and has found nothing again yet.
fn moved(mut client: Client, share: TempDir, budget: usize) -> (Client, FsHandle) {
    client.driver.transport.pause();
    let state = serde_json::to_string(&client.driver.transport.save().unwrap()).unwrap();
    let device = Fs::with_budget("share", share.path(), &Confinement::none(), Budget::new(budget)).unwrap();
    let handle = device.handle();
    client.driver = client.driver.move_to(Box::new(device));
    client.driver.transport.restore(&serde_json::from_str(&state).unwrap()).unwrap();
    (Client { share, ..client }, handle)
}

/// The driver with another device, whose share is full before it looks.
fn goes_on(client: Client, share: TempDir) -> Client {
    let (mut client, handle) = moved(client, share, 1000);
    handle.recover().unwrap();
    handle.recover().unwrap();
    client.driver.transport.resume();
    client
}

fn another_share() -> TempDir {
    let share = TempDir::new().unwrap();
    populate(share.path());
    share
}

#[test]
fn a_guest_that_held_nothing_goes_on_with_another_device() {
    let mut client = Client::mounted();
    let before = client.state();

    let (mut client, _) = moved(client, TempDir::new().unwrap(), 100);
    client.driver.transport.resume();

    assert_eq!(client.state(), before);
    client.assert_serving();
    let (entry, open) = client.create(ROOT_ID, "after", O_RDWR, 0o644).unwrap();
    assert_eq!(client.write(entry.nodeid, open.fh, 0, b"restored"), Ok(8));
}

#[test]
fn what_the_guest_held_goes_on_in_another_share() {
    let mut client = populated();
    let held = Held::by(&mut client);
    let before = client.state();
    let share = another_share();
    fs::write(share.path().join("lib/python/module.py"), "import that").unwrap();

    let mut client = goes_on(client, share);

    assert_eq!(client.state(), before);
    assert_eq!(client.read(held.module, held.handle, 0, 99).unwrap(), b"import that");
    assert_eq!(client.getattr(held.module).unwrap().size, 11);
    assert_eq!(client.lookup(held.directory, "module.py").unwrap().nodeid, held.module);
    assert_eq!(client.call(Opcode::Readlink, held.link, &[]).unwrap(), b"lib/python");
    let listed = client.read_directory(held.directory, held.listing, 0, 4096).unwrap();
    assert!(listed.iter().any(|entry| entry.name == "module.py" && entry.entry.nodeid == held.module));
    client.release(held.module, held.handle).unwrap();
    assert_eq!(client.read(held.module, held.handle, 0, 1), Err(EBADF));
}

#[test]
fn numbers_go_on_and_what_is_forgotten_is_closed() {
    let mut client = populated();
    let held = Held::by(&mut client);

    let mut client = goes_on(client, another_share());

    let beside = client.node("lib-python");
    assert!(beside > held.link, "{beside}");
    let handle = client.open(beside, O_RDONLY).unwrap().fh;
    assert!(handle > held.listing, "{handle}");
    // It was looked up twice.
    client.forget(held.module, 1);
    assert!(client.getattr(held.module).is_ok());
    client.forget(held.module, 1);
    assert_eq!(client.getattr(held.module).err(), Some(EBADF));
}

#[test]
fn what_was_saved_is_the_same_before_it_is_found_again_and_after_that() {
    let mut client = populated();
    Held::by(&mut client);
    let first = client.state();

    let (mut client, handle) = moved(client, another_share(), 100);
    let before = serde_json::to_value(client.driver.transport.save().unwrap()).unwrap();
    assert_eq!(before["device"]["Fs"], first);
    handle.recover().unwrap();

    assert_eq!(client.state(), first);
}

#[test]
fn an_open_file_that_is_not_there_is_named_and_may_come_later() {
    let mut client = populated();
    let held = Held::by(&mut client);
    let share = another_share();
    let module = share.path().join("lib/python/module.py");
    fs::remove_file(&module).unwrap();
    let (mut client, handle) = moved(client, share, 100);
    let assert_refused = || {
        let refusal = handle.recover().unwrap_err().to_string();
        assert!(refusal.contains(r#""lib/python/module.py""#), "{refusal}");
    };

    assert_refused();
    // What is of another type is another thing.
    fs::create_dir(&module).unwrap();
    assert_refused();
    fs::remove_dir(&module).unwrap();
    symlink("../../data", &module).unwrap();
    assert_refused();
    fs::remove_file(&module).unwrap();
    fs::write(&module, "late").unwrap();
    handle.recover().unwrap();

    client.driver.transport.resume();
    assert_eq!(client.read(held.module, held.handle, 0, 99).unwrap(), b"late");
}

#[test]
fn what_is_merely_known_and_is_not_there_is_looked_up_again() {
    let mut client = populated();
    let (data, link) = (client.node("data"), client.node("python"));
    let share = another_share();
    fs::remove_file(share.path().join("data")).unwrap();
    fs::remove_file(share.path().join("python")).unwrap();
    fs::write(share.path().join("python"), "no link any more").unwrap();

    let mut client = goes_on(client, share);

    assert_eq!(client.held(), 0);
    assert_eq!(client.getattr(data).err(), Some(EBADF));
    assert_eq!(client.call(Opcode::Readlink, link, &[]), Err(EBADF));
    let found = client.lookup(ROOT_ID, "python").unwrap();
    assert_eq!(found.attr.size, 16);
    assert!(found.nodeid > link);
}

#[test]
fn no_symbolic_link_is_followed_on_the_way() {
    let mut client = populated();
    Held::by(&mut client);
    let share = another_share();
    let outside = another_share();
    fs::remove_dir_all(share.path().join("lib")).unwrap();
    symlink(outside.path().join("lib"), share.path().join("lib")).unwrap();

    let (_client, handle) = moved(client, share, 100);

    assert!(matches!(handle.recover(), Err(Error::Reopen { .. })));
}

#[test]
fn two_names_of_one_file_and_two_files_of_one_name_go_on() {
    let mut client = populated();
    fs::hard_link(client.path("data"), client.path("hard")).unwrap();
    fs::write(client.path("one"), "1").unwrap();
    fs::write(client.path("two"), "2").unwrap();
    let (data, one, two) = (client.node("data"), client.node("one"), client.node("two"));
    assert_eq!(client.node("hard"), data);
    let share = another_share();
    // There it is the other way round.
    fs::write(share.path().join("hard"), "another").unwrap();
    fs::write(share.path().join("one"), "12").unwrap();
    fs::hard_link(share.path().join("one"), share.path().join("two")).unwrap();

    let mut client = goes_on(client, share);

    assert_ne!(client.node("hard"), data);
    assert_eq!(client.node("data"), data);
    assert_eq!((client.getattr(one).unwrap().size, client.getattr(two).unwrap().size), (2, 2));
    assert_eq!((client.node("one"), client.node("two")), (one, one));
    // The name of the one does not go with the other.
    client.forget(two, 1);
    assert_eq!(client.node("two"), one);
}

#[test]
fn a_file_that_is_written_to_or_gone_is_not_saved_while_it_is_open() {
    let mut client = populated();
    let data = client.node("data");
    let refusal = |client: &mut Client| match saved(client) {
        Err(Error::NotNow { obstacle }) => obstacle,
        other => panic!("{other:?}"),
    };
    for flags in [O_WRONLY, O_RDWR, 3] {
        // The last opens for nothing but ioctl, which needs the right to read and to write.
        let handle = client.open(data, flags).unwrap().fh;
        assert_eq!(refusal(&mut client), r#"the guest has "data" of its share open for writing"#);
        client.release(data, handle).unwrap();
    }
    saved(&mut client).unwrap();

    let handle = client.open(data, O_RDONLY).unwrap().fh;
    fs::remove_file(client.path("data")).unwrap();
    assert!(refusal(&mut client).contains("not there any more"));
    // Neither is another one of the same name it.
    fs::write(client.path("data"), "new").unwrap();
    assert!(refusal(&mut client).contains("not there any more"));
    client.release(data, handle).unwrap();
    assert_eq!(saved(&mut client).unwrap()["device"]["Fs"]["inodes"], json!([]));
    assert_eq!(client.getattr(data).unwrap().nlink, 0, "the guest may go on with what it knows");
}

#[test]
fn a_file_that_has_moved_is_found_where_it_is() {
    let mut client = populated();
    let data = client.node("data");
    let handle = client.open(data, O_RDONLY).unwrap().fh;
    fs::rename(client.path("data"), client.path("lib/moved")).unwrap();
    let share = another_share();
    fs::write(share.path().join("lib/moved"), "there").unwrap();

    let mut client = goes_on(client, share);

    assert_eq!(client.read(data, handle, 0, 99).unwrap(), b"there");
}

#[test]
fn a_file_that_is_as_it_was_keeps_what_the_guest_has_of_it() {
    const KEEP_CACHE: u32 = 2;
    let mut client = populated();
    let data = client.node("data");
    let handle = client.open(data, O_RDONLY).unwrap().fh;
    client.release(data, handle).unwrap();
    let share = std::mem::replace(&mut client.share, TempDir::new().unwrap());

    let mut client = goes_on(client, share);
    assert_ne!(client.open(data, O_RDONLY).unwrap().open_flags & KEEP_CACHE, 0);

    let mut client = goes_on(client, another_share());
    assert_eq!(client.open(data, O_RDONLY).unwrap().open_flags & KEEP_CACHE, 0);
}

#[test]
fn what_is_found_again_counts() {
    let mut client = populated();
    let data = client.node("data");
    client.open(data, O_RDONLY).unwrap();
    // The root, the file, and the open file.
    for (budget, enough) in [(1, false), (2, false), (3, true)] {
        let share = another_share();
        let device =
            Fs::with_budget("share", share.path(), &Confinement::none(), Budget::new(budget)).unwrap();
        let handle = device.handle();
        let state = serde_json::from_value(saved(&mut client).unwrap()).unwrap();
        let mut driver = Driver::new(Box::new(device));
        driver.transport.restore(&state).unwrap();
        assert_eq!(handle.recover().is_ok(), enough, "{budget}");
    }
}

/// What is wrong with a state.
type Change = fn(&mut Value);

/// A path as a state has it.
fn path(path: &str) -> Value {
    json!({ "Unix": path.as_bytes() })
}

#[test]
fn a_state_that_no_device_has_written_is_refused() {
    let mut client = populated();
    Held::by(&mut client);
    let good = client.state();
    let state = |change: Change| {
        let mut state = good.clone();
        change(&mut state);
        serde_json::from_value(json!({ "Fs": state })).unwrap()
    };
    let share = another_share();
    let mut device = Fs::new("share", share.path(), &Confinement::none()).unwrap();
    device.restore(&state(|_| {})).unwrap();

    let cases: &[(Change, &str)] = &[
        (|state| state["inodes"][1]["id"] = state["inodes"][0]["id"].clone(), "twice"),
        (|state| state["handles"][1]["id"] = state["handles"][0]["id"].clone(), "twice"),
        (|state| state["inodes"][0]["id"] = json!(1), "the root"),
        (|state| state["inodes"][0]["id"] = json!(0), "the root"),
        (|state| state["next_inode"] = json!(2), "once more"),
        (|state| state["next_handle"] = json!(0), "once more"),
        (|state| state["next_inode"] = json!(u64::MAX), "at their end"),
        (|state| state["next_handle"] = json!(u64::MAX), "at their end"),
        (|state| state["handles"][0]["inode"] = json!(77), "none that the guest knows"),
        (|state| state["inodes"][0]["path"] = path(".."), "below the share"),
        (|state| state["inodes"][0]["path"] = path("lib/../../beside"), "below the share"),
        (|state| state["inodes"][0]["path"] = path("/etc/passwd"), "below the share"),
        (|state| state["inodes"][0]["path"] = path("."), "below the share"),
        (|state| state["inodes"][0]["path"] = path(""), "below the share"),
    ];
    for (change, expected) in cases {
        match device.restore(&state(*change)) {
            Err(Error::RestoreDevice { problem, .. }) => assert!(problem.contains(expected), "{problem}"),
            other => panic!("{expected}: {other:?}"),
        }
    }
    let rng = serde_json::from_value(json!("Rng")).unwrap();
    assert!(matches!(device.restore(&rng), Err(Error::RestoreDevice { .. })));
}

#[test]
fn a_path_with_a_zero_and_an_open_fifo_are_no_way_in() {
    let mut client = populated();
    let data = client.node("data");
    client.open(data, O_RDONLY).unwrap();
    let good = saved(&mut client).unwrap();
    let fifo = |share: &Path, state: &mut Value| {
        rustix::fs::mknodat(
            rustix::fs::CWD,
            share.join("fifo"),
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RWXU,
            0,
        )
        .unwrap();
        state["path"] = path("fifo");
        state["kind"] = json!(libc::S_IFIFO);
    };
    let zero = |_: &Path, state: &mut Value| state["path"] = path("data\0");
    for change in [fifo, zero] as [fn(&Path, &mut Value); 2] {
        let share = another_share();
        let mut state = good.clone();
        change(share.path(), &mut state["device"]["Fs"]["inodes"][0]);
        let device = Fs::new("share", share.path(), &Confinement::none()).unwrap();
        let handle = device.handle();
        let mut driver = Driver::new(Box::new(device));
        driver.transport.restore(&serde_json::from_value(state).unwrap()).unwrap();
        assert!(matches!(handle.recover(), Err(Error::Reopen { .. })));
    }
}

#[test]
fn a_driver_that_starts_anew_holds_nothing_of_before() {
    let mut client = populated();
    let held = Held::by(&mut client);
    let (mut client, handle) = moved(client, another_share(), 100);

    client.driver.start(0);
    handle.recover().unwrap();
    client.driver.transport.resume();
    client.init().unwrap();

    assert_eq!(client.held(), 0);
    assert_eq!(client.getattr(held.module).err(), Some(EBADF));
}

#[test]
fn nothing_is_saved_or_found_while_requests_are_served() {
    let mut client = populated();
    assert!(matches!(client.driver.transport.save(), Err(Error::Running(true))));
    client.assert_serving();
}
