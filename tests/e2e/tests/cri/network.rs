//! The network of pods: whatever CNI has made, the guest has, and it is reached as any pod is.

use std::fs::{self, Permissions};
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::thread;

use k8s_cri::v1::LinuxPodSandboxConfig;
use mayu_e2e::cri::{Cri, Pod, pod_config};
use mayu_e2e::shim::eventually;
use mayu_e2e::{BUSYBOX, PATIENCE, run};

use super::{idle, pod, script, traces};

/// The address of the host on the pods' bridge: the first of the subnet in the lab's CNI configuration.
pub const HOST: &str = "10.88.0.1";

/// A pod in which busybox serves a text at port 80 of all its addresses.
fn web(pod: &mut Pod, text: &str) -> String {
    let serve = format!("mkdir /www; echo {text} > /www/index.html; exec httpd -f -p 80 -h /www");
    pod.run("web", BUSYBOX, &["sh", "-c", &serve]).unwrap()
}

fn get(address: IpAddr) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&SocketAddr::new(address, 80), PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"GET /index.html HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer.lines().last().unwrap_or_default().to_owned())
}

#[test]
fn a_pod_is_reached_from_the_host_from_another_vm_and_from_a_pod_without_one() {
    let mut server = pod();
    web(&mut server, "hello");
    let addresses = server.addresses();
    assert_eq!(addresses.len(), 2, "one address of each family: {addresses:?}");
    for address in &addresses {
        eventually("it serves the host", || get(*address).is_ok_and(|answer| answer == "hello"));
    }
    let mut other = pod();
    let mut plain = Cri::connect(&[BUSYBOX])
        .run_as(pod_config(LinuxPodSandboxConfig::default()), "runc")
        .expect("a pod with runc");
    for client in [&mut other, &mut plain] {
        let one = idle(client, "client");
        for address in &addresses {
            let url = match address {
                IpAddr::V4(address) => format!("http://{address}/index.html"),
                IpAddr::V6(address) => format!("http://[{address}]/index.html"),
            };
            assert_eq!(script(client, &one, &format!("wget -qO- '{url}'")), "hello", "{url}");
        }
    }
}

#[test]
fn the_guest_has_the_interface_that_cni_has_made() {
    let mut pod = pod();
    let addresses = pod.addresses();
    let one = idle(&mut pod, "one");
    let shown = script(&mut pod, &one, "ip addr show eth0; ip route; ip -6 route");
    for address in &addresses {
        assert!(shown.contains(&address.to_string()), "{address} in {shown}");
    }
    assert!(shown.contains(&format!("default via {HOST}")), "{shown}");
    assert!(!shown.contains("tentative"), "{shown}");

    let namespace = namespace_of(&addresses[0]);
    let links =
        run(Command::new("ip").args(["-n", &namespace, "-o", "link", "show", "eth0"])).success().text();
    let mac = script(&mut pod, &one, "cat /sys/class/net/eth0/address");
    let mtu = script(&mut pod, &one, "cat /sys/class/net/eth0/mtu");
    assert!(links.contains(&mac), "{mac} in {links}");
    assert!(links.contains(&format!("mtu {mtu} ")), "{mtu} in {links}");
    assert_eq!(script(&mut pod, &one, "ls /sys/class/net"), "eth0\nlo");
}

/// The network namespace that has an address.
fn namespace_of(address: &IpAddr) -> String {
    let namespaces = run(Command::new("ip").args(["netns", "list"])).success().text();
    let names = namespaces.lines().filter_map(|line| line.split(' ').next());
    let has = |name: &&str| {
        let shown = run(Command::new("ip").args(["-n", name, "addr"])).text();
        shown.contains(&format!(" {address}/"))
    };
    names.into_iter().find(has).expect("the pod's network namespace").to_owned()
}

#[test]
fn much_goes_both_ways_unchanged() {
    const BYTES: usize = 8 << 20;
    let mut pod = pod();
    let one = idle(&mut pod, "one");
    let listener = TcpListener::bind((HOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    // What comes is sent back.
    let echo = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        stream.write_all(&bytes).unwrap();
        bytes.len()
    });
    let make = format!("head -c {BYTES} /dev/urandom > /sent");
    let transfer = format!("nc {HOST} {port} < /sent > /received; cmp /sent /received && echo same");
    assert_eq!(script(&mut pod, &one, &format!("{make}; {transfer}")), "same");
    assert_eq!(echo.join().unwrap(), BYTES);
}

#[test]
fn a_receiver_that_does_not_read_holds_nobody_else_up() {
    let mut pod = pod();
    // It accepts and never reads.
    let deaf = pod.run("deaf", BUSYBOX, &["sh", "-c", "nc -l -p 7 -e sleep infinity"]).unwrap();
    let address = SocketAddr::new(pod.address(), 7);
    let mut stream = None;
    eventually("it listens", || {
        stream = TcpStream::connect(address).ok();
        stream.is_some()
    });
    let mut stream = stream.unwrap();
    stream.set_nonblocking(true).unwrap();
    let chunk = vec![7; 1 << 16];
    let mut sent = 0;
    let stuck = |error: &std::io::Error| error.kind() == std::io::ErrorKind::WouldBlock;
    let mut refusals = 0;
    while refusals < 20 {
        match stream.write(&chunk) {
            Ok(bytes) => sent += bytes,
            Err(error) if stuck(&error) => {
                refusals += 1;
                thread::sleep(std::time::Duration::from_millis(50));
            }
            Err(error) => panic!("{error}"),
        }
    }
    assert!(sent > 0);
    assert_eq!(script(&mut pod, &deaf, "echo well"), "well");
    let web = web(&mut pod, "still");
    let address = pod.address();
    eventually("others are served", || get(address).is_ok_and(|answer| answer == "still"));
    assert!(pod.runs(&web));
}

#[test]
fn a_port_of_the_guests_loopback_is_forwarded_until_the_pod_stops() {
    let mut pod = pod();
    let serve = "mkdir -p /four /six; echo four > /four/index.html; echo six > /six/index.html; \
                 httpd -p 127.0.0.1:8000 -h /four; exec httpd -f -p [::1]:9000 -h /six";
    let server = pod.run("server", BUSYBOX, &["sh", "-c", serve]).unwrap();
    let listening = "netstat -ltn | grep -c -e 127.0.0.1:8000 -e ::1:9000 || true";
    eventually("it listens", || script(&mut pod, &server, listening) == "2");

    for (port, text) in [(8000, "four\n"), (9000, "six\n")] {
        let mut forward = pod.forward(port).unwrap();
        forward.write(b"GET /index.html HTTP/1.0\r\n\r\n");
        let mut answer = Vec::new();
        while let Some(bytes) = forward.read() {
            answer.extend(bytes.expect("no error"));
        }
        let answer = String::from_utf8_lossy(&answer);
        assert!(answer.ends_with(text), "{answer}");
    }
    let mut nobody = pod.forward(1234).unwrap();
    nobody.write(b"hello\n");
    assert!(!matches!(nobody.read(), Some(Ok(_))), "nobody listens there");

    let mut open = pod.forward(8000).unwrap();
    pod.stop().unwrap();
    assert!(!matches!(open.read(), Some(Ok(_))), "the pod has stopped");
}

/// What CNI is to do, until the end of the test: the file that comes first counts.
struct Plugin {
    files: [&'static str; 2],
}

impl Plugin {
    /// A plugin that answers with this text.
    fn answering(answer: &str) -> Self {
        let files = ["/opt/cni/bin/mayu-e2e", "/etc/cni/net.d/00-mayu-e2e.conflist"];
        fs::write(files[0], format!("#!/bin/sh\ncat > /dev/null\necho '{answer}'\n")).unwrap();
        fs::set_permissions(files[0], Permissions::from_mode(0o755)).unwrap();
        let list = r#"{"cniVersion": "1.0.0", "name": "odd", "plugins": [{"type": "mayu-e2e"}]}"#;
        fs::write(files[1], list).unwrap();
        Self { files }
    }
}

impl Drop for Plugin {
    fn drop(&mut self) {
        for file in self.files {
            drop(fs::remove_file(file));
        }
    }
}

#[test]
fn a_cni_that_gives_no_address_fails_the_pod_and_leaves_nothing() {
    let before = traces();
    let run = || Cri::connect(&[BUSYBOX]).run_pod(LinuxPodSandboxConfig::default());
    {
        let _plugin = Plugin::answering(r#"{"cniVersion": "1.0.0"}"#);
        let mut refusal = None;
        // containerd reads its directory of networks when it is told that something has changed there.
        eventually("containerd uses it", || {
            refusal = run().err();
            refusal.is_some()
        });
        let refusal = refusal.unwrap();
        assert!(refusal.message().contains("network"), "{refusal}");
    }
    let mut again = None;
    eventually("the next pod runs", || {
        again = run().ok();
        again.is_some()
    });
    drop(again);
    before.assert_restored(3);
}
