//! Makes a seccomp filter of a table of system calls, for the kernel to be quick with. It runs a new filter for each number that there is,
//! and compiles it in several passes, which takes longer than anything else that a thread of the VMM starts with.
//!
//! ```text
//! another architecture? ──▶ kill
//! search for the call's number: a tree down to a few, then one after the other ──▶ kill, if it is not there
//! ├─▶ refuse, allow
//! └─▶ look at its arguments, line by line ──▶ kill, if none of them fits; allow
//! ```

use libc::{
    BPF_ABS, BPF_ALU, BPF_AND, BPF_JEQ, BPF_JGE, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, ENOSYS,
    SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO, SECCOMP_RET_KILL_PROCESS,
};
use seccompiler::{BpfProgram, sock_filter};

use super::{Allowed, Argument, Kind};
use crate::error::{Error, Result};

/// `AUDIT_ARCH_X86_64` of linux/audit.h.
const ARCHITECTURE: u32 = 0xc000_003e;

/// Offsets in `struct seccomp_data` (seccomp(2)).
const NUMBER_OFFSET: u32 = 0;
const ARCHITECTURE_OFFSET: u32 = 4;
const ARGUMENTS_OFFSET: u32 = 16;

/// Loads a word of that.
const LOAD: u32 = BPF_LD | BPF_W | BPF_ABS;

/// How many numbers are compared one after the other. Fewer are found sooner, and make a larger program.
const ONE_BY_ONE: usize = 8;

/// Makes the filter that allows what is in `lines`, and ends the process with what is not.
///
/// # Errors
/// The table is too long.
pub(super) fn compile(lines: impl Iterator<Item = &'static Allowed>) -> Result<BpfProgram> {
    let mut lines: Vec<_> = lines.collect();
    lines.sort_by_key(|line| line.number);
    let mut code = Backwards::default();
    let refuse = code.push(BPF_RET, SECCOMP_RET_ERRNO | ENOSYS as u32);
    let allow = code.push(BPF_RET, SECCOMP_RET_ALLOW);
    // The last one of these is where a search among no numbers would end up.
    let kill = code.push(BPF_RET, SECCOMP_RET_KILL_PROCESS);
    let mut numbers = Vec::new();
    for same in lines.chunk_by(|one, other| one.number == other.number) {
        let verdict = match same {
            [line, ..] if Kind::refuses(line) => refuse,
            [Allowed { arguments: [], .. }] => allow,
            _ => code.look_at_arguments(same, allow, kill)?,
        };
        numbers.extend(same.first().map(|line| (line.number as u32, verdict)));
    }
    code.search(&numbers, kill)?;
    let search = code.push(LOAD, NUMBER_OFFSET);
    code.jump(BPF_JEQ, ARCHITECTURE, search, kill)?;
    code.push(LOAD, ARCHITECTURE_OFFSET);
    Ok(code.finish())
}

/// Where an instruction is, counted from the program's end.
type Place = usize;

/// A program that is written from its end to its beginning: jumps lead forward only, so that it is known by then where to.
#[derive(Default)]
struct Backwards(Vec<sock_filter>);

impl Backwards {
    /// Puts an instruction before all others.
    fn push(&mut self, code: u32, k: u32) -> Place {
        self.0.push(sock_filter { code: code as u16, jt: 0, jf: 0, k });
        self.0.len() - 1
    }

    /// Puts a comparison before all others, which goes on at `yes` or at `no`.
    fn jump(&mut self, comparison: u32, k: u32, yes: Place, no: Place) -> Result<Place> {
        let here = self.0.len();
        let distance = |to: Place| u8::try_from(here - 1 - to).map_err(|_| Error::SeccompTable);
        let (jt, jf) = (distance(yes)?, distance(no)?);
        self.0.push(sock_filter { code: (BPF_JMP | comparison | BPF_K) as u16, jt, jf, k });
        Ok(here)
    }

    /// Puts a search for the number that was loaded before all others. The numbers are in order.
    fn search(&mut self, numbers: &[(u32, Place)], otherwise: Place) -> Result<Place> {
        let (lower, upper) = numbers.split_at(numbers.len() / 2);
        match upper.first() {
            Some(&(middle, _)) if numbers.len() > ONE_BY_ONE => {
                let upper = self.search(upper, otherwise)?;
                let lower = self.search(lower, otherwise)?;
                self.jump(BPF_JGE, middle, upper, lower)
            }
            _ => {
                let mut backwards = numbers.iter().rev();
                backwards
                    .try_fold(otherwise, |next, &(number, verdict)| self.jump(BPF_JEQ, number, verdict, next))
            }
        }
    }

    /// Puts a look at a call's arguments before all others: whether they are as one of `lines` says.
    fn look_at_arguments(&mut self, lines: &[&Allowed], fit: Place, otherwise: Place) -> Result<Place> {
        lines.iter().rev().try_fold(otherwise, |otherwise, line| {
            let mut backwards = line.arguments.iter().rev();
            backwards.try_fold(fit, |fit, argument| self.compare(argument, fit, otherwise))
        })
    }

    /// Puts a look at one argument before all others. It is loaded in halves, of which only those count that have bits that do.
    fn compare(&mut self, argument: &Argument, fits: Place, otherwise: Place) -> Result<Place> {
        let Argument { index, mask, value } = *argument;
        let halves = [(mask as u32, value as u32, 0), ((mask >> 32) as u32, (value >> 32) as u32, 4)];
        halves.into_iter().filter(|(mask, value, _)| mask | value != 0).try_fold(
            fits,
            |fits, (mask, value, half)| {
                self.jump(BPF_JEQ, value, fits, otherwise)?;
                if mask != u32::MAX {
                    self.push(BPF_ALU | BPF_AND | BPF_K, mask);
                }
                Ok(self.push(LOAD, ARGUMENTS_OFFSET + 8 * u32::from(index) + half))
            },
        )
    }

    fn finish(mut self) -> BpfProgram {
        self.0.reverse();
        self.0
    }
}
