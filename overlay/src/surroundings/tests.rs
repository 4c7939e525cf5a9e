use super::*;

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn own() -> BTreeSet<IpNet> {
    ["10.1.0.0/24", "fd00:1::/64"].map(net).into()
}

fn link(index: u32, name: &str, kind: Option<&str>, addresses: &[&str]) -> Neighbour {
    let addresses = addresses.iter().map(|text| (net(text), true)).collect();
    Neighbour {
        index,
        name: name.to_owned(),
        kind: kind.map(str::to_owned),
        addresses,
        ..Neighbour::default()
    }
}

fn way(to: &str, interface: u32, gateway: Option<&str>) -> Way {
    let gateway = gateway.map(|ip| ip.parse().unwrap());
    Way { table: 254, to: net(to), hops: vec![Hop { interface, gateway }], learnt: false }
}

fn outside(links: Vec<Neighbour>, ways: Vec<Way>) -> Vec<String> {
    let all = Surroundings { links, ways, ..Surroundings::default() };
    all.outside(&own()).into_iter().collect()
}

#[test]
fn underlays_are_outside_and_pods_are_not() {
    let links = vec![
        link(1, "lo", None, &["127.0.0.1/8"]),
        link(2, "0eth", None, &["192.0.2.9/24"]),
        link(3, "eth1", None, &[]),
        link(4, "cni0", Some("bridge"), &["10.1.0.1/24"]),
        link(5, "docker0", Some("bridge"), &["172.17.0.1/16"]),
        link(6, "cali1", Some("veth"), &["169.254.1.1/32", "fe80::1/64"]),
        link(7, "just-made", Some("veth"), &[]),
        link(8, "bond0", Some("bond"), &["198.51.100.9/24"]),
        link(9, "wg9", Some("wireguard"), &[]),
    ];
    let ways = vec![
        way("0.0.0.0/0", 2, Some("192.0.2.1")),
        way("10.1.0.0/24", 4, None),
        way("10.1.0.7/32", 6, None),
        way("10.0.0.0/8", 8, Some("198.51.100.1")),
        way("172.17.0.0/16", 5, None),
    ];
    assert_eq!(outside(links, ways), ["0eth", "bond0", "docker0", "eth1", "wg9"]);
}

#[test]
fn a_node_whose_underlay_is_a_veth_has_one() {
    // As in a container, or in a lab.
    let links = vec![
        link(2, "eth0", Some("veth"), &["192.0.2.9/24"]),
        link(3, "veth7", Some("veth"), &["10.1.0.1/32"]),
    ];
    let ways = vec![way("::/0", 2, Some("fe80::1")), way("10.1.0.2/32", 3, None)];
    assert_eq!(outside(links, ways), ["eth0"]);
}

#[test]
fn what_the_network_says_makes_no_way_to_pods() {
    // A router advertises this node's own prefix, as on-link and as a route, on an inner interface.
    let mut inner = link(3, "eth1", Some("veth"), &["198.51.100.9/24"]);
    inner.addresses.push((net("fd00:1::99/64"), false));
    let learnt = Way { learnt: true, ..way("fd00:1::/64", 3, None) };
    assert_eq!(outside(vec![inner.clone()], vec![learnt]), ["eth1"]);
    // A route of the operator's to part of it that leaves by a gateway is none either.
    assert_eq!(outside(vec![inner.clone()], vec![way("10.1.0.128/25", 3, Some("198.51.100.1"))]), ["eth1"]);
    // Nor is a wide one, whatever its kind.
    assert_eq!(outside(vec![inner], vec![way("10.0.0.0/8", 3, None)]), ["eth1"]);
    let hardware = link(4, "eth2", None, &[]);
    assert_eq!(outside(vec![hardware], vec![way("10.1.0.0/24", 4, None)]), ["eth2"]);
}

#[test]
fn an_address_from_the_network_takes_no_pod_outside() {
    // A pod advertises itself as a router to its own link: the kernel takes an address of it.
    let mut pod = link(3, "cali1", Some("veth"), &[]);
    pod.addresses.push((net("2001:db8::77/64"), false));
    let advertised = Way { learnt: true, ..way("2001:db8::/64", 3, None) };
    assert!(outside(vec![pod.clone()], vec![advertised.clone()]).is_empty());
    assert!(outside(vec![pod], vec![advertised, way("10.1.0.7/32", 3, None)]).is_empty());
}

#[test]
fn a_bridge_wider_than_the_node_leads_to_its_pods() {
    let links = vec![link(4, "cbr0", Some("bridge"), &["10.1.0.1/16"])];
    assert!(outside(links, vec![way("10.1.0.0/16", 4, None)]).is_empty());
    // A gateway among the pods is a pod.
    let links = vec![link(4, "cilium_host", Some("veth"), &["10.1.0.9/32"])];
    assert!(outside(links, vec![way("10.1.0.0/24", 4, Some("10.1.0.9"))]).is_empty());
}
