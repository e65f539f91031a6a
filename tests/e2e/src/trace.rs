//! The system calls of programs, as the host's kernel sees them (its Documentation/trace/ftrace.rst).

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use crate::run;

/// Where the kernel's tracing is.
const TRACING: &str = "/sys/kernel/tracing";

/// Room for what is traced, in KiB for each CPU of the host.
const BUFFER_KIB: u32 = 64 << 10;

/// Watches system calls until it is dropped.
pub struct Trace {
    instance: PathBuf,
}

/// One system call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SystemCall {
    /// The name of the thread at that time.
    pub thread: String,
    /// Its number on the host.
    pub tid: u32,
    /// Which one.
    pub number: i64,
    /// Its arguments.
    pub arguments: [u64; 6],
}

impl Trace {
    /// Watches all threads whose names match one of these patterns.
    ///
    /// # Panics
    /// The kernel cannot.
    pub fn of(threads: &[&str]) -> Self {
        if !PathBuf::from(TRACING).join("instances").exists() {
            run(Command::new("mount").args(["-t", "tracefs", "tracefs", TRACING])).success();
        }
        let instance = PathBuf::from(TRACING).join(format!("instances/test-{}", std::process::id()));
        fs::create_dir(&instance).expect("an instance of tracing");
        let trace = Self { instance };
        let filter: Vec<_> = threads.iter().map(|pattern| format!("comm ~ \"{pattern}\"")).collect();
        trace.write("buffer_size_kb", &BUFFER_KIB.to_string());
        trace.write("events/raw_syscalls/sys_enter/filter", &filter.join(" || "));
        trace.write("events/raw_syscalls/sys_enter/enable", "1");
        trace
    }

    /// What they have done so far, in order.
    ///
    /// # Panics
    /// Some of it is lost.
    pub fn calls(&self) -> Vec<SystemCall> {
        let text = fs::read_to_string(self.instance.join("trace")).expect("the trace");
        let lost = fs::read_to_string(self.instance.join("per_cpu/cpu0/stats")).expect("its statistics");
        assert!(lost.lines().any(|line| line == "overrun: 0"), "the buffer was too small: {lost}");
        text.lines().filter(|line| !line.starts_with('#')).filter_map(parse).collect()
    }

    fn write(&self, file: &str, text: &str) {
        fs::write(self.instance.join(file), text).expect("the kernel traces system calls");
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        // What fails here, fails the next test.
        let _ = fs::remove_dir(&self.instance);
    }
}

/// `  vcpu0-1234  [000] .....  1.234567: sys_enter: NR 16 (b, ae80, 0, 0, 0, 0)`
fn parse(line: &str) -> Option<SystemCall> {
    let (head, call) = line.split_once(": sys_enter: NR ")?;
    let (thread, tid) = head.split('[').next()?.trim().rsplit_once('-')?;
    let (number, arguments) = call.split_once(" (")?;
    let mut parsed = [0; 6];
    for (argument, text) in parsed.iter_mut().zip(arguments.trim_end_matches(')').split(", ")) {
        *argument = u64::from_str_radix(text, 16).ok()?;
    }
    Some(SystemCall {
        thread: thread.to_owned(),
        tid: tid.parse().ok()?,
        number: number.parse().ok()?,
        arguments: parsed,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_trace_has_the_thread_and_its_call() {
        let line = "          virtio-fs-1234    [000] .....  12.345678: sys_enter: NR 16 (b, ae80, 0, ffffffffffffff9c, 0, 1)";
        let expected = SystemCall {
            thread: "virtio-fs".into(),
            tid: 1234,
            number: 16,
            arguments: [0xb, 0xae80, 0, 0xffff_ffff_ffff_ff9c, 0, 1],
        };
        assert_eq!(parse(line), Some(expected));
        assert_eq!(parse("# tracer: nop"), None);
    }
}
