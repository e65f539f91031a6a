//! The requests of FUSE, one method each, as fuse-backend-rs decodes them.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{CreateIn, FOPEN_IN_KILL_SUIDGID, WRITE_KILL_PRIV, stat64, statvfs64};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    SetattrValid, ZeroCopyReader, ZeroCopyWriter,
};
use rustix::fs::{
    AtFlags, Dev, FallocateFlags, FileType, Mode, OFlags, RawDirEntry, RenameFlags, SeekFrom, XattrFlags,
    linkat, mkdirat, mknodat, openat, readlinkat, renameat_with, seek, symlinkat, unlinkat,
};
use rustix::io::Errno;
use rustix::path::DecInt;

use super::attributes;
use super::identity::{ScopedUmask, WithoutFsetid};
use super::raw::{self, GuestIo};
use super::share::{Share, TIMEOUT, check_name, stat};
use super::table::{Inode, lock};

/// What this file system asks for if the driver is capable of it.
///
/// No WRITEBACK_CACHE: what a container has written must be on the host when the container dies. No POSIX_LOCKS and
/// FLOCK_LOCKS: locks stay inside the guest, so that none can block a worker.
const WANTED: FsOptions = FsOptions::ASYNC_READ
    .union(FsOptions::ATOMIC_O_TRUNC)
    .union(FsOptions::BIG_WRITES)
    .union(FsOptions::AUTO_INVAL_DATA)
    .union(FsOptions::DO_READDIRPLUS)
    .union(FsOptions::READDIRPLUS_AUTO)
    .union(FsOptions::ASYNC_DIO)
    .union(FsOptions::PARALLEL_DIROPS)
    .union(FsOptions::MAX_PAGES)
    .union(FsOptions::SUBMOUNTS)
    .union(FsOptions::HANDLE_KILLPRIV_V2)
    .union(FsOptions::INIT_EXT);

/// Access control lists are the driver's to obey; the host's kernel inherits them, which takes the raw mode and the
/// umask.
const ACCESS_CONTROL_LISTS: FsOptions = FsOptions::POSIX_ACL.union(FsOptions::DONT_MASK);

/// What of a driver's flags reaches `open`. Not O_DIRECT, since the driver's buffers are aligned as the guest's
/// device demands, not the host's. Not O_APPEND, which would make the write-back of a mapped page an append.
const OPEN_FLAGS: OFlags = OFlags::ACCMODE.union(OFlags::TRUNC).union(OFlags::DSYNC).union(OFlags::SYNC);

/// XATTR_SIZE_MAX and XATTR_LIST_MAX of `include/uapi/linux/limits.h`.
const MAX_XATTR: usize = 64 * 1024;

/// The extended attributes that a driver may change. Others label the file for the host's own purposes.
const WRITABLE_XATTRS: [&[u8]; 3] = [b"user.", b"security.capability", b"system.posix_acl_"];

impl FileSystem for Share {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        self.end_session();
        let mut wanted = WANTED;
        if capable.contains(ACCESS_CONTROL_LISTS) {
            wanted |= ACCESS_CONTROL_LISTS;
        }
        self.begin_session((capable & wanted).bits());
        Ok(wanted)
    }

    fn destroy(&self) {
        self.end_session();
    }

    fn lookup(&self, _context: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.find(&*self.inodes.get(parent)?, name)
    }

    fn forget(&self, _context: &Context, inode: u64, count: u64) {
        self.inodes.forget(inode, count);
    }

    fn getattr(&self, _context: &Context, inode: u64, handle: Option<u64>) -> io::Result<(stat64, Duration)> {
        let stat = match handle {
            Some(handle) => stat(&*self.handles.get(handle, inode)?)?,
            None => stat(&*self.inodes.get(inode)?)?,
        };
        Ok((attributes::from_statx(&stat), TIMEOUT))
    }

    fn setattr(
        &self,
        context: &Context,
        inode_id: u64,
        attributes: stat64,
        handle_id: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        let inode = self.inodes.get(inode_id)?;
        let handle = handle_id.map(|handle| self.handles.get(handle, inode_id)).transpose()?;
        if valid.contains(SetattrValid::MODE) {
            attributes::set_mode(&self.descriptors, &*inode, attributes.st_mode)?;
        }
        if valid.intersects(SetattrValid::UID | SetattrValid::GID) {
            let uid = valid.contains(SetattrValid::UID).then_some(attributes.st_uid);
            let gid = valid.contains(SetattrValid::GID).then_some(attributes.st_gid);
            attributes::set_owner(&*inode, uid, gid)?;
        }
        if valid.contains(SetattrValid::SIZE) {
            let kill_privileges = valid.contains(SetattrValid::KILL_SUIDGID);
            self.set_size(&inode, handle.as_deref(), attributes.st_size, kill_privileges)?;
        }
        if valid.intersects(SetattrValid::ATIME | SetattrValid::MTIME) {
            attributes::set_times(&self.descriptors, &*inode, &attributes, valid)?;
        }
        self.getattr(context, inode_id, handle_id)
    }

    fn readlink(&self, _context: &Context, inode: u64) -> io::Result<Vec<u8>> {
        let inode = self.inodes.get(inode)?;
        Ok(readlinkat(&*inode, c"", Vec::new())?.into_bytes())
    }

    fn symlink(&self, _context: &Context, target: &CStr, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.make(parent, name, 0, |parent| symlinkat(target, parent, name))
    }

    fn mknod(
        &self,
        _context: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        device: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        let kind = FileType::from_raw_mode(mode);
        let mode = Mode::from_raw_mode(mode);
        self.make(parent, name, umask, |parent| mknodat(parent, name, kind, mode, Dev::from(device)))
    }

    fn mkdir(
        &self,
        _context: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        let mode = Mode::from_raw_mode(mode);
        self.make(parent, name, umask, |parent| mkdirat(parent, name, mode))
    }

    fn link(&self, _context: &Context, inode: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        let inode = self.inodes.get(inode)?;
        // Through /proc, since AT_EMPTY_PATH takes CAP_DAC_READ_SEARCH in the initial user namespace. The last step
        // leads to the inode itself, also if that is a symbolic link.
        let (from, flags) = (DecInt::from_fd(&*inode), AtFlags::SYMLINK_FOLLOW);
        self.make(parent, name, 0, |parent| linkat(&self.descriptors, from, parent, name, flags))
    }

    fn unlink(&self, _context: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        check_name(name)?;
        Ok(unlinkat(&*self.inodes.get(parent)?, name, AtFlags::empty())?)
    }

    fn rmdir(&self, _context: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        check_name(name)?;
        Ok(unlinkat(&*self.inodes.get(parent)?, name, AtFlags::REMOVEDIR)?)
    }

    fn rename(
        &self,
        _context: &Context,
        old_parent: u64,
        old_name: &CStr,
        new_parent: u64,
        new_name: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        check_name(old_name)?;
        check_name(new_name)?;
        let old_parent = self.inodes.get(old_parent)?;
        let new_parent = self.inodes.get(new_parent)?;
        let flags = RenameFlags::from_bits_retain(flags);
        Ok(renameat_with(&*old_parent, old_name, &*new_parent, new_name, flags)?)
    }

    fn open(
        &self,
        _context: &Context,
        inode: u64,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        let inode = self.inodes.get(inode)?;
        let flags = OFlags::from_bits_retain(flags) & OPEN_FLAGS;
        let kill_privileges = fuse_flags & FOPEN_IN_KILL_SUIDGID != 0;
        let file = {
            let _without = kill_privileges.then(WithoutFsetid::new).transpose()?;
            self.open_file(&inode, flags)?
        };
        let (handle, options) = self.add_handle(&inode, self.charge(file)?, flags)?;
        Ok((Some(handle), options, None))
    }

    fn create(
        &self,
        context: &Context,
        parent_id: u64,
        name: &CStr,
        arguments: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        check_name(name)?;
        let parent = self.inodes.get(parent_id)?;
        let flags = OFlags::from_bits_retain(arguments.flags) & OPEN_FLAGS;
        let created = {
            let _umask = ScopedUmask::new(arguments.umask);
            // Exclusively, so that what is opened here is a new regular file and nothing else.
            let flags = flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            openat(&*parent, name, flags, Mode::from_raw_mode(arguments.mode))
        };
        let file = match created {
            Ok(file) => self.charge(file)?,
            Err(Errno::EXIST) if !OFlags::from_bits_retain(arguments.flags).contains(OFlags::EXCL) => {
                let entry = self.find(&parent, name)?;
                let opened = self.open(context, entry.inode, arguments.flags, arguments.fuse_flags);
                let (handle, options, _) = opened.inspect_err(|_| self.inodes.forget(entry.inode, 1))?;
                return Ok((entry, handle, options, None));
            }
            Err(error) => return Err(error.into()),
        };
        // From the new file, not by its name, which may be another's by now.
        let entry = self.entry(&parent, self.reopen(&file, OFlags::PATH)?)?;
        let opened = self.inodes.get(entry.inode).and_then(|inode| self.add_handle(&inode, file, flags));
        let (handle, options) = opened.inspect_err(|_| self.inodes.forget(entry.inode, 1))?;
        Ok((entry, Some(handle), options, None))
    }

    fn read(
        &self,
        _context: &Context,
        inode: u64,
        handle: u64,
        target: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        _lock_owner: Option<u64>,
        _flags: u32,
    ) -> io::Result<usize> {
        let handle = self.handles.get(handle, inode)?;
        let size = usize::try_from(size).map_err(|_| Errno::INVAL)?;
        target.write_from(&mut GuestIo::new(&*handle), size, offset)
    }

    fn write(
        &self,
        _context: &Context,
        inode: u64,
        handle: u64,
        source: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        _lock_owner: Option<u64>,
        from_page_cache: bool,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        let handle = self.handles.get(handle, inode)?;
        let size = usize::try_from(size).map_err(|_| Errno::INVAL)?;
        let kill_privileges = fuse_flags & WRITE_KILL_PRIV != 0;
        let _without = kill_privileges.then(WithoutFsetid::new).transpose()?;
        // The driver's idea of where the file ends may be old; but a mapped page has its place.
        let append = OFlags::from_bits_retain(flags).contains(OFlags::APPEND) && !from_page_cache;
        source.read_to(&mut GuestIo::new(&*handle).appending(append), size, offset)
    }

    fn release(
        &self,
        _context: &Context,
        inode: u64,
        _flags: u32,
        handle: u64,
        _flush: bool,
        _flock_release: bool,
        _lock_owner: Option<u64>,
    ) -> io::Result<()> {
        self.handles.remove(handle, inode)
    }

    fn flush(&self, _context: &Context, inode: u64, handle: u64, _lock_owner: u64) -> io::Result<()> {
        let handle = self.handles.get(handle, inode)?;
        // A network file system writes back when any descriptor of a file is closed, and tells whether that went well.
        let duplicate = rustix::io::fcntl_dupfd_cloexec(&*handle, 0)?;
        Ok(nix::unistd::close(duplicate)?)
    }

    fn fsync(&self, _context: &Context, inode: u64, data_only: bool, handle: u64) -> io::Result<()> {
        let handle = self.handles.get(handle, inode)?;
        match data_only {
            true => rustix::fs::fdatasync(&*handle)?,
            false => rustix::fs::fsync(&*handle)?,
        }
        Ok(())
    }

    fn fallocate(
        &self,
        _context: &Context,
        inode: u64,
        handle: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        let handle = self.handles.get(handle, inode)?;
        let mode = FallocateFlags::from_bits_retain(mode);
        Ok(rustix::fs::fallocate(&*handle, mode, offset, length)?)
    }

    fn lseek(
        &self,
        _context: &Context,
        inode: u64,
        handle: u64,
        offset: u64,
        whence: u32,
    ) -> io::Result<u64> {
        let handle = self.handles.get(handle, inode)?;
        let _position = lock(&handle.position);
        // The driver answers the others itself.
        let position = match i32::try_from(whence) {
            Ok(libc::SEEK_DATA) => SeekFrom::Data(offset),
            Ok(libc::SEEK_HOLE) => SeekFrom::Hole(offset),
            _ => return Err(Errno::INVAL.into()),
        };
        Ok(seek(&*handle, position)?)
    }

    fn statfs(&self, _context: &Context, inode: u64) -> io::Result<statvfs64> {
        raw::statvfs(self.inodes.get(inode)?.as_fd())
    }

    fn opendir(&self, _context: &Context, inode: u64, _flags: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        let inode = self.inodes.get(inode)?;
        let file = self.reopen(&*inode, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let handle = self.handles.insert(inode.id, self.charge(file)?, false);
        Ok((Some(handle), OpenOptions::empty()))
    }

    fn readdir(
        &self,
        _context: &Context,
        inode: u64,
        handle: u64,
        _size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>) -> io::Result<usize>,
    ) -> io::Result<()> {
        self.read_directory(inode, handle, offset, &mut |entry| add(directory_entry(entry)))
    }

    fn readdirplus(
        &self,
        _context: &Context,
        inode: u64,
        handle: u64,
        _size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        let parent = self.inodes.get(inode)?;
        self.read_directory(inode, handle, offset, &mut |entry| {
            // An entry that is gone by now, or for which there is no descriptor left, is told without an inode:
            // the driver looks it up when it needs to.
            let found = match entry.file_name().to_bytes() {
                b"." | b".." => None,
                _ => self.find(&parent, entry.file_name()).ok(),
            };
            let found = found.unwrap_or_default();
            let added = add(directory_entry(entry), found);
            if !matches!(added, Ok(size) if size > 0) {
                self.inodes.forget(found.inode, 1);
            }
            added
        })
    }

    fn releasedir(&self, _context: &Context, inode: u64, _flags: u32, handle: u64) -> io::Result<()> {
        self.handles.remove(handle, inode)
    }

    fn fsyncdir(&self, context: &Context, inode: u64, data_only: bool, handle: u64) -> io::Result<()> {
        self.fsync(context, inode, data_only, handle)
    }

    fn setxattr(
        &self,
        context: &Context,
        inode: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
    ) -> io::Result<()> {
        check_writable_xattr(name)?;
        let inode = self.inodes.get(inode)?;
        // Whoever sets an access list without being in the file's group loses set-group-id (posix_acl_update_mode
        // of the kernel): the host's kernel judges by the requester's own ids.
        let judged = name == c"system.posix_acl_access" && context.uid != 0;
        let _without = judged.then(WithoutFsetid::new).transpose()?;
        let flags = XattrFlags::from_bits_retain(flags);
        Ok(rustix::fs::setxattr(xattr_path(&inode), name, value, flags)?)
    }

    fn getxattr(&self, _context: &Context, inode: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        let path = xattr_path(&*self.inodes.get(inode)?);
        if size == 0 {
            let length = rustix::fs::getxattr_query(path, name)?;
            return Ok(GetxattrReply::Count(u32::try_from(length).map_err(|_| Errno::OVERFLOW)?));
        }
        let mut value = vec![0; xattr_capacity(size)];
        let length = rustix::fs::getxattr(path, name, &mut value[..])?;
        value.truncate(length);
        Ok(GetxattrReply::Value(value))
    }

    fn listxattr(&self, _context: &Context, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        let path = xattr_path(&*self.inodes.get(inode)?);
        if size == 0 {
            let length = rustix::fs::listxattr_query(path)?;
            return Ok(ListxattrReply::Count(u32::try_from(length).map_err(|_| Errno::OVERFLOW)?));
        }
        let mut names = vec![0; xattr_capacity(size)];
        let length = rustix::fs::listxattr(path, &mut names[..])?;
        names.truncate(length);
        Ok(ListxattrReply::Names(names))
    }

    fn removexattr(&self, _context: &Context, inode: u64, name: &CStr) -> io::Result<()> {
        check_writable_xattr(name)?;
        let inode = self.inodes.get(inode)?;
        Ok(rustix::fs::removexattr(xattr_path(&inode), name)?)
    }
}

fn check_writable_xattr(name: &CStr) -> io::Result<()> {
    match WRITABLE_XATTRS.iter().any(|prefix| name.to_bytes().starts_with(prefix)) {
        true => Ok(()),
        false => Err(Errno::OPNOTSUPP.into()),
    }
}

/// What to reserve for an answer of at most `size` bytes.
fn xattr_capacity(size: u32) -> usize {
    usize::try_from(size).map_or(MAX_XATTR, |size| size.min(MAX_XATTR))
}

fn directory_entry<'a>(entry: &'a RawDirEntry<'_>) -> DirEntry<'a> {
    DirEntry {
        ino: entry.ino(),
        offset: entry.next_entry_cookie(),
        // DT_* are the type bits of a mode (include/linux/fs_types.h).
        type_: entry.file_type().as_raw_mode() >> 12,
        name: entry.file_name().to_bytes(),
    }
}

/// The system calls for extended attributes take no `O_PATH` descriptor.
fn xattr_path(inode: &Inode) -> String {
    format!("/proc/self/fd/{}", inode.as_fd().as_raw_fd())
}
