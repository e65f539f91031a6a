//! `mayu check`: one line per fact that a pod depends on.

mod containerd;
mod guest;
mod host;
mod kvm;
mod network;
mod probe;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use mayu_shim::config::Config;
use serde::Serialize;

/// Options of `mayu check`.
#[derive(clap::Args)]
pub struct Args {
    /// Print JSON instead of lines for people.
    #[arg(long)]
    json: bool,
    /// The configuration file to go by, instead of the shim's own.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Verify this guest kernel instead of the configured one.
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// containerd is driven by ctr, nerdctl or docker alone: no CRI runtime handler is needed.
    #[arg(long)]
    no_cri: bool,
}

/// One thing that was looked at.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Fact {
    /// What was looked at, as a stable name.
    name: &'static str,
    /// Whether a pod can start as far as this fact goes.
    ok: bool,
    /// What was found.
    found: String,
    /// What to do about it, where something is to be done.
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

impl Fact {
    fn good(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, ok: true, found: found.into(), remedy: None }
    }

    fn bad(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name, ok: false, found: found.into(), remedy: Some(remedy.into()) }
    }
}

#[derive(Serialize)]
struct Report<'a> {
    /// Whether a pod would start.
    ok: bool,
    facts: &'a [Fact],
}

/// Looks at everything and prints it. Succeeds only when a pod would start.
pub fn run(args: &Args) -> ExitCode {
    let facts = gather(args);
    let ok = facts.iter().all(|fact| fact.ok);
    match print(&facts, ok, args.json) {
        Ok(()) if ok => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

fn gather(args: &Args) -> Vec<Fact> {
    let mut facts = kvm::facts();
    facts.extend(host::facts());
    facts.push(network::fact());
    match load_config(args.config.as_deref()) {
        Ok(config) => {
            facts.push(Fact::good("configuration", "valid"));
            facts.push(host::memory(&config));
            facts.extend(guest::facts(&config, args.kernel.as_deref()));
        }
        Err(error) => {
            facts.push(Fact::bad("configuration", error, "correct the file, or remove it for the defaults"));
        }
    }
    facts.extend(containerd::facts(!args.no_cri));
    facts
}

fn load_config(path: Option<&Path>) -> Result<Config, String> {
    let Some(path) = path else {
        return Config::load().map_err(|error| error.to_string());
    };
    let text = std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
    Config::parse(&text, path).map_err(|error| error.to_string())
}

fn print(facts: &[Fact], ok: bool, json: bool) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    if json {
        serde_json::to_writer_pretty(&mut out, &Report { ok, facts })?;
        return writeln!(out);
    }
    for fact in facts {
        let mark = if fact.ok { "ok  " } else { "FAIL" };
        writeln!(out, "{mark}  {:<18} {}", fact.name, fact.found)?;
        if let Some(remedy) = &fact.remedy {
            writeln!(out, "      {:<18} → {remedy}", "")?;
        }
    }
    let verdict = if ok { "A pod would start on this host." } else { "A pod would NOT start on this host." };
    writeln!(out, "\n{verdict}")
}
