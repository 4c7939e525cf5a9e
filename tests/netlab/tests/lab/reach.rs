use std::time::Instant;

use netlab::probe::{Failure, Kind, Probe, batch};
use netlab::{Families, HostSpec, LabSpec, PodSpec, SiteSpec};

use crate::{PATIENCE, PORT, SILENCE, build, echo_everywhere, udp, v4, v6};

#[test]
fn pods_of_two_sites_reach_each_other_over_routers() {
    let spec = LabSpec::grid(2, 1, 1).routed_pods();
    let Some(lab) = build("pods_of_two_sites_reach_each_other_over_routers", &spec) else { return };
    let _echo = echo_everywhere(&lab);
    let (a, b) = (lab.pod("s1-h1-p1").unwrap(), lab.pod("s2-h1-p1").unwrap());
    for to in b.addresses() {
        for kind in [Kind::Icmp, Kind::Udp(PORT), Kind::Tcp(PORT)] {
            let answer = Probe::new(a, *to, kind).payload("over the routers").deadline(PATIENCE).ask();
            assert!(answer.is_ok(), "{kind:?} to {to}: {answer:?}");
        }
    }
    let ping = a.command("ping").args(["-c1", "-W2"]).arg(v6(b.addresses()).to_string());
    assert!(ping.output(PATIENCE).unwrap().success());
}

#[test]
fn every_pod_of_a_large_lab_reaches_every_other_in_both_families() {
    let test = "every_pod_of_a_large_lab_reaches_every_other_in_both_families";
    let started = Instant::now();
    let Some(lab) = build(test, &LabSpec::grid(4, 3, 2).routed_pods()) else { return };
    let built = started.elapsed();
    let _echo = echo_everywhere(&lab);
    let mut probes = Vec::new();
    for from in lab.pods() {
        for to in lab.pods().iter().filter(|to| to.name() != from.name()).flat_map(|to| to.addresses()) {
            for kind in [Kind::Icmp, Kind::Udp(PORT), Kind::Tcp(PORT)] {
                probes.push(Probe::new(from, *to, kind).payload("matrix").deadline(PATIENCE));
            }
        }
    }
    assert_eq!(probes.len(), 24 * 23 * 2 * 3);
    let started = Instant::now();
    let failed = batch(&probes).iter().filter(|outcome| outcome.is_err()).count();
    let asked = started.elapsed();
    drop(probes);
    let started = Instant::now();
    drop(lab);
    eprintln!(
        "4x3x2: built in {built:?}, {} probes in {asked:?}, dropped in {:?}",
        24 * 23 * 6,
        started.elapsed()
    );
    assert_eq!(failed, 0);
    assert!(built.as_secs() < 3, "{built:?}");
    assert!(started.elapsed().as_secs() < 1);
}

#[test]
fn a_probe_says_why_it_failed() {
    let Some(lab) = build("a_probe_says_why_it_failed", &LabSpec::grid(2, 1, 0)) else { return };
    let (a, b) = (lab.host("s1-h1").unwrap(), lab.host("s2-h1").unwrap());
    for to in b.addresses() {
        for kind in [Kind::Udp(9), Kind::Tcp(9)] {
            assert_eq!(
                Probe::new(a, *to, kind).deadline(PATIENCE).ask(),
                Err(Failure::Refused),
                "{kind:?} {to}"
            );
        }
    }
    for nowhere in ["192.0.2.1", "2001:db8:dead::1"] {
        let outcome = Probe::new(a, nowhere.parse().unwrap(), Kind::Icmp).deadline(PATIENCE).ask();
        assert!(matches!(outcome, Err(Failure::Unreachable(_))), "{outcome:?}");
    }
    let block = b.block(netlab::Rule::any()).unwrap();
    let outcome = Probe::new(a, v4(b.addresses()), Kind::Tcp(9)).deadline(SILENCE).ask();
    assert_eq!(outcome, Err(Failure::Timeout));
    b.unblock(block).unwrap();
    b.block(netlab::Rule::any()).unwrap();
    let outcome = udp(b, v4(a.addresses())).ask();
    assert!(matches!(outcome, Err(Failure::Local(_))), "{outcome:?}");
}

#[test]
fn pods_come_and_go_while_the_lab_runs() {
    let Some(mut lab) = build("pods_come_and_go_while_the_lab_runs", &LabSpec::grid(2, 1, 1).routed_pods())
    else {
        return;
    };
    let to = lab.add_pod("s2-h1", &PodSpec::new("late").mtu(1400)).unwrap().addresses().to_vec();
    let from = lab.pod("s1-h1-p1").unwrap().clone();
    for address in &to {
        assert!(Probe::new(&from, *address, Kind::Icmp).deadline(PATIENCE).ask().is_ok(), "{address}");
    }
    assert!(lab.add_pod("s2-h1", &PodSpec::new("late")).is_err());
    let late = lab.pod("late").unwrap().clone();
    let daemon = late.command("sleep").arg("1000").spawn().unwrap();
    lab.remove_pod("late").unwrap();
    assert!(daemon.wait(PATIENCE).unwrap().is_some());
    assert!(late.run(|| ()).is_err());
    let outcome = Probe::new(&from, v4(&to), Kind::Icmp).deadline(PATIENCE).ask();
    assert!(matches!(outcome, Err(Failure::Unreachable(_))), "{outcome:?}");
    assert!(lab.pod("late").is_err());
}

#[test]
fn a_site_speaks_only_its_families() {
    let site = |name: &str, families| {
        SiteSpec::new(name)
            .families(families)
            .host(HostSpec::new(format!("{name}-1")).pod(PodSpec::new(format!("{name}-pod"))))
    };
    let spec = LabSpec::new()
        .site(site("four", Families::V4))
        .site(site("six", Families::V6))
        .site(site("both", Families::Dual));
    let Some(lab) = build("a_site_speaks_only_its_families", &spec) else { return };
    let host = |name| lab.host(name).unwrap();
    assert_eq!(host("four-1").addresses().len(), 1);
    assert!(lab.pod("six-pod").unwrap().addresses().iter().all(|address| address.is_ipv6()));
    let both = host("both-1");
    for other in ["four-1", "six-1"] {
        let to = host(other).addresses()[0];
        assert!(Probe::new(both, to, Kind::Icmp).deadline(PATIENCE).ask().is_ok(), "{to}");
    }
    let outcome = Probe::new(host("four-1"), v6(both.addresses()), Kind::Icmp).ask();
    assert!(matches!(outcome, Err(Failure::Unreachable(_))), "{outcome:?}");
}

#[test]
fn dual_stack_pods_live_on_an_underlay_of_one_family() {
    let host = |n: u8| HostSpec {
        pod_prefixes: vec![
            format!("10.{n}.0.0/24").parse().unwrap(),
            format!("fd00:{n}::/64").parse().unwrap(),
        ],
        ..HostSpec::new(format!("h{n}"))
            .pod(PodSpec::new(format!("p{n}a")))
            .pod(PodSpec::new(format!("p{n}b")))
    };
    let spec = LabSpec::new().site(SiteSpec::new("four").families(Families::V4).host(host(1)));
    let Some(lab) = build("dual_stack_pods_live_on_an_underlay_of_one_family", &spec) else { return };
    let (a, b) = (lab.pod("p1a").unwrap(), lab.pod("p1b").unwrap());
    assert_eq!(b.addresses().len(), 2);
    for to in b.addresses() {
        let answer = Probe::new(a, *to, Kind::Icmp).deadline(PATIENCE).ask();
        assert!(answer.is_ok(), "through the host to {to}: {answer:?}");
    }
}
