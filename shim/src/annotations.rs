//! What a pod may ask for with annotations, where the operator allows it.

use std::collections::BTreeMap;
use std::str::FromStr;

use mayu_vmm_api::{MAX_MEMORY_MIB, MAX_VCPUS, MIN_MEMORY_MIB};

use crate::config::{Config, Vm};
use crate::{Error, Result};

/// What every annotation of mayu begins with. Others are not looked at.
pub const PREFIX: &str = "io.mayu.";

/// vCPUs of the pod's VM, instead of `vm.vcpus`.
pub const VCPUS: &str = "io.mayu.vcpus";

/// MiB of memory on top of the pod's limits, instead of `vm.memory_mib`.
pub const MEMORY_MIB: &str = "io.mayu.memory-mib";

/// All that there are.
pub const ALL: [&str; 2] = [VCPUS, MEMORY_MIB];

/// The longest name or value that is repeated in an error, in characters.
const MAX_SHOWN: usize = 64;

/// Annotations of mayu.
pub type Annotations = BTreeMap<String, String>;

/// Those of mayu among a pod's annotations.
pub fn ours<'a>(all: impl IntoIterator<Item = (&'a String, &'a String)>) -> Annotations {
    let ours = all.into_iter().filter(|(name, _)| name.starts_with(PREFIX));
    ours.map(|(name, value)| (name.clone(), value.clone())).collect()
}

/// The configured VM, as the annotations change it.
///
/// # Errors
/// [`Error::Annotation`] for one that is unknown, not allowed, or out of range.
pub fn apply(config: &Config, annotations: &Annotations) -> Result<Vm> {
    let mut vm = config.vm.clone();
    for (name, value) in annotations {
        let refused = |reason: String| Error::Annotation { name: shown(name), reason };
        if !ALL.contains(&name.as_str()) {
            return Err(refused(format!("there is no such annotation; there are {}", ALL.join(", "))));
        }
        if !config.annotations.allowed.contains(name) {
            return Err(refused(
                "not allowed: the configuration file's annotations.allowed does not have it".into(),
            ));
        }
        match name.as_str() {
            VCPUS => vm.vcpus = number(value, 1..=MAX_VCPUS).map_err(refused)?,
            _ => vm.memory_mib = number(value, MIN_MEMORY_MIB..=MAX_MEMORY_MIB).map_err(refused)?,
        }
    }
    Ok(vm)
}

fn number<T: FromStr + PartialOrd + std::fmt::Display>(
    value: &str,
    range: std::ops::RangeInclusive<T>,
) -> std::result::Result<T, String> {
    let wrong =
        || format!("{:?} is not a number between {} and {}", shown(value), range.start(), range.end());
    value.parse().ok().filter(|number| range.contains(number)).ok_or_else(wrong)
}

fn shown(text: &str) -> String {
    let mut shown: String = text.chars().take(MAX_SHOWN).collect();
    if shown.len() < text.len() {
        shown.push('…');
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(allowed: &[&str]) -> Config {
        let mut config = Config::default();
        config.annotations.allowed = allowed.iter().map(ToString::to_string).collect();
        config
    }

    fn with(name: &str, value: &str) -> Annotations {
        ours([(&name.to_string(), &value.to_string()), (&"other".to_string(), &"x".to_string())])
    }

    #[test]
    fn what_is_allowed_changes_the_vm() {
        let vm = apply(&config(&[VCPUS, MEMORY_MIB]), &with(VCPUS, "3")).unwrap();
        assert_eq!((vm.vcpus, vm.memory_mib), (3, Vm::default().memory_mib));
        assert_eq!(apply(&config(&[MEMORY_MIB]), &with(MEMORY_MIB, "1024")).unwrap().memory_mib, 1024);
        assert_eq!(apply(&config(&[]), &ours([])).unwrap(), Vm::default());
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
        ];
        for (allowed, name, value, words) in table {
            let message = apply(&config(allowed), &with(name, value)).unwrap_err().to_string();
            assert!(message.contains(name) && message.contains(words), "{message}");
            assert!(message.len() < 300, "{message}");
        }
    }
}
