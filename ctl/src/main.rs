//! `mayu`, the operator's command.

mod check;
mod output;
mod policy;
mod snapshot;
mod template;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Looks after mayu on a node.
#[derive(Parser)]
#[command(name = "mayu", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Tells whether this host can run pods with mayu, and what to do where it cannot.
    Check(check::Args),
    /// Tries, tests and records policies: what a pod may be.
    Policy(policy::Args),
    /// Lists and takes away what functions go on from that ask to be saved.
    Snapshot(snapshot::Args),
    /// Makes, lists, verifies and takes away the machines that pods start from.
    Template(template::Args),
}

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Check(args) => check::run(&args),
        Command::Policy(args) => policy::run(&args),
        Command::Snapshot(args) => snapshot::run(&args),
        Command::Template(args) => template::run(&args),
    }
}
