//! Is there a containerd that will find the shim, and does its CRI plugin know the handler?

use std::path::PathBuf;
use std::process::Command;

use super::Fact;
use super::guest::program_fact;

const SHIM: &str = "containerd-shim-mayu-v2";
const RUNTIME_TYPE: &str = "io.containerd.mayu.v2";
const HANDLER: &str = "mayu";

/// The CRI plugin's name in configuration version 2 (containerd 1.7) and 3 (2.x).
const CRI_PLUGINS: &[&str] = &["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime"];

/// containerd's version, the shim on its path and, with `cri`, the runtime handler.
pub fn facts(cri: bool) -> Vec<Fact> {
    let mut facts = vec![shim()];
    match output("containerd", &["--version"]) {
        Ok(text) => {
            let known = version(&text);
            facts.push(version_fact(&text, known));
            if cri && known.is_some() {
                facts.push(handler());
            }
        }
        Err(reason) => facts.push(Fact::bad("containerd", reason, "install containerd 1.7 or 2.x")),
    }
    facts
}

fn shim() -> Fact {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found: Option<PathBuf> =
        std::env::split_paths(&path).map(|dir| dir.join(SHIM)).find(|file| file.is_file());
    match found {
        Some(file) => program_fact("shim", &file),
        None => Fact::bad("shim", format!("{SHIM} is not on the PATH"), "install mayu with `make install`"),
    }
}

fn version_fact(text: &str, version: Option<(u32, u32)>) -> Fact {
    const NAME: &str = "containerd";
    match version {
        Some((major, minor)) if (major, minor) >= (1, 7) => {
            Fact::good(NAME, format!("version {major}.{minor}"))
        }
        Some((major, minor)) => {
            Fact::bad(NAME, format!("version {major}.{minor}"), "install containerd 1.7 or 2.x")
        }
        None => Fact::bad(NAME, format!("unknown version: {}", text.trim()), "install containerd 1.7 or 2.x"),
    }
}

/// From a line such as `containerd github.com/containerd/containerd/v2 2.1.4 <commit>`.
fn version(text: &str) -> Option<(u32, u32)> {
    text.split_whitespace().find_map(|word| {
        let mut numbers = word.trim_start_matches('v').split('.');
        Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
    })
}

fn handler() -> Fact {
    const NAME: &str = "cri-handler";
    let remedy = format!(
        "add config/containerd-*.toml to containerd's configuration and restart it \
         (ctr, nerdctl and docker need none: --runtime {RUNTIME_TYPE})"
    );
    let merged = match output("containerd", &["config", "dump"]) {
        Ok(text) => text,
        Err(reason) => return Fact::bad(NAME, reason, remedy),
    };
    let handlers = match Handlers::parse(&merged) {
        Ok(handlers) => handlers,
        Err(error) => {
            return Fact::bad(NAME, format!("containerd's configuration is not TOML: {error}"), remedy);
        }
    };
    match (handlers.ours.as_deref(), handlers.lost_default) {
        (Some(RUNTIME_TYPE), None) => Fact::good(NAME, format!("{HANDLER} is {RUNTIME_TYPE}")),
        (Some(RUNTIME_TYPE), Some(default)) => Fact::bad(
            NAME,
            format!("containerd cannot load CRI: its default runtime handler {default} is not configured"),
            "containerd 1.x does not merge what two files say of CRI: put all its runtimes into one file",
        ),
        (Some(other), _) => Fact::bad(NAME, format!("{HANDLER} is {other}"), remedy),
        (None, _) => Fact::bad(NAME, format!("containerd knows no runtime handler {HANDLER}"), remedy),
    }
}

/// What containerd's merged configuration says of runtime handlers.
#[derive(Debug, Default, PartialEq, Eq)]
struct Handlers {
    /// The runtime type of ours.
    ours: Option<String>,
    /// The default handler, where there is no such handler.
    lost_default: Option<String>,
}

impl Handlers {
    fn parse(merged: &str) -> Result<Self, toml::de::Error> {
        let config: toml::Table = merged.parse()?;
        let find = |plugin: &&str| {
            let containerd = config.get("plugins")?.get(plugin)?.get("containerd")?;
            let runtimes = containerd.get("runtimes")?;
            let default = containerd.get("default_runtime_name").and_then(toml::Value::as_str);
            Some(Self {
                ours: runtimes
                    .get(HANDLER)
                    .and_then(|ours| ours.get("runtime_type")?.as_str().map(str::to_owned)),
                lost_default: default.filter(|name| runtimes.get(name).is_none()).map(str::to_owned),
            })
        };
        Ok(CRI_PLUGINS.iter().find_map(find).unwrap_or_default())
    }
}

fn output(program: &str, args: &[&str]) -> Result<String, String> {
    let output = Command::new(program)
        .args(args)
        .output()
        .map_err(|error| format!("cannot run {program}: {error}"))?;
    if !output.status.success() {
        return Err(format!("`{program} {}` failed with {}", args.join(" "), output.status));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_all_packagers_are_read() {
        let lines = [
            ("containerd containerd.io 1.7.24 88bf19b2105c8b17560993bee28a01ddc2f97182", Some((1, 7))),
            ("containerd github.com/containerd/containerd 1.7.24~ds1 1.7.24~ds1-6", Some((1, 7))),
            ("containerd github.com/containerd/containerd/v2 v2.1.4 75cb2b7193e4", Some((2, 1))),
            ("something else", None),
        ];
        for (line, expected) in lines {
            assert_eq!(version(line), expected, "{line}");
        }
    }

    #[test]
    fn an_old_containerd_is_refused() {
        assert!(!version_fact("", Some((1, 6))).ok);
        assert!(version_fact("", Some((2, 0))).ok);
    }

    #[test]
    fn the_handler_is_found_in_both_configuration_versions() {
        for plugin in CRI_PLUGINS {
            let text =
                format!("[plugins.'{plugin}'.containerd.runtimes.mayu]\nruntime_type = '{RUNTIME_TYPE}'\n");
            let expected = Handlers { ours: Some(RUNTIME_TYPE.into()), lost_default: None };
            assert_eq!(Handlers::parse(&text).unwrap(), expected);
        }
    }

    #[test]
    fn a_default_handler_that_a_second_file_has_lost_is_found() {
        let text = format!(
            "[plugins.'io.containerd.grpc.v1.cri'.containerd]\ndefault_runtime_name = 'runc'\n\
             [plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.mayu]\nruntime_type = '{RUNTIME_TYPE}'\n"
        );
        assert_eq!(Handlers::parse(&text).unwrap().lost_default.as_deref(), Some("runc"));
        let text = format!(
            "{text}[plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc]\nruntime_type = 'x'\n"
        );
        assert_eq!(Handlers::parse(&text).unwrap().lost_default, None);
    }

    #[test]
    fn a_configuration_without_the_handler_has_none() {
        let text = "version = 3\n[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]\nruntime_type = 'io.containerd.runc.v2'\n";
        assert_eq!(Handlers::parse(text).unwrap(), Handlers::default());
    }
}
