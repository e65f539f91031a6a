//! The container is in a virtual machine, and not on the host.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

use elf::ElfBytes;
use elf::abi::{DF_BIND_NOW, DT_FLAGS, ET_DYN, PF_W, PF_X, PT_GNU_RELRO};
use elf::endian::LittleEndian;
use elf::segment::ProgramHeader;
use mayu_e2e::configuration::Configuration;
use mayu_e2e::host::{kill_9, process_status, processes, processes_named, shim_of};
use mayu_e2e::shim::eventually;
use mayu_e2e::template;
use mayu_e2e::{Container, run};

#[test]
fn kernel_processor_memory_and_processes_are_the_guest_s() {
    let container = Container::idle(&[]);

    let host_kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert_ne!(container.script("cat /proc/sys/kernel/osrelease"), host_kernel.trim());
    assert!(container.script("grep flags /proc/cpuinfo").contains(" hypervisor"));
    let kib = |text: &str| -> u64 { text.split_whitespace().nth(1).unwrap().parse().unwrap() };
    let guest_memory = kib(&container.script("grep MemTotal /proc/meminfo"));
    let host_memory = fs::read_to_string("/proc/meminfo").unwrap();
    let host_memory = kib(host_memory.lines().next().unwrap());
    assert!(guest_memory < host_memory / 2, "{guest_memory} KiB in the guest, {host_memory} KiB on the host");
    let listed = container.script("ps -o pid,comm");
    assert_eq!(listed.lines().count(), 3, "a header, the init and ps:\n{listed}");
}

#[test]
fn the_host_has_no_process_of_the_container() {
    let container = Container::unborn();
    let command = ["sleep", "98765"];
    run(&mut container.run_command(&["--detach"], mayu_e2e::BUSYBOX, &command)).success();
    assert!(container.script("ps").contains("sleep 98765"));
    let seen: Vec<_> = processes().into_iter().filter(|process| process.command == "sleep 98765").collect();
    assert_eq!(seen, []);
}

#[test]
fn the_vmm_is_unprivileged_and_in_namespaces_of_its_own() {
    let container = Container::idle(&[]);
    let vmm = container.pid();
    let name = fs::read_to_string(format!("/proc/{vmm}/comm")).unwrap();
    assert!(
        name.starts_with("mayu-vmm") || name.contains(container.id()),
        "the task's pid is the VMM's, not {name}'s"
    );

    assert_ne!(uid(vmm), 0);
    // The bounding set matters only to an exec that gains privileges, which no_new_privs rules out.
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(u64::from_str_radix(&process_status(vmm, set), 16).unwrap(), 0, "{set}");
    }
    assert_eq!(process_status(vmm, "NoNewPrivs"), "1");
    for namespace in ["mnt", "net", "ipc", "uts", "pid", "user"] {
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
        assert_ne!(of(&vmm.to_string()), of("self"), "{namespace}");
    }
}

fn uid(vmm: u32) -> u32 {
    let uids = process_status(vmm, "Uid");
    let uids: Vec<_> = uids.split_whitespace().collect();
    assert!(uids.iter().all(|uid| *uid == uids[0]), "real, effective, saved and of files: {uids:?}");
    uids[0].parse().unwrap()
}

/// A pod that is refused; what `ctr` says.
fn refusal() -> String {
    let outcome = Container::sh(&[], "true");
    assert_ne!(outcome.code, 0);
    outcome.stderr
}

#[test]
fn each_vmm_has_a_uid_that_the_others_cannot_reach_and_that_is_free_with_its_pod() {
    let _two = Configuration::set("vm", "uids", "{ first = 2130706000, count = 2 }");
    let (one, other) = (Container::idle(&[]), Container::idle(&[]));
    let (first, second) = (uid(one.pid()), uid(other.pid()));
    assert_eq!(BTreeSet::from([first, second]), BTreeSet::from([2_130_706_000, 2_130_706_001]));
    let signal = |uid| {
        let mut kill = Command::new("sh");
        run(kill.args(["-c", &format!("kill -0 {}", other.pid())]).uid(uid).gid(uid)).code
    };
    assert_ne!(signal(first), 0, "one pod's VMM may signal another's");
    assert_eq!(signal(second), 0, "it is the uid that keeps them apart");
    assert!(refusal().contains("all 2 uids from 2130706000 on are in use"));

    let freed = || !Path::new("/run/mayu").join(format!("uid:{first}")).exists();
    one.remove();
    eventually("its uid is free", freed);
    let next = Container::idle(&[]);
    let vmm = next.pid();
    assert_eq!(uid(vmm), first);

    // The lease of a shim that cannot give it back ends with it.
    kill_9(shim_of(next.id()).pid);
    eventually("the VMM is gone", || !processes().iter().any(|process| process.pid == vmm));
    drop(next);
    eventually("its uid is free", freed);
    assert_eq!(uid(Container::idle(&[]).pid()), first);
}

#[test]
fn what_a_vmm_may_use_is_bounded() {
    let container = Container::idle(&[]);
    let vmm = container.pid();
    let limits = fs::read_to_string(format!("/proc/{vmm}/limits")).unwrap();
    let limit = |name: &str| {
        let line = limits.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_whitespace().next().unwrap().parse::<u64>().ok()
    };
    assert_eq!(limit("Max core file size"), Some(0));
    assert!(limit("Max open files").is_some());
    // The largest guest of the configuration has 4 GiB.
    assert!(limit("Max address space").is_some_and(|bytes| bytes <= 8 << 30));
}

/// At any address, with nothing to write to where it is told where functions are, and never to write to and to execute.
#[test]
fn the_programs_are_hardened() {
    for program in ["/usr/libexec/mayu/mayu-vmm", "/usr/bin/containerd-shim-mayu-v2"] {
        let file = fs::read(program).unwrap();
        let elf = ElfBytes::<LittleEndian>::minimal_parse(&file).unwrap();
        assert_eq!(elf.ehdr.e_type, ET_DYN, "{program} is position-independent");
        let segments = elf.segments().unwrap();
        assert!(segments.iter().any(|segment| segment.p_type == PT_GNU_RELRO), "{program}");
        let both = |segment: ProgramHeader| segment.p_flags & (PF_W | PF_X) == PF_W | PF_X;
        assert!(!segments.iter().any(both), "{program}");
        let dynamic = elf.dynamic().unwrap().unwrap();
        let flags = dynamic.iter().find(|entry| entry.d_tag == DT_FLAGS).map_or(0, |entry| entry.d_val());
        assert_ne!(flags & DF_BIND_NOW.cast_unsigned(), 0, "{program} binds at once");
    }
    let container = Container::idle(&[]);
    for process in [container.pid(), shim_of(container.id()).pid] {
        let maps = fs::read_to_string(format!("/proc/{process}/maps")).unwrap();
        let both = |line: &&str| line.split(' ').nth(1).is_some_and(|access| access.contains("wx"));
        assert_eq!(maps.lines().find(both), None);
    }
}

/// Whether a descriptor, given as `/proc/<pid>/fd/<number>`, is for reading alone: proc_pid_fdinfo(5).
fn is_read_only(descriptor: &Path) -> bool {
    let about = descriptor.display().to_string().replace("/fd/", "/fdinfo/");
    let about = fs::read_to_string(about).unwrap();
    let flags = about.lines().find_map(|line| line.strip_prefix("flags:")).unwrap();
    i32::from_str_radix(flags.trim(), 8).unwrap() & nix::libc::O_ACCMODE == nix::libc::O_RDONLY
}

#[test]
fn the_vmm_keeps_nothing_open_that_is_not_the_pod_s() {
    let container = Container::idle(&[]);
    let descriptors = fs::read_dir(format!("/proc/{}/fd", container.pid())).unwrap();
    let allowed = ["anon_inode:", "socket:", "pipe:", "/dev/kvm", "/dev/null", "/share", "/proc", "/memfd:"];
    for descriptor in descriptors.flatten() {
        let target = fs::read_link(descriptor.path()).unwrap().display().to_string();
        let of_the_guest = target.ends_with("vmlinux") || target.ends_with("guest.erofs");
        let of_the_pod = target == "/" || allowed.iter().any(|prefix| target.starts_with(prefix));
        let of_its_template = target.starts_with(template::DIRECTORY) && is_read_only(&descriptor.path());
        assert!(
            of_the_guest || of_the_pod || of_its_template || target.contains(container.id()),
            "the VMM holds {target}"
        );
    }
}

#[test]
fn the_shim_keeps_the_privileges_that_it_needs() {
    let container = Container::idle(&[]);
    let shim = shim_of(container.id()).pid;
    // CAP_SYS_MODULE, CAP_SYS_RAWIO, CAP_SYS_BOOT, CAP_SYS_TIME, CAP_NET_RAW (linux/capability.h).
    let given_up = 1 << 16 | 1 << 17 | 1 << 22 | 1 << 25 | 1 << 13;
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        let has = u64::from_str_radix(&process_status(shim, set), 16).unwrap();
        assert_eq!(has & given_up, 0, "{set}: {has:x}");
        assert_ne!(has & 1 << 21, 0, "{set} without CAP_SYS_ADMIN: {has:x}");
    }
}

#[test]
fn one_shim_and_one_vmm_a_pod() {
    let before = (processes_named("containerd-shim-mayu-v2").len(), processes_named("mayu-vmm").len());
    let _container = Container::idle(&[]);
    let after = (processes_named("containerd-shim-mayu-v2").len(), processes_named("mayu-vmm").len());
    assert_eq!(after, (before.0 + 1, before.1 + 1));
}
