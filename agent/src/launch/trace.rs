//! Keeps what libcontainer logs as errors. Its error values carry only the outermost reason across its
//! processes ("failed to prepare rootfs"); the one that helps ("mount /x: No such file") is in the log.

use std::fmt::{self, Write as _};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::pipe2;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

use crate::error::{Error, Result};

/// The longest line kept, in characters.
const MAX_LINE: usize = 1024;
/// How much is read back, in bytes.
const MAX_LOG: usize = 16 * 1024;

/// Installs itself as the log of this process and those cloned from it; they share a pipe.
pub struct ErrorLog {
    read: File,
}

impl ErrorLog {
    /// Starts keeping errors.
    ///
    /// # Errors
    ///
    /// `System` without a pipe.
    pub fn install() -> Result<Self> {
        let (read, write) = pipe2(OFlag::O_CLOEXEC).map_err(Error::system("make a pipe"))?;
        for end in [&read, &write] {
            // The log must never block what it is about.
            fcntl(end.as_fd(), FcntlArg::F_SETFL(OFlag::O_NONBLOCK))
                .map_err(Error::system("make a pipe non-blocking"))?;
        }
        // Fails only where one is installed already, which nobody does.
        let _ = tracing::subscriber::set_global_default(PipeSubscriber { write });
        Ok(Self { read: File::from(read) })
    }

    /// Adds to `text` what was logged: the first line, which is the innermost, and the system's reason.
    pub fn explain(mut self, text: &str) -> String {
        let mut buffer = vec![0; MAX_LOG];
        let length = self.read.read(&mut buffer).unwrap_or(0);
        explain(text, &String::from_utf8_lossy(&buffer[..length]))
    }
}

fn explain(text: &str, log: &str) -> String {
    let mut explained = text.to_owned();
    let first = log.lines().next().unwrap_or_default();
    // The debug form of `std::io::Error`: its text is there even where an error does not pass it on.
    let reason = log
        .lines()
        .find_map(|line| Some(line.split_once("message: \"")?.1.split_once('"')?.0))
        .unwrap_or_default();
    for more in [first, reason] {
        if !explained.contains(more) {
            explained.push_str(": ");
            explained.push_str(more);
        }
    }
    explained
}

struct PipeSubscriber {
    write: OwnedFd,
}

impl Subscriber for PipeSubscriber {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && *metadata.level() == Level::ERROR
    }

    fn event(&self, event: &Event<'_>) {
        let mut line = Line::default();
        event.record(&mut line);
        let mut text = line.message;
        text.push_str(&line.fields);
        let mut text: String = text.replace('\n', " ").chars().take(MAX_LINE).collect();
        text.push('\n');
        if let Ok(write) = self.write.try_clone() {
            // A full pipe holds enough.
            let _ = File::from(write).write_all(text.as_bytes());
        }
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        // Spans are not enabled; any number will do.
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

#[derive(Default)]
struct Line {
    message: String,
    fields: String,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a string does not fail.
        let _ = if field.name() == "message" {
            write!(self.message, "{value:?}")
        } else {
            write!(self.fields, ", {}: {value:?}", field.name())
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_innermost_line_and_the_systems_reason_are_added() {
        let log = "failed to mount /proc: create directory failed\n\
                   failed to prepare rootfs, err: Mount(Os { code: 2, message: \"No such file\" })\n";

        let text = explain("failed to prepare rootfs", log);

        assert_eq!(
            text,
            "failed to prepare rootfs: failed to mount /proc: create directory failed: No such file"
        );
    }

    #[test]
    fn nothing_is_said_twice() {
        assert_eq!(explain("mount: No such file", "No such file\n"), "mount: No such file");
        assert_eq!(explain("alone", ""), "alone");
    }
}
