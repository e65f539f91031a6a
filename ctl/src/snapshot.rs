//! `mayu snapshot`: lists and takes away what functions go on from.

use std::process::ExitCode;
use std::time::SystemTime;

use mayu_shim::config::Config;
use mayu_shim::snapshot::{Ready, Snapshot, Store};
use mayu_shim::{Error, Result};

use crate::output::{ago, print, report};

/// How much of a program's name is shown, in characters.
const MAX_PROGRAM: usize = 48;

/// Options of `mayu snapshot`.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Shows all snapshots: of whom they are, and when a pod last went on from one.
    List,
    /// Takes a snapshot away, or all. Pods that have gone on from it do so; the next one like them makes another.
    Delete {
        /// As `list` shows it.
        #[arg(required_unless_present = "all")]
        name: Option<String>,
        /// All of them.
        #[arg(long, conflicts_with = "name")]
        all: bool,
    },
}

/// Runs a subcommand.
pub fn run(args: &Args) -> ExitCode {
    report(Config::load().and_then(|config| {
        let store = Store::new(&config.snapshot);
        match &args.command {
            Command::List => list(&store),
            Command::Delete { name, .. } => delete(&store, name.as_deref()),
        }
    }))
}

fn list(store: &Store) -> Result<bool> {
    let row = |name: &str, made: &str, used: &str, disk: &str, of: &str| {
        format!("{name:<34} {made:<14} {used:<14} {disk:<9} {of}")
    };
    let mut lines = vec![row("NAME", "MADE", "LAST USED", "ON DISK", "OF")];
    for snapshot in store.list()? {
        let used = snapshot.last_used().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        lines.push(row(
            &snapshot.name(),
            &ago(snapshot.description.made),
            &ago(used),
            &format!("{} MiB", snapshot.size() >> 20),
            &owner(&snapshot),
        ));
    }
    print(&lines)
}

/// Whose it is, and what it runs.
fn owner(snapshot: &Snapshot) -> String {
    let likeness = &snapshot.description.likeness;
    let namespace = likeness.namespace.as_deref().filter(|namespace| !namespace.is_empty());
    let accounts = likeness.service_accounts.iter().map(String::as_str);
    let whose: Vec<&str> = [likeness.client.as_str()].into_iter().chain(namespace).chain(accounts).collect();
    let program = likeness.spec.pointer("/process/args/0").and_then(|name| name.as_str()).unwrap_or_default();
    // It is the pod's word, and goes to somebody's terminal.
    let program: String = program.chars().take(MAX_PROGRAM).flat_map(char::escape_default).collect();
    let ready = match &likeness.wish.ready {
        Ready::Port(port) => format!("port {port}"),
        Ready::File(path) => path.display().to_string(),
    };
    format!("{}: {program} ({ready})", whose.join(" "))
}

fn delete(store: &Store, name: Option<&str>) -> Result<bool> {
    let mut all = store.list()?;
    if let Some(name) = name {
        all.retain(|snapshot| snapshot.name() == name);
        if all.is_empty() {
            return Err(Error::NotFound { kind: "snapshot", id: name.into() });
        }
    }
    all.iter().try_for_each(Snapshot::delete).map(|()| true)
}
