//! What is around a shim: a bundle, a configuration file, and containerd's event service.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::api::{CreateTaskRequest, Empty};
use containerd_shim_protos::sandbox_async::SandboxClient;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::{self, TaskClient, create_events};
use mayu_shim::events::Events;
use mayu_shim::pod::{Pod, Roots};
use mayu_shim::{sandbox_service, task};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use serde_json::json;
use slog::Logger;
use tokio::sync::mpsc;
use ttrpc::r#async::{Client, Server, TtrpcContext};

use crate::{hostile, stand_in};

/// A part of the configuration with which pods may ask to be saved.
const ALLOWED: &str = "[annotations]\nallowed = [\"io.mayu.snapshot\", \"io.mayu.snapshot-ready\"]\n[vm]\n";

/// A shim and everything around it. Panics at its end when something is left.
pub struct Host {
    folder: tempfile::TempDir,
    /// What the shim knows.
    pub pod: Arc<Pod>,
    /// What containerd asks it with.
    pub task: TaskClient,
    /// What containerd asks it with for pods without a container that stands for them.
    pub sandboxes: SandboxClient,
    events: mpsc::UnboundedReceiver<String>,
    _servers: [Server; 2],
}

impl Host {
    /// A shim whose VMM is the stand-in. None where this cannot be tried, which is said.
    pub async fn new(behaviour: &str) -> Option<Self> {
        if let Some(lacking) = lacking() {
            eprintln!("SKIPPED: {lacking}");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        fs::create_dir(root.join("rootfs")).unwrap();
        write_config(root, behaviour);
        let (events, containerd) = events_service(root).await;
        let log = Logger::root(slog::Discard, slog::o!());
        let publisher = Events::new(&root.join("ttrpc").display().to_string(), "ns", log.clone());
        let roots = Roots { config: root.join("config.toml"), state: root.join("state") };
        let pod = Pod::new("pod", "ns", roots, publisher, log);
        let address = format!("unix://{}", root.join("shim").display());
        let mut shim = Server::new().bind(&address).unwrap().register_service(task::services(&pod));
        shim = shim.register_service(sandbox_service::services(&pod));
        shim.start().await.unwrap();
        let client = Client::connect(&address).await.unwrap();
        let (task, sandboxes) = (TaskClient::new(client.clone()), SandboxClient::new(client));
        Some(Self { folder, pod, task, sandboxes, events, _servers: [containerd, shim] })
    }

    /// A path of this test.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Has the configuration name a policy with this text.
    pub fn set_policy(&self, text: &str) {
        let path = self.path("policy.rego");
        fs::write(&path, text).unwrap();
        self.configure("[vm]\n", &format!("policy = \"{}\"\n[vm]\n", path.display()));
    }

    /// Changes a part of the configuration, where it is not as it is to be already.
    pub fn configure(&self, part: &str, new: &str) {
        let path = self.path("config.toml");
        let text = fs::read_to_string(&path).unwrap();
        if !text.contains(new) {
            fs::write(&path, text.replacen(part, new, 1)).unwrap();
        }
    }

    /// A FIFO as containerd's client makes it.
    pub fn fifo(&self, name: &str) -> String {
        let path = self.path(name);
        mkfifo(&path, Mode::S_IRWXU).unwrap();
        path.display().to_string()
    }

    /// The request to create a container that does what `arguments` say, with its bundle.
    pub fn container(&self, id: &str, arguments: &[&str]) -> CreateTaskRequest {
        self.bundle(id, arguments, &json!({}))
    }

    /// A request for what stands for the pod itself with CRI.
    pub fn sandbox(&self, id: &str) -> CreateTaskRequest {
        self.bundle(id, &["/pause"], &json!({"io.kubernetes.cri.container-type": "sandbox"}))
    }

    /// As [`Host::sandbox`], of a pod that is to be saved when it is ready.
    pub fn warm_sandbox(&self, id: &str) -> CreateTaskRequest {
        self.configure("[vm]\n", ALLOWED);
        let annotations = json!({
            "io.kubernetes.cri.container-type": "sandbox",
            "io.mayu.snapshot": "warm",
            "io.mayu.snapshot-ready": "port:80",
        });
        self.bundle(id, &["/pause"], &annotations)
    }

    fn bundle(&self, id: &str, arguments: &[&str], annotations: &serde_json::Value) -> CreateTaskRequest {
        let bundle = self.path(&format!("bundle-{id}"));
        fs::create_dir(&bundle).unwrap();
        let namespaces = ["network", "pid", "ipc", "mount"].map(|kind| json!({"type": kind}));
        let spec = json!({
            "ociVersion": "1.1.0",
            "root": {"path": self.path("rootfs")},
            "process": {"cwd": "/", "args": arguments, "user": {"uid": 0, "gid": 0}},
            "linux": {"namespaces": namespaces},
            "annotations": annotations,
        });
        fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
        CreateTaskRequest { id: id.into(), bundle: bundle.display().to_string(), ..Default::default() }
    }

    /// The next event's topic and what it says, as `/tasks/exit c 7`.
    pub async fn event(&mut self) -> String {
        self.events.recv().await.unwrap()
    }

    /// Checks that the pod has left nothing: no process, mount, directory or uid.
    pub fn assert_nothing_left(&self) {
        let left = fs::read_dir(self.path("state")).map_or(0, Iterator::count);
        assert_eq!(left, 0, "the pod's directory or the lease of its uid is there");
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(self.folder.path().to_str().unwrap()), "{mounts}");
        assert_eq!(stand_ins(self.folder.path()), Vec::<i32>::new());
    }

    /// Whether there is a stand-in.
    pub fn has_vmm(&self) -> bool {
        !stand_ins(self.folder.path()).is_empty()
    }

    /// The stand-in's process.
    pub fn vmm(&self) -> i32 {
        stand_ins(self.folder.path())[0]
    }
}

fn lacking() -> Option<&'static str> {
    if !nix::unistd::geteuid().is_root() {
        return Some("needs root: mounts");
    }
    if !Path::new("/dev/kvm").exists() {
        return Some("needs KVM: the shim opens /dev/kvm for the VMM");
    }
    None
}

/// The stand-in forks as the real VMM does: the program that the shim spawns ends when the one inside has started, which has
/// a network namespace of its own.
fn write_config(root: &Path, behaviour: &str) {
    let program = std::env::current_exe().unwrap();
    let script = root.join("mayu-vmm");
    let text = format!(
        "#!/bin/sh\n{}={} unshare --net {} --exact the_stand_in --nocapture >&2 &\n",
        stand_in::VARIABLE,
        root.display(),
        program.display()
    );
    fs::write(&script, text).unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    for file in ["vmlinux", "image"] {
        fs::write(root.join(file), "").unwrap();
    }
    let config = format!(
        "[vm]\nvmm = \"{0}/mayu-vmm\"\nkernel = \"{0}/vmlinux\"\nimage = \"{0}/image\"\nkernel_args = \"{behaviour}\"\n\
         [timeouts]\nboot = {1}\nrequest = {2}\nhealth = {3}\nshutdown = 1\n",
        root.display(),
        if behaviour == "silent" { 1 } else { 60 },
        if behaviour == "quick" || hostile::NONSENSE.contains(&behaviour) { 5 } else { 30 },
        u8::from(behaviour == "quick"),
    );
    fs::write(root.join("config.toml"), config).unwrap();
}

struct Containerd(mpsc::UnboundedSender<String>);

#[async_trait]
impl shim_async::Events for Containerd {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        use containerd_shim_protos::events::task::{TaskExecAdded, TaskExecStarted, TaskExit};
        use protobuf::Message;
        let envelope = request.envelope.unwrap();
        let value = envelope.event.unwrap().value;
        let detail = match envelope.topic.as_str() {
            "/tasks/exit" => {
                let exit = TaskExit::parse_from_bytes(&value).unwrap();
                format!(" {} {}", exit.id, exit.exit_status)
            }
            "/tasks/exec-added" => format!(" {}", TaskExecAdded::parse_from_bytes(&value).unwrap().exec_id),
            "/tasks/exec-started" => {
                format!(" {}", TaskExecStarted::parse_from_bytes(&value).unwrap().exec_id)
            }
            _ => String::new(),
        };
        self.0.send(format!("{}{detail}", envelope.topic)).unwrap();
        Ok(Empty::new())
    }
}

async fn events_service(root: &Path) -> (mpsc::UnboundedReceiver<String>, Server) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let address = format!("unix://{}", root.join("ttrpc").display());
    let service = create_events(Arc::new(Containerd(sender)));
    let mut server = Server::new().bind(&address).unwrap().register_service(service);
    server.start().await.unwrap();
    (receiver, server)
}

/// The processes that are stand-ins of the test in `root`.
fn stand_ins(root: &Path) -> Vec<i32> {
    let variable = format!("{}={}", stand_in::VARIABLE, root.display());
    let is_ours = |pid: &i32| {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|entry| entry == variable.as_bytes())
    };
    let entries = fs::read_dir("/proc").unwrap().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(is_ours).collect()
}
