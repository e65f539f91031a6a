//! What the pods of a template will touch of its memory: a machine goes on from it as a pod's does, runs a container, and is looked at
//! meanwhile.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use containerd_shim_protos::api::{CreateTaskRequest, DeleteRequest, StartRequest};
use containerd_shim_protos::shim_async::TaskClient;
use mayu_agent_api::SPEC_TYPE_URL;
use mayu_agent_api::sandbox::ConfigureNetworkRequest;
use mayu_agent_api::sandbox::event::Event;
use mayu_vmm_api::WorkingSet;
use oci_spec::runtime::{ProcessBuilder, Spec};
use protobuf::MessageField;
use rustix::fs::{Advice, fadvise};
use slog::Logger;
use tokio::time::timeout;
use ttrpc::context::Context;

use super::make::{Parts, with_machine};
use crate::agent::Agent;
use crate::config::Config;
use crate::container::PidNamespace;
use crate::error::file;
use crate::pod::any;
use crate::spec::{self, GuestSpec, Origin};
use crate::touched::{is_page_cache, join, touched};
use crate::{Error, Result};

/// The container's id.
const ID: &str = "rehearsal";

/// What it runs, in its root directory: a program that is on every node, needs no other file and ends by itself.
const PROGRAM: &str = "mayu-vmm";

/// Holds a rehearsal in `directory`, in which the template's files are.
///
/// # Errors
/// The step that failed.
pub async fn working_set(
    config: &Config,
    parts: Parts<'_>,
    directory: &Path,
    log: &Logger,
) -> Result<WorkingSet> {
    let rootfs = parts.share.join(ID).join("rootfs");
    fs::create_dir_all(&rootfs).map_err(file("create", &rootfs))?;
    let program = rootfs.join(PROGRAM);
    fs::copy(&config.vm.vmm, &program).map_err(file("copy", &program))?;
    let path = directory.join("memory");
    let memory = File::open(&path).map_err(file("open", &path))?;
    let only_written = is_page_cache(&memory).map_err(file("look at", &path))?;
    fadvise(&memory, 0, None, Advice::DontNeed)
        .map_err(|errno| file("drop from the page cache", &path)(errno.into()))?;
    let inode = memory.metadata().map_err(file("look at", &path))?.ino();
    with_machine(config, parts, log, async |machine, agent| {
        let look = || touched(machine.process.pid, inode);
        let before = look()?;
        let deadline = config.timeouts.boot();
        timeout(deadline, run_container(agent, log)).await.map_err(|_| Error::Rehearsal {
            reason: format!("it does not end within {} s", deadline.as_secs()),
        })??;
        let mut touched = since(&before, look()?);
        touched.retain(|_, written| *written || !only_written);
        let mut answer = before;
        answer.retain(|_, written| *written);
        Ok(WorkingSet { answer: join(&answer), container: join(&touched) })
    })
    .await
}

/// Makes the guest a pod without a network and runs a container in it, from its creation to its removal.
async fn run_container(agent: &Agent, log: &Logger) -> Result<()> {
    agent.configure_network(ConfigureNetworkRequest::default()).await?;
    agent.configure(ID, &HashMap::new()).await?;
    let mut events = agent.events().await?;
    let create = CreateTaskRequest {
        id: ID.into(),
        options: MessageField::some(any(SPEC_TYPE_URL, &container(log)?)?),
        ..Default::default()
    };
    let create = async |task: TaskClient| task.create(Context::default(), &create).await;
    agent.task("create a container", create).await?;
    let start = StartRequest { id: ID.into(), ..Default::default() };
    let start = async |task: TaskClient| task.start(Context::default(), &start).await;
    agent.task("start a process", start).await?;
    let failed = |reason: String| Error::Rehearsal { reason };
    let status = loop {
        match events.recv().await {
            Ok(Some(event)) => {
                if let Some(Event::Exit(exit)) = event.event {
                    break exit.exit_status;
                }
            }
            Ok(None) => return Err(failed("its agent ended".into())),
            Err(error) => return Err(failed(format!("its agent's events cannot be read: {error}"))),
        }
    };
    let delete = DeleteRequest { id: ID.into(), ..Default::default() };
    let delete = async |task: TaskClient| task.delete(Context::default(), &delete).await;
    agent.task("delete a process", delete).await?;
    match status {
        0 => Ok(()),
        status => Err(failed(format!("its container ended with {status}"))),
    }
}

/// As containerd describes one to a shim.
fn container(log: &Logger) -> Result<Spec> {
    let failed = |error: oci_spec::OciSpecError| Error::Rehearsal { reason: error.to_string() };
    let arguments = [format!("/{PROGRAM}"), "--version".into()];
    let process = ProcessBuilder::default().args(arguments).cwd("/").build().map_err(failed)?;
    let mut spec = Spec::default();
    spec.set_process(Some(process));
    let origin =
        Origin { id: ID, place: ID, bundle: Path::new("/"), pid_namespace: &PidNamespace::Own, files: &[] };
    let GuestSpec { spec, .. } = spec::for_guest(spec, origin, log)?;
    Ok(spec)
}

/// What was touched since. A page that was only read before and is written now has been.
fn since(before: &BTreeMap<u32, bool>, mut all: BTreeMap<u32, bool>) -> BTreeMap<u32, bool> {
    all.retain(|number, written| before.get(number).is_none_or(|earlier| earlier != written));
    all
}

#[cfg(test)]
mod tests {
    use mayu_vmm_api::Pages;

    use super::*;

    fn pages(first: u32, count: u32, written: bool) -> Pages {
        Pages { first, count, written }
    }

    #[test]
    fn what_was_touched_before_is_left_out_and_pages_are_joined_by_what_happened_to_them() {
        let before = BTreeMap::from([(1, false), (2, false), (3, true), (9, false)]);
        let all =
            BTreeMap::from([(1, false), (2, true), (3, true), (4, true), (5, true), (6, false), (9, false)]);
        let set = join(&since(&before, all));
        assert_eq!(set, [pages(2, 1, true), pages(4, 2, true), pages(6, 1, false)]);
    }
}
