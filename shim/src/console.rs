//! Text from below: the guest's console and the VMM's standard error. Both are hostile: bounded and rate-limited.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use serde::Deserialize;
use slog::{Level, Logger, debug, info, warn};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::net::unix::pipe;
use tokio::task::JoinHandle;

use crate::Result;
use crate::error::system;
use crate::log::RateLimit;

/// How much of the end is kept, in bytes.
const KEEP: usize = 16 * 1024;

/// How much of the end goes into an error message, in bytes.
const SHOW: usize = 4 * 1024;

/// The longest line that is logged, in bytes.
const MAX_LINE: usize = 1024;

/// Lines of one source that are logged in a second.
const LINES_PER_SECOND: u32 = 50;

/// Whose text it is, which decides how it is logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The guest's console: for debugging.
    Guest,
    /// The VMM's standard error: warnings.
    Vmm,
}

/// Reads a stream to its end, logs its lines and keeps the last of it.
#[derive(Debug)]
pub struct Console {
    kept: Arc<Mutex<VecDeque<u8>>>,
    reader: JoinHandle<()>,
}

impl Console {
    /// A pipe whose read end is read from now on, and its write end.
    ///
    /// # Errors
    /// [`crate::Error::System`].
    pub fn pipe(source: Source, log: Logger) -> Result<(Self, OwnedFd)> {
        let (ours, theirs) = pipe2(OFlag::O_CLOEXEC).map_err(system("create a console pipe"))?;
        let ours = pipe::Receiver::from_owned_fd(ours).map_err(system("watch a console pipe"))?;
        Ok((Self::read(ours, source, log), theirs))
    }

    fn read(stream: impl AsyncRead + Unpin + Send + 'static, source: Source, log: Logger) -> Self {
        let kept = Arc::new(Mutex::new(VecDeque::new()));
        let reader = tokio::spawn(follow(stream, source, kept.clone(), log));
        Self { kept, reader }
    }

    /// The end of what came, with everything unprintable replaced.
    pub fn tail(&self) -> String {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let skip = kept.len().saturating_sub(SHOW);
        printable(&kept.iter().skip(skip).copied().collect::<Vec<_>>())
    }

    /// Waits until the other end is closed, but not long, and then gives [`Console::tail`].
    pub async fn final_tail(&mut self) -> String {
        // Whether it was read to its end or only so far, the tail is what there is.
        let _ = tokio::time::timeout(Duration::from_secs(1), &mut self.reader).await;
        self.tail()
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

async fn follow(
    mut stream: impl AsyncRead + Unpin,
    source: Source,
    kept: Arc<Mutex<VecDeque<u8>>>,
    log: Logger,
) {
    let mut buffer = vec![0; 4096];
    let mut line = Vec::new();
    let mut limit = RateLimit::new(LINES_PER_SECOND);
    while let Ok(length) = stream.read(&mut buffer).await {
        if length == 0 {
            break;
        }
        let bytes = &buffer[..length];
        {
            let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
            kept.extend(bytes);
            let excess = kept.len().saturating_sub(KEEP);
            kept.drain(..excess);
        }
        for &byte in bytes {
            if byte != b'\n' && line.len() < MAX_LINE {
                line.push(byte);
                continue;
            }
            log_line(&line, source, &mut limit, &log);
            line.clear();
        }
    }
    log_line(&line, source, &mut limit, &log);
}

fn log_line(line: &[u8], source: Source, limit: &mut RateLimit, log: &Logger) {
    if line.trim_ascii().is_empty() {
        return;
    }
    let Some(dropped) = limit.admit(Instant::now()) else {
        return;
    };
    let text = printable(line.trim_ascii_end());
    match (source, vmm_level(line)) {
        (Source::Guest, _) => debug!(log, "guest console"; "line" => text, "dropped" => dropped),
        (Source::Vmm, Level::Warning) => warn!(log, "VMM"; "line" => text, "dropped" => dropped),
        (Source::Vmm, _) => info!(log, "VMM"; "line" => text, "dropped" => dropped),
    }
}

/// The level of a line of the VMM, which logs in JSON as well. Anything else that it writes is a warning.
fn vmm_level(line: &[u8]) -> Level {
    #[derive(Deserialize)]
    struct Line<'a> {
        level: &'a str,
    }
    match serde_json::from_slice(line) {
        Ok(Line { level: "INFO" | "DEBG" | "TRCE" }) => Level::Info,
        _ => Level::Warning,
    }
}

fn printable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.chars()
        .filter(|character| *character != '\r')
        .map(|character| if character.is_control() && !"\n\t".contains(character) { '?' } else { character })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn tail_of(text: &[u8]) -> String {
        let log = Logger::root(slog::Discard, slog::o!());
        let mut console = Console::read(std::io::Cursor::new(text.to_vec()), Source::Guest, log);
        console.final_tail().await
    }

    #[tokio::test]
    async fn the_end_is_kept_and_the_beginning_is_not() {
        let mut text = vec![b'a'; 3 * KEEP];
        text.extend(b"\nKernel panic\n");
        let tail = tail_of(&text).await;
        assert_eq!(tail.len(), SHOW);
        assert!(tail.ends_with("a\nKernel panic\n"));
    }

    #[test]
    fn what_the_vmm_says_is_a_warning_unless_it_says_otherwise() {
        assert_eq!(vmm_level(br#"{"msg":"machine built","level":"INFO","vcpus":1}"#), Level::Info);
        assert_eq!(vmm_level(br#"{"msg":"the VMM cannot go on","level":"ERRO"}"#), Level::Warning);
        assert_eq!(vmm_level(b"thread 'main' panicked"), Level::Warning);
    }

    #[tokio::test]
    async fn escape_sequences_do_not_reach_a_terminal() {
        assert_eq!(tail_of(b"\x1b[2J\r\nok\t\xff").await, "?[2J\nok\t\u{fffd}");
    }
}
