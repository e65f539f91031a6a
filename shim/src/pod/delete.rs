//! Unmaking containers and processes.

use containerd_shim_protos::api::{DeleteRequest, DeleteResponse};
use containerd_shim_protos::events::task::TaskDelete;
use containerd_shim_protos::shim_async::TaskClient;
use ttrpc::context::Context;

use super::Pod;
use crate::Result;
use crate::container::{Container, Role};
use crate::hooks::Point;
use crate::process::{Process, State, Step};

impl Pod {
    /// Deletes a stopped process; with an init process its container.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::WrongState`], or that the agent cannot.
    pub async fn delete(&self, container_id: &str, exec_id: &str) -> Result<DeleteResponse> {
        let container = self.container(container_id)?;
        let process = container.process(exec_id)?;
        if process.state() == State::Creating {
            // Its client was restarted meanwhile and does not want it any more.
            process.settled().await;
        }
        process.step(Step::Delete, "delete")?;
        if container.role == Role::Workload
            && let Err(error) = self.delete_in_guest(container_id, exec_id).await
        {
            process.step(Step::NotDeleted, "delete")?;
            return Err(error);
        }
        process.forget();
        if let Some(stdio) = process.take_stdio() {
            stdio.close();
        }
        let exit = process.wait().await;
        let pid = self.pid();
        if exec_id.is_empty() {
            self.remove(&container, pid, &process).await;
        } else {
            container.remove_exec(exec_id);
        }
        Ok(DeleteResponse {
            pid,
            exit_status: exit.status,
            exited_at: exit.timestamp(),
            ..Default::default()
        })
    }

    async fn remove(&self, container: &Container, pid: u32, init: &Process) {
        for exec in container.execs() {
            exec.forget();
            if let Some(stdio) = exec.take_stdio() {
                stdio.close();
            }
        }
        if let Ok(sandbox) = self.sandbox() {
            sandbox.release_devices(&container.id).await;
            self.detach_storage(&sandbox, container).await;
        }
        if let Some(hooks) = container.hooks.get() {
            // Failures are logged there.
            let _ = hooks.run(Point::Deleted, pid, &self.log).await;
        }
        self.lock().containers.remove(&container.id);
        let exit = init.wait().await;
        self.events.publish(TaskDelete {
            container_id: container.id.clone(),
            pid,
            exit_status: exit.status,
            exited_at: exit.timestamp(),
            ..Default::default()
        });
    }

    /// Fine when the agent, or the whole guest, does not know it any more.
    pub(super) async fn delete_in_guest(&self, container_id: &str, exec_id: &str) -> Result<()> {
        let Ok(sandbox) = self.running_sandbox() else {
            return Ok(());
        };
        let request =
            DeleteRequest { id: container_id.into(), exec_id: exec_id.into(), ..Default::default() };
        let delete = async |task: TaskClient| task.delete(Context::default(), &request).await;
        match sandbox.agent.task("delete a process", delete).await {
            Err(error) if !error.is_not_found() && self.running_sandbox().is_ok() => Err(error),
            _ => Ok(()),
        }
    }
}
