//! `mayu policy check`: what a policy has against requests.

use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use mayu_policy::{Policy, Request};
use mayu_shim::config::Config;

use super::{Result, document};

/// How often one decision is made where its time is asked for.
const REPETITIONS: u32 = 100;

/// Options of `mayu policy check`.
#[derive(clap::Args)]
pub struct Args {
    /// The policy.
    #[arg(long, value_name = "FILE")]
    policy: PathBuf,
    /// containerd's namespace, for an OCI runtime spec.
    #[arg(long, default_value = "k8s.io")]
    namespace: String,
    /// Tell as well how long it takes to load the policy and to decide.
    #[arg(long)]
    time: bool,
    /// Requests as a policy sees them, or OCI runtime specs (`config.json`) of containers that are to be made.
    #[arg(required = true, value_name = "SPEC")]
    specs: Vec<PathBuf>,
}

/// Prints a line for what is allowed, and one for each denial. Says whether all is allowed.
///
/// # Errors
/// A policy or a file that cannot be used.
pub fn run(args: &Args) -> Result<bool> {
    let config = Config::load()?;
    let begun = Instant::now();
    let policy = Policy::load(&args.policy)?;
    let loading = begun.elapsed();
    let mut out = std::io::stdout().lock();
    let mut allowed = true;
    for path in &args.specs {
        let request = document::read(path, &args.namespace, &config)?;
        let denials = policy.decide(&request)?;
        allowed &= denials.is_empty();
        if denials.is_empty() {
            writeln!(out, "{}: allowed", path.display())?;
        }
        for denial in denials {
            writeln!(out, "{}: denied: {denial}", path.display())?;
        }
        if args.time {
            let decision = mean_decision(&policy, &request)?;
            writeln!(out, "{}: decided in {decision:.1?}", path.display())?;
        }
    }
    if args.time {
        writeln!(out, "{}: loaded in {loading:.1?}", args.policy.display())?;
    }
    Ok(allowed)
}

fn mean_decision(policy: &Policy, request: &Request) -> Result<Duration> {
    let begun = Instant::now();
    for _ in 0..REPETITIONS {
        policy.decide(request)?;
    }
    Ok(begun.elapsed() / REPETITIONS)
}
