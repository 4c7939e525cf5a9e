//! Round-trip times from ping(8) of iputils.

use anyhow::{Result, anyhow};

/// Round-trip times of a series, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Rtt {
    /// Mean.
    pub(crate) avg: f64,
    /// Largest.
    pub(crate) max: f64,
    /// Requests without an answer, in percent.
    pub(crate) loss: f64,
}

/// Reads the summary that `ping -q` ends with.
pub(crate) fn parse(text: &str) -> Result<Rtt> {
    let read = || {
        let times = text.lines().find(|line| line.starts_with("rtt "))?.split(" = ").nth(1)?;
        let mut times = times.trim_end_matches(" ms").split('/').map(|time| time.parse::<f64>().ok());
        let (_, avg, max) = (times.next()??, times.next()??, times.next()??);
        let loss = text.split(", ").find_map(|part| part.split_once("% packet loss"))?.0.parse().ok()?;
        Some(Rtt { avg, max, loss })
    };
    read().ok_or_else(|| anyhow!("no round-trip times in {:?}", text.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_is_read_and_silence_is_an_error() {
        let text = "PING 10.0.0.2 (10.0.0.2) 56(84) bytes of data.\n\n--- 10.0.0.2 ping statistics ---\n\
                    200 packets transmitted, 199 received, 0.5% packet loss, time 1104ms\n\
                    rtt min/avg/max/mdev = 0.031/0.105/2.250/0.020 ms, pipe 2\n";
        assert_eq!(parse(text).unwrap(), Rtt { avg: 0.105, max: 2.25, loss: 0.5 });
        let silence = "10 packets transmitted, 0 received, 100% packet loss, time 1ms\n";
        assert!(parse(silence).is_err());
    }
}
