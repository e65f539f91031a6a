//! Runs a program to its end, within a deadline, without ever blocking on a full pipe.

use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Instant;

use crate::PATIENCE;

/// What became of a program.
#[derive(Debug)]
pub struct Outcome {
    /// Its exit code; -1 when a signal ended it.
    pub code: i32,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: String,
}

impl Outcome {
    /// The standard output as text, without the last line's end.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim_end().to_owned()
    }

    /// This outcome, if the program succeeded.
    ///
    /// # Panics
    /// It did not.
    #[track_caller]
    pub fn success(self) -> Self {
        assert_eq!(self.code, 0, "stdout: {}\nstderr: {}", self.text(), self.stderr);
        self
    }

    /// The standard error, if the program failed.
    ///
    /// # Panics
    /// It did not.
    #[track_caller]
    pub fn failure(self) -> String {
        assert_ne!(self.code, 0, "it succeeded, with stdout: {}\nstderr: {}", self.text(), self.stderr);
        self.stderr
    }
}

/// Runs a program with an empty standard input.
///
/// # Panics
/// It cannot be started, or does not end in time.
#[track_caller]
pub fn run(command: &mut Command) -> Outcome {
    finish(spawn(command.stdin(Stdio::null())), command)
}

/// Runs a program that reads `input`.
///
/// # Panics
/// As [`run`].
#[track_caller]
pub fn run_with_input(command: &mut Command, input: Vec<u8>) -> Outcome {
    let mut child = spawn(command.stdin(Stdio::piped()));
    let mut stdin = child.stdin.take().expect("stdin is piped");
    // A program that ends before it has read everything is the test's business, not the writer's.
    let writer = thread::spawn(move || drop(stdin.write_all(&input)));
    let outcome = finish(child, command);
    writer.join().expect("the writer does not panic");
    outcome
}

#[track_caller]
fn spawn(command: &mut Command) -> Child {
    command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"))
}

#[track_caller]
fn finish(mut child: Child, command: &Command) -> Outcome {
    let mut stdout = child.stdout.take().expect("stdout is piped");
    let mut stderr = child.stderr.take().expect("stderr is piped");
    let out = thread::spawn(move || {
        let mut bytes = Vec::new();
        stdout.read_to_end(&mut bytes).map(|_| bytes)
    });
    let err = thread::spawn(move || {
        let mut bytes = Vec::new();
        stderr.read_to_end(&mut bytes).map(|_| bytes)
    });
    let started = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().expect("the child is ours") {
            break status;
        }
        if started.elapsed() > PATIENCE {
            child.kill().expect("the child is ours");
            child.wait().expect("the child is ours");
            panic!("{command:?} does not end");
        }
        thread::sleep(std::time::Duration::from_millis(5));
    };
    let stdout = out.join().expect("the reader does not panic").expect("a pipe can be read");
    let stderr = err.join().expect("the reader does not panic").expect("a pipe can be read");
    Outcome {
        code: status.code().unwrap_or(-1),
        stdout,
        stderr: String::from_utf8_lossy(&stderr).into_owned(),
    }
}
