//! Tests of policies, written in Rego themselves: every rule `test_…` of a file `…_test.rego` has to hold.
//!
//! `NAME_test.rego` is loaded with the policy `NAME.rego` where there is one, and with those that it refers to. Each such file
//! is a suite of its own, so that the policies of a directory do not get into each other's way.

use std::fs;
use std::path::{Path, PathBuf};

use regorus::{Engine, Value};

use crate::error::located;
use crate::{Error, Result, source};

/// How the name of a file of tests ends.
const SUFFIX: &str = "_test.rego";

/// What the name of a test begins with.
const PREFIX: &str = "test_";

/// What became of one test.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Its file.
    pub file: PathBuf,
    /// Its rule, such as `data.mayu_test.test_privileged`.
    pub rule: String,
    /// Why it failed, if it did.
    pub failure: Option<String>,
}

/// Runs the tests of a directory, in the order of their names.
///
/// # Errors
/// [`Error::NoTests`], or a file that cannot be used.
pub fn run(directory: &Path) -> Result<Vec<Outcome>> {
    let failed = |source| Error::Read { path: directory.into(), source };
    let entries = fs::read_dir(directory).map_err(failed)?;
    let mut files: Vec<_> = entries
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<std::io::Result<_>>()
        .map_err(failed)?;
    files.retain(|file| file.to_string_lossy().ends_with(SUFFIX));
    files.sort();
    let mut outcomes = Vec::new();
    for file in &files {
        outcomes.extend(run_file(file)?);
    }
    if outcomes.is_empty() {
        return Err(Error::NoTests(directory.into()));
    }
    Ok(outcomes)
}

fn run_file(file: &Path) -> Result<Vec<Outcome>> {
    let mut engine = source::engine();
    let tested: PathBuf = file.to_string_lossy().replace(SUFFIX, ".rego").into();
    if tested.exists() {
        source::add(&mut engine, source::read(&tested)?, &tested)?;
    }
    let package = source::add(&mut engine, source::read(file)?, file)?;
    let is_test = |rule: &String| rule.starts_with(&format!("{package}.{PREFIX}"));
    let tests = source::rules(&mut engine).into_iter().filter(is_test);
    Ok(tests
        .map(|rule| {
            let failure = failure(&mut engine, &rule);
            Outcome { file: file.into(), rule, failure }
        })
        .collect())
}

fn failure(engine: &mut Engine, rule: &str) -> Option<String> {
    match engine.eval_rule(rule.into()) {
        Ok(Value::Bool(true)) => None,
        Ok(Value::Undefined) => Some("it does not hold".into()),
        Ok(other) => Some(format!("it is {other}, and not true")),
        Err(error) => Some(located(&error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn suite(test: &str) -> Result<Vec<Outcome>> {
        let folder = tempfile::tempdir().unwrap();
        let policy = "package mayu\ndeny contains \"too large\" if input.size.vcpus > 1\n";
        fs::write(folder.path().join("size.rego"), policy).unwrap();
        fs::write(folder.path().join("size_test.rego"), test).unwrap();
        run(folder.path())
    }

    #[test]
    fn tests_hold_or_tell_why_not() {
        let outcomes = suite(
            "package mayu_test\n\
             import data.mayu\n\
             test_a if count(mayu.deny) == 0 with input as {\"size\": {\"vcpus\": 1}}\n\
             test_b if count(mayu.deny) == 0 with input as {\"size\": {\"vcpus\": 2}}\n\
             test_c := 3\n\
             test_d if to_number(\"x\") == 1\n\
             helper := 4\n",
        )
        .unwrap();
        let told: Vec<_> = outcomes.iter().map(|one| (one.rule.as_str(), one.failure.as_deref())).collect();
        assert_eq!(told[0], ("data.mayu_test.test_a", None));
        assert_eq!(told[1], ("data.mayu_test.test_b", Some("it does not hold")));
        assert_eq!(told[2], ("data.mayu_test.test_c", Some("it is 3, and not true")));
        assert_eq!(told[3].0, "data.mayu_test.test_d");
        assert!(told[3].1.unwrap().contains("line 6, column "), "{:?}", told[3]);
        assert_eq!(told.len(), 4);
    }

    #[test]
    fn the_policies_that_come_with_mayu_pass_their_own() {
        let outcomes = run(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../config/policies"))).unwrap();
        let failed: Vec<_> = outcomes.iter().filter(|outcome| outcome.failure.is_some()).collect();
        assert!(failed.is_empty(), "{failed:#?}");
        for policy in ["baseline", "restricted", "function"] {
            assert!(
                outcomes.iter().any(|outcome| outcome.rule.starts_with(&format!("data.mayu.{policy}_test.")))
            );
        }
    }

    #[test]
    fn a_directory_without_a_test_and_a_test_that_is_no_rego_are_errors() {
        assert!(matches!(suite("package mayu_test\n"), Err(Error::NoTests(_))));
        assert!(matches!(suite("package mayu_test\ntest_a if {"), Err(Error::Parse(_))));
        assert!(matches!(run(Path::new("/nonexistent")), Err(Error::Read { .. })));
    }
}
