//! The serial port: what the kernel prints early and when it dies, into a pipe that someone may or may not read.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use serde::{Deserialize, Serialize};
use vm_superio::Trigger;
use vm_superio::serial::NoEvents;
use vmm_sys_util::eventfd::EventFd;

use crate::error::{Error, Result};

/// The port's interrupt line, for [`vm_superio`].
pub struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// A 16550A whose output goes to the console.
pub type Serial = vm_superio::Serial<Line, NoEvents, Console>;

/// The port's registers. What its guest has not finished printing is not among them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState(#[serde(with = "Registers")] vm_superio::SerialState);

/// How [`vm_superio::SerialState`] is written down.
#[derive(Serialize, Deserialize)]
#[serde(remote = "vm_superio::SerialState")]
struct Registers {
    baud_divisor_low: u8,
    baud_divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    in_buffer: Vec<u8>,
}

impl SerialState {
    /// Reads the registers.
    pub fn save(serial: &Serial) -> Self {
        Self(serial.state())
    }

    /// Makes a serial port that goes on with these registers.
    ///
    /// # Errors
    /// As [`serial`], or the state is none that a serial port has.
    pub fn restore(&self, line: EventFd, console: OwnedFd) -> Result<Serial> {
        let console = Console::new(console)?;
        Serial::from_state(&self.0, Line(line), NoEvents, console)
            .map_err(|error| Error::Console(io::Error::other(error)))
    }
}

/// Makes the serial port from its interrupt line and the write end of the console's pipe.
///
/// # Errors
/// The descriptor cannot be made non-blocking.
pub fn serial(line: EventFd, console: OwnedFd) -> Result<Serial> {
    Ok(Serial::new(Line(line), Console::new(console)?))
}

/// Gathers the guest's output into lines. It never blocks the guest: what the pipe does not take, and what exceeds
/// [`BYTES_PER_SECOND`], is dropped and counted.
pub struct Console {
    pipe: File,
    line: Vec<u8>,
    second: Instant,
    budget: usize,
    dropped: u64,
}

/// The most that a guest prints before it is written without a line's end.
const LONGEST_LINE: usize = 512;

/// What a guest may print within a second. A kernel's panic has some KiB.
const BYTES_PER_SECOND: usize = 64 * 1024;

impl Console {
    fn new(pipe: OwnedFd) -> Result<Self> {
        fcntl(&pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(|errno| Error::Console(errno.into()))?;
        Ok(Self {
            pipe: pipe.into(),
            line: Vec::with_capacity(LONGEST_LINE),
            second: Instant::now(),
            budget: BYTES_PER_SECOND,
            dropped: 0,
        })
    }

    /// Bytes that nobody will ever see.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Writes an unfinished line, at the guest's end.
    pub fn finish(&mut self) {
        // No reader, or a slow one: either way these bytes are lost, and the guest must not notice.
        let written = self.pipe.write(&self.line).unwrap_or_default();
        self.dropped += (self.line.len() - written) as u64;
        self.line.clear();
    }

    fn put(&mut self, byte: u8, now: Instant) {
        if now.duration_since(self.second) >= Duration::from_secs(1) {
            self.second = now;
            self.budget = BYTES_PER_SECOND;
        }
        if self.budget == 0 {
            self.dropped += 1;
            return;
        }
        self.budget -= 1;
        self.line.push(byte);
        if byte == b'\n' || self.line.len() == LONGEST_LINE {
            self.finish();
        }
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let now = Instant::now();
        for byte in bytes {
            self.put(*byte, now);
        }
        Ok(bytes.len())
    }

    /// Lines are written when they end: vm-superio asks for a flush after each byte.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read as _;

    /// The transmit register, and the receive register.
    const DATA: u8 = 0;

    fn port() -> (Serial, File) {
        let (reader, writer) = nix::unistd::pipe().unwrap();
        let serial = serial(EventFd::new(libc::EFD_NONBLOCK).unwrap(), writer).unwrap();
        (serial, reader.into())
    }

    fn print(serial: &mut Serial, text: &[u8]) {
        for byte in text {
            serial.write(DATA, *byte).unwrap();
        }
    }

    #[test]
    fn lines_arrive_when_they_end_and_the_rest_at_the_end() {
        let (mut serial, mut reader) = port();
        print(&mut serial, b"one\ntwo");
        let mut buffer = [0; 64];
        let count = reader.read(&mut buffer).unwrap();
        assert_eq!(&buffer[..count], b"one\n");
        serial.writer_mut().finish();
        drop(serial);
        let mut rest = String::new();
        reader.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "two");
    }

    #[test]
    fn a_console_that_nobody_reads_never_blocks_and_counts_what_is_lost() {
        let (mut serial, reader) = port();
        drop(reader);
        print(&mut serial, b"lost\n");
        assert_eq!(serial.writer().dropped(), 5);
    }

    #[test]
    fn a_full_pipe_drops() {
        let (reader, writer) = nix::unistd::pipe().unwrap();
        fcntl(&writer, FcntlArg::F_SETPIPE_SZ(4096)).unwrap();
        let mut serial = serial(EventFd::new(libc::EFD_NONBLOCK).unwrap(), writer).unwrap();
        print(&mut serial, &[b'x'; 8192]);
        assert_eq!(serial.writer().dropped(), 4096);
        drop(reader);
    }

    #[test]
    fn output_is_limited_per_second() {
        let (_reader, writer) = nix::unistd::pipe().unwrap();
        let mut console = Console::new(writer).unwrap();
        let start = console.second;
        console.budget = 1;
        console.put(b'a', start);
        console.put(b'b', start);
        assert_eq!(console.dropped(), 1);
        console.put(b'c', start + Duration::from_secs(1));
        assert_eq!(console.dropped(), 1);
        assert_eq!(console.line, b"ac");
    }

    #[test]
    fn a_restored_port_has_its_registers_and_raises_what_was_pending() {
        const INTERRUPT_ENABLE: u8 = 1;
        const SCRATCH: u8 = 7;
        let (mut serial, _reader) = port();
        serial.write(SCRATCH, 0x5a).unwrap();
        // The transmitter is empty, which is an interrupt now.
        serial.write(INTERRUPT_ENABLE, 2).unwrap();
        let state = serde_json::to_string(&SerialState::save(&serial)).unwrap();
        let state: SerialState = serde_json::from_str(&state).unwrap();

        let (_reader, writer) = nix::unistd::pipe().unwrap();
        let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let mut restored = state.restore(line.try_clone().unwrap(), writer).unwrap();

        assert_eq!(restored.read(SCRATCH), 0x5a);
        assert_eq!(line.read().unwrap(), 1);
        assert_eq!(SerialState::save(&restored), state);
    }
}
