use std::os::unix::fs::symlink;

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use serde_json::json;

use super::*;
use crate::config::Vm;
use crate::pod_spec::Size;
use crate::snapshot::Ready;

/// A host with an image and a kubelet's directory.
struct Node {
    root: tempfile::TempDir,
    config: Snapshots,
}

/// One pod of a Deployment, and what a test has changed in it.
#[derive(Clone)]
struct Function {
    number: u32,
    client: &'static str,
    namespace: &'static str,
    account: &'static str,
    key: &'static str,
    part: &'static str,
    layers: &'static str,
    sysctl: &'static str,
    memory_mib: u32,
    wish: Wish,
    spec: Value,
}

impl Node {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        for layer in ["1", "2", "3"] {
            fs::create_dir_all(root.path().join("layers").join(layer)).unwrap();
        }
        Self { root, config: Snapshots::default() }
    }

    /// Makes the pod's volumes as a kubelet does.
    fn kubelet(&self, of: &Function) -> PathBuf {
        let pod = self.root.path().join(format!("kubelet/pods/{}", uid(of.number)));
        let volume = |kind: &str, name: &str| pod.join("volumes").join(kind).join(name);
        let configuration = |directory: &Path, name: &str, text: &str| {
            let data = directory.join(format!("..2026_{}", of.number));
            fs::create_dir_all(&data).unwrap();
            fs::write(data.join(name), text).unwrap();
            let _ = fs::remove_file(directory.join("..data"));
            symlink(data.file_name().unwrap(), directory.join("..data")).unwrap();
            let _ = symlink(format!("..data/{name}"), directory.join(name));
        };
        configuration(&volume("kubernetes.io~secret", "key"), "key", of.key);
        let claims = json!({"sub": format!("system:serviceaccount:shop:{}", of.account), "jti": of.number})
            .to_string();
        let token = format!("e30.{}.c2ln", URL_SAFE_NO_PAD.encode(claims));
        configuration(&volume(PROJECTED, &format!("kube-api-access-{}", of.number)), "token", &token);
        let part = pod.join(SUBPATHS).join("config/main/0");
        fs::create_dir_all(part.parent().unwrap()).unwrap();
        fs::write(part, of.part).unwrap();
        pod
    }

    fn likeness(&self, of: &Function) -> Result<Likeness, String> {
        let kubelet = self.kubelet(of);
        let (pod_id, id) = (format!("{:064x}", of.number), format!("{:064x}", 1000 + of.number));
        let mount = |destination: &str, source: &Path| json!({"destination": destination, "type": "bind", "source": source, "options": ["rbind", "ro"]});
        let projected = format!("volumes/{PROJECTED}/kube-api-access-{}", of.number);
        let sandboxes = Path::new("/run/containerd/sandboxes").join(&pod_id);
        let mut spec = of.spec.clone();
        let mounts = spec["mounts"].as_array_mut().unwrap();
        mounts.push(mount("/key", &kubelet.join("volumes/kubernetes.io~secret/key")));
        mounts.push(mount("/account", &kubelet.join(projected)));
        mounts.push(mount("/part", &kubelet.join(SUBPATHS).join("config/main/0")));
        mounts.push(mount("/log", &kubelet.join(format!("containers/main/{:08x}", of.number))));
        mounts.push(mount("/scratch", &kubelet.join("volumes/kubernetes.io~empty-dir/scratch")));
        mounts.push(mount("/etc/hostname", &sandboxes.join("hostname")));
        spec["annotations"] = json!({"io.kubernetes.cri.sandbox-id": pod_id});
        spec["hostname"] = json!(format!("web-{}", of.number));
        spec["linux"]["cgroupsPath"] = json!(format!("/pods/{id}"));
        spec["linux"]["namespaces"] = json!([{"type": "ipc", "path": format!("/proc/{}/ns/ipc", of.number)}]);
        let environment = spec["process"]["env"].as_array_mut().unwrap();
        environment.push(format!("HOSTNAME=web-{}", of.number).into());
        environment.push(format!("POD_IP=10.0.0.{}", of.number).into());

        let upper = self.root.path().join(format!("upper-{}", of.number));
        fs::create_dir_all(&upper).unwrap();
        let layers = of.layers.split(':').map(|layer| self.root.path().join("layers").join(layer));
        let layers: Vec<_> = layers.map(|path| path.display().to_string()).collect();
        let options = vec![format!("upperdir={}", upper.display()), format!("lowerdir={}", layers.join(":"))];
        let rootfs = [Mount { type_: "overlay".into(), options, ..Default::default() }];
        let about =
            mayu_policy::Pod { namespace: of.namespace.into(), uid: uid(of.number), ..Default::default() };
        let sysctls = [("kernel.shm_rmid_forced".to_owned(), of.sysctl.to_owned())].into();
        let pod = PodSpec { about, sysctls, ..PodSpec::default() };
        let machine = machine::machine(&Vm::default(), Size { vcpus: 1, memory_mib: of.memory_mib }, 1);
        let spec = serde_json::from_value(spec).unwrap();
        Likeness::of(Parts {
            config: &self.config,
            client: of.client,
            pod: &pod,
            pod_id: &pod_id,
            id: &id,
            spec: &spec,
            rootfs: &rootfs,
            wish: &of.wish,
            machine: &machine,
        })
    }

    fn name(&self, of: &Function) -> String {
        self.likeness(of).unwrap().name()
    }
}

fn uid(number: u32) -> String {
    format!("6a1c6d9e-0000-4000-8000-{number:012}")
}

fn function(number: u32) -> Function {
    Function {
        number,
        client: "k8s.io",
        namespace: "shop",
        account: "web",
        key: "secret",
        part: "port = 80",
        layers: "2:1",
        sysctl: "0",
        memory_mib: 256,
        wish: Wish { ready: Ready::Port(80), hook: None, may_differ: vec!["POD_IP".into()] },
        spec: json!({
            "ociVersion": "1.1.0",
            "process": {
                "cwd": "/", "args": ["serve"], "env": ["MODE=fast"], "user": {"uid": 0, "gid": 0},
                "capabilities": {"bounding": ["CAP_CHOWN", "CAP_KILL", "CAP_SETGID", "CAP_SETUID", "CAP_MKNOD"]},
            },
            "root": {"path": "rootfs"},
            "mounts": [{"destination": "/data", "type": "bind", "source": "/srv/data", "options": ["rbind"]}],
            "linux": {},
        }),
    }
}

#[test]
fn pods_of_one_deployment_are_alike() {
    let node = Node::new();
    let (one, other) = (node.likeness(&function(1)).unwrap(), node.likeness(&function(2)).unwrap());
    assert_eq!(one, other);
    assert_eq!(one.name(), other.name());
    assert_eq!(one.service_accounts, ["system:serviceaccount:shop:web".to_owned()].into());
    let text = serde_json::to_vec(&one).unwrap();
    assert_eq!(serde_json::from_slice::<Likeness>(&text).unwrap().name(), one.name());
}

#[test]
fn what_a_container_can_have_read_makes_another_one() {
    let node = Node::new();
    let first = node.name(&function(1));
    let changed = |pointer: &str, value: Value| {
        let mut function = function(2);
        *function.spec.pointer_mut(pointer).unwrap() = value;
        function
    };
    let wish = function(2).wish;
    for (what, other) in [
        ("client", Function { client: "moby", ..function(2) }),
        ("namespace", Function { namespace: "bank", ..function(2) }),
        ("service account", Function { account: "admin", ..function(2) }),
        ("secret", Function { key: "other", ..function(2) }),
        ("part of a volume", Function { part: "port = 81", ..function(2) }),
        ("layer", Function { layers: "3:1", ..function(2) }),
        ("order of layers", Function { layers: "1:2", ..function(2) }),
        ("kernel parameter", Function { sysctl: "1", ..function(2) }),
        ("size", Function { memory_mib: 512, ..function(2) }),
        ("readiness", Function { wish: Wish { ready: Ready::Port(81), ..wish.clone() }, ..function(2) }),
        ("hook", Function { wish: Wish { hook: Some("/hook".into()), ..wish.clone() }, ..function(2) }),
        (
            "variable that may not differ",
            Function { wish: Wish { may_differ: vec![], ..wish }, ..function(2) },
        ),
        ("value", changed("/process/env/0", json!("MODE=slow"))),
        ("argument", changed("/process/args/0", json!("other"))),
        ("user", changed("/process/user/uid", json!(1000))),
        ("capability", changed("/process/capabilities/bounding/0", json!("CAP_SYS_ADMIN"))),
        ("path of the host", changed("/mounts/0/source", json!("/srv/other"))),
        ("place of a mount", changed("/mounts/0/destination", json!("/other"))),
    ] {
        assert_ne!(node.name(&other), first, "{what}");
    }
}

#[test]
fn the_difference_is_named_without_its_value() {
    let node = Node::new();
    let mut other = function(2);
    other.spec["process"]["env"] = json!(["MODE=secret", "MORE=1"]);
    other.spec["process"]["args"] = json!(["serve", "--fast"]);
    let differences = node
        .likeness(&Function { key: "other", ..other })
        .unwrap()
        .differences(&node.likeness(&function(1)).unwrap());
    let expected = ["/environment/MODE", "/environment/MORE", "/spec/mounts/1/content", "/spec/process/args"];
    assert_eq!(differences, expected);
}

#[test]
fn an_operator_may_let_namespaces_and_service_accounts_share() {
    let mut node = Node::new();
    let bank = Function { namespace: "bank", ..function(2) };
    let admin = Function { account: "admin", ..function(3) };
    node.config.across_namespaces = true;
    assert_eq!(node.name(&bank), node.name(&function(1)));
    assert_ne!(node.name(&admin), node.name(&function(1)));
    node.config.across_namespaces = false;
    node.config.across_service_accounts = true;
    assert_ne!(node.name(&bank), node.name(&function(1)));
    assert_eq!(node.name(&admin), node.name(&function(1)));
}

#[test]
fn an_image_that_came_anew_under_the_same_path_is_another_one() {
    let node = Node::new();
    let first = node.name(&function(1));
    let layer = node.root.path().join("layers/2");
    fs::rename(&layer, node.root.path().join("old")).unwrap();
    fs::create_dir(&layer).unwrap();
    assert_ne!(node.name(&function(2)), first);
}

#[test]
fn what_cannot_be_compared_has_no_snapshot() {
    let node = Node::new();
    let changed = node.root.path().join("upper-1");
    fs::create_dir(&changed).unwrap();
    fs::write(changed.join("file"), "").unwrap();
    assert!(node.likeness(&function(1)).unwrap_err().contains("changed before it was started"));

    let kubelet = node.kubelet(&function(2));
    let secret = kubelet.join("volumes/kubernetes.io~secret/key/..2026_2");
    mkfifo(&secret.join("pipe"), Mode::S_IRWXU).unwrap();
    assert!(node.likeness(&function(2)).unwrap_err().contains("is no file"));

    let kubelet = node.kubelet(&function(3));
    let large = fs::File::create(kubelet.join("volumes/kubernetes.io~secret/key/..2026_3/large")).unwrap();
    large.set_len(MAX_CONTENT + 1).unwrap();
    assert!(node.likeness(&function(3)).unwrap_err().contains("more than 16 MiB"));

    for (kind, options) in [("erofs", "ro"), ("overlay", "ro")] {
        let rootfs = Mount { type_: kind.into(), options: vec![options.into()], ..Default::default() };
        assert!(image(&[rootfs]).unwrap_err().contains("not an overlay"));
    }
    assert!(image(&[]).unwrap_err().contains("not one overlay"));
}

#[test]
fn a_short_id_hides_no_path() {
    let seen = |id: &str| Seen { ids: ids_of(id), budget: 0, accounts: None };
    assert_ne!(seen("a").common(Path::new("/srv/a")), seen("b").common(Path::new("/srv/b")));
    let long = "f".repeat(RANDOM);
    assert_eq!(seen(&long).common(&Path::new("/run/pods").join(&long)), "/run/pods/*");
    assert_eq!(seen(&long).common(Path::new("/srv/a")), "/srv/a");
}

fn ids_of(id: &str) -> Vec<String> {
    let wish = function(1).wish;
    let machine = machine::machine(&Vm::default(), Size { vcpus: 1, memory_mib: 256 }, 1);
    let (config, pod, spec) = (Snapshots::default(), PodSpec::default(), Spec::default());
    let (pod_id, rootfs) = (id, &[][..]);
    ids(Parts {
        config: &config,
        client: "default",
        pod: &pod,
        pod_id,
        id,
        spec: &spec,
        rootfs,
        wish: &wish,
        machine: &machine,
    })
}

#[test]
fn a_text_that_is_no_token_is_nobodys() {
    for text in ["", "a.b", "a.!.c", "a.e30.c"] {
        assert_eq!(service_account(text.as_bytes()), None, "{text}");
    }
}
