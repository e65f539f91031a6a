//! What the pods of a snapshot touch of its memory: the first one that goes on from it is looked at. Pods after it have these pages mapped
//! before they touch them. It is the same function's, so what it touches it can have its own pods touch, and no others.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;
use std::sync::Arc;
use std::time::Duration;

use mayu_vmm_api::WorkingSet;
use slog::{Logger, debug};
use tokio::task::spawn_blocking;
use tokio::time::sleep;

use super::Snapshot;
use crate::container::Container;
use crate::error::file;
use crate::saved::WORKING_SET;
use crate::touched::{is_page_cache, join, touched};
use crate::{Error, Result};

/// How long after its creation a container is looked at: its first answers are what has to be quick.
const AFTER: Duration = Duration::from_secs(5);

/// Writes down what a container has touched that has gone on from a snapshot, if that is not known yet.
pub async fn record(snapshot: Box<Snapshot>, vmm: u32, container: Arc<Container>, log: Logger) {
    if snapshot.path().join(WORKING_SET).exists() {
        return;
    }
    sleep(AFTER).await;
    if !container.init.state().is_alive() {
        return;
    }
    let written = spawn_blocking(move || write(&snapshot, vmm)).await;
    match written
        .unwrap_or_else(|error| Err(Error::System { operation: "look at memory", source: error.into() }))
    {
        Ok(pages) => debug!(log, "what pods touch of a snapshot is known"; "pages" => pages),
        Err(error) => {
            debug!(log, "what pods touch of a snapshot is not known"; "error" => error.to_string());
        }
    }
}

fn write(snapshot: &Snapshot, vmm: u32) -> Result<usize> {
    let path = snapshot.path().join("memory");
    let memory = File::open(&path).map_err(file("open", &path))?;
    let only_written = is_page_cache(&memory).map_err(file("look at", &path))?;
    let inode = memory.metadata().map_err(file("look at", &path))?.ino();
    let pid = i32::try_from(vmm).map_err(|_| Error::NoSandbox)?;
    let mut touched = touched(pid, inode)?;
    touched.retain(|_, written| *written || !only_written);
    let pages = touched.len();
    // Whoever opens it meanwhile finds none, or all of it.
    let (new, path) = (snapshot.path().join("working-set.new"), snapshot.path().join(WORKING_SET));
    // Some of it was touched before the agent answered, which does no harm.
    WorkingSet { answer: Vec::new(), container: join(&touched) }
        .to_bytes()
        .and_then(|bytes| fs::write(&new, bytes))
        .and_then(|()| fs::rename(&new, &path))
        .map_err(file("write", path))?;
    Ok(pages)
}
