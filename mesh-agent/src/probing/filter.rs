//! What the kernel keeps of all that a raw socket sees: classic BPF
//! (Documentation/networking/filter.rst). Pure.
//!
//! The program wants UDP to our port with a payload that is long enough for a probe, begins as one
//! does, and bears the route id of a peer. Route ids come from the pairs' keys, so that nobody
//! guesses one who has seen no probe of that pair: whatever else arrives takes no place in the
//! queue and wakes nobody.

use mesh_overlay::path::wire::{HEADER, LEAST, MAGIC, RouteId, VERSION};
use socket2::SockFilter;

const LDX_MSH: u16 = 0xb1;
const LD_B_ABS: u16 = 0x30;
const LD_H_ABS: u16 = 0x28;
const LD_W_ABS: u16 = 0x20;
const LD_H_IND: u16 = 0x48;
const LD_W_IND: u16 = 0x40;
const JA: u16 = 0x05;
const JEQ: u16 = 0x15;
const JGE: u16 = 0x35;
const RET: u16 = 0x06;
/// Bytes of a UDP header, and where in it the destination port and the length are.
const UDP: u32 = 8;
const PORT_AT: u32 = 2;
const LENGTH_AT: u32 = 4;
/// The UDP header in what a tap sees of IPv6, and where IP headers name the protocol.
const V6_HEADER: u32 = 40;
const V6_PROTOCOL_AT: u32 = 6;
const V4_PROTOCOL_AT: u32 = 9;
const UDP_PROTOCOL: u32 = 17;
/// Ids that are compared one after the other, at the end of the search.
const LEAF: usize = 16;
/// Beyond so many peers any probe is kept: the kernel takes no longer programs.
const IDS_MOST: usize = 1_000;

/// An instruction: code, jumps where it holds and where not, and a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Step(u16, u8, u8, u32);

/// Keeps probes to a port that bear one of these route ids, which are in order; where there are too
/// many of them, all probes.
pub(super) fn program(port: u16, v6: bool, ids: &[RouteId]) -> Vec<SockFilter> {
    if ids.len() > IDS_MOST {
        return any(port, v6);
    }
    filters(&steps(port, v6, Some(ids)))
}

/// Keeps all probes to a port.
pub(super) fn any(port: u16, v6: bool) -> Vec<SockFilter> {
    filters(&steps(port, v6, None))
}

/// Keeps probes to any port, of what a packet socket sees of an interface: packets with their IP header.
pub(super) fn tapped(v6: bool, ids: &[RouteId]) -> Vec<SockFilter> {
    let ids = (ids.len() <= IDS_MOST).then_some(ids);
    filters(&tap_steps(v6, ids))
}

fn tap_steps(v6: bool, ids: Option<&[RouteId]>) -> Vec<Step> {
    let protocol = if v6 { V6_PROTOCOL_AT } else { V4_PROTOCOL_AT };
    let mut steps = vec![Step(LD_B_ABS, 0, 0, protocol), Step(JEQ, 1, 0, UDP_PROTOCOL), Step(RET, 0, 0, 0)];
    if !v6 {
        steps.push(Step(LDX_MSH, 0, 0, 0));
    }
    probe_steps(v6, if v6 { V6_HEADER } else { 0 }, ids, &mut steps);
    steps
}

fn filters(steps: &[Step]) -> Vec<SockFilter> {
    steps.iter().map(|Step(code, yes, no, number)| SockFilter::new(*code, *yes, *no, *number)).collect()
}

// An IPv4 raw socket's packets begin with their IP header, an IPv6 one's behind it.
fn steps(port: u16, v6: bool, ids: Option<&[RouteId]>) -> Vec<Step> {
    let half = if v6 { LD_H_ABS } else { LD_H_IND };
    let mut steps = Vec::new();
    if !v6 {
        steps.push(Step(LDX_MSH, 0, 0, 0));
    }
    steps.extend([Step(half, 0, 0, PORT_AT), Step(JEQ, 1, 0, u32::from(port)), Step(RET, 0, 0, 0)]);
    probe_steps(v6, 0, ids, &mut steps);
    steps
}

/// Keeps probes. `at`: where the UDP header begins; of IPv4 behind the IP header, whose length is in the index register.
fn probe_steps(v6: bool, at: u32, ids: Option<&[RouteId]>, steps: &mut Vec<Step>) {
    let (half, word) = if v6 { (LD_H_ABS, LD_W_ABS) } else { (LD_H_IND, LD_W_IND) };
    let none = Step(RET, 0, 0, 0);
    let least = LEAST as u32 + UDP;
    let begin = u32::from_be_bytes([MAGIC, VERSION, 0, 0]);
    steps.extend([
        Step(half, 0, 0, at + LENGTH_AT),
        Step(JGE, 1, 0, least),
        none,
        Step(word, 0, 0, at + UDP),
        Step(JEQ, 1, 0, begin),
        none,
    ]);
    match ids {
        None => steps.push(Step(RET, 0, 0, u32::MAX)),
        Some(ids) => {
            // Half of an id tells enough: who has none of it is one in four thousand million.
            let mut firsts: Vec<u32> = ids.iter().map(first).collect();
            firsts.dedup();
            steps.push(Step(word, 0, 0, at + UDP + HEADER as u32));
            search(&firsts, steps);
        }
    }
}

fn first(id: &RouteId) -> u32 {
    u32::from_be_bytes([id[0], id[1], id[2], id[3]])
}

/// Looks for the accumulator among numbers in order.
fn search(numbers: &[u32], steps: &mut Vec<Step>) {
    if numbers.len() > LEAF {
        let (low, high) = numbers.split_at(numbers.len() / 2);
        let at = steps.len();
        steps.extend([Step(JGE, 0, 1, high[0]), Step(JA, 0, 0, 0)]);
        search(low, steps);
        steps[at + 1].3 = (steps.len() - at - 2) as u32;
        search(high, steps);
        return;
    }
    for (index, number) in numbers.iter().enumerate() {
        steps.push(Step(JEQ, (numbers.len() - index) as u8, 0, *number));
    }
    steps.extend([Step(RET, 0, 0, 0), Step(RET, 0, 0, u32::MAX)]);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a program as the kernel does.
    fn keeps(steps: &[Step], packet: &[u8]) -> bool {
        let (mut a, mut x, mut at) = (0u32, 0usize, 0usize);
        let load = |from: usize, length: usize| -> Option<u32> {
            Some(packet.get(from..from + length)?.iter().fold(0, |sum, byte| sum << 8 | u32::from(*byte)))
        };
        loop {
            let Step(code, yes, no, number) = steps[at];
            at += 1;
            let k = number as usize;
            let loaded = match code {
                LDX_MSH => {
                    x = usize::from(packet[k] & 15) * 4;
                    continue;
                }
                LD_B_ABS => load(k, 1),
                LD_H_ABS => load(k, 2),
                LD_W_ABS => load(k, 4),
                LD_H_IND => load(x + k, 2),
                LD_W_IND => load(x + k, 4),
                JA => {
                    at += k;
                    continue;
                }
                JEQ | JGE => {
                    let holds = if code == JEQ { a == number } else { a >= number };
                    at += usize::from(if holds { yes } else { no });
                    continue;
                }
                RET => return number > 0,
                other => panic!("{other:#x}"),
            };
            // What lies behind the end is no packet for us.
            let Some(loaded) = loaded else { return false };
            a = loaded;
        }
    }

    fn packet(v6: bool, port: u16, payload: &[u8]) -> Vec<u8> {
        let mut packet = if v6 { Vec::new() } else { [&[0x46][..], &[0; 23]].concat() };
        for part in [9u16, port, (payload.len() + 8) as u16, 0] {
            packet.extend(part.to_be_bytes());
        }
        packet.extend(payload);
        packet
    }

    fn probe(id: RouteId, length: usize) -> Vec<u8> {
        let mut probe = [&[MAGIC, VERSION, 0, 0][..], &id].concat();
        probe.resize(length, 7);
        probe
    }

    #[test]
    fn only_probes_of_peers_are_kept() {
        for v6 in [false, true] {
            for count in [0u64, 1, 2, 15, 16, 17, 33, 500, IDS_MOST as u64] {
                let mut ids: Vec<RouteId> =
                    (1..=count).map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes()).collect();
                ids.sort_unstable();
                let steps = steps(51820, v6, Some(&ids));
                assert!(steps.len() < 2 * IDS_MOST, "{}", steps.len());
                for id in &ids {
                    assert!(keeps(&steps, &packet(v6, 51820, &probe(*id, LEAST))), "{count} {id:?}");
                    let mut other = *id;
                    other[3] ^= 1;
                    let known = ids.iter().any(|id| first(id) == first(&other));
                    assert_eq!(keeps(&steps, &packet(v6, 51820, &probe(other, LEAST))), known);
                }
                for other in [[0; 8], [0xff; 8]] {
                    assert!(!keeps(&steps, &packet(v6, 51820, &probe(other, LEAST))));
                }
            }
        }
    }

    #[test]
    fn what_is_no_probe_is_not_kept() {
        let id = [5; 8];
        for v6 in [false, true] {
            for steps in [steps(51820, v6, Some(&[id])), steps(51820, v6, None)] {
                let whole = probe(id, LEAST);
                assert!(keeps(&steps, &packet(v6, 51820, &whole)));
                assert!(!keeps(&steps, &packet(v6, 51821, &whole)), "another port");
                assert!(!keeps(&steps, &packet(v6, 51820, &whole[..LEAST - 1])), "too short");
                assert!(!keeps(&steps, &packet(v6, 51820, &[4; LEAST])), "of WireGuard");
                let mut other = whole.clone();
                other[1] = VERSION + 1;
                assert!(!keeps(&steps, &packet(v6, 51820, &other)), "another version");
                assert!(!keeps(&steps, &packet(v6, 51820, &[])), "empty");
            }
        }
    }

    #[test]
    fn a_tap_keeps_probes_alone() {
        let id = [5; 8];
        for v6 in [false, true] {
            let steps = tap_steps(v6, Some(&[id]));
            let tapped = |protocol: u8, payload: &[u8]| {
                let mut packet =
                    if v6 { [&[0x60][..], &[0; 39]].concat() } else { [&[0x45][..], &[0; 19]].concat() };
                packet[if v6 { 6 } else { 9 }] = protocol;
                packet.extend(&packet_of(payload));
                packet
            };
            assert!(keeps(&steps, &tapped(17, &probe(id, LEAST))));
            assert!(!keeps(&steps, &tapped(6, &probe(id, LEAST))), "TCP");
            assert!(!keeps(&steps, &tapped(17, &probe([6; 8], LEAST))), "a stranger's");
            assert!(!keeps(&steps, &tapped(17, &[7; LEAST])), "no probe");
            assert!(!keeps(&steps, &tapped(17, b"")), "empty");
        }
    }

    // A UDP datagram alone.
    fn packet_of(payload: &[u8]) -> Vec<u8> {
        packet(true, 9, payload)
    }

    #[test]
    fn more_peers_than_a_program_holds_are_all_heard() {
        let ids: Vec<RouteId> = (0..2000u64).map(u64::to_be_bytes).collect();
        assert_eq!(program(1, false, &ids).len(), any(1, false).len());
        assert!(program(1, false, &ids[..IDS_MOST]).len() <= 4096);
    }

    #[test]
    fn the_kernel_takes_the_longest_program() {
        let ids: Vec<RouteId> = (0..IDS_MOST as u64).map(|n| (n << 40).to_be_bytes()).collect();
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let socket = socket2::SockRef::from(&socket);
        // Again and again, as peers come and go.
        for v6 in [false, true, false] {
            socket.attach_filter(&program(51820, v6, &ids)).unwrap();
        }
    }
}
