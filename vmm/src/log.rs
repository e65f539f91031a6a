//! The log: JSON, one line per event, on the standard error stream, which is a pipe to the shim.

use std::io::{self, Write};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use slog::{Drain as _, Logger, o};

/// The longest line, in bytes: what the kernel writes to a pipe in one piece (`PIPE_BUF`).
const LONGEST_LINE: usize = 4096;

/// A logger for this process.
pub fn to_stderr() -> Logger {
    let drain = slog_json::Json::default(Lines::new(io::stderr())).fuse();
    Logger::root(Mutex::new(drain).fuse(), o!())
}

/// Hands on whole lines in one write each. A line that cannot be written is lost: nobody is left to be told.
struct Lines<W> {
    out: W,
    line: Vec<u8>,
}

impl<W: Write> Lines<W> {
    fn new(out: W) -> Self {
        Self { out, line: Vec::new() }
    }
}

impl<W: Write> Write for Lines<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for byte in bytes {
            if *byte == b'\n' {
                self.line.push(*byte);
                let _ = self.out.write_all(&self.line);
                self.line.clear();
            } else if self.line.len() < LONGEST_LINE - 1 {
                self.line.push(*byte);
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Bounds what a guest can have logged: so many events at once, and then one for each interval.
pub struct RateLimit {
    burst: u32,
    interval: Duration,
    tokens: u32,
    refilled: Instant,
    suppressed: u64,
}

impl RateLimit {
    /// `burst` events at once, one more for each `interval` that has passed.
    pub fn new(burst: u32, interval: Duration) -> Self {
        Self { burst, interval, tokens: burst, refilled: Instant::now(), suppressed: 0 }
    }

    /// Whether an event may be logged now: `Some` with how many were not since the last that was.
    pub fn admit(&mut self, now: Instant) -> Option<u64> {
        while self.tokens < self.burst && now.duration_since(self.refilled) >= self.interval {
            self.tokens += 1;
            self.refilled += self.interval;
        }
        if self.tokens == 0 {
            self.suppressed += 1;
            return None;
        }
        if self.tokens == self.burst {
            self.refilled = now;
        }
        self.tokens -= 1;
        Some(std::mem::take(&mut self.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Remembers each write that it gets.
    #[derive(Default)]
    struct Writes(Vec<Vec<u8>>);

    impl Write for &mut Writes {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.push(bytes.to_vec());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn an_event_is_one_write_and_its_length_is_bounded() {
        let mut writes = Writes::default();
        let mut lines = Lines::new(&mut writes);
        for part in [&b"{\"a\""[..], b":1}\n{", &[b'x'; 2 * LONGEST_LINE], b"\n"] {
            lines.write_all(part).unwrap();
        }
        assert_eq!(writes.0.len(), 2);
        assert_eq!(writes.0[0], b"{\"a\":1}\n");
        assert_eq!(writes.0[1].len(), LONGEST_LINE);
    }

    #[test]
    fn events_beyond_the_burst_are_counted_until_the_next_interval() {
        let mut limit = RateLimit::new(2, Duration::from_secs(1));
        let start = Instant::now();
        assert_eq!(limit.admit(start), Some(0));
        assert_eq!(limit.admit(start), Some(0));
        assert_eq!(limit.admit(start), None);
        assert_eq!(limit.admit(start), None);
        assert_eq!(limit.admit(start + Duration::from_secs(1)), Some(2));
        assert_eq!(limit.admit(start + Duration::from_secs(1)), None);
    }

    #[test]
    fn a_long_rest_gives_no_more_than_the_burst() {
        let mut limit = RateLimit::new(2, Duration::from_secs(1));
        let later = Instant::now() + Duration::from_secs(100);
        let admitted = (0..10).filter(|_| limit.admit(later).is_some()).count();
        assert_eq!(admitted, 2);
    }
}
