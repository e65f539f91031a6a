//! Where snapshots are.
//!
//! ```text
//! /var/lib/mayu/snapshots/
//!   <name>.new/               what is being made; held (flock(2)) by its maker, and left behind by one that was killed
//!   <name>.failed             why the last one could not be made, or was of no use
//!   <name>/                   a snapshot. It appears here when it is whole
//!     description.json        what it is a snapshot of
//!     state                   what the VMM has saved
//!     memory                  the guest's memory
//!     working-set             what of it a pod touches, once one has gone on from here
//! ```

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{FallocateFlags, FlockOperation, fallocate, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use slog::{Logger, debug, info, warn};

use super::Likeness;
use crate::config::Snapshots;
use crate::error::file;
use crate::saved::{self, Saved};
use crate::{Error, Result};

/// How long one that could not be made is not tried again for.
const RETRY: Duration = Duration::from_secs(600);

/// All snapshots of a host.
#[derive(Clone, Debug)]
pub struct Store {
    config: Snapshots,
}

/// What is known of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Description {
    /// What a pod has to be like to go on from it.
    pub likeness: Likeness,
    /// The container that was saved, and its place on the share.
    pub container: String,
    /// When it was made, in seconds since 1970.
    pub made: u64,
}

/// One snapshot.
#[derive(Clone, Debug)]
pub struct Snapshot {
    path: PathBuf,
    /// What it is of.
    pub description: Description,
}

/// One that is being made. It goes away unless it is finished.
#[derive(Debug)]
pub struct Making {
    store: Store,
    name: String,
    /// What it is of.
    pub likeness: Likeness,
    /// The container that is like that, and no other may be saved as it.
    pub container: String,
    /// The guest's memory.
    pub memory: File,
    /// Where the VMM saves the rest.
    pub state: File,
    finished: bool,
    _lock: File,
}

impl Store {
    /// The snapshots of the configuration.
    pub fn new(config: &Snapshots) -> Self {
        Self { config: config.clone() }
    }

    /// All that are whole.
    ///
    /// # Errors
    /// [`Error::File`]: the directory cannot be read. That there is none is no error.
    pub fn list(&self) -> Result<Vec<Snapshot>> {
        let root = &self.config.store;
        let entries = match fs::read_dir(root) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(file("list", root))?,
        };
        let mut all = Vec::new();
        for entry in entries {
            let path = entry.map_err(file("list", root))?.path();
            if path.extension().is_none() {
                all.extend(Snapshot::read(path));
            }
        }
        all.sort_by_key(|snapshot| snapshot.description.made);
        Ok(all)
    }

    /// The one from which such a pod can go on.
    pub fn find(&self, likeness: &Likeness, log: &Logger) -> Option<Snapshot> {
        let snapshot = Snapshot::read(self.path(&likeness.name()))?;
        if snapshot.description.likeness != *likeness {
            return None;
        }
        if snapshot.age() > Duration::from_secs(self.config.max_age) {
            info!(log, "a snapshot is too old"; "snapshot" => snapshot.name());
            snapshot.take_away(log);
            return None;
        }
        Some(snapshot)
    }

    /// In what a pod is not like the newest one of its image, if there is one.
    pub fn differences(&self, likeness: &Likeness) -> Option<(Snapshot, Vec<String>)> {
        let of_image = |snapshot: &Snapshot| snapshot.description.likeness.image == likeness.image;
        let newest = self.list().ok()?.into_iter().rev().find(of_image)?;
        let differences = likeness.differences(&newest.description.likeness);
        Some((newest, differences))
    }

    /// Begins to make one of `container`, if there is room for it, nobody else makes it, and nobody has failed lately. Says otherwise why not.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn begin(
        &self,
        likeness: &Likeness,
        container: &str,
        log: &Logger,
    ) -> Result<std::result::Result<Making, String>> {
        let name = likeness.name();
        if let Some(reason) = self.failure(&name) {
            return Ok(Err(format!("it has failed lately: {reason}")));
        }
        self.clean();
        let size = u64::from(likeness.machine.memory_mib) << 20;
        if let Some(reason) = self.make_room(likeness, size, log)? {
            return Ok(Err(reason));
        }
        let path = self.new_path(&name);
        DirBuilder::new().recursive(true).mode(0o700).create(&path).map_err(file("create", &path))?;
        let lock = File::open(&path).map_err(file("open", &path))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Ok(Err("another pod is being saved".into())),
            Err(errno) => return Err(file("lock", path)(errno.into())),
        }
        // Whoever had it locked until now may have finished, and this is another directory by now, or none.
        let same = |there: &fs::Metadata| lock.metadata().is_ok_and(|ours| ours.ino() == there.ino());
        if !fs::metadata(&path).is_ok_and(|there| same(&there)) {
            return Ok(Err("another pod was saved just now".into()));
        }
        let create = |name| {
            let path = path.join(name);
            // What somebody has left who was killed.
            let _ = fs::remove_file(&path);
            let mut options = File::options();
            options.read(true).write(true).create_new(true).mode(0o600);
            options.open(&path).map_err(file("create", path))
        };
        let (memory, state) = (create("memory")?, create("state")?);
        let (store, likeness, container) = (self.clone(), likeness.clone(), container.into());
        let making = Making { store, name, likeness, container, memory, state, finished: false, _lock: lock };
        Ok(match reserve(&making.memory, size) {
            Ok(()) => Ok(making),
            Err(error) => Err(format!("reserve {} MiB for its memory: {error}", size >> 20)),
        })
    }

    /// Takes away what makers have left that were killed, and failures that do not matter any more.
    fn clean(&self) {
        for entry in fs::read_dir(&self.config.store).into_iter().flatten().flatten() {
            let path = entry.path();
            match path.extension().and_then(|extension| extension.to_str()) {
                Some("new") => {
                    let held = File::open(&path);
                    let free =
                        held.is_ok_and(|held| flock(&held, FlockOperation::NonBlockingLockExclusive).is_ok());
                    if free {
                        // Where somebody takes it over at this moment, there is one snapshot less.
                        let _ = fs::remove_dir_all(&path);
                    }
                }
                Some("failed") => {
                    let name = path.file_stem().unwrap_or_default().to_string_lossy();
                    if self.failure(&name).is_none() {
                        let _ = fs::remove_file(&path);
                    }
                }
                _ => {}
            }
        }
    }

    /// Why one could not be made, or was of no use, lately.
    fn failure(&self, name: &str) -> Option<String> {
        let path = self.failed_path(name);
        let age = fs::metadata(&path).ok()?.modified().ok()?.elapsed().unwrap_or_default();
        fs::read_to_string(path).ok().filter(|_| age < RETRY)
    }

    fn note_failure(&self, name: &str, reason: &str) {
        // What cannot be written down is tried again sooner.
        let _ = fs::write(self.failed_path(name), reason);
    }

    /// Makes room for one more of so many bytes: takes away what is too old or of another VMM, guest or host, and then what was not used for
    /// the longest time. Says why there is none, if so.
    fn make_room(&self, for_one_of: &Likeness, size: u64, log: &Logger) -> Result<Option<String>> {
        let mut all = self.list()?;
        all.retain(|snapshot| {
            let outdated = snapshot.description.likeness.machine.made_of != for_one_of.machine.made_of;
            let over = outdated || snapshot.age() > Duration::from_secs(self.config.max_age);
            if over {
                debug!(log, "an old snapshot is taken away"; "snapshot" => snapshot.name());
                snapshot.take_away(log);
            }
            !over
        });
        all.sort_by_key(Snapshot::last_used);
        let mut oldest = all.iter();
        let most = self.config.max_mib << 20;
        while self.used() + size > most {
            let Some(snapshot) = oldest.next() else {
                let (mib, most) = (size >> 20, self.config.max_mib);
                return Ok(Some(format!("there is no room for its {mib} MiB: snapshot.max_mib is {most}")));
            };
            info!(log, "a snapshot gives way to a new one"; "snapshot" => snapshot.name());
            snapshot.take_away(log);
        }
        Ok(None)
    }

    /// What all of them take, those included that are being made, in bytes.
    fn used(&self) -> u64 {
        let entries = fs::read_dir(&self.config.store).into_iter().flatten().flatten();
        let sizes = entries.filter_map(|entry| fs::metadata(entry.path().join("memory")).ok());
        sizes.map(|memory| memory.len()).sum()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.config.store.join(name)
    }

    fn new_path(&self, name: &str) -> PathBuf {
        self.config.store.join(format!("{name}.new"))
    }

    fn failed_path(&self, name: &str) -> PathBuf {
        self.config.store.join(format!("{name}.failed"))
    }
}

impl Snapshot {
    /// None where it is being taken away, or something else.
    fn read(path: PathBuf) -> Option<Self> {
        let description = fs::read(path.join(saved::DESCRIPTION)).ok()?;
        Some(Self { description: serde_json::from_slice(&description).ok()?, path })
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// What it is called.
    pub fn name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// For how long it has been there.
    pub fn age(&self) -> Duration {
        let made = SystemTime::UNIX_EPOCH + Duration::from_secs(self.description.made);
        SystemTime::now().duration_since(made).unwrap_or_default()
    }

    /// When a pod last went on from it.
    pub fn last_used(&self) -> SystemTime {
        let used = fs::metadata(self.path.join("state")).and_then(|metadata| metadata.modified());
        used.unwrap_or(SystemTime::UNIX_EPOCH)
    }

    /// How much of its memory is not empty, in bytes on disk.
    pub fn size(&self) -> u64 {
        saved::size(&self.path)
    }

    /// Opens its files, to be used.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn open(&self) -> Result<Saved> {
        let saved = Saved::open(&self.path)?;
        // Which one gives way to others is of no matter where this fails.
        let _ = File::open(self.path.join("state")).and_then(|state| state.set_modified(SystemTime::now()));
        Ok(saved)
    }

    /// Takes it away. Machines that have gone on from it hold its files.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn delete(&self) -> Result<()> {
        saved::delete(&self.path)
    }

    /// Takes it away because a pod could not go on from it, and has none like it made for a while.
    pub fn discard(&self, config: &Snapshots, reason: &Error, log: &Logger) {
        warn!(log, "a snapshot is of no use and is taken away";
            "snapshot" => self.name(), "reason" => reason.to_string());
        Store::new(config).note_failure(&self.name(), &reason.to_string());
        self.take_away(log);
    }

    fn take_away(&self, log: &Logger) {
        if let Err(error) = self.delete() {
            warn!(log, "a snapshot stays"; "snapshot" => self.name(), "error" => error.to_string());
        }
    }
}

impl Making {
    /// What it will be called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The guest's memory, opened to be read.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn memory_to_read(&self) -> Result<File> {
        let path = self.store.new_path(&self.name).join("memory");
        File::open(&path).map_err(file("open", path))
    }

    /// Makes it one that pods can go on from, once the VMM has saved it. Writes it to the disk first, which may take a while.
    ///
    /// # Errors
    /// [`Error::File`]; then there is none.
    pub fn finish(mut self) -> Result<Snapshot> {
        let new = self.store.new_path(&self.name);
        for (saved, name) in [(&self.memory, "memory"), (&self.state, "state")] {
            saved.sync_all().map_err(file("write back", new.join(name)))?;
        }
        let description = Description {
            likeness: self.likeness.clone(),
            container: self.container.clone(),
            made: saved::now(),
        };
        saved::describe(&new, &description)?;
        let path = self.store.path(&self.name);
        // One that has lost its description only.
        saved::remove(&path)?;
        fs::rename(&new, &path).map_err(file("rename", &new))?;
        self.finished = true;
        saved::sync(&self.store.config.store)?;
        let _ = fs::remove_file(self.store.failed_path(&self.name));
        Ok(Snapshot { path, description })
    }

    /// Gives up, and has none like it made for a while.
    pub fn fail(self, reason: &str, log: &Logger) {
        info!(log, "no snapshot is made"; "snapshot" => &self.name, "reason" => reason);
        self.store.note_failure(&self.name, reason);
    }
}

/// Has all of a file on the disk. A guest whose memory it is would be ended by the kernel where the file system has no room for a page of it.
fn reserve(file: &File, size: u64) -> io::Result<()> {
    match fallocate(file, FallocateFlags::empty(), 0, size) {
        // There are file systems that reserve nothing.
        Err(Errno::OPNOTSUPP) => file.set_len(size),
        reserved => Ok(reserved?),
    }
}

impl Drop for Making {
    fn drop(&mut self) {
        if !self.finished {
            // What stays is taken over by whoever makes the next one.
            let _ = fs::remove_dir_all(self.store.new_path(&self.name));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Vm;
    use crate::machine;
    use crate::pod_spec::Size;
    use crate::snapshot::{Ready, Wish};

    fn log() -> Logger {
        Logger::root(slog::Discard, slog::o!())
    }

    fn store() -> (tempfile::TempDir, Store) {
        let root = tempfile::tempdir().unwrap();
        let config = Snapshots { store: root.path().join("snapshots"), max_mib: 128, ..Snapshots::default() };
        (root, Store { config })
    }

    fn likeness(client: &str) -> Likeness {
        Likeness {
            client: client.into(),
            namespace: None,
            service_accounts: [].into(),
            wish: Wish { ready: Ready::Port(80), hook: None, may_differ: vec![] },
            machine: machine::machine(&Vm::default(), Size { vcpus: 1, memory_mib: 64 }, 1),
            image: vec![],
            environment: [].into(),
            sysctls: [].into(),
            spec: serde_json::Value::Null,
        }
    }

    fn begin(store: &Store, client: &str) -> std::result::Result<Making, String> {
        store.begin(&likeness(client), "c", &log()).unwrap()
    }

    fn make(store: &Store, client: &str) -> Snapshot {
        begin(store, client).unwrap().finish().unwrap()
    }

    #[test]
    fn one_is_found_when_it_is_whole() {
        let (_root, store) = store();
        assert!(store.list().unwrap().is_empty());
        let making = begin(&store, "a").unwrap();
        assert_eq!(making.memory.metadata().unwrap().len(), 64 << 20);
        assert!(store.find(&likeness("a"), &log()).is_none());
        assert!(begin(&store, "a").unwrap_err().contains("another pod"));

        making.finish().unwrap();

        let found = store.find(&likeness("a"), &log()).unwrap();
        assert_eq!(found.description.container, "c");
        assert!(found.open().is_ok());
        assert!(store.find(&likeness("b"), &log()).is_none());
    }

    #[test]
    fn one_that_is_given_up_leaves_nothing_and_is_not_tried_again_at_once() {
        let (_root, store) = store();
        drop(begin(&store, "a").unwrap());
        assert_eq!(fs::read_dir(&store.config.store).unwrap().count(), 0);

        begin(&store, "a").unwrap().fail("it is never ready", &log());
        assert!(begin(&store, "a").unwrap_err().contains("it is never ready"));

        make(&store, "b").discard(&store.config, &Error::NoSandbox, &log());
        assert!(store.find(&likeness("b"), &log()).is_none());
        assert!(begin(&store, "b").is_err());
        assert!(store.list().unwrap().is_empty());
    }

    #[test]
    fn what_a_maker_has_left_that_was_killed_goes_away() {
        let (_root, store) = store();
        let held = begin(&store, "held").unwrap();
        let left = store.new_path("left");
        fs::create_dir(&left).unwrap();
        fs::write(left.join("memory"), "large").unwrap();

        let making = begin(&store, "a").unwrap();

        assert!(!left.exists());
        assert!(store.new_path(held.name()).exists() && store.new_path(making.name()).exists());
    }

    #[test]
    fn the_one_that_was_not_used_for_the_longest_time_gives_way() {
        let (_root, store) = store();
        let [old, used] = ["old", "used"].map(|name| make(&store, name));
        let state = |snapshot: &Snapshot| File::open(snapshot.path.join("state")).unwrap();
        state(&old).set_modified(SystemTime::now() - Duration::from_secs(60)).unwrap();
        state(&used).set_modified(SystemTime::now() - Duration::from_secs(120)).unwrap();
        used.open().unwrap();

        make(&store, "new");

        let there = ["old", "used", "new"].map(|name| store.find(&likeness(name), &log()).is_some());
        assert_eq!(there, [false, true, true]);
    }

    #[test]
    fn there_are_no_more_than_there_is_room_for() {
        let (_root, mut store) = store();
        let first = begin(&store, "first").unwrap();
        make(&store, "second");
        // The one that is being made stays, and the other one gives way.
        let third = begin(&store, "third").unwrap();
        assert!(store.find(&likeness("second"), &log()).is_none());
        assert!(begin(&store, "fourth").unwrap_err().contains("snapshot.max_mib is 128"));
        drop((first, third));
        make(&store, "fourth");

        store.config.max_mib = 63;
        assert!(begin(&store, "fifth").unwrap_err().contains("no room for its 64 MiB"));
    }

    #[test]
    fn one_that_is_too_old_or_of_another_vmm_goes_away() {
        let (_root, mut store) = store();
        make(&store, "a");
        store.config.max_age = 0;
        let path = store.path(&likeness("a").name());
        let mut description = Snapshot::read(path.clone()).unwrap().description;
        description.made -= 1;
        saved::describe(&path, &description).unwrap();
        assert!(store.find(&likeness("a"), &log()).is_none());
        assert!(!path.exists());

        store.config.max_age = 60;
        make(&store, "a");
        let mut of_another = likeness("b");
        of_another.machine.made_of = [("mayu-vmm".to_owned(), "another".to_owned())].into();
        store.begin(&of_another, "c", &log()).unwrap().unwrap().finish().unwrap();
        assert!(!path.exists());
    }
}
