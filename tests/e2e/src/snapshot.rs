//! What pods go on from that ask to be saved.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use crate::configuration::Configuration;
use crate::{Outcome, run};

/// The configuration's `snapshot.store`.
pub const STORE: &str = "/var/lib/mayu/snapshots";

/// Runs `mayu snapshot`.
pub fn mayu_snapshot(arguments: &[&str]) -> Outcome {
    run(Command::new("mayu").arg("snapshot").args(arguments))
}

/// Lets pods ask for snapshots for as long as it lives, and has none at the beginning.
///
/// # Panics
/// As [`Configuration::set`].
#[track_caller]
pub fn allow() -> Configuration {
    let _ = fs::remove_dir_all(STORE);
    let names = ["", "-ready", "-hook", "-env"].map(|rest| format!("\"io.mayu.snapshot{rest}\"")).join(", ");
    Configuration::set("annotations", "allowed", &format!("[{names}]"))
}

/// Those that are whole.
pub fn snapshots() -> Vec<PathBuf> {
    let entries = fs::read_dir(STORE).into_iter().flatten().flatten().map(|entry| entry.path());
    entries.filter(|path| path.extension().is_none() && path.join("description.json").exists()).collect()
}
