use std::net::{IpAddr, SocketAddr};

use netlab::probe::{Failure, Kind, Probe, reflexive};
use netlab::{IpNet, Lab, LabSpec, Nat};

use crate::{PATIENCE, PORT, SILENCE, build, echo_everywhere, v4, v6};

/// Site 1 behind `nat`, sites 2 and 3 open.
fn behind(test: &str, nat: Nat) -> Option<Lab> {
    let mut spec = LabSpec::grid(3, 1, 0);
    spec.sites[0].nat = nat;
    build(test, &spec)
}

fn mapping(lab: &Lab, source_port: u16, host: &str) -> SocketAddr {
    let to = SocketAddr::new(v4(lab.host(host).unwrap().addresses()), PORT);
    reflexive(lab.host("s1-h1").unwrap(), source_port, to, PATIENCE).unwrap()
}

fn outside(lab: &Lab) -> IpAddr {
    v4(&lab.site("s1").unwrap().uplink_addresses().iter().map(IpNet::addr).collect::<Vec<_>>())
}

#[test]
fn cone_nat_keeps_one_mapping_for_every_destination() {
    let Some(lab) = behind("cone_nat_keeps_one_mapping_for_every_destination", Nat::Cone) else { return };
    let _echo = echo_everywhere(&lab);
    for host in ["s2-h1", "s3-h1"] {
        assert_eq!(mapping(&lab, 40_000, host), SocketAddr::new(outside(&lab), 40_000));
    }
}

#[test]
fn symmetric_nat_maps_every_destination_differently() {
    let Some(lab) = behind("symmetric_nat_maps_every_destination_differently", Nat::Symmetric) else {
        return;
    };
    let _echo = echo_everywhere(&lab);
    let (to_two, to_three) = (mapping(&lab, 40_000, "s2-h1"), mapping(&lab, 40_000, "s3-h1"));
    assert_eq!(to_two.ip(), outside(&lab));
    assert_ne!(to_two.port(), to_three.port());
    assert_eq!(mapping(&lab, 40_000, "s2-h1"), to_two, "one destination keeps its mapping");
}

#[test]
fn a_nat_that_forgets_gives_a_new_mapping() {
    let Some(lab) = behind("a_nat_that_forgets_gives_a_new_mapping", Nat::Symmetric) else { return };
    let _echo = echo_everywhere(&lab);
    let before = mapping(&lab, 40_000, "s2-h1");
    lab.site("s1").unwrap().flush_connections().unwrap();
    assert_ne!(mapping(&lab, 40_000, "s2-h1"), before);
}

#[test]
fn host_behind_nat_reaches_out_but_is_not_reached() {
    for nat in [Nat::Cone, Nat::Symmetric] {
        let Some(lab) = behind("host_behind_nat_reaches_out_but_is_not_reached", nat) else { return };
        let _echo = echo_everywhere(&lab);
        let (inside, open) = (lab.host("s1-h1").unwrap(), lab.host("s2-h1").unwrap());
        for to in open.addresses() {
            for kind in [Kind::Icmp, Kind::Udp(PORT), Kind::Tcp(PORT)] {
                let answer = Probe::new(inside, *to, kind).deadline(PATIENCE).ask();
                assert!(answer.is_ok(), "{nat:?} {kind:?} to {to}: {answer:?}");
            }
        }
        let private = Probe::new(open, v4(inside.addresses()), Kind::Icmp).deadline(PATIENCE).ask();
        assert!(matches!(private, Err(Failure::Unreachable(_))), "{private:?}");
        for to in [outside(&lab), v6(inside.addresses())] {
            for kind in [Kind::Udp(PORT), Kind::Tcp(PORT)] {
                let silent = Probe::new(open, to, kind).deadline(SILENCE).ask();
                assert_eq!(silent, Err(Failure::Timeout), "{nat:?} {kind:?} to {to}");
            }
        }
    }
}

#[test]
fn only_the_endpoint_that_was_sent_to_may_answer_through_a_cone() {
    let test = "only_the_endpoint_that_was_sent_to_may_answer_through_a_cone";
    let Some(lab) = behind(test, Nat::Cone) else { return };
    let _echo = echo_everywhere(&lab);
    let mapped = mapping(&lab, 40_000, "s2-h1");
    let to = Kind::Udp(mapped.port());
    let stranger = Probe::new(lab.host("s3-h1").unwrap(), mapped.ip(), to).deadline(SILENCE).ask();
    assert_eq!(stranger, Err(Failure::Timeout));
    // From the endpoint itself it arrives: the socket is closed by now, and its host says so.
    lab.host("s1-h1").unwrap().run(|| ()).unwrap();
    let known = lab.host("s2-h1").unwrap();
    drop(_echo);
    let friend = Probe { source_port: PORT, ..Probe::new(known, mapped.ip(), to).deadline(PATIENCE) };
    assert_eq!(friend.ask(), Err(Failure::Refused));
}
