//! Templates: machines that were saved when they had booted, from which pods go on.
//!
//! ```text
//! /var/lib/mayu/templates/
//!   lock                      held (flock(2)) by whoever makes a template
//!   failed                    why the last one that was tried could not be made
//!   new/                      what is being made, or was when its maker was killed
//!   <number>/                 a template. It appears here when it is whole
//!     description.json        what it is a template of
//!     state                   what the VMM has saved
//!     memory                  the guest's memory
//!     working-set             what of it a pod touches for its first container, if that is known
//! ```
//!
//! A template is no pod's yet, and fits every pod whose machine has the same devices: vCPUs are brought online, memory is plugged in
//! and networks are attached while a guest runs. It belongs to one kernel, image, VMM and configuration on one host, and
//! is never changed: where any of these is another one, it is of no use any more.

mod make;
mod rehearsal;

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use mayu_vmm_api::VmConfig;
use serde::{Deserialize, Serialize};
use slog::{Logger, debug, warn};

use crate::config::{Config, Vm};
use crate::error::file;
use crate::pod_spec::Size;
use crate::saved::{self, PAGE, Saved};
use crate::vmm_process::HostFiles;
use crate::{Error, Result, machine};

pub use make::{make, make_in_background, try_out};

/// How long one that could not be made is not tried again for.
const RETRY: Duration = Duration::from_secs(600);

/// All templates of a host.
#[derive(Clone, Debug)]
pub struct Store {
    root: PathBuf,
}

/// One template.
#[derive(Clone, Debug)]
pub struct Template {
    path: PathBuf,
    /// What it is a template of.
    pub description: Description,
}

/// What is known of a template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Description {
    /// The machine, which is no pod's.
    pub machine: VmConfig,
    /// When it was made, in seconds since 1970.
    pub made: u64,
    /// The checksum of its memory: see [`checksum`].
    pub memory_checksum: u32,
}

/// The machine from which every pod of this configuration can go on.
///
/// # Errors
/// [`Error::File`]: what it is made of cannot be looked at.
pub fn machine(vm: &Vm, files: &HostFiles) -> Result<VmConfig> {
    let first = Size { vcpus: vm.vcpus, memory_mib: vm.memory_mib };
    let made_of = machine::made_of(vm, files)?;
    Ok(VmConfig { sandbox_id: "template".into(), made_of, ..machine::machine(vm, first, 1) })
}

impl Store {
    /// The templates of the configuration.
    pub fn new(config: &Config) -> Self {
        Self { root: config.template.directory.clone() }
    }

    /// All that are whole, the newest last.
    ///
    /// # Errors
    /// [`Error::File`]: the directory cannot be read. That there is none is no error.
    pub fn list(&self) -> Result<Vec<Template>> {
        let entries = match fs::read_dir(&self.root) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(file("list", &self.root))?,
        };
        let mut templates = Vec::new();
        for entry in entries {
            let path = entry.map_err(file("list", &self.root))?.path();
            // One that is just being taken away has none any more.
            if number(&path).is_some()
                && let Some(description) = read_description(&path)
            {
                templates.push(Template { path, description });
            }
        }
        templates.sort_by_key(|template| number(&template.path));
        Ok(templates)
    }

    /// The newest one of this machine.
    ///
    /// # Errors
    /// As [`Store::list`].
    pub fn find(&self, machine: &VmConfig) -> Result<Option<Template>> {
        let mut all = self.list()?;
        Ok(all
            .iter()
            .rposition(|template| template.description.machine == *machine)
            .map(|index| all.swap_remove(index)))
    }

    /// Why none could be made lately, if one was tried.
    pub fn failure(&self) -> Option<String> {
        let path = self.root.join("failed");
        let age = fs::metadata(&path).ok()?.modified().ok()?.elapsed().unwrap_or_default();
        fs::read_to_string(path).ok().filter(|_| age < RETRY)
    }

    fn note_failure(&self, reason: &Error) {
        // What cannot be written down is tried again sooner.
        let _ = fs::write(self.root.join("failed"), reason.to_string());
    }
}

impl Template {
    /// What it is called.
    pub fn name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Opens its files.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn open(&self) -> Result<Saved> {
        Saved::open(&self.path)
    }

    /// How much of its memory is not empty, in bytes on disk.
    pub fn size(&self) -> u64 {
        saved::size(&self.path)
    }

    /// Compares the memory with what it was. The state has a checksum that the VMM looks at itself, each time.
    ///
    /// # Errors
    /// [`Error::Template`] where it is not the same, or [`Error::File`].
    pub fn verify_memory(&self) -> Result<()> {
        let path = self.path.join("memory");
        let mut memory = File::open(&path).map_err(file("open", &path))?;
        let found = checksum(&mut memory).map_err(file("read", &path))?;
        let expected = self.description.memory_checksum;
        if found != expected {
            let reason = format!("its memory is damaged: its checksum is {found:08x}, not {expected:08x}");
            return Err(Error::Template { path: self.path.clone(), reason });
        }
        Ok(())
    }

    /// What is not the same any more in `now`, the machine that would be a template's today.
    pub fn outdated(&self, now: &VmConfig) -> Option<String> {
        let saved = &self.description.machine;
        let other = saved.made_of.keys().find(|name| saved.made_of.get(*name) != now.made_of.get(*name));
        match other {
            Some(name) => Some(format!("another {name}")),
            None => (saved != now).then(|| "another configuration".to_owned()),
        }
    }

    /// Takes it away. Machines that were restored from it go on: they hold its files.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn delete(&self) -> Result<()> {
        saved::delete(&self.path)
    }

    /// Takes it away because a machine could not be restored from it.
    pub fn discard(&self, reason: &Error, log: &Logger) {
        warn!(log, "a template is of no use and is taken away";
            "template" => self.path.display().to_string(), "reason" => reason.to_string());
        if let Err(error) = self.delete() {
            warn!(log, "a template stays"; "error" => error.to_string());
        }
    }
}

/// The template for a pod's machine, if there is one; has one made if there is none. A pod starts without one, so that nothing
/// here is an error.
pub fn for_pod(config: &Config, files: &HostFiles, log: &Logger) -> Option<(Template, Saved)> {
    if !config.template.enabled {
        return None;
    }
    let store = Store::new(config);
    let found = machine(&config.vm, files).and_then(|machine| store.find(&machine)).and_then(|template| {
        template.map(|template| template.open().map(|saved| (template, saved))).transpose()
    });
    match found {
        Ok(Some(found)) => return Some(found),
        Ok(None) => {}
        Err(error) => warn!(log, "no template can be looked for"; "error" => error.to_string()),
    }
    match store.failure() {
        _ if !config.template.on_demand => {}
        Some(reason) => debug!(log, "there is no template"; "reason" => reason),
        None => make_in_background(config, log),
    }
    None
}

fn number(path: &Path) -> Option<u64> {
    path.file_name()?.to_str()?.parse().ok()
}

fn read_description(path: &Path) -> Option<Description> {
    serde_json::from_slice(&fs::read(path.join(saved::DESCRIPTION)).ok()?).ok()
}

/// The CRC-32 of all pages that are not empty, each with its number before it: the same wherever a file has holes.
fn checksum(memory: &mut File) -> io::Result<u32> {
    let mut hasher = crc32fast::Hasher::new();
    let mut buffer = vec![0; 256 * PAGE];
    let mut number = 0_u64;
    loop {
        let mut length = 0;
        while length < buffer.len() {
            match memory.read(&mut buffer[length..])? {
                0 => break,
                count => length += count,
            }
        }
        if length == 0 {
            return Ok(hasher.finalize());
        }
        for page in buffer[..length].chunks(PAGE) {
            if page.iter().any(|byte| *byte != 0) {
                hasher.update(&number.to_le_bytes());
                hasher.update(page);
            }
            number += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Seek as _, Write as _};
    use std::os::unix::fs::FileExt as _;

    fn of(kernel: &str) -> VmConfig {
        let first = Size { vcpus: 1, memory_mib: 64 };
        let made_of = [("guest kernel".to_owned(), kernel.to_owned())].into();
        VmConfig { made_of, ..machine::machine(&Vm::default(), first, 1) }
    }

    fn put(store: &Store, name: &str, machine: &VmConfig, memory: &[u8]) {
        let path = store.root.join(name);
        fs::create_dir(&path).unwrap();
        fs::write(path.join("memory"), memory).unwrap();
        fs::write(path.join("state"), "state").unwrap();
        let memory_checksum = checksum(&mut File::open(path.join("memory")).unwrap()).unwrap();
        let description = Description { machine: machine.clone(), made: saved::now(), memory_checksum };
        fs::write(path.join("description.json"), serde_json::to_vec(&description).unwrap()).unwrap();
    }

    fn store() -> (tempfile::TempDir, Store) {
        let root = tempfile::tempdir().unwrap();
        let store = Store { root: root.path().into() };
        (root, store)
    }

    #[test]
    fn the_newest_that_is_whole_and_the_same_is_found() {
        let (root, store) = store();
        assert!(Store { root: root.path().join("none") }.list().unwrap().is_empty());
        for name in ["2", "10", "new"] {
            put(&store, name, &of("a"), b"memory");
        }
        put(&store, "11", &of("b"), b"memory");
        fs::create_dir(root.path().join("12")).unwrap();
        fs::write(root.path().join("lock"), "").unwrap();

        assert_eq!(store.find(&of("a")).unwrap().unwrap().name(), "10");
        assert!(store.find(&of("c")).unwrap().is_none());
        let names: Vec<_> = store.list().unwrap().iter().map(Template::name).collect();
        assert_eq!(names, ["2", "10", "11"]);
        store.find(&of("a")).unwrap().unwrap().delete().unwrap();
        assert_eq!(store.find(&of("a")).unwrap().unwrap().name(), "2");
        assert!(!root.path().join("10").exists());
    }

    #[test]
    fn what_is_not_the_same_any_more_is_told() {
        let (_root, store) = store();
        put(&store, "1", &of("a"), b"memory");
        let template = store.list().unwrap().remove(0);
        assert_eq!(template.outdated(&of("a")), None);
        assert_eq!(template.outdated(&of("b")).unwrap(), "another guest kernel");
        let larger = VmConfig { memory_mib: 65, ..of("a") };
        assert_eq!(template.outdated(&larger).unwrap(), "another configuration");
    }

    #[test]
    fn a_byte_that_changes_is_found_and_holes_are_not() {
        let (_root, store) = store();
        let mut memory = vec![0; 3 * PAGE];
        memory[PAGE + 7] = 1;
        put(&store, "1", &of("a"), &memory);
        let template = store.list().unwrap().remove(0);
        let path = template.path.join("memory");
        template.verify_memory().unwrap();

        let mut sparse = File::create(&path).unwrap();
        sparse.set_len(3 * PAGE as u64).unwrap();
        sparse.seek(io::SeekFrom::Start(PAGE as u64 + 7)).unwrap();
        sparse.write_all(&[1]).unwrap();
        template.verify_memory().unwrap();

        for (offset, byte) in [(PAGE + 7, 2), (0, 1), (3 * PAGE - 1, 9)] {
            let before = fs::read(&path).unwrap();
            sparse.write_all_at(&[byte], offset as u64).unwrap();
            let error = template.verify_memory().unwrap_err().to_string();
            assert!(error.contains("its memory is damaged"), "{offset}: {error}");
            fs::write(&path, before).unwrap();
        }
        // The same page in another place.
        memory.rotate_right(PAGE);
        fs::write(&path, &memory).unwrap();
        template.verify_memory().unwrap_err();
    }

    #[test]
    fn the_vmm_and_the_agent_mean_the_same_word() {
        assert_eq!(mayu_vmm_api::TEMPLATE_PARAMETER, mayu_agent_api::TEMPLATE_PARAMETER);
    }

    #[test]
    fn a_failure_is_remembered() {
        let (_root, store) = store();
        assert_eq!(store.failure(), None);
        store.note_failure(&Error::NoSandbox);
        assert_eq!(store.failure().unwrap(), Error::NoSandbox.to_string());
    }
}
