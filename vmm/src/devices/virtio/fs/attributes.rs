//! Reading and changing what an inode says of itself.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use fuse_backend_rs::abi::fuse_abi::stat64;
use fuse_backend_rs::api::filesystem::{Entry, SetattrValid};
use rustix::fs::{
    AtFlags, Gid, Mode, Statx, StatxTimestamp, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, Uid, chmodat,
    chownat, makedev, utimensat,
};
use rustix::io::Errno;
use rustix::path::DecInt;

/// The part of `stat` that FUSE sends.
pub(super) fn from_statx(stat: &Statx) -> stat64 {
    // The struct has private fields; an empty entry has a zeroed one.
    let mut attributes = Entry::default().attr;
    attributes.st_ino = stat.stx_ino;
    attributes.st_mode = u32::from(stat.stx_mode);
    attributes.st_nlink = u64::from(stat.stx_nlink);
    attributes.st_uid = stat.stx_uid;
    attributes.st_gid = stat.stx_gid;
    attributes.st_rdev = makedev(stat.stx_rdev_major, stat.stx_rdev_minor);
    attributes.st_size = stat.stx_size.cast_signed();
    attributes.st_blksize = i64::from(stat.stx_blksize);
    attributes.st_blocks = stat.stx_blocks.cast_signed();
    (attributes.st_atime, attributes.st_atime_nsec) = time(&stat.stx_atime);
    (attributes.st_mtime, attributes.st_mtime_nsec) = time(&stat.stx_mtime);
    (attributes.st_ctime, attributes.st_ctime_nsec) = time(&stat.stx_ctime);
    attributes
}

fn time(time: &StatxTimestamp) -> (i64, i64) {
    (time.tv_sec, i64::from(time.tv_nsec))
}

/// `chmod` through `descriptors`, which is `/proc/self/fd`. Fails for a symbolic link, which has no mode.
pub(super) fn set_mode(descriptors: &OwnedFd, inode: &impl AsFd, mode: u32) -> io::Result<()> {
    let mode = Mode::from_raw_mode(mode);
    Ok(chmodat(descriptors, DecInt::from_fd(inode), mode, AtFlags::empty())?)
}

/// `chown`, of a symbolic link itself.
pub(super) fn set_owner(inode: &impl AsFd, uid: Option<u32>, gid: Option<u32>) -> io::Result<()> {
    // -1 would mean to leave it, and is no id.
    if uid == Some(u32::MAX) || gid == Some(u32::MAX) {
        return Err(Errno::INVAL.into());
    }
    let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
    Ok(chownat(inode, c"", uid, gid, AtFlags::EMPTY_PATH)?)
}

/// `utimensat` through `descriptors`, which is `/proc/self/fd`; of a symbolic link itself.
pub(super) fn set_times(
    descriptors: &OwnedFd,
    inode: &impl AsFd,
    attributes: &stat64,
    valid: SetattrValid,
) -> io::Result<()> {
    let time = |set, now, seconds, nanoseconds| match (valid.contains(now), valid.contains(set)) {
        (true, _) => Timespec { tv_sec: 0, tv_nsec: UTIME_NOW },
        (false, true) => Timespec { tv_sec: seconds, tv_nsec: nanoseconds },
        (false, false) => Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
    };
    let times = Timestamps {
        last_access: time(
            SetattrValid::ATIME,
            SetattrValid::ATIME_NOW,
            attributes.st_atime,
            attributes.st_atime_nsec,
        ),
        last_modification: time(
            SetattrValid::MTIME,
            SetattrValid::MTIME_NOW,
            attributes.st_mtime,
            attributes.st_mtime_nsec,
        ),
    };
    Ok(utimensat(descriptors, DecInt::from_fd(inode), &times, AtFlags::empty())?)
}
