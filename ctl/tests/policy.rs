//! `mayu policy`, as it is run.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used, reason = "a test's way to fail")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

const POLICIES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../config/policies");

/// Its exit code, and what it has written to both of its outputs.
fn policy(arguments: &[&str], paths: &[&Path]) -> (i32, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mayu"));
    let empty = tempfile::NamedTempFile::new().unwrap();
    command.arg("policy").args(arguments).args(paths).env("MAYU_CONFIG", empty.path());
    let output = command.output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.code().unwrap(), String::from_utf8(text).unwrap())
}

struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn write(&self, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        path
    }

    /// The bundle of a container in containerd's state.
    fn bundle(&self, id: &str, spec: &Value) -> PathBuf {
        self.write(&format!("state/k8s.io/{id}/config.json"), spec.to_string())
    }

    fn record(&self, pod: &str) -> (i32, String) {
        policy(&["record", pod, "--state", self.0.path().join("state").to_str().unwrap()], &[])
    }
}

/// A container of pod `pod` as containerd writes it for a kubelet.
fn container(pod: &str, id: &str) -> Value {
    let uid = format!("uid-of-{pod}");
    let volumes = format!("/var/lib/kubelet/pods/{uid}/volumes");
    let bind = |destination: &str, source: String| json!({"destination": destination, "type": "bind", "source": source, "options": ["rbind", "ro"]});
    let namespaces = ["pid", "ipc", "network", "mount"].map(|kind| json!({"type": kind}));
    json!({
        "ociVersion": "1.1.0",
        "root": {"path": "rootfs", "readonly": true},
        "process": {
            "cwd": "/",
            "args": ["nginx", "-g", "daemon \"off\";\n"],
            "user": {"uid": 1000, "gid": 1000},
            "noNewPrivileges": true,
            "capabilities": {"bounding": ["CAP_CHOWN", "CAP_KILL", "CAP_NET_BIND_SERVICE", "CAP_SETUID"]},
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            bind("/data", format!("{volumes}/kubernetes.io~secret/data")),
            bind("/token", format!("{volumes}/kubernetes.io~projected/kube-api-access-{}", &id[..5])),
            bind("/log", format!("/var/lib/kubelet/pods/{uid}/containers/web/{}", &id[..8])),
            bind("/etc/hostname", format!("/var/lib/containerd/io.containerd.grpc.v1.cri/sandboxes/{pod}/hostname")),
        ],
        "linux": {
            "namespaces": namespaces,
            "resources": {"cpu": {"quota": 200_000, "period": 100_000}, "memory": {"limit": 64 << 20}},
        },
        "annotations": {
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.sandbox-id": pod,
            "io.kubernetes.cri.sandbox-uid": uid,
            "io.kubernetes.cri.sandbox-name": "web-0",
            "io.kubernetes.cri.sandbox-namespace": "shop",
            "io.kubernetes.cri.container-name": "web",
            "io.kubernetes.cri.image-name": "docker.io/library/nginx:1.29",
        },
    })
}

/// What stands for pod `pod`.
fn pause(pod: &str) -> Value {
    let mut spec = container(pod, "00000000");
    spec["process"]["args"] = json!(["/pause"]);
    spec["linux"]["sysctl"] = json!({"net.ipv4.ip_unprivileged_port_start": "0"});
    spec["annotations"]["io.kubernetes.cri.container-type"] = json!("sandbox");
    spec["annotations"]["io.kubernetes.cri.sandbox-memory"] = json!("67108864");
    spec
}

#[test]
fn a_spec_is_allowed_or_every_denial_is_told() {
    let files = Files::new();
    let policy_file = files.write(
        "policy.rego",
        r#"
        package mayu
        deny contains {"rule": "image", "field": "image", "value": input.image, "message": "not ours"} if {
            not startswith(input.image, "docker.io/library/")
        }
        deny contains {"rule": "size", "field": "size.memory_mib", "value": input.size.memory_mib} if {
            input.size.memory_mib != 320
        }
        "#,
    );
    let good = files.write("good.json", container("p1", "0123456789").to_string());
    let mut spec = container("p1", "0123456789");
    spec["annotations"]["io.kubernetes.cri.image-name"] = json!("evil.example/nginx");
    let bad = files.write("bad.json", spec.to_string());
    let request = json!({"request": "resize", "image": "", "size": {"vcpus": 1, "memory_mib": 512}});
    let resize = files.write("resize.json", request.to_string());
    let check = ["check", "--policy", policy_file.to_str().unwrap()];

    let (code, text) = policy(&check, &[&good]);
    assert_eq!((code, text.trim_end()), (0, format!("{}: allowed", good.display()).as_str()));

    let (code, text) = policy(&check, &[&good, &bad, &resize]);
    assert_eq!(code, 1, "{text}");
    for line in [
        "good.json: allowed",
        r#"bad.json: denied: image: image is "evil.example/nginx": not ours"#,
        r#"resize.json: denied: image: image is "": not ours"#,
        "resize.json: denied: size: size.memory_mib is 512",
    ] {
        assert!(text.lines().any(|found| found.ends_with(line)), "no {line:?} in: {text}");
    }

    let (code, text) = policy(&[&check[..], &["--time"]].concat(), &[&good]);
    assert!(code == 0 && text.contains(": decided in ") && text.contains(": loaded in "), "{text}");
}

#[test]
fn a_broken_policy_and_what_is_no_request_are_told_apart_from_a_denial() {
    let files = Files::new();
    let spec = files.write("spec.json", container("p1", "0123456789").to_string());
    let broken = files.write("broken.rego", "package mayu\n\ndeny contains if\n");
    let (code, text) = policy(&["check", "--policy", broken.to_str().unwrap()], &[&spec]);
    assert!(code == 2 && text.contains("broken.rego: line 3, column "), "{code}: {text}");

    let fine = files.write("fine.rego", "package mayu\ndeny contains \"no\"\n");
    let check = ["check", "--policy", fine.to_str().unwrap()];
    for (text, words) in [
        ("{}", "neither a request"),
        ("[", "EOF"),
        (r#"{"request": "pod", "sise": {}}"#, "unknown field `sise`"),
        (r#"{"ociVersion": "1.1.0", "linux": {"namespaces": []}}"#, "hostNetwork"),
    ] {
        let (code, said) = policy(&check, &[&files.write("document.json", text)]);
        assert!(code == 2 && said.contains(words), "{text}: {code}: {said}");
    }
}

#[test]
fn the_policies_that_come_with_mayu_pass_their_tests() {
    let (code, text) = policy(&["test", POLICIES], &[]);
    assert_eq!(code, 0, "{text}");
    assert!(
        text.contains("PASS  data.mayu.restricted_test.test_seccomp\n")
            && text.ends_with("tests, 0 failed\n")
    );
}

#[test]
fn a_test_that_does_not_hold_fails_them_and_none_is_no_success() {
    let files = Files::new();
    let test = files.write("a_test.rego", "package a_test\ntest_one if 1 == 1\ntest_two if 1 == 2\n");
    let directory = test.parent().unwrap();
    let (code, text) = policy(&["test"], &[directory]);
    assert_eq!(code, 1);
    assert_eq!(
        text,
        "PASS  data.a_test.test_one\nFAIL  data.a_test.test_two: it does not hold\n\n2 tests, 1 failed\n"
    );
    fs::remove_file(&test).unwrap();
    let (code, text) = policy(&["test"], &[directory]);
    assert!(code == 2 && text.contains("no rule test_"), "{text}");
}

#[test]
fn what_is_recorded_allows_the_same_in_another_pod_and_nothing_else() {
    let files = Files::new();
    files.bundle("p1", &pause("p1"));
    files.bundle("0123456789", &container("p1", "0123456789"));
    files.bundle("fedcba9876", &container("p2", "fedcba9876"));
    let (code, recorded) = files.record("p1");
    assert_eq!(code, 0, "{recorded}");
    let recorded = files.write("recorded.rego", recorded);
    let decide = |document: &Value| {
        let document = files.write("document.json", document.to_string());
        policy(&["check", "--policy", recorded.to_str().unwrap()], &[&document])
    };

    for same in [pause("p1"), pause("p2"), container("p1", "0123456789"), container("p2", "fedcba9876")] {
        let (code, text) = decide(&same);
        assert_eq!(code, 0, "{text}");
    }
    for (pointer, value, field) in [
        ("/annotations/io.kubernetes.cri.image-name", json!("docker.io/library/nginx:1.30"), "image"),
        ("/annotations/io.kubernetes.cri.container-name", json!("other"), "container.name"),
        ("/process/args", json!(["sh"]), "spec.process.args"),
        ("/process/user/uid", json!(0), "spec.process.user"),
        ("/process/cwd", json!("/root"), "spec.process.cwd"),
        ("/process/capabilities/bounding", json!(["CAP_SYS_ADMIN"]), "spec.process.capabilities"),
        ("/process/noNewPrivileges", json!(false), "spec.process.noNewPrivileges"),
        ("/root/readonly", json!(false), "spec.root.readonly"),
        ("/mounts/1/source", json!("/etc"), "spec.mounts"),
        ("/mounts/1/options", json!(["rbind", "rw"]), "spec.mounts"),
        (
            "/mounts/1/source",
            json!("/var/lib/kubelet/pods/uid-of-p2/volumes/kubernetes.io~secret/data"),
            "spec.mounts",
        ),
        ("/hooks", json!({"prestart": [{"path": "/bin/sh"}]}), "spec.hooks"),
        (
            "/linux/devices",
            json!([{"path": "/dev/sda", "type": "b", "major": 8, "minor": 0}]),
            "spec.linux.devices",
        ),
        ("/linux/sysctl", json!({"kernel.msgmax": "1"}), "spec.linux.sysctl"),
        ("/linux/maskedPaths", json!(["/proc/kcore"]), "spec.linux.maskedPaths"),
        ("/linux/readonlyPaths", json!(["/proc/sys"]), "spec.linux.readonlyPaths"),
        ("/linux/seccomp", json!({"defaultAction": "SCMP_ACT_LOG"}), "spec.linux.seccomp.defaultAction"),
        ("/linux/resources/cpu/quota", json!(300_000), "size.vcpus"),
        ("/linux/resources/memory/limit", json!(128 << 20), "size.memory_mib"),
    ] {
        let mut changed = container("p1", "0123456789");
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        changed.pointer_mut(parent).unwrap()[key] = Value::Null;
        *changed.pointer_mut(pointer).unwrap() = value;
        let (code, text) = decide(&changed);
        assert!(code == 1 && text.contains(&format!("denied: recorded: {field} is ")), "{pointer}: {text}");
    }
    let mut pod = pause("p1");
    pod["linux"]["sysctl"]["kernel.msgmax"] = json!("1");
    let (code, text) = decide(&pod);
    assert!(code == 1 && text.contains("denied: recorded: pod.sysctls is "), "{text}");
    let (code, text) = decide(
        &json!({"request": "exec", "process": {"cwd": "/", "args": ["sh"], "user": {"uid": 0, "gid": 0}}}),
    );
    assert!(code == 1 && text.contains(r#"process.args is ["sh"]"#), "{text}");
}

#[test]
fn a_pod_that_is_not_there_or_not_alone_is_said() {
    let files = Files::new();
    files.bundle("p1", &pause("p1"));
    files.bundle("p2", &pause("p2"));
    for (pod, words) in [("q", "there is none"), ("p", "there are several")] {
        let (code, text) = files.record(pod);
        assert!(code == 2 && text.contains(words), "{text}");
    }
}
