//! What iperf3 reports as JSON.

use anyhow::{Context, Result, anyhow, bail};
use serde_json::Value;

/// A TCP run as the receiver saw it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Tcp {
    /// Goodput in Gb/s, both directions together.
    pub(crate) gbps: f64,
    /// Payload received in GB, both directions together.
    pub(crate) gigabytes: f64,
    /// Segments sent again.
    pub(crate) retransmits: f64,
}

/// A UDP run as the receiver saw it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Udp {
    /// Datagrams delivered, thousands a second.
    pub(crate) delivered_kpps: f64,
    /// Datagrams offered, thousands a second.
    pub(crate) offered_kpps: f64,
    /// Datagrams lost, in percent of those offered.
    pub(crate) loss: f64,
}

fn report(text: &str) -> Result<Value> {
    let report: Value = serde_json::from_str(text).context("iperf3 gave no JSON")?;
    match report.get("error").and_then(Value::as_str) {
        Some(error) => bail!("iperf3: {error}"),
        None => Ok(report),
    }
}

fn number(report: &Value, path: &str) -> Result<f64> {
    report.pointer(path).and_then(Value::as_f64).ok_or_else(|| anyhow!("iperf3 reports no {path}"))
}

/// Reads a TCP run, `--bidir` or not.
pub(crate) fn tcp(text: &str) -> Result<Tcp> {
    let report = report(text)?;
    let mut sum = Tcp { gbps: 0.0, gigabytes: 0.0, retransmits: 0.0 };
    for direction in ["", "_bidir_reverse"] {
        if direction.is_empty() || report.pointer(&format!("/end/sum_received{direction}")).is_some() {
            sum.gbps += number(&report, &format!("/end/sum_received{direction}/bits_per_second"))? / 1e9;
            sum.gigabytes += number(&report, &format!("/end/sum_received{direction}/bytes"))? / 1e9;
            sum.retransmits +=
                number(&report, &format!("/end/sum_sent{direction}/retransmits")).unwrap_or(0.0);
        }
    }
    if sum.gigabytes <= 0.0 {
        bail!("iperf3: nothing was received");
    }
    Ok(sum)
}

/// Reads a UDP run.
pub(crate) fn udp(text: &str) -> Result<Udp> {
    let report = report(text)?;
    let of = |name: &str| number(&report, &format!("/end/sum/{name}"));
    let (packets, lost, seconds) = (of("packets")?, of("lost_packets")?, of("seconds")?);
    if packets <= lost || seconds <= 0.0 {
        bail!("iperf3: nothing was received");
    }
    Ok(Udp {
        delivered_kpps: (packets - lost) / seconds / 1e3,
        offered_kpps: packets / seconds / 1e3,
        loss: 100.0 * lost / packets,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_direction_and_two_are_read_as_received() {
        let one = r#"{"end": {"sum_sent": {"bits_per_second": 9e9, "bytes": 9, "retransmits": 3},
                              "sum_received": {"bits_per_second": 2e9, "bytes": 750000000}}}"#;
        assert_eq!(tcp(one).unwrap(), Tcp { gbps: 2.0, gigabytes: 0.75, retransmits: 3.0 });
        let two = r#"{"end": {"sum_sent": {"retransmits": 3}, "sum_received": {"bits_per_second": 2e9, "bytes": 1e9},
            "sum_sent_bidir_reverse": {"retransmits": 4},
            "sum_received_bidir_reverse": {"bits_per_second": 1e9, "bytes": 5e8}}}"#;
        assert_eq!(tcp(two).unwrap(), Tcp { gbps: 3.0, gigabytes: 1.5, retransmits: 7.0 });
    }

    #[test]
    fn udp_counts_what_arrived() {
        let text = r#"{"end": {"sum": {"seconds": 2.0, "packets": 100000, "lost_packets": 40000}}}"#;
        assert_eq!(udp(text).unwrap(), Udp { delivered_kpps: 30.0, offered_kpps: 50.0, loss: 40.0 });
    }

    #[test]
    fn failed_runs_are_errors_and_no_zeros() {
        let refused =
            r#"{"start": {}, "end": {}, "error": "unable to connect to server: Connection refused"}"#;
        assert!(tcp(refused).unwrap_err().to_string().contains("Connection refused"));
        assert!(udp(refused).is_err());
        assert!(tcp("").is_err() && tcp("{}").is_err() && udp("[]").is_err());
        let nothing = r#"{"end": {"sum_received": {"bits_per_second": 0, "bytes": 0}}}"#;
        assert!(tcp(nothing).is_err());
        assert!(udp(r#"{"end": {"sum": {"seconds": 2, "packets": 7, "lost_packets": 7}}}"#).is_err());
    }
}
