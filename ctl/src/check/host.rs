//! What a pod needs of the host beside KVM.

use std::path::Path;

use mayu_shim::config::Config;
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use super::Fact;

const CGROUPS: &str = "/sys/fs/cgroup";
const USER_NAMESPACES: &str = "/proc/sys/user/max_user_namespaces";

/// cgroup v2 and user namespaces.
pub fn facts() -> Vec<Fact> {
    vec![cgroups(), user_namespaces()]
}

fn cgroups() -> Fact {
    const NAME: &str = "cgroup-v2";
    match statfs(CGROUPS) {
        Ok(stat) if stat.filesystem_type() == CGROUP2_SUPER_MAGIC => {
            let controllers =
                std::fs::read_to_string(Path::new(CGROUPS).join("cgroup.controllers")).unwrap_or_default();
            Fact::good(NAME, format!("{CGROUPS} has {}", controllers.trim()))
        }
        Ok(_) => Fact::bad(
            NAME,
            format!("{CGROUPS} is not a cgroup v2 mount"),
            "boot with systemd.unified_cgroup_hierarchy=1, or mount cgroup2 there",
        ),
        Err(error) => Fact::bad(NAME, format!("{CGROUPS}: {error}"), "mount cgroup2 there"),
    }
}

fn user_namespaces() -> Fact {
    const NAME: &str = "user-namespaces";
    let limit =
        std::fs::read_to_string(USER_NAMESPACES).ok().and_then(|text| text.trim().parse::<u64>().ok());
    match limit {
        Some(0) => {
            Fact::bad(NAME, "user.max_user_namespaces is 0", "raise it with sysctl: each VMM runs in its own")
        }
        Some(limit) => Fact::good(NAME, format!("up to {limit}")),
        None => {
            Fact::bad(NAME, format!("{USER_NAMESPACES} cannot be read"), "use a kernel with CONFIG_USER_NS")
        }
    }
}

/// Whether the host has the memory of one pod of the configured size.
pub fn memory(config: &Config) -> Fact {
    const NAME: &str = "memory";
    let pod = u64::from(config.vm.memory_mib);
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    match available_mib(&text) {
        Some(available) if available >= pod => {
            Fact::good(NAME, format!("{available} MiB available, {pod} MiB for a pod"))
        }
        Some(available) => Fact::bad(
            NAME,
            format!("{available} MiB available, {pod} MiB for a pod"),
            "free memory, or lower vm.memory_mib in the configuration",
        ),
        None => Fact::bad(NAME, "/proc/meminfo has no MemAvailable", "mount /proc"),
    }
}

fn available_mib(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib / 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn available_memory_is_read_in_mib() {
        let text = "MemTotal:       24564920 kB\nMemFree: 5 kB\nMemAvailable:   20480000 kB\n";
        assert_eq!(available_mib(text), Some(20000));
        assert_eq!(available_mib("MemTotal: 1 kB\n"), None);
    }
}
