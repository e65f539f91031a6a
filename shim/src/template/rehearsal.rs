//! What the pods of a template will touch of its memory: a machine goes on from it as a pod's does, runs a container, and is looked at
//! meanwhile.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;

use containerd_shim_protos::api::{CreateTaskRequest, DeleteRequest, StartRequest};
use containerd_shim_protos::shim_async::TaskClient;
use mayu_agent_api::SPEC_TYPE_URL;
use mayu_agent_api::sandbox::ConfigureNetworkRequest;
use mayu_agent_api::sandbox::event::Event;
use mayu_vmm_api::{Pages, WorkingSet};
use oci_spec::runtime::{ProcessBuilder, Spec};
use protobuf::MessageField;
use rustix::fs::{Advice, fadvise, fstatfs};
use slog::Logger;
use tokio::time::timeout;
use ttrpc::context::Context;

use super::PAGE;
use super::make::{Parts, with_machine};
use crate::agent::Agent;
use crate::config::Config;
use crate::container::PidNamespace;
use crate::error::file;
use crate::pod::any;
use crate::spec::{self, GuestSpec, Origin};
use crate::{Error, Result};

/// The container's id.
const ID: &str = "rehearsal";

/// What it runs, in its root directory: a program that is on every node, needs no other file and ends by itself.
const PROGRAM: &str = "mayu-vmm";

/// A file system that is the page cache itself (include/uapi/linux/magic.h).
const TMPFS_MAGIC: i64 = 0x0102_1994;

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
    // What is in the page cache is mapped together with what is touched, and cannot be told from it. What is written can.
    let only_written =
        fstatfs(&memory).map_err(|errno| file("look at", &path)(errno.into()))?.f_type == TMPFS_MAGIC;
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
        Ok(WorkingSet(join(&touched)))
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

/// The pages of a template's memory that a machine has touched, by number, and whether it has written to them. What a process has
/// mapped of a file is in its `maps`, and page by page in its `pagemap` (Documentation/admin-guide/mm/pagemap.rst).
fn touched(pid: i32, inode: u64) -> Result<BTreeMap<u32, bool>> {
    const PRESENT: u64 = 1 << 63 | 1 << 62;
    const OF_A_FILE: u64 = 1 << 61;
    let of = |name| Path::new("/proc").join(pid.to_string()).join(name);
    let maps = fs::read_to_string(of("maps")).map_err(file("read", of("maps")))?;
    let pagemap = File::open(of("pagemap")).map_err(file("open", of("pagemap")))?;
    let mut touched = BTreeMap::new();
    for mapping in maps.lines().filter_map(|line| Mapping::parse(line, inode)) {
        let mut entries = vec![0; mapping.pages * size_of::<u64>()];
        let place = mapping.start / PAGE as u64 * size_of::<u64>() as u64;
        pagemap.read_exact_at(&mut entries, place).map_err(file("read", of("pagemap")))?;
        let (entries, _) = entries.as_chunks();
        for (number, entry) in (mapping.first..).zip(entries) {
            let entry = u64::from_ne_bytes(*entry);
            if entry & PRESENT != 0 {
                touched.insert(number, entry & OF_A_FILE == 0);
            }
        }
    }
    Ok(touched)
}

/// Where a file is mapped.
#[derive(Debug, PartialEq, Eq)]
struct Mapping {
    /// The address.
    start: u64,
    /// How many pages.
    pages: usize,
    /// The number of the first one in the file.
    first: u32,
}

impl Mapping {
    /// Reads a line of `maps` (proc_pid_maps(5)), if it is one of this file.
    fn parse(line: &str, inode: u64) -> Option<Self> {
        let mut words = line.split_ascii_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let (_permissions, offset, _device) = (words.next()?, words.next()?, words.next()?);
        if words.next()?.parse() != Ok(inode) {
            return None;
        }
        let number = |text| u64::from_str_radix(text, 16).ok();
        let (start, end, offset) = (number(start)?, number(end)?, number(offset)?);
        let pages = |bytes: u64| bytes / PAGE as u64;
        Some(Self {
            start,
            pages: pages(end.checked_sub(start)?) as usize,
            first: u32::try_from(pages(offset)).ok()?,
        })
    }
}

/// What was touched since. A page that was only read before and is written now has been.
fn since(before: &BTreeMap<u32, bool>, mut all: BTreeMap<u32, bool>) -> BTreeMap<u32, bool> {
    all.retain(|number, written| before.get(number).is_none_or(|earlier| earlier != written));
    all
}

/// Pages that follow each other are one entry.
fn join(pages: &BTreeMap<u32, bool>) -> Vec<Pages> {
    let mut joined: Vec<Pages> = Vec::new();
    for (&number, &written) in pages {
        match joined.last_mut() {
            Some(last) if last.first + last.count == number && last.written == written => last.count += 1,
            _ => joined.push(Pages { first: number, count: 1, written }),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
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

    #[test]
    fn a_mapping_is_known_by_its_files_number() {
        let line = "7f0000000000-7f0000003000 rw-p 00002000 fe:00 4711    /var/lib/mayu/templates/1/memory";
        let mapping = Mapping { start: 0x7f00_0000_0000, pages: 3, first: 2 };
        assert_eq!(Mapping::parse(line, 4711), Some(mapping));
        assert_eq!(Mapping::parse(line, 4712), None);
        assert_eq!(Mapping::parse("7ffc0000-7ffd0000 rw-p 00000000 00:00 0 [stack]", 4711), None);
    }
}
