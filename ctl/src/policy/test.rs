//! `mayu policy test`: the tests that stand beside policies.

use std::io::Write;
use std::path::PathBuf;

use mayu_policy::suite;

use super::Result;

/// Options of `mayu policy test`.
#[derive(clap::Args)]
pub struct Args {
    /// Where the policies and their tests are: rules `test_…` in files `…_test.rego`.
    directory: PathBuf,
}

/// Prints a line for each test. Says whether all hold.
///
/// # Errors
/// A file that cannot be used, or no test at all.
pub fn run(args: &Args) -> Result<bool> {
    let outcomes = suite::run(&args.directory)?;
    let mut out = std::io::stdout().lock();
    for outcome in &outcomes {
        match &outcome.failure {
            None => writeln!(out, "PASS  {}", outcome.rule)?,
            Some(failure) => writeln!(out, "FAIL  {}: {failure}", outcome.rule)?,
        }
    }
    let failed = outcomes.iter().filter(|outcome| outcome.failure.is_some()).count();
    writeln!(out, "\n{} tests, {failed} failed", outcomes.len())?;
    Ok(failed == 0)
}
