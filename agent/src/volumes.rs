//! File systems in the guest's memory that containers of the pod share: Kubernetes' `emptyDir` of medium `Memory`. A container's
//! spec binds one as it does any other directory.

use std::fs;
use std::io::ErrorKind;
use std::path::PathBuf;

use mayu_agent_api::sandbox::CreateVolumeRequest;
use nix::mount::{MsFlags, mount};

use crate::error::{Error, Result};

/// How many there may be.
const MAX_VOLUMES: usize = 256;
/// The longest file name in bytes: `NAME_MAX` of linux/limits.h.
const MAX_NAME: usize = 255;
/// The bits of a mode that are permissions, inode(7).
const MAX_MODE: u32 = 0o7777;

/// The volumes of the pod. They stay until the guest ends.
pub struct Volumes {
    directory: PathBuf,
}

impl Volumes {
    /// Volumes below `directory`, each under its name.
    pub fn new(directory: PathBuf) -> Self {
        Self { directory }
    }

    /// Makes one.
    ///
    /// # Errors
    ///
    /// `InvalidRequest`, `TooMany`, `VolumeExists`, or `File` with what the kernel refused, after which nothing is left.
    pub fn create(&self, request: &CreateVolumeRequest) -> Result<()> {
        let CreateVolumeRequest { name, size_bytes, mode, uid, gid, .. } = request;
        if name.is_empty()
            || name.len() > MAX_NAME
            || name.contains(['/', '\0'])
            || name == "."
            || name == ".."
        {
            return Err(Error::InvalidRequest(format!("{name:?} is no name of a volume")));
        }
        if *mode > MAX_MODE {
            return Err(Error::InvalidRequest(format!("volume {name:?}: {mode:#o} are no permissions")));
        }
        fs::create_dir_all(&self.directory).map_err(Error::file("create", &self.directory))?;
        let present = fs::read_dir(&self.directory).map_err(Error::file("list", &self.directory))?;
        if present.count() >= MAX_VOLUMES {
            return Err(Error::TooMany { what: "volumes", limit: MAX_VOLUMES });
        }
        let path = self.directory.join(name);
        fs::create_dir(&path).map_err(|error| match error.kind() {
            ErrorKind::AlreadyExists => Error::VolumeExists(name.clone()),
            _ => Error::file("create", &path)(error),
        })?;
        let mut options = format!("mode={mode:o},uid={uid},gid={gid}");
        if *size_bytes > 0 {
            options += &format!(",size={size_bytes}");
        }
        // No flags, as kubelet mounts those on a node.
        let mounted = mount(Some("tmpfs"), &path, Some("tmpfs"), MsFlags::empty(), Some(options.as_str()));
        mounted.map_err(|errno| {
            // It is empty, and its name is to be free for another try.
            let _ = fs::remove_dir(&path);
            Error::file("mount a volume on", &path)(errno.into())
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::path::Path;
    use std::thread;

    use nix::sched::{CloneFlags, unshare};

    use super::*;

    fn request(name: &str) -> CreateVolumeRequest {
        CreateVolumeRequest { name: name.into(), mode: 0o1777, ..CreateVolumeRequest::default() }
    }

    /// Runs `test` with a directory for volumes, in a mount namespace that takes them with it.
    fn in_namespace(test: impl FnOnce(&Path) + Send + 'static) {
        let tested = thread::spawn(move || {
            let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            let none = None::<&str>;
            let entered =
                unshare(CloneFlags::CLONE_NEWNS).and_then(|()| mount(none, "/", none, private, none));
            if let Err(errno) = entered {
                eprintln!("SKIPPED: needs to make a mount namespace: {errno}");
                return;
            }
            let directory = tempfile::tempdir().unwrap();
            let below = directory.path().join("volumes");
            test(&below);
            for volume in fs::read_dir(&below).into_iter().flatten() {
                let _ = nix::mount::umount(&volume.unwrap().path());
            }
        });
        if let Err(panic) = tested.join() {
            std::panic::resume_unwind(panic);
        }
    }

    #[test]
    fn a_volume_has_its_size_and_its_owner() {
        in_namespace(|directory| {
            let volumes = Volumes::new(directory.into());
            let small = CreateVolumeRequest {
                size_bytes: 1 << 20,
                mode: 0o2770,
                uid: 1000,
                gid: 2000,
                ..request("small")
            };

            volumes.create(&small).unwrap();

            let path = directory.join("small");
            let metadata = fs::metadata(&path).unwrap();
            assert_eq!((metadata.mode() & 0o7777, metadata.uid(), metadata.gid()), (0o2770, 1000, 2000));
            fs::write(path.join("file"), vec![0; 1 << 20]).unwrap();
            let error = fs::write(path.join("more"), [0; 4096]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::StorageFull);
        });
    }

    #[test]
    fn a_volume_without_a_size_has_the_kernels() {
        in_namespace(|directory| {
            Volumes::new(directory.into()).create(&request("default")).unwrap();

            let path = directory.join("default");
            let status = nix::sys::statvfs::statvfs(&path).unwrap();
            assert!(status.blocks() * status.fragment_size() > 1 << 20);
            assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o1777);
        });
    }

    #[test]
    fn a_name_is_taken_once() {
        in_namespace(|directory| {
            let volumes = Volumes::new(directory.into());
            volumes.create(&request("one")).unwrap();
            fs::write(directory.join("one/file"), "kept").unwrap();

            assert!(
                matches!(volumes.create(&request("one")), Err(Error::VolumeExists(name)) if name == "one")
            );

            assert_eq!(fs::read_to_string(directory.join("one/file")).unwrap(), "kept");
            volumes.create(&request("two")).unwrap();
        });
    }

    #[test]
    fn what_the_kernel_refuses_leaves_nothing() {
        in_namespace(|directory| {
            let volumes = Volumes::new(directory.into());
            let nobody = CreateVolumeRequest { uid: u32::MAX, ..request("volume") };

            let error = volumes.create(&nobody).unwrap_err();

            assert!(error.to_string().contains("volumes/volume"), "{error}");
            volumes.create(&request("volume")).unwrap();
        });
    }

    #[test]
    fn their_number_is_bounded() {
        let directory = tempfile::tempdir().unwrap();
        for number in 0..MAX_VOLUMES {
            fs::create_dir(directory.path().join(number.to_string())).unwrap();
        }

        let error = Volumes::new(directory.path().into()).create(&request("one-more")).unwrap_err();

        assert!(matches!(error, Error::TooMany { what: "volumes", .. }), "{error}");
    }

    #[test]
    fn a_name_is_a_file_name() {
        let directory = tempfile::tempdir().unwrap();
        let volumes = Volumes::new(directory.path().join("volumes"));

        for name in ["", ".", "..", "a/b", "/a", "a\0b", &"x".repeat(256)] {
            assert!(matches!(volumes.create(&request(name)), Err(Error::InvalidRequest(_))), "{name:?}");
        }
        let mode = CreateVolumeRequest { mode: 0o10000, ..request("a") };
        assert!(matches!(volumes.create(&mode), Err(Error::InvalidRequest(_))));
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}
