//! What becomes one record, and what holds when there is too much.

use proptest::prelude::*;

use super::packet::tests::v4;
use super::*;

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + seconds).unwrap()
}

fn tcp(source_port: u16, port: u16) -> Vec<u8> {
    v4(6, &[], 0, &[source_port.to_be_bytes(), port.to_be_bytes()].concat())
}

fn note(log: &mut FlowLog, seconds: i64, prefix: &str, packet: &[u8]) {
    log.note(at(seconds), &Logged { prefix: prefix.as_bytes(), packet, ..Logged::default() });
}

fn small(flows: usize, rules: usize) -> FlowLog {
    FlowLog::new(Limits { flows, rules, ..Limits::default() })
}

fn ports(record: &Record) -> Option<Detail> {
    record.flow.map(|flow| flow.detail)
}

#[test]
fn packets_of_a_flow_are_one_record_with_the_first_source_port() {
    let mut log = FlowLog::default();
    note(&mut log, 0, "v1|D|I|abc", &tcp(40_000, 443));
    note(&mut log, 2, "v1|D|I|abc", &tcp(40_001, 443));
    note(&mut log, 5, "v1|D|I|abc", &tcp(39_999, 443));
    let records = log.drain(at(10));
    let [record] = records.as_slice() else { panic!("{records:?}") };
    assert_eq!((record.first, record.last, record.count), (at(0), at(5), 3));
    assert_eq!((record.decision, record.direction), (Decision::Denied, Direction::Ingress));
    assert_eq!(record.id, "abc");
    assert_eq!(record.flow, Head::read(&tcp(40_000, 443)));
}

#[test]
fn rule_verdict_direction_addresses_protocol_and_port_tell_flows_apart() {
    let mut log = FlowLog::default();
    let mut other = tcp(1, 443);
    other[15] = 8;
    for prefix in ["v1|D|I|abc", "v1|D|I|abd", "v1|A|I|abc", "v1|D|E|abc"] {
        note(&mut log, 0, prefix, &tcp(1, 443));
    }
    for packet in [tcp(1, 444), v4(17, &[], 0, &[0, 1, 1, 0xbb]), v4(6, &[], 1, &[]), other] {
        note(&mut log, 0, "v1|D|I|abc", &packet);
    }
    assert_eq!(log.flush().len(), 8);
}

#[test]
fn icmp_is_told_apart_by_type_alone() {
    let mut log = FlowLog::default();
    for payload in [[3, 1], [3, 13], [8, 0]] {
        note(&mut log, 0, "v1|A|E|abc", &v4(1, &[], 0, &payload));
    }
    let records = log.flush();
    let told: Vec<_> = records.iter().map(|record| (ports(record), record.count)).collect();
    let icmp = |kind, code| Some(Detail::Icmp { kind, code });
    assert_eq!(told, [(icmp(3, 1), 2), (icmp(8, 0), 1)]);
}

#[test]
fn a_window_begins_with_its_first_packet_and_is_told_when_it_closed() {
    let mut log = FlowLog::default();
    assert_eq!(log.due(), None);
    assert_eq!(log.drain(at(0)), []);
    note(&mut log, 3, "v1|D|I|abc", &tcp(1, 1));
    note(&mut log, 9, "v1|D|I|abc", &tcp(1, 2));
    assert_eq!(log.due(), Some(at(13)));
    assert_eq!(log.drain(at(12)), []);
    assert_eq!(log.drain(at(13)).len(), 2);
    assert_eq!(log.due(), None);
    note(&mut log, 20, "v1|D|I|abc", &tcp(1, 1));
    assert_eq!(log.due(), Some(at(30)));
}

#[test]
fn a_clock_that_was_set_back_closes_the_window_by_its_new_time() {
    let mut log = FlowLog::default();
    note(&mut log, 3600, "v1|D|I|abc", &tcp(1, 1));
    note(&mut log, 0, "v1|D|I|abc", &tcp(1, 1));
    assert_eq!(log.due(), Some(at(10)));
    let records = log.drain(at(10));
    assert_eq!((records[0].first, records[0].last), (at(0), at(3600)));
}

#[test]
fn time_without_end_overflows_nothing() {
    let mut log = FlowLog::new(Limits { window: Duration::MAX, ..Limits::default() });
    log.note(Timestamp::MAX, &Logged { prefix: b"v1|D|I|abc", ..Logged::default() });
    assert_eq!(log.due(), Some(Timestamp::MAX));
}

#[test]
fn foreign_prefixes_are_counted_and_open_no_window() {
    let mut log = FlowLog::default();
    note(&mut log, 0, "DROP ", &tcp(1, 1));
    note(&mut log, 0, "", &[]);
    assert_eq!((log.foreign(), log.due(), log.flush()), (2, None, vec![]));
}

#[test]
fn a_port_scan_is_counted_beyond_the_limit_and_told_apart_below_it() {
    let mut log = small(100, 10);
    for port in 0..=u16::MAX {
        note(&mut log, 0, "v1|D|I|abc", &tcp(7, port));
    }
    note(&mut log, 1, "v1|D|I|abc", &tcp(7, 0));
    let records = log.drain(at(10));
    assert_eq!(records.len(), 101);
    assert_eq!((records[0].count, ports(&records[0])), (2, Head::read(&tcp(7, 0)).map(|head| head.detail)));
    let total = records.last().unwrap();
    assert_eq!((total.flow, total.id.as_str(), total.count), (None, "abc", 65_536 - 100));
    note(&mut log, 20, "v1|D|I|abc", &tcp(7, 5));
    assert!(log.flush()[0].flow.is_some(), "a new window has room");
}

#[test]
fn what_is_no_ip_packet_is_counted_by_rule() {
    let mut log = FlowLog::default();
    note(&mut log, 0, "v1|D|T|abc", &[]);
    note(&mut log, 1, "v1|D|T|abc", &[0x45, 0]);
    let records = log.flush();
    assert_eq!((records[0].flow, records[0].count, records[0].direction), (None, 2, Direction::Tunnel));
}

#[test]
fn rules_beyond_all_limits_are_counted_together() {
    let mut log = small(0, 1);
    note(&mut log, 0, "v1|D|I|abc", &tcp(1, 1));
    note(&mut log, 0, "v1|D|I|abd", &tcp(1, 1));
    note(&mut log, 0, "v1|D|I|abc", &tcp(1, 1));
    assert_eq!((log.uncounted(), log.flush()[0].count), (1, 2));
}

proptest! {
    #[test]
    fn no_packet_is_lost_and_nothing_grows_beyond_the_limits(
        flows in 0..6_usize,
        rules in 0..3_usize,
        packets in prop::collection::vec((0..5_usize, 0..4_u16, 0..30_i64, any::<bool>()), 0..200),
    ) {
        let mut log = small(flows, rules);
        let prefixes = ["v1|D|I|a", "v1|U|I|a", "v1|D|E|b", "v1|A|T|c", "other"];
        let mut told = 0;
        let mut drained = |records: Vec<Record>| {
            assert!(records.len() <= flows + rules);
            assert!(records.iter().all(|record| record.first <= record.last));
            told += records.iter().map(|record| record.count).sum::<u64>();
        };
        for &(prefix, port, seconds, whole) in &packets {
            let packet = tcp(port, port);
            note(&mut log, seconds, prefixes[prefix], if whole { &packet } else { &packet[..10] });
            drained(log.drain(at(seconds)));
        }
        drained(log.flush());
        prop_assert_eq!(told + log.foreign() + log.uncounted(), packets.len() as u64);
    }

    #[test]
    fn any_bytes_are_noted(
        prefix in prop_oneof![Just(b"v1|D|I|abc".to_vec()), prop::collection::vec(any::<u8>(), 0..80)],
        packet in prop::collection::vec(any::<u8>(), 0..96),
    ) {
        let mut log = FlowLog::default();
        log.note(at(0), &Logged { prefix: &prefix, packet: &packet, ..Logged::default() });
        prop_assert_eq!(log.flush().len() as u64 + log.foreign(), 1);
    }
}
