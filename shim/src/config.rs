//! `/etc/mayu/config.toml`.

use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{env, fs, io};

use mayu_vmm_api::{MAX_MEMORY_MIB, MAX_VCPUS, MIN_MEMORY_MIB};
use serde::Deserialize;

use crate::annotations::ALL;
use crate::rates::{MAX_BURST_MS, Rates};
use crate::{Error, Result};

/// The configuration file, unless [`PATH_VARIABLE`] names another.
pub const DEFAULT_PATH: &str = "/etc/mayu/config.toml";

/// The environment variable that names another configuration file.
pub const PATH_VARIABLE: &str = "MAYU_CONFIG";

/// What the operator can decide. `config/config.toml` in the repository describes every key.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The policy that decides what a pod may be; all may be where there is none.
    pub policy: Option<PathBuf>,
    /// The machine that every pod gets.
    pub vm: Vm,
    /// What pods start from.
    pub template: Templates,
    /// What pods like one of them go on from.
    pub snapshot: Snapshots,
    /// What a pod's devices may carry.
    pub limits: Rates,
    /// What a pod may ask for.
    pub annotations: Annotations,
    /// What becomes of a pod that asks for what a guest has not.
    pub security: Security,
    /// How long things may take.
    pub timeouts: Timeouts,
}

/// What a pod may ask for with annotations.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Annotations {
    /// Their names; others of mayu's are refused.
    pub allowed: Vec<String>,
}

/// What becomes of a pod that asks for what a guest has not.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Security {
    /// Profiles of AppArmor and labels of SELinux, of which the guest has neither.
    pub host_profiles: HostProfiles,
}

/// What is done about a profile that cannot be applied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HostProfiles {
    /// The container runs without it, and a line in the log says so.
    #[default]
    Ignore,
    /// The container does not run.
    Refuse,
}

/// The machine that every pod gets.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Vm {
    /// The `mayu-vmm` program.
    pub vmm: PathBuf,
    /// The guest kernel, an uncompressed ELF file.
    pub kernel: PathBuf,
    /// The guest image, which holds the agent.
    pub image: PathBuf,
    /// Words added to the end of the kernel command line.
    pub kernel_args: String,
    /// vCPUs of a pod without a limit, and the least of one with.
    pub vcpus: u8,
    /// Guest memory in MiB, on top of the pod's limits.
    pub memory_mib: u32,
    /// How many vCPUs a VM may grow to while it runs.
    pub max_vcpus: u8,
    /// How much memory a VM may grow to while it runs, in MiB.
    pub max_memory_mib: u32,
    /// The uids that VMMs run as, each pod's as one of its own.
    pub uids: Uids,
}

impl Default for Vm {
    fn default() -> Self {
        Self {
            vmm: "/usr/libexec/mayu/mayu-vmm".into(),
            kernel: "/usr/share/mayu/vmlinux".into(),
            image: "/usr/share/mayu/guest.erofs".into(),
            kernel_args: String::new(),
            vcpus: 1,
            memory_mib: 256,
            max_vcpus: 4,
            max_memory_mib: 4096,
            uids: Uids::default(),
        }
    }
}

/// What pods start from.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Templates {
    /// Whether pods go on from a machine that was saved, rather than boot one of their own.
    pub enabled: bool,
    /// Whether a pod that finds no template has one made for those that come after it.
    pub on_demand: bool,
    /// Where they are.
    pub directory: PathBuf,
}

impl Default for Templates {
    fn default() -> Self {
        Self { enabled: true, on_demand: true, directory: "/var/lib/mayu/templates".into() }
    }
}

/// What becomes of pods that ask for a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Snapshots {
    /// Where they are.
    pub store: PathBuf,
    /// How much they may take together, in MiB; the one that was not used for the longest time gives way.
    pub max_mib: u64,
    /// For how long one is used, in seconds.
    pub max_age: u64,
    /// How long a container may take to become ready before it is not saved any more, in seconds.
    pub ready_within: u64,
    /// Whether a pod may go on from one of another namespace of Kubernetes.
    pub across_namespaces: bool,
    /// Whether a pod may go on from one of another service account.
    pub across_service_accounts: bool,
}

impl Default for Snapshots {
    fn default() -> Self {
        Self {
            store: "/var/lib/mayu/snapshots".into(),
            max_mib: 16_384,
            max_age: 86_400,
            ready_within: 600,
            across_namespaces: false,
            across_service_accounts: false,
        }
    }
}

/// A range of uids, which are gids as well. The default is one that nobody else gives out: what systemd leaves unused
/// (`docs/UIDS-GIDS.md` there) above its containers' (up to 1879048191), and in it above the users that SSSD and FreeIPA
/// make of a directory's (up to 2000200000), below systemd's images of others (0x7ffe0000) and below 2³¹, which not every program can
/// count to. The subordinate ids of users and of a kubelet's pods are far below.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Uids {
    /// The first one.
    pub first: u32,
    /// How many there are, and how many pods at once.
    pub count: u32,
}

impl Default for Uids {
    fn default() -> Self {
        Self { first: 0x7f00_0000, count: 4096 }
    }
}

impl Uids {
    /// All of them, in order.
    pub fn range(self) -> std::ops::Range<u32> {
        self.first..self.first.saturating_add(self.count)
    }
}

/// How long things may take, in seconds.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Timeouts {
    /// From the start of the VMM until the agent has reported in.
    pub boot: u64,
    /// One request to the VMM or the agent, and one decision of the policy.
    pub request: u64,
    /// How often the guest is asked for a sign of life; one that gives none within `request` is ended. 0 is never.
    pub health: u64,
    /// How long an exit waits for the process's output to be read.
    pub stdio_drain: u64,
    /// How long the guest has for writing everything back.
    pub shutdown: u64,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self { boot: 20, request: 30, health: 60, stdio_drain: 2, shutdown: 2 }
    }
}

impl Timeouts {
    /// [`Timeouts::boot`].
    pub fn boot(&self) -> Duration {
        Duration::from_secs(self.boot)
    }

    /// [`Timeouts::request`].
    pub fn request(&self) -> Duration {
        Duration::from_secs(self.request)
    }

    /// [`Timeouts::health`], where it is not never.
    pub fn health(&self) -> Option<Duration> {
        (self.health > 0).then(|| Duration::from_secs(self.health))
    }

    /// [`Timeouts::stdio_drain`].
    pub fn stdio_drain(&self) -> Duration {
        Duration::from_secs(self.stdio_drain)
    }

    /// [`Timeouts::shutdown`].
    pub fn shutdown(&self) -> Duration {
        Duration::from_secs(self.shutdown)
    }
}

impl Config {
    /// The path that [`Config::load`] reads.
    pub fn path() -> PathBuf {
        env::var_os(PATH_VARIABLE).map_or_else(|| DEFAULT_PATH.into(), PathBuf::from)
    }

    /// Reads the configuration file at [`Config::path`].
    ///
    /// # Errors
    /// As [`Config::load_from`].
    pub fn load() -> Result<Self> {
        Self::load_from(&Self::path())
    }

    /// Reads a configuration file. A missing one means the defaults if it is [`DEFAULT_PATH`].
    ///
    /// # Errors
    /// [`Error::Config`] with the key and, where there is one, the line.
    pub fn load_from(path: &Path) -> Result<Self> {
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound && path == Path::new(DEFAULT_PATH) => {
                String::new()
            }
            Err(error) => {
                return Err(Error::Config { path: path.into(), line: None, reason: error.to_string() });
            }
        };
        Self::parse(&text, path)
    }

    /// Parses the text of the file at `path`, which only messages name.
    ///
    /// # Errors
    /// As [`Config::load_from`].
    pub fn parse(text: &str, path: &Path) -> Result<Self> {
        let config: Self = toml::from_str(text).map_err(|error| Error::Config {
            path: path.into(),
            line: error.span().map(|span| line_of(text, span.start)),
            reason: error.message().into(),
        })?;
        config.check().map_err(|(key, reason)| Error::Config {
            path: path.into(),
            line: line_of_key(text, key),
            reason: format!("{key}: {reason}"),
        })?;
        Ok(config)
    }

    /// Checks what can be checked without looking at the host; gives the offending key and the reason.
    fn check(&self) -> std::result::Result<(), (&'static str, String)> {
        if let Some(path) = self.policy.as_ref().filter(|path| !path.is_absolute()) {
            return Err(("policy", format!("{} is not an absolute path", path.display())));
        }
        let Vm { vcpus, memory_mib, max_vcpus, max_memory_mib, uids, .. } = self.vm;
        if !(1..=MAX_VCPUS).contains(&vcpus) {
            return Err(("vcpus", format!("{vcpus} is not between 1 and {MAX_VCPUS}")));
        }
        if !(MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&memory_mib) {
            let reason = format!("{memory_mib} is not between {MIN_MEMORY_MIB} and {MAX_MEMORY_MIB}");
            return Err(("memory_mib", reason));
        }
        // Less than a VM starts with means that it does not grow.
        if !(1..=MAX_VCPUS).contains(&max_vcpus) {
            return Err(("max_vcpus", format!("{max_vcpus} is not between 1 and {MAX_VCPUS}")));
        }
        if !(MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&max_memory_mib) {
            let reason = format!("{max_memory_mib} is not between {MIN_MEMORY_MIB} and {MAX_MEMORY_MIB}");
            return Err(("max_memory_mib", reason));
        }
        if uids.first == 0 {
            return Err(("uids", "the VMM must not run as root".into()));
        }
        // The last uid of all stands for none: setresuid(2).
        if uids.count == 0 || uids.first.checked_add(uids.count).is_none() {
            return Err(("uids", format!("{} uids from {} on cannot be", uids.count, uids.first)));
        }
        let burst = self.limits.burst_ms;
        if !(1..=MAX_BURST_MS).contains(&burst) {
            return Err(("burst_ms", format!("{burst} is not between 1 and {MAX_BURST_MS}")));
        }
        let Vm { vmm, kernel, image, .. } = &self.vm;
        let directory = &self.template.directory;
        let store = &self.snapshot.store;
        for (key, path) in
            [("vmm", vmm), ("kernel", kernel), ("image", image), ("directory", directory), ("store", store)]
        {
            if !path.is_absolute() {
                return Err((key, format!("{} is not an absolute path", path.display())));
            }
        }
        if let Some(unknown) = self.annotations.allowed.iter().find(|name| !ALL.contains(&name.as_str())) {
            return Err((
                "allowed",
                format!("there is no annotation {unknown:?}; there are {}", ALL.join(", ")),
            ));
        }
        let Timeouts { boot, request, shutdown, .. } = self.timeouts;
        for (key, seconds) in [("boot", boot), ("request", request), ("shutdown", shutdown)] {
            if seconds == 0 {
                return Err((key, "0 s is no time".into()));
            }
        }
        Ok(())
    }
}

fn line_of(text: &str, offset: usize) -> usize {
    text.bytes().take(offset).filter(|byte| *byte == b'\n').count() + 1
}

/// Keys are unique across the sections, so the name is enough.
fn line_of_key(text: &str, key: &str) -> Option<usize> {
    let is_key = |line: &str| {
        line.trim_start().strip_prefix(key).is_some_and(|rest| rest.trim_start().starts_with('='))
    };
    text.lines().position(is_key).map(|index| index + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config> {
        Config::parse(text, Path::new("/etc/mayu/config.toml"))
    }

    #[test]
    fn an_empty_file_means_the_defaults() {
        assert_eq!(parse("").unwrap(), Config::default());
    }

    #[test]
    fn the_commented_example_is_exactly_the_defaults() {
        let example = include_str!("../../config/config.toml");
        assert_eq!(parse(example).unwrap(), Config::default());
    }

    #[test]
    fn only_the_default_file_may_be_missing() {
        assert!(Config::load_from(Path::new("/nonexistent.toml")).is_err());
    }

    #[test]
    fn every_mistake_names_its_key_and_line() {
        let table = [
            ("[vm]\nvcpus = 2\nmemroy_mib = 64\n", ": line 3: ", "memroy_mib"),
            ("[vm]\nvcpus = \"two\"\n", ": line 2: ", "string"),
            ("[vms]\n", ": line 1: ", "vms"),
            ("[vm]\n\nmemory_mib = 63\n", ": line 3: ", "memory_mib: 63"),
            ("[vm]\nmemory_mib = 65537\n", ": line 2: ", "memory_mib: 65537"),
            ("[vm]\nvcpus = 33\n", ": line 2: ", "vcpus: 33"),
            ("[vm]\nvcpus = 5\nmax_vcpus = 33\n", ": line 3: ", "max_vcpus: 33"),
            ("[vm]\nmax_memory_mib = 63\n", ": line 2: ", "max_memory_mib: 63"),
            ("[vm]\nuids = { first = 0 }\n", ": line 2: ", "root"),
            ("[vm]\nuids = { count = 0 }\n", ": line 2: ", "0 uids"),
            ("[vm]\nuids = { first = 4294967295, count = 1 }\n", ": line 2: ", "4294967295"),
            ("[vm]\nuids = { last = 7 }\n", ": line 2: ", "last"),
            ("\npolicy = \"policy.rego\"\n", ": line 2: ", "policy: policy.rego"),
            ("policy = \"\"\n", ": line 1: ", "policy"),
            ("[vm]\nkernel = \"vmlinux\"\n", ": line 2: ", "kernel: vmlinux"),
            ("[template]\ndirectory = \"templates\"\n", ": line 2: ", "directory: templates"),
            ("[snapshot]\nstore = \"snapshots\"\n", ": line 2: ", "store: snapshots"),
            ("[limits]\nnet_bandwidth = \"ten\"\n", ": line 2: ", "\"ten\" is not a whole number"),
            ("[limits]\n\nblock_operations = \"0\"\n", ": line 3: ", "\"0\""),
            ("[limits]\nnet_packets = 1000\n", ": line 2: ", "string"),
            ("[limits]\nburst_ms = 0\n", ": line 2: ", "burst_ms: 0"),
            ("[limits]\nburst_ms = 60001\n", ": line 2: ", "burst_ms: 60001"),
            ("[timeouts]\nboot = 0\n", ": line 2: ", "boot"),
            ("[timeouts]\nboot = -1\n", ": line 2: ", "-1"),
            ("[annotations]\nallowed = [\"io.mayu.root\"]\n", ": line 2: ", "io.mayu.root"),
            ("[vm\n", ": line 1: ", ""),
        ];
        for (text, line, key) in table {
            let message = parse(text).unwrap_err().to_string();
            assert!(message.starts_with(&format!("/etc/mayu/config.toml{line}")), "{text}: {message}");
            assert!(message.contains(key), "{text}: {message}");
        }
    }
}
