//! How a template is made, and tried: a machine is booted as for a pod, and saved when its agent has answered.

use std::fs::{self, DirBuilder, File};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use mayu_vmm_api::{Request, VmConfig, VmmClient};
use rustix::fs::{FlockOperation, flock};
use slog::{Logger, debug, info, warn};
use tokio::net::UnixStream;
use tokio::time::{sleep, timeout};

use super::{Description, Store, Template, checksum, machine, number, rehearsal};
use crate::Result;
use crate::agent::Agent;
use crate::config::Config;
use crate::console::{Console, Source};
use crate::error::file;
use crate::sandbox::{too_late, wait_for_agent, with_console};
use crate::saved::{self, Saved, WORKING_SET, now, remove, sync};
use crate::state_dir;
use crate::uids::Lease;
use crate::vmm_process::{Building, HostFiles, Origin, Spawned, VmmProcess};

/// How long a machine may take to report its free memory before it is saved without. A kernel of one's own may never do so.
const REPORTS: Duration = Duration::from_secs(10);

/// When nothing was reported for so long, all that was free has been.
const REPORTS_SETTLE: Duration = Duration::from_millis(100);

/// Makes the template of a configuration, where it is not there. None where another process is making one.
///
/// # Errors
/// The step that failed. Then there is none, or the one that there was.
pub async fn make(config: &Config, log: &Logger) -> Result<Option<Template>> {
    let store = Store::new(config);
    DirBuilder::new().recursive(true).mode(0o700).create(&store.root).map_err(file("create", &store.root))?;
    let Some(_lock) = store.lock()? else { return Ok(None) };
    let made = store.make(config, log).await;
    match &made {
        Err(reason) => store.note_failure(reason),
        Ok(_) => {
            let _ = fs::remove_file(store.root.join("failed"));
        }
    }
    made.map(Some)
}

/// Has [`make`] done by a process of its own, which outlives this one.
pub fn make_in_background(config: &Config, log: &Logger) {
    // A pod may be configured otherwise by its annotations. It starts without, for there could be any number of those.
    if Config::load().ok().as_ref().map(|of_node| &of_node.vm) != Some(&config.vm) {
        return;
    }
    let mut command = std::process::Command::new("/proc/self/exe");
    command.arg("template").current_dir("/").process_group(0);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    match tokio::process::Command::from(command).spawn() {
        Ok(mut maker) => {
            info!(log, "a template is being made"; "pid" => maker.id());
            tokio::spawn(async move { maker.wait().await });
        }
        Err(error) => warn!(log, "no template can be made"; "error" => error.to_string()),
    }
}

impl Store {
    /// None where another process has it.
    fn lock(&self) -> Result<Option<File>> {
        let path = self.root.join("lock");
        let lock = File::options().write(true).create(true).truncate(false).mode(0o600).open(&path);
        let lock = lock.map_err(file("open", &path))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(lock)),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(errno) => Err(file("lock", path)(errno.into())),
        }
    }

    async fn make(&self, config: &Config, log: &Logger) -> Result<Template> {
        let files = HostFiles::open(&config.vm)?;
        let machine = machine(&config.vm, &files)?;
        if let Some(template) = self.find(&machine)? {
            return Ok(template);
        }
        let new = self.root.join("new");
        remove(&new)?;
        for directory in [&new, &new.join("share")] {
            DirBuilder::new().mode(0o700).create(directory).map_err(file("create", directory))?;
        }
        save(config, &machine, files, &new, log).await?;
        rehearse(config, &machine, &new, log).await?;
        let description = describe(&machine, &new)?;
        let number = self
            .list()?
            .iter()
            .filter_map(|template| number(&template.path))
            .max()
            .map_or(1, |last| last + 1);
        let path = self.root.join(number.to_string());
        // One that has lost its description only.
        remove(&path)?;
        fs::rename(&new, &path).map_err(file("rename", &new))?;
        sync(&self.root)?;
        self.clean(&machine, log)?;
        let template = Template { path, description };
        info!(log, "template made"; "template" => template.path.display().to_string());
        Ok(template)
    }

    /// Takes away those from which no pod can go on any more, since what they are made of is gone.
    fn clean(&self, current: &VmConfig, log: &Logger) -> Result<()> {
        for template in self.list()? {
            if template.description.machine.made_of != current.made_of {
                debug!(log, "an old template is taken away"; "template" => template.path.display().to_string());
                template.delete()?;
            }
        }
        Ok(())
    }
}

/// Boots a machine with its memory in `new`, and saves it there.
async fn save(config: &Config, machine: &VmConfig, files: HostFiles, new: &Path, log: &Logger) -> Result<()> {
    let create = |name| {
        let path = new.join(name);
        let mut options = File::options();
        options.read(true).write(true).create_new(true).mode(0o600).open(&path).map_err(file("create", path))
    };
    let (memory, state) = (create("memory")?, create("state")?);
    memory.set_len(u64::from(machine.memory_mib) << 20).map_err(file("make room in", new.join("memory")))?;
    let origin = Origin::ToSave(memory.try_clone().map_err(file("share", new.join("memory")))?);
    let open = |name| File::open(new.join(name)).map_err(file("open", new.join(name)));
    let (of_vmm, to_read) = (state.try_clone().map_err(file("share", new.join("state")))?, open("memory")?);
    let parts = Parts { machine, files, origin, share: &new.join("share") };
    with_machine(config, parts, log, async |machine, _| {
        wait_for_reports(&machine.client, log).await?;
        machine.client.request(Request::Pause, &[]).await?;
        Ok(machine.client.request(Request::Save, &[of_vmm.as_fd(), to_read.as_fd()]).await?)
    })
    .await?;
    for (saved, name) in [(&memory, "memory"), (&state, "state")] {
        saved.sync_all().map_err(file("write back", new.join(name)))?;
    }
    Ok(())
}

/// Writes down what pods will touch. A template is of use without that.
async fn rehearse(config: &Config, machine: &VmConfig, new: &Path, log: &Logger) -> Result<()> {
    let share = new.join("share");
    let origin = Origin::Saved(Saved::open(new)?);
    let parts = Parts { machine, files: HostFiles::open(&config.vm)?, origin, share: &share };
    match rehearsal::working_set(config, parts, new, log).await {
        Ok(working_set) => {
            let path = new.join(WORKING_SET);
            let pages = working_set.container.iter().map(|pages| pages.count).sum::<u32>();
            info!(log, "what pods will touch is known"; "pages" => pages);
            working_set.to_bytes().and_then(|bytes| fs::write(&path, bytes)).map_err(file("write", &path))?;
            sync(&path)?;
        }
        Err(error) => warn!(log, "what pods will touch is not known"; "error" => error.to_string()),
    }
    remove(&share)
}

/// Waits until the guest has reported the memory that it does not use, which Linux does two seconds after its balloon has been
/// found. Each pod would do it anew otherwise, and have copies of its own of what the guest's kernel notes about that memory.
async fn wait_for_reports(client: &VmmClient, log: &Logger) -> Result<()> {
    let reported = async {
        let mut before = 0;
        loop {
            let now = client.status().await?.reported_mib;
            if now > 0 && now == before {
                return Ok(());
            }
            before = now;
            sleep(REPORTS_SETTLE).await;
        }
    };
    timeout(REPORTS, reported).await.unwrap_or_else(|_| {
        debug!(log, "the guest has not reported free memory, and is saved as it is");
        Ok(())
    })
}

/// Starts a machine from a template, as a pod does. Says how long it took until the agent had answered.
///
/// # Errors
/// Why the template is of no use.
pub async fn try_out(config: &Config, template: &Template, log: &Logger) -> Result<Duration> {
    // What a machine is started with has to be there, with nothing in it.
    let share = Store::new(config).root.join("share");
    DirBuilder::new().recursive(true).mode(0o700).create(&share).map_err(file("create", &share))?;
    let (machine, files) = (&template.description.machine, HostFiles::open(&config.vm)?);
    let parts = Parts { machine, files, origin: Origin::Saved(template.open()?), share: &share };
    let began = Instant::now();
    with_machine(config, parts, log, async |_, _| Ok(began.elapsed())).await
}

/// What a machine that is no pod's is started with.
pub(super) struct Parts<'a> {
    pub machine: &'a VmConfig,
    pub files: HostFiles,
    pub origin: Origin,
    pub share: &'a Path,
}

/// Runs a machine that is no pod's: does something with it when its agent has answered, and ends it.
pub(super) async fn with_machine<T>(
    config: &Config,
    Parts { machine, files, origin, share }: Parts<'_>,
    log: &Logger,
    then: impl AsyncFnOnce(&Spawned, &Agent) -> Result<T>,
) -> Result<T> {
    let (mut console, console_writer) = Console::pipe(Source::Guest, log.clone())?;
    let root = Path::new(state_dir::ROOT);
    DirBuilder::new().recursive(true).mode(0o711).create(root).map_err(file("create", root))?;
    let lease = Lease::take(root, config.vm.uids, "template")?;
    let machine = VmConfig { uid: lease.uid(), ..machine.clone() };
    let building =
        Building { machine, files, origin, share: share.into(), console: console_writer, cgroup: None };
    let mut spawned = VmmProcess::spawn(config, building, lease, log).await?;
    let done = async {
        let (_ready, agent) = answering(config, &mut spawned, log).await?;
        then(&spawned, &agent).await
    };
    let done = done.await;
    let end = spawned.process.kill().await;
    match done {
        Err(error) => Err(with_console(error, &end, console.final_tail().await)),
        done => done,
    }
}

/// Lets the machine run until its agent has answered. Gives the connections to it.
async fn answering(config: &Config, spawned: &mut Spawned, log: &Logger) -> Result<(UnixStream, Agent)> {
    let boot = async {
        spawned.built().await?;
        spawned.client.request(Request::Resume, &[]).await?;
        let (ready, agent) = wait_for_agent(spawned, &config.timeouts, log).await?;
        agent.health().await?;
        Ok((ready, agent))
    };
    timeout(config.timeouts.boot(), boot).await.map_err(|_| too_late(config))?
}

/// Writes down what was saved.
fn describe(machine: &VmConfig, new: &Path) -> Result<Description> {
    let path = new.join("memory");
    let mut memory = File::open(&path).map_err(file("open", &path))?;
    let memory_checksum = checksum(&mut memory).map_err(file("read", &path))?;
    let description = Description { machine: machine.clone(), made: now(), memory_checksum };
    saved::describe(new, &description)?;
    Ok(description)
}
