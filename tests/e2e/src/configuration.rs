//! The operator's configuration of mayu.

use std::fs;

/// Where it is.
pub const CONFIG: &str = "/etc/mayu/config.toml";

/// Puts another configuration in place for as long as it lives.
pub struct Configuration {
    original: String,
}

impl Configuration {
    /// What `change` makes of it.
    ///
    /// # Panics
    /// It cannot be read or written.
    #[track_caller]
    pub fn with(change: impl FnOnce(&str) -> String) -> Self {
        let original = fs::read_to_string(CONFIG).expect("a configuration");
        fs::write(CONFIG, change(&original)).expect("it is writable");
        Self { original }
    }

    /// Sets one key of a table.
    ///
    /// # Panics
    /// As [`Configuration::with`].
    #[track_caller]
    pub fn set(table: &str, key: &str, value: &str) -> Self {
        Self::with(|text| {
            let kept: Vec<_> = text.lines().filter(|line| !line.starts_with(&format!("{key} ="))).collect();
            kept.join("\n").replacen(&format!("[{table}]"), &format!("[{table}]\n{key} = {value}"), 1)
        })
    }
}

impl Drop for Configuration {
    fn drop(&mut self) {
        fs::write(CONFIG, &self.original).expect("it is writable");
    }
}
