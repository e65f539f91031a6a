//! What a pod's devices move in a second is limited by its annotations. A slow host makes it less, never more.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use k8s_cri::v1::{ContainerConfig, Device};
use mayu_e2e::configuration::Configuration;
use mayu_e2e::mount::LoopDevice;

use super::network::HOST;
use super::{annotated, idle, script, sleeping};

/// In bytes a second, and the burst in bytes, which is a second's worth. No packet, and no request of Linux's, is larger than
/// that.
const RATE: u64 = 2_000_000;

/// What is moved, in bytes.
const MUCH: usize = 8 << 20;

/// What the guest may have read of a disk before anybody asked, in bytes, and more.
const CACHED: u64 = 1 << 20;

/// The least that it takes.
fn at_least() -> Duration {
    Duration::from_nanos((MUCH as u64 - RATE - CACHED) * 1_000_000_000 / RATE)
}

/// A server for one connection, and its port.
fn server<T: Send + 'static>(serve: impl FnOnce(TcpStream) -> T + Send + 'static) -> (u16, JoinHandle<T>) {
    let listener = TcpListener::bind((HOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    (port, thread::spawn(move || serve(listener.accept().unwrap().0)))
}

#[test]
fn a_pod_sends_and_receives_no_more_than_its_annotation_says() {
    let _allowed = Configuration::set("annotations", "allowed", r#"["io.mayu.net-bandwidth"]"#);
    let mut pod = annotated(&[("io.mayu.net-bandwidth", "2M")]).unwrap();
    let one = idle(&mut pod, "one");
    let receive = |mut stream: TcpStream| std::io::copy(&mut stream, &mut std::io::sink()).unwrap();
    let (port, received) = server(receive);

    let started = Instant::now();
    script(&mut pod, &one, &format!("head -c {MUCH} /dev/zero | nc {HOST} {port}"));

    assert_eq!(received.join().unwrap(), MUCH as u64);
    assert!(started.elapsed() >= at_least(), "sent after {:?}", started.elapsed());

    let (port, sent) = server(|mut stream| {
        stream.write_all(&vec![7; MUCH]).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        // Until the pod has closed it, too.
        stream.read_to_end(&mut Vec::new()).unwrap()
    });

    let started = Instant::now();
    let count = script(&mut pod, &one, &format!("nc {HOST} {port} < /dev/null | wc -c"));

    assert_eq!(count, MUCH.to_string());
    assert!(started.elapsed() >= at_least(), "received after {:?}", started.elapsed());
    sent.join().unwrap();
}

#[test]
fn a_raw_block_volume_is_read_and_written_no_faster_than_the_annotation_says() {
    let _allowed = Configuration::set("annotations", "allowed", r#"["io.mayu.block-bandwidth"]"#);
    let disk = LoopDevice::new(2 * MUCH as u64);
    let mut pod = annotated(&[("io.mayu.block-bandwidth", "2M")]).unwrap();
    let device = Device {
        container_path: "/dev/xvda".into(),
        host_path: disk.path().display().to_string(),
        permissions: "rwm".into(),
    };
    let one = pod.run_container(ContainerConfig { devices: vec![device], ..sleeping("one") }).unwrap();
    let count = MUCH / 65_536;
    for (what, command) in [
        ("written", format!("dd if=/dev/zero of=/dev/xvda bs=64k count={count} conv=notrunc,fsync")),
        // The other half, which is in nobody's cache.
        ("read", format!("dd if=/dev/xvda of=/dev/null bs=64k skip={count} count={count}")),
    ] {
        let started = Instant::now();
        script(&mut pod, &one, &format!("{command} 2> /dev/null"));
        assert!(started.elapsed() >= at_least(), "{what} after {:?}", started.elapsed());
    }
}
