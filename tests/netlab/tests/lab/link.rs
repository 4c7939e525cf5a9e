use std::time::{Duration, Instant};

use netlab::probe::{Failure, Kind, Probe};
use netlab::{Error, Feature, LabSpec, Rate};

use crate::{PATIENCE, PORT, SILENCE, build, echo_everywhere, probed, skip, v4};

#[test]
fn a_small_link_mtu_makes_big_unfragmentable_packets_fail() {
    let test = "a_small_link_mtu_makes_big_unfragmentable_packets_fail";
    let Some(lab) = build(test, &LabSpec::grid(2, 1, 0)) else { return };
    let _echo = echo_everywhere(&lab);
    let (a, b) = (lab.host("s1-h1").unwrap(), lab.host("s2-h1").unwrap());
    let uplink = lab.site("s2").unwrap().uplink();
    let ask = |to| {
        Probe {
            dont_fragment: true,
            ..Probe::new(a, to, Kind::Udp(PORT)).payload(vec![7; 1400]).deadline(PATIENCE)
        }
        .ask()
    };
    for to in b.addresses() {
        assert!(ask(*to).is_ok());
        uplink.set_mtu(1300).unwrap();
        assert_eq!(ask(*to), Err(Failure::TooBig));
        uplink.set_mtu(1500).unwrap();
        assert!(ask(*to).is_ok());
    }
    uplink.set_mtu(1300).unwrap();
    // Fragments pass, once each end has learned the path MTU at the price of a packet.
    for to in b.addresses() {
        let probe = Probe::new(a, *to, Kind::Udp(PORT)).payload(vec![7; 1400]).deadline(PATIENCE);
        let answer = probe.retry(Duration::from_millis(50)).ask();
        assert!(answer.is_ok(), "{to}: {answer:?}");
    }
}

#[test]
fn a_pod_has_its_own_mtu() {
    let mut spec = LabSpec::grid(1, 1, 1);
    spec.sites[0].hosts[0].pods[0].mtu = Some(1280);
    let Some(lab) = build("a_pod_has_its_own_mtu", &spec) else { return };
    let pod = lab.pod("s1-h1-p1").unwrap();
    let ask = |length| {
        let probe =
            Probe::new(pod, v4(lab.host("s1-h1").unwrap().addresses()), Kind::Icmp).deadline(PATIENCE);
        Probe { dont_fragment: true, ..probe.payload(vec![0; length]) }.ask()
    };
    assert!(ask(1280 - 28).is_ok());
    assert_eq!(ask(1280 - 27), Err(Failure::TooBig));
}

#[test]
fn a_rate_limits_what_passes_until_it_is_lifted() {
    let test = "a_rate_limits_what_passes_until_it_is_lifted";
    if let Err(missing) = probed().require(&[Feature::Tbf]) {
        return skip(test, &missing.to_string());
    }
    let Some(lab) = build(test, &LabSpec::grid(2, 1, 0)) else { return };
    let _echo = echo_everywhere(&lab);
    let (a, b) = (lab.host("s1-h1").unwrap(), lab.host("s2-h1").unwrap());
    let megabyte = || {
        let started = Instant::now();
        let to = Probe::new(a, v4(b.addresses()), Kind::Tcp(PORT)).payload(vec![1; 1_000_000]);
        to.deadline(Duration::from_secs(10)).ask().unwrap();
        started.elapsed()
    };
    let fast = megabyte();
    a.link().set_rate(Some(Rate::mbit(10))).unwrap();
    let slow = megabyte();
    a.link().set_rate(None).unwrap();
    let again = megabyte();
    eprintln!("1 MB: {fast:?} unlimited, {slow:?} at 10 Mbit/s, {again:?} after");
    // 8 Mbit at 10 Mbit/s; the echo runs beside it on the other direction.
    assert!(slow > Duration::from_millis(700), "{slow:?}");
    assert!(fast < Duration::from_millis(500) && again < Duration::from_millis(500), "{fast:?} {again:?}");
}

#[test]
fn a_delay_delays_or_is_refused_by_name() {
    let Some(lab) = build("a_delay_delays_or_is_refused_by_name", &LabSpec::grid(2, 1, 0)) else { return };
    let (a, b) = (lab.host("s1-h1").unwrap(), lab.host("s2-h1").unwrap());
    match a.link().set_delay(Duration::from_millis(40), Duration::ZERO) {
        Ok(()) => {
            assert!(probed().has(Feature::Netem));
            let answer = Probe::new(a, v4(b.addresses()), Kind::Icmp).deadline(PATIENCE).ask().unwrap();
            assert!(answer.round_trip >= Duration::from_millis(80), "{answer:?}");
        }
        Err(Error::Unsupported { feature, why }) => {
            assert_eq!(feature, Feature::Netem);
            assert!(!probed().has(Feature::Netem));
            assert!(why.contains("CONFIG_NET_SCH_NETEM"), "{why}");
        }
        Err(other) => panic!("{other}"),
    }
    let answer = Probe::new(b, v4(a.addresses()), Kind::Icmp).deadline(PATIENCE).ask();
    assert!(answer.is_ok(), "the link still works: {answer:?}");
    assert!(Probe::new(a, "198.51.100.1".parse().unwrap(), Kind::Icmp).deadline(SILENCE).ask().is_err());
}
