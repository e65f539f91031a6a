//! Code execution in a VMM, as somebody has it who came out of the guest: a thread of the VMM, as it is installed, makes the
//! system calls that a test wants. It is stopped as a debugger would (ptrace(2)), and its own filters judge the calls.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;

use nix::errno::Errno;
use nix::libc::user_regs_struct;
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// The instruction `syscall`.
const SYSCALL: [u8; 2] = [0x0f, 0x05];

/// How far below its stack the thread's memory is used: more than the red zone of 128 bytes, less than a stack has.
const BELOW_STACK: u64 = 4096;

/// A thread that does what it is told. Dropping it lets it go on with its work, if it is still there.
pub struct Intruder {
    thread: Pid,
    memory: File,
    /// What it was doing.
    registers: user_regs_struct,
    /// Where in its program there is a system call.
    gadget: u64,
}

/// What becomes of a system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It is done.
    Value(u64),
    /// The kernel refuses.
    Refused(Errno),
    /// The process is no more.
    Killed(Signal),
}

impl Intruder {
    /// Takes over a thread of a process, by the beginning of its name.
    ///
    /// # Panics
    /// There is no such thread, or it cannot be stopped.
    #[track_caller]
    pub fn of(process: u32, name: &str) -> Self {
        let threads = fs::read_dir(format!("/proc/{process}/task")).expect("the process is there");
        let mut threads = threads.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        let called = |thread: &i32| {
            fs::read_to_string(format!("/proc/{thread}/comm")).is_ok_and(|comm| comm.starts_with(name))
        };
        let thread = Pid::from_raw(threads.find(called).expect("it has such a thread"));
        let memory = File::options().read(true).write(true).open(format!("/proc/{process}/mem"));
        let memory = memory.expect("its memory can be written to");
        let gadget = find_gadget(process, &memory).expect("its program makes system calls");
        ptrace::seize(thread, ptrace::Options::empty()).expect("the thread can be traced");
        ptrace::interrupt(thread).expect("the thread can be stopped");
        waitpid(thread, Some(WaitPidFlag::__WALL)).expect("the thread stops");
        let registers = ptrace::getregs(thread).expect("it has registers");
        Self { thread, memory, registers, gadget }
    }

    /// Has it make a system call.
    ///
    /// # Panics
    /// It cannot be controlled any more.
    #[track_caller]
    pub fn call(&self, number: i64, arguments: [u64; 6]) -> Answer {
        let [rdi, rsi, rdx, r10, r8, r9] = arguments;
        let registers = user_regs_struct {
            rip: self.gadget,
            rax: number.cast_unsigned(),
            // No call that was interrupted is to be made again.
            orig_rax: u64::MAX,
            rdi,
            rsi,
            rdx,
            r10,
            r8,
            r9,
            ..self.registers
        };
        ptrace::setregs(self.thread, registers).expect("its registers can be set");
        loop {
            // The process may be killed at any time.
            if let Err(error) = ptrace::step(self.thread, None) {
                assert_eq!(error, Errno::ESRCH);
            }
            match waitpid(self.thread, Some(WaitPidFlag::__WALL)).expect("it can be waited for") {
                WaitStatus::Stopped(_, Signal::SIGTRAP) => break,
                WaitStatus::Signaled(_, signal, _) => return Answer::Killed(signal),
                WaitStatus::Exited(..) => return Answer::Killed(Signal::SIGKILL),
                _ => {}
            }
        }
        let returned = ptrace::getregs(self.thread).expect("it has registers").rax.cast_signed();
        match i32::try_from(returned) {
            Ok(error) if (-4095..0).contains(&error) => Answer::Refused(Errno::from_raw(-error)),
            _ => Answer::Value(returned.cast_unsigned()),
        }
    }

    /// Puts a text into its memory, in place of the last one. Gives the address.
    ///
    /// # Panics
    /// There is a zero in it, or the memory is none.
    #[track_caller]
    pub fn text(&self, text: &str) -> u64 {
        let text = CString::new(text).expect("a text without zeros");
        let address = self.scratch();
        self.memory.write_all_at(text.as_bytes_with_nul(), address).expect("there is memory below its stack");
        address
    }

    /// Reads so much of its memory from where the last text was put.
    ///
    /// # Panics
    /// The memory is none.
    #[track_caller]
    pub fn read(&self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_exact_at(&mut bytes, self.scratch()).expect("there is memory below its stack");
        bytes
    }

    /// Memory that it does not use now, of some thousand bytes.
    pub fn scratch(&self) -> u64 {
        self.registers.rsp.saturating_sub(BELOW_STACK) & !0xf
    }
}

impl Drop for Intruder {
    fn drop(&mut self) {
        // There may be nothing left of it.
        let _ = ptrace::setregs(self.thread, self.registers);
        let _ = ptrace::detach(self.thread, None);
    }
}

fn find_gadget(process: u32, memory: &File) -> io::Result<u64> {
    let maps = fs::read_to_string(format!("/proc/{process}/maps"))?;
    for line in maps.lines().filter(|line| line.contains(" r-xp ") && !line.contains('[')) {
        let Some((start, end)) = line.split(' ').next().and_then(|range| range.split_once('-')) else {
            continue;
        };
        let address = |text| u64::from_str_radix(text, 16).map_err(io::Error::other);
        let (start, end) = (address(start)?, address(end)?);
        let mut code = vec![0; usize::try_from(end - start).map_err(io::Error::other)?];
        memory.read_exact_at(&mut code, start)?;
        if let Some(offset) = code.windows(2).position(|bytes| bytes == SYSCALL) {
            return Ok(start + offset as u64);
        }
    }
    Err(io::ErrorKind::NotFound.into())
}
