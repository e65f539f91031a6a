//! What subcommands have in common of what they print.

use std::io::{self, Write as _};
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mayu_shim::{Error, Result};

/// The exit code of a subcommand, and its error if it has one.
pub fn report(done: Result<bool>) -> ExitCode {
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("mayu: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Prints lines.
///
/// # Errors
/// Nobody reads them.
pub fn print(lines: &[String]) -> Result<bool> {
    let mut out = io::stdout().lock();
    let written = lines.iter().try_for_each(|line| writeln!(out, "{line}"));
    written.map(|()| true).map_err(|source| Error::System { operation: "write the answer", source })
}

/// How long it is since a moment, given in seconds since 1970.
pub fn ago(moment: u64) -> String {
    let age = SystemTime::now().duration_since(UNIX_EPOCH + Duration::from_secs(moment)).unwrap_or_default();
    match age.as_secs() {
        seconds @ ..120 => format!("{seconds} s ago"),
        seconds @ ..7200 => format!("{} min ago", seconds / 60),
        seconds @ ..172_800 => format!("{} h ago", seconds / 3600),
        seconds => format!("{} days ago", seconds / 86_400),
    }
}
