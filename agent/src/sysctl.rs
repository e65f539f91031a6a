//! Kernel parameters of the guest, by their names below `/proc/sys`.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Sets a kernel parameter.
///
/// # Errors
///
/// `InvalidSpec` for what is no name, `File` with what the kernel refused.
pub fn set(name: &str, value: &str) -> Result<()> {
    let path = path(name)?;
    fs::write(&path, value).map_err(Error::file("set the kernel parameter", path))
}

/// The first separator tells whether dots or slashes part the name; the other is then part of an interface's name, as
/// sysctl(8) has it.
fn path(name: &str) -> Result<PathBuf> {
    let swap = |character| match character {
        '.' => '/',
        '/' => '.',
        other => other,
    };
    let slashes = name.find(['.', '/']).is_some_and(|first| name[first..].starts_with('/'));
    let relative: String = if slashes { name.into() } else { name.chars().map(swap).collect() };
    if relative.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return Err(Error::InvalidSpec(format!("{name:?} is no name of a kernel parameter")));
    }
    Ok(Path::new("/proc/sys").join(relative))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_parameters_are_files_below_proc_sys() {
        for (name, expected) in [
            ("net.ipv4.ip_unprivileged_port_start", "net/ipv4/ip_unprivileged_port_start"),
            ("net/ipv4/conf/eth0.7/forwarding", "net/ipv4/conf/eth0.7/forwarding"),
            ("net.ipv4.conf.eth0/7.forwarding", "net/ipv4/conf/eth0.7/forwarding"),
            ("kernel", "kernel"),
        ] {
            assert_eq!(path(name).unwrap(), Path::new("/proc/sys").join(expected), "{name}");
        }
        let none = [
            "",
            "/etc/passwd",
            "net/../../etc/passwd",
            "..",
            ".kernel.sem",
            "net..core",
            "net.",
            "net/./core",
        ];
        for name in none {
            assert!(matches!(path(name), Err(Error::InvalidSpec(_))), "{name}");
        }
    }
}
