//! `docs/conformance.md` says what is tested, and all of it.

use std::collections::BTreeSet;
use std::process::Command;

use mayu_e2e::run;

const PAGE: &str = include_str!("../../../docs/conformance.md");

/// The tests of this program.
fn tests() -> BTreeSet<String> {
    let program = std::env::current_exe().unwrap();
    let list = run(Command::new(program).args(["--list", "--format=terse"])).success().text();
    list.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned).collect()
}

/// What the page names between backticks that looks like a test.
fn named() -> BTreeSet<String> {
    let quoted = PAGE.split('`').skip(1).step_by(2);
    quoted.filter(|name| name.contains("::") && !name.ends_with("::")).map(str::to_owned).collect()
}

#[test]
fn every_test_that_the_page_names_exists() {
    let missing: Vec<_> = named().difference(&tests()).cloned().collect();
    assert!(missing.is_empty(), "{missing:#?}");
}

#[test]
fn every_test_of_what_a_kubelet_asks_for_is_on_the_page() {
    let named = named();
    let tests = tests();
    let missing: Vec<_> =
        tests.iter().filter(|test| test.starts_with("cri::") && !named.contains(*test)).collect();
    assert!(missing.is_empty(), "{missing:#?}");
}
