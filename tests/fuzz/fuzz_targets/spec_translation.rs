//! What a client asks for, translated for the guest: a container's OCI spec, and a Kubernetes pod of the Sandbox API.
//!
//! A spec is one that has everything, with some of its values changed: bytes that are no JSON at all end early.

#![no_main]

use std::path::Path;

use arbitrary::{Result, Unstructured};
use containerd_shim_protos::sandbox_api::CreateSandboxRequest;
use libfuzzer_sys::fuzz_target;
use mayu_agent_api::{POD_PID_NAMESPACE, SHARE_DIR, VOLUME_DIR};
use mayu_fuzz::plant;
use mayu_shim::container::PidNamespace;
use mayu_shim::pod_spec::{Limits, PodSpec};
use mayu_shim::spec::{self, Origin};
use mayu_shim::{annotations, id};
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use protobuf::{Message as _, MessageField};
use serde_json::{Value, json};
use slog::{Discard, Logger, o};

/// The container's identifier.
const ID: &str = "c1";

/// The longest part that is put there twice, in bytes.
const MAX_DOUBLED: usize = 4096;

/// Text that means something somewhere, or should not.
const WORDS: [&str; 17] = [
    "",
    "/",
    "..",
    "/proc/1/ns/pid",
    "bind",
    "rbind",
    "ro",
    "rslave",
    "rshared",
    "size=1k",
    "tmpfs",
    "sandbox",
    "/dev/shm",
    "io.mayu.vcpus",
    "/var/lib/kubelet/pods/1/volumes/kubernetes.io~empty-dir/a",
    "a\0b",
    "/run/mayu/volumes/../share",
];

fuzz_target!(init: plant(seeds()), |input: &[u8]| {
    let mut input = Unstructured::new(input);
    match input.arbitrary::<u8>() {
        Ok(0) => pod(input.take_rest()),
        Ok(1) => container(serde_json::from_slice(input.take_rest())),
        _ => {
            let mut spec = everything();
            while !input.is_empty() && change(&mut spec, &mut input).is_ok() {}
            container(serde_json::from_value(spec));
        }
    }
});

/// A pod of the Sandbox API, as bytes of protobuf.
fn pod(bytes: &[u8]) {
    let options = protobuf::well_known_types::any::Any {
        type_url: "runtime.v1.PodSandboxConfig".into(),
        value: bytes.to_vec(),
        ..Default::default()
    };
    let request = CreateSandboxRequest {
        sandbox_id: ID.into(),
        options: MessageField::some(options),
        ..Default::default()
    };
    if let Ok(pod) = PodSpec::from_request(&request) {
        assert!(pod.annotations.keys().all(|name| name.starts_with(annotations::PREFIX)));
    }
    // The same bytes as the request itself.
    if let Ok(request) = CreateSandboxRequest::parse_from_bytes(bytes) {
        let _ = PodSpec::from_request(&request);
        let _ = id::validate("sandbox", &request.sandbox_id);
    }
}

fn container(spec: serde_json::Result<Spec>) {
    let Ok(spec) = spec else {
        return;
    };
    let pod = PodSpec::from_oci(&spec);
    let limits = pod.map(|pod| pod.limits).unwrap_or_default();
    assert!(limits.plus(Limits::of_container(&spec)).cpu_millis >= limits.cpu_millis);

    let (log, bundle) = (Logger::root(Discard, o!()), Path::new("/nowhere"));
    let pid_namespace = if spec::shares_pids(&spec) { PidNamespace::Pod } else { PidNamespace::Own };
    let files = [("hosts", "/nowhere/hosts".into())];
    let origin = Origin { id: ID, place: ID, bundle, pid_namespace: &pid_namespace, files: &files };
    let Ok(guest) = spec::for_guest(spec, origin, &log) else {
        return;
    };
    check(&guest.spec);
    for (number, _) in guest.binds.iter().enumerate() {
        let path = Path::new(SHARE_DIR).join(ID).join("mounts").join(number.to_string());
        let mut mounts = guest.spec.mounts().iter().flatten();
        assert!(mounts.any(|mount| mount.source().as_ref() == Some(&path)), "{}", path.display());
    }
    for volume in &guest.volumes {
        assert_eq!(Path::new(&volume.name).components().count(), 1, "{}", volume.name);
    }
}

/// Nothing in it names anything of the host.
fn check(spec: &Spec) {
    let root = spec.root().as_ref().unwrap().path();
    assert_eq!(*root, Path::new(SHARE_DIR).join(ID).join("rootfs"));
    for mount in spec.mounts().iter().flatten() {
        let options = mount.options().iter().flatten();
        let is_bind = mount.typ().as_deref() == Some("bind")
            || options.clone().any(|option| option == "bind" || option == "rbind");
        if let Some(source) = mount.source().as_ref().filter(|_| is_bind) {
            assert!(source.starts_with(SHARE_DIR) || source.starts_with(VOLUME_DIR), "{}", source.display());
            assert!(!source.components().any(|part| part.as_os_str() == ".."), "{}", source.display());
        }
    }
    assert!(spec.hooks().is_none());
    assert!(!spec.annotations().iter().flatten().any(|(name, _)| name.starts_with(annotations::PREFIX)));
    let linux = spec.linux().as_ref().unwrap();
    assert_eq!(linux.cgroups_path().as_deref(), Some(Path::new("/mayu/c1")));
    for namespace in linux.namespaces().iter().flatten() {
        assert_ne!(namespace.typ(), LinuxNamespaceType::Network);
        assert!(namespace.path().as_deref().is_none_or(|path| path == Path::new(POD_PID_NAMESPACE)));
    }
}

/// Changes one value: its place is a path of indices down from the whole, then comes what becomes of it.
fn change(spec: &mut Value, input: &mut Unstructured<'_>) -> Result<()> {
    let depth = input.arbitrary::<u8>()? % 8;
    let mut place = spec;
    for _ in 0..depth {
        let index = usize::from(input.arbitrary::<u8>()?);
        // Where there is nothing further down, this is it.
        let has_parts = place.as_object().is_some_and(|map| !map.is_empty())
            || place.as_array().is_some_and(|list| !list.is_empty());
        if !has_parts {
            break;
        }
        place = match place {
            Value::Object(map) => {
                let count = map.len();
                map.values_mut().nth(index % count).unwrap()
            }
            Value::Array(list) => {
                let count = list.len();
                &mut list[index % count]
            }
            _ => unreachable!(),
        };
    }
    *place = value(place, input)?;
    Ok(())
}

/// What is to be in the place of `old`.
fn value(old: &Value, input: &mut Unstructured<'_>) -> Result<Value> {
    Ok(match input.arbitrary::<u8>()? % 9 {
        0 => Value::Null,
        1 => json!(input.arbitrary::<bool>()?),
        2 => json!(input.arbitrary::<i64>()?),
        3 => json!(input.arbitrary::<u64>()?),
        4 => json!(WORDS[usize::from(input.arbitrary::<u8>()?) % WORDS.len()]),
        5 => {
            let length = usize::from(input.arbitrary::<u8>()?).min(input.len());
            json!(String::from_utf8_lossy(input.bytes(length)?))
        }
        6 => json!([]),
        // Not again and again.
        7 if old.to_string().len() < MAX_DOUBLED => json!([old, old]),
        7 => json!([old]),
        _ => match old {
            // Without its first entry, or with another one.
            Value::Object(map) => Value::Object(map.clone().into_iter().skip(1).collect()),
            Value::Array(list) => Value::Array(list.iter().skip(1).cloned().collect()),
            _ => {
                let word = WORDS[usize::from(input.arbitrary::<u8>()?) % WORDS.len()];
                json!({word: old})
            }
        },
    })
}

/// A spec in which everything is that the shim looks at.
fn everything() -> Value {
    json!({
        "ociVersion": "1.1.0",
        "root": {"path": "rootfs", "readonly": true},
        "hostname": "web",
        "process": {
            "cwd": "/", "args": ["sh"], "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0},
            "apparmorProfile": "docker-default", "selinuxLabel": "svirt",
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev/shm", "type": "bind", "source": "/run/shm", "options": ["rbind", "ro", "size=1m"]},
            {"destination": "/data", "type": "bind", "source": "/srv/data", "options": ["rbind", "rslave", "rro"]},
            {"destination": "/etc/hosts", "source": "/var/hosts", "options": ["bind", "ro"]},
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "size=64m"]},
            {"destination": "/cache", "type": "bind", "options": ["rbind"],
             "source": "/var/lib/kubelet/pods/1/volumes/kubernetes.io~empty-dir/cache"},
            {"destination": "/part", "type": "bind", "options": ["rbind"],
             "source": "/var/lib/kubelet/pods/1/volume-subpaths/cache/web/0"},
        ],
        "hooks": {"prestart": [{"path": "/bin/hook", "args": ["hook"], "timeout": 3}], "startContainer": [{"path": "/x"}]},
        "annotations": {
            "io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "pod",
            "io.kubernetes.cri.sandbox-cpu-quota": "150000", "io.kubernetes.cri.sandbox-cpu-period": "100000",
            "io.kubernetes.cri.sandbox-memory": "134217728", "io.mayu.vcpus": "2", "io.mayu.guest.block-devices": "{}",
        },
        "linux": {
            "cgroupsPath": "/kubepods/pod", "mountLabel": "system_u", "sysctl": {"net.core.somaxconn": "7"},
            "namespaces": [
                {"type": "pid", "path": "/proc/1/ns/pid"}, {"type": "ipc", "path": "/proc/1/ns/ipc"},
                {"type": "uts", "path": "/proc/1/ns/uts"}, {"type": "network", "path": "/run/netns/1"},
                {"type": "mount"}, {"type": "cgroup"},
            ],
            "devices": [
                {"path": "/dev/null", "type": "c", "major": 1, "minor": 3},
                {"path": "/dev/sda", "type": "b", "major": 8, "minor": 0, "fileMode": 384},
            ],
            "resources": {
                "devices": [{"allow": false, "access": "rwm"}, {"allow": true, "type": "b", "major": 8, "minor": 0, "access": "r"}],
                "memory": {"limit": 134_217_728}, "cpu": {"quota": 150_000, "period": 100_000, "shares": 2},
                "pids": {"limit": 7}, "hugepageLimits": [{"pageSize": "2MB", "limit": 0}],
            },
            "intelRdt": {"closID": "x"}, "maskedPaths": ["/proc/kcore"], "readonlyPaths": ["/proc/sys"],
        },
    })
}

fn seeds() -> Vec<Vec<u8>> {
    let text = everything().to_string().into_bytes();
    // Protobuf: a host name in field 2, annotations in field 7, and the directory of logs in field 3.
    let pod = b"\x12\x03web\x1a\x04/log\x3a\x12\x0a\x0dio.mayu.vcpus\x12\x01\x32".to_vec();
    // One place, and a null there; the same with a word.
    let changes = [2, 3, 4, 2, 1, 0, 2, 4, 1, 4, 8].to_vec();
    vec![[vec![0], pod].concat(), [vec![1], text].concat(), [vec![2], changes].concat(), vec![2]]
}
