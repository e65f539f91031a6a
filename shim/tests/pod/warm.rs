//! Pods that are to be saved, or to go on from a snapshot: their VM starts with their first container.

use containerd_shim_protos::api::{KillRequest, PidsRequest};
use containerd_shim_protos::types::task::Status;
use ttrpc::Code;

use crate::host::Host;
use crate::{code, cx, delete, exec, shutdown, start, state, wait};

/// Makes and starts what stands for such a pod.
async fn waiting(host: &Host) {
    let created = host.task.create(cx(), &host.warm_sandbox("pod")).await.unwrap();
    assert_eq!(created.pid, std::process::id());
    start(&host.task, "pod", "").await.unwrap();
    assert_eq!(state(&host.task, "pod").await, Status::RUNNING);
}

async fn end(host: &Host) {
    let request = KillRequest { id: "pod".into(), signal: 9, ..Default::default() };
    host.task.kill(cx(), &request).await.unwrap();
    assert_eq!(wait(&host.task, "pod", "").await, 137);
    assert_eq!(delete(&host.task, "pod", "").await.unwrap(), 137);
}

#[tokio::test]
async fn a_pod_that_waits_for_its_container_has_no_vm_and_can_end() {
    let Some(host) = Host::new("").await else { return };
    waiting(&host).await;
    assert!(!host.has_vmm());
    let pids = host.task.pids(cx(), &PidsRequest { id: "pod".into(), ..Default::default() }).await.unwrap();
    assert_eq!(pids.processes[0].pid, std::process::id());
    let (refused, _) = code(host.task.exec(cx(), &exec("pod", "e", &["true"])).await);
    assert_eq!(refused, Code::UNIMPLEMENTED);

    end(&host).await;

    shutdown(&host).await;
}

#[tokio::test]
async fn the_vm_comes_with_the_first_container_and_is_told_of_from_then_on() {
    let Some(host) = Host::new("").await else { return };
    waiting(&host).await;

    // Its root is none that could be compared, so that it starts as any other.
    let created = host.task.create(cx(), &host.container("c", &["exit", "3"])).await.unwrap();
    assert_eq!(i32::try_from(created.pid).unwrap(), host.vmm());
    start(&host.task, "c", "").await.unwrap();
    assert_eq!(wait(&host.task, "c", "").await, 3);
    delete(&host.task, "c", "").await.unwrap();

    end(&host).await;
    shutdown(&host).await;
}
