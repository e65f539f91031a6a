//! containerd's log URIs (`pkg/cio` and the runc shim's `process/io.go`).

use std::path::PathBuf;

use percent_encoding::percent_decode_str;

use crate::{Error, Result};

/// What the name of an output means.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Uri {
    /// `binary:///path?key=value`: a program that reads both outputs. Keys and values are its arguments.
    Binary { program: PathBuf, arguments: Vec<String> },
    /// `file:///path`: a file to which both outputs are appended.
    File(PathBuf),
    /// A path, or `fifo:///path`, or nothing.
    Path,
}

impl Uri {
    pub(super) fn parse(text: &str) -> Result<Self> {
        let Some((scheme, rest)) = text.split_once("://") else {
            return Ok(Self::Path);
        };
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let path = || {
            let path: PathBuf = percent_decode_str(path).decode_utf8_lossy().into_owned().into();
            if path.is_absolute() { Ok(path) } else { Err(invalid(text, "its path is not absolute")) }
        };
        match scheme {
            "binary" => Ok(Self::Binary { program: path()?, arguments: arguments(query) }),
            "file" => Ok(Self::File(path()?)),
            _ => Err(invalid(text, "the scheme is none of binary and file")),
        }
    }
}

fn arguments(query: &str) -> Vec<String> {
    form_urlencoded::parse(query.as_bytes())
        .flat_map(|(key, value)| [key.into_owned(), value.into_owned()])
        .filter(|argument| !argument.is_empty())
        .collect()
}

fn invalid(text: &str, reason: &str) -> Error {
    let text: String = text.chars().take(256).collect();
    Error::InvalidArgument(format!("stdio URI {text:?}: {reason}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_paths() {
        for text in ["", "/run/containerd/fifo/1/c-stdout", "relative"] {
            assert_eq!(Uri::parse(text).unwrap(), Uri::Path, "{text}");
        }
    }

    #[test]
    fn a_logger_has_arguments() {
        let uri = Uri::parse("binary:///usr/bin/log%20er?tag=a+b&flag&x=%2F").unwrap();
        let arguments = ["tag", "a b", "flag", "x", "/"].map(String::from).to_vec();
        assert_eq!(uri, Uri::Binary { program: "/usr/bin/log er".into(), arguments });
    }

    #[test]
    fn what_is_unknown_or_relative_is_refused() {
        for text in ["gopher:///x", "file://relative", "binary://"] {
            assert!(Uri::parse(text).is_err(), "{text}");
        }
    }
}
