//! What is done with names: finding, making, moving, removing and listing.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};

use fuse_backend_rs::abi::fuse_abi::{
    LinkIn, MkdirIn, MknodIn, Opcode, ROOT_ID, ReadIn, Rename2In, RenameIn,
};
use libc::{EBADF, EEXIST, EINVAL, ENOENT, ENOTDIR, ENOTEMPTY, O_CREAT, O_EXCL, O_RDONLY, O_RDWR};
use libc::{RENAME_EXCHANGE, RENAME_NOREPLACE, S_IFCHR, S_IFIFO, S_IFREG, S_IFSOCK};
use vm_memory::ByteValued;

use super::*;

impl Client {
    fn mkdir(&mut self, parent: u64, name: &str) -> Answer<EntryOut> {
        let mkdir = MkdirIn { mode: 0o755, umask: 0 };
        Ok(object(&self.call(Opcode::Mkdir, parent, &[mkdir.as_slice(), &name_bytes(name)])?))
    }

    fn mknod(&mut self, name: &str, mode: u32) -> Answer<EntryOut> {
        let mknod = MknodIn { mode, rdev: 0, umask: 0o022, padding: 0 };
        Ok(object(&self.call(Opcode::Mknod, ROOT_ID, &[mknod.as_slice(), &name_bytes(name)])?))
    }

    fn symlink(&mut self, name: &str, target: &str) -> Answer<EntryOut> {
        Ok(object(&self.call(Opcode::Symlink, ROOT_ID, &[&name_bytes(name), &name_bytes(target)])?))
    }

    fn link(&mut self, node: u64, name: &str) -> Answer<EntryOut> {
        let link = LinkIn { oldnodeid: node };
        Ok(object(&self.call(Opcode::Link, ROOT_ID, &[link.as_slice(), &name_bytes(name)])?))
    }

    fn rename(&mut self, old: &str, new: &str, flags: u32) -> Answer {
        let rename = Rename2In { newdir: ROOT_ID, flags, padding: 0 };
        self.call(Opcode::Rename2, ROOT_ID, &[rename.as_slice(), &name_bytes(old), &name_bytes(new)])
    }

    fn unlink(&mut self, name: &str) -> Answer {
        self.call(Opcode::Unlink, ROOT_ID, &[&name_bytes(name)])
    }

    fn rmdir(&mut self, name: &str) -> Answer {
        self.call(Opcode::Rmdir, ROOT_ID, &[&name_bytes(name)])
    }

    /// All names in a directory, read in pieces of `size` bytes.
    fn list(&mut self, node: u64, size: u32) -> Vec<String> {
        let handle = self.open_directory(node).unwrap();
        let mut names = Vec::new();
        let mut offset = 0;
        loop {
            let listed = self.read_directory(node, handle, offset, size).unwrap();
            let Some(last) = listed.last() else {
                return names;
            };
            offset = last.dirent.off;
            names.extend(listed.into_iter().map(|entry| entry.name));
        }
    }
}

#[test]
fn a_name_leads_to_a_file() {
    let mut client = Client::mounted();
    fs::write(client.path("data"), "12345").unwrap();

    let entry = client.lookup(ROOT_ID, "data").unwrap();

    let host = fs::metadata(client.path("data")).unwrap();
    assert_eq!((entry.attr.ino, entry.attr.size), (host.ino(), 5));
    assert_eq!((entry.attr.uid, entry.attr.gid), (host.uid(), host.gid()));
    assert_eq!(entry.attr.mode, host.mode());
    assert!(entry.entry_valid == 0 && entry.attr_valid == 0, "stale for a second or more");
    assert_eq!(client.lookup(ROOT_ID, "data").unwrap().nodeid, entry.nodeid);
    assert_eq!(client.getattr(entry.nodeid).unwrap().size, 5);
    assert_eq!(client.lookup(ROOT_ID, "none").err(), Some(ENOENT));
}

#[test]
fn a_name_is_one_component() {
    let mut client = Client::mounted();
    let outside = client.share.path().parent().unwrap().join("mayu-outside-of-the-share");
    fs::write(client.path("file"), "").unwrap();
    let file = client.node("file");

    for name in ["", ".", "..", "/", "/etc", "a/b", "../mayu-outside-of-the-share", "./x", "file/"] {
        let refused = [
            client.lookup(ROOT_ID, name).err(),
            client.mkdir(ROOT_ID, name).err(),
            client.mknod(name, S_IFREG | 0o644).err(),
            client.symlink(name, "target").err(),
            client.link(file, name).err(),
            client.create(ROOT_ID, name, O_RDWR, 0o644).err(),
            client.unlink(name).err(),
            client.rmdir(name).err(),
            client.rename(name, "new", 0).err(),
            client.rename("file", name, 0).err(),
        ];
        assert_eq!(refused, [Some(EINVAL); 10], "{name:?}");
    }
    assert!(!outside.exists());
    assert_eq!(client.list(ROOT_ID, 4096).len(), 3);
}

#[test]
fn a_name_ends_once() {
    let mut client = Client::mounted();
    fs::write(client.path("file"), "").unwrap();

    for name in [b"file".as_slice(), b""] {
        assert_eq!(client.call(Opcode::Lookup, ROOT_ID, &[name]), Err(EINVAL), "{name:?}");
        assert_eq!(client.call(Opcode::Unlink, ROOT_ID, &[name]), Err(EINVAL), "{name:?}");
    }
    let rename = RenameIn { newdir: ROOT_ID };
    assert_eq!(client.call(Opcode::Rename, ROOT_ID, &[rename.as_slice(), b"file\0"]), Err(EINVAL));
    assert_eq!(client.call(Opcode::Symlink, ROOT_ID, &[b"link\0target"]), Err(EINVAL));
    // What comes after the end of a name is no part of it.
    assert_eq!(client.call(Opcode::Unlink, ROOT_ID, &[b"fi\0le\0"]), Err(ENOENT));
    assert!(client.path("file").exists());
}

#[test]
fn directories_come_and_go() {
    let mut client = Client::mounted();

    let directory = client.mkdir(ROOT_ID, "directory").unwrap().nodeid;
    client.mkdir(directory, "inner").unwrap();

    assert!(client.path("directory/inner").is_dir());
    assert_eq!(client.mkdir(ROOT_ID, "directory").err(), Some(EEXIST));
    assert_eq!(client.rmdir("directory"), Err(ENOTEMPTY));
    client.call(Opcode::Rmdir, directory, &[b"inner\0"]).unwrap();
    assert_eq!(client.rmdir("directory"), Ok(vec![]));
    assert!(!client.path("directory").exists());
}

#[test]
fn two_names_for_one_file() {
    let mut client = Client::mounted();
    fs::write(client.path("one"), "").unwrap();
    let node = client.node("one");

    let linked = client.link(node, "two").unwrap();

    assert_eq!((linked.nodeid, linked.attr.nlink), (node, 2));
    assert_eq!(client.link(node, "two").err(), Some(EEXIST));
}

#[test]
fn a_symbolic_link_is_told_but_not_followed() {
    let mut client = Client::mounted();
    let root = client.symlink("root", "/").unwrap();

    assert_eq!(client.call(Opcode::Readlink, root.nodeid, &[]).unwrap(), b"/");
    assert_eq!(client.lookup(root.nodeid, "etc").err(), Some(ENOTDIR));
    assert_eq!(client.open_directory(root.nodeid).err(), Some(ENOTDIR));
    assert_eq!(client.open(root.nodeid, O_RDONLY).err(), Some(EBADF));
    let hard = client.link(root.nodeid, "second").unwrap();
    assert_eq!(hard.nodeid, root.nodeid);
    assert!(fs::symlink_metadata(client.path("second")).unwrap().is_symlink());
}

#[test]
fn a_link_that_the_host_put_in_the_way_is_not_opened() {
    let mut client = Client::mounted();
    symlink("/etc/passwd", client.path("data")).unwrap();

    let created = client.create(ROOT_ID, "data", O_RDWR | O_CREAT, 0o644);

    assert_eq!(created.err(), Some(EBADF));
}

#[test]
fn creating_what_exists_opens_it_unless_that_is_forbidden() {
    let mut client = Client::mounted();
    fs::write(client.path("data"), "data").unwrap();

    let (entry, open) = client.create(ROOT_ID, "data", O_RDWR, 0o600).unwrap();

    assert_eq!(client.read(entry.nodeid, open.fh, 0, 10).unwrap(), b"data");
    assert_eq!(client.create(ROOT_ID, "data", O_RDWR | O_EXCL, 0o600).err(), Some(EEXIST));
}

#[test]
fn renaming_replaces_or_not_or_exchanges() {
    let mut client = Client::mounted();
    let write = |client: &Client, name, content: &str| fs::write(client.path(name), content).unwrap();
    let read = |client: &Client, name| fs::read_to_string(client.path(name)).unwrap();
    write(&client, "a", "A");
    write(&client, "b", "B");

    assert_eq!(client.rename("a", "b", RENAME_NOREPLACE), Err(EEXIST));
    client.rename("a", "b", RENAME_EXCHANGE).unwrap();
    assert_eq!((read(&client, "a"), read(&client, "b")), ("B".into(), "A".into()));
    client.rename("a", "b", 0).unwrap();
    assert_eq!((client.path("a").exists(), read(&client, "b")), (false, "B".into()));
    assert_eq!(client.rename("a", "c", 0), Err(ENOENT));
}

#[test]
fn special_files_are_made_but_never_opened() {
    let mut client = Client::mounted();

    for (name, mode) in [("fifo", S_IFIFO), ("socket", S_IFSOCK), ("whiteout", S_IFCHR)] {
        let made = client.mknod(name, mode | 0o644);
        if name == "whiteout" && made.is_err() && !rustix::process::geteuid().is_root() {
            continue;
        }
        let made = made.unwrap();
        assert_eq!(made.attr.mode, mode | 0o644, "{name}");
        for flags in [O_RDONLY, O_RDWR] {
            assert_eq!(client.open(made.nodeid, flags).err(), Some(EBADF), "{name}");
        }
        assert_eq!(client.create(ROOT_ID, name, O_RDWR, 0o644).err(), Some(EBADF), "{name}");
    }
    assert!(fs::symlink_metadata(client.path("fifo")).unwrap().file_type().is_fifo());
    client.assert_serving();
}

#[test]
fn a_directory_is_listed_in_pieces() {
    let mut client = Client::mounted();
    let expected: BTreeSet<String> = (0..500).map(|number| format!("file-{number}")).collect();
    for name in &expected {
        fs::write(client.path(name), "").unwrap();
    }

    for size in [600, 4096, 128 << 10] {
        let listed = client.list(ROOT_ID, size);
        let names: BTreeSet<String> = listed.iter().filter(|name| !name.starts_with('.')).cloned().collect();
        assert_eq!(names, expected, "in pieces of {size} bytes");
        assert_eq!(listed.len(), 502, "in pieces of {size} bytes");
    }
}

#[test]
fn a_listing_tells_of_each_file_what_a_lookup_would() {
    let mut client = Client::mounted();
    fs::write(client.path("data"), "12345").unwrap();
    let handle = client.open_directory(ROOT_ID).unwrap();

    let listed = client.read_directory(ROOT_ID, handle, 0, 4096).unwrap();

    for entry in listed {
        let (node, ino) = (entry.entry.nodeid, entry.dirent.ino);
        match entry.name.as_str() {
            "." | ".." => assert_eq!(node, 0),
            name => {
                let looked_up = client.lookup(ROOT_ID, name).unwrap();
                assert_eq!((node, ino), (looked_up.nodeid, looked_up.attr.ino));
                assert_eq!(entry.entry.attr.size, 5);
                // Told twice, so it is known until it is forgotten twice.
                client.forget(node, 1);
                assert!(client.getattr(node).is_ok());
                client.forget(node, 1);
                assert_eq!(client.getattr(node).err(), Some(EBADF));
            }
        }
    }
}

#[test]
fn what_did_not_fit_into_a_listing_is_not_held() {
    let mut client = Client::mounted_with_budget(100);
    for number in 0..50 {
        fs::write(client.path(&format!("file-{number}")), "").unwrap();
    }
    let handle = client.open_directory(ROOT_ID).unwrap();

    let listed = client.read_directory(ROOT_ID, handle, 0, 600).unwrap();
    for entry in listed.iter().filter(|entry| entry.entry.nodeid != 0) {
        client.forget(entry.entry.nodeid, 1);
    }
    client
        .call(Opcode::Releasedir, ROOT_ID, &[ReleaseIn { fh: handle, ..Default::default() }.as_slice()])
        .unwrap();

    assert_eq!(client.held(), 0);
}

#[test]
fn a_plain_listing_has_names_and_types() {
    let mut client = Client::mounted();
    fs::create_dir(client.path("directory")).unwrap();
    let handle = client.open_directory(ROOT_ID).unwrap();

    let read = ReadIn { fh: handle, size: 4096, ..Default::default() };
    let reply = client.call(Opcode::Readdir, ROOT_ID, &[read.as_slice()]).unwrap();

    let start = reply.windows(9).position(|window| window == b"directory").unwrap() - size_of::<Dirent>();
    let dirent: Dirent = object(&reply[start..]);
    assert_eq!((dirent.namelen, dirent.type_), (9, u32::from(libc::DT_DIR)));
    assert_eq!(client.held(), 1);
}
