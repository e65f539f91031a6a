//! Further processes in a running container.

use std::thread;

use mayu_e2e::{Container, run};

#[test]
fn an_exec_runs_beside_the_init_and_has_its_own_exit_code() {
    let container = Container::idle(&[]);
    let outcome = container.exec(&["sh", "-c", "echo out; echo err >&2; exit 42"]);
    assert_eq!((outcome.code, outcome.text().as_str(), outcome.stderr.trim()), (42, "out", "err"));
    assert_eq!(container.status().as_deref(), Some("RUNNING"));
}

#[test]
fn an_exec_has_its_own_directory_and_user() {
    let container = Container::idle(&[]);
    let outcome = run(&mut container
        .exec_command(&["--cwd", "/tmp", "--user", "1000:1001"], &["sh", "-c", "pwd; id -u; id -g"]));
    assert_eq!(outcome.success().text(), "/tmp\n1000\n1001");
}

#[test]
fn two_hundred_execs_one_after_another() {
    let container = Container::idle(&[]);
    for number in 0..200 {
        let outcome = container.exec(&["sh", "-c", &format!("echo {number}; exit {}", number % 7)]);
        assert_eq!((outcome.code, outcome.text()), (number % 7, number.to_string()), "{}", outcome.stderr);
    }
    let processes = container.script("set -- /proc/[0-9]*; echo $#");
    assert_eq!(processes, "2", "init and sh, and nothing left of the execs");
}

#[test]
fn fifty_execs_at_once() {
    let container = Container::idle(&[]);
    thread::scope(|scope| {
        let execs: Vec<_> = (0..50)
            .map(|number| {
                let container = &container;
                scope.spawn(move || {
                    let script = format!("cat; echo {number}; exit {number}");
                    (
                        number,
                        container
                            .exec_with_input(&["sh", "-c", &script], format!("to {number}\n").as_bytes()),
                    )
                })
            })
            .collect();
        for exec in execs {
            let (number, outcome) = exec.join().unwrap();
            assert_eq!(
                (outcome.code, outcome.text()),
                (number, format!("to {number}\n{number}")),
                "{}",
                outcome.stderr
            );
        }
    });
}

#[test]
fn an_exec_that_leaves_a_child_behind_ends_itself() {
    let container = Container::idle(&[]);
    let outcome = container.exec(&["sh", "-c", "sleep 1000 > /dev/null 2>&1 < /dev/null & echo started"]);
    assert_eq!(outcome.success().text(), "started");
    assert!(container.script("ps").contains("sleep 1000"));
}
