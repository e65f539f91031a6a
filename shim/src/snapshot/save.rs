//! How a pod that runs is saved.

use std::sync::Arc;
use std::time::{Duration, Instant};

use containerd_shim_protos::api::ResumeRequest;
use containerd_shim_protos::shim_async::TaskClient;
use slog::{Logger, debug, info};
use tokio::task::spawn_blocking;
use tokio::time::sleep;
use ttrpc::context::Context;

use super::Making;
use crate::agent::Suspension;
use crate::container::{Container, Role};
use crate::pod::Pod;
use crate::sandbox::Sandbox;

/// How long the agent is left to wait for a container to become ready before it is asked again.
const WAIT: Duration = Duration::from_secs(5);

/// When it is tried again, where something was in the way.
const PAUSE: Duration = Duration::from_millis(500);

/// Saves a pod as soon as its container is ready. The pod goes on, whatever becomes of it.
pub async fn save(pod: Arc<Pod>, sandbox: Arc<Sandbox>, container: Arc<Container>, making: Box<Making>) {
    let log =
        pod.log.new(slog::o!("container" => container.id.clone(), "snapshot" => making.name().to_owned()));
    if let Err(reason) = suspend(&pod, &sandbox, &container, &making, &log).await {
        return making.fail(&reason, &log);
    }
    let began = Instant::now();
    let saved = match making.memory_to_read() {
        Ok(memory) => sandbox.save(&making.state, &memory).await,
        Err(error) => Err(error),
    };
    if let Err(error) = go_on(&sandbox, &container).await {
        let reason = format!("its container does not go on after it was saved: {error}");
        making.fail(&reason, &log);
        return sandbox.condemn(&reason);
    }
    if let Err(error) = saved {
        return making.fail(&error.to_string(), &log);
    }
    let saving_took = began.elapsed();
    match spawn_blocking(move || making.finish()).await {
        Ok(Ok(snapshot)) => info!(log, "the pod was saved";
            "mib" => snapshot.size() >> 20, "saving_took" => ?saving_took),
        Ok(Err(error)) => info!(log, "no snapshot is made"; "reason" => error.to_string()),
        Err(error) => info!(log, "no snapshot is made"; "reason" => error.to_string()),
    }
}

/// Has the pod stand still as soon as its container is ready and nothing is in the way. A request that was sent is waited for: the agent
/// would do it later, and nobody would know.
async fn suspend(
    pod: &Pod,
    sandbox: &Sandbox,
    container: &Container,
    making: &Making,
    log: &Logger,
) -> Result<(), String> {
    let within = Duration::from_secs(sandbox.config.snapshot.ready_within);
    let mut hindrance = "its container is not ready".to_owned();
    let began = Instant::now();
    while began.elapsed() < within {
        if !container.init.state().is_alive() {
            return Err("its container has ended".into());
        }
        // One that came later would be in the memory of pods that do not know of it.
        if pod.containers().iter().filter(|container| container.role == Role::Workload).count() > 1 {
            return Err("the pod has several containers".into());
        }
        match sandbox.agent.suspend(&container.id, &making.likeness.wish.ready, WAIT).await {
            Ok(Suspension::Done) => return Ok(()),
            Ok(Suspension::NotReady) => {}
            Ok(Suspension::Hindered(reason)) => {
                debug!(log, "the pod is not saved yet"; "reason" => &reason);
                hindrance = reason;
                sleep(PAUSE).await;
            }
            Err(error) => {
                // Where it stands still nevertheless. Otherwise it is an error to be told so.
                let _ = go_on(sandbox, container).await;
                return Err(error.to_string());
            }
        }
    }
    Err(format!("within {} s: {hindrance}", within.as_secs()))
}

async fn go_on(sandbox: &Sandbox, container: &Container) -> crate::Result<()> {
    let request = ResumeRequest { id: container.id.clone(), ..Default::default() };
    let resume = async |task: TaskClient| task.resume(Context::default(), &request).await;
    sandbox.agent.task("have a container go on", resume).await.map(drop)
}
