//! What processes use, from `/proc` (proc(5)).

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result, anyhow};

/// One process of `/proc/PID/stat`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stat {
    parent: u32,
    // Own threads and children that were waited for, in clock ticks.
    ticks: u64,
}

// The name, in parentheses, may hold anything, even parentheses and blanks.
fn parse_stat(text: &str) -> Option<Stat> {
    let rest = &text[text.rfind(')')? + 1..];
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
    Some(Stat {
        parent: u32::try_from(number(4)?).ok()?,
        ticks: number(14)? + number(15)? + number(16)? + number(17)?,
    })
}

/// CPU seconds, user and system, of all threads of these processes and all their descendants so far.
pub(crate) fn cpu_seconds(roots: &[u32]) -> Result<f64> {
    let mut processes = BTreeMap::new();
    for entry in fs::read_dir("/proc").context("read /proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        // It may have ended meanwhile.
        let Ok(text) = fs::read_to_string(entry.path().join("stat")) else { continue };
        processes.insert(pid, parse_stat(&text).ok_or_else(|| anyhow!("unreadable /proc/{pid}/stat"))?);
    }
    let ticks = total_ticks(&processes, roots)?;
    Ok(ticks as f64 / TICKS_PER_SECOND)
}

// USER_HZ, which is 100 on every architecture that Linux runs Rust programs on.
const TICKS_PER_SECOND: f64 = 100.0;

fn total_ticks(processes: &BTreeMap<u32, Stat>, roots: &[u32]) -> Result<u64> {
    let mut sum = 0;
    let mut waiting = roots.to_vec();
    while let Some(pid) = waiting.pop() {
        let stat = processes.get(&pid).ok_or_else(|| anyhow!("process {pid} has ended"))?;
        sum += stat.ticks;
        waiting.extend(processes.iter().filter(|(_, child)| child.parent == pid).map(|(pid, _)| *pid));
    }
    Ok(sum)
}

/// CPU seconds of the threads that a process has now, to the nanosecond where the kernel counts so (CONFIG_SCHED_INFO).
pub(crate) fn fine_cpu_seconds(pid: u32) -> Result<f64> {
    let mut nanoseconds = 0;
    for thread in fs::read_dir(format!("/proc/{pid}/task"))
        .with_context(|| format!("process {pid} has ended"))?
        .flatten()
    {
        match fs::read_to_string(thread.path().join("schedstat")).ok().and_then(|text| parse_schedstat(&text))
        {
            Some(ran) => nanoseconds += ran,
            None => return cpu_seconds(&[pid]),
        }
    }
    Ok(nanoseconds as f64 / 1e9)
}

fn parse_schedstat(text: &str) -> Option<u64> {
    text.split_whitespace().next()?.parse().ok()
}

/// Resident memory of a process in MiB.
pub(crate) fn resident_mib(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let kib = parse_field(&text, "VmRSS:").ok_or_else(|| anyhow!("no VmRSS in {path}"))?;
    Ok(kib as f64 / 1024.0)
}

fn parse_field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace().next()?.parse().ok()
}

/// UDP counters of a process's network namespace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct UdpCounters {
    /// Datagrams handed to a socket's reader.
    pub(crate) received: u64,
    /// Datagrams dropped, nearly always for want of room in the socket's buffer.
    pub(crate) dropped: u64,
}

/// UDP over IPv4 counters of the network namespace that this process is in.
pub(crate) fn udp_counters(pid: u32) -> Result<UdpCounters> {
    let path = format!("/proc/{pid}/net/snmp");
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    parse_snmp(&text).ok_or_else(|| anyhow!("no Udp counters in {path}"))
}

fn parse_snmp(text: &str) -> Option<UdpCounters> {
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Udp: "));
    let (names, values) = (lines.next()?.split_whitespace(), lines.next()?.split_whitespace());
    let table: BTreeMap<&str, u64> = names.zip(values.map(|value| value.parse().unwrap_or(0))).collect();
    Some(UdpCounters { received: *table.get("InDatagrams")?, dropped: *table.get("InErrors")? })
}

/// Whether somebody listens on this TCP port in the network namespace of this process.
pub(crate) fn listens(pid: u32, port: u16) -> bool {
    ["tcp", "tcp6"].iter().any(|table| {
        fs::read_to_string(format!("/proc/{pid}/net/{table}")).is_ok_and(|text| has_listener(&text, port))
    })
}

fn has_listener(table: &str, port: u16) -> bool {
    const LISTEN: &str = "0A";
    let port = format!(":{port:04X}");
    table.lines().skip(1).any(|line| {
        let mut fields = line.split_whitespace().skip(1);
        fields.next().is_some_and(|local| local.ends_with(&port)) && fields.nth(1) == Some(LISTEN)
    })
}

/// Whether somebody listens on a Unix socket whose path ends so, in the network namespace of this process.
pub(crate) fn serves(pid: u32, path: &str) -> bool {
    fs::read_to_string(format!("/proc/{pid}/net/unix")).is_ok_and(|text| has_unix_listener(&text, path))
}

// Num RefCount Protocol Flags Type St Inode Path
fn has_unix_listener(table: &str, path: &str) -> bool {
    const ACCEPTS: u32 = 1 << 16;
    table.lines().skip(1).any(|line| {
        let flags = line.split_whitespace().nth(3).and_then(|flags| u32::from_str_radix(flags, 16).ok());
        line.ends_with(path) && flags.is_some_and(|flags| flags & ACCEPTS != 0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAT: &str = "42 (a (b) c) S 7 42 42 0 -1 4194560 1 2 3 4 100 20 3 1 20 0 5 0 12345 1 2 3";

    #[test]
    fn a_process_with_parentheses_in_its_name_is_read() {
        assert_eq!(parse_stat(STAT), Some(Stat { parent: 7, ticks: 124 }));
        assert_eq!(parse_stat("42 (a"), None);
        assert_eq!(parse_stat("42 (a) S 7"), None);
    }

    #[test]
    fn descendants_count_and_strangers_do_not() {
        let process = |parent, ticks| Stat { parent, ticks };
        let processes = BTreeMap::from([
            (1, process(0, 1000)),
            (5, process(1, 10)),
            (6, process(5, 3)),
            (7, process(6, 2)),
        ]);
        assert_eq!(total_ticks(&processes, &[5]).unwrap(), 15);
        assert_eq!(total_ticks(&processes, &[7, 6]).unwrap(), 2 + 5);
        assert!(total_ticks(&processes, &[9]).is_err(), "one that died has no CPU time to report");
    }

    #[test]
    fn counters_are_found_by_name() {
        let text = "Ip: A\nIp: 1\nUdp: InDatagrams NoPorts InErrors OutDatagrams\nUdp: 10 2 3 4\nUdpLite: X\nUdpLite: 1\n";
        assert_eq!(parse_snmp(text), Some(UdpCounters { received: 10, dropped: 3 }));
        assert_eq!(parse_snmp("Udp: InDatagrams\n"), None);
    }

    #[test]
    fn only_listening_sockets_of_the_port_count() {
        let table = "  sl  local_address rem_address   st\n\
                     0: 00000000:1451 00000000:0000 0A 0\n\
                     1: 0100007F:1452 0100007F:9999 01 0\n";
        assert!(has_listener(table, 0x1451));
        assert!(!has_listener(table, 0x1452) && !has_listener(table, 0x9999));
        let table = "Num RefCount Protocol Flags Type St Inode Path\n\
                     0: 00000002 00000000 00010000 0001 01 7 /run/wireguard/wg0.sock\n\
                     0: 00000002 00000000 00000000 0001 01 8 /run/wireguard/wg1.sock\n";
        assert!(has_unix_listener(table, "/wireguard/wg0.sock"));
        assert!(!has_unix_listener(table, "/wireguard/wg1.sock"), "bound, but not listening yet");
    }
}
