//! What can go wrong with a policy.

use std::io;
use std::path::PathBuf;

/// A policy, or a test of one, that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or directory of policies cannot be read.
    #[error("read policy {}: {source}", path.display())]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// A policy that is not Rego.
    #[error("policy {0}")]
    Parse(String),
    /// A policy of another package.
    #[error("policy {}: its package is {found}, and has to be {expected}", path.display())]
    Package {
        /// The file.
        path: PathBuf,
        /// What it says.
        found: String,
        /// What it would have to say.
        expected: String,
    },
    /// A policy that denies nothing whatever happens, which nobody means.
    #[error(
        "policy {}: package {package} has no set `deny`: write `deny contains {{\"rule\": …, \"field\": …, \"value\": …, \"message\": …}} if {{ … }}`",
        path.display()
    )]
    NoDeny {
        /// The file.
        path: PathBuf,
        /// Its package.
        package: String,
    },
    /// A policy that does not come to a decision.
    #[error("policy {}: it comes to no decision: {reason}", path.display())]
    Evaluate {
        /// The file.
        path: PathBuf,
        /// Where, and why.
        reason: String,
    },
    /// A policy that denies with something else than a denial.
    #[error("policy {}: an element of `deny` is {element}: it has to be a string, or an object of rule, field, value and message", path.display())]
    Denial {
        /// The file.
        path: PathBuf,
        /// The element, shortened.
        element: String,
    },
    /// A request that cannot be shown to a policy.
    #[error("describe the request to the policy: {0}")]
    Request(#[from] serde_json::Error),
    /// A directory in which nothing is tested.
    #[error("{}: no rule test_… in a file …_test.rego", .0.display())]
    NoTests(PathBuf),
}

/// The result of an operation on policies.
pub type Result<T> = std::result::Result<T, Error>;

/// What the engine says of an error: where first, in one line. It draws the source below the place, for terminals.
///
/// ```text
/// --> /etc/mayu/policy.rego:3:5
///   |
/// 3 | deny contains
///   |     ^
/// error: expecting expression
/// ```
pub(crate) fn located(error: &impl ToString) -> String {
    let text = error.to_string();
    let place = text.lines().find_map(|line| line.trim().strip_prefix("--> "));
    let reason = text.split_once("\nerror: ").map(|(_, reason)| reason.lines().next().unwrap_or_default());
    match place.map(|place| place.rsplitn(3, ':').collect::<Vec<_>>()).as_deref() {
        Some([column, line, path]) => {
            format!("{path}: line {line}, column {column}: {}", reason.unwrap_or("the reason is not known"))
        }
        _ => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_place_comes_first_and_all_is_one_line() {
        let drawn = "\n--> /etc/a:b.rego:3:5\n  |\n3 | x = \n  |     ^\nerror: expecting expression";
        assert_eq!(located(&drawn), "/etc/a:b.rego: line 3, column 5: expecting expression");
        assert_eq!(located(&"not a valid rule path"), "not a valid rule path");
    }
}
