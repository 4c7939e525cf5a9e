use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use super::*;
use crate::features::Features;
use crate::sys::udp::control::tests::sent;

/// What was to be sent in one message: to where, from where, and the datagrams' first bytes and lengths.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Sent {
    to: SocketAddr,
    local: Option<IpAddr>,
    whole: bool,
    datagrams: Vec<(u8, usize)>,
}

/// The kernel's part: takes the messages until one is answered with an error, as sendmmsg does.
struct Kernel<F> {
    answer: F,
    taken: Vec<Sent>,
    calls: usize,
}

impl<F: FnMut(&Sent) -> Result<(), i32>> Kernel<F> {
    fn new(answer: F) -> Self {
        Self { answer, taken: Vec::new(), calls: 0 }
    }

    fn take(&mut self, headers: &[libc::mmsghdr]) -> io::Result<usize> {
        self.calls += 1;
        assert!(self.calls < 10_000, "it goes round in circles");
        for (i, header) in headers.iter().enumerate() {
            let message = read(header);
            match (self.answer)(&message) {
                Ok(()) => self.taken.push(message),
                Err(code) if i == 0 => return Err(io::Error::from_raw_os_error(code)),
                Err(_) => return Ok(i),
            }
        }
        Ok(headers.len())
    }

    fn send(&mut self, batch: &mut SendBatch, sockets: &UdpPair, now: Instant) -> SendReport {
        let report = batch.send_through(sockets, now, |_, headers| self.take(headers));
        assert!(batch.is_empty());
        report
    }

    fn shape(&self) -> Vec<(bool, usize)> {
        self.taken.iter().map(|message| (message.whole, message.datagrams.len())).collect()
    }
}

fn read(header: &libc::mmsghdr) -> Sent {
    let header = &header.msg_hdr;
    // SAFETY: the header was made by `prepare` and what it points to still lives.
    let (to, bytes) = unsafe {
        let vector = *header.msg_iov;
        let bytes = std::slice::from_raw_parts(vector.iov_base.cast::<u8>(), vector.iov_len);
        (address::take(&*header.msg_name.cast::<Storage>()).unwrap(), bytes)
    };
    let (local, segment) = sent(header);
    let segment_or_all = segment.map_or(bytes.len().max(1), usize::from);
    let mut datagrams: Vec<_> = bytes.chunks(segment_or_all).map(|chunk| (chunk[0], chunk.len())).collect();
    if bytes.is_empty() {
        datagrams.push((0, 0));
    }
    Sent { to, local, whole: segment.is_some(), datagrams }
}

fn sockets() -> UdpPair {
    UdpPair::bind(0, 0, Features::ALL).unwrap()
}

fn v4(n: u8) -> Endpoint {
    Endpoint::from(SocketAddr::from(([192, 0, 2, n], 1)))
}

fn v6(n: u16) -> Endpoint {
    Endpoint::from(SocketAddr::from((Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, n), 1)))
}

fn push(batch: &mut SendBatch, to: &Endpoint, mark: u8, length: usize) {
    batch.space(length).fill(mark);
    batch.push(to, length);
}

#[test]
fn a_run_is_one_message_and_the_rest_are_messages_of_their_own() {
    let (sockets, mut batch) = (sockets(), SendBatch::new());
    for (mark, (to, length)) in
        [(v4(1), 9), (v4(1), 9), (v4(1), 5), (v4(2), 9), (v6(1), 7), (v6(1), 7), (v4(1), 0)]
            .iter()
            .enumerate()
    {
        push(&mut batch, to, mark as u8, *length);
    }
    let mut kernel = Kernel::new(|_| Ok(()));
    assert_eq!(kernel.send(&mut batch, &sockets, Instant::now()), SendReport::default());
    let message = |to: Endpoint, whole, datagrams: &[(u8, usize)]| Sent {
        to: to.remote,
        local: None,
        whole,
        datagrams: datagrams.to_vec(),
    };
    let expected = [
        message(v4(1), true, &[(0, 9), (1, 9), (2, 5)]),
        message(v4(2), false, &[(3, 9)]),
        message(v4(1), false, &[(0, 0)]),
        message(v6(1), true, &[(4, 7), (5, 7)]),
    ];
    assert_eq!(kernel.taken, expected);
    assert_eq!(kernel.calls, 2, "one for each family");
}

#[test]
fn without_gso_each_datagram_is_a_message_in_as_few_calls_as_can_be() {
    let sockets = UdpPair::bind(0, 0, Features::without("udp-gso").unwrap()).unwrap();
    let mut batch = SendBatch::new();
    for mark in 0..150 {
        push(&mut batch, &v4(1), mark, 100);
    }
    let mut kernel = Kernel::new(|_| Ok(()));
    assert_eq!(kernel.send(&mut batch, &sockets, Instant::now()), SendReport::default());
    assert_eq!((kernel.taken.len(), kernel.calls), (150, 2));
    assert!(
        kernel.taken.iter().enumerate().all(|(i, sent)| !sent.whole && sent.datagrams == [(i as u8, 100)])
    );
}

#[test]
fn a_destination_with_a_small_mtu_gets_single_datagrams_for_a_minute_and_others_do_not() {
    let (sockets, mut batch, start) = (sockets(), SendBatch::new(), Instant::now());
    let small = v4(1).remote;
    let mut kernel = Kernel::new(|message: &Sent| {
        let too_big = message.whole && message.to == small && message.datagrams[0].1 > 1000;
        if too_big { Err(libc::EMSGSIZE) } else { Ok(()) }
    });
    let fill = |batch: &mut SendBatch, length| {
        for (mark, to) in [v4(1), v4(1), v4(1), v4(2), v4(2)].iter().enumerate() {
            push(batch, to, mark as u8, length);
        }
    };
    let singles = [(false, 1), (false, 1), (false, 1), (true, 2)];

    fill(&mut batch, 1400);
    let report = kernel.send(&mut batch, &sockets, start);
    assert_eq!(report, SendReport { gso_refused: true, ..SendReport::default() });
    assert_eq!(kernel.shape(), singles);
    assert_eq!(kernel.calls, 2);
    let marks: Vec<_> = kernel.taken.iter().flat_map(|sent| &sent.datagrams).map(|(mark, _)| *mark).collect();
    assert_eq!(marks, [0, 1, 2, 3, 4], "in order");

    // It is not tried again, except with smaller datagrams.
    (kernel.taken, kernel.calls) = (Vec::new(), 0);
    fill(&mut batch, 1400);
    assert_eq!(kernel.send(&mut batch, &sockets, start + Duration::from_secs(59)), SendReport::default());
    assert_eq!((kernel.shape(), kernel.calls), (singles.to_vec(), 1));
    kernel.taken.clear();
    fill(&mut batch, 900);
    kernel.send(&mut batch, &sockets, start + Duration::from_secs(59));
    assert_eq!(kernel.shape(), [(true, 3), (true, 2)]);

    // The path may have changed.
    kernel.taken.clear();
    fill(&mut batch, 1400);
    assert!(kernel.send(&mut batch, &sockets, start + Duration::from_secs(60)).gso_refused);
    assert_eq!(kernel.shape(), singles);
    assert!(sockets.features().udp_gso);
}

#[test]
fn an_invalid_argument_is_the_destinations_too_and_holds_for_all_sizes() {
    let (sockets, mut batch, now) = (sockets(), SendBatch::new(), Instant::now());
    let mut kernel = Kernel::new(|sent: &Sent| if sent.whole { Err(libc::EINVAL) } else { Ok(()) });
    for length in [1400, 1400] {
        push(&mut batch, &v4(1), 0, length);
    }
    assert!(kernel.send(&mut batch, &sockets, now).gso_refused);
    for length in [90, 90] {
        push(&mut batch, &v4(1), 0, length);
    }
    assert_eq!(kernel.send(&mut batch, &sockets, now), SendReport::default());
    assert_eq!(kernel.shape(), [(false, 1); 4]);
    assert!(sockets.features().udp_gso);
}

#[test]
fn a_socket_that_cannot_split_is_asked_no_more_and_the_other_still_is() {
    let (sockets, mut batch, now) = (sockets(), SendBatch::new(), Instant::now());
    let mut kernel =
        Kernel::new(|sent: &Sent| if sent.whole && sent.to.is_ipv4() { Err(libc::EIO) } else { Ok(()) });
    for to in [v4(1), v4(1), v4(2), v4(2), v6(1), v6(1)] {
        push(&mut batch, &to, 0, 50);
    }
    let report = kernel.send(&mut batch, &sockets, now);
    assert_eq!(report, SendReport { gso_refused: true, ..SendReport::default() });
    assert_eq!(kernel.shape(), [(false, 1), (false, 1), (false, 1), (false, 1), (true, 2)]);
    assert_eq!(kernel.calls, 3);
    assert!(!sockets.features().udp_gso);
    assert!(!sockets.socket(false).unwrap().has_gso() && sockets.socket(true).unwrap().has_gso());
    // A single datagram that fails so is only a failure.
    let mut broken = Kernel::new(|_: &Sent| Err(libc::EIO));
    push(&mut batch, &v6(1), 0, 50);
    let report = broken.send(&mut batch, &sockets, now);
    assert_eq!(report, SendReport { failed: 1, ..SendReport::default() });
    assert!(sockets.socket(true).unwrap().has_gso());
}

#[test]
fn a_full_socket_costs_its_own_family_only() {
    for full_family in [4, 6] {
        let (sockets, mut batch) = (sockets(), SendBatch::new());
        let mut taken = 0;
        let mut kernel = Kernel::new(|sent: &Sent| {
            if sent.to.is_ipv4() != (full_family == 4) {
                return Ok(());
            }
            taken += 1;
            if taken == 1 { Ok(()) } else { Err(libc::EAGAIN) }
        });
        for mark in 0..4 {
            for to in [v4(1), v4(1), v6(1), v6(1)] {
                push(&mut batch, &to, mark, 50);
            }
        }
        let report = kernel.send(&mut batch, &sockets, Instant::now());
        assert_eq!(report, SendReport { failed: 6, ..SendReport::default() });
        let (v4, v6): (Vec<_>, Vec<_>) = kernel.taken.iter().partition(|sent| sent.to.is_ipv4());
        let expected = if full_family == 4 { (1, 4) } else { (4, 1) };
        assert_eq!((v4.len(), v6.len()), expected);
        assert!(kernel.calls <= 4, "a full socket is waited for once: {} calls", kernel.calls);
    }
}

#[test]
fn a_socket_can_become_full_in_the_middle_of_a_run_that_leaves_one_by_one() {
    let sockets = UdpPair::bind(0, 0, Features::NONE).unwrap();
    let (mut batch, mut taken) = (SendBatch::new(), 0);
    let mut kernel = Kernel::new(|_: &Sent| {
        taken += 1;
        if taken <= 3 { Ok(()) } else { Err(libc::EAGAIN) }
    });
    for to in [v6(9), v4(1), v4(1), v4(1), v4(1), v4(1), v4(2)] {
        push(&mut batch, &to, 0, 50);
    }
    let report = kernel.send(&mut batch, &sockets, Instant::now());
    assert_eq!(report, SendReport { failed: 4, ..SendReport::default() });
}

#[test]
fn full_queues_and_interrupts_cost_nothing_but_what_they_hit() {
    let (sockets, mut batch, mut calls) = (sockets(), SendBatch::new(), 0);
    let mut kernel = Kernel::new(|sent: &Sent| {
        calls += 1;
        match (calls, sent.datagrams[0].0) {
            (1, _) => Err(libc::EINTR),
            (_, 1) => Err(libc::ENOBUFS),
            (_, 3) => Err(libc::EPERM),
            _ => Ok(()),
        }
    });
    for (mark, to) in [(0, v4(1)), (1, v4(2)), (1, v4(2)), (2, v4(1)), (3, v6(1)), (4, v6(2))] {
        push(&mut batch, &to, mark, 50);
    }
    let report = kernel.send(&mut batch, &sockets, Instant::now());
    assert_eq!(report, SendReport { failed: 3, ..SendReport::default() });
    let marks: Vec<_> = kernel.taken.iter().map(|sent| sent.datagrams[0].0).collect();
    assert_eq!(marks, [0, 2, 4]);
}

#[test]
fn a_lost_source_is_found_out_once_for_runs_and_single_datagrams() {
    let (sockets, mut batch, now) = (sockets(), SendBatch::new(), Instant::now());
    let (lost, good) = (IpAddr::from([203, 0, 113, 1]), IpAddr::from([198, 51, 100, 1]));
    let from = |local, to| Endpoint { local: Some(local), ..to };
    let mut kernel =
        Kernel::new(|sent: &Sent| if sent.local == Some(lost) { Err(libc::EINVAL) } else { Ok(()) });
    for to in [from(good, v4(1)), from(lost, v4(1)), from(lost, v4(1)), from(lost, v4(2)), from(good, v4(2))]
    {
        push(&mut batch, &to, 0, 50);
    }
    let report = kernel.send(&mut batch, &sockets, now);
    assert_eq!(report, SendReport { lost_addresses: vec![lost], ..SendReport::default() });
    let found: Vec<_> = kernel.taken.iter().map(|sent| (sent.local, sent.datagrams.len())).collect();
    assert_eq!(found, [(Some(good), 1), (None, 2), (None, 1), (Some(good), 1)]);
    assert_eq!(kernel.calls, 4, "the second datagram by the lost address is sent without it at once");
}

#[test]
fn a_lost_source_and_a_refused_run_at_once_lose_nothing() {
    for refused in [libc::EINVAL, libc::EMSGSIZE, libc::EIO] {
        let (sockets, mut batch, now) = (sockets(), SendBatch::new(), Instant::now());
        let lost = IpAddr::from([203, 0, 113, 1]);
        let mut kernel = Kernel::new(|sent: &Sent| match (sent.local, sent.whole) {
            (Some(_), _) => Err(libc::EINVAL),
            (None, true) => Err(refused),
            (None, false) => Ok(()),
        });
        for mark in 0..3 {
            push(&mut batch, &Endpoint { local: Some(lost), ..v4(1) }, mark, 50);
        }
        let report = kernel.send(&mut batch, &sockets, now);
        assert_eq!(report, SendReport { failed: 0, lost_addresses: vec![lost], gso_refused: true });
        let marks: Vec<_> =
            kernel.taken.iter().flat_map(|sent| &sent.datagrams).map(|(mark, _)| *mark).collect();
        assert_eq!(marks, [0, 1, 2]);
    }
}

#[test]
fn whatever_the_kernel_answers_each_datagram_is_sent_or_failed_and_order_holds() {
    use proptest::prelude::*;
    let errors = [
        libc::EINTR,
        libc::EAGAIN,
        libc::EINVAL,
        libc::EMSGSIZE,
        libc::EIO,
        libc::ENOBUFS,
        libc::ENETUNREACH,
        libc::EPERM,
    ];
    let datagram = (0u8..4, any::<bool>(), prop_oneof![Just(0usize), Just(50), Just(51)]);
    let answers = prop::collection::vec(prop_oneof![3 => Just(0usize), 1 => 1usize..=8], 1..60);
    proptest!(|(datagrams in prop::collection::vec(datagram, 0..150), answers in answers)| {
        let (sockets, mut batch, mut next) = (sockets(), SendBatch::new(), 0);
        let mut kernel = Kernel::new(|_: &Sent| {
            next += 1;
            // No error comes for ever.
            match answers.get(next % (answers.len() * 2)).copied().unwrap_or(0) {
                0 => Ok(()),
                n => Err(errors[n - 1]),
            }
        });
        for (i, (to, local, length)) in datagrams.iter().enumerate() {
            let to = if *to < 2 { v4(*to) } else { v6((*to).into()) };
            let ours: IpAddr = match to.remote {
                SocketAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
                SocketAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
            };
            push(&mut batch, &Endpoint { local: local.then_some(ours), ..to }, i as u8, *length);
        }
        let report = kernel.send(&mut batch, &sockets, Instant::now());
        let sent: usize = kernel.taken.iter().map(|sent| sent.datagrams.len()).sum();
        prop_assert_eq!(sent + report.failed, datagrams.len());
        for to in [v4(0), v4(1), v6(2), v6(3)] {
            let of = kernel.taken.iter().filter(|sent| sent.to == to.remote);
            let marks: Vec<_> =
                of.flat_map(|sent| &sent.datagrams).filter(|(_, length)| *length > 0).map(|(mark, _)| *mark).collect();
            prop_assert!(marks.is_sorted(), "{:?}", marks);
        }
    });
}

#[test]
fn an_address_that_is_not_ours_is_named_once_and_the_datagrams_leave_all_the_same() {
    let sockets = sockets();
    let remote = SocketAddr::from((Ipv4Addr::LOCALHOST, sockets.port()));
    let (lost, good) = (IpAddr::from([203, 0, 113, 1]), IpAddr::from([127, 0, 0, 1]));
    let mut batch = SendBatch::new();
    for local in [lost, lost, good, lost] {
        batch.push(&Endpoint { remote, local: Some(local) }, 10);
    }
    let report = batch.send(&sockets, Instant::now());
    assert_eq!(report, SendReport { lost_addresses: vec![lost], ..SendReport::default() });
}
