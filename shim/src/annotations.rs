//! What a pod may ask for with annotations, where the operator allows it.

use std::collections::BTreeMap;
use std::str::FromStr;

use mayu_vmm_api::{MAX_MEMORY_MIB, MAX_VCPUS, MIN_MEMORY_MIB};

use crate::config::{Annotations as Allowed, Config};
use crate::rates::{MAX_BURST_MS, Rate};
use crate::{Error, Result};

/// What every annotation of mayu begins with. Others are not looked at.
pub const PREFIX: &str = "io.mayu.";

/// vCPUs of the pod's VM, instead of `vm.vcpus`.
pub const VCPUS: &str = "io.mayu.vcpus";

/// MiB of memory on top of the pod's limits, instead of `vm.memory_mib`.
pub const MEMORY_MIB: &str = "io.mayu.memory-mib";

/// Bytes a second in each direction of a network interface, instead of `limits.net_bandwidth`.
pub const NET_BANDWIDTH: &str = "io.mayu.net-bandwidth";

/// Packets a second in each direction of a network interface, instead of `limits.net_packets`.
pub const NET_PACKETS: &str = "io.mayu.net-packets";

/// Bytes a second of a disk, instead of `limits.block_bandwidth`.
pub const BLOCK_BANDWIDTH: &str = "io.mayu.block-bandwidth";

/// Requests a second of a disk, instead of `limits.block_operations`.
pub const BLOCK_OPERATIONS: &str = "io.mayu.block-operations";

/// Milliseconds' worth of these rates that may go at once, instead of `limits.burst_ms`.
pub const BURST_MS: &str = "io.mayu.burst-ms";

/// Whether the pod may go on from a template, instead of `template.enabled`.
pub const TEMPLATE: &str = "io.mayu.template";

/// `warm` where pods like this one are to go on from where one of them was saved: see [`crate::snapshot`].
pub const SNAPSHOT: &str = "io.mayu.snapshot";

/// When the pod may be saved.
pub const SNAPSHOT_READY: &str = "io.mayu.snapshot-ready";

/// What runs in the container of a pod that goes on from a snapshot.
pub const SNAPSHOT_HOOK: &str = "io.mayu.snapshot-hook";

/// Variables of the environment that may be others in such a pod.
pub const SNAPSHOT_ENV: &str = "io.mayu.snapshot-env";

/// All that there are.
pub const ALL: [&str; 12] = [
    VCPUS,
    MEMORY_MIB,
    NET_BANDWIDTH,
    NET_PACKETS,
    BLOCK_BANDWIDTH,
    BLOCK_OPERATIONS,
    BURST_MS,
    TEMPLATE,
    SNAPSHOT,
    SNAPSHOT_READY,
    SNAPSHOT_HOOK,
    SNAPSHOT_ENV,
];

/// The longest name or value that is repeated in an error, in characters.
const MAX_SHOWN: usize = 64;

/// Annotations of mayu.
pub type Annotations = BTreeMap<String, String>;

/// Those of mayu among a pod's annotations.
pub fn ours<'a>(all: impl IntoIterator<Item = (&'a String, &'a String)>) -> Annotations {
    let ours = all.into_iter().filter(|(name, _)| name.starts_with(PREFIX));
    ours.map(|(name, value)| (name.clone(), value.clone())).collect()
}

/// Changes the configuration for a pod with these annotations. Those of its snapshot are [`crate::snapshot::Wish::read`]'s to look at.
///
/// # Errors
/// [`Error::Annotation`] for one that is unknown, not allowed, or out of range.
pub fn apply(config: &mut Config, annotations: &Annotations) -> Result<()> {
    let Config { vm, limits, template, annotations: Allowed { allowed }, .. } = config;
    for (name, value) in annotations {
        let refused = |reason: String| Error::Annotation { name: shown(name), reason };
        if !ALL.contains(&name.as_str()) {
            return Err(refused(format!("there is no such annotation; there are {}", ALL.join(", "))));
        }
        if !allowed.contains(name) {
            return Err(refused(
                "not allowed: the configuration file's annotations.allowed does not have it".into(),
            ));
        }
        match name.as_str() {
            VCPUS => vm.vcpus = number(value, 1..=MAX_VCPUS).map_err(refused)?,
            NET_BANDWIDTH => limits.net_bandwidth = rate(value).map_err(refused)?,
            NET_PACKETS => limits.net_packets = rate(value).map_err(refused)?,
            BLOCK_BANDWIDTH => limits.block_bandwidth = rate(value).map_err(refused)?,
            BLOCK_OPERATIONS => limits.block_operations = rate(value).map_err(refused)?,
            TEMPLATE => {
                let wrong = |_| refused(format!("{:?} is not true or false", shown(value)));
                template.enabled = value.parse().map_err(wrong)?;
            }
            SNAPSHOT | SNAPSHOT_READY | SNAPSHOT_HOOK | SNAPSHOT_ENV => {}
            BURST_MS => limits.burst_ms = number(value, 1..=MAX_BURST_MS).map_err(refused)?,
            _ => vm.memory_mib = number(value, MIN_MEMORY_MIB..=MAX_MEMORY_MIB).map_err(refused)?,
        }
    }
    Ok(())
}

fn rate(value: &str) -> std::result::Result<Rate, String> {
    value.parse().map_err(|reason| format!("{:?} {reason}", shown(value)))
}

fn number<T: FromStr + PartialOrd + std::fmt::Display>(
    value: &str,
    range: std::ops::RangeInclusive<T>,
) -> std::result::Result<T, String> {
    let wrong =
        || format!("{:?} is not a number between {} and {}", shown(value), range.start(), range.end());
    value.parse().ok().filter(|number| range.contains(number)).ok_or_else(wrong)
}

/// As much of it as is repeated in an error.
pub(crate) fn shown(text: &str) -> String {
    let mut shown: String = text.chars().take(MAX_SHOWN).collect();
    if shown.len() < text.len() {
        shown.push('…');
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Vm;
    use crate::rates::Rates;

    fn config(allowed: &[&str]) -> Config {
        let mut config = Config::default();
        config.annotations.allowed = allowed.iter().map(ToString::to_string).collect();
        config
    }

    fn with(name: &str, value: &str) -> Annotations {
        ours([(&name.to_string(), &value.to_string()), (&"other".to_string(), &"x".to_string())])
    }

    /// What the configuration comes to where all annotations are allowed.
    fn applied(name: &str, value: &str) -> Config {
        let mut config = config(&ALL);
        apply(&mut config, &with(name, value)).unwrap();
        config
    }

    #[test]
    fn what_is_allowed_changes_the_vm() {
        let vm = applied(VCPUS, "3").vm;
        assert_eq!((vm.vcpus, vm.memory_mib), (3, Vm::default().memory_mib));
        assert_eq!(applied(MEMORY_MIB, "1024").vm.memory_mib, 1024);
        assert!(applied(TEMPLATE, "true").template.enabled && !applied(TEMPLATE, "false").template.enabled);
        let mut unchanged = config(&[]);
        apply(&mut unchanged, &ours([])).unwrap();
        assert_eq!(unchanged, config(&[]));
    }

    #[test]
    fn each_limit_changes_by_its_annotation_and_by_no_other() {
        let (ten, default) = (rate("10M").unwrap(), Rates::default());
        for (name, expected) in [
            (NET_BANDWIDTH, Rates { net_bandwidth: ten, ..default }),
            (NET_PACKETS, Rates { net_packets: ten, ..default }),
            (BLOCK_BANDWIDTH, Rates { block_bandwidth: ten, ..default }),
            (BLOCK_OPERATIONS, Rates { block_operations: ten, ..default }),
        ] {
            assert_eq!(applied(name, "10M").limits, expected, "{name}");
            assert_eq!(applied(name, "unlimited").limits, default, "{name}");
        }
        assert_eq!(applied(BURST_MS, "50").limits, Rates { burst_ms: 50, ..default });
    }

    #[test]
    fn everything_else_is_refused_and_named() {
        let long = "9".repeat(100_000);
        let table = [
            (&[VCPUS][..], MEMORY_MIB, "128", "not allowed"),
            (&[VCPUS], "io.mayu.kernel", "/tmp/vmlinux", "no such annotation"),
            (&[VCPUS], VCPUS, "0", "between 1 and 32"),
            (&[VCPUS], VCPUS, "many", "\"many\""),
            (&[VCPUS], VCPUS, &long, "…"),
            (&[NET_BANDWIDTH], NET_PACKETS, "10", "not allowed"),
            (&[NET_BANDWIDTH], NET_BANDWIDTH, "0", "\"0\" is not a whole number between 1 and 1000G"),
            (&[NET_PACKETS], NET_PACKETS, "-1", "\"-1\""),
            (&[BLOCK_BANDWIDTH], BLOCK_BANDWIDTH, "fast", "\"fast\""),
            (&[BLOCK_OPERATIONS], BLOCK_OPERATIONS, &long, "…"),
            (&[BURST_MS], BURST_MS, "0", "between 1 and 60000"),
            (&[BURST_MS], BURST_MS, "1s", "\"1s\""),
            (&[TEMPLATE], TEMPLATE, "no", "\"no\" is not true or false"),
        ];
        for (allowed, name, value, words) in table {
            let message = apply(&mut config(allowed), &with(name, value)).unwrap_err().to_string();
            assert!(message.contains(name) && message.contains(words), "{message}");
            assert!(message.len() < 500, "{message}");
        }
    }
}
