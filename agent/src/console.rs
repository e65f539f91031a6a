//! The agent's log on the guest's console, which the shim reads. The console is slow and what a container does
//! can cause messages, so their number is limited.

use std::fmt::{self, Write as _};
use std::io::Write as _;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use slog::{Drain, KV, Key, Level, Logger, Never, OwnedKVList, Record, Serializer, o};

/// How many messages may come at once.
const BURST: u32 = 50;
/// How much time earns one more message.
const INTERVAL: Duration = Duration::from_secs(1);
/// The longest message in bytes.
const MAX_LENGTH: usize = 1024;

/// A logger to the standard error, which is the console: warnings and errors, or everything with `debug`.
pub fn logger(debug: bool) -> Logger {
    let least = if debug { Level::Debug } else { Level::Warning };
    Logger::root(Console { least, limit: Mutex::new(Limit::new(Instant::now())) }.fuse(), o!())
}

struct Console {
    least: Level,
    limit: Mutex<Limit>,
}

impl Drain for Console {
    type Ok = ();
    type Err = Never;

    fn log(&self, record: &Record<'_>, values: &OwnedKVList) -> Result<(), Never> {
        if !record.level().is_at_least(self.least) {
            return Ok(());
        }
        let allowed = self.limit.lock().unwrap_or_else(PoisonError::into_inner).take(Instant::now());
        let Some(suppressed) = allowed else { return Ok(()) };
        let mut line = Line(format!("mayu-agent: {}: {}", record.level().as_str(), record.msg()));
        // Formatting into a string does not fail.
        let _ = record.kv().serialize(record, &mut line);
        let _ = values.serialize(record, &mut line);
        if suppressed > 0 {
            let _ = write!(line.0, ", suppressed: {suppressed}");
        }
        let line: String = line.0.chars().filter(|letter| !letter.is_control()).take(MAX_LENGTH).collect();
        // Without a console there is nobody to tell.
        let _ = writeln!(std::io::stderr(), "{line}");
        Ok(())
    }
}

/// A bucket that holds up to [`BURST`] messages and gets one more each [`INTERVAL`].
struct Limit {
    left: u32,
    earned: Instant,
    suppressed: u64,
}

impl Limit {
    fn new(now: Instant) -> Self {
        Self { left: BURST, earned: now, suppressed: 0 }
    }

    /// Takes one message out; the number of those suppressed before it, or nothing if it is to be, too.
    fn take(&mut self, now: Instant) -> Option<u64> {
        let intervals = now.saturating_duration_since(self.earned).as_secs() / INTERVAL.as_secs();
        if intervals > 0 {
            self.left = self.left.saturating_add(u32::try_from(intervals).unwrap_or(BURST)).min(BURST);
            self.earned = now;
        }
        if self.left == 0 {
            self.suppressed += 1;
            return None;
        }
        self.left -= 1;
        Some(std::mem::take(&mut self.suppressed))
    }
}

struct Line(String);

impl Serializer for Line {
    fn emit_arguments(&mut self, key: Key, value: &fmt::Arguments<'_>) -> slog::Result {
        write!(self.0, ", {key}: {value}").map_err(Into::into)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_let_through_and_the_rest_counted() {
        let start = Instant::now();
        let mut limit = Limit::new(start);

        let taken = (0..BURST + 10).filter_map(|_| limit.take(start)).count();

        assert_eq!(taken, BURST as usize);
        assert_eq!(limit.take(start + INTERVAL), Some(10));
        assert_eq!(limit.take(start + INTERVAL), None);
    }

    #[test]
    fn a_long_silence_earns_one_burst() {
        let start = Instant::now();
        let mut limit = Limit::new(start);
        while limit.take(start).is_some() {}

        let later = start + INTERVAL * 10 * BURST;
        let taken = (0..2 * BURST).filter_map(|_| limit.take(later)).count();

        assert_eq!(taken, BURST as usize);
    }
}
