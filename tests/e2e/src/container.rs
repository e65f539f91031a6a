//! A container that is gone when its test is.

use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use crate::{Outcome, PATIENCE, run, run_with_input, runtime};

/// A `ctr` command in containerd's default namespace. It waits longer for a busy containerd than it would by itself.
pub fn ctr<I: IntoIterator<Item: AsRef<std::ffi::OsStr>>>(args: I) -> Command {
    let mut command = Command::new("ctr");
    command.args(["--connect-timeout", "150s"]).args(args);
    command
}

/// A container, under an id that no other test has. Dropping it leaves nothing of it in containerd.
pub struct Container {
    id: String,
}

impl Container {
    /// Names a container that does not exist yet.
    pub fn unborn() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        Self { id: format!("e2e-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)) }
    }

    /// Starts a container in the background. `flags` are `ctr run`'s.
    ///
    /// # Panics
    /// It does not start.
    #[track_caller]
    pub fn detached(image: &str, flags: &[&str], command: &[&str]) -> Self {
        let container = Self::unborn();
        let flags = [&["--detach"], flags].concat();
        run(&mut container.run_command(&flags, image, command)).success();
        container
    }

    /// Starts a container in the background that does nothing until it is killed.
    ///
    /// # Panics
    /// It does not start.
    #[track_caller]
    pub fn idle(flags: &[&str]) -> Self {
        Self::detached(crate::BUSYBOX, flags, &["sleep", "infinity"])
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// `ctr run` of this container, to be run by the caller.
    pub fn run_command(&self, flags: &[&str], image: &str, command: &[&str]) -> Command {
        let mut ctr = ctr(["run", "--runtime", &runtime()]);
        ctr.args(flags).arg(image).arg(&self.id).args(command);
        ctr
    }

    /// Runs a container in the foreground until it ends.
    #[track_caller]
    pub fn run(image: &str, flags: &[&str], command: &[&str]) -> Outcome {
        run(&mut Self::unborn().run_command(&[&["--rm"], flags].concat(), image, command))
    }

    /// Runs a container of busybox's shell in the foreground until it ends.
    #[track_caller]
    pub fn sh(flags: &[&str], script: &str) -> Outcome {
        Self::run(crate::BUSYBOX, flags, &["sh", "-c", script])
    }

    /// `ctr task exec` in this container, to be run by the caller.
    pub fn exec_command(&self, flags: &[&str], command: &[&str]) -> Command {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let exec_id = format!("exec-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let mut ctr = ctr(["task", "exec", "--exec-id", &exec_id]);
        ctr.args(flags).arg(&self.id).args(command);
        ctr
    }

    /// Runs a command in this container until it ends.
    #[track_caller]
    pub fn exec(&self, command: &[&str]) -> Outcome {
        run(&mut self.exec_command(&[], command))
    }

    /// Runs a shell script in this container and returns what it printed.
    ///
    /// # Panics
    /// It fails.
    #[track_caller]
    pub fn script(&self, script: &str) -> String {
        self.exec(&["sh", "-c", script]).success().text()
    }

    /// Runs a command that reads `input` in this container until it ends. ctr 1.7 gives up after seconds on a containerd
    /// that is too busy to greet it, whatever it is told; then nothing has begun, and it is run again.
    #[track_caller]
    pub fn exec_with_input(&self, command: &[&str], input: &[u8]) -> Outcome {
        let started = Instant::now();
        loop {
            let outcome = run_with_input(&mut self.exec_command(&[], command), input.to_vec());
            let begun = !outcome.stderr.contains("ctr: connection error");
            if begun || started.elapsed() > PATIENCE {
                return outcome;
            }
        }
    }

    /// `ctr task <verb> <flags> <id>`.
    #[track_caller]
    pub fn task(&self, verb: &str, flags: &[&str]) -> Outcome {
        run(ctr(["task", verb]).args(flags).arg(&self.id))
    }

    /// Deletes its stopped task, and returns the exit code that containerd knows of.
    ///
    /// # Panics
    /// It cannot be deleted.
    #[track_caller]
    pub fn delete_task(&self) -> i32 {
        // ctr succeeds whatever the task's exit code was, and warns of one that is not zero.
        let warnings = self.task("delete", &[]).success().stderr;
        let code = warnings.split("exit with non-zero exit code ").nth(1);
        code.map_or(0, |code| code.trim_end_matches(|c: char| !c.is_ascii_digit()).parse().expect("a number"))
    }

    /// What `ctr task ls` says of its task: `RUNNING`, `STOPPED`, `PAUSED`, or nothing when there is none.
    #[track_caller]
    pub fn status(&self) -> Option<String> {
        let list = run(&mut ctr(["task", "ls"])).success().text();
        let line = list.lines().find(|line| line.split_whitespace().next() == Some(&self.id))?;
        line.split_whitespace().nth(2).map(str::to_owned)
    }

    /// The pid that containerd has for its task.
    ///
    /// # Panics
    /// There is no task.
    #[track_caller]
    pub fn pid(&self) -> u32 {
        let list = run(&mut ctr(["task", "ls"])).success().text();
        let line = list.lines().find(|line| line.split_whitespace().next() == Some(&self.id));
        line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok())
            .expect("the task is listed with its pid")
    }

    /// Its bundle on the host.
    pub fn bundle(&self) -> PathBuf {
        PathBuf::from("/run/containerd/io.containerd.runtime.v2.task/default").join(&self.id)
    }

    /// Kills and removes it, as a person would.
    ///
    /// # Panics
    /// It cannot be removed.
    #[track_caller]
    pub fn remove(self) {
        self.task("delete", &["--force"]).success();
        run(&mut ctr(["container", "rm", &self.id])).success();
        std::mem::forget(self);
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // Most are gone already; a test that has failed may leave any state behind.
        for command in [&["task", "delete", "--force"][..], &["container", "rm"], &["snapshot", "rm"]] {
            drop(ctr(command).arg(&self.id).output());
        }
    }
}
