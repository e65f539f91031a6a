//! File systems in the guest's memory that containers of the pod share: Kubernetes' `emptyDir` of medium `Memory`. A container's
//! spec binds one as it does any other directory.

use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{PermissionsExt, fchown};
use std::path::{Component, Path, PathBuf};

use mayu_agent_api::sandbox::CreateVolumeRequest;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat};
use nix::mount::{MsFlags, mount};
use nix::sys::stat::{Mode, mkdirat};

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
        let CreateVolumeRequest { name, mode, .. } = request;
        check_name(name)?;
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
        let mounted = match request.part_of.as_str() {
            "" => mount_memory(request, &path).map_err(Error::file("mount a volume on", &path)),
            _ => self.mount_part(request, &path),
        };
        mounted.inspect_err(|_| {
            // It is empty, and its name is to be free for another try.
            let _ = fs::remove_dir(&path);
        })
    }

    /// Binds a directory of a volume. Containers write to volumes, so no link in one is followed.
    fn mount_part(&self, request: &CreateVolumeRequest, target: &Path) -> Result<()> {
        check_name(&request.part_of)?;
        let volume = self.directory.join(&request.part_of);
        let failed = || Error::file("mount a part of a volume", &volume);
        let mut place = open_directory(None, volume.as_os_str()).map_err(failed())?;
        for component in Path::new(&request.path).components() {
            let Component::Normal(name) = component else {
                return Err(Error::InvalidRequest(format!("{:?} is no path in a volume", request.path)));
            };
            place = directory_in(&place, name, request).map_err(failed())?;
        }
        let source = format!("/proc/self/fd/{}", place.as_raw_fd());
        let none = None::<&str>;
        let bound = mount(Some(source.as_str()), target, none, MsFlags::MS_BIND, none);
        bound.map_err(|errno| failed()(errno.into()))
    }
}

fn check_name(name: &str) -> Result<()> {
    let fits = !name.is_empty() && name.len() <= MAX_NAME && !name.contains(['/', '\0']);
    if fits && name != "." && name != ".." {
        return Ok(());
    }
    Err(Error::InvalidRequest(format!("{name:?} is no name of a volume")))
}

fn mount_memory(request: &CreateVolumeRequest, target: &Path) -> io::Result<()> {
    let CreateVolumeRequest { size_bytes, mode, uid, gid, .. } = request;
    let mut options = format!("mode={mode:o},uid={uid},gid={gid}");
    if *size_bytes > 0 {
        options += &format!(",size={size_bytes}");
    }
    // No flags, as kubelet mounts those on a node.
    Ok(mount(Some("tmpfs"), target, Some("tmpfs"), MsFlags::empty(), Some(options.as_str()))?)
}

/// Opens a directory of another, having made it where it is missing.
fn directory_in(parent: &File, name: &OsStr, request: &CreateVolumeRequest) -> io::Result<File> {
    match mkdirat(parent, name, Mode::S_IRWXU) {
        Err(Errno::EEXIST) => open_directory(Some(parent), name),
        Err(errno) => Err(errno.into()),
        Ok(()) => {
            let made = open_directory(Some(parent), name)?;
            fchown(&made, Some(request.uid), Some(request.gid))?;
            // After the owner, whose change takes away what a set-group-ID bit says.
            made.set_permissions(Permissions::from_mode(request.mode))?;
            Ok(made)
        }
    }
}

fn open_directory(parent: Option<&File>, name: &OsStr) -> io::Result<File> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let opened = match parent {
        Some(parent) => openat(parent, name, flags, Mode::empty()),
        None => open(name, flags, Mode::empty()),
    };
    Ok(File::from(opened?))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, symlink};
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
    fn a_part_of_a_volume_is_made_and_the_same_for_all() {
        in_namespace(|directory| {
            let volumes = Volumes::new(directory.into());
            volumes.create(&request("whole")).unwrap();
            let part = |name| CreateVolumeRequest {
                part_of: "whole".into(),
                path: "a/b".into(),
                mode: 0o2775,
                gid: 2000,
                ..request(name)
            };

            volumes.create(&part("one")).unwrap();
            fs::write(directory.join("one/file"), "shared").unwrap();
            volumes.create(&part("other")).unwrap();

            for place in ["whole/a/b/file", "other/file"] {
                assert_eq!(fs::read_to_string(directory.join(place)).unwrap(), "shared");
            }
            let metadata = fs::metadata(directory.join("whole/a")).unwrap();
            assert_eq!((metadata.mode() & 0o7777, metadata.gid()), (0o2775, 2000));
        });
    }

    #[test]
    fn a_part_leads_out_of_no_volume() {
        in_namespace(|directory| {
            let volumes = Volumes::new(directory.into());
            volumes.create(&request("whole")).unwrap();
            symlink("/etc", directory.join("whole/link")).unwrap();
            fs::write(directory.join("whole/file"), "").unwrap();
            let part = |of: &str, path: &str| CreateVolumeRequest {
                part_of: of.into(),
                path: path.into(),
                ..request("part")
            };
            for (of, path) in [
                ("whole", "link"),
                ("whole", "link/ssl"),
                ("whole", "file"),
                ("whole", "../whole"),
                ("whole", "/etc"),
                ("none", "a"),
                ("../volumes", "whole"),
            ] {
                assert!(volumes.create(&part(of, path)).is_err(), "{of} {path}");
                assert!(!directory.join("part").exists(), "{of} {path}");
            }
            volumes.create(&part("whole", "fine")).unwrap();
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
