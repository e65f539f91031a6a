//! Containers of `ctr` that are saved when they are ready, and others that go on from there.

use std::collections::HashSet;
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, Stdio};
use std::thread;

use mayu_e2e::host::Traces;
use mayu_e2e::shim::eventually;
use mayu_e2e::snapshot::{STORE, allow, mayu_snapshot, snapshots};
use mayu_e2e::{BUSYBOX, Container, PYTHON};

/// Remembers when it began, says so, and answers what it is asked.
const PROGRAM: &str = "mkdir -p /tmp; od -An -tx8 -N8 /dev/urandom > /tmp/run; touch /tmp/ready; \
     while read -r word; do echo $word of $(cat /tmp/run); done; sleep 1000";

const ANNOTATIONS: [&str; 4] =
    ["--annotation", "io.mayu.snapshot=warm", "--annotation", "io.mayu.snapshot-ready=file:/tmp/ready"];

fn start(flags: &[&str]) -> Container {
    Container::detached(BUSYBOX, &[&ANNOTATIONS, flags].concat(), &["sh", "-c", PROGRAM])
}

/// One that has been saved.
fn saved(flags: &[&str]) -> Container {
    let first = start(flags);
    eventually("it is saved", || !snapshots().is_empty());
    first
}

fn run(container: &Container) -> String {
    container.script("cat /tmp/run").trim().to_owned()
}

#[test]
fn containers_that_are_alike_share_what_they_have_begun_with_and_nothing_else() {
    let _allowed = allow();
    let first = saved(&[]);
    let begun = run(&first);
    let looked_at = start(&[]);
    let working_set = snapshots()[0].join("working-set");
    eventually("what pods touch of it is known", || working_set.exists());
    looked_at.remove();
    let traces = Traces::now();
    let mut secrets = HashSet::new();
    for _ in 0..5 {
        let other = start(&[]);
        assert_eq!(run(&other), begun);
        let secret = other.script("cat /proc/sys/kernel/random/uuid; head -c 16 /dev/urandom | od -An -tx1");
        for secret in secret.lines() {
            assert!(secrets.insert(secret.to_owned()), "{secret} is another one's as well");
        }
        let marker = other.script("echo mine > /tmp/mine; ls /tmp").split_whitespace().count();
        assert_eq!(marker, 3, "it has what the first one had when it was saved, and its own");
        other.remove();
    }
    traces.assert_restored(5);
    assert_eq!(first.exec(&["ls", "/tmp/mine"]).code, 1);

    let name = snapshots()[0].file_name().unwrap().to_str().unwrap().to_owned();
    let list = mayu_snapshot(&["list"]).success().text();
    assert!(
        list.lines().any(|line| line.starts_with(&name) && line.ends_with("default: sh (/tmp/ready)")),
        "{list}"
    );
    mayu_snapshot(&["delete", &name]).success();
    assert_ne!(run(&start(&[])), begun, "without it, one like the first begins anew");
    assert_ne!(mayu_snapshot(&["delete", "none"]).code, 0);
}

/// One whose client stays, and its client.
fn attached() -> (Container, Child) {
    let container = Container::unborn();
    let mut ctr = container.run_command(&ANNOTATIONS, BUSYBOX, &["sh", "-c", PROGRAM]);
    let client = ctr.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    (container, client)
}

/// What it answers to a word.
fn ask(client: &mut Child, word: &str) -> String {
    client.stdin.as_mut().unwrap().write_all(format!("{word}\n").as_bytes()).unwrap();
    let mut answer = String::new();
    BufReader::new(client.stdout.as_mut().unwrap()).read_line(&mut answer).unwrap();
    answer.trim().to_owned()
}

#[test]
fn one_that_goes_on_has_streams_of_its_own() {
    let _allowed = allow();
    let (first, mut of_first) = attached();
    eventually("it is saved", || !snapshots().is_empty());
    let begun = run(&first);
    let (other, mut of_other) = attached();

    assert_eq!(ask(&mut of_other, "there"), format!("there of {begun}"));
    assert_eq!(ask(&mut of_first, "here"), format!("here of {begun}"));

    for (container, mut client) in [(first, of_first), (other, of_other)] {
        container.task("kill", &["--signal", "KILL"]).success();
        client.wait().unwrap();
        drop(container);
    }
}

#[test]
fn who_is_saved_notices_no_more_than_a_pause() {
    let _allowed = allow();
    let first = start(&[]);
    let until_saved = || snapshots().is_empty();
    let execs = thread::scope(|scope| {
        let asked = scope.spawn(|| {
            let mut execs = 0;
            while until_saved() {
                assert_eq!(first.script("echo here"), "here");
                execs += 1;
            }
            execs
        });
        asked.join().unwrap()
    });
    assert!(execs > 0);
    assert_eq!(first.script("echo here"), "here");
}

#[test]
fn what_is_in_the_way_is_waited_for_and_what_cannot_be_saved_runs_on() {
    let _allowed = allow();
    // It has a file of a volume open to write to it, for a while.
    let volume = tempfile::tempdir_in("/var/tmp").unwrap();
    let mount = format!("type=bind,src={},dst=/volume,options=rbind:rw", volume.path().display());
    let program = "import os, time
file = open('/volume/file', 'w'); open('/tmp/ready', 'w').close()
while not os.path.exists('/volume/close'): time.sleep(0.1)
file.close(); time.sleep(1000)";
    let flags = [&ANNOTATIONS[..], &["--mount", &mount]].concat();
    let container = Container::detached(PYTHON, &flags, &["python3", "-c", program]);
    eventually("it is ready", || container.exec(&["ls", "/tmp/ready"]).code == 0);
    let reason = || {
        let failed = std::fs::read_dir(STORE).into_iter().flatten().flatten().map(|entry| entry.path());
        let mut failed =
            failed.filter(|path| path.extension().is_some_and(|extension| extension == "failed"));
        failed.next().map(|path| std::fs::read_to_string(path).unwrap())
    };
    eventually("it is given up, or saved", || reason().is_some() || !snapshots().is_empty());

    assert!(reason().unwrap().contains("open for writing"), "{:?}", reason());
    assert_eq!(container.script("echo it runs on"), "it runs on");
}
