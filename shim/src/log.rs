//! The shim's log: one JSON object a line, on the bundle's `log` FIFO, which containerd copies to its own.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use slog::{Drain, FnValue, Level, LevelFilter, Logger, PushFnValue, Record, o};

/// The FIFO's name in the bundle.
const FIFO: &str = "log";

/// What a pipe takes at once or not at all (`PIPE_BUF`, pipe(7)); a longer line is cut.
const MAX_LINE: usize = 4096;

/// Opens the bundle's log. Open for reading as well, so that neither a containerd that is away nor one that comes
/// back makes writing fail; and it never blocks: what nobody reads is lost.
///
/// # Errors
/// There is no such FIFO.
pub fn open(bundle: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(nix::libc::O_NONBLOCK).open(bundle.join(FIFO))
}

/// A logger on `output` whose every line names the sandbox.
pub fn logger(output: impl Write + Send + 'static, sandbox_id: &str, debug: bool) -> Logger {
    let level = if debug { Level::Debug } else { Level::Info };
    let json = slog_json::Json::new(Lines { output, line: Vec::new() })
        .add_key_value(o!(
            "time" => FnValue(|_: &Record| epoch_seconds()),
            "level" => FnValue(|record: &Record| record.level().as_str().to_lowercase()),
            "msg" => PushFnValue(|record: &Record, serializer| serializer.emit(record.msg())),
        ))
        .build();
    let drain = LevelFilter::new(Mutex::new(json), level).ignore_res();
    Logger::root(drain, o!("runtime" => crate::RUNTIME, "sandbox" => sandbox_id.to_string()))
}

/// Seconds since the epoch with milliseconds; containerd puts its own date before the line's arrival.
fn epoch_seconds() -> f64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    (now.as_millis() as f64) / 1000.0
}

/// Hands each line to the output in one piece, so that lines of several writers do not mix.
struct Lines<W> {
    output: W,
    line: Vec<u8>,
}

impl<W: Write> Write for Lines<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.line.extend_from_slice(bytes);
        if self.line.ends_with(b"\n") {
            if self.line.len() > MAX_LINE {
                self.line.truncate(MAX_LINE - 1);
                self.line.push(b'\n');
            }
            // A full pipe loses the line: logging must never hold up a pod.
            let _ = self.output.write(&self.line);
            self.line.clear();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Lets through so many lines a second, for text that a guest or the VMM causes.
#[derive(Debug)]
pub struct RateLimit {
    per_second: u32,
    window: Instant,
    used: u32,
    dropped: u64,
}

impl RateLimit {
    /// At most `per_second` lines in any second.
    pub fn new(per_second: u32) -> Self {
        Self { per_second, window: Instant::now(), used: 0, dropped: 0 }
    }

    /// Whether one more line may go out at `now`; if so, how many were dropped since the last that did.
    pub fn admit(&mut self, now: Instant) -> Option<u64> {
        if now.duration_since(self.window) >= Duration::from_secs(1) {
            self.window = now;
            self.used = 0;
        }
        if self.used == self.per_second {
            self.dropped += 1;
            return None;
        }
        self.used += 1;
        Some(std::mem::take(&mut self.dropped))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use slog::{debug, info};
    use std::sync::Arc;

    #[derive(Clone, Default)]
    struct Writes(Arc<Mutex<Vec<Vec<u8>>>>);

    impl Write for Writes {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().push(bytes.to_vec());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_record_is_one_write_of_one_json_object() {
        let writes = Writes::default();
        info!(logger(writes.clone(), "pod", false), "VM started"; "pid" => 7);
        let writes = writes.0.lock().unwrap();
        assert_eq!(writes.len(), 1);
        let line: serde_json::Value = serde_json::from_slice(&writes[0]).unwrap();
        assert_eq!(
            (&line["msg"], &line["sandbox"], &line["pid"]),
            (&"VM started".into(), &"pod".into(), &7.into())
        );
        assert_eq!(line["level"], "info");
    }

    #[test]
    fn debug_lines_need_the_flag() {
        let writes = Writes::default();
        debug!(logger(writes.clone(), "pod", false), "quiet");
        assert!(writes.0.lock().unwrap().is_empty());
        debug!(logger(writes.clone(), "pod", true), "loud");
        assert_eq!(writes.0.lock().unwrap().len(), 1);
    }

    #[test]
    fn a_long_line_is_cut_to_what_a_pipe_takes_whole() {
        let writes = Writes::default();
        info!(logger(writes.clone(), "pod", false), "{}", "x".repeat(2 * MAX_LINE));
        let writes = writes.0.lock().unwrap();
        assert_eq!((writes.len(), writes[0].len()), (1, MAX_LINE));
        assert_eq!(writes[0].last(), Some(&b'\n'));
    }

    #[test]
    fn a_flood_is_counted_and_not_shown() {
        let mut limit = RateLimit::new(2);
        let start = limit.window;
        let admitted: Vec<_> = (0..5).map(|_| limit.admit(start)).collect();
        assert_eq!(admitted, [Some(0), Some(0), None, None, None]);
        assert_eq!(limit.admit(start + Duration::from_secs(1)), Some(3));
    }
}
