//! The process itself. The containers of its namespace see it, and one that may trace others may trace it; so it gives up all
//! that it has before the first of them is there.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::{set_name, set_no_new_privs};
use nix::unistd::{Gid, Uid, chdir, dup2_stderr, pivot_root, setgid, setgroups, setuid};

use super::READY;
use crate::error::{Error, Result};
use crate::sys;

/// A user who owns nothing: that of Kubernetes' own pause image.
const NOBODY: u32 = 65535;
/// What kubelet gives a pod's pause process. The whole pod ends with this one, so it is the last to be killed for memory.
const OOM_SCORE: &str = "-998";
/// Any directory that is there in a guest and on a host.
const MOUNT_POINT: &str = "/proc";

/// Is there until the standard input ends. As PID 1 of its namespace it gets no signal from inside that it does not handle, and
/// it handles none.
pub fn main() -> ExitCode {
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mayu-agent pause: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve() -> Result<()> {
    set_name(c"pause").map_err(Error::system("set the process's name"))?;
    sys::let_kernel_collect_children().map_err(Error::system("ignore SIGCHLD"))?;
    let mut lifeline = io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .map(UnixStream::from)
        .map_err(Error::io("take the lifeline"))?;
    confine()?;
    lifeline.write_all(&[READY]).map_err(Error::io("announce the process"))?;
    loop {
        match lifeline.read(&mut [0]) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            // The other end never writes.
            _ => return Ok(()),
        }
    }
}

/// Gives up the file system, the console, the user and all privileges.
fn confine() -> Result<()> {
    // Refused where the agent is not the guest's, but a test's without CAP_SYS_RESOURCE; then it is as likely a victim as any.
    let _ = fs::write("/proc/self/oom_score_adj", OOM_SCORE);
    let null = File::options().write(true).open("/dev/null").map_err(Error::file("open", "/dev/null"))?;
    enter_empty_root().map_err(Error::system("enter an empty root"))?;
    setgroups(&[])
        .and_then(|()| setgid(Gid::from_raw(NOBODY)))
        .and_then(|()| setuid(Uid::from_raw(NOBODY)))
        .and_then(|()| set_no_new_privs())
        .map_err(Error::system("become nobody"))?;
    dup2_stderr(null).map_err(Error::system("leave the console"))
}

fn enter_empty_root() -> nix::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("pause"), MOUNT_POINT, Some("tmpfs"), flags, Some("mode=555"))?;
    chdir(MOUNT_POINT)?;
    // The old root ends up on top of the new one and is unmounted from there, pivot_root(2).
    pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    chdir("/")
}
