use std::time::Duration;

use netlab::flow::{self, FlowSpec};
use netlab::probe::{Failure, Kind, Probe};
use netlab::{Direction, Error, LabSpec, Protocol, Rule};

use crate::{PATIENCE, PORT, SILENCE, build, echo_everywhere, udp, v4, v6};

#[test]
fn a_blocked_udp_port_drops_until_it_is_unblocked() {
    let Some(lab) = build("a_blocked_udp_port_drops_until_it_is_unblocked", &LabSpec::grid(2, 1, 0)) else {
        return;
    };
    let _echo = echo_everywhere(&lab);
    let (a, b, router) = (lab.host("s1-h1").unwrap(), lab.host("s2-h1").unwrap(), lab.site("s1").unwrap());
    for to in b.addresses() {
        assert!(udp(a, *to).ask().is_ok());
        let block = router.block(Rule::udp_port(PORT)).unwrap();
        let other = router.block(Rule::tcp_port(1)).unwrap();
        assert_eq!(udp(a, *to).deadline(SILENCE).ask(), Err(Failure::Timeout));
        assert_eq!(router.blocked_packets(block).unwrap(), 1);
        assert!(Probe::new(a, *to, Kind::Tcp(PORT)).deadline(PATIENCE).ask().is_ok());
        assert!(Probe::new(a, *to, Kind::Icmp).deadline(PATIENCE).ask().is_ok());
        router.unblock(block).unwrap();
        assert!(udp(a, *to).ask().is_ok());
        assert!(matches!(router.unblock(block), Err(Error::UnknownBlock { .. })));
        assert_eq!(router.blocked_packets(other).unwrap(), 0);
    }
}

#[test]
fn blocks_narrow_to_addresses_directions_and_protocols() {
    let test = "blocks_narrow_to_addresses_directions_and_protocols";
    let Some(lab) = build(test, &LabSpec::grid(2, 2, 0)) else { return };
    let _echo = echo_everywhere(&lab);
    let a = lab.host("s1-h1").unwrap();
    let (b, c) = (lab.host("s2-h1").unwrap(), lab.host("s2-h2").unwrap());
    let router = lab.site("s2").unwrap();
    let silent = |to| udp(a, to).deadline(SILENCE).ask() == Err(Failure::Timeout);
    let block = router.block(Rule::any().to_address(v4(b.addresses()))).unwrap();
    assert!(silent(v4(b.addresses())));
    assert!(udp(a, v4(c.addresses())).ask().is_ok());
    assert!(udp(a, v6(b.addresses())).ask().is_ok());
    router.unblock(block).unwrap();
    // A host's own border, one way: requests come in, answers do not leave.
    let block = b.block(Rule::udp_port(PORT).direction(Direction::Out)).unwrap();
    assert!(silent(v6(b.addresses())));
    assert_eq!(b.blocked_packets(block).unwrap(), 1);
    b.unblock(block).unwrap();
    let block = b.block(Rule::protocol(Protocol::Icmp)).unwrap();
    for to in b.addresses() {
        assert_eq!(Probe::new(a, *to, Kind::Icmp).deadline(SILENCE).ask(), Err(Failure::Timeout));
        assert!(udp(a, *to).ask().is_ok());
    }
    b.unblock(block).unwrap();
}

#[test]
fn other_tables_are_left_alone() {
    let Some(lab) = build("other_tables_are_left_alone", &LabSpec::grid(1, 1, 0)) else { return };
    let host = lab.host("s1-h1").unwrap();
    let nft = |args: &[&str]| host.command("nft").args(args.iter().copied()).output(PATIENCE).unwrap();
    assert!(nft(&["add", "table", "inet", "mine"]).success());
    let block = host.block(Rule::any()).unwrap();
    host.unblock(block).unwrap();
    assert!(nft(&["list", "tables"]).stdout_text().contains("table inet mine"));
}

#[test]
fn a_cut_link_loses_everything_and_a_lossy_one_its_share() {
    let test = "a_cut_link_loses_everything_and_a_lossy_one_its_share";
    let Some(lab) = build(test, &LabSpec::grid(2, 1, 0)) else { return };
    let _echo = echo_everywhere(&lab);
    let (a, b) = (lab.host("s1-h1").unwrap(), lab.host("s2-h1").unwrap());
    let link = b.link();
    let cut = link.cut().unwrap();
    assert_eq!(udp(a, v4(b.addresses())).deadline(SILENCE).ask(), Err(Failure::Timeout));
    link.restore(cut).unwrap();
    assert!(udp(a, v6(b.addresses())).ask().is_ok());

    link.set_loss(0.3).unwrap();
    let spec = FlowSpec { to: v4(b.addresses()), kind: Kind::Udp(PORT), rate: 2000, payload: vec![0; 32] };
    let flow = flow::start(a, spec.clone()).unwrap();
    crate::wait_until("2000 requests", || flow.snapshot().sent >= 2000);
    let report = flow.stop(SILENCE).unwrap();
    // Both directions lose: 1 - 0.7 * 0.7 = 51 %.
    let share = report.lost as f64 / report.sent as f64;
    assert!((0.42..0.60).contains(&share), "{report:?}");

    link.set_loss(0.0).unwrap();
    let flow = flow::start(a, spec).unwrap();
    crate::wait_until("500 requests", || flow.snapshot().sent >= 500);
    assert_eq!(flow.stop(Duration::from_secs(2)).unwrap().lost, 0);
}
