//! Standard streams: much of it, both ways, and every way to end it.

use std::fs;

use mayu_e2e::{BUSYBOX, Container, ctr, run, run_with_input, runtime};
use sha2::{Digest, Sha256};

const HUNDRED_MB: usize = 100_000_000;

/// Bytes without a period that a lost or doubled block could hide in.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn a_hundred_megabytes_pass_through_cat_unchanged() {
    let input = noise(HUNDRED_MB);
    let expected = digest(&input);
    let container = Container::unborn();

    let outcome = run_with_input(&mut container.run_command(&["--rm"], BUSYBOX, &["cat"]), input).success();

    assert_eq!(outcome.stdout.len(), HUNDRED_MB);
    assert_eq!(digest(&outcome.stdout), expected);
}

#[test]
fn the_end_of_stdin_reaches_the_program_and_its_answer_comes_back() {
    let container = Container::idle(&[]);
    let outcome = container.exec_with_input(&["sh", "-c", "sha256sum; echo after the end"], b"some input");
    let text = outcome.success().text();
    assert!(text.starts_with(&digest(b"some input")), "{text}");
    assert!(text.ends_with("after the end"), "{text}");
}

#[test]
fn a_program_that_does_not_read_its_stdin_ends_all_the_same() {
    let container = Container::idle(&[]);
    let outcome = container.exec_with_input(&["true"], &noise(1_000_000));
    assert_eq!(outcome.code, 0, "{}", outcome.stderr);
}

#[test]
fn output_goes_to_a_file_log_uri() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("out.log");
    let container = Container::unborn();
    let uri = format!("file://{}", log.display());

    let mut command =
        ctr(["run", "--runtime", &runtime(), "--detach", "--log-uri", &uri, BUSYBOX, container.id()]);
    run(command.args(["sh", "-c", "echo logged; echo and this >&2"])).success();

    mayu_e2e::shim::eventually("the log has both lines", || {
        let text = fs::read_to_string(&log).unwrap_or_default();
        text.contains("logged") && text.contains("and this")
    });
}

#[test]
fn output_goes_to_a_binary_log_uri() {
    let dir = tempfile::tempdir().unwrap();
    let (logger, log) = (dir.path().join("logger"), dir.path().join("out.log"));
    // What containerd asks of a logger: stdout on 3, stderr on 4, and 5 closed when it is ready.
    let script = format!(
        "#!/bin/bash\nexec 5>&-\ncat <&3 > {0}\necho \"$CONTAINER_NAMESPACE $CONTAINER_ID\" >> {0}\n",
        log.display()
    );
    fs::write(&logger, script).unwrap();
    fs::set_permissions(&logger, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let container = Container::unborn();
    let uri = format!("binary://{}", logger.display());

    let mut command =
        ctr(["run", "--runtime", &runtime(), "--detach", "--log-uri", &uri, BUSYBOX, container.id()]);
    run(command.args(["echo", "through the logger"])).success();

    let expected = format!("through the logger\ndefault {}\n", container.id());
    mayu_e2e::shim::eventually("the logger has written", || {
        fs::read_to_string(&log).unwrap_or_default() == expected
    });
}
