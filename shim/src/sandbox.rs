//! One pod's VM: what can be done with it while it lives, and how it ends.

mod boot;
mod network;
mod size;

use std::collections::HashSet;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex as StdMutex, PoisonError};

use mayu_agent_api::{STREAM_PORT, StreamId};
use mayu_vmm_api::{Event, EventStream, ExitReason, Request, VmmClient};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use slog::{Logger, debug, info, warn};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{Mutex, watch};
use tokio::task::spawn_blocking;
use tokio::time::sleep;

use crate::agent::Agent;
use crate::config::Config;
use crate::console::Console;
use crate::devices::{BlockDevice, Place, Slots};
use crate::error::system;
use crate::pod_spec::{Limits, Size};
use crate::snapshot::{Making, Snapshot};
use crate::spec::Volume;
use crate::state_dir::StateDir;
use crate::vmm_process::VmmProcess;
use crate::{Error, Result, cgroup};

pub use boot::Blueprint;
pub(crate) use boot::{too_late, wait_for_agent, with_console};

use network::Network;
use size::Sizes;

/// Why the VM is gone, where it has not said so itself.
const VMM_ENDED: &str = "its VMM ended";

/// A running VM.
#[derive(Debug)]
pub struct Sandbox {
    /// The configuration it was started with.
    pub config: Config,
    /// The pod's directory.
    pub dir: StateDir,
    /// The agent inside.
    pub agent: Agent,
    /// Files for every container: their names below `/etc`, and where they are on the host.
    pub files: Vec<(&'static str, PathBuf)>,
    /// The names of the guest's volumes.
    volumes: Mutex<HashSet<String>>,
    /// What is in the block slots.
    slots: Mutex<Slots>,
    network: Mutex<Network>,
    sizes: Sizes,
    vmm: VmmProcess,
    client: Arc<VmmClient>,
    own_cgroup: Option<PathBuf>,
    next_stream: AtomicU64,
    /// Where its guest goes on from, until somebody has taken over the container in it.
    snapshot: StdMutex<Option<Box<Snapshot>>>,
    /// What is to be made of it.
    making: StdMutex<Option<Box<Making>>>,
    condemned: watch::Sender<Option<String>>,
    ended: watch::Sender<Option<String>>,
    log: Logger,
}

/// What tells of the VM's end, for [`Sandbox::watch`].
#[derive(Debug)]
pub struct Signs {
    vmm_events: EventStream,
    ready: UnixStream,
    console: Console,
}

impl Sandbox {
    /// The VMM's pid, which containerd is told as the pid of every process of the pod.
    pub fn pid(&self) -> u32 {
        self.vmm.pid.unsigned_abs()
    }

    /// How large the VM is.
    pub async fn size(&self) -> Size {
        self.sizes.current().await
    }

    /// How large the VM is with containers of these limits.
    pub fn size_for(&self, containers: Limits) -> Size {
        self.sizes.target(containers)
    }

    /// Makes the VM as large as containers with these limits need it, as far as it can grow.
    ///
    /// # Errors
    /// The VMM or the agent cannot.
    pub async fn fit(&self, containers: Limits) -> Result<()> {
        self.sizes.fit(containers, &self.client, &self.agent, &self.log).await
    }

    /// Gives the guest the network that somebody may have set up in the VMM's own network namespace since the boot, where the
    /// pod was not given another one.
    ///
    /// # Errors
    /// The step that failed.
    pub async fn adopt_network(&self) -> Result<()> {
        let mut network = self.network.lock().await;
        if matches!(*network, Network::Unknown) {
            *network = Network::adopt(self.pid(), &self.client, &self.agent, &self.log).await?;
        }
        Ok(())
    }

    /// Connects a stdio stream of a process that the agent knows by `id`.
    ///
    /// # Errors
    /// [`Error::Vmm`] or [`Error::System`].
    pub async fn connect_stream(&self, id: StreamId) -> Result<UnixStream> {
        let mut stream = connect(&self.client, STREAM_PORT).await?;
        stream.write_u64(id.0).await.map_err(system("name a stdio stream to the agent"))?;
        Ok(stream)
    }

    /// Makes volumes that the guest does not have yet.
    ///
    /// # Errors
    /// As [`Agent::task`].
    pub async fn provide(&self, volumes: Vec<Volume>) -> Result<()> {
        let mut there = self.volumes.lock().await;
        for volume in volumes {
            if !there.contains(&volume.name) {
                self.agent.create_volume(&volume).await?;
                there.insert(volume.name);
            }
        }
        Ok(())
    }

    /// Takes note of volumes that the guest has already.
    pub async fn has_volumes(&self, volumes: Vec<Volume>) {
        self.volumes.lock().await.extend(volumes.into_iter().map(|volume| volume.name));
    }

    /// The snapshot that the guest goes on from, once: its container is there, and stands still.
    pub fn take_snapshot(&self) -> Option<Box<Snapshot>> {
        self.snapshot.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Where the machine is to be saved, once.
    pub fn take_making(&self) -> Option<Box<Making>> {
        self.making.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Saves the machine, which stands still meanwhile. `memory` is the file of its memory, opened to be read.
    ///
    /// # Errors
    /// The VMM's reason why it cannot be saved. It goes on nevertheless, if it can.
    pub async fn save(&self, state: &File, memory: &File) -> Result<()> {
        self.client.request(Request::Pause, &[]).await?;
        let saved = self.client.request(Request::Save, &[state.as_fd(), memory.as_fd()]).await;
        self.client.request(Request::Resume, &[]).await?;
        Ok(saved.map(drop)?)
    }

    /// Puts a container's block devices into slots. Says which device is in which.
    ///
    /// # Errors
    /// [`Error::Device`] or [`Error::Vmm`]; [`Sandbox::release_devices`] takes back what was done.
    pub async fn attach_devices(
        &self,
        container: &str,
        devices: &[BlockDevice],
    ) -> Result<Vec<((i64, i64), u8)>> {
        let mut slots = self.slots.lock().await;
        let mut places = Vec::new();
        for device in devices {
            let slot = match slots.take(device, container)? {
                Place::There(slot) => slot,
                Place::Empty(slot) => {
                    let file = device.open()?;
                    let attach = Request::AttachBlock { slot, read_only: device.read_only };
                    self.client.request(attach, &[file.as_fd()]).await?;
                    slot
                }
            };
            places.push((device.number, slot));
        }
        Ok(places)
    }

    /// Takes away the block devices that a container was the last to use.
    pub async fn release_devices(&self, container: &str) {
        let mut slots = self.slots.lock().await;
        for slot in slots.release(container) {
            if let Err(error) = self.client.request(Request::DetachBlock { slot }, &[]).await {
                debug!(self.log, "a block slot stays as it is"; "slot" => slot, "error" => error.to_string());
            }
        }
    }

    /// An identifier for the next stdio stream.
    pub fn next_stream(&self) -> StreamId {
        StreamId(self.next_stream.fetch_add(1, Ordering::Relaxed))
    }

    /// Waits for the end of the VM, makes sure of it, and says why.
    pub async fn watch(&self, mut signs: Signs) -> String {
        let mut condemned = self.condemned.subscribe();
        let mut byte = [0];
        let mut reason = tokio::select! {
            () = self.vmm.ended() => VMM_ENDED.to_string(),
            reason = exit_event(&mut signs.vmm_events) => reason,
            _ = signs.ready.read(&mut byte) => "its agent ended".to_string(),
            reason = condemned.wait_for(Option::is_some) =>
                reason.ok().and_then(|reason| reason.clone()).unwrap_or_default(),
            reason = self.silence() => reason,
        };
        let how = self.vmm.kill().await;
        if reason == VMM_ENDED {
            reason = format!("{VMM_ENDED} ({how})");
        }
        // The namespace would stay for as long as it is held, and with it what CNI wants to take away.
        *self.network.lock().await = Network::Gone;
        // Its file is as large as the guest's memory.
        drop(self.take_making());
        // The VMM's own word is better than what its end looks like from outside.
        while let Ok((event, _)) = signs.vmm_events.try_recv() {
            if let Event::Exited(why) = event {
                reason = describe(why);
            }
        }
        let console = signs.console.final_tail().await;
        info!(self.log, "the VM is gone"; "reason" => &reason, "vmm" => how, "console" => last_lines(&console));
        self.ended.send_replace(Some(reason.clone()));
        reason
    }

    /// Asks the agent for a sign of life every so often. Ends when there is none: a guest or a VMM that is stopped or hangs has
    /// all its connections open.
    async fn silence(&self) -> String {
        let Some(pause) = self.config.timeouts.health() else { return std::future::pending().await };
        loop {
            sleep(pause).await;
            if let Err(error @ Error::AgentTimeout { .. }) = self.agent.health().await {
                return format!("it gives no sign of life: {error}");
            }
        }
    }

    /// Ends the VM for a reason; [`Sandbox::watch`] does it.
    pub fn condemn(&self, reason: &str) {
        self.condemned.send_if_modified(|condemned| {
            let first = condemned.is_none();
            if first {
                *condemned = Some(reason.into());
            }
            first
        });
    }

    /// Has the guest write everything back, ends the VM and takes away everything on the host.
    /// [`Sandbox::watch`] must be running.
    pub async fn tear_down(&self) {
        if self.ended.borrow().is_none() {
            if let Err(error) = self.agent.shutdown(self.config.timeouts.shutdown()).await {
                warn!(self.log, "the guest did not shut down"; "error" => error.to_string());
            }
            self.condemn("the pod was shut down");
        }
        // The sender lives as long as `self`.
        let _ = self.ended.subscribe().wait_for(Option::is_some).await;
        if let Some(directory) = &self.own_cgroup {
            cgroup::remove(directory);
        }
        let dir = self.dir.clone();
        match spawn_blocking(move || dir.remove()).await {
            Ok(Err(error)) => warn!(self.log, "the pod's directory stays"; "error" => error.to_string()),
            Err(error) => warn!(self.log, "the pod's directory stays"; "error" => error.to_string()),
            Ok(Ok(())) => {}
        }
    }
}

/// Never ends without an [`Event::Exited`]: the end of the VMM is seen elsewhere.
async fn exit_event(events: &mut EventStream) -> String {
    loop {
        match events.recv().await {
            Some((Event::Exited(why), _)) => return describe(why),
            Some(_) => {}
            None => std::future::pending().await,
        }
    }
}

fn describe(reason: ExitReason) -> String {
    match reason {
        ExitReason::GuestReset => "the guest reset itself".into(),
        ExitReason::Requested => "the shim asked for it".into(),
        ExitReason::Failed(detail) => {
            format!("its VMM failed: {}", detail.chars().take(1024).collect::<String>())
        }
    }
}

async fn connect(client: &VmmClient, port: u32) -> Result<UnixStream> {
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC)
        .map_err(system("create a stream to the guest"))?;
    client.request(Request::VsockConnect { port }, &[theirs.as_fd()]).await?;
    into_stream(ours)
}

fn into_stream(fd: OwnedFd) -> Result<UnixStream> {
    let stream = std::os::unix::net::UnixStream::from(fd);
    stream.set_nonblocking(true).map_err(system("make a stream non-blocking"))?;
    UnixStream::from_std(stream).map_err(system("watch a stream to the guest"))
}

/// Enough of the console for a log line.
fn last_lines(console: &str) -> &str {
    let start = console.trim_end().rmatch_indices('\n').nth(4).map_or(0, |(index, _)| index + 1);
    &console[start..]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_five_lines_of_a_console() {
        assert_eq!(last_lines("1\n2\n3\n4\n5\n6\n"), "2\n3\n4\n5\n6\n");
        assert_eq!(last_lines("1\n2"), "1\n2");
        assert_eq!(last_lines(""), "");
    }
}
