use super::*;

fn two_sites() -> Picture {
    let site = |name: &str, nat: &str, mtu| SiteView {
        name: name.into(),
        nodes: vec![format!("{name}-1"), format!("{name}-2")],
        pods: 2,
        mtu,
        nat: nat.into(),
        prefixes: vec!["10.1.0.0/16".into()],
    };
    let pods: Vec<String> = ["aws-1-pod-1", "aws-2-pod-1", "lab-1-pod-1", "lab-2-pod-1"]
        .iter()
        .map(|pod| (*pod).into())
        .collect();
    let mut matrix = Matrix::new(Family::Ipv4, pods.clone());
    for from in &pods {
        for to in pods.iter().filter(|to| *to != from) {
            matrix.note(from, to, !(from == "lab-2-pod-1" && to == "aws-1-pod-1"));
        }
    }
    let tunnels = [("aws", "aws", 1, 1), ("aws", "lab", 3, 4), ("lab", "lab", 1, 1)];
    Picture {
        name: "two".into(),
        sites: vec![site("aws", "none", 1500), site("lab", "cone", 1400)],
        tunnels: tunnels
            .iter()
            .map(|(a, b, up, total)| TunnelCount { a: (*a).into(), b: (*b).into(), up: *up, total: *total })
            .collect(),
        matrices: vec![matrix],
        handshake_ages: vec![5.0, 1.0, 9.0],
        encrypted_bytes: 1_572_864,
        links: vec![LinkView { name: "aws uplink".into(), packets: 10, wireguard: 9, ..LinkView::default() }],
        seconds_to_handshakes: Some(1.25),
        seconds_to_reachability: Some(2.0),
        streams: vec![StreamView { name: "s".into(), sent: 100, lost: 0, longest_gap_ms: 11.4 }],
    }
}

const EXPECTED: &str = r"two

  +-------------+  +-----------------+
  | aws         |  | lab             |
  |             |  |                 |
  | aws-1       |  | lab-1           |
  | aws-2       |  | lab-2           |
  |             |  |                 |
  | 2 pods      |  | 2 pods          |
  | 10.1.0.0/16 |  | 10.1.0.0/16     |
  | MTU 1500    |  | MTU 1400        |
  | no NAT      |  | behind cone NAT |
  | tunnels 1/1 |  | tunnels 1/1     |
  +-------------+  +-----------------+

  aws ==x== lab  3/4 tunnels

pods over IPv4: 11 of 12 pairs   (o reached, X not, - not probed, \ itself)
  aws-1-pod-1  \ o o o
  aws-2-pod-1  o \ o o
  lab-1-pod-1  o o \ o
  lab-2-pod-1  X o o \

on the underlay     packets  WireGuard  marker hits  pod addresses
aws uplink               10          9            0              0

stream s: 100 sent, 0 lost, longest silence 11 ms

5 of 6 node pairs with a handshake
11 of 12 pod pairs reached over IPv4
handshake age 1 / 5 / 9 s (min / median / max)
1.5 MiB sent through the tunnels
10 packets seen on 1 underlay link, 9 of them WireGuard, 0 with the marker in clear, 0 with a pod address in clear
agents started -> all handshakes 1.2 s -> all pods 2.0 s
";

#[test]
fn a_lab_is_drawn_as_expected() {
    assert_eq!(two_sites().render(), EXPECTED);
}

#[test]
fn equal_matrices_of_both_families_are_shown_once() {
    let mut picture = two_sites();
    let other = Matrix { family: Family::Ipv6, ..picture.matrices[0].clone() };
    picture.matrices.push(other);
    assert_eq!(picture.render().matches("(o reached").count(), 1);
    assert!(picture.render().contains("pods over IPv4 and IPv6: 11 of 12 pairs"));
    picture.matrices[1].rows[0][1] = Some(false);
    assert_eq!(picture.render().matches("(o reached").count(), 2);
}

#[test]
fn what_was_not_measured_is_left_out() {
    let picture =
        Picture { tunnels: vec![], matrices: vec![], links: vec![], streams: vec![], ..two_sites() };
    let picture = Picture {
        handshake_ages: vec![],
        seconds_to_handshakes: None,
        seconds_to_reachability: None,
        ..picture
    };
    let text = picture.render();
    assert!(!text.contains("tunnels") && !text.contains("pods over") && !text.contains("packets"), "{text}");
}

#[test]
fn a_big_matrix_shows_only_its_gaps() {
    let pods: Vec<String> = (1..=60).map(|n| format!("a-{n}-pod-1")).collect();
    let mut matrix = Matrix::new(Family::Ipv6, pods.clone());
    for from in &pods {
        for to in pods.iter().filter(|to| *to != from) {
            matrix.note(from, to, from != "a-7-pod-1" || to != "a-9-pod-1");
        }
    }
    let mut text = String::new();
    render_matrix(&mut text, &matrix, "IPv6");
    assert!(text.contains("a-7-pod-1   misses 1\n  59 pods reach every pod"), "{text}");
}
