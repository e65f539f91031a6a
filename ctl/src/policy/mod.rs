//! `mayu policy`: tries, tests and records what the shim decides by.

mod check;
mod document;
mod record;
mod test;

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

/// Options of `mayu policy`.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Tells what a policy has against requests, without a pod. Succeeds where all are allowed, and ends with 1 where one is
    /// denied.
    Check(check::Args),
    /// Runs the tests of the policies in a directory. Succeeds where all hold, and ends with 1 where one does not.
    Test(test::Args),
    /// Writes the tightest policy that still allows a running pod.
    Record(record::Args),
}

/// A subcommand that could not do its work.
#[derive(Debug, thiserror::Error)]
enum Error {
    /// The policy cannot be used.
    #[error(transparent)]
    Policy(#[from] mayu_policy::Error),
    /// The shim would not come as far as to ask.
    #[error(transparent)]
    Shim(#[from] mayu_shim::Error),
    /// A file or directory cannot be read.
    #[error("read {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    /// A file that describes nothing to decide on.
    #[error("{}: {reason}", path.display())]
    Document { path: PathBuf, reason: String },
    /// There is no pod of this name, or more than one.
    #[error("pod {pod:?}: {reason} in {}", state.display())]
    Pod { pod: String, reason: String, state: PathBuf },
    /// The answer cannot be written.
    #[error("write the answer: {0}")]
    Write(#[from] io::Error),
    /// What was recorded cannot be written as JSON.
    #[error("write down what was recorded: {0}")]
    Encode(#[from] serde_json::Error),
}

type Result<T> = std::result::Result<T, Error>;

/// The exit code where there is no answer: a policy that is broken, or nothing to decide on.
const NO_ANSWER: u8 = 2;

/// Runs a subcommand.
pub fn run(args: &Args) -> ExitCode {
    let answer = match &args.command {
        Command::Check(args) => check::run(args),
        Command::Test(args) => test::run(args),
        Command::Record(args) => record::run(args),
    };
    match answer {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("mayu: {error}");
            ExitCode::from(NO_ANSWER)
        }
    }
}
