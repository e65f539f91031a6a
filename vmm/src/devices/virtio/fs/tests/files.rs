//! Data and attributes of files.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use fuse_backend_rs::abi::fuse_abi::{
    Attr, AttrOut, FallocateIn, FlushIn, FsyncIn, GetattrIn, GetxattrIn, GetxattrOut, Kstatfs, LseekIn,
    LseekOut, Opcode, ROOT_ID, SetattrIn, SetxattrIn, WRITE_CACHE, WRITE_KILL_PRIV, WriteIn,
};
use libc::{
    EBADF, EINVAL, ENODATA, ENXIO, EOPNOTSUPP, ERANGE, O_APPEND, O_RDONLY, O_RDWR, O_TRUNC, O_WRONLY,
};
use vm_memory::ByteValued;

use super::*;

const KEEP_CACHE: u32 = 2;
const NO_FLUSH: u32 = 1 << 5;

const SET_MODE: u32 = 1;
const SET_OWNER: u32 = 2 | 4;
const SET_SIZE: u32 = 8;
const SET_TIMES: u32 = 16 | 32;
const SET_BY_HANDLE: u32 = 64;
const SET_MTIME_NOW: u32 = 256;
const SET_KILL_PRIVILEGES: u32 = 1 << 11;

impl Client {
    fn setattr(&mut self, node: u64, attributes: SetattrIn) -> Answer<Attr> {
        let reply = self.call(Opcode::Setattr, node, &[attributes.as_slice()])?;
        Ok(object::<AttrOut>(&reply).attr)
    }

    fn setxattr(&mut self, node: u64, name: &str, value: &[u8]) -> Answer {
        let set = SetxattrIn { size: u32::try_from(value.len()).unwrap(), flags: 0 };
        self.call(Opcode::Setxattr, node, &[set.as_slice(), &name_bytes(name), value])
    }

    fn getxattr(&mut self, node: u64, name: &str, size: u32) -> Answer {
        let get = GetxattrIn { size, padding: 0 };
        self.call(Opcode::Getxattr, node, &[get.as_slice(), &name_bytes(name)])
    }

    /// A file of the root with this content, and its node.
    fn file(&mut self, name: &str, content: &[u8]) -> u64 {
        fs::write(self.path(name), content).unwrap();
        self.node(name)
    }
}

#[test]
fn what_is_written_is_on_the_host_at_once() {
    let mut client = Client::mounted();
    let (entry, open) = client.create(ROOT_ID, "data", O_RDWR, 0o640).unwrap();

    let written = client.write(entry.nodeid, open.fh, 0, b"hello, host");

    assert_eq!(written, Ok(11));
    assert_eq!(fs::read(client.path("data")).unwrap(), b"hello, host");
    assert_eq!(fs::metadata(client.path("data")).unwrap().mode(), 0o100640);
    assert_eq!(client.read(entry.nodeid, open.fh, 7, 100).unwrap(), b"host");
    assert_eq!(client.release(entry.nodeid, open.fh), Ok(vec![]));
    assert_eq!(client.read(entry.nodeid, open.fh, 0, 1), Err(EBADF));
}

#[test]
fn a_mebibyte_goes_in_one_request() {
    let mut client = Client::mounted();
    let data: Vec<u8> = (0..1_u32 << 20).map(|byte| (byte % 251) as u8).collect();
    let (entry, open) = client.create(ROOT_ID, "large", O_RDWR, 0o600).unwrap();

    assert_eq!(client.write(entry.nodeid, open.fh, 0, &data), Ok(1 << 20));

    assert!(fs::read(client.path("large")).unwrap() == data);
    assert!(client.read(entry.nodeid, open.fh, 0, 1 << 20).unwrap() == data);
}

#[test]
fn an_append_finds_the_end_that_the_host_has_moved() {
    let mut client = Client::mounted();
    let node = client.file("log", b"one\n");
    let handle = client.open(node, O_WRONLY | O_APPEND).unwrap().fh;
    fs::write(client.path("log"), b"one\ntwo\n").unwrap();

    let append = WriteIn { fh: handle, offset: 4, flags: O_APPEND.cast_unsigned(), ..Default::default() };
    client.write_as(node, append, b"three\n").unwrap();

    assert_eq!(fs::read(client.path("log")).unwrap(), b"one\ntwo\nthree\n");
}

#[test]
fn a_mapped_page_is_written_in_its_place_also_to_a_file_open_for_appending() {
    let mut client = Client::mounted();
    let node = client.file("log", b"one\ntwo\n");
    let handle = client.open(node, O_RDWR | O_APPEND).unwrap().fh;

    let write_back = WriteIn {
        fh: handle,
        fuse_flags: WRITE_CACHE,
        flags: O_APPEND.cast_unsigned(),
        ..Default::default()
    };
    client.write_as(node, write_back, b"ONE\n").unwrap();

    assert_eq!(fs::read(client.path("log")).unwrap(), b"ONE\ntwo\n");
}

#[test]
fn the_page_cache_survives_an_open_unless_the_file_has_changed() {
    let mut client = Client::mounted();
    let node = client.file("library", b"version 1");

    let first = client.open(node, O_RDONLY).unwrap().open_flags & KEEP_CACHE;
    let unchanged = client.open(node, O_RDONLY).unwrap().open_flags & KEEP_CACHE;
    fs::write(client.path("library"), b"version 2.0").unwrap();
    let changed = client.open(node, O_RDONLY).unwrap().open_flags & KEEP_CACHE;

    assert_eq!((first, unchanged, changed), (0, KEEP_CACHE, 0));
}

#[test]
fn only_files_that_can_be_written_are_flushed() {
    let mut client = Client::mounted();
    let node = client.file("data", b"");

    let reading = client.open(node, O_RDONLY).unwrap();
    let writing = client.open(node, O_RDWR).unwrap();
    let flush = FlushIn { fh: writing.fh, ..Default::default() };

    assert_eq!(reading.open_flags & NO_FLUSH, NO_FLUSH);
    assert_eq!(writing.open_flags & NO_FLUSH, 0);
    assert_eq!(client.call(Opcode::Flush, node, &[flush.as_slice()]), Ok(vec![]));
}

#[test]
fn an_open_with_truncation_empties_the_file() {
    let mut client = Client::mounted();
    let node = client.file("data", b"old");

    client.open(node, O_WRONLY | O_TRUNC).unwrap();

    assert_eq!(fs::read(client.path("data")).unwrap(), b"");
}

#[test]
fn an_open_file_outlives_its_name() {
    let mut client = Client::mounted();
    let node = client.file("temporary", b"still here");
    let handle = client.open(node, O_RDONLY).unwrap().fh;

    client.call(Opcode::Unlink, ROOT_ID, &[&name_bytes("temporary")]).unwrap();

    assert!(!client.path("temporary").exists());
    assert_eq!(client.read(node, handle, 0, 100).unwrap(), b"still here");
    assert_eq!(client.getattr(node).unwrap().nlink, 0);
    let truncate = SetattrIn { valid: SET_SIZE | SET_BY_HANDLE, fh: handle, ..Default::default() };
    assert_eq!(client.setattr(node, truncate).err(), Some(EINVAL));
    let change = SetattrIn { valid: SET_MODE, mode: 0o400, ..Default::default() };
    assert_eq!(client.setattr(node, change).unwrap().mode, 0o100400);
}

#[test]
fn attributes_are_set_with_and_without_an_open_file() {
    let mut client = Client::mounted();
    let node = client.file("data", b"0123456789");
    let handle = client.open(node, O_RDWR).unwrap().fh;

    let by_name = SetattrIn { valid: SET_MODE | SET_SIZE, mode: 0o751, size: 4, ..Default::default() };
    assert_eq!(client.setattr(node, by_name).unwrap().mode, 0o100751);
    assert_eq!(fs::read(client.path("data")).unwrap(), b"0123");

    let by_handle =
        SetattrIn { valid: SET_SIZE | SET_BY_HANDLE, fh: handle, size: 1 << 20, ..Default::default() };
    assert_eq!(client.setattr(node, by_handle).unwrap().size, 1 << 20);

    let times = SetattrIn {
        valid: SET_TIMES,
        atime: 1_000_000_000,
        atimensec: 1,
        mtime: 1_500_000_000,
        mtimensec: 999_999_999,
        ..Default::default()
    };
    let attributes = client.setattr(node, times).unwrap();
    assert_eq!((attributes.atime, attributes.atimensec), (1_000_000_000, 1));
    assert_eq!((attributes.mtime, attributes.mtimensec), (1_500_000_000, 999_999_999));

    let now = SetattrIn { valid: 32 | SET_MTIME_NOW, ..Default::default() };
    let attributes = client.setattr(node, now).unwrap();
    assert!(attributes.mtime > 1_500_000_000);
    assert_eq!(attributes.atime, 1_000_000_000);
}

#[test]
fn attributes_of_a_symbolic_link_are_its_own() {
    let mut client = Client::mounted();
    client.file("target", b"");
    std::os::unix::fs::symlink("target", client.path("link")).unwrap();
    let link = client.node("link");

    let times = SetattrIn { valid: SET_TIMES, atime: 1, mtime: 2, ..Default::default() };
    client.setattr(link, times).unwrap();
    let mode = SetattrIn { valid: SET_MODE, mode: 0o600, ..Default::default() };

    assert_eq!(client.setattr(link, mode).err(), Some(EOPNOTSUPP));
    assert_eq!(fs::symlink_metadata(client.path("link")).unwrap().mtime(), 2);
    assert!(fs::metadata(client.path("target")).unwrap().mtime() > 2);
}

#[test]
fn impossible_attributes_are_refused() {
    let mut client = Client::mounted();
    let node = client.file("data", b"data");

    for attributes in [
        SetattrIn { valid: SET_SIZE, size: u64::MAX, ..Default::default() },
        SetattrIn { valid: SET_OWNER, uid: u32::MAX, gid: u32::MAX, ..Default::default() },
        SetattrIn { valid: SET_TIMES, atimensec: u32::MAX, ..Default::default() },
    ] {
        assert_eq!(client.setattr(node, attributes).err(), Some(EINVAL), "{attributes:?}");
    }
    assert_eq!(fs::read(client.path("data")).unwrap(), b"data");
}

#[test]
fn an_ordinary_writer_loses_set_user_id_and_root_does_not() {
    if !is_root("an_ordinary_writer_loses_set_user_id_and_root_does_not") {
        return;
    }
    let mut client = Client::mounted();
    let node = client.file("program", b"program");
    let handle = client.open(node, O_RDWR).unwrap().fh;
    let set = |client: &Client| {
        fs::set_permissions(client.path("program"), PermissionsExt::from_mode(0o6755)).unwrap();
    };
    let mode = |client: &Client| fs::metadata(client.path("program")).unwrap().mode() & 0o7777;
    let ordinary = WriteIn { fh: handle, fuse_flags: WRITE_KILL_PRIV, ..Default::default() };

    set(&client);
    client.write(node, handle, 0, b"P").unwrap();
    assert_eq!(mode(&client), 0o6755);

    client.write_as(node, ordinary, b"p").unwrap();
    assert_eq!(mode(&client), 0o755);

    set(&client);
    let truncate = SetattrIn { valid: SET_SIZE | SET_KILL_PRIVILEGES, size: 2, ..Default::default() };
    client.setattr(node, truncate).unwrap();
    assert_eq!(mode(&client), 0o755);
}

#[test]
fn extended_attributes() {
    let mut client = Client::mounted();
    let node = client.file("data", b"");
    match client.setxattr(node, "user.colour", b"green") {
        Err(EOPNOTSUPP) => return eprintln!("SKIPPED: extended_attributes: the file system has none"),
        set => assert_eq!(set, Ok(vec![])),
    }

    assert_eq!(client.getxattr(node, "user.colour", 100).unwrap(), b"green");
    let size = client.getxattr(node, "user.colour", 0).unwrap();
    assert_eq!(object::<GetxattrOut>(&size).size, 5);
    assert_eq!(client.getxattr(node, "user.colour", 4), Err(ERANGE));
    assert_eq!(client.getxattr(node, "user.colour", u32::MAX).unwrap(), b"green");
    let list = GetxattrIn { size: 1000, padding: 0 };
    let names = client.call(Opcode::Listxattr, node, &[list.as_slice()]).unwrap();
    assert!(names.split(|&byte| byte == 0).any(|name| name == b"user.colour"));
    client.call(Opcode::Removexattr, node, &[&name_bytes("user.colour")]).unwrap();
    assert_eq!(client.getxattr(node, "user.colour", 100), Err(ENODATA));
}

#[test]
fn file_capabilities_are_kept_until_the_file_is_written() {
    if !is_root("file_capabilities_are_kept_until_the_file_is_written") {
        return;
    }
    let mut client = Client::mounted();
    let node = client.file("ping", b"ping");
    // struct vfs_cap_data of revision 2, with CAP_NET_RAW permitted and effective.
    let capability: Vec<u8> =
        [0x0200_0001_u32, 1 << 13, 0, 0, 0].iter().flat_map(|word| word.to_le_bytes()).collect();

    client.setxattr(node, "security.capability", &capability).unwrap();
    assert_eq!(client.getxattr(node, "security.capability", 100).unwrap(), capability);

    let handle = client.open(node, O_RDWR).unwrap().fh;
    client.write(node, handle, 0, b"p").unwrap();
    assert_eq!(client.getxattr(node, "security.capability", 100), Err(ENODATA));
}

#[test]
fn attributes_that_are_the_hosts_own_cannot_be_changed() {
    let mut client = Client::mounted();
    let node = client.file("data", b"");

    for name in ["trusted.overlay.opaque", "security.selinux", "security.ima", "system.nfs4_acl", "x"] {
        assert_eq!(client.setxattr(node, name, b"y"), Err(EOPNOTSUPP), "{name}");
        let removed = client.call(Opcode::Removexattr, node, &[&name_bytes(name)]);
        assert_eq!(removed, Err(EOPNOTSUPP), "{name}");
    }
}

#[test]
fn a_default_access_list_counts_instead_of_the_umask() {
    let mut client = Client::mounted();
    fs::create_dir(client.path("shared")).unwrap();
    let shared = client.node("shared");
    // struct posix_acl_xattr_header and entries (tag, permissions, id): user, group, mask and others may all.
    let entries = [(1_u16, 7_u16), (4, 7), (0x10, 7), (0x20, 5)];
    let mut list = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions) in entries {
        list.extend([tag.to_le_bytes(), permissions.to_le_bytes()].concat());
        list.extend(u32::MAX.to_le_bytes());
    }
    match client.setxattr(shared, "system.posix_acl_default", &list) {
        Err(EOPNOTSUPP) => {
            return eprintln!(
                "SKIPPED: a_default_access_list_counts_instead_of_the_umask: no access lists here"
            );
        }
        set => assert_eq!(set, Ok(vec![])),
    }

    for (name, parent, expected) in [("inherits", shared, 0o775), ("masked", ROOT_ID, 0o700)] {
        let create = CreateIn { flags: O_RDWR.cast_unsigned(), mode: 0o777, umask: 0o077, fuse_flags: 0 };
        let reply = client.call(Opcode::Create, parent, &[create.as_slice(), &name_bytes(name)]).unwrap();
        assert_eq!(object::<EntryOut>(&reply).attr.mode & 0o7777, expected, "{name}");
    }
}

#[test]
fn space_is_allocated_and_holes_are_found() {
    let mut client = Client::mounted();
    let node = client.file("sparse", b"data");
    let handle = client.open(node, O_RDWR).unwrap().fh;
    let seek = |client: &mut Client, offset, whence: i32| {
        let seek = LseekIn { fh: handle, offset, whence: whence.cast_unsigned(), padding: 0 };
        let reply = client.call(Opcode::Lseek, node, &[seek.as_slice()])?;
        Ok(object::<LseekOut>(&reply).offset)
    };

    let allocate = FallocateIn { fh: handle, offset: 0, length: 1 << 20, ..Default::default() };
    client.call(Opcode::Fallocate, node, &[allocate.as_slice()]).unwrap();
    assert_eq!(fs::metadata(client.path("sparse")).unwrap().len(), 1 << 20);

    client.setattr(node, SetattrIn { valid: SET_SIZE, size: 0, ..Default::default() }).unwrap();
    client.setattr(node, SetattrIn { valid: SET_SIZE, size: 2 << 20, ..Default::default() }).unwrap();
    client.write(node, handle, 1 << 20, b"island").unwrap();
    assert_eq!(seek(&mut client, 0, libc::SEEK_DATA), Ok(1 << 20));
    assert_eq!(seek(&mut client, 0, libc::SEEK_HOLE), Ok(0));
    assert_eq!(seek(&mut client, 3 << 20, libc::SEEK_DATA), Err(ENXIO));
    assert_eq!(seek(&mut client, 0, libc::SEEK_SET), Err(EINVAL));
}

#[test]
fn synchronisation_and_statistics() {
    let mut client = Client::mounted();
    let node = client.file("data", b"data");
    let handle = client.open(node, O_RDWR).unwrap().fh;
    let directory = client.open_directory(ROOT_ID).unwrap();

    for (opcode, node, fh) in [(Opcode::Fsync, node, handle), (Opcode::Fsyncdir, ROOT_ID, directory)] {
        for fsync_flags in [0, 1] {
            let fsync = FsyncIn { fh, fsync_flags, padding: 0 };
            assert_eq!(client.call(opcode, node, &[fsync.as_slice()]), Ok(vec![]));
        }
    }
    let statistics: Kstatfs = object(&client.call(Opcode::Statfs, node, &[]).unwrap());
    assert!(statistics.blocks > 0 && statistics.namelen == 255);
}

#[test]
fn a_handle_belongs_to_its_file() {
    let mut client = Client::mounted();
    let (one, other) = (client.file("one", b"1"), client.file("other", b"2"));
    let handle = client.open(one, O_RDONLY).unwrap().fh;

    assert_eq!(client.read(other, handle, 0, 1), Err(EBADF));
    assert_eq!(client.release(other, handle), Err(EBADF));
    let getattr = GetattrIn { flags: 1, dummy: 0, fh: handle };
    assert_eq!(client.call(Opcode::Getattr, other, &[getattr.as_slice()]), Err(EBADF));
    assert_eq!(client.read(one, handle, 0, 1).unwrap(), b"1");
}
