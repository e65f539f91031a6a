//! The device driven through real virtqueues by a FUSE client that speaks like Linux, or worse.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use fuse_backend_rs::abi::fuse_abi::{
    Attr, AttrOut, CreateIn, Dirent, EntryOut, FsOptions, GetattrIn, InHeader, InitIn, InitOut, Opcode,
    OpenIn, OpenOut, OutHeader, ROOT_ID, ReadIn, ReleaseIn, WriteIn, WriteOut,
};
use tempfile::TempDir;
use vm_memory::ByteValued;

use super::table::Budget;
use super::{Confinement, Fs, Result};
use crate::devices::virtio::testing::{Descriptor, Driver};

mod files;
mod hostile;
mod identity;
mod lifecycle;
mod mounts;
mod names;
mod restore;

const HIGH_PRIORITY: u16 = 0;
const REQUESTS: u16 = 1;

/// Room for the largest request and the largest reply.
const BUFFER: usize = (1 << 20) + 4096;

/// What a FUSE request ends with: its payload or an errno.
type Answer<T = Vec<u8>> = std::result::Result<T, i32>;

/// The driver of a guest that has mounted the share.
struct Client {
    driver: Driver,
    share: TempDir,
    /// On whose behalf requests are made.
    user: (u32, u32),
    unique: u64,
    request: u64,
    reply: u64,
}

/// The options that Linux 6.12 offers in INIT, as far as fuse-backend-rs knows them.
fn linux_options() -> FsOptions {
    FsOptions::ASYNC_READ
        | FsOptions::POSIX_LOCKS
        | FsOptions::ATOMIC_O_TRUNC
        | FsOptions::EXPORT_SUPPORT
        | FsOptions::BIG_WRITES
        | FsOptions::DONT_MASK
        | FsOptions::FLOCK_LOCKS
        | FsOptions::HAS_IOCTL_DIR
        | FsOptions::AUTO_INVAL_DATA
        | FsOptions::DO_READDIRPLUS
        | FsOptions::READDIRPLUS_AUTO
        | FsOptions::ASYNC_DIO
        | FsOptions::WRITEBACK_CACHE
        | FsOptions::ZERO_MESSAGE_OPEN
        | FsOptions::PARALLEL_DIROPS
        | FsOptions::HANDLE_KILLPRIV
        | FsOptions::POSIX_ACL
        | FsOptions::ABORT_ERROR
        | FsOptions::MAX_PAGES
        | FsOptions::CACHE_SYMLINKS
        | FsOptions::ZERO_MESSAGE_OPENDIR
        | FsOptions::EXPLICIT_INVAL_DATA
        | FsOptions::SUBMOUNTS
        | FsOptions::HANDLE_KILLPRIV_V2
        | FsOptions::INIT_EXT
}

impl Client {
    /// A guest that has mounted an empty share.
    fn mounted() -> Self {
        let mut client = Self::started(|share| Fs::new("share", share.path(), &Confinement::none()));
        client.init().unwrap();
        client
    }

    /// A guest that may hold so many files.
    fn mounted_with_budget(descriptors: usize) -> Self {
        let mut client = Self::started(|share| {
            Fs::with_budget("share", share.path(), &Confinement::none(), Budget::new(descriptors))
        });
        client.init().unwrap();
        client
    }

    /// A guest whose driver has found the device.
    fn started(device: impl FnOnce(&TempDir) -> Result<Fs>) -> Self {
        let share = TempDir::new().unwrap();
        let mut driver = Driver::new(Box::new(device(&share).unwrap()));
        driver.start(0);
        Self {
            request: driver.alloc(BUFFER),
            reply: driver.alloc(BUFFER),
            driver,
            share,
            user: (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw()),
            unique: 0,
        }
    }

    fn init(&mut self) -> Answer<InitOut> {
        let options = linux_options().bits();
        let init = InitIn { major: 7, minor: 41, max_readahead: 128 << 10, flags: low_half(options) };
        let extension = [low_half(options >> 32).to_le_bytes().as_slice(), &[0; 44]].concat();
        let reply = self.call(Opcode::Init, 0, &[init.as_slice(), &extension])?;
        Ok(object(&reply))
    }

    /// A path of the share on the host.
    fn path(&self, name: &str) -> PathBuf {
        self.share.path().join(name)
    }

    /// Makes a request and waits for the answer.
    fn call(&mut self, opcode: Opcode, node: u64, body: &[&[u8]]) -> Answer {
        let body = body.concat();
        let header = self.header(opcode as u32, node, body.len());
        let reply = self.send(REQUESTS, &[header.as_slice(), &body].concat(), BUFFER);
        self.parse(&reply)
    }

    fn header(&mut self, opcode: u32, node: u64, body: usize) -> InHeader {
        self.unique += 2;
        InHeader {
            len: u32::try_from(size_of::<InHeader>() + body).unwrap(),
            opcode,
            unique: self.unique,
            nodeid: node,
            uid: self.user.0,
            gid: self.user.1,
            pid: 1,
            padding: 0,
        }
    }

    /// Puts `request` into a queue, in a chain with `room` bytes for the reply, and waits for what comes back.
    fn send(&mut self, queue: u16, request: &[u8], room: usize) -> Vec<u8> {
        self.driver.write(self.request, request);
        // In two pieces each, since a device must not care.
        let (first, second) = request.split_at(request.len() / 3);
        let mut chain = Vec::new();
        let mut address = self.request;
        for piece in [first, second] {
            chain.push(Descriptor::readable(address, u32::try_from(piece.len()).unwrap()));
            address += u64::try_from(piece.len()).unwrap();
        }
        let mut address = self.reply;
        for piece in [room / 3, room - room / 3].into_iter().filter(|&piece| piece > 0) {
            chain.push(Descriptor::writable(address, u32::try_from(piece).unwrap()));
            address += u64::try_from(piece).unwrap();
        }
        self.send_chain(queue, &chain)
    }

    /// Makes a chain available and waits for what comes back at the start of the reply buffer.
    fn send_chain(&mut self, queue: u16, chain: &[Descriptor]) -> Vec<u8> {
        let head = self.driver.queues[usize::from(queue)].add(chain);
        let used = self.driver.exchange(queue, 1);
        assert_eq!((used.len(), used[0].head), (1, u32::from(head)));
        self.driver.read(self.reply, usize::try_from(used[0].length).unwrap())
    }

    /// Splits a reply into its header and the rest.
    fn parse(&self, reply: &[u8]) -> Answer {
        let header: OutHeader = object(reply);
        assert_eq!(usize::try_from(header.len).unwrap(), reply.len());
        assert_eq!(header.unique, self.unique);
        match header.error {
            0 => Ok(reply[size_of::<OutHeader>()..].to_vec()),
            error => Err(-error),
        }
    }

    fn lookup(&mut self, parent: u64, name: &str) -> Answer<EntryOut> {
        Ok(object(&self.call(Opcode::Lookup, parent, &[&name_bytes(name)])?))
    }

    /// The node of a file in the root.
    fn node(&mut self, name: &str) -> u64 {
        self.lookup(ROOT_ID, name).unwrap().nodeid
    }

    fn getattr(&mut self, node: u64) -> Answer<Attr> {
        let reply = self.call(Opcode::Getattr, node, &[GetattrIn::default().as_slice()])?;
        Ok(object::<AttrOut>(&reply).attr)
    }

    fn open(&mut self, node: u64, flags: i32) -> Answer<OpenOut> {
        let open = OpenIn { flags: flags.cast_unsigned(), fuse_flags: 0 };
        Ok(object(&self.call(Opcode::Open, node, &[open.as_slice()])?))
    }

    fn open_directory(&mut self, node: u64) -> Answer<u64> {
        let reply = self.call(Opcode::Opendir, node, &[OpenIn::default().as_slice()])?;
        Ok(object::<OpenOut>(&reply).fh)
    }

    fn create(&mut self, parent: u64, name: &str, flags: i32, mode: u32) -> Answer<(EntryOut, OpenOut)> {
        let create = CreateIn { flags: flags.cast_unsigned(), mode, umask: 0, fuse_flags: 0 };
        let reply = self.call(Opcode::Create, parent, &[create.as_slice(), &name_bytes(name)])?;
        Ok((object(&reply), object(&reply[size_of::<EntryOut>()..])))
    }

    fn read(&mut self, node: u64, handle: u64, offset: u64, size: u32) -> Answer {
        let read = ReadIn { fh: handle, offset, size, ..Default::default() };
        self.call(Opcode::Read, node, &[read.as_slice()])
    }

    fn write(&mut self, node: u64, handle: u64, offset: u64, data: &[u8]) -> Answer<u32> {
        self.write_as(node, WriteIn { fh: handle, offset, ..Default::default() }, data)
    }

    fn write_as(&mut self, node: u64, write: WriteIn, data: &[u8]) -> Answer<u32> {
        let write = WriteIn { size: u32::try_from(data.len()).unwrap(), ..write };
        let reply = self.call(Opcode::Write, node, &[write.as_slice(), data])?;
        Ok(object::<WriteOut>(&reply).size)
    }

    fn release(&mut self, node: u64, handle: u64) -> Answer {
        let release = ReleaseIn { fh: handle, ..Default::default() };
        self.call(Opcode::Release, node, &[release.as_slice()])
    }

    /// Sends a FORGET, for which there is no reply.
    fn forget(&mut self, node: u64, lookups: u64) {
        let header = self.header(Opcode::Forget as u32, node, 8);
        let request = [header.as_slice(), &lookups.to_le_bytes()].concat();
        assert!(self.send(HIGH_PRIORITY, &request, 0).is_empty());
    }

    /// The entries of one READDIRPLUS: names, what the driver is told of each, and where to go on.
    fn read_directory(&mut self, node: u64, handle: u64, offset: u64, size: u32) -> Answer<Vec<Listed>> {
        let read = ReadIn { fh: handle, offset, size, ..Default::default() };
        let reply = self.call(Opcode::Readdirplus, node, &[read.as_slice()])?;
        assert!(reply.len() <= usize::try_from(size).unwrap());
        let mut rest = reply.as_slice();
        let mut listed = Vec::new();
        while !rest.is_empty() {
            let dirent: Dirent = object(&rest[size_of::<EntryOut>()..]);
            let start = size_of::<EntryOut>() + size_of::<Dirent>();
            let end = start + usize::try_from(dirent.namelen).unwrap();
            let name = OsStr::from_bytes(&rest[start..end]).to_str().unwrap().to_owned();
            listed.push(Listed { name, entry: object(rest), dirent });
            rest = &rest[end.next_multiple_of(8)..];
        }
        Ok(listed)
    }

    /// The device does what it should, whatever it was sent before.
    fn assert_serving(&mut self) {
        assert_eq!(self.getattr(ROOT_ID).unwrap().mode & 0o170000, 0o040000);
    }

    fn errors(&self) -> u64 {
        self.driver.transport.health().errors()
    }
}

/// One entry of a directory.
struct Listed {
    name: String,
    entry: EntryOut,
    dirent: Dirent,
}

/// Copies an object out of the beginning of a reply.
fn object<T: ByteValued + Default>(bytes: &[u8]) -> T {
    let mut object = T::default();
    object.as_mut_slice().copy_from_slice(&bytes[..size_of::<T>()]);
    object
}

/// A name as FUSE sends it.
fn name_bytes(name: &str) -> Vec<u8> {
    [name.as_bytes(), &[0]].concat()
}

fn low_half(value: u64) -> u32 {
    u32::try_from(value & 0xffff_ffff).unwrap()
}

/// Whether this test runs as root. Says so if it does not.
fn is_root(test: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: {test}: needs root");
    }
    root
}
