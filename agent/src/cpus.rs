//! The guest's CPUs: how many of those that the machine has are online. See the kernel's Documentation/admin-guide/cputopology.rst
//! and Documentation/core-api/cpu_hotplug.rst.

use std::fs;
use std::path::PathBuf;

use crate::error::{Error, Result};

/// Where the kernel has its CPUs.
const DIRECTORY: &str = "/sys/devices/system/cpu";
/// More CPUs than any machine has, in a list that is not believed.
const MAX_CPUS: u32 = 8192;

/// The CPUs of the machine.
pub struct Cpus {
    directory: PathBuf,
}

impl Cpus {
    /// Those of this machine.
    pub fn new() -> Self {
        Self { directory: DIRECTORY.into() }
    }

    /// Brings the first `online` of them online and takes the others offline. Containers follow: a cpuset without CPUs of its own
    /// has its parent's, and the root's are those online. Blocks for as long as the kernel takes.
    ///
    /// # Errors
    ///
    /// `InvalidRequest` where the machine has fewer, or for none; `File` with the CPU that the kernel refused to change,
    /// after which the call may be repeated.
    pub fn resize(&self, online: u32) -> Result<()> {
        let present = self.present()?;
        let wanted = usize::try_from(online).unwrap_or(usize::MAX);
        if wanted == 0 || wanted > present.len() {
            return Err(Error::InvalidRequest(format!(
                "cannot bring {online} CPUs online: the machine has {}",
                present.len()
            )));
        }
        let (on, off) = present.split_at(wanted);
        for cpu in on {
            self.set(*cpu, true)?;
        }
        for cpu in off.iter().rev() {
            self.set(*cpu, false)?;
        }
        Ok(())
    }

    /// The numbers of the CPUs that the machine has, in ascending order.
    fn present(&self) -> Result<Vec<u32>> {
        let path = self.directory.join("present");
        let text = fs::read_to_string(&path).map_err(Error::file("read", &path))?;
        parse_list(text.trim()).ok_or_else(|| {
            let reason = format!("{text:?} is no list of CPUs");
            Error::file("read", path)(std::io::Error::other(reason))
        })
    }

    fn set(&self, cpu: u32, online: bool) -> Result<()> {
        let path = self.directory.join(format!("cpu{cpu}/online"));
        let value = if online { "1" } else { "0" };
        match fs::read_to_string(&path) {
            Ok(present) if present.trim() == value => Ok(()),
            // The first one has no such file: it is always online.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && online => Ok(()),
            _ => fs::write(&path, value).map_err(Error::file("write", path)),
        }
    }
}

/// A list of numbers and ranges: "0-3,8".
fn parse_list(text: &str) -> Option<Vec<u32>> {
    let mut numbers = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let range = first.parse::<u32>().ok()?..=last.parse().ok()?;
        if *range.end() > MAX_CPUS {
            return None;
        }
        numbers.extend(range);
    }
    Some(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine of four CPUs of which `online` are.
    fn machine(online: u32) -> (tempfile::TempDir, Cpus) {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("present"), "0-3\n").unwrap();
        for cpu in 0..4 {
            let cpu_directory = directory.path().join(format!("cpu{cpu}"));
            fs::create_dir(&cpu_directory).unwrap();
            if cpu > 0 {
                let state = if cpu < online { "1\n" } else { "0\n" };
                fs::write(cpu_directory.join("online"), state).unwrap();
            }
        }
        let cpus = Cpus { directory: directory.path().into() };
        (directory, cpus)
    }

    /// What is in the files. The kernel's end in a newline, so that one without was written.
    fn states(cpus: &Cpus) -> [String; 3] {
        [1, 2, 3].map(|cpu| fs::read_to_string(cpus.directory.join(format!("cpu{cpu}/online"))).unwrap())
    }

    #[test]
    fn cpus_come_and_go_and_no_others_are_touched() {
        let (_directory, cpus) = machine(1);

        cpus.resize(3).unwrap();
        assert_eq!(states(&cpus), ["1", "1", "0\n"]);
        cpus.resize(3).unwrap();
        cpus.resize(4).unwrap();
        assert_eq!(states(&cpus), ["1", "1", "1"]);
        cpus.resize(1).unwrap();
        assert_eq!(states(&cpus), ["0", "0", "0"]);
        assert!(!cpus.directory.join("cpu0/online").exists());

        let (_directory, unchanged) = machine(2);
        unchanged.resize(2).unwrap();
        assert_eq!(states(&unchanged), ["1\n", "0\n", "0\n"]);
    }

    #[test]
    fn a_machine_has_so_many_and_no_more() {
        let (_directory, cpus) = machine(1);

        for number in [0, 5, u32::MAX] {
            let error = cpus.resize(number).unwrap_err();
            assert!(matches!(&error, Error::InvalidRequest(reason) if reason.contains("has 4")), "{error}");
        }
        assert_eq!(states(&cpus), ["0\n", "0\n", "0\n"]);
    }

    #[test]
    fn a_cpu_that_does_not_come_is_named() {
        let (directory, cpus) = machine(1);
        let broken = directory.path().join("cpu2/online");
        fs::remove_file(&broken).unwrap();
        fs::create_dir(&broken).unwrap();

        let error = cpus.resize(4).unwrap_err().to_string();

        assert!(error.contains("cpu2/online"), "{error}");
        fs::remove_dir(&broken).unwrap();
        fs::write(&broken, "0\n").unwrap();
        cpus.resize(4).unwrap();
        assert_eq!(states(&cpus), ["1", "1", "1"]);
    }

    #[test]
    fn lists_are_the_kernels() {
        assert_eq!(parse_list("0"), Some(vec![0]));
        assert_eq!(parse_list("0-2,5,7-8"), Some(vec![0, 1, 2, 5, 7, 8]));
        for text in ["", "a", "0-", "-1", "0,,1", "0-4294967295"] {
            assert_eq!(parse_list(text), None, "{text}");
        }
    }
}
