//! Functions that are saved when they are ready: pods like them go on from there, as pods of their own.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write as _;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::unix::fs::{FileExt as _, symlink};
use std::path::Path;

use k8s_cri::v1::{ContainerConfig, KeyValue, LinuxPodSandboxConfig, Mount, PodSandboxConfig};
use mayu_e2e::cri::{Cri, Pod, container, pod_config};
use mayu_e2e::host::Traces;
use mayu_e2e::shim::eventually;
use mayu_e2e::snapshot::{STORE, allow, snapshots};
use mayu_e2e::{PATIENCE, PYTHON};
use serde_json::Value;

/// Takes its time to begin, remembers who it was then, and tells who it is when it is asked.
const FUNCTION: &str = r#"
import json, os, socket, time
model = os.urandom(1 << 20) * 32
begun = {"run": os.urandom(16).hex(), "pod": os.environ.get("POD"), "at": time.time()}
library = open("/usr/bin/python3", "rb")
os.makedirs("/var/cache/function", exist_ok=True)
with open("/var/cache/function/warm", "w") as file: file.write(begun["run"])
server = socket.create_server(("", 8080))
print("ready", flush=True)
while True:
    client = server.accept()[0]
    if not client.recv(1000): continue
    library.seek(0)
    answer = {
        "begun": begun, "now": time.time(), "host": socket.gethostname(), "random": os.urandom(16).hex(),
        "model": sum(model[:: 1 << 20]) == model[0] * 32, "library": library.read(4) == b"\x7fELF",
        "cache": open("/var/cache/function/warm").read(), "file": open("/etc/hostname").read(),
        "environment": json.load(open("/run/mayu/environment.json")),
        "hook": os.path.exists("/tmp/hook") and open("/tmp/hook").read(),
    }
    client.sendall(json.dumps(answer).encode())
    client.close()
    print("answer of", socket.gethostname(), flush=True)
"#;

/// A function, as somebody deploys it.
#[derive(Clone)]
struct Function {
    namespace: &'static str,
    annotations: BTreeMap<&'static str, String>,
    mounts: Vec<Mount>,
    script: String,
}

/// Done to a snapshot's directory.
type Damage = fn(&Path);

/// One pod of it.
struct Running {
    pod: Pod,
    container: String,
}

/// One that is no other test's.
fn function(name: &str) -> Function {
    Function {
        namespace: "test",
        annotations: BTreeMap::from([
            ("io.mayu.snapshot", "warm".to_owned()),
            ("io.mayu.snapshot-ready", "port:8080".to_owned()),
            ("io.mayu.snapshot-env", "POD".to_owned()),
        ]),
        mounts: Vec::new(),
        script: format!("{FUNCTION}# {name}"),
    }
}

impl Function {
    #[track_caller]
    fn run(&self) -> Running {
        self.try_to_run().unwrap()
    }

    fn try_to_run(&self) -> Result<Running, tonic::Status> {
        let mut config = pod_config(LinuxPodSandboxConfig::default());
        let annotations = self.annotations.iter().map(|(name, value)| ((*name).to_owned(), value.clone()));
        config.annotations = annotations.collect();
        if let Some(metadata) = &mut config.metadata {
            metadata.namespace = self.namespace.into();
        }
        let name = config.hostname.clone();
        let mut pod = Cri::connect(&[PYTHON]).run(PodSandboxConfig { ..config })?;
        let container = pod.run_container(ContainerConfig {
            envs: vec![KeyValue { key: "POD".into(), value: name }],
            mounts: self.mounts.clone(),
            ..container("function", PYTHON, &["python3", "-c", &self.script])
        })?;
        Ok(Running { pod, container })
    }

    /// Its first pod, which has been saved.
    #[track_caller]
    fn saved(&self) -> Running {
        let before = snapshots().len();
        let mut first = self.run();
        first.ask();
        eventually("it is saved", || snapshots().len() > before);
        first
    }
}

impl Running {
    /// Asks it who it is, until it answers.
    #[track_caller]
    fn ask(&mut self) -> Value {
        let address = self.pod.address();
        let mut answer = None;
        eventually("it answers", || {
            answer = ask(address);
            answer.is_some()
        });
        answer.unwrap()
    }

    /// Which run of the program it is.
    #[track_caller]
    fn run(&mut self) -> String {
        text(&self.ask(), "/begun/run")
    }
}

fn ask(address: IpAddr) -> Option<Value> {
    let mut stream = TcpStream::connect_timeout(&SocketAddr::new(address, 8080), PATIENCE).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    stream.write_all(b"who are you?").ok()?;
    serde_json::from_reader(stream).ok()
}

#[track_caller]
fn text(answer: &Value, pointer: &str) -> String {
    answer.pointer(pointer).and_then(Value::as_str).unwrap_or_else(|| panic!("{answer}")).to_owned()
}

#[test]
fn a_pod_goes_on_where_one_like_it_was_saved_and_is_a_pod_of_its_own() {
    let _allowed = allow();
    let function = function("goes on");
    let mut first = function.saved();
    let before = first.ask();
    let run = text(&before, "/begun/run");
    assert_eq!(text(&before, "/begun/pod"), first.pod.hostname());
    assert_eq!(first.pod.exec(&first.container, "hostname").unwrap().1, first.pod.hostname());

    let mut others = [function.run(), function.run()];

    let mut random = vec![text(&before, "/random")];
    for other in &mut others {
        let answer = other.ask();
        assert_eq!(text(&answer, "/begun/run"), run, "it began when the first one did");
        assert_eq!(answer["begun"], before["begun"]);
        assert_eq!(text(&answer, "/cache"), run, "what it had written is there");
        assert!(answer["model"] == true && answer["library"] == true, "{answer}");
        let name = other.pod.hostname().to_owned();
        assert_eq!(text(&answer, "/host"), name);
        assert_eq!(text(&answer, "/environment/POD"), name);
        assert_eq!(text(&answer, "/environment/HOSTNAME"), name);
        assert_eq!(text(&answer, "/file").trim(), name, "a file of the pod's");
        assert!(answer["now"].as_f64() >= before["now"].as_f64(), "{answer}");
        random.push(text(&answer, "/random"));
        let printed = format!("of {name}");
        eventually("what it prints is in its log", || other.pod.log("function").contains(&printed));
        assert!(!other.pod.log("function").contains("ready"), "that was the first one's");
        let (code, said) = other.pod.exec(&other.container, "hostname; cat /proc/1/cmdline").unwrap();
        assert!(code == 0 && said.starts_with(&name) && said.contains("python3"), "{said}");
        assert!(
            other.pod.stats(&other.container).unwrap().memory.unwrap().working_set_bytes.unwrap().value
                > 32 << 20
        );
    }
    random.sort();
    random.dedup();
    assert_eq!(random.len(), 3, "no two of them say the same by chance");
    let answer = first.ask();
    assert_eq!(text(&answer, "/begun/run"), run, "the first one has gone on");
    assert!(first.pod.log("function").contains("ready"));
    for other in &mut others {
        other.pod.stop_container(&other.container, 0).unwrap();
        assert_eq!(other.pod.status(&other.container).unwrap().exit_code, 137);
    }
}

#[test]
fn pods_that_go_on_from_a_snapshot_leave_nothing() {
    let _allowed = allow();
    let function = function("leaves nothing");
    let run = function.saved().run();
    function.run().pod.remove().unwrap();
    let before = Traces::now();

    for _ in 0..3 {
        let mut other = function.run();
        assert_eq!(other.run(), run);
        other.pod.remove().unwrap();
    }

    before.assert_restored(3);
    assert_eq!(snapshots().len(), 1);
}

/// A volume as a kubelet makes it of a ConfigMap, a Secret or several sources. What was there is another version of it.
fn volume(kubelet: &Path, kind: &str, at: &str, name: &str, content: &str) -> Mount {
    let directory = kubelet.join("pods/pod/volumes").join(kind).join("volume");
    let _ = fs::remove_dir_all(&directory);
    fs::create_dir_all(directory.join("..2026")).unwrap();
    fs::write(directory.join("..2026").join(name), content).unwrap();
    symlink("..2026", directory.join("..data")).unwrap();
    symlink(Path::new("..data").join(name), directory.join(name)).unwrap();
    let host_path = directory.display().to_string();
    Mount { container_path: at.into(), host_path, readonly: true, ..Default::default() }
}

#[test]
fn a_pod_with_another_configuration_or_account_or_of_another_namespace_starts_anew() {
    let _allowed = allow();
    let kubelet = tempfile::tempdir_in("/var/tmp").unwrap();
    // The subject is `a` or `b`; the id, which is another one in each pod, 1 or 2.
    let (a1, a2, b) =
        ("e30.eyJzdWIiOiJhIiwianRpIjoxfQ.x", "e30.eyJzdWIiOiJhIiwianRpIjoyfQ.x", "e30.eyJzdWIiOiJiIn0.x");
    let with = |setting: &str, token: &str| {
        let mounts = vec![
            volume(kubelet.path(), "kubernetes.io~configmap", "/config", "setting", setting),
            volume(kubelet.path(), "kubernetes.io~projected", "/var/run/secrets/account", "token", token),
        ];
        Function { mounts, ..function("is told apart") }
    };
    let mut first = with("one", a1).saved();
    let run = first.run();
    first.pod.remove().unwrap();

    assert_eq!(with("one", a2).run().run(), run, "it is like the first one");
    assert_ne!(with("two", a2).run().run(), run, "another ConfigMap");
    assert_ne!(with("one", b).run().run(), run, "another service account");
    assert_ne!(Function { namespace: "other", ..with("one", a2) }.run().run(), run, "another namespace");
    let script = format!("{FUNCTION}# is another one");
    assert_ne!(Function { script, ..with("one", a2) }.run().run(), run, "another program");
    assert_eq!(with("one", a2).run().run(), run, "it is like the first one still");
}

#[test]
fn a_snapshot_that_is_damaged_is_not_run_and_the_pod_starts_anew() {
    let _allowed = allow();
    let damages: [(&str, Damage); 3] = [
        ("a byte of the state", |snapshot| {
            let state = File::options().read(true).write(true).open(snapshot.join("state")).unwrap();
            let mut byte = [0];
            state.read_exact_at(&mut byte, 1000).unwrap();
            state.write_all_at(&[!byte[0]], 1000).unwrap();
        }),
        ("the end of the memory", |snapshot| {
            let memory = File::options().write(true).open(snapshot.join("memory")).unwrap();
            memory.set_len(memory.metadata().unwrap().len() - 4096).unwrap();
        }),
        ("the description", |snapshot| fs::write(snapshot.join("description.json"), "{").unwrap()),
    ];
    for (what, damage) in damages {
        let function = function(what);
        let run = function.saved().run();
        damage(&snapshots()[0]);

        assert_ne!(function.run().run(), run, "{what}");

        let _ = fs::remove_dir_all(STORE);
    }
}

#[test]
fn a_hook_runs_with_the_new_environment_and_may_refuse() {
    let _allowed = allow();
    let with_hook = |hook: &str, name: &str| {
        let mut function = function(name);
        function.annotations.insert("io.mayu.snapshot-hook", "/tmp/on-restore".into());
        let setup = format!(
            "import os\nopen('/tmp/on-restore', 'w').write({hook:?}); os.chmod('/tmp/on-restore', 0o755)\n"
        );
        function.script = setup + &function.script;
        function
    };
    let good = with_hook("#!/bin/sh\necho \"$POD\" > /tmp/hook\n", "has a hook");
    let mut first = good.saved();
    assert_eq!(first.ask()["hook"], false, "nothing was restored there");
    let mut other = good.run();
    assert_eq!(text(&other.ask(), "/hook").trim(), other.pod.hostname());

    let bad = with_hook("#!/bin/sh\nexit 3\n", "has a hook that fails");
    let _first = bad.saved();
    let error = bad.try_to_run().err().expect("its hook has failed");
    assert!(error.message().contains("/tmp/on-restore"), "{error}");
}

#[test]
fn a_wish_that_cannot_be_understood_or_is_not_allowed_is_refused() {
    {
        let _allowed = allow();
        let mut unready = function("is never ready");
        unready.annotations.remove("io.mayu.snapshot-ready");
        let error = unready.try_to_run().err().expect("it does not say when it is ready");
        assert!(error.message().contains("io.mayu.snapshot-ready has to say"), "{error}");
    }
    let error = function("is not allowed").try_to_run().err().expect("it is not allowed");
    assert!(error.message().contains("annotations.allowed does not have it"), "{error}");
}
