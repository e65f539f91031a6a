//! How a suspended container becomes another one, and goes on.

use std::fs::File;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use mayu_agent_api::HOOK;
use nix::sched::{CloneFlags, setns};
use nix::unistd::sethostname;
use oci_spec::runtime::Spec;
use slog::o;
use tokio::time::timeout;

use super::{Container, Exec, Inner};
use crate::blocking::blocking;
use crate::error::{Error, Result};
use crate::process::Process;
use crate::reaper::Exit;
use crate::spec::{self, ProcessPlan};
use crate::state::State;
use crate::stdio::{ExpectedStdio, StdioRequest};

/// What a suspended container is to be when it goes on.
pub struct Adoption {
    environment: Vec<String>,
    process: ProcessPlan,
    hostname: Option<String>,
    hook: Option<Exec>,
}

impl Container {
    /// This suspended container as the one of `id`, yet to be started with the environment, the host name and the hook of `spec`. Nobody
    /// can do anything with it under its former id any more.
    ///
    /// # Errors
    ///
    /// `InvalidSpec`, `InvalidRequest` for bad streams, `WrongState`, `NotSuspended`, `Finished`. Nothing has changed then.
    pub fn adopt(&self, id: &str, stdio: StdioRequest, spec: &Spec) -> Result<Arc<Self>> {
        let adoption = self.plan_adoption(id, spec)?;
        let expected = stdio.expect(&self.runtime.streams)?;
        let take_over = |pid| self.runtime.reaper.take_over(pid);
        let (init, exit) = self.init.adopt(id, stdio, expected, take_over)?;
        if let Some(watch) = self.inner().memory_watch.take() {
            watch.abort();
        }
        let container = Arc::new(Self {
            id: id.to_owned(),
            name: self.name.clone(),
            runtime: Arc::clone(&self.runtime),
            cgroup: self.cgroup.clone(),
            init: Arc::new(init),
            plan: self.plan.clone(),
            inner: Mutex::new(Inner { adoption: Some(adoption), ..Inner::default() }),
            oom_kills: AtomicU64::new(self.oom_kills.load(Ordering::Relaxed)),
            log: self.runtime.log.new(o!("container" => id.to_owned())),
        });
        container.watch_exit(Arc::clone(&container.init), exit);
        container.watch_memory();
        Ok(container)
    }

    fn plan_adoption(&self, id: &str, spec: &Spec) -> Result<Adoption> {
        let mut process = spec.process().clone().ok_or_else(|| spec::missing("process"))?;
        let environment = process.env().clone().unwrap_or_default();
        let hook = spec::annotation(spec, HOOK);
        if let Some(hook) = hook {
            process.set_args(Some(vec![hook.to_owned()]));
        }
        let root = PathBuf::from(format!("/proc/{}/root", self.init.pid()));
        let plan = spec::adapt_process(&mut process, &root, false, self.plan.seccomp.is_some())?;
        let hook = hook.map(|_| {
            let (stdio, expected) = (StdioRequest::default(), ExpectedStdio::default());
            Exec {
                process: Arc::new(Process::new(id, "hook", stdio, expected, State::Starting)),
                spec: Arc::new(process),
                plan: Arc::new(plan.clone()),
            }
        });
        let hostname = spec.hostname().clone().filter(|_| self.plan.own_uts_namespace);
        Ok(Adoption { environment, process: plan, hostname, hook })
    }

    /// Has an adopted container go on as what it has become.
    ///
    /// # Errors
    ///
    /// `MissingStream`, `Hook`, or what the kernel refused.
    pub(super) async fn start_adopted(&self, adoption: Adoption) -> Result<()> {
        let connected = self.init.connect(self.runtime.stream_deadline).await?;
        self.init.copy(connected, self.init.parked_ends()?);
        if let Some(hostname) = adoption.hostname.filter(|name| !name.is_empty()) {
            let pid = self.init.pid();
            blocking(move || set_hostname(pid, &hostname)).await?;
        }
        let root = self.runtime.root(&self.name);
        root.write_environment(&adoption.environment, adoption.process.user)?;
        self.cgroup.freeze(false).await?;
        self.set_console_size(&self.init, &adoption.process);
        match adoption.hook {
            Some(hook) => self.run_hook(&hook).await,
            None => Ok(()),
        }
    }

    /// Runs a process of which the shim does not know to its end.
    async fn run_hook(&self, hook: &Exec) -> Result<()> {
        let failed = |reason: String| {
            let program = hook.spec.args().iter().flatten().next().cloned().unwrap_or_default();
            Err(Error::Hook { hook: program, container: self.id.clone(), reason })
        };
        let launched = match self.launch_exec(hook).await {
            Ok((launched, _)) => launched,
            Err(error) => return failed(format!("could not be run: {error}")),
        };
        let deadline = self.runtime.launcher.deadline;
        match timeout(deadline, launched.exit).await {
            Ok(Ok(Exit { status: 0, .. })) => Ok(()),
            Ok(Ok(exit)) => failed(format!("ended with status {}", exit.status)),
            // The reaper never drops what it watches.
            Ok(Err(_)) => failed("was lost".into()),
            // It is killed with its container.
            Err(_) => failed(format!("took longer than {} s", deadline.as_secs())),
        }
    }
}

/// Sets the host name where the process `pid` sees it. A namespace is entered by a thread, which cannot come back and so ends.
fn set_hostname(pid: u32, hostname: &str) -> Result<()> {
    let path = format!("/proc/{pid}/ns/uts");
    let namespace = File::open(&path).map_err(Error::file("open", &path))?;
    thread::scope(|scope| {
        let set = || setns(namespace, CloneFlags::CLONE_NEWUTS).and_then(|()| sethostname(hostname));
        let thread = thread::Builder::new().spawn_scoped(scope, set).map_err(Error::io("start a thread"))?;
        match thread.join() {
            Ok(set) => set.map_err(Error::system("set the host name of the container")),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}
