//! Output and exit codes of a container in the foreground.

use mayu_e2e::{BUSYBOX, Container};

#[test]
fn stdout_and_stderr_arrive_apart() {
    let outcome = Container::sh(&[], "echo to stdout; echo to stderr >&2");
    assert_eq!((outcome.code, outcome.text().as_str(), outcome.stderr.trim()), (0, "to stdout", "to stderr"));
}

#[test]
fn exit_codes_are_the_program_s() {
    for code in [0, 1, 42] {
        let outcome = Container::sh(&[], &format!("exit {code}"));
        assert_eq!(outcome.code, code, "{}", outcome.stderr);
    }
}

#[test]
fn death_by_a_signal_is_128_and_its_number() {
    // A pid namespace's init is spared signals from within that it has no handler for; its child is not.
    let outcome = Container::sh(&[], "sh -c 'kill -KILL $$'; exit $?");
    assert_eq!(outcome.code, 137, "{}", outcome.stderr);
}

#[test]
fn what_a_program_prints_last_is_not_lost() {
    for _ in 0..3 {
        let outcome = Container::run(BUSYBOX, &[], &["seq", "1", "20000"]).success();
        assert_eq!(outcome.text().lines().count(), 20_000);
        assert!(outcome.text().ends_with("20000"));
    }
}
