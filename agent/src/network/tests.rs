//! The real code on real interfaces, in network namespaces of their own.

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use mayu_agent_api::sandbox;

use super::testing::*;
use super::*;

fn dual_stack() -> ConfigureNetworkRequest {
    request(
        vec![interface(0, "eth0", &["10.1.0.7/24", "fd00:1::7/64", "fe80::858:aff:fe01:7/64"])],
        vec![
            route("0.0.0.0/0 via 10.1.0.1 dev eth0"),
            route("::/0 via fd00:1::1 dev eth0"),
            route("10.1.0.0/24 dev eth0"),
            route("fd00:1::/64 dev eth0"),
            route("fe80::/64 dev eth0"),
        ],
    )
}

const DUAL_STACK_ADDRESSES: [&str; 3] =
    ["eth0 10.1.0.7/24", "eth0 fd00:1::7/64", "eth0 fe80::858:aff:fe01:7/64"];
const DUAL_STACK_ROUTES: [&str; 5] = [
    "10.1.0.0/24 dev eth0",
    "default via 10.1.0.1 dev eth0",
    "default via fd00:1::1 dev eth0 metric 1024",
    "fd00:1::/64 dev eth0 metric 1024",
    "fe80::/64 dev eth0 metric 1024",
];

#[test]
fn a_pod_of_both_families_gets_what_the_request_has_and_nothing_else() {
    in_namespace(|| {
        let network = Network::new(VethSlots::new(&["eth0"]));

        network.configure(&dual_stack()).unwrap();

        assert_eq!(interfaces(), ["eth0 0a:58:0a:00:00:00 mtu 1400 up"]);
        assert_eq!(addresses(), DUAL_STACK_ADDRESSES);
        assert_eq!(routes(), DUAL_STACK_ROUTES);
        assert_eq!(source_of("192.0.2.1"), "10.1.0.7");
        assert_eq!(source_of("2001:db8::1"), "fd00:1::7");
        let parameter = |name| fs::read_to_string(format!("{IPV6_DIRECTORY}/eth0/{name}")).unwrap();
        assert_eq!((parameter("accept_ra").trim(), parameter("autoconf").trim()), ("0", "0"));
    });
}

#[test]
fn a_pod_of_one_family_has_no_address_of_the_other() {
    in_namespace(|| {
        let network = Network::new(VethSlots::new(&["eth0"]));
        let v4 = request(
            vec![interface(0, "eth0", &["10.1.0.7/24"])],
            vec![route("10.1.0.0/24 dev eth0"), route("0.0.0.0/0 via 10.1.0.1 dev eth0")],
        );

        network.configure(&v4).unwrap();
        assert_eq!(addresses(), ["eth0 10.1.0.7/24"]);
        assert_eq!(routes(), ["10.1.0.0/24 dev eth0", "default via 10.1.0.1 dev eth0"]);
        assert_eq!(source_of("2001:db8::1"), libc::ENETUNREACH.to_string());

        let v6 =
            request(vec![interface(0, "eth0", &["fd00:1::7/128"])], vec![route("::/0 via fe80::1 dev eth0")]);
        network.configure(&v6).unwrap();
        assert_eq!(addresses(), ["eth0 fd00:1::7/128"]);
        assert_eq!(routes(), ["default via fe80::1 dev eth0 metric 1024"]);
        assert_eq!(source_of("192.0.2.1"), libc::ENETUNREACH.to_string());
        assert_eq!(source_of("2001:db8::1"), "fd00:1::7");
    });
}

/// As Calico has it: the pod's one address is a network of its own, its gateway an address that nobody has, whose hardware
/// address is entered; and traffic flows.
#[test]
fn packets_pass_through_a_gateway_that_is_only_a_neighbour() {
    in_namespace(|| {
        let slots = VethSlots::new(&["eth0"]);
        let (namespace, host) = other_end();
        move_link("peer0", &namespace);
        let mut pod = request(
            vec![sandbox::Interface { no_arp: true, ..interface(0, "eth0", &["10.0.0.7/32"]) }],
            vec![route("0.0.0.0/0 via 169.254.1.1 dev eth0"), route("169.254.1.1/32 dev eth0")],
        );
        pod.neighbours.push(neighbour("eth0", "169.254.1.1", mac(1)));

        Network::new(slots).configure(&pod).unwrap();
        let server: SocketAddr = host();

        assert_eq!(interfaces(), ["eth0 0a:58:0a:00:00:00 mtu 1400 up noarp"]);
        assert_eq!(routes(), ["169.254.1.1/32 dev eth0", "default via 169.254.1.1 dev eth0"]);
        assert_eq!(neighbours(), ["eth0 169.254.1.1 0a:58:0a:00:00:01"]);
        let client = UdpSocket::bind("0.0.0.0:0").unwrap();
        client.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
        let mut buffer = [0; 64];
        // What is sent before the kernel has noticed that the link is up, is lost.
        let mut answer = (0..60).map(|_| {
            client.send_to(b"ping", server)?;
            client.recv_from(&mut buffer)
        });
        let (length, from) = answer.find_map(Result::ok).expect("an answer within a minute");
        assert_eq!((&buffer[..length], from), (&b"10.0.0.7"[..], server));
    });
}

#[test]
fn every_kind_of_route_is_made() {
    in_namespace(|| {
        let network = Network::new(VethSlots::new(&["eth0"]));
        let kind = |kind, text| sandbox::Route { kind, scope: 0, ..route(text) };
        let mut request = request(
            vec![interface(0, "eth0", &["10.1.0.7/24", "10.2.0.7/24", "fd00:1::7/64"])],
            vec![
                route("10.1.0.0/24 dev eth0"),
                sandbox::Route { metric: 50, mtu: 1300, ..route("10.3.0.0/16 via 10.1.0.1 dev eth0") },
                sandbox::Route { table: 100, ..route("10.4.0.0/16 via 10.1.0.1 dev eth0") },
                sandbox::Route { table: 1000, ..route("fd00:4::/48 dev eth0") },
                sandbox::Route { on_link: true, ..route("10.5.0.0/16 via 172.16.0.1 dev eth0") },
                sandbox::Route {
                    preferred_source: ip("10.2.0.7"),
                    ..route("10.6.0.0/16 via 10.1.0.1 dev eth0")
                },
                sandbox::Route { preferred_source: ip("fd00:1::7"), ..route("fd00:6::/64 dev eth0") },
                sandbox::Route { scope: 0, on_link: true, ..route("10.7.0.0/16 via fe80::1 dev eth0") },
                kind(6, "10.8.0.0/16"),
                kind(7, "10.9.0.0/16"),
                kind(8, "10.10.0.0/16"),
                kind(9, "10.11.0.0/16"),
                kind(6, "fd00:8::/64"),
                kind(7, "fd00:9::/64"),
                kind(8, "fd00:a::/64"),
                route("203.0.113.0/24 dev lo"),
            ],
        );
        request.routes.push(request.routes[0].clone());
        request.routes.push(request.routes[1].clone());

        network.configure(&request).unwrap();

        assert_eq!(
            routes(),
            [
                "10.1.0.0/24 dev eth0",
                "10.10.0.0/16 Prohibit",
                "10.11.0.0/16 Throw",
                "10.3.0.0/16 via 10.1.0.1 dev eth0 metric 50 mtu 1300",
                "10.4.0.0/16 via 10.1.0.1 dev eth0 table 100",
                "10.5.0.0/16 via 172.16.0.1 dev eth0",
                "10.6.0.0/16 via 10.1.0.1 dev eth0 src 10.2.0.7",
                "10.7.0.0/16 via fe80::1 dev eth0",
                "10.8.0.0/16 BlackHole",
                "10.9.0.0/16 Unreachable",
                "203.0.113.0/24 dev lo",
                "fd00:4::/48 dev eth0 metric 1024 table 1000",
                "fd00:6::/64 dev eth0 src fd00:1::7 metric 1024",
                "fd00:8::/64 dev lo metric 1024 BlackHole",
                "fd00:9::/64 dev lo metric 1024 Unreachable",
                "fd00:a::/64 dev lo metric 1024 Prohibit",
            ]
        );
        assert_eq!(source_of("10.6.0.1"), "10.2.0.7");
        assert_eq!(source_of("10.9.0.1"), libc::EHOSTUNREACH.to_string());

        network.configure(&dual_stack()).unwrap();
        assert_eq!(routes(), DUAL_STACK_ROUTES);
    });
}

#[test]
fn a_destination_may_have_several_next_hops() {
    in_namespace(|| {
        let network = Network::new(VethSlots::new(&["eth0"]));
        let mut two = dual_stack();
        two.routes.push(route("0.0.0.0/0 via 10.1.0.2 dev eth0"));
        two.routes.push(route("::/0 via fd00:1::2 dev eth0"));

        network.configure(&two).unwrap();

        let found = routes();
        let defaults: Vec<_> = found.iter().filter(|line| line.starts_with("default")).collect();
        // IPv6 holds both in one.
        let expected =
            ["default metric 1024", "default via 10.1.0.1 dev eth0", "default via 10.1.0.2 dev eth0"];
        assert_eq!(defaults, expected);
    });
}

#[test]
fn names_may_change_places() {
    in_namespace(|| {
        let network = Network::new(VethSlots::new(&["eth0", "eth1", "eth2"]));
        let three = |names: [&str; 3]| {
            let interfaces = (0..).zip(names).map(|(slot, name)| interface(slot, name, &[])).collect();
            request(interfaces, vec![])
        };

        network.configure(&three(["eth1", "eth2", "eth0"])).unwrap();
        let expected = |names: [&str; 3]| {
            let mut lines: Vec<String> = (0..3_u8)
                .zip(names)
                .map(|(slot, name)| format!("{name} {} mtu 1400 up", HardwareAddress(mac(slot))))
                .collect();
            lines.sort();
            lines
        };
        assert_eq!(interfaces(), expected(["eth1", "eth2", "eth0"]));

        network.configure(&three(["eth1", "net0", "eth2"])).unwrap();
        assert_eq!(interfaces(), expected(["eth1", "net0", "eth2"]));
    });
}

#[test]
fn a_slot_without_an_interface_is_not_seen_until_it_has_one() {
    in_namespace(|| {
        let network = Network::new(VethSlots::new(&["eth0", "eth1"]));

        network.configure(&ConfigureNetworkRequest::default()).unwrap();
        assert_eq!((interfaces(), routes()), (vec![], vec![]));
        network.configure(&ConfigureNetworkRequest::default()).unwrap();

        network.configure(&dual_stack()).unwrap();
        assert_eq!(interfaces(), ["eth0 0a:58:0a:00:00:00 mtu 1400 up"]);
        assert_eq!(routes(), DUAL_STACK_ROUTES);

        let both = request(
            vec![interface(1, "eth0", &["10.1.0.8/24"]), interface(0, "eth1", &["10.2.0.8/24"])],
            vec![route("10.1.0.0/24 dev eth0"), route("10.2.0.0/24 dev eth1")],
        );
        network.configure(&both).unwrap();
        assert_eq!(
            interfaces(),
            ["eth0 0a:58:0a:00:00:01 mtu 1400 up", "eth1 0a:58:0a:00:00:00 mtu 1400 up"]
        );
        assert_eq!(addresses(), ["eth0 10.1.0.8/24", "eth1 10.2.0.8/24"]);
        assert_eq!(routes(), ["10.1.0.0/24 dev eth0", "10.2.0.0/24 dev eth1"]);

        // One slot in the place of the other.
        network.configure(&dual_stack()).unwrap();
        let other =
            request(vec![interface(1, "eth0", &["10.1.0.8/24"])], vec![route("10.1.0.0/24 dev eth0")]);
        network.configure(&other).unwrap();
        assert_eq!(interfaces(), ["eth0 0a:58:0a:00:00:01 mtu 1400 up"]);
        assert_eq!(routes(), ["10.1.0.0/24 dev eth0"]);

        network.configure(&ConfigureNetworkRequest::default()).unwrap();
        assert_eq!((interfaces(), addresses()), (vec![], vec![]));
    });
}

#[test]
fn nothing_is_left_of_the_request_before() {
    in_namespace(|| {
        let network = Network::new(VethSlots::new(&["eth0"]));
        let blackhole = |text| sandbox::Route { kind: 6, scope: 0, ..route(text) };
        let mut before = request(
            vec![interface(0, "net1", &["10.9.0.7/24", "10.9.0.8/24", "10.8.0.7/32", "fd00:9::7/64"])],
            vec![
                route("10.9.0.0/24 dev net1"),
                route("fd00:9::/64 dev net1"),
                blackhole("192.0.2.0/24"),
                blackhole("2001:db8::/32"),
                sandbox::Route { table: 7, ..blackhole("198.51.100.0/24") },
            ],
        );
        before.neighbours.push(neighbour("net1", "10.9.0.1", mac(9)));
        before.neighbours.push(neighbour("net1", "fd00:9::1", mac(9)));
        network.configure(&before).unwrap();
        assert_eq!((addresses().len(), routes().len(), neighbours().len()), (4, 5, 2));

        network.configure(&dual_stack()).unwrap();

        assert_eq!(interfaces(), ["eth0 0a:58:0a:00:00:00 mtu 1400 up"]);
        assert_eq!(addresses(), DUAL_STACK_ADDRESSES);
        assert_eq!(routes(), DUAL_STACK_ROUTES);
        assert_eq!(neighbours(), Vec::<String>::new());
    });
}

#[test]
fn what_the_kernel_refuses_is_named_and_the_next_request_works() {
    in_namespace(|| {
        let network = Network::new(VethSlots::new(&["eth0", "eth1"]));
        let error = |request: &ConfigureNetworkRequest| network.configure(request).unwrap_err().to_string();

        let mut unreachable = dual_stack();
        unreachable.routes[0] = route("0.0.0.0/0 via 10.77.0.1 dev eth0");
        let text = error(&unreachable);
        assert!(
            text.starts_with(
                "add the route to 0.0.0.0/0 via 10.77.0.1 dev eth0 table 254: Network is unreachable"
            ),
            "{text}"
        );
        let mut host_bits = dual_stack();
        host_bits.routes[2] = route("10.1.0.1/24 dev eth0");
        assert!(error(&host_bits).contains("route to 10.1.0.1/24 dev eth0"));
        let mut multicast = dual_stack();
        multicast.interfaces[0].addresses[0] = prefix("224.0.0.1/24");
        assert!(error(&multicast).contains("interface \"eth0\" the address 224.0.0.1/24"));
        let mut too_small = dual_stack();
        too_small.interfaces[0].mtu = 1279;
        let text = error(&too_small);
        assert!(text.contains("the address fd00:1::7/64"), "{text}");
        let mut no_slot = dual_stack();
        no_slot.interfaces[0].slot_address = slot(7).0.into();
        let text = error(&no_slot);
        assert!(text.contains("\"eth0\"") && text.contains("no network slot 02:6d:61:79:75:07"), "{text}");

        network.configure(&dual_stack()).unwrap();
        assert_eq!(addresses(), DUAL_STACK_ADDRESSES);
        assert_eq!(routes(), DUAL_STACK_ROUTES);
    });
}

#[test]
fn what_containers_have_made_stays_theirs() {
    in_namespace(|| {
        let network = Network::new(VethSlots::new(&["eth0"]));
        network.configure(&dual_stack()).unwrap();
        kernel(async |handle| {
            let bridge = rtnetlink::LinkBridge::new("br0").up().build();
            handle.link().add(bridge).execute().await.unwrap();
        });
        let bridge = index_of("br0");
        kernel(async |handle| {
            let address = "172.17.0.1".parse().unwrap();
            handle.address().add(bridge, address, 16).execute().await.unwrap();
        });
        let theirs = "172.17.0.0/16 dev br0 src 172.17.0.1".to_owned();
        assert!(routes().contains(&theirs), "{:#?}", routes());

        network.configure(&dual_stack()).unwrap();
        assert!(routes().contains(&theirs), "{:#?}", routes());

        let mut taken = dual_stack();
        taken.interfaces[0].name = "br0".into();
        taken.routes.clear();
        let text = network.configure(&taken).unwrap_err().to_string();
        assert!(text.starts_with("name interface \"br0\": File exists"), "{text}");
        assert!(links().iter().any(|link| name_of(link) == "br0" && is_bridge(link)));
    });
}
