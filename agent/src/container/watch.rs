//! What happens to a container by itself: processes end, memory runs out.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use slog::warn;
use tokio::sync::oneshot;

use super::Container;
use crate::error::Result;
use crate::process::Process;
use crate::reaper::Exit;

impl Container {
    /// Reports the end of `process` when it comes.
    pub(super) fn watch_exit(self: &Arc<Self>, process: Arc<Process>, exit: oneshot::Receiver<Exit>) {
        let container = Arc::clone(self);
        tokio::spawn(async move {
            // The reaper drops no watch, but the container may have been adopted.
            let Ok(exit) = exit.await else { return };
            if process.exec_id().is_empty() && !container.plan.own_pid_namespace {
                // Nobody else ends what the init leaves behind.
                if let Err(error) = container.end_all().await {
                    warn!(container.log, "cannot end what the init left behind"; "error" => %error);
                }
            }
            container.report_oom();
            process.exited(exit);
            container.runtime.events.exited(&container.id, process.exec_id(), process.pid(), exit);
        });
    }

    async fn end_all(&self) -> Result<()> {
        self.cgroup.kill()?;
        self.cgroup.empty().await
    }

    /// Has kills for want of memory reported as they happen.
    pub(super) fn watch_memory(self: &Arc<Self>) {
        let mut watch = match self.cgroup.watch_memory() {
            Ok(watch) => watch,
            Err(error) => {
                warn!(self.log, "cannot watch memory"; "error" => %error);
                return;
            }
        };
        let container = Arc::downgrade(self);
        let task = tokio::spawn(async move {
            while watch.changed().await.is_ok() {
                let Some(container) = container.upgrade() else { return };
                container.report_oom();
            }
        });
        self.inner().memory_watch = Some(task);
    }

    /// Reports kills for want of memory that were not reported yet.
    fn report_oom(&self) {
        let kills = self.cgroup.oom_kills();
        if kills > self.oom_kills.swap(kills, Ordering::Relaxed) {
            self.runtime.events.out_of_memory(&self.id);
        }
    }
}
