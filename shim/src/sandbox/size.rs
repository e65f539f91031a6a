//! How large a VM is, and how it becomes larger and smaller while it runs.

use std::time::Duration;

use mayu_vmm_api::{Request, VmmClient};
use slog::{Logger, info, warn};
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep};

use crate::Result;
use crate::agent::Agent;
use crate::config::Vm;
use crate::pod_spec::{Limits, Size};

/// How often the VMM is asked how far the guest's memory has grown.
const POLL: Duration = Duration::from_millis(2);

/// How long a guest may take for a step of that.
const STALLED: Duration = Duration::from_secs(2);

/// The sizes of one VM.
#[derive(Debug)]
pub(super) struct Sizes {
    /// What it started with. Its memory is never less.
    first: Size,
    largest: Size,
    /// What the pod as a whole was given, however little its containers may use.
    pod: Limits,
    vm: Vm,
    current: Mutex<Size>,
}

impl Sizes {
    /// Of a VM that has just started.
    pub(super) fn new(first: Size, pod: Limits, vm: &Vm) -> Self {
        Self { first, largest: first.largest(vm), pod, vm: vm.clone(), current: Mutex::new(first) }
    }

    /// What the VM has now.
    pub(super) async fn current(&self) -> Size {
        *self.current.lock().await
    }

    fn wanted(&self, containers: Limits) -> Size {
        self.pod.max(containers).size(&self.vm)
    }

    /// The size for containers with these limits, as near as this VM can come to it.
    pub(super) fn target(&self, containers: Limits) -> Size {
        let wanted = self.wanted(containers);
        Size {
            vcpus: wanted.vcpus.min(self.largest.vcpus),
            memory_mib: wanted.memory_mib.clamp(self.first.memory_mib, self.largest.memory_mib),
        }
    }

    /// Makes the VM as large as containers with these limits need it.
    ///
    /// # Errors
    /// The VMM or the agent cannot.
    pub(super) async fn fit(
        &self,
        containers: Limits,
        client: &VmmClient,
        agent: &Agent,
        log: &Logger,
    ) -> Result<()> {
        let mut current = self.current.lock().await;
        let (wanted, target) = (self.wanted(containers), self.target(containers));
        if wanted.vcpus > target.vcpus || wanted.memory_mib > target.memory_mib {
            info!(log, "the VM does not grow as far as its containers' limits";
                "vcpus" => wanted.vcpus, "max_vcpus" => target.vcpus,
                "memory_mib" => wanted.memory_mib, "max_memory_mib" => target.memory_mib);
        }
        if target.memory_mib != current.memory_mib {
            let grows = target.memory_mib > current.memory_mib;
            client.request(Request::ResizeMemory { memory_mib: target.memory_mib }, &[]).await?;
            current.memory_mib = target.memory_mib;
            if grows {
                wait_for_memory(client, target.memory_mib - self.first.memory_mib, log).await?;
            }
        }
        if target.vcpus != current.vcpus {
            client.request(Request::StartVcpus { vcpus: target.vcpus }, &[]).await?;
            agent.resize(target.vcpus).await?;
            current.vcpus = target.vcpus;
        }
        Ok(())
    }
}

/// Waits until the guest uses so much memory beyond what it has booted with: a container that starts before could be too large for
/// it. A guest that takes none of it for a while never will.
async fn wait_for_memory(client: &VmmClient, wanted_mib: u32, log: &Logger) -> Result<()> {
    let mut last = (0, Instant::now());
    loop {
        let plugged_mib = client.status().await?.plugged_mib;
        if plugged_mib >= wanted_mib {
            return Ok(());
        }
        if plugged_mib > last.0 {
            last = (plugged_mib, Instant::now());
        }
        if last.1.elapsed() > STALLED {
            warn!(log, "the guest does not use all of its memory";
                "plugged_mib" => plugged_mib, "wanted_mib" => wanted_mib);
            return Ok(());
        }
        sleep(POLL).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_follows_its_containers_between_what_it_began_with_and_what_it_may_grow_to() {
        let vm = Vm { vcpus: 1, memory_mib: 256, max_vcpus: 4, max_memory_mib: 1024, ..Vm::default() };
        let pod = Limits { cpu_millis: Some(1500), memory: Some(128 << 20) };
        let sizes = Sizes::new(pod.size(&vm), pod, &vm);
        let target = |cpu_millis, mib: u64| {
            let limits = Limits { cpu_millis: Some(cpu_millis), memory: Some(mib << 20) };
            let Size { vcpus, memory_mib } = sizes.target(limits);
            (vcpus, memory_mib)
        };
        assert_eq!(target(100, 1), (2, 384), "no smaller than its pod");
        assert_eq!(target(2100, 512), (3, 768));
        assert_eq!(target(9000, 4096), (4, 1024), "no larger than it may be");
    }
}
