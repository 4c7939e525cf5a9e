//! What is measured, by which name, in which unit.

use crate::measure::Measurement;

/// One number of a measurement.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Metric {
    /// Its name in results.
    pub(crate) id: &'static str,
    /// Its title in tables.
    pub(crate) title: &'static str,
    /// Its unit.
    pub(crate) unit: &'static str,
    /// Whether more is better.
    pub(crate) higher_is_better: bool,
    /// Whether a ratio to another program's number means anything.
    pub(crate) compared: bool,
}

const fn more(id: &'static str, title: &'static str, unit: &'static str) -> Metric {
    Metric { id, title, unit, higher_is_better: true, compared: true }
}

const fn less(id: &'static str, title: &'static str, unit: &'static str) -> Metric {
    Metric { id, title, unit, higher_is_better: false, compared: true }
}

// How a run came about: for reading other numbers, not for comparing.
const fn aside(id: &'static str, title: &'static str, unit: &'static str) -> Metric {
    Metric { id, title, unit, higher_is_better: false, compared: false }
}

/// All metrics, in the order of tables.
pub(crate) const METRICS: &[Metric] = &[
    more("tcp1_gbps", "TCP, one stream", "Gb/s"),
    less("tcp1_cpu_s_per_gb", "TCP, one stream, CPU", "s/GB"),
    aside("tcp1_retransmits", "TCP, one stream, retransmits", "segments"),
    more("tcp4_gbps", "TCP, four streams", "Gb/s"),
    more("reverse_gbps", "TCP, reverse", "Gb/s"),
    more("bidir_gbps", "TCP, both ways, sum", "Gb/s"),
    more("udp64_kpps", "UDP 64 B flood, delivered", "kpps"),
    aside("udp64_loss", "UDP 64 B flood, lost", "%"),
    less("udp64_cpu_us", "UDP 64 B at a fixed rate, CPU", "µs/packet"),
    aside("udp64_offered_kpps", "UDP 64 B at a fixed rate, offered", "kpps"),
    more("udp1200_kpps", "UDP 1200 B flood, delivered", "kpps"),
    aside("udp1200_loss", "UDP 1200 B flood, lost", "%"),
    less("ping_avg_ms", "ping, idle, mean", "ms"),
    less("ping_max_ms", "ping, idle, largest", "ms"),
    less("ping_loaded_avg_ms", "ping under TCP, mean", "ms"),
    less("ping_loaded_max_ms", "ping under TCP, largest", "ms"),
    less("rss_idle_mib", "memory, idle", "MiB"),
    less("rss_loaded_mib", "memory, after load", "MiB"),
    less("peers1_rss_mib", "memory, 1 peer", "MiB"),
    less("peers100_rss_mib", "memory, 100 peers", "MiB"),
    less("peers1000_rss_mib", "memory, 1,000 peers", "MiB"),
    less("peers5000_rss_mib", "memory, 5,000 peers", "MiB"),
    less("peers1_idle_cpu", "idle CPU, 1 peer", "% of a core"),
    less("peers100_idle_cpu", "idle CPU, 100 peers", "% of a core"),
    less("peers1000_idle_cpu", "idle CPU, 1,000 peers", "% of a core"),
    less("peers5000_idle_cpu", "idle CPU, 5,000 peers", "% of a core"),
    more("receive1_kpps", "1 peer sends, delivered", "kpps"),
    aside("receive1_offered_kpps", "1 peer sends, offered", "kpps"),
    less("receive1_cpu_us", "1 peer sends, CPU", "µs/packet"),
    less("receive1_apart_cpu_us", "1 peer sends, runs switched off, CPU", "µs/packet"),
    more("receive_many_kpps", "many peers send, delivered", "kpps"),
    aside("receive_many_offered_kpps", "many peers send, offered", "kpps"),
    less("receive_many_cpu_us", "many peers send, CPU", "µs/packet"),
    more("send1_kpps", "to 1 peer, delivered", "kpps"),
    aside("send1_offered_kpps", "to 1 peer, offered", "kpps"),
    less("send1_cpu_us", "to 1 peer, CPU", "µs/packet"),
    less("send1_apart_cpu_us", "to 1 peer, runs switched off, CPU", "µs/packet"),
    more("send_many_kpps", "to many peers, delivered", "kpps"),
    aside("send_many_offered_kpps", "to many peers, offered", "kpps"),
    less("send_many_cpu_us", "to many peers, CPU", "µs/packet"),
    less("handshake_cpu_ms", "CPU of a handshake", "ms"),
    more("calm_gbps", "TCP, undisturbed", "Gb/s"),
    more("flood_gbps", "TCP under a handshake flood", "Gb/s"),
    more("flood_ratio", "TCP under a handshake flood : undisturbed", "ratio"),
    aside("flood_sent_kpps", "flood, sent", "kpps"),
    aside("flood_dropped_kpps", "flood, dropped at the device's socket", "kpps"),
    aside("flood_sender_cpu", "flood, CPU of its sender", "% of a core"),
    more("replay_gbps", "TCP under a replay", "Gb/s"),
    more("replay_ratio", "TCP under a replay : undisturbed", "ratio"),
    aside("replay_sent_kpps", "replay, sent", "kpps"),
    aside("replay_dropped_kpps", "replay, dropped at the device's socket", "kpps"),
    aside("replay_sender_cpu", "replay, CPU of its sender", "% of a core"),
];

/// Where a suite's samples come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Suite {
    /// Its name in results and on the command line.
    pub(crate) name: &'static str,
    /// What it is about.
    pub(crate) title: &'static str,
}

/// All suites, in the order of a run.
pub(crate) const SUITES: [Suite; 6] = [
    Suite { name: "v4", title: "IPv4 inside and outside" },
    Suite { name: "v6", title: "IPv6 inside and outside" },
    Suite { name: "mtu1280", title: "IPv4, MTU 1280" },
    Suite { name: "idle-peers", title: "configured peers that are silent" },
    Suite { name: "many-peers", title: "real sessions, one 100-byte packet to or from each in turn" },
    Suite { name: "hostile", title: "TCP beside an attack" },
];

/// What the shorter suites measure, where nothing else is asked for.
pub(crate) const SHORT: [Measurement; 2] = [Measurement::Tcp1, Measurement::Tcp4];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_metric_of_a_measurement_has_a_title_and_no_name_is_used_twice() {
        let ids: BTreeSet<&str> = METRICS.iter().map(|metric| metric.id).collect();
        assert_eq!(ids.len(), METRICS.len());
        for measurement in Measurement::ALL {
            for id in measurement.metrics() {
                assert!(ids.contains(id), "{id}");
            }
        }
    }
}
