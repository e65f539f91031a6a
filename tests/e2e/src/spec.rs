//! Containers with an OCI spec of the test's own, for what `ctr run` has no flag for.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{Container, Outcome, ctr, run, runtime};

/// A root filesystem with busybox and an OCI spec that names it.
pub struct Bundle {
    dir: TempDir,
    /// The spec, to be changed before the container is run. It starts as `ctr oci spec` prints it, without a
    /// terminal.
    pub spec: Value,
}

impl Bundle {
    /// A bundle whose init is a shell script.
    ///
    /// # Panics
    /// It cannot be made.
    pub fn sh(script: &str) -> Self {
        let dir = TempDir::new().expect("there is room for a directory");
        install_busybox(&dir.path().join("rootfs"));
        let text = run(&mut ctr(["oci", "spec"])).success().text();
        let mut spec: Value = serde_json::from_str(&text).expect("ctr prints JSON");
        spec["root"] = json!({ "path": dir.path().join("rootfs"), "readonly": false });
        spec["process"]["terminal"] = json!(false);
        spec["process"]["env"] = json!(["PATH=/bin"]);
        spec["process"]["args"] = json!(["/bin/sh", "-c", script]);
        Self { dir, spec }
    }

    /// The root filesystem on the host.
    pub fn rootfs(&self) -> std::path::PathBuf {
        self.dir.path().join("rootfs")
    }

    /// Adds a mount to the spec.
    ///
    /// # Panics
    /// The spec has no list of mounts.
    pub fn mount(&mut self, mount: Value) {
        self.spec["mounts"].as_array_mut().expect("a list of mounts").push(mount);
    }

    /// Shows the container its own cgroup at /sys/fs/cgroup.
    ///
    /// # Panics
    /// The spec has no list of namespaces.
    pub fn mount_cgroup(&mut self) {
        let namespaces = self.spec["linux"]["namespaces"].as_array_mut().expect("a list of namespaces");
        if !namespaces.iter().any(|namespace| namespace["type"] == "cgroup") {
            namespaces.push(json!({ "type": "cgroup" }));
        }
        let options = ["ro", "nosuid", "noexec", "nodev"];
        self.mount(json!({ "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": options }));
    }

    /// Runs the container in the foreground until it ends.
    #[track_caller]
    pub fn run(&self) -> Outcome {
        let container = Container::unborn();
        run(&mut self.command(&container, &["--rm"]))
    }

    /// Starts the container in the background.
    #[track_caller]
    pub fn detached(&self) -> Container {
        let container = Container::unborn();
        run(&mut self.command(&container, &["--detach"])).success();
        container
    }

    /// `ctr run` of this bundle under the container's id.
    pub fn command(&self, container: &Container, flags: &[&str]) -> Command {
        let file = self.dir.path().join("config.json");
        fs::write(&file, self.spec.to_string()).expect("the spec can be written");
        let mut command = ctr(["run", "--runtime", &runtime(), "--config"]);
        command.arg(file).args(flags).arg(container.id());
        command
    }
}

/// Makes a root filesystem of busybox, in which the user `nobody` is in the group `extra`, 1234, as well.
#[track_caller]
pub(crate) fn install_busybox(rootfs: &Path) {
    for dir in ["bin", "dev", "etc", "proc", "sys", "tmp"] {
        fs::create_dir_all(rootfs.join(dir)).expect("there is room for a directory");
    }
    fs::copy("/usr/bin/busybox", rootfs.join("bin/busybox")).expect("the host has a static busybox");
    let applets = run(Command::new("busybox").arg("--list")).success().text();
    for applet in applets.lines().filter(|applet| *applet != "busybox") {
        symlink("busybox", rootfs.join("bin").join(applet)).expect("links can be made");
    }
    fs::write(rootfs.join("etc/passwd"), "root:x:0:0::/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n")
        .expect("writable");
    fs::write(rootfs.join("etc/group"), "root:x:0:\nnogroup:x:65534:\nextra:x:1234:nobody\n")
        .expect("writable");
}
