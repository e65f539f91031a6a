//! The ends of processes: what the agent tells, published once and in order.

use std::sync::Arc;
use std::time::Instant;

use containerd_shim_protos::events::task::{TaskExit, TaskOOM};
use mayu_agent_api::sandbox::{self, event::Event};
use slog::{debug, warn};
use tokio::time::timeout;

use crate::agent::AgentEvents;
use crate::container::Container;
use crate::pod::Pod;
use crate::process::{Exit, KILLED, Process};
use crate::sandbox::Sandbox;

/// Follows the agent's events to their end, which is the end of the VM.
pub async fn follow(pod: Arc<Pod>, sandbox: Arc<Sandbox>, mut events: AgentEvents) {
    let reason = loop {
        match events.recv().await {
            Ok(Some(event)) => handle(&pod, &sandbox, event),
            Ok(None) => break "its agent ended the stream of events".to_string(),
            Err(error) => break format!("its agent's events cannot be read: {error}"),
        }
    };
    debug!(pod.log, "the agent's events ended"; "reason" => &reason);
    sandbox.condemn(&reason);
}

fn handle(pod: &Arc<Pod>, sandbox: &Arc<Sandbox>, event: sandbox::Event) {
    match event.event {
        Some(Event::Exit(exit)) => {
            process_ended(pod, sandbox, &exit.container_id, &exit.exec_id, exit.exit_status);
        }
        Some(Event::Oom(oom)) => out_of_memory(pod, &oom.container_id),
        // An event of a kind that this shim does not know.
        _ => {}
    }
}

/// Ends every process of the pod: the VM is gone.
pub fn all_ended(pod: &Arc<Pod>, sandbox: &Arc<Sandbox>) {
    if let Ok(requested) = pod.requested() {
        requested.life.finish(Exit::now(KILLED));
    }
    for container in pod.containers() {
        for process in container.execs().into_iter().chain([container.init.clone()]) {
            tokio::spawn(finish(pod.clone(), sandbox.clone(), container.clone(), process, KILLED));
        }
    }
}

fn process_ended(pod: &Arc<Pod>, sandbox: &Arc<Sandbox>, container_id: &str, exec_id: &str, status: u32) {
    let found = pod.container(container_id).and_then(|container| {
        let process = container.process(exec_id)?;
        Ok((container, process))
    });
    match found {
        Ok((container, process)) if process.end_told() => {
            tokio::spawn(finish(pod.clone(), sandbox.clone(), container, process, status));
        }
        Ok(_) => debug!(pod.log, "a process ended again"; "container" => container_id, "process" => exec_id),
        // A process that was deleted meanwhile, or one that the guest made up.
        Err(error) => debug!(pod.log, "an unknown process ended"; "error" => error.to_string()),
    }
}

fn out_of_memory(pod: &Pod, container_id: &str) {
    // Only of a container that is there: the id comes from the guest.
    if let Ok(container) = pod.container(container_id)
        && container.notice_oom(Instant::now())
    {
        pod.events.publish(TaskOOM { container_id: container.id.clone(), ..Default::default() });
    }
}

/// Makes an end known: after the start, after the output has been read, and for an init process after its execs.
async fn finish(
    pod: Arc<Pod>,
    sandbox: Arc<Sandbox>,
    container: Arc<Container>,
    process: Arc<Process>,
    status: u32,
) {
    let timeouts = &sandbox.config.timeouts;
    process.settled().await;
    if process.exec_id.is_empty() {
        for exec in container.execs() {
            if timeout(timeouts.request(), exec.not_alive()).await.is_err() {
                warn!(pod.log, "the agent tells of no end of an exec"; "container" => &container.id, "exec" => exec.id());
                publish(&pod, &exec, KILLED);
            }
        }
    }
    if let Some(stdio) = process.stdio()
        && timeout(timeouts.stdio_drain(), stdio.drained()).await.is_err()
    {
        debug!(pod.log, "the output of a process outlives it"; "container" => &container.id, "process" => process.id());
    }
    publish(&pod, &process, status);
}

/// Records an end and publishes it, if it is the first.
pub fn publish(pod: &Pod, process: &Process, status: u32) {
    let exit = Exit::now(status);
    // The same clock reading in the state and in the event.
    if process.finish(exit) {
        publish_exit(pod, process, exit);
    }
}

/// Publishes an end that has been recorded.
pub fn publish_exit(pod: &Pod, process: &Process, exit: Exit) {
    let (container, id) = (&process.container_id, process.id());
    debug!(pod.log, "process ended"; "container" => container, "process" => id, "status" => exit.status);
    pod.events.publish(TaskExit {
        container_id: process.container_id.clone(),
        id: process.id().into(),
        pid: pod.pid(),
        exit_status: exit.status,
        exited_at: exit.timestamp(),
        ..Default::default()
    });
}
