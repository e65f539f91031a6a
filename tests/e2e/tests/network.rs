//! Networks that are made by hand, as any CNI plugin might make them.

use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use mayu_e2e::shim::eventually;
use mayu_e2e::{BUSYBOX, Container, run};

/// A network namespace, until the end of the test.
struct Namespace(String);

impl Namespace {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("e2e-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        ip(&format!("netns add {name}"));
        let namespace = Self(name);
        namespace.ip("link set lo up");
        namespace
    }

    /// `ip` inside.
    #[track_caller]
    fn ip(&self, arguments: &str) -> String {
        ip(&format!("-n {} {arguments}", self.0))
    }

    fn flag(&self) -> String {
        format!("network:/run/netns/{}", self.0)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        run(Command::new("ip").args(["netns", "delete", &self.0]));
    }
}

#[track_caller]
fn ip(arguments: &str) -> String {
    run(Command::new("ip").args(arguments.split(' '))).success().text()
}

/// An interface of the host that goes with the test.
struct Link(&'static str);

impl Drop for Link {
    fn drop(&mut self) {
        run(Command::new("ip").args(["link", "delete", self.0]));
    }
}

fn ping(container: &Container, address: &str) -> String {
    container.script(&format!("ping -c 1 -W 60 {address} > /dev/null && echo answered"))
}

#[test]
fn a_pod_has_all_interfaces_of_its_namespace_and_what_each_is_told() {
    let namespace = Namespace::new();
    let name = namespace.0.clone();
    for (number, mtu) in [(0, 1500), (1, 1400)] {
        ip(&format!("link add e2e-host{number} type veth peer name eth{number} netns {name}"));
        ip(&format!("addr add 192.168.{number}.1/24 dev e2e-host{number}"));
        ip(&format!("link set e2e-host{number} up"));
        namespace.ip(&format!("link set eth{number} mtu {mtu} up"));
        namespace.ip(&format!("addr add 192.168.{number}.2/24 dev eth{number}"));
    }
    let _links = [Link("e2e-host0"), Link("e2e-host1")];
    namespace.ip("route add default via 192.168.0.1");
    namespace.ip("route add 10.99.0.0/16 via 192.168.1.1 metric 7");
    namespace.ip("neigh add 192.168.1.77 lladdr 02:00:00:00:00:77 dev eth1 nud permanent");
    namespace.ip("route add blackhole 10.98.0.0/16");

    let container = Container::idle(&["--with-ns", &namespace.flag()]);

    assert_eq!(container.script("ls /sys/class/net"), "eth0\neth1\nlo");
    assert_eq!(container.script("cat /sys/class/net/eth0/mtu /sys/class/net/eth1/mtu"), "1500\n1400");
    for number in [0, 1] {
        let mac = container.script(&format!("cat /sys/class/net/eth{number}/address"));
        assert!(namespace.ip(&format!("link show eth{number}")).contains(&mac), "{mac}");
        assert_eq!(ping(&container, &format!("192.168.{number}.1")), "answered");
    }
    let routes = container.script("ip route");
    for route in [
        "default via 192.168.0.1 dev eth0",
        "10.99.0.0/16 via 192.168.1.1 dev eth1",
        "blackhole 10.98.0.0/16",
    ] {
        assert!(routes.contains(route), "{route} in {routes}");
    }
    let neighbours = container.script("ip neigh");
    assert!(neighbours.contains("192.168.1.77 dev eth1 lladdr 02:00:00:00:00:77"), "{neighbours}");
}

#[test]
fn a_gateway_outside_of_every_subnet_is_reached_as_calico_has_it() {
    let namespace = Namespace::new();
    ip(&format!("link add e2e-cali type veth peer name eth0 netns {}", namespace.0));
    let _link = Link("e2e-cali");
    ip("link set e2e-cali address ee:ee:ee:ee:ee:ee up");
    ip("route add 192.168.7.7/32 dev e2e-cali");
    ip("addr add 192.168.8.1/32 dev e2e-cali");
    namespace.ip("link set eth0 up");
    namespace.ip("addr add 192.168.7.7/32 dev eth0");
    namespace.ip("route add 169.254.1.1 dev eth0 scope link");
    namespace.ip("route add default via 169.254.1.1 dev eth0");
    namespace.ip("neigh add 169.254.1.1 lladdr ee:ee:ee:ee:ee:ee dev eth0 nud permanent");

    let container = Container::idle(&["--with-ns", &namespace.flag()]);

    assert_eq!(ping(&container, "192.168.8.1"), "answered");
}

#[test]
fn macvlan_and_ipvlan_interfaces_are_mirrored_too() {
    // A veth pair stands for the network card: the other end, in a namespace of its own, for the rest of the network.
    let outside = Namespace::new();
    ip(&format!("link add e2e-card type veth peer name wire netns {}", outside.0));
    let _card = Link("e2e-card");
    ip("link set e2e-card up");
    outside.ip("link set wire up");
    outside.ip("addr add 192.168.20.1/24 dev wire");
    for (kind, address) in [("macvlan mode bridge", "192.168.20.2"), ("ipvlan mode l2", "192.168.20.3")] {
        let namespace = Namespace::new();
        ip(&format!("link add link e2e-card name eth0 netns {} type {kind}", namespace.0));
        namespace.ip("link set eth0 up");
        namespace.ip(&format!("addr add {address}/24 dev eth0"));

        let container = Container::idle(&["--with-ns", &namespace.flag()]);

        assert_eq!(ping(&container, "192.168.20.1"), "answered", "{kind}");
        drop(container);
    }
}

#[test]
fn netkit_interfaces_of_both_modes_are_mirrored_too() {
    for mode in ["l2", "l3"] {
        let namespace = Namespace::new();
        ip(&format!(
            "link add e2e-netkit type netkit mode {mode} forward peer forward name eth0 netns {}",
            namespace.0
        ));
        let _link = Link("e2e-netkit");
        ip("link set e2e-netkit up");
        ip("addr add 192.168.40.1/24 dev e2e-netkit");
        namespace.ip("link set eth0 up");
        namespace.ip("addr add 192.168.40.2/24 dev eth0");

        let container = Container::idle(&["--with-ns", &namespace.flag()]);

        assert_eq!(ping(&container, "192.168.40.1"), "answered", "{mode}");
        drop(container);
    }
}

#[test]
fn a_namespace_that_is_gone_is_named_and_one_without_interfaces_is_fine() {
    let container = Container::unborn();
    let flags = ["--with-ns", "network:/run/netns/never-was"];
    let error = run(&mut container.run_command(&flags, BUSYBOX, &["true"])).failure();
    assert!(error.contains("/run/netns/never-was"), "{error}");

    let empty = Namespace::new();
    let container = Container::idle(&["--with-ns", &empty.flag()]);
    assert_eq!(container.script("ls /sys/class/net"), "lo");
}

#[test]
fn the_host_network_is_refused_by_name() {
    let container = Container::unborn();
    let error = run(&mut container.run_command(&["--net-host"], BUSYBOX, &["true"])).failure();
    assert!(error.contains("hostNetwork"), "{error}");
    // Its own namespace is the host's by another name.
    let flags = ["--with-ns", "network:/proc/1/ns/net"];
    let error = run(&mut Container::unborn().run_command(&flags, BUSYBOX, &["true"])).failure();
    assert!(error.contains("/proc/1/ns/net") && error.contains("host"), "{error}");
}

#[test]
fn nothing_of_the_network_stays_in_the_namespace() {
    let namespace = Namespace::new();
    ip(&format!("link add e2e-stay type veth peer name eth0 netns {}", namespace.0));
    let _link = Link("e2e-stay");
    ip("link set e2e-stay up");
    namespace.ip("link set eth0 up");
    namespace.ip("addr add 192.168.30.2/24 dev eth0");
    for _ in 0..2 {
        // The second finds it as the first did.
        let container = Container::idle(&["--with-ns", &namespace.flag()]);
        assert!(namespace.ip("link show").contains("mayu0"), "the TAP");
        drop(container);
        eventually("the TAP is gone", || !namespace.ip("link show").contains("mayu0"));
    }
}
