use std::time::Duration;

use netlab::LabSpec;
use netlab::flow::{self, FlowSpec};
use netlab::probe::Kind;

use crate::{PORT, build, echo_everywhere, v4, v6, wait_until};

#[test]
fn a_thousand_packets_a_second_lose_none() {
    let Some(lab) = build("a_thousand_packets_a_second_lose_none", &LabSpec::grid(2, 1, 1).routed_pods())
    else {
        return;
    };
    let _echo = echo_everywhere(&lab);
    let (a, b) = (lab.pod("s1-h1-p1").unwrap(), lab.pod("s2-h1-p1").unwrap());
    for (to, kind) in [(v4(b.addresses()), Kind::Udp(PORT)), (v6(b.addresses()), Kind::Icmp)] {
        let flow = flow::start(a, FlowSpec { to, kind, rate: 1000, payload: b"flow".to_vec() }).unwrap();
        wait_until("1000 requests", || flow.snapshot().sent >= 1000);
        let report = flow.stop(Duration::from_secs(2)).unwrap();
        assert_eq!((report.lost, report.duplicates, report.send_errors), (0, 0, 0), "{kind:?} {report:?}");
        assert!(report.elapsed < Duration::from_millis(2000), "{report:?}");
        assert!(report.max_gap < Duration::from_millis(500), "{report:?}");
    }
}

#[test]
fn an_outage_shows_as_loss_and_gap() {
    let Some(lab) = build("an_outage_shows_as_loss_and_gap", &LabSpec::grid(2, 1, 0)) else { return };
    let _echo = echo_everywhere(&lab);
    let (a, b) = (lab.host("s1-h1").unwrap(), lab.host("s2-h1").unwrap());
    let spec = FlowSpec { to: v4(b.addresses()), kind: Kind::Udp(PORT), rate: 1000, payload: Vec::new() };
    let flow = flow::start(a, spec).unwrap();
    wait_until("first answers", || flow.snapshot().received >= 100);
    let cut = b.link().cut().unwrap();
    let lost = |n| move |report: flow::FlowReport| report.lost >= n;
    wait_until("300 lost", || lost(300)(flow.snapshot()));
    b.link().restore(cut).unwrap();
    let before = flow.snapshot().received;
    wait_until("answers again", || flow.snapshot().received >= before + 100);
    let report = flow.stop(Duration::from_millis(500)).unwrap();
    assert!(report.lost >= 200 && report.max_gap >= Duration::from_millis(200), "{report:?}");
    assert_eq!(report.sent, report.received + report.lost);
}
