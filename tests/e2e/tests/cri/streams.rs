//! The streams of containers and of what is executed in them, and the files that containerd writes of them.

use std::fs;

use k8s_cri::v1::ContainerConfig;
use mayu_e2e::host::{descriptors, process_status, processes_named, shim_of};
use mayu_e2e::shim::eventually;
use mayu_e2e::{counted, how_many};

use super::{exited, idle, outcome, pod, running, wait_for_output};

/// containerd's `max_container_log_line_size`, in bytes.
const LONGEST_LINE: usize = 16 * 1024;

/// What the shim and the VMM may hold more than before for reasons of their own: files, threads, KiB of memory. The VMM's memory
/// has the guest's in it, whose kernel fills caches.
const TOLERANCES: [[usize; 3]; 2] = [[4, 2, 4 << 10], [4, 2, 32 << 10]];

/// A line of a log in the format of CRI: when, which stream, whether the line is full (`F`) or goes on (`P`), and the text.
#[derive(Debug, PartialEq, Eq)]
struct Line {
    stream: String,
    tag: String,
    text: String,
}

#[track_caller]
fn lines(log: &str) -> Vec<Line> {
    let parse = |line: &str| {
        let mut fields = line.splitn(4, ' ').map(str::to_owned);
        let time = fields.next().unwrap();
        // RFC 3339 with nanoseconds: 2006-01-02T15:04:05.999999999Z.
        let digits = time.bytes().take(19).filter(u8::is_ascii_digit).count();
        assert!(digits == 14 && time.as_bytes().get(10) == Some(&b'T') && time.contains('.'), "{line}");
        let mut field = || fields.next().unwrap_or_else(|| panic!("not a line of CRI: {line}"));
        Line { stream: field(), tag: field(), text: field() }
    };
    log.lines().map(parse).collect()
}

fn line(stream: &str, text: &str) -> Line {
    Line { stream: stream.into(), tag: "F".into(), text: text.into() }
}

#[test]
fn an_exec_keeps_its_streams_apart_and_tells_its_code() {
    let mut pod = pod();
    let one = idle(&mut pod, "one");
    for code in [0, 1, 77, 255] {
        let ran = outcome(&mut pod, &one, &format!("echo to stdout; echo to stderr >&2; exit {code}"));
        let expected = (code, b"to stdout\n".to_vec(), "to stderr\n".to_owned());
        assert_eq!((ran.code, ran.stdout, ran.stderr), expected);
    }
    assert_eq!(outcome(&mut pod, &one, "kill -KILL $$").code, 137);
    let long = outcome(&mut pod, &one, "head -c 3000000 /dev/zero").success();
    assert_eq!(long.stdout.len(), 3_000_000);
}

#[test]
fn a_streamed_exec_reads_its_input_and_tells_its_code() {
    let mut pod = pod();
    let one = idle(&mut pod, "one");
    let program = ["sh", "-c", "read line; echo got $line; echo complaint >&2; read line; exit $line"];
    let mut session = pod.stream_exec(&one, &program, false).unwrap();

    session.write("a word\n");
    session.read_until("got a word");
    session.write("7\n");

    let finished = session.finish();
    assert_eq!((finished.stdout.as_str(), finished.stderr.as_str()), ("got a word\n", "complaint\n"));
    assert_eq!(finished.code, 7);
}

#[test]
fn a_terminal_of_an_exec_follows_the_size_of_its_window() {
    let mut pod = pod();
    let one = idle(&mut pod, "one");
    let mut session = pod.stream_exec(&one, &["sh"], true).unwrap();

    // The words that are waited for are not those that are typed, which the terminal echoes.
    session.write("tty -s && echo is-$((1 + 1))\n");
    session.read_until("is-2");
    for (width, height) in [(97, 31), (140, 50)] {
        session.resize(width, height);
        session.write(&format!(
            "until [ \"$(stty size)\" = '{height} {width}' ]; do :; done; echo wide-$(({width} + 0))-\n"
        ));
        session.read_until(&format!("wide-{width}-"));
    }
    session.write("exit 5\n");

    assert_eq!(session.finish().code, 5);
}

#[test]
fn an_input_that_is_given_once_ends_with_the_one_who_gives_it() {
    let mut pod = pod();
    let config = ContainerConfig { stdin: true, stdin_once: true, ..running("once", "cat; echo the end") };
    let once = pod.run_container(config).unwrap();
    let mut session = pod.attach(&once, false).unwrap();

    session.write("some words\n");
    session.read_until("some words");
    drop(session);

    assert_eq!(exited(&mut pod, &once).exit_code, 0);
    eventually("everything is in the log", || {
        lines(&pod.log("once")) == [line("stdout", "some words"), line("stdout", "the end")]
    });
}

#[test]
fn a_container_outlives_those_who_attach_to_it() {
    let mut pod = pod();
    let config =
        ContainerConfig { stdin: true, ..running("one", "while read line; do echo heard $line; done") };
    let one = pod.run_container(config).unwrap();
    for word in ["first", "second"] {
        let mut session = pod.attach(&one, false).unwrap();
        session.write(&format!("{word}\n"));
        session.read_until(&format!("heard {word}"));
    }
    assert!(pod.runs(&one));

    let shell = ContainerConfig { stdin: true, tty: true, ..running("shell", "exec sh") };
    let shell = pod.run_container(shell).unwrap();
    let mut session = pod.attach(&shell, true).unwrap();
    session.resize(97, 31);
    session.write("until [ \"$(stty size)\" = '31 97' ]; do :; done; echo wide-$((90 + 7))\n");
    session.read_until("wide-97");
    session.write("exit 6\n");
    session.finish();
    assert_eq!(exited(&mut pod, &shell).exit_code, 6);
}

#[test]
fn a_log_has_every_line_with_its_stream_and_its_time() {
    let mut pod = pod();
    let long = "x".repeat(2 * LONGEST_LINE + 100);
    let script = format!(
        "echo one; echo two >&2; echo; head -c {} /dev/zero | tr '\\0' x; echo; printf three",
        long.len()
    );
    let one = pod.run_container(running("one", &script)).unwrap();
    exited(&mut pod, &one);
    eventually("the log is complete", || pod.log("one").contains("three"));

    let log = lines(&pod.log("one"));
    let of = |stream: &str| log.iter().filter(|line| line.stream == stream).collect::<Vec<_>>();
    assert_eq!(of("stderr"), [&line("stderr", "two")]);
    let out = of("stdout");
    assert_eq!(out[..2], [&line("stdout", "one"), &line("stdout", "")]);
    // containerd may well count on the rest of this one.
    assert_eq!(out.last().unwrap().text, "three");
    let parts = &out[2..out.len() - 1];
    let sizes: Vec<_> = parts.iter().map(|part| (part.tag.as_str(), part.text.len())).collect();
    assert_eq!(sizes, [("P", LONGEST_LINE), ("P", LONGEST_LINE), ("F", 100)]);
    assert_eq!(parts.iter().map(|part| part.text.as_str()).collect::<String>(), long);
}

#[test]
fn a_log_that_is_put_aside_is_continued_in_a_new_file() {
    let mut pod = pod();
    let counting = "i=0; while :; do i=$((i + 1)); echo line $i; sleep 0.1; done";
    let one = pod.run_container(running("one", counting)).unwrap();
    wait_for_output(&pod, "one", "line 3");
    let path = pod.log_path("one");
    let old = path.with_extension("log.old");

    fs::rename(&path, &old).unwrap();
    pod.reopen_log(&one).unwrap();
    eventually("the new file has lines", || {
        fs::read_to_string(&path).is_ok_and(|text| text.lines().count() >= 3)
    });

    let log = fs::read_to_string(&old).unwrap() + &pod.log("one");
    let numbers: Vec<_> = lines(&log).into_iter().map(|line| line.text).collect();
    let expected: Vec<_> = (1..=numbers.len()).map(|number| format!("line {number}")).collect();
    assert_eq!(numbers, expected, "no line is lost");
}

/// What a process holds: files, threads, KiB of memory.
fn held(pid: u32) -> [usize; 3] {
    let number = |field| process_status(pid, field).split(' ').next().unwrap().parse().unwrap();
    [descriptors(pid), number("Threads"), number("VmRSS")]
}

/// As many as the probes of a busy pod make in a minute or so. `MAYU_TEST_EXECS` says how many else.
#[test]
fn two_hundred_execs_leave_nothing_open() {
    let count = how_many("MAYU_TEST_EXECS", 200);
    let mut pod = pod();
    let one = idle(&mut pod, "one");
    let [vmm] = &processes_named("mayu-vmm")[..] else { panic!("one VMM") };
    let shim = shim_of(pod.id());
    // The first ones fill caches.
    for _ in 0..50 {
        outcome(&mut pod, &one, "true").success();
    }
    let before = [held(shim.pid), held(vmm.pid)];
    for number in counted(count, "execs") {
        assert_eq!(outcome(&mut pod, &one, &format!("echo {number}")).success().text(), number.to_string());
    }
    eventually(&format!("shim and VMM hold no more than {before:?}"), || {
        let now = [held(shim.pid), held(vmm.pid)];
        let grown = now
            .iter()
            .flatten()
            .zip(before.iter().flatten())
            .map(|(now, before)| now.saturating_sub(*before));
        grown.zip(TOLERANCES.iter().flatten()).all(|(grown, tolerance)| grown <= *tolerance)
    });
    println!("{count} execs: {before:?} before, {:?} after", [held(shim.pid), held(vmm.pid)]);
}
