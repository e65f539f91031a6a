//! A container's seccomp filter.

use libcontainer::seccomp::{initialize_seccomp, is_notify};
use libseccomp::ScmpSyscall;
use oci_spec::runtime::{LinuxSeccomp, LinuxSeccompAction};

use crate::sys;

/// Installs the filter, which needs no_new_privs or CAP_SYS_ADMIN.
///
/// # Errors
///
/// What libseccomp or the kernel refused, in words.
pub fn install(seccomp: &LinuxSeccomp) -> Result<(), String> {
    if is_notify(seccomp) {
        return Err("seccomp: SCMP_ACT_NOTIFY is not supported: nobody in the guest could answer".into());
    }
    initialize_seccomp(seccomp).map_err(|error| format!("seccomp: {error}"))?;
    if let Some(newest) = newest_known(seccomp) {
        // Refused where the filter itself forbids another one; then the container does without.
        let _ = sys::refuse_syscalls_after(newest);
    }
    Ok(())
}

/// The newest syscall that a list of allowed ones knows, if those not listed fail with an error of its choice.
///
/// A list cannot tell what it forbids from what is newer than it, as fchmodat2 in the eyes of an older
/// libseccomp. A C library that gets EPERM for such a syscall gives up, where ENOSYS would have it use the older
/// one. So all syscalls after the newest known fail with ENOSYS, as with runc (libcontainer/seccomp/patchbpf).
fn newest_known(seccomp: &LinuxSeccomp) -> Option<u32> {
    if seccomp.default_action() != LinuxSeccompAction::ScmpActErrno {
        return None;
    }
    let names = seccomp.syscalls().iter().flatten().flat_map(|rule| rule.names());
    let numbers = names.filter_map(|name| Some(i32::from(ScmpSyscall::from_name(name).ok()?)));
    // Those of other architectures have negative numbers here.
    numbers.filter_map(|number| u32::try_from(number).ok()).max()
}

#[cfg(test)]
mod tests {
    use nix::errno::Errno;
    use serde_json::{Value, json};

    use super::*;

    fn profile(value: Value) -> LinuxSeccomp {
        serde_json::from_value(value).unwrap()
    }

    /// Allows all syscalls up to that of `newest`, by name, but not `sethostname`.
    fn allow_list(newest: u32) -> LinuxSeccomp {
        let name = |number: u32| ScmpSyscall::from_raw_syscall(number.cast_signed()).get_name().ok();
        let names: Vec<String> = (0..=newest).filter_map(name).filter(|name| name != "sethostname").collect();
        profile(json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "defaultErrnoRet": libc::EPERM,
            "syscalls": [{"names": names, "action": "SCMP_ACT_ALLOW"}],
        }))
    }

    #[test]
    fn what_is_forbidden_is_told_from_what_is_unknown() {
        let newest = u32::try_from(libc::SYS_clone3).unwrap();
        let seccomp = allow_list(newest);
        assert_eq!(newest_known(&seccomp), Some(newest));

        // Filters are a thread's own.
        let confined = std::thread::spawn(move || {
            nix::sys::prctl::set_no_new_privs().unwrap();
            install(&seccomp).unwrap();
            let forbidden = nix::unistd::sethostname("x");
            // openat2, faccessat2 and pidfd_getfd came after clone3.
            let how = nix::fcntl::OpenHow::new();
            let newer = nix::fcntl::openat2(nix::fcntl::AT_FDCWD, "/", how).map(drop);
            (forbidden, newer)
        });

        assert_eq!(confined.join().unwrap(), (Err(Errno::EPERM), Err(Errno::ENOSYS)));
    }

    #[test]
    fn other_lists_are_left_alone() {
        let forbids = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO"}],
        });
        assert_eq!(newest_known(&profile(forbids)), None);

        let only_unknown = json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "syscalls": [{"names": ["no_such_syscall", "waitpid"], "action": "SCMP_ACT_ALLOW"}],
        });
        assert_eq!(newest_known(&profile(only_unknown)), None);
    }

    #[test]
    fn what_nobody_could_answer_is_refused() {
        let asks = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"}],
        });

        assert!(install(&profile(asks)).unwrap_err().contains("not supported"));
    }
}
