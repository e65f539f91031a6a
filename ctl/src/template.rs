//! `mayu template`: makes, lists, verifies and takes away what pods start from.

use std::process::ExitCode;
use std::time::Instant;

use mayu_shim::config::Config;
use mayu_shim::template::{self, Store, Template};
use mayu_shim::vmm_process::HostFiles;
use mayu_shim::{Error, Result};
use mayu_vmm_api::VmConfig;
use slog::{Discard, Logger, o};

use crate::output::{ago, print, report};

/// Options of `mayu template`.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Makes the template of the node's configuration, if it is not there. Takes away those that are of no use any more.
    Create,
    /// Shows all templates, and whether pods start from them.
    List,
    /// Looks for damage in a template, or in all, and starts a machine from each that is in use. Ends with 1 where one is of no use.
    Verify {
        /// As `list` shows it.
        name: Option<String>,
    },
    /// Takes a template away. Pods that were started from it go on.
    Delete {
        /// As `list` shows it.
        name: String,
    },
}

/// Runs a subcommand.
pub fn run(args: &Args) -> ExitCode {
    report(Config::load().and_then(|config| match &args.command {
        Command::Create => create(&config),
        Command::List => list(&config),
        Command::Verify { name } => verify(&config, name.as_deref()),
        Command::Delete { name } => delete(&config, name),
    }))
}

fn create(config: &Config) -> Result<bool> {
    if !config.template.enabled {
        // As a unit of systemd it has not failed.
        return print(&["none is made: template.enabled is false in the configuration file".to_owned()]);
    }
    let began = Instant::now();
    let made = block_on(template::make(config, &silent()))?;
    let line = match made {
        Some(template) => format!(
            "template {}: {} MiB, of which {} MiB are not empty; {:.1} s",
            template.name(),
            template.description.machine.memory_mib,
            template.size() >> 20,
            began.elapsed().as_secs_f64()
        ),
        None => "another process is making it".into(),
    };
    print(&[line])
}

fn list(config: &Config) -> Result<bool> {
    let now = current(config)?;
    let store = Store::new(config);
    let mut lines = vec![row("NAME", "MADE", "VCPUS", "MEMORY", "ON DISK", "USE")];
    for template in store.list()? {
        let machine = &template.description.machine;
        let state = match template.outdated(&now) {
            None if config.template.enabled => "pods start from it".to_owned(),
            None => "none: template.enabled is false".to_owned(),
            Some(difference) => format!("none: {difference}"),
        };
        lines.push(row(
            &template.name(),
            &ago(template.description.made),
            &format!("{} to {}", machine.vcpus, machine.max_vcpus),
            &format!("{} to {} MiB", machine.memory_mib, machine.max_memory_mib),
            &format!("{} MiB", template.size() >> 20),
            &state,
        ));
    }
    if let Some(reason) = store.failure() {
        lines.push(format!("The last one could not be made: {reason}"));
    }
    print(&lines)
}

fn row(name: &str, made: &str, vcpus: &str, memory: &str, disk: &str, state: &str) -> String {
    format!("{name:<6} {made:<16} {vcpus:<8} {memory:<18} {disk:<9} {state}")
}

fn verify(config: &Config, name: Option<&str>) -> Result<bool> {
    let now = current(config)?;
    let log = silent();
    let templates = match name {
        Some(name) => vec![named(config, name)?],
        None => Store::new(config).list()?,
    };
    let mut good = true;
    for template in templates {
        let verdict = match (template.verify_memory(), template.outdated(&now)) {
            (Err(error), _) => Err(error),
            (Ok(()), Some(difference)) => Ok(format!("its memory is whole; not in use: {difference}")),
            (Ok(()), None) => block_on(template::try_out(config, &template, &log))
                .map(|took| format!("good: its agent answered {} ms after the start", took.as_millis())),
        };
        good &= verdict.is_ok();
        let text = verdict.unwrap_or_else(|error| error.to_string());
        print(&[format!("template {}: {text}", template.name())])?;
    }
    Ok(good)
}

fn delete(config: &Config, name: &str) -> Result<bool> {
    named(config, name)?.delete().map(|()| true)
}

fn named(config: &Config, name: &str) -> Result<Template> {
    let found = Store::new(config).list()?.into_iter().find(|template| template.name() == name);
    found.ok_or_else(|| Error::NotFound { kind: "template", id: name.into() })
}

/// What a template would be made of today.
fn current(config: &Config) -> Result<VmConfig> {
    template::machine(&config.vm, &HostFiles::open(&config.vm)?)
}

/// What people ought to know is in the answer or the error.
fn silent() -> Logger {
    Logger::root(Discard, o!())
}

fn block_on<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|source| Error::System { operation: "start the runtime", source })?.block_on(work)
}
