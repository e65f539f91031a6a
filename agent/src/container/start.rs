//! How a container and its processes come to life.

use std::fs;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use libcontainer::notify_socket::NOTIFY_FILE;
use mayu_agent_api::ENVIRONMENT_FILE;
use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use oci_spec::runtime::{Mount, Spec};
use slog::{debug, warn};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

use super::{Container, Exec};
use crate::cgroup::{Cgroup, all_oom_kills};
use crate::error::{Error, Result};
use crate::launch::{Launched, ProcessKind, Request};
use crate::process::Process;
use crate::reaper::Exit;
use crate::spec::ProcessPlan;
use crate::state::Action;
use crate::stdio::Ends;
use crate::sysctl;

/// The container's seccomp filter in its bundle.
const SECCOMP_FILE: &str = "seccomp.json";
/// The longest reason taken from a process that could not execute its program, in bytes.
const MAX_FAILURE: u64 = 4096;
/// The status of an exec that never ran its program, as shells report it.
const NOT_STARTED: u32 = 255;

impl Container {
    /// Makes everything the container needs and its init process, which then waits to be started.
    ///
    /// # Errors
    ///
    /// `Launch` with libcontainer's reason, `LaunchDeadline`, or what the kernel refused. Nothing is left then.
    pub async fn set_up(self: &Arc<Self>, spec: Spec) -> Result<()> {
        let launched = match self.launch_init(spec).await {
            Ok(launched) => launched,
            Err(error) => {
                if let Err(error) = self.remove_files().await {
                    warn!(self.log, "cannot clean up after a failed create"; "error" => %error);
                }
                return Err(error);
            }
        };
        self.init.launched(launched.pid, launched.terminal);
        self.init.advance(Action::FinishCreate)?;
        self.watch_exit(Arc::clone(&self.init), launched.exit);
        self.watch_memory();
        self.set_console_size(&self.init, &self.plan.process);
        Ok(())
    }

    pub(super) fn set_console_size(&self, process: &Process, plan: &ProcessPlan) {
        if let Some((columns, rows)) = plan.console_size.filter(|_| process.stdio().terminal)
            && let Err(error) = process.resize(columns, rows)
        {
            // The process may have ended.
            debug!(self.log, "cannot set the terminal's size"; "error" => %error);
        }
    }

    async fn launch_init(&self, mut spec: Spec) -> Result<Launched> {
        let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
        let devices = resources.and_then(|resources| resources.devices().as_deref());
        self.cgroup.create(devices.unwrap_or_default())?;
        self.without_swap(spec.linux_mut().as_mut().and_then(|linux| linux.resources_mut().as_mut()));
        for (key, value) in &self.plan.network_sysctls {
            sysctl::set(key, value)?;
        }
        if self.plan.warm {
            self.mount_root(&mut spec)?;
        }
        let bundle = self.runtime.bundle(&self.name);
        fs::create_dir_all(&bundle).map_err(Error::file("create", &bundle))?;
        write_json(bundle.join("config.json"), &spec)?;
        if let Some(seccomp) = &self.plan.seccomp {
            write_json(bundle.join(SECCOMP_FILE), seccomp)?;
        }

        let (ends, mut descriptors) = pipes(&self.init, self.plan.process.user)?;
        let (read, write) = pipe2(OFlag::O_CLOEXEC).map_err(Error::system("make a pipe"))?;
        let read = pipe::Receiver::from_owned_fd(read).map_err(Error::io("watch a pipe"))?;
        {
            let mut inner = self.inner();
            inner.ends = Some(ends);
            inner.failure = Some(read);
        }
        descriptors.push(write);
        let work = WorkDirectory::create(self.runtime.fresh_path())?;
        self.launch(&self.init, &self.plan.process, ProcessKind::Init { bundle }, &work, descriptors).await
    }

    /// Has the container's changes stay in the guest's memory, and gives it the file of its environment.
    fn mount_root(&self, spec: &mut Spec) -> Result<()> {
        let Some(lower) = spec.root_mut() else { return Ok(()) };
        let root = self.runtime.root(&self.name);
        root.mount(lower.path())?;
        lower.set_path(root.path());
        root.write_environment(&self.plan.environment, self.plan.process.user)?;
        let mut file = Mount::default();
        file.set_destination(ENVIRONMENT_FILE.into())
            .set_typ(Some("bind".into()))
            .set_source(Some(root.environment()))
            .set_options(Some(["bind", "ro", "nosuid", "nodev", "noexec"].map(str::to_owned).into()));
        // The last, for it may lie on another.
        spec.mounts_mut().get_or_insert_default().push(file);
        Ok(())
    }

    /// Runs the init's or an exec's program and returns the pid.
    ///
    /// # Errors
    ///
    /// `WrongState`, `MissingStream`, `Launch` with the reason the program could not be executed.
    pub async fn start(self: &Arc<Self>, exec_id: &str) -> Result<u32> {
        if exec_id.is_empty() {
            self.init.advance(Action::Start)?;
            let adoption = self.inner().adoption.take();
            let started = match adoption {
                Some(adoption) => self.start_adopted(adoption).await,
                None => self.start_init().await,
            };
            if started.is_err() {
                // It waits for a start that will not come.
                let _ = self.init.kill(libc::SIGKILL, &self.runtime.reaper);
            }
            started?;
            self.init.started();
            return Ok(self.init.pid());
        }
        let exec = self.exec_of(exec_id)?;
        self.init.advance(Action::Exec)?;
        exec.process.advance(Action::Start)?;
        if let Err(error) = self.start_exec(&exec).await {
            if exec.process.pid() == 0 {
                exec.process.exited(Exit { status: NOT_STARTED, at: SystemTime::now() });
            } else {
                // It runs without its streams.
                let _ = exec.process.kill(libc::SIGKILL, &self.runtime.reaper);
            }
            return Err(error);
        }
        exec.process.started();
        Ok(exec.process.pid())
    }

    async fn start_init(&self) -> Result<()> {
        let connected = self.init.connect(self.runtime.stream_deadline).await?;
        let pipes = self.inner().ends.take().unwrap_or_default();
        let ends = if self.init.stdio().terminal { self.init.terminal_ends()? } else { pipes };
        self.init.copy(connected, ends);
        let failure = self.inner().failure.take();

        // libcontainer's init waits for a connection to this socket. The path is short enough for one: an id
        // has 76 characters at most.
        let socket = self.runtime.state_directory().join(&self.name).join(NOTIFY_FILE);
        UnixStream::connect(&socket)
            .and_then(|mut stream| stream.write_all(b"start container"))
            .map_err(Error::file("connect to", &socket))?;

        // The pipe ends when the program is executed; or when the process dies, which is its exit's business.
        let mut reason = String::new();
        if let Some(failure) = failure {
            failure
                .take(MAX_FAILURE)
                .read_to_string(&mut reason)
                .await
                .map_err(Error::io("wait for the program to be executed"))?;
        }
        if reason.is_empty() { Ok(()) } else { Err(Error::Launch(reason)) }
    }

    async fn start_exec(self: &Arc<Self>, exec: &Exec) -> Result<()> {
        let process = &exec.process;
        let connected = process.connect(self.runtime.stream_deadline).await?;
        let (launched, ends) = self.launch_exec(exec).await?;
        process.launched(launched.pid, launched.terminal);
        self.watch_exit(Arc::clone(process), launched.exit);
        let ends = if process.stdio().terminal { process.terminal_ends()? } else { ends };
        process.copy(connected, ends);
        self.set_console_size(process, &exec.plan);
        Ok(())
    }

    /// Runs the program of `exec`; the ends of its pipes come with it.
    pub(super) async fn launch_exec(&self, exec: &Exec) -> Result<(Launched, Ends)> {
        let process = &exec.process;
        let (ends, descriptors) = pipes(process, exec.plan.user)?;
        let work = WorkDirectory::create(self.runtime.fresh_path())?;
        let file = work.path.join("process.json");
        write_json(file.clone(), exec.spec.as_ref())?;
        let kind = ProcessKind::Exec { process: file, sub_cgroup: self.init_cgroup() };
        let launched = self.launch(process, &exec.plan, kind, &work, descriptors).await?;
        Ok((launched, ends))
    }

    async fn launch(
        &self,
        process: &Process,
        plan: &ProcessPlan,
        kind: ProcessKind,
        work: &WorkDirectory,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Launched> {
        let request = Request {
            id: self.name.clone(),
            state_directory: self.runtime.state_directory(),
            work_directory: work.path.clone(),
            terminal: process.stdio().terminal,
            user: plan.user,
            seccomp: self.plan.seccomp.as_ref().map(|_| self.runtime.bundle(&self.name).join(SECCOMP_FILE)),
            capabilities: plan.capabilities.clone(),
            process: kind,
        };
        let oom_kills = all_oom_kills();
        let launched = self.runtime.launcher.launch(&self.runtime.reaper, &request, descriptors).await;
        match launched {
            // libcontainer sees a process vanish, and has removed the cgroup by now that would tell why.
            Err(Error::Launch(reason)) if all_oom_kills() > oom_kills => {
                Err(Error::Launch(format!("out of memory: is the memory limit too low? {reason}")))
            }
            // The launcher knows the container by its name only.
            Err(Error::LaunchDeadline { seconds, .. }) => {
                Err(Error::LaunchDeadline { process: process.to_string(), seconds })
            }
            launched => launched,
        }
    }

    /// The cgroup of the init below the container's own, where it has moved to one: a cgroup with controllers
    /// for its children takes no processes.
    fn init_cgroup(&self) -> Option<String> {
        let text = fs::read_to_string(format!("/proc/{}/cgroup", self.init.pid())).ok()?;
        let own = Cgroup::spec_path(&self.name);
        // cgroups(7): "0::/path".
        let path = text.lines().find_map(|line| line.strip_prefix("0::"))?;
        let below = path.strip_prefix(own.to_str()?)?.trim_start_matches('/');
        (!below.is_empty()).then(|| below.to_owned())
    }
}

/// A directory for one launch.
struct WorkDirectory {
    path: PathBuf,
}

impl WorkDirectory {
    fn create(path: PathBuf) -> Result<Self> {
        fs::create_dir(&path).map_err(Error::file("create", &path))?;
        Ok(Self { path })
    }
}

impl Drop for WorkDirectory {
    fn drop(&mut self) {
        // It is on a tmpfs that nobody else writes to.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// The agent's ends of the pipes of `process` and its own, to launch it with; none for a terminal.
fn pipes(process: &Process, user: (u32, u32)) -> Result<(Ends, Vec<OwnedFd>)> {
    if process.stdio().terminal {
        return Ok((Ends::default(), Vec::new()));
    }
    let (ends, child) = process.stdio().pipes(user)?;
    Ok((ends, child.into()))
}

fn write_json(path: PathBuf, value: &impl serde::Serialize) -> Result<()> {
    let text = serde_json::to_vec(value).map_err(|error| Error::InvalidSpec(error.to_string()))?;
    fs::write(&path, text).map_err(Error::file("write", path))
}
