//! A pod as people run them: a web server, a database, and a program that uses both.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use k8s_cri::v1::{ContainerConfig, LinuxContainerResources};
use mayu_e2e::cri::{Cri, Pod, container, pod_config};
use mayu_e2e::shim::eventually;
use mayu_e2e::{BUSYBOX, NGINX, PATIENCE, PYTHON, REDIS};

use super::{mount, script, traces};

/// Counts visits in redis, and writes a page for nginx with what both say.
const CLIENT: &str = r"
import os, socket, time, urllib.request
def redis(command):
    with socket.create_connection(('127.0.0.1', 6379), timeout=60) as connection:
        connection.sendall(command.encode() + b'\r\n')
        return connection.makefile().readline().strip()
while True:
    try:
        visits = redis('INCR visits')
        served = urllib.request.urlopen('http://localhost/', timeout=60).status
        with open('/pages/count.next', 'w') as page:
            page.write(f'{visits} {served}\n')
        os.rename('/pages/count.next', '/pages/count.txt')
    except OSError as error:
        print(error, flush=True)
    time.sleep(0.2)
";

fn get(address: SocketAddr, path: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

fn count(address: SocketAddr) -> Option<u64> {
    let answer = get(address, "/pages/count.txt").ok()?;
    let line = answer.lines().last()?;
    line.strip_suffix(" 200")?.strip_prefix(':')?.parse().ok()
}

fn redis(name: &str) -> ContainerConfig {
    container(name, REDIS, &["redis-server", "--save", "", "--bind", "127.0.0.1"])
}

#[test]
fn three_containers_serve_together_and_one_may_restart() {
    // The cgroup of all its pods that runc makes for the first one stays.
    drop(Cri::connect(&[]).run_as(pod_config(Default::default()), "runc").unwrap());
    let before = traces();
    let mut pod = Cri::connect(&[BUSYBOX, NGINX, REDIS, PYTHON]).run_pod(Default::default()).unwrap();
    let pages = tempfile::tempdir().unwrap();
    let web = ContainerConfig {
        mounts: vec![mount(pages.path(), "/var/www/html/pages")],
        ..container("web", NGINX, &["nginx", "-g", "daemon off;"])
    };
    let client = ContainerConfig {
        mounts: vec![mount(pages.path(), "/pages")],
        ..container("client", PYTHON, &["python3", "-c", CLIENT])
    };
    let web = pod.run_container(web).unwrap();
    let database = pod.run_container(redis("database")).unwrap();
    let client = pod.run_container(client).unwrap();
    let address = SocketAddr::new(pod.address(), 80);
    eventually("all three work together", || count(address).is_some_and(|visits| visits > 2));
    served_to_other_pods(address);

    pod.remove_container(&database, 0).unwrap();
    let database = pod.run_container(redis("database")).unwrap();
    eventually("the new database counts from the start", || {
        count(address).is_some_and(|visits| visits < 100)
    });
    assert!(pod.runs(&web) && pod.runs(&client) && pod.runs(&database));

    let limits = LinuxContainerResources { memory_limit_in_bytes: 80 << 20, ..Default::default() };
    pod.update(&web, limits).unwrap();
    assert_eq!(script(&mut pod, &web, "cat /sys/fs/cgroup/memory.max"), (80 << 20).to_string());
    assert!(get(address, "/").unwrap().contains("200 OK"));

    for container in [&client, &database, &web] {
        pod.remove_container(container, 5).unwrap();
    }
    pod.remove().unwrap();
    before.assert_restored(3);
}

fn served_to_other_pods(address: SocketAddr) {
    for handler in [None, Some("runc")] {
        let cri = Cri::connect(&[BUSYBOX]);
        let config = pod_config(Default::default());
        let mut pod: Pod = match handler {
            Some(handler) => cri.run_as(config, handler).unwrap(),
            None => cri.run(config).unwrap(),
        };
        let one = super::idle(&mut pod, "one");
        let page = script(&mut pod, &one, &format!("wget -qO- http://{address}/pages/count.txt"));
        assert!(page.ends_with(" 200"), "{page}");
    }
}

#[test]
fn limits_of_the_images_users_hold() {
    // redis runs as its own user, which the image names; the files that it makes are that user's.
    let mut pod = Cri::connect(&[REDIS]).run_pod(Default::default()).unwrap();
    let command = ["redis-server", "--save", "", "--dir", "/var/lib/redis"];
    let config = container("database", REDIS, &command);
    let database = pod.run_container(config).unwrap();
    eventually("it answers", || {
        pod.exec(&database, "redis-cli ping").is_ok_and(|(_, answer)| answer == "PONG")
    });
    assert_eq!(script(&mut pod, &database, "id -un"), "redis");
    script(&mut pod, &database, "redis-cli set key value > /dev/null && redis-cli save > /dev/null");
    assert_eq!(script(&mut pod, &database, "stat -c %U /var/lib/redis/dump.rdb"), "redis");
}
