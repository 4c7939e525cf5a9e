//! The flow log on the real kernel: rules log, and what comes out is what went through.

// Clippy's leave for tests covers test functions only, not what they share.
#![allow(clippy::unwrap_used)]

use std::io::Write as _;
use std::net::{IpAddr, UdpSocket};
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use mesh_policy::flowlog::{Decision, Detail, Direction, FlowLog, Listener, Logged, Record};
use netlab::{Feature, Lab, LabSpec, Namespace, capabilities};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Long enough to be reached only by failure.
const PATIENCE: Duration = Duration::from_secs(10);
const GROUP: u16 = 77;
const BUFFER: u32 = 200_000;

const NEEDED: &[Feature] = &[
    Feature::Privilege,
    Feature::NetNamespaces,
    Feature::MountNamespaces,
    Feature::PidNamespaces,
    Feature::Veth,
    Feature::Nftables,
];

/// A host with two pods, or a loud skip. Where CI is on, that is a failure.
fn lab(test: &str) -> Option<Lab> {
    match capabilities().require(NEEDED) {
        Ok(()) => Some(Lab::build(&LabSpec::grid(1, 1, 2).routed_pods()).unwrap()),
        Err(missing) => {
            // Not by a macro: libtest keeps what those print to itself when a test passes.
            let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {missing}");
            assert!(std::env::var("CI").as_deref() != Ok("true"), "{test} has to run under CI: {missing}");
            None
        }
    }
}

/// Rules of one base chain, of a table of its own.
fn rules(namespace: &Namespace, hook: &str, rules: &[&str]) {
    let rules = rules.join("\n");
    let script =
        format!("table inet test {{ chain c {{\ntype filter hook {hook} priority 0;\n{rules}\n}}\n}}\n");
    let done = namespace.command("nft").args(["-f", "-"]).stdin(script).output(PATIENCE).unwrap();
    assert!(done.success(), "{}", done.stderr_text());
}

fn log(matches: &str, prefix: &str, threshold: u32) -> String {
    format!(r#"{matches} log prefix "{prefix}" group {GROUP} snaplen 96 queue-threshold {threshold}"#)
}

fn listen(namespace: &Namespace, receive_buffer: u32) -> std::io::Result<Listener> {
    namespace.run(move || Listener::new(GROUP, receive_buffer)).unwrap()
}

/// Sends datagrams, one to each port, and returns the port they came from.
fn send(from: &Namespace, to: IpAddr, ports: &'static [u16]) -> u16 {
    let sent = from.run(move || {
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = UdpSocket::bind(any)?;
        for port in ports {
            socket.send_to(
                b"a payload that is longer than what is copied of it: ".repeat(3).as_slice(),
                (to, *port),
            )?;
        }
        socket.local_addr().map(|address| address.port())
    });
    sent.unwrap().unwrap()
}

/// Takes packets into the log until there are as many as expected.
fn gather(listener: &mut Listener, log: &mut FlowLog, expected: usize) {
    let deadline = Instant::now() + PATIENCE;
    let mut came = 0;
    while came < expected {
        let left = deadline.saturating_duration_since(Instant::now());
        assert!(!left.is_zero(), "{came} of {expected} packets within {PATIENCE:?}");
        let timeout = PollTimeout::try_from(left).unwrap();
        poll(&mut [PollFd::new(listener.as_fd(), PollFlags::POLLIN)], timeout).unwrap();
        let take = |logged: Logged<'_>| {
            assert!(logged.packet.len() <= 96);
            came += 1;
            log.note(Timestamp::now(), &logged);
        };
        listener.receive(take).unwrap();
    }
    assert_eq!(came, expected);
}

fn address(addresses: &[IpAddr], six: bool) -> IpAddr {
    *addresses.iter().find(|address| address.is_ipv6() == six).unwrap()
}

fn destination_port(record: &Record) -> u16 {
    match record.flow.unwrap().detail {
        Detail::Ports { destination, .. } => destination,
        other => panic!("{other:?}"),
    }
}

#[test]
fn packets_that_a_host_forwards_come_out_as_records() {
    let Some(lab) = lab("packets_that_a_host_forwards_come_out_as_records") else { return };
    let host = &lab.hosts()[0];
    let (from, to) = (&lab.pods()[0], &lab.pods()[1]);
    let mut listener = listen(host, BUFFER).unwrap();
    let abc = log("udp dport { 4000, 4001 }", "v1|D|I|abc", 1);
    let other = log("udp dport 4002", "someone else's: ", 1);
    rules(host, "forward", &[&format!("{abc} drop"), &other]);
    for six in [false, true] {
        let (source, destination) = (address(from.addresses(), six), address(to.addresses(), six));
        let mut log = FlowLog::default();
        let began = Timestamp::now();
        let port = send(from, destination, &[4000, 4001, 4000, 4002, 4000]);
        gather(&mut listener, &mut log, 5);
        assert_eq!(log.foreign(), 1);
        assert!(log.drain(began).is_empty() && log.due().unwrap() > began);
        let records = log.flush();
        let told: Vec<_> = records.iter().map(|record| (destination_port(record), record.count)).collect();
        assert_eq!(told, [(4000, 3), (4001, 1)]);
        for record in &records {
            let flow = record.flow.unwrap();
            assert_eq!((flow.source, flow.destination, flow.protocol), (source, destination, 17));
            assert_eq!(flow.detail, Detail::Ports { source: port, destination: destination_port(record) });
            assert_eq!((record.decision, record.direction), (Decision::Denied, Direction::Ingress));
            assert_eq!(record.id, "abc");
            assert!(began <= record.first && record.first <= record.last);
        }
    }
    assert_eq!(listener.overruns(), 0);
}

#[test]
fn packets_say_which_interfaces_they_take() {
    let Some(lab) = lab("packets_say_which_interfaces_they_take") else { return };
    let host = &lab.hosts()[0];
    let mut listener = listen(host, BUFFER).unwrap();
    rules(host, "forward", &[&log("udp dport 4000", "v1|A|E|abc", 1)]);
    send(&lab.pods()[0], lab.pods()[1].addresses()[0], &[4000]);
    poll(&mut [PollFd::new(listener.as_fd(), PollFlags::POLLIN)], PollTimeout::from(10_000_u16)).unwrap();
    let mut taken = Vec::new();
    listener.receive(|logged| taken.push((logged.input, logged.output))).unwrap();
    let [(Some(input), Some(output))] = taken.as_slice() else { panic!("{taken:?}") };
    assert!(input != output && *input > 0 && *output > 0);
}

#[test]
fn packets_are_told_soon_also_when_they_are_few() {
    let Some(lab) = lab("packets_are_told_soon_also_when_they_are_few") else { return };
    let pod = &lab.pods()[0];
    let mut listener = listen(pod, BUFFER).unwrap();
    // No threshold of its own: the group's, which three packets do not reach and twenty do.
    let rule = format!(r#"udp dport 4000 log prefix "v1|D|E|abc" group {GROUP}"#);
    rules(pod, "output", &[&rule]);
    let mut log = FlowLog::default();
    let began = Instant::now();
    send(pod, lab.pods()[1].addresses()[0], &[4000; 3]);
    gather(&mut listener, &mut log, 3);
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    send(pod, lab.pods()[1].addresses()[0], &[4000; 20]);
    gather(&mut listener, &mut log, 20);
    assert_eq!(log.flush().iter().map(|record| record.count).sum::<u64>(), 23);
}

#[test]
fn overruns_are_counted_and_the_log_goes_on() {
    let Some(lab) = lab("overruns_are_counted_and_the_log_goes_on") else { return };
    let pod = &lab.pods()[0];
    // The kernel makes the least of it that it allows, which one datagram fills.
    let mut listener = listen(pod, 1).unwrap();
    rules(pod, "output", &[&log("udp dport 4000", "v1|D|E|abc", 1)]);
    // The sender itself writes the log, so all of it is there or lost once it has sent.
    send(pod, lab.pods()[1].addresses()[0], &[4000; 50]);
    let mut came = 0;
    listener.receive(|_| came += 1).unwrap();
    assert!((1..50).contains(&came), "{came}");
    assert_eq!(listener.overruns(), 1);
    let mut log = FlowLog::default();
    send(pod, lab.pods()[1].addresses()[0], &[4000]);
    gather(&mut listener, &mut log, 1);
    assert_eq!((log.flush().len(), listener.overruns()), (1, 1));
}

#[test]
fn a_turn_reads_no_more_than_it_may() {
    let Some(lab) = lab("a_turn_reads_no_more_than_it_may") else { return };
    let pod = &lab.pods()[0];
    let mut listener = listen(pod, BUFFER).unwrap();
    rules(pod, "output", &[&log("udp dport 4000", "v1|D|E|abc", 1)]);
    send(pod, lab.pods()[1].addresses()[0], &[4000; 50]);
    let mut came = 0;
    let mut turns = 0;
    while listener.receive_some(20, |_| came += 1).unwrap() {
        turns += 1;
        assert_eq!(came, 20 * turns, "a datagram for each packet");
    }
    assert_eq!((came, turns), (50, 2));
}

#[test]
fn a_group_has_one_listener_and_is_free_when_that_is_gone() {
    let Some(lab) = lab("a_group_has_one_listener_and_is_free_when_that_is_gone") else { return };
    let pod = &lab.pods()[0];
    let first = listen(pod, BUFFER).unwrap();
    let refused = listen(pod, BUFFER).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::PermissionDenied);
    assert!(listen(&lab.pods()[1], BUFFER).is_ok(), "another network namespace has groups of its own");
    drop(first);
    // The kernel gives the group back behind the close.
    let deadline = Instant::now() + PATIENCE;
    while let Err(error) = listen(pod, BUFFER) {
        assert!(Instant::now() < deadline, "{error}");
        std::thread::yield_now();
    }
}
