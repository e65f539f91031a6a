//! Policies in an engine, with those that they build upon.

use std::collections::BTreeSet;
use std::fs;
use std::num::NonZeroU32;
use std::path::Path;
use std::time::Duration;

use regorus::utils::limits::ExecutionTimerConfig;
use regorus::{Engine, PolicyLengthConfig};

use crate::error::located;
use crate::{Error, Result};

/// How long one decision or one test may take, by the clock, where nobody says otherwise.
const DEADLINE: Duration = Duration::from_secs(30);

/// After how many steps of a decision the clock is looked at.
const STEPS_BETWEEN_LOOKS: NonZeroU32 = NonZeroU32::MIN.saturating_add(63);

/// The longest line of a policy, in characters: a recorded one has each argument on one line. A policy has no more than 1 MiB and
/// 20,000 lines, as the engine has it.
const MAX_LINE: NonZeroU32 = NonZeroU32::MIN.saturating_add(1 << 20);

/// How a policy names another one of its directory, `NAME.rego`.
const REFERENCE: &str = "data.mayu.";

/// An engine that has nothing to decide by yet. A decision ends, and an error of a builtin function is an error: were it
/// nothing, as elsewhere, what a policy denies would be allowed.
pub(crate) fn engine() -> Engine {
    let mut engine = Engine::new();
    engine.set_strict_builtin_errors(true);
    limit(&mut engine, DEADLINE);
    engine
        .set_policy_length_config(PolicyLengthConfig { max_col: MAX_LINE, ..PolicyLengthConfig::default() });
    engine
}

/// Ends every decision after so long.
pub(crate) fn limit(engine: &mut Engine, limit: Duration) {
    engine.set_execution_timer_config(ExecutionTimerConfig { limit, check_interval: STEPS_BETWEEN_LOOKS });
}

/// Adds the text of the file at `path`, and the files beside it that it refers to. Says which package it is, such as
/// `data.mayu`.
pub(crate) fn add(engine: &mut Engine, text: String, path: &Path) -> Result<String> {
    let mut wanted = references(&text);
    let package = add_one(engine, text, path)?;
    while let Some(name) = wanted.pop_first() {
        let reference = format!("{REFERENCE}{name}");
        let there =
            rules(engine).iter().any(|rule| *rule == reference || rule.starts_with(&format!("{reference}.")));
        if there {
            continue;
        }
        let other = path.with_file_name(format!("{name}.rego"));
        let text = read(&other)?;
        wanted.extend(references(&text));
        let found = add_one(engine, text, &other)?;
        if found != reference {
            let (found, expected) = (without_data(&found).into(), without_data(&reference).into());
            return Err(Error::Package { path: other, found, expected });
        }
    }
    Ok(package)
}

/// The rules of all policies, such as `data.mayu.deny`.
pub(crate) fn rules(engine: &mut Engine) -> BTreeSet<String> {
    let rules = engine.get_modules().iter().flat_map(|module| {
        let package = module.package.refr.span().text();
        module.policy.iter().map(move |rule| {
            let text = rule.span().text();
            let head = text.strip_prefix("default ").unwrap_or(text).trim_start();
            format!("data.{package}.{}", identifier(head))
        })
    });
    rules.collect()
}

fn add_one(engine: &mut Engine, text: String, path: &Path) -> Result<String> {
    engine.add_policy(path.display().to_string(), text).map_err(|error| Error::Parse(located(&error)))
}

/// The text of a policy.
pub(crate) fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(|source| Error::Read { path: path.into(), source })
}

/// A package as its policy names it.
pub(crate) fn without_data(package: &str) -> &str {
    package.strip_prefix("data.").unwrap_or(package)
}

/// The names of the other policies that a text refers to, outside of comments. To the engine one that is missing would be
/// undefined, and what it denies allowed.
fn references(text: &str) -> BTreeSet<String> {
    let lines = text.lines().filter(|line| !line.trim_start().starts_with('#'));
    lines.flat_map(|line| line.split(REFERENCE).skip(1)).map(|rest| identifier(rest).to_owned()).collect()
}

/// What a text begins with.
fn identifier(text: &str) -> &str {
    let end = text.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(text.len());
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_found_wherever_they_stand() {
        let text = "import data.mayu.one\n# data.mayu.none\nx if data.mayu.two.deny[data.mayu.three_3[_]]\n";
        assert_eq!(references(text), ["one", "two", "three_3"].map(str::to_owned).into());
    }

    #[test]
    fn a_policy_builds_on_others_of_its_directory_and_they_have_to_be_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("policy.rego");
        let text = "package mayu\nimport data.mayu.base\ndeny contains x if some x in base.deny\nown := data.mayu.deny\n";
        let added = || add(&mut engine(), text.into(), &path).map_err(|error| error.to_string());
        assert!(added().unwrap_err().contains("base.rego: No such file"));
        let base = folder.path().join("base.rego");
        fs::write(&base, "package mayu.other\n").unwrap();
        let message = added().unwrap_err();
        assert!(
            message.ends_with("base.rego: its package is mayu.other, and has to be mayu.base"),
            "{message}"
        );
        fs::write(&base, "package mayu.base\ndeny contains \"no\"\n").unwrap();
        assert_eq!(added().unwrap(), "data.mayu");
    }
}
