//! Whose are the files that a guest makes?

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::process::{Command, Stdio};

use fuse_backend_rs::abi::fuse_abi::{MkdirIn, MknodIn, Opcode, ROOT_ID, SetattrIn};
use libc::{O_RDWR, S_IFIFO};

use super::*;

const SET_OWNER: u32 = 2 | 4;

/// Has files made by several users, root among them, and looks whose they are on the host.
fn assert_files_belong_to_their_makers(client: &mut Client) {
    for (number, user) in [(1000, 1001), (0, 0), (1234, 0), (0, 1234), (1000, 1001)].into_iter().enumerate() {
        client.user = user;
        let owner = |client: &Client, name: &str| {
            let host = fs::symlink_metadata(client.path(name)).unwrap();
            (host.uid(), host.gid())
        };
        let names = ["file", "directory", "link", "fifo"].map(|name| format!("{name}-{number}"));

        client.create(ROOT_ID, &names[0], O_RDWR, 0o644).unwrap();
        let mkdir = MkdirIn { mode: 0o755, umask: 0 };
        client.call(Opcode::Mkdir, ROOT_ID, &[mkdir.as_slice(), &name_bytes(&names[1])]).unwrap();
        client.call(Opcode::Symlink, ROOT_ID, &[&name_bytes(&names[2]), b"target\0"]).unwrap();
        let mknod = MknodIn { mode: S_IFIFO | 0o644, ..Default::default() };
        client.call(Opcode::Mknod, ROOT_ID, &[mknod.as_slice(), &name_bytes(&names[3])]).unwrap();

        for name in &names {
            assert_eq!(owner(client, name), user, "{name}");
        }
    }
}

/// A share that everybody may write to, since a test that was only started by root has no securebits to keep its
/// capabilities while it acts for another.
fn open_to_all(client: &Client) {
    fs::set_permissions(client.share.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
}

#[test]
fn files_belong_to_their_makers() {
    if !is_root("files_belong_to_their_makers") {
        return;
    }
    let mut client = Client::mounted();
    open_to_all(&client);

    assert_files_belong_to_their_makers(&mut client);
}

#[test]
fn the_test_itself_stays_who_it_was() {
    if !is_root("the_test_itself_stays_who_it_was") {
        return;
    }
    let before = fs::read_to_string("/proc/thread-self/status").unwrap();
    let mut client = Client::mounted();
    open_to_all(&client);
    client.user = (1000, 1001);
    client.create(ROOT_ID, "file", O_RDWR, 0o644).unwrap();

    let after = fs::read_to_string("/proc/thread-self/status").unwrap();
    let ids = |status: &str| {
        status.lines().filter(|line| line.starts_with("Uid") || line.starts_with("Cap")).count()
    };
    let line = |status: &str, key: &str| status.lines().find(|line| line.starts_with(key)).map(str::to_owned);

    assert!(ids(&after) > 1);
    for key in ["Uid", "Gid", "CapEff", "Umask"] {
        assert_eq!(line(&before, key), line(&after, key));
    }
}

#[test]
fn an_owner_can_be_set() {
    if !is_root("an_owner_can_be_set") {
        return;
    }
    let mut client = Client::mounted();
    let node = client.create(ROOT_ID, "file", O_RDWR, 0o644).unwrap().0.nodeid;

    let chown = SetattrIn { valid: SET_OWNER, uid: 33, gid: 44, ..Default::default() };
    client.call(Opcode::Setattr, node, &[chown.as_slice()]).unwrap();

    let host = fs::metadata(client.path("file")).unwrap();
    assert_eq!((host.uid(), host.gid()), (33, 44));
}

/// The half of the next test that runs in the jail: an unprivileged user in a user namespace that maps every id to
/// itself, with the capabilities and securebits that the VMM leaves to its workers.
#[test]
#[ignore = "run by the_jail_is_no_obstacle"]
fn inside_the_jail() {
    assert!(!rustix::process::geteuid().is_root());
    let mut client = Client::mounted();

    assert_files_belong_to_their_makers(&mut client);

    // What belongs to root alone, in a directory that only root may search, is root's in the guest to use.
    client.user = (0, 0);
    let (entry, open) = client.create(ROOT_ID, "secret", O_RDWR, 0o600).unwrap();
    client.write(entry.nodeid, open.fh, 0, b"secret").unwrap();
    let chown = SetattrIn { valid: SET_OWNER, uid: 0, gid: 0, ..Default::default() };
    client.call(Opcode::Setattr, entry.nodeid, &[chown.as_slice()]).unwrap();
    let handle = client.open(entry.nodeid, O_RDWR).unwrap().fh;
    assert_eq!(client.read(entry.nodeid, handle, 0, 9).unwrap(), b"secret");
    let link = client.call(Opcode::Link, ROOT_ID, &[&entry.nodeid.to_le_bytes(), b"linked\0"]);
    assert!(link.is_ok(), "{link:?}");
}

#[test]
fn the_jail_is_no_obstacle() {
    if !is_root("the_jail_is_no_obstacle") {
        return;
    }
    let capabilities = "chown dac_override dac_read_search fowner fsetid setuid setgid mknod setfcap";
    let capabilities = capabilities.replace(' ', ",+");
    let test = std::env::current_exe().unwrap();
    // In a new user namespace nobody is anybody until the ids are mapped, from outside.
    let script = format!(
        "echo ready; read mapped; exec setpriv --reuid=4242 --regid=4242 --clear-groups --no-new-privs \
         --securebits=+no_setuid_fixup --inh-caps=-all,+{capabilities} \
         --ambient-caps=-all,+{capabilities} {} --exact --ignored --nocapture \
         devices::virtio::fs::tests::identity::inside_the_jail 2>&1",
        test.display()
    );
    let jail = Command::new("unshare")
        .args(["--user", "sh", "-c", &script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    let mut jail = match jail {
        Ok(jail) => jail,
        Err(error) => return eprintln!("SKIPPED: the_jail_is_no_obstacle: needs unshare: {error}"),
    };
    let mut output = BufReader::new(jail.stdout.take().unwrap());
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    for map in ["uid_map", "gid_map"] {
        fs::write(format!("/proc/{}/{map}", jail.id()), "0 0 4294967295").unwrap();
    }
    jail.stdin.take().unwrap().write_all(b"mapped\n").unwrap();
    output.read_to_string(&mut line).unwrap();

    assert!(jail.wait().unwrap().success() && line.contains("1 passed"), "{line}");
}
