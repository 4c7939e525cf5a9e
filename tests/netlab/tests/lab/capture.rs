use netlab::flow::{self, FlowSpec};
use netlab::probe::{Kind, Probe};
use netlab::{CaptureSpec, LabSpec};

use crate::{PATIENCE, PORT, build, echo_everywhere, udp, v4, wait_until};

#[test]
fn a_capture_sees_a_marker_sent_in_clear_and_counts() {
    let test = "a_capture_sees_a_marker_sent_in_clear_and_counts";
    let Some(lab) = build(test, &LabSpec::grid(2, 1, 0)) else { return };
    let _echo = echo_everywhere(&lab);
    let (a, b) = (lab.host("s1-h1").unwrap(), lab.host("s2-h1").unwrap());
    let file = lab.shared_dir().join("uplink.pcap");
    let spec = CaptureSpec::new().marker("secret-7f3a").marker("never sent").pcap(&file);
    let capture = lab.site("s1").unwrap().uplink().capture(spec).unwrap();
    let mut payload = vec![0x20; 1000];
    payload.extend(b"secret-7f3a");
    assert!(udp(a, v4(b.addresses())).payload(payload).ask().is_ok());
    assert!(Probe::new(a, v4(b.addresses()), Kind::Icmp).deadline(PATIENCE).ask().is_ok());
    assert_eq!(capture.stats().unwrap().marker_frames, [2, 0], "request and echo");
    let report = capture.stop().unwrap();
    let stats = &report.stats;
    assert_eq!(stats.packets, stats.arp + stats.icmp + stats.wireguard + stats.vxlan + stats.other);
    assert!(stats.icmp >= 2 && stats.other >= 2 && stats.wireguard == 0, "{stats:?}");
    assert_eq!(stats.kernel_drops, 0);
    assert!(!report.is_clean());
    let first = report.first_marked_frame.unwrap();
    assert!(first.ends_with(b"secret-7f3a"), "whole frames, not only their beginnings");
    let written = std::fs::read(&file).unwrap();
    assert_eq!(written.len() as u64, 24 + 16 * stats.packets + stats.bytes);
}

#[test]
fn tunnel_ports_are_classified_and_absent_markers_leave_it_clean() {
    let test = "tunnel_ports_are_classified_and_absent_markers_leave_it_clean";
    let Some(lab) = build(test, &LabSpec::grid(2, 1, 0)) else { return };
    let _echo = echo_everywhere(&lab);
    let (a, b) = (lab.host("s1-h1").unwrap(), lab.host("s2-h1").unwrap());
    let spec = CaptureSpec {
        wireguard_ports: vec![PORT],
        vxlan_ports: vec![9],
        ..CaptureSpec::new().marker("absent")
    };
    let capture = b.capture("eth0", spec).unwrap();
    for to in b.addresses() {
        assert!(udp(a, *to).ask().is_ok());
        let _ = Probe::new(a, *to, Kind::Udp(9)).deadline(PATIENCE).ask();
    }
    let report = capture.stop().unwrap();
    assert_eq!((report.stats.wireguard, report.stats.vxlan), (4, 2), "{report:?}");
    assert!(report.is_clean());
}

#[test]
fn watched_prefixes_are_seen_in_clear_only() {
    let Some(lab) = build("watched_prefixes_are_seen_in_clear_only", &LabSpec::grid(2, 1, 1).routed_pods())
    else {
        return;
    };
    let (a, b) = (lab.pod("s1-h1-p1").unwrap(), lab.pod("s2-h1-p1").unwrap());
    let prefixes = lab.host("s2-h1").unwrap().pod_prefixes();
    let spec = prefixes.iter().fold(CaptureSpec::new(), |spec, prefix| spec.watch(*prefix));
    let file = lab.shared_dir().join("watched.pcap");
    let capture = lab.site("s2").unwrap().uplink().capture(spec.pcap(&file)).unwrap();
    let hosts = (lab.host("s1-h1").unwrap(), lab.host("s2-h1").unwrap());
    for to in hosts.1.addresses() {
        assert!(Probe::new(hosts.0, *to, Kind::Icmp).deadline(PATIENCE).ask().is_ok());
    }
    let stats = capture.stats().unwrap();
    assert_eq!(stats.watched, 0, "{stats:?}");
    let written = std::fs::metadata(&file).unwrap().len();
    assert_eq!(written, 24 + 16 * stats.packets + stats.bytes, "the file holds all that was counted");
    for to in b.addresses() {
        assert!(Probe::new(a, *to, Kind::Icmp).deadline(PATIENCE).ask().is_ok());
    }
    let report = capture.stop().unwrap();
    assert_eq!(report.stats.watched, 4, "{report:?}");
    assert!(!report.is_clean());
}

#[test]
fn a_busy_interface_loses_no_frame() {
    let Some(lab) = build("a_busy_interface_loses_no_frame", &LabSpec::grid(2, 1, 0)) else { return };
    let _echo = echo_everywhere(&lab);
    let (a, b) = (lab.host("s1-h1").unwrap(), lab.host("s2-h1").unwrap());
    let capture = b.capture("eth0", CaptureSpec::new().marker("busy")).unwrap();
    let payload = [vec![0; 1200], b"busy".to_vec()].concat();
    let spec = FlowSpec { to: v4(b.addresses()), kind: Kind::Udp(PORT), rate: 10_000, payload };
    let flow = flow::start(a, spec).unwrap();
    wait_until("5000 requests", || flow.snapshot().sent >= 5000);
    let sent = flow.stop(PATIENCE).unwrap();
    let stats = capture.stop().unwrap().stats;
    assert_eq!(stats.kernel_drops, 0);
    // Requests and echoes; what a busy machine's other queues lost may have passed here or not.
    let seen = stats.marker_frames[0];
    assert!((2 * sent.received..=2 * sent.sent).contains(&seen), "{seen} of {sent:?}");
}

#[test]
fn an_interface_that_is_not_there_is_an_error() {
    let Some(lab) = build("an_interface_that_is_not_there_is_an_error", &LabSpec::grid(1, 1, 0)) else {
        return;
    };
    let error = lab.host("s1-h1").unwrap().capture("wg9", CaptureSpec::new()).unwrap_err().to_string();
    assert!(error.contains("wg9") && error.contains("s1-h1"), "{error}");
}
