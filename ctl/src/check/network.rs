//! What the network of a pod needs of the host's kernel.

use std::fs;
use std::path::{Path, PathBuf};

use nix::sys::utsname::uname;

use super::Fact;

const NAME: &str = "network";

/// The parts of the kernel, each with the option that it comes with: the TAP device, and what redirects frames to it.
const PARTS: [(&str, &str); 4] = [
    ("tun", "CONFIG_TUN"),
    ("sch_ingress", "CONFIG_NET_SCH_INGRESS"),
    ("cls_u32", "CONFIG_NET_CLS_U32"),
    ("act_mirred", "CONFIG_NET_ACT_MIRRED"),
];

/// Whether a pod's interfaces can be connected to its VM.
pub fn fact() -> Fact {
    let release = uname().map(|system| system.release().to_string_lossy().into_owned()).unwrap_or_default();
    fact_of(Path::new("/sys/module"), &Path::new("/lib/modules").join(release))
}

fn fact_of(loaded: &Path, modules: &Path) -> Fact {
    let lists = ["modules.builtin", "modules.dep"].map(|list| modules.join(list));
    let available = list_of(&lists);
    let missing: Vec<_> = PARTS
        .into_iter()
        .filter(|(name, _)| !loaded.join(name).exists() && !available.iter().any(|module| module == name))
        .collect();
    if missing.is_empty() {
        return Fact::good(NAME, "the kernel has TAP devices and can redirect frames to them");
    }
    let names: Vec<_> = missing.iter().map(|(name, _)| *name).collect();
    let options: Vec<_> = missing.iter().map(|(_, option)| *option).collect();
    Fact::bad(
        NAME,
        format!("the kernel has no {}", names.join(", ")),
        format!("install its modules, or use a kernel with {}", options.join(", ")),
    )
}

/// The names of modules in lists of their paths, such as `kernel/drivers/net/tun.ko.xz: …`.
fn list_of(lists: &[PathBuf]) -> Vec<String> {
    let text = lists.iter().filter_map(|list| fs::read_to_string(list).ok()).collect::<String>();
    let name = |line: &str| {
        let path = line.split(':').next()?;
        let file = path.rsplit('/').next()?;
        Some(file.split(".ko").next()?.replace('-', "_"))
    };
    text.lines().filter_map(name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_may_be_built_in_loadable_or_loaded_and_what_is_missing_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let (loaded, modules) = (folder.path().join("loaded"), folder.path().join("modules"));
        fs::create_dir_all(loaded.join("tun")).unwrap();
        fs::create_dir(&modules).unwrap();
        fs::write(modules.join("modules.builtin"), "kernel/net/sched/sch_ingress.ko\n").unwrap();
        let act = "kernel/net/sched/act_mirred.ko.xz: kernel/x.ko.xz\n";
        fs::write(modules.join("modules.dep"), format!("{act}kernel/net/sched/cls_u32.ko.zst:\n")).unwrap();
        assert!(fact_of(&loaded, &modules).ok);

        fs::write(modules.join("modules.dep"), act).unwrap();
        let fact = fact_of(&loaded, &modules);
        assert!(!fact.ok && fact.found.ends_with("no cls_u32"), "{}", fact.found);
        assert!(fact.remedy.unwrap().contains("CONFIG_NET_CLS_U32"));
    }
}
