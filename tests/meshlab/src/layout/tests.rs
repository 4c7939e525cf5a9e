use super::*;

fn site(yaml: &str) -> Site {
    serde_saphyr::from_str(yaml).unwrap()
}

fn lay_out(yamls: &[&str]) -> Result<Layout, Vec<String>> {
    let sites: Vec<Site> = yamls.iter().map(|yaml| site(yaml)).collect();
    Layout::compute(&sites.iter().collect::<Vec<_>>())
        .map_err(|problems| problems.into_iter().map(|(_, error)| error.to_string()).collect())
}

#[test]
fn nodes_get_a_24_and_a_64_of_their_sites_prefixes() {
    let layout = lay_out(&[
        "{name: aws, nodes: 3, podsPerNode: 2, prefixes: [10.1.0.0/16, 'fd00:1::/48']}",
        "{name: gcp, nodes: 1}",
    ])
    .unwrap();
    let node = layout.node("aws-2").unwrap();
    assert_eq!(node.pod_cidrs, ["10.1.1.0/24".parse().unwrap(), "fd00:1:0:1::/64".parse().unwrap()]);
    assert_eq!(layout.pod("aws-2-pod-2").unwrap().addresses[0].to_string(), "10.1.1.3");
    assert_eq!(layout.pod("aws-3-pod-1").unwrap().addresses[1].to_string(), "fd00:1:0:2::2");
    assert_eq!(layout.pod("gcp-1-pod-1").unwrap().addresses[0].to_string(), "10.2.0.2");
    assert_eq!(layout.nodes().count(), 4);
}

#[test]
fn small_prefixes_are_cut_finer_until_nothing_fits() {
    let layout = lay_out(&["{name: a, nodes: 3, podsPerNode: 2, prefixes: [10.0.0.0/27]}"]).unwrap();
    assert_eq!(layout.node("a-3").unwrap().pod_cidrs[0].to_string(), "10.0.0.16/29");
    let wrong = lay_out(&["{name: a, nodes: 3, podsPerNode: 2, prefixes: [10.0.0.0/28]}"]).unwrap_err();
    assert!(wrong[0].contains("too small for 3 nodes") && wrong[0].contains("/27"), "{wrong:?}");
}

#[test]
fn no_address_is_given_twice() {
    let layout = lay_out(&[
        "{name: a, nodes: 7, podsPerNode: 9, prefixes: [10.0.0.0/23, 'fd01::/56'], underlay: dual}",
        "{name: b, nodes: 5, podsPerNode: 3, nat: cone}",
        "{name: c, nodes: 200, podsPerNode: 1}",
    ])
    .unwrap();
    let mut seen = std::collections::HashSet::new();
    for node in layout.nodes() {
        for address in node.lan.iter().chain(node.pods.iter().flat_map(|p| &p.addresses)) {
            assert!(seen.insert(*address), "{address} twice");
        }
        for pod in &node.pods {
            for (address, cidr) in pod.addresses.iter().zip(&node.pod_cidrs) {
                assert!(cidr.contains(address), "{address} outside {cidr}");
            }
        }
        let site = layout.site(&node.site).unwrap();
        for (cidr, prefix) in node.pod_cidrs.iter().zip(&site.prefixes) {
            assert!(prefix.contains(cidr), "{cidr} outside {prefix}");
        }
    }
}

#[test]
fn a_nat_site_has_private_addresses_inside() {
    let layout = lay_out(&["{name: a, nat: cone}", "{name: b}"]).unwrap();
    assert_eq!(layout.node("a-1").unwrap().lan[0].to_string(), "192.168.1.11");
    assert_eq!(layout.node("b-1").unwrap().lan[0].to_string(), "198.18.2.11");
}

#[test]
fn impossible_sites_are_refused_with_the_remedy() {
    for (yamls, expected) in [
        (
            &["{name: a, prefixes: [10.0.0.0/8]}", "{name: b, prefixes: [10.3.0.0/16]}"][..],
            "overlaps 10.0.0.0/8",
        ),
        (&["{name: a}", "{name: a, prefixes: [10.9.0.0/16]}"], "given twice"),
        (&["{name: A}"], "no usable name"),
        (&["{name: all}"], "own meaning"),
        (&["{name: a, nodes: 0}"], "0 nodes"),
        (&["{name: a, nodes: [x, x]}"], "`x` is given twice"),
        (&["{name: a, prefixes: [10.0.0.1/16]}"], "write 10.0.0.0/16"),
        (&["{name: a, prefixes: [10.0.0.0/16, 10.1.0.0/16]}"], "more than one IPv4"),
        (&["{name: a, prefixes: [10.0.0.0/16], families: [ipv6]}"], "no IPv6 prefix"),
        (&["{name: a, families: []}"], "no pod family"),
        (&["{name: a, prefixes: [192.168.0.0/16]}"], "own links"),
        (&["{name: a, prefixes: [239.0.0.0/16]}"], "not unicast"),
        (&["{name: a, mtu: 500}"], "576 to 9000"),
        (&["{name: a, mtu: 1000, underlay: dual}"], "1280 to 9000"),
        (&["{name: a, podsPerNode: 999}"], "at most 200"),
        (&[], "there are 0 sites"),
    ] {
        let wrong = lay_out(yamls).unwrap_err();
        assert!(wrong.iter().any(|text| text.contains(expected)), "{yamls:?}: {wrong:?} lacks {expected}");
    }
}
