//! What pods start from.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Outcome, run};

/// The configuration's `template.directory`.
pub const DIRECTORY: &str = "/var/lib/mayu/templates";

/// Runs `mayu template`.
pub fn mayu_template(arguments: &[&str]) -> Outcome {
    run(Command::new("mayu").arg("template").args(arguments))
}

/// The one that pods start from now, which is made if it is not there.
///
/// # Panics
/// It cannot be made.
#[track_caller]
pub fn current() -> PathBuf {
    let made = mayu_template(&["create"]).success().text();
    let name = made.strip_prefix("template ").and_then(|rest| rest.split(':').next());
    Path::new(DIRECTORY).join(name.unwrap_or_else(|| panic!("no name in {made:?}")))
}

/// Whether a VMM's machine goes on from a template: it has that one's memory.
///
/// # Panics
/// There is no such process.
#[track_caller]
pub fn is_used_by(vmm: u32) -> bool {
    fs::read_to_string(format!("/proc/{vmm}/maps")).expect("the VMM is there").contains(DIRECTORY)
}
