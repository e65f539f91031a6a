//! The pod as containerd's Sandbox API drives it: made and ended for itself, not with its first and last container.

use std::sync::Arc;
use std::time::SystemTime;

use super::{Pod, Vm};
use crate::container::Role;
use crate::pod_spec::PodSpec;
use crate::process::{Exit, Process, State, Step};
use crate::stdio::Endpoints;
use crate::{Error, Result, id};

/// A pod that was made with the Sandbox API.
#[derive(Debug)]
pub struct Requested {
    /// What was asked for.
    pub spec: PodSpec,
    /// When.
    pub created_at: SystemTime,
    /// The life of the pod, which has no process of its own.
    pub life: Process,
}

impl Pod {
    /// Takes note of what the pod is to be.
    ///
    /// # Errors
    /// [`Error::NotFound`] for another pod than this shim's, or [`Error::AlreadyExists`].
    pub fn create_sandbox(&self, sandbox_id: &str, spec: PodSpec) -> Result<()> {
        self.check_id(sandbox_id)?;
        let mut state = self.lock();
        if state.requested.is_some() || !matches!(state.vm, Vm::Absent) {
            return Err(Error::AlreadyExists { kind: "sandbox", id: self.id.clone() });
        }
        let life = Process::new(&self.id, "", Endpoints::default());
        life.step(Step::Created, "create")?;
        state.requested = Some(Arc::new(Requested { spec, created_at: SystemTime::now(), life }));
        Ok(())
    }

    /// Boots the VM, unless that has to wait for the first container.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::WrongState`], or the step of the boot that failed.
    pub async fn start_sandbox(self: &Arc<Self>) -> Result<Arc<Requested>> {
        let requested = self.requested()?;
        requested.life.step(Step::Start, "start")?;
        if let Err(error) = self.boot_ahead(requested.spec.clone()).await {
            requested.life.finish_unstarted();
            return Err(error);
        }
        requested.life.step(Step::Started, "start")?;
        // Where the VM has ended since, nobody could tell the pod so before.
        if self.check_startable(Role::Pod).is_err() {
            requested.life.finish(Exit::now(crate::process::KILLED));
        }
        Ok(requested)
    }

    /// Ends the VM and with it all containers. Fine for a pod that has ended.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub async fn stop_sandbox(&self) -> Result<()> {
        let requested = self.requested()?;
        requested.life.settled().await;
        // Before the VM's end is seen, which would count as the pod's death.
        requested.life.finish(Exit::now(0));
        self.tear_down().await;
        Ok(())
    }

    /// Ends the VM, forgets its containers and ends the shim.
    pub async fn shutdown_sandbox(&self) {
        if let Ok(requested) = self.requested() {
            requested.life.settled().await;
            requested.life.finish(Exit::now(0));
        }
        self.tear_down().await;
        self.exit.cancel();
    }

    /// The pod that was made with the Sandbox API.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn requested(&self) -> Result<Arc<Requested>> {
        let requested = self.lock().requested.clone();
        requested.ok_or_else(|| Error::NotFound { kind: "sandbox", id: self.id.clone() })
    }

    /// Refuses a request that is meant for another pod.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn check_id(&self, sandbox_id: &str) -> Result<()> {
        if sandbox_id == self.id {
            return Ok(());
        }
        Err(Error::NotFound { kind: "sandbox", id: sandbox_id.chars().take(id::MAX_LEN).collect() })
    }
}

impl Requested {
    /// Whether the pod is up.
    pub fn is_ready(&self) -> bool {
        self.life.state() == State::Running
    }
}
