//! Identifiers that become file names.

use crate::{Error, Result};

/// The longest identifier, in bytes. containerd's own limit is 76.
pub const MAX_LEN: usize = 128;

/// Accepts what containerd accepts: letters, digits and `.`, `_`, `-`, starting with a letter or digit.
/// So an identifier is always one path component and never `.` or `..`.
///
/// # Errors
/// [`Error::InvalidId`], which names `kind`.
pub fn validate(kind: &'static str, id: &str) -> Result<()> {
    let reason = if id.is_empty() {
        "it is empty"
    } else if id.len() > MAX_LEN {
        "it is longer than 128 bytes"
    } else if !id.starts_with(|first: char| first.is_ascii_alphanumeric()) {
        "it does not start with a letter or digit"
    } else if !id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte)) {
        "it has a character other than letters, digits, '.', '_' and '-'"
    } else {
        return Ok(());
    };
    let id = id.chars().take(MAX_LEN).collect();
    Err(Error::InvalidId { kind, id, reason })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ordinary_ids_pass() {
        for id in ["x", "redis-1", "a.b_c", "9f2c", &"f".repeat(MAX_LEN)] {
            assert!(validate("container", id).is_ok(), "{id}");
        }
    }

    #[test]
    fn anything_that_is_not_one_path_component_fails() {
        for id in ["", ".", "..", "../x", "a/b", "/a", "-a", "a b", "a\0", "ä", &"f".repeat(MAX_LEN + 1)] {
            assert!(matches!(validate("container", id), Err(Error::InvalidId { .. })), "{id:?}");
        }
    }

    #[test]
    fn the_message_says_what_is_wrong_with_which_id() {
        let error = validate("container", "../x").unwrap_err();
        assert_eq!(error.to_string(), "container id \"../x\": it does not start with a letter or digit");
    }
}
