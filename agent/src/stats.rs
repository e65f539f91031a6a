//! A cgroup's figures as containerd's `io.containerd.cgroups.v2.Metrics`. The files are those of the kernel's
//! Documentation/admin-guide/cgroup-v2.rst; one that is missing (a kernel without the controller) counts as 0.

use std::fs;
use std::path::Path;

use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PSIData, PSIStats, PidsStat,
};
use protobuf::MessageField;

use crate::cgroup::keyed_value;

/// The type URL under which containerd knows the figures.
pub const TYPE_URL: &str = "io.containerd.cgroups.v2.Metrics";

/// The figures of the cgroup at `path`.
pub fn read(path: &Path) -> Metrics {
    let file = |name: &str| fs::read_to_string(path.join(name)).unwrap_or_default();
    Metrics {
        pids: MessageField::some(PidsStat {
            current: number(&file("pids.current")),
            // containerd takes 0 for no limit, here and for memory the largest number.
            limit: file("pids.max").trim().parse().unwrap_or(0),
            ..PidsStat::default()
        }),
        cpu: MessageField::some(cpu(&file("cpu.stat"), &file("cpu.pressure"))),
        memory: MessageField::some(memory(&file)),
        memory_events: MessageField::some(memory_events(&file("memory.events"))),
        io: MessageField::some(IOStat {
            usage: io(&file("io.stat")),
            psi: pressure(&file("io.pressure")),
            ..IOStat::default()
        }),
        hugetlb: hugetlb(path),
        ..Metrics::default()
    }
}

fn cpu(stat: &str, psi: &str) -> CPUStat {
    let value = |key| keyed_value(stat, key).unwrap_or(0);
    CPUStat {
        usage_usec: value("usage_usec"),
        user_usec: value("user_usec"),
        system_usec: value("system_usec"),
        nr_periods: value("nr_periods"),
        nr_throttled: value("nr_throttled"),
        throttled_usec: value("throttled_usec"),
        nr_bursts: value("nr_bursts"),
        burst_usec: value("burst_usec"),
        psi: pressure(psi),
        ..CPUStat::default()
    }
}

fn memory(file: &dyn Fn(&str) -> String) -> MemoryStat {
    let stat = file("memory.stat");
    let value = |key| keyed_value(&stat, key).unwrap_or(0);
    MemoryStat {
        anon: value("anon"),
        file: value("file"),
        kernel_stack: value("kernel_stack"),
        slab: value("slab"),
        sock: value("sock"),
        shmem: value("shmem"),
        file_mapped: value("file_mapped"),
        file_dirty: value("file_dirty"),
        file_writeback: value("file_writeback"),
        anon_thp: value("anon_thp"),
        inactive_anon: value("inactive_anon"),
        active_anon: value("active_anon"),
        inactive_file: value("inactive_file"),
        active_file: value("active_file"),
        unevictable: value("unevictable"),
        slab_reclaimable: value("slab_reclaimable"),
        slab_unreclaimable: value("slab_unreclaimable"),
        pgfault: value("pgfault"),
        pgmajfault: value("pgmajfault"),
        // Since Linux 5.9 there is one figure for anonymous and one for file pages.
        workingset_refault: value("workingset_refault_anon") + value("workingset_refault_file"),
        workingset_activate: value("workingset_activate_anon") + value("workingset_activate_file"),
        workingset_nodereclaim: value("workingset_nodereclaim"),
        pgrefill: value("pgrefill"),
        pgscan: value("pgscan"),
        pgsteal: value("pgsteal"),
        pgactivate: value("pgactivate"),
        pgdeactivate: value("pgdeactivate"),
        pglazyfree: value("pglazyfree"),
        pglazyfreed: value("pglazyfreed"),
        thp_fault_alloc: value("thp_fault_alloc"),
        thp_collapse_alloc: value("thp_collapse_alloc"),
        usage: number(&file("memory.current")),
        usage_limit: limit(&file("memory.max")),
        max_usage: number(&file("memory.peak")),
        swap_usage: number(&file("memory.swap.current")),
        swap_limit: limit(&file("memory.swap.max")),
        swap_max_usage: number(&file("memory.swap.peak")),
        psi: pressure(&file("memory.pressure")),
        ..MemoryStat::default()
    }
}

fn memory_events(text: &str) -> MemoryEvents {
    let value = |key| keyed_value(text, key).unwrap_or(0);
    MemoryEvents {
        low: value("low"),
        high: value("high"),
        max: value("max"),
        oom: value("oom"),
        oom_kill: value("oom_kill"),
        oom_group_kill: value("oom_group_kill"),
        ..MemoryEvents::default()
    }
}

/// `io.stat`: "major:minor rbytes=1 wbytes=2 …" for each device.
fn io(text: &str) -> Vec<IOEntry> {
    let entry = |line: &str| {
        let mut words = line.split_whitespace();
        let (major, minor) = words.next()?.split_once(':')?;
        let mut entry =
            IOEntry { major: major.parse().ok()?, minor: minor.parse().ok()?, ..IOEntry::default() };
        for (key, value) in words.filter_map(|word| word.split_once('=')) {
            let value = value.parse().unwrap_or(0);
            match key {
                "rbytes" => entry.rbytes = value,
                "wbytes" => entry.wbytes = value,
                "rios" => entry.rios = value,
                "wios" => entry.wios = value,
                _ => {}
            }
        }
        Some(entry)
    };
    text.lines().filter_map(entry).collect()
}

/// A pressure file: "some avg10=0.00 avg60=0.00 avg300=0.00 total=0" and the same for "full".
fn pressure(text: &str) -> MessageField<PSIStats> {
    let data = |kind: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(kind))?;
        let value =
            |key: &str| line.split_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
        let average = |key| value(key).and_then(|text| text.parse().ok()).unwrap_or(0.0);
        Some(PSIData {
            avg10: average("avg10"),
            avg60: average("avg60"),
            avg300: average("avg300"),
            total: value("total").and_then(|text| text.parse().ok()).unwrap_or(0),
            ..PSIData::default()
        })
    };
    if text.is_empty() {
        return MessageField::none();
    }
    MessageField::some(PSIStats {
        some: data("some").into(),
        full: data("full").into(),
        ..PSIStats::default()
    })
}

/// The `hugetlb.<page size>.*` files.
fn hugetlb(path: &Path) -> Vec<HugeTlbStat> {
    let Ok(entries) = fs::read_dir(path) else { return Vec::new() };
    let page_size = |name: &str| Some(name.strip_prefix("hugetlb.")?.strip_suffix(".current")?.to_owned());
    let sizes = entries
        .flatten()
        .filter_map(|entry| page_size(entry.file_name().to_str()?))
        // "rsvd" are reservations, which containerd does not ask for.
        .filter(|size| !size.ends_with(".rsvd"));
    sizes
        .map(|size| {
            let file = |name: &str| {
                fs::read_to_string(path.join(format!("hugetlb.{size}.{name}"))).unwrap_or_default()
            };
            HugeTlbStat {
                current: number(&file("current")),
                max: limit(&file("max")),
                failcnt: keyed_value(&file("events"), "max").unwrap_or(0),
                pagesize: size.clone(),
                ..HugeTlbStat::default()
            }
        })
        .collect()
}

fn number(text: &str) -> u64 {
    text.trim().parse().unwrap_or(0)
}

/// A limit, where "max" stands for none.
fn limit(text: &str) -> u64 {
    match text.trim() {
        "max" => u64::MAX,
        other => other.parse().unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A cgroup's files as a 6.12 kernel shows them, shortened.
    fn fixture() -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        let files = [
            ("pids.current", "3\n"),
            ("pids.max", "100\n"),
            (
                "cpu.stat",
                "usage_usec 900\nuser_usec 600\nsystem_usec 300\nnice_usec 0\nnr_periods 4\nnr_throttled 2\nthrottled_usec 50\nnr_bursts 1\nburst_usec 7\n",
            ),
            (
                "cpu.pressure",
                "some avg10=1.50 avg60=0.25 avg300=0.00 total=1234\nfull avg10=0.50 avg60=0.00 avg300=0.00 total=99\n",
            ),
            ("memory.current", "8192\n"),
            ("memory.peak", "16384\n"),
            ("memory.max", "67108864\n"),
            ("memory.swap.max", "max\n"),
            (
                "memory.stat",
                "anon 4096\nfile 2048\nfile_mapped 11\nworkingset_refault_anon 1\nworkingset_refault_file 2\npgfault 77\n",
            ),
            ("memory.events", "low 0\nhigh 1\nmax 2\noom 3\noom_kill 4\noom_group_kill 5\n"),
            ("io.stat", "8:0 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=0 dios=0\n254:16 rbytes=5\nnonsense\n"),
            ("hugetlb.2MB.current", "2097152\n"),
            ("hugetlb.2MB.max", "max\n"),
            ("hugetlb.2MB.events", "max 6\n"),
            ("hugetlb.2MB.rsvd.current", "0\n"),
        ];
        for (name, text) in files {
            fs::write(directory.path().join(name), text).unwrap();
        }
        directory
    }

    #[test]
    fn every_file_is_read() {
        let directory = fixture();

        let metrics = read(directory.path());

        assert_eq!((metrics.pids.current, metrics.pids.limit), (3, 100));
        let cpu = &metrics.cpu;
        assert_eq!((cpu.usage_usec, cpu.user_usec, cpu.system_usec), (900, 600, 300));
        assert_eq!((cpu.nr_periods, cpu.nr_throttled, cpu.throttled_usec), (4, 2, 50));
        assert_eq!((cpu.nr_bursts, cpu.burst_usec), (1, 7));
        let memory = &metrics.memory;
        assert_eq!((memory.usage, memory.max_usage, memory.usage_limit), (8192, 16384, 64 << 20));
        assert_eq!(memory.swap_limit, u64::MAX);
        assert_eq!((memory.anon, memory.file, memory.file_mapped, memory.pgfault), (4096, 2048, 11, 77));
        assert_eq!(memory.workingset_refault, 3);
        let events = &metrics.memory_events;
        assert_eq!((events.high, events.oom, events.oom_kill, events.oom_group_kill), (1, 3, 4, 5));
        let huge = &metrics.hugetlb[..];
        assert_eq!(huge.len(), 1);
        assert_eq!((huge[0].pagesize.as_str(), huge[0].current, huge[0].max), ("2MB", 2 << 20, u64::MAX));
        assert_eq!(huge[0].failcnt, 6);
    }

    #[test]
    fn io_is_told_by_device() {
        let entries = io("8:0 rbytes=10 wbytes=20 rios=1 wios=2\n254:16 rbytes=5\nnonsense\n");

        let fields: Vec<_> =
            entries.iter().map(|e| (e.major, e.minor, e.rbytes, e.wbytes, e.rios, e.wios)).collect();
        assert_eq!(fields, [(8, 0, 10, 20, 1, 2), (254, 16, 5, 0, 0, 0)]);
    }

    #[test]
    fn pressure_has_both_lines() {
        let directory = fixture();

        let psi = read(directory.path()).cpu.psi.clone().unwrap();

        assert_eq!((psi.some.avg10, psi.some.avg60, psi.some.total), (1.5, 0.25, 1234));
        assert_eq!((psi.full.avg10, psi.full.total), (0.5, 99));
    }

    #[test]
    fn what_is_missing_counts_as_nothing() {
        let metrics = read(Path::new("/no/such/cgroup"));

        assert_eq!((metrics.memory.usage, metrics.pids.limit, metrics.cpu.usage_usec), (0, 0, 0));
        assert!(metrics.io.usage.is_empty() && metrics.hugetlb.is_empty());
        assert!(metrics.cpu.psi.is_none());
    }
}
