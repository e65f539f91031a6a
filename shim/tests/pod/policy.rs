//! What the operator's policy denies is not begun.

use std::fs;

use containerd_shim_protos::api::{CreateTaskRequest, UpdateTaskRequest};
use containerd_shim_protos::sandbox_api::{CreateSandboxRequest, StartSandboxRequest};
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use serde_json::json;
use ttrpc::Code;

use crate::host::Host;
use crate::{code, cx, exec, shutdown, start, wait};

/// Each kind of request has something that it must not be.
const POLICY: &str = r#"
package mayu

deny contains {"rule": "pods", "field": "pod.id", "value": input.pod.id, "message": "closed"} if {
    input.request == "pod"
    input.namespace == "ns"
    input.size.memory_mib > 1000
}

deny contains {"rule": "programs", "field": "spec.process.args", "value": args, "message": "no shells"} if {
    args := input.spec.process.args
    args[0] == "sh"
}

deny contains {"rule": "exec", "field": "process.args", "value": input.process.args, "message": "not this"} if {
    input.request == "exec"
    input.container.name == "c"
    input.process.args[0] != "exit"
}

deny contains {"rule": "size", "field": "size.vcpus", "value": input.size.vcpus, "message": "too large"} if {
    input.size.vcpus > 2
    input.request in {"container", "resize"}
}
"#;

fn resize(id: &str, quota: i64) -> UpdateTaskRequest {
    let resources = json!({"cpu": {"quota": quota, "period": 100_000}});
    let resources = Any { value: resources.to_string().into_bytes(), ..Default::default() };
    UpdateTaskRequest { id: id.into(), resources: MessageField::some(resources), ..Default::default() }
}

#[track_caller]
fn assert_denied<T: std::fmt::Debug>(result: ttrpc::Result<T>, reason: &str) {
    let (code, message) = code(result);
    assert_eq!(code, Code::PERMISSION_DENIED, "{message}");
    assert!(message.contains("denied by policy ") && message.ends_with(reason), "{message}");
}

#[tokio::test]
async fn a_container_that_is_denied_leaves_nothing_and_another_runs() {
    let Some(host) = Host::new("").await else { return };
    host.set_policy(POLICY);

    let denied = host.task.create(cx(), &host.container("no", &["sh"])).await;

    assert_denied(denied, r#"policy.rego: programs: spec.process.args is ["sh"]: no shells"#);
    host.assert_nothing_left();
    host.task.create(cx(), &host.container("c", &["exit", "3"])).await.unwrap();
    start(&host.task, "c", "").await.unwrap();
    assert_eq!(wait(&host.task, "c", "").await, 3);
    assert_denied(
        host.task.create(cx(), &host.container("also", &["sh"])).await,
        r#"programs: spec.process.args is ["sh"]: no shells"#,
    );
    crate::delete(&host.task, "c", "").await.unwrap();
    shutdown(&host).await;
}

#[tokio::test]
async fn a_pod_that_is_denied_leaves_nothing_however_it_is_made() {
    let Some(host) = Host::new("").await else { return };
    host.set_policy(POLICY);
    host.configure("[vm]\n", "[vm]\nmemory_mib = 1001\n");
    let reason = r#"pods: pod.id is "pod": closed"#;

    assert_denied(host.task.create(cx(), &host.sandbox("pod")).await, reason);
    let request = CreateSandboxRequest { sandbox_id: "pod".into(), ..Default::default() };
    host.sandboxes.create_sandbox(cx(), &request).await.unwrap();
    let request = StartSandboxRequest { sandbox_id: "pod".into(), ..Default::default() };
    assert_denied(host.sandboxes.start_sandbox(cx(), &request).await, reason);

    host.assert_nothing_left();
}

#[tokio::test]
async fn with_a_policy_that_is_broken_or_missing_nothing_starts() {
    for (policy, words) in [
        (Some("package mayu\n\ndeny contains if"), "line 3, column "),
        (Some("package mayu\n"), "no set `deny`"),
        (Some("package mayu\ndeny contains x if x := to_number(\"seven\")"), "line 2, column "),
        (None, "No such file or directory"),
    ] {
        let Some(host) = Host::new("").await else { return };
        host.set_policy(policy.unwrap_or_default());
        if policy.is_none() {
            fs::remove_file(host.path("policy.rego")).unwrap();
        }
        for request in [host.sandbox("pod"), host.container("c", &["exit", "0"])] {
            let (code, message) = code(host.task.create(cx(), &request).await);
            assert_eq!(code, Code::FAILED_PRECONDITION, "{message}");
            assert!(message.contains("policy.rego: ") && message.contains(words), "{message}");
        }
        host.assert_nothing_left();
    }
}

#[tokio::test]
async fn execs_and_new_limits_are_decided_on_by_the_policy_that_the_pod_began_with() {
    let Some(host) = Host::new("").await else { return };
    host.set_policy(POLICY);
    let created: CreateTaskRequest = host.container("c", &["sleep"]);
    host.task.create(cx(), &created).await.unwrap();
    start(&host.task, "c", "").await.unwrap();
    host.set_policy("broken meanwhile");

    let denied = host.task.exec(cx(), &exec("c", "no", &["id"])).await;
    assert_denied(denied, r#"exec: process.args is ["id"]: not this"#);
    assert_denied(host.task.update(cx(), &resize("c", 300_000)).await, "size: size.vcpus is 3: too large");

    host.task.exec(cx(), &exec("c", "yes", &["exit", "5"])).await.unwrap();
    start(&host.task, "c", "yes").await.unwrap();
    assert_eq!(wait(&host.task, "c", "yes").await, 5);
}
