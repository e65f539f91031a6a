//! Images that a test makes for itself, in the layout of the OCI image specification.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::cri::NAMESPACE;
use crate::spec::install_busybox;
use crate::{ctr, run};

/// An image that CRI knows, until it is dropped.
pub struct Image {
    name: String,
}

impl Image {
    /// An image of busybox whose user `nobody` is in the group `extra`, 1234, as well.
    ///
    /// # Panics
    /// It cannot be made.
    #[track_caller]
    pub fn with_groups() -> Self {
        let root = TempDir::new().expect("there is room for a directory");
        install_busybox(root.path());
        Self::make("groups", &[root.path()])
    }

    /// An image of busybox with symbolic links in its root.
    ///
    /// # Panics
    /// It cannot be made.
    #[track_caller]
    pub fn with_links(links: &[(&str, &str)]) -> Self {
        let root = TempDir::new().expect("there is room for a directory");
        install_busybox(root.path());
        for (name, target) in links {
            symlink(target, root.path().join(name)).expect("links can be made");
        }
        Self::make("links", &[root.path()])
    }

    /// An image with nothing in it.
    ///
    /// # Panics
    /// It cannot be made.
    #[track_caller]
    pub fn without_layers() -> Self {
        Self::make("empty", &[])
    }

    /// What a container's configuration calls it.
    pub fn name(&self) -> &str {
        &self.name
    }

    #[track_caller]
    fn make(name: &str, layers: &[&Path]) -> Self {
        let name = format!("docker.io/mayu/{name}:made");
        let layout = Layout::new();
        let layers: Vec<_> = layers.iter().map(|root| layout.add_layer(root)).collect();
        let digests: Vec<_> = layers.iter().map(|layer| layer["digest"].clone()).collect();
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": { "Env": ["PATH=/bin"] },
            "rootfs": { "type": "layers", "diff_ids": digests },
        });
        let config = layout.add("application/vnd.oci.image.config.v1+json", config.to_string().as_bytes());
        let kind = "application/vnd.oci.image.manifest.v1+json";
        let manifest = json!({ "schemaVersion": 2, "mediaType": kind, "config": config, "layers": layers });
        let mut manifest = layout.add(kind, manifest.to_string().as_bytes());
        manifest["annotations"] =
            json!({ "io.containerd.image.name": name, "org.opencontainers.image.ref.name": name });
        layout.import(&json!({ "schemaVersion": 2, "manifests": [manifest] }));
        Self { name }
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        drop(ctr(["-n", NAMESPACE, "images", "rm", &self.name]).output());
    }
}

/// A directory in the layout of images.
struct Layout {
    dir: TempDir,
}

impl Layout {
    #[track_caller]
    fn new() -> Self {
        let dir = TempDir::new().expect("there is room for a directory");
        fs::create_dir_all(dir.path().join("blobs/sha256")).expect("there is room for a directory");
        fs::write(dir.path().join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).expect("writable");
        Self { dir }
    }

    /// Adds a blob, and returns its descriptor.
    #[track_caller]
    fn add(&self, media_type: &str, bytes: &[u8]) -> Value {
        let digest: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        fs::write(self.dir.path().join("blobs/sha256").join(&digest), bytes).expect("there is room");
        json!({ "mediaType": media_type, "digest": format!("sha256:{digest}"), "size": bytes.len() })
    }

    #[track_caller]
    fn add_layer(&self, root: &Path) -> Value {
        let layer = run(Command::new("tar").arg("-C").arg(root).args(["-c", "."])).success().stdout;
        self.add("application/vnd.oci.image.layer.v1.tar", &layer)
    }

    /// CRI unpacks the image when the first container wants it.
    #[track_caller]
    fn import(&self, index: &Value) {
        fs::write(self.dir.path().join("index.json"), index.to_string()).expect("writable");
        let archive = tempfile::NamedTempFile::new().expect("a temporary file");
        run(Command::new("tar").arg("-C").arg(self.dir.path()).arg("-cf").arg(archive.path()).arg("."))
            .success();
        run(ctr(["-n", NAMESPACE, "images", "import", "--no-unpack"]).arg(archive.path())).success();
    }
}
