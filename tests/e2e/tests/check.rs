//! `mayu check` on a host where all is well, and where something is not.

use std::process::Command;

use mayu_e2e::run;
use serde_json::Value;

fn check(flags: &[&str]) -> (i32, Value) {
    let outcome = run(Command::new("mayu").args(["check", "--json"]).args(flags));
    (
        outcome.code,
        serde_json::from_slice(&outcome.stdout).unwrap_or_else(|_| panic!("not JSON: {}", outcome.text())),
    )
}

fn fact<'a>(report: &'a Value, name: &str) -> &'a Value {
    let facts = report["facts"].as_array().unwrap();
    facts.iter().find(|fact| fact["name"] == name).unwrap_or_else(|| panic!("no fact {name} in {report}"))
}

#[test]
fn all_is_well_on_this_host() {
    let (code, report) = check(&[]);
    assert_eq!((code, &report["ok"]), (0, &Value::Bool(true)), "{report:#}");
    assert!(fact(&report, "kvm-execution")["found"].as_str().unwrap().contains("natively"));
    assert!(fact(&report, "guest-kernel")["found"].as_str().unwrap().contains("options"));
}

#[test]
fn a_file_that_is_no_kernel_is_told() {
    let (code, report) = check(&["--kernel", "/usr/bin/busybox.no-such"]);
    assert_ne!(code, 0);
    assert_eq!(fact(&report, "guest-kernel")["ok"], false);
    let (code, report) = check(&["--kernel", "/etc/passwd"]);
    assert_ne!(code, 0);
    assert!(fact(&report, "guest-kernel")["found"].as_str().unwrap().contains("ELF"));
}

#[test]
fn people_get_one_line_a_fact_and_a_verdict() {
    let outcome = run(Command::new("mayu").arg("check"));
    assert!(outcome.text().contains("A pod would start on this host."), "{}", outcome.text());
}

#[test]
fn an_unconfigured_containerd_is_told_with_a_remedy() {
    // A containerd that knows no handler, found before the real one.
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("containerd");
    let script = "#!/bin/sh\n[ \"$1\" = --version ] && echo 'containerd containerd.io 1.7.24 0'\n[ \"$1\" = config ] && echo 'version = 2'\nexit 0\n";
    std::fs::write(&program, script).unwrap();
    std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", dir.path().display(), std::env::var("PATH").unwrap());

    let outcome = run(Command::new("mayu").args(["check", "--json"]).env("PATH", &path));
    let report: Value = serde_json::from_slice(&outcome.stdout).unwrap();
    assert_ne!(outcome.code, 0);
    let handler = fact(&report, "cri-handler");
    assert_eq!(handler["ok"], false);
    assert!(handler["remedy"].as_str().unwrap().contains("containerd-"));

    let outcome = run(Command::new("mayu").args(["check", "--no-cri"]).env("PATH", &path));
    assert_eq!(outcome.code, 0, "{}", outcome.text());
}
