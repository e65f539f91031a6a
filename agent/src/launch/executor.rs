//! The last steps of a container process before its program: finding it, confining it, executing it.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::CString;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use libcontainer::capabilities::drop_privileges;
use libcontainer::syscall::syscall::create_syscall;
use libcontainer::workload::{Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError};
use nix::errno::Errno;
use nix::unistd::{AccessFlags, access, execve};
use oci_spec::runtime::{LinuxCapabilities, LinuxSeccomp, Process, Spec};

use super::seccomp;

/// Executes a container process's program. libcontainer's own executor differs from runc where a user notices:
/// in its messages, in the order of the environment, and in that it reports no failure to execute an init.
#[derive(Clone)]
pub struct ProgramExecutor {
    failure_pipe: Option<Rc<OwnedFd>>,
    seccomp: Option<LinuxSeccomp>,
    capabilities: Option<LinuxCapabilities>,
    program: Rc<RefCell<PathBuf>>,
}

impl Executor for ProgramExecutor {
    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        let process = process(spec).map_err(ExecutorValidationError::ArgValidationError)?;
        let name = process.args().iter().flatten().next().map(String::as_str).unwrap_or_default();
        let program = find_program(name, search_path(process)).map_err(|reason| {
            ExecutorValidationError::ArgValidationError(format!("exec: {name:?}: {reason}"))
        })?;
        *self.program.borrow_mut() = program;
        Ok(())
    }

    fn setup_envs(&self, _: HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        // The program gets its environment when it is executed.
        Ok(())
    }

    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let reason = match self.execute(spec) {
            Ok(never) => match never {},
            Err(reason) => reason,
        };
        if let Some(pipe) = &self.failure_pipe
            && let Ok(pipe) = pipe.try_clone()
        {
            // Whoever listens has gone if this fails; the process ends in any case.
            let _ = std::fs::File::from(pipe).write_all(reason.as_bytes());
        }
        Err(ExecutorError::Other(reason))
    }
}

impl ProgramExecutor {
    /// An executor that says into `failure_pipe` why it could not execute the program, installs the filter
    /// `seccomp` first, which libcontainer does not do for an exec, and then gives up all but `capabilities`, if
    /// the filter can be installed only with the others.
    pub fn new(
        failure_pipe: Option<OwnedFd>,
        seccomp: Option<LinuxSeccomp>,
        capabilities: Option<LinuxCapabilities>,
    ) -> Self {
        Self { failure_pipe: failure_pipe.map(Rc::new), seccomp, capabilities, program: Rc::default() }
    }

    fn execute(&self, spec: &Spec) -> Result<std::convert::Infallible, String> {
        let process = process(spec)?;
        let arguments = c_strings(process.args().iter().flatten())?;
        let environment = c_strings(environment(process.env().as_deref().unwrap_or_default()))?;
        let program = self.program.borrow();
        let path = c_strings([program.to_string_lossy()])?.remove(0);
        if let Some(seccomp) = &self.seccomp {
            seccomp::install(seccomp)?;
        }
        if let Some(capabilities) = &self.capabilities {
            drop_privileges(capabilities, create_syscall().as_ref())
                .map_err(|error| format!("drop capabilities: {error}"))?;
        }
        execve(&path, &arguments, &environment)
            .map_err(|errno| format!("exec {}: {}", program.display(), describe(errno)))
    }
}

fn process(spec: &Spec) -> Result<&Process, String> {
    spec.process().as_ref().ok_or_else(|| "the spec has no process".to_owned())
}

fn search_path(process: &Process) -> &str {
    process.env().iter().flatten().rev().find_map(|entry| entry.strip_prefix("PATH=")).unwrap_or_default()
}

/// Finds a program as Go's `exec.LookPath` does, whose messages users know from runc.
fn find_program(name: &str, search_path: &str) -> Result<PathBuf, String> {
    if name.contains('/') {
        return check_program(Path::new(name)).map(|()| name.into()).map_err(|errno| match errno {
            Errno::ENOENT | Errno::ENOTDIR => format!("stat {name}: {}", describe(errno)),
            other => describe(other),
        });
    }
    let found = search_path
        .split(':')
        .map(|directory| Path::new(if directory.is_empty() { "." } else { directory }).join(name))
        .find(|candidate| !name.is_empty() && check_program(candidate).is_ok());
    found.ok_or_else(|| "executable file not found in $PATH".to_owned())
}

fn check_program(path: &Path) -> Result<(), Errno> {
    let error = |error: std::io::Error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
    let metadata = path.metadata().map_err(error)?;
    if metadata.is_dir() {
        return Err(Errno::EISDIR);
    }
    if metadata.permissions().mode() & 0o111 == 0 {
        return Err(Errno::EACCES);
    }
    access(path, AccessFlags::X_OK)
}

/// The entries without those that a later one of the same name replaces.
fn environment(entries: &[String]) -> impl Iterator<Item = &String> {
    let name = |entry: &str| entry.split('=').next().unwrap_or_default().to_owned();
    entries.iter().enumerate().filter_map(move |(index, entry)| {
        let replaced = entries[index + 1..].iter().any(|later| name(later) == name(entry));
        (!replaced).then_some(entry)
    })
}

fn c_strings<S: AsRef<str>>(strings: impl IntoIterator<Item = S>) -> Result<Vec<CString>, String> {
    let convert = |text: S| {
        CString::new(text.as_ref()).map_err(|_| format!("{:?} contains a NUL character", text.as_ref()))
    };
    strings.into_iter().map(convert).collect()
}

/// The errno's text in the form Go prints it.
fn describe(errno: Errno) -> String {
    let text = errno.desc();
    let mut letters = text.chars();
    letters.next().map(|first| first.to_lowercase().chain(letters).collect()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_program_is_found_as_go_finds_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        fs::create_dir(path("first")).unwrap();
        fs::create_dir(path("second")).unwrap();
        fs::write(path("first/tool"), "not executable").unwrap();
        fs::write(path("second/tool"), "executable").unwrap();
        fs::set_permissions(path("second/tool"), fs::Permissions::from_mode(0o755)).unwrap();
        let search = format!("/no/such:{}:{}", path("first").display(), path("second").display());
        let find = |name: &str| find_program(name, &search);
        let absolute = |name: &str| path(name).to_str().unwrap().to_owned();

        assert_eq!(find("tool"), Ok(path("second/tool")));
        assert_eq!(find(&absolute("second/tool")), Ok(path("second/tool")));
        assert_eq!(find("tol").unwrap_err(), "executable file not found in $PATH");
        assert_eq!(find("").unwrap_err(), "executable file not found in $PATH");
        assert_eq!(find_program("tool", "").unwrap_err(), "executable file not found in $PATH");
        assert_eq!(find("/no/tool").unwrap_err(), "stat /no/tool: no such file or directory");
        assert_eq!(find(&absolute("first/tool")).unwrap_err(), "permission denied");
        assert_eq!(find(&absolute("first")).unwrap_err(), "is a directory");
    }

    #[test]
    fn the_last_of_equal_names_stays_in_its_place() {
        let entries = ["A=1", "B=2", "A=3", "C", "AB=4"].map(str::to_owned);

        let kept: Vec<_> = environment(&entries).map(String::as_str).collect();

        assert_eq!(kept, ["B=2", "A=3", "C", "AB=4"]);
    }

    #[test]
    fn a_nul_character_is_refused() {
        assert!(c_strings(["a\0b"]).unwrap_err().contains("NUL"));
    }
}
