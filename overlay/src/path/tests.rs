use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mesh_keyring::{PrivateKey, PublicKey};

use super::prober::{Prober, Received, Transmit};
use super::wire::{LEAST, Rejected};
use super::{Candidate, Origin, PeerPaths, Rung};

const A: &str = "192.0.2.1:51820";
const B: &str = "192.0.2.2:51820";
const CARRIER: &str = "198.51.100.2:51820";

fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn key(n: u8) -> PrivateKey {
    PrivateKey::from_bytes(&[n; 32]).unwrap()
}

fn direct(address: &str) -> Candidate {
    Candidate { address: at(address), rung: Rung::Direct, origin: Origin::Published, mtu_most: 1500 }
}

// A prober of one peer, which it looks for at one address.
fn prober(own: u8, peer: u8, address: &str, now: Instant) -> Prober {
    let mut prober = Prober::new(key(own), [own; 16]);
    let paths = PeerPaths { candidates: vec![direct(address)], mtu_most: 1500, ..PeerPaths::default() };
    prober.set_peers(
        BTreeMap::from([(key(peer).public(), paths)]),
        |to| !to.ip().to_string().starts_with("10."),
        now,
    );
    prober
}

fn polled(prober: &mut Prober, now: Instant) -> Vec<Transmit> {
    let mut out = Vec::new();
    prober.poll(now, &mut out);
    out
}

fn given(prober: &mut Prober, from: &str, payload: &[u8], now: Instant) -> (Received, Vec<Transmit>) {
    let mut out = Vec::new();
    let came = prober.receive(at(from), &mut payload.to_vec(), now, &mut out);
    (came, out)
}

fn addresses(prober: &Prober, peer: u8, now: Instant) -> Vec<SocketAddr> {
    let key: PublicKey = key(peer).public();
    prober.report(now)[&key].lines.iter().map(|line| line.address).collect()
}

#[test]
fn a_question_is_answered_once_by_something_no_larger() {
    let now = Instant::now();
    let (mut a, mut b) = (prober(1, 2, B, now), prober(2, 1, A, now));
    let question = polled(&mut a, now).remove(0);
    assert_eq!(question.to, at(B));
    let (came, answers) = given(&mut b, A, &question.payload, now);
    assert_eq!((came, answers.len()), (Received::Taken, 1));
    assert_eq!(answers[0].payload.len(), LEAST);
    assert!(answers[0].payload.len() <= question.payload.len());
    assert_eq!(given(&mut b, A, &question.payload, now), (Received::Replayed, Vec::new()));
    // The answer proves the path, and tells how we are seen.
    assert_eq!(given(&mut a, B, &answers[0].payload, now).0, Received::Taken);
    let report = &a.report(now)[&key(2).public()];
    assert_eq!(report.lines[0].seen_as, Some(at(A)));
    assert_eq!(report.carrying.map(|(rung, address, _)| (rung, address)), Some((Rung::Direct, at(B))));
}

#[test]
fn what_comes_back_to_its_sender_or_is_another_pairs_is_nobodys() {
    let now = Instant::now();
    let mut a = prober(1, 2, B, now);
    let question = polled(&mut a, now).remove(0);
    let stranger = (Received::Rejected(Rejected::Stranger), Vec::new());
    assert_eq!(given(&mut a, B, &question.payload, now), stranger);
    assert_eq!(given(&mut prober(3, 1, A, now), A, &question.payload, now), stranger);
    let mut forged = question.payload;
    *forged.last_mut().unwrap() ^= 1;
    let mut b = prober(2, 1, A, now);
    assert_eq!(given(&mut b, A, &forged, now), (Received::Rejected(Rejected::Forged), Vec::new()));
}

// Where an agent sends to that finds a device which sends to `adopted`. Each address of `answering` answers from so many milliseconds on.
fn restarted(adopted: &str, answering: &[(&str, u64)], until: u64) -> Option<SocketAddr> {
    let now = Instant::now();
    let (mut a, mut b) = (Prober::new(key(1), [1; 16]), prober(2, 1, A, now));
    let carrier = Candidate { rung: Rung::Vxlan, ..direct(CARRIER) };
    let paths = PeerPaths { candidates: vec![direct(B), carrier], mtu_most: 1500, ..PeerPaths::default() };
    a.set_peers(BTreeMap::from([(key(2).public(), paths)]), |_| true, now);
    a.adopted(&key(2).public(), at(adopted), now);
    for millis in (0..=until).step_by(50) {
        let moment = now + Duration::from_millis(millis);
        for question in polled(&mut a, moment) {
            let answers = answering.iter().any(|(to, from)| at(to) == question.to && millis >= *from);
            if !answers {
                continue;
            }
            let to = question.to.to_string();
            for answer in given(&mut b, A, &question.payload, moment).1 {
                given(&mut a, &to, &answer.payload, moment);
            }
        }
        assert!(a.wake_at().is_some());
        if let Some((_, address, _)) = a.report(moment)[&key(2).public()].carrying {
            return Some(address);
        }
    }
    None
}

#[test]
fn what_a_device_sends_to_already_goes_before_what_answers_sooner() {
    let (direct, carrier) = (at(B), at(CARRIER));
    assert_eq!(restarted(B, &[(CARRIER, 0), (B, 500)], 2000), Some(direct));
    assert_eq!(restarted(CARRIER, &[(B, 0), (CARRIER, 500)], 2000), Some(carrier));
    // But nobody waits for it for ever.
    assert_eq!(restarted(B, &[(CARRIER, 0)], 800), None);
    assert_eq!(restarted(B, &[(CARRIER, 0)], 1100), Some(carrier));
    assert_eq!(restarted("203.0.113.1:9", &[(CARRIER, 0), (B, 0)], 800), None);
    assert_eq!(restarted("203.0.113.1:9", &[(CARRIER, 0), (B, 0)], 1100), Some(direct));
}

// Where traffic goes to at each moment, when the peer's agent is away for `away` seconds and only `back` answers then.
fn revived(away: u64, back: &[&str]) -> Vec<SocketAddr> {
    let now = Instant::now();
    let (mut a, mut b) = (Prober::new(key(1), [1; 16]), prober(2, 1, A, now));
    let carrier = Candidate { rung: Rung::Vxlan, ..direct(CARRIER) };
    let paths = PeerPaths { candidates: vec![direct(B), carrier], mtu_most: 1500, ..PeerPaths::default() };
    a.set_peers(BTreeMap::from([(key(2).public(), paths)]), |_| true, now);
    let mut used = Vec::new();
    for millis in (0..away + 30_000).step_by(10) {
        let moment = now + Duration::from_millis(millis);
        for question in polled(&mut a, moment) {
            let to = question.to.to_string();
            let answers = millis < 10_000 || (millis >= 10_000 + away && back.contains(&to.as_str()));
            for answer in given(&mut b, A, &question.payload, moment).1.iter().filter(|_| answers) {
                given(&mut a, &to, &answer.payload, moment);
            }
        }
        used.extend(a.report(moment)[&key(2).public()].carrying.map(|(_, address, _)| address));
    }
    used.dedup();
    used
}

#[test]
fn a_restarted_peer_keeps_its_line() {
    for away in (2000..12_000).step_by(390) {
        assert_eq!(revived(away, &[B, CARRIER]), [at(B)], "away for {away} ms");
    }
    // What does not come back is waited for no longer than a second.
    assert_eq!(revived(5000, &[CARRIER]), [at(B), at(CARRIER)]);
}

#[test]
fn an_address_that_a_probe_came_from_is_asked_and_counts_once_it_answers() {
    let now = Instant::now();
    let (mut a, mut b) = (prober(1, 2, B, now), prober(2, 1, "198.51.100.9:1", now));
    let question = polled(&mut a, now).remove(0);
    given(&mut b, A, &question.payload, now);
    assert_eq!(addresses(&b, 1, now).len(), 2);
    assert!(b.report(now)[&key(1).public()].carrying.is_none(), "it has not answered yet");
    let asked = polled(&mut b, now);
    let challenge = asked.iter().find(|one| one.to == at(A)).unwrap();
    let (_, answers) = given(&mut a, B, &challenge.payload, now);
    given(&mut b, A, &answers[0].payload, now + Duration::from_millis(5));
    let later = now + Duration::from_millis(300);
    polled(&mut b, later);
    let carrying = b.report(later)[&key(1).public()].carrying;
    assert_eq!(carrying.map(|(_, address, _)| address), Some(at(A)));
}

#[test]
fn recorded_questions_from_everywhere_make_no_more_than_some_answers_and_addresses() {
    let now = Instant::now();
    let (mut a, mut b) = (prober(1, 2, B, now), prober(2, 1, A, now));
    let mut answers = 0;
    let mut moment = now;
    for n in 0..3000u32 {
        moment += Duration::from_millis(1);
        // Each a new question of A, caught and sent on from another address.
        let Some(question) = polled(&mut a, now + Duration::from_secs(u64::from(n) * 6)).pop() else {
            continue;
        };
        let from = format!("203.0.113.{}:{}", n % 250, 1000 + n);
        answers += given(&mut b, &from, &question.payload, moment).1.len();
    }
    assert!((1..60).contains(&answers), "{answers} in three seconds");
    assert!(addresses(&b, 1, moment).len() <= 5);
}

#[test]
fn no_address_inside_of_the_mesh_is_ever_asked() {
    let now = Instant::now();
    let (mut a, mut b) = (prober(1, 2, B, now), prober(2, 1, A, now));
    let question = polled(&mut a, now).remove(0);
    given(&mut b, "10.1.2.3:51820", &question.payload, now);
    b.observed(&key(1).public(), at("10.1.2.4:51820"), now);
    assert_eq!(addresses(&b, 1, now), [at(A)]);
    let paths = PeerPaths {
        candidates: vec![direct("10.9.9.9:1"), direct(A)],
        mtu_most: 1500,
        ..PeerPaths::default()
    };
    b.set_peers(
        BTreeMap::from([(key(1).public(), paths)]),
        |to| !to.ip().to_string().starts_with("10."),
        now,
    );
    assert_eq!(addresses(&b, 1, now), [at(A)]);
}

#[test]
fn a_peer_that_is_revoked_gets_no_answer_any_more() {
    let now = Instant::now();
    let (mut a, mut b) = (prober(1, 2, B, now), prober(2, 1, A, now));
    b.set_peers(BTreeMap::new(), |_| true, now);
    let question = polled(&mut a, now).remove(0);
    assert_eq!(
        given(&mut b, A, &question.payload, now),
        (Received::Rejected(Rejected::Stranger), Vec::new())
    );
    assert_eq!((polled(&mut b, now + Duration::from_secs(60)), b.wake_at()), (Vec::new(), None));
}

#[test]
fn who_was_not_given_the_processor_takes_nobody_for_dead() {
    let mut now = Instant::now();
    let (mut a, mut b) = (prober(1, 2, B, now), prober(2, 1, A, now));
    let talk = |a: &mut Prober, b: &mut Prober, now: Instant| {
        for question in polled(a, now) {
            for answer in given(b, A, &question.payload, now).1 {
                given(a, B, &answer.payload, now);
            }
        }
    };
    let alive = |a: &Prober, now| a.report(now)[&key(2).public()].lines[0].state;
    for _ in 0..200 {
        now += Duration::from_millis(20);
        talk(&mut a, &mut b, now);
    }
    assert_eq!(alive(&a, now), super::Liveness::Alive);
    // Asked, and then nothing runs for a while: the answers wait unread, or were dropped.
    let mut asked = Vec::new();
    while asked.is_empty() {
        now += Duration::from_millis(20);
        asked = polled(&mut a, now);
    }
    now += Duration::from_secs(4);
    talk(&mut a, &mut b, now);
    assert_eq!(alive(&a, now), super::Liveness::Alive);
    // With the processor and without answers it is dead soon.
    for _ in 0..150 {
        now += Duration::from_millis(20);
        polled(&mut a, now);
    }
    assert_eq!(alive(&a, now), super::Liveness::Dead);
}

#[test]
fn a_peer_without_direct_paths_keeps_none_and_learns_none() {
    let now = Instant::now();
    let (mut a, mut b) = (prober(1, 2, B, now), prober(2, 1, A, now));
    let question = polled(&mut a, now).remove(0);
    let (_, answers) = given(&mut b, A, &question.payload, now);
    given(&mut a, B, &answers[0].payload, now);
    assert_eq!(addresses(&a, 2, now), [at(B)]);
    let none = BTreeMap::from([(key(2).public(), PeerPaths::default())]);
    a.set_peers(none, |_| true, now);
    assert_eq!(addresses(&a, 2, now), [], "it lives, and carries, and is offered no more");
    for transmit in polled(&mut b, now + Duration::from_secs(3)) {
        given(&mut a, "192.0.2.9:51820", &transmit.payload, now + Duration::from_secs(3));
    }
    assert_eq!(addresses(&a, 2, now), []);
}

// Both ask and answer each other, and what `more` sends to B in between does not matter to them.
fn talk_beside(
    a: &mut Prober,
    b: &mut Prober,
    now: &mut Instant,
    ticks: u32,
    mut more: impl FnMut(&mut Prober, Instant),
) {
    for _ in 0..ticks {
        *now += Duration::from_millis(20);
        more(b, *now);
        for question in polled(a, *now) {
            for answer in given(b, A, &question.payload, *now).1 {
                given(a, B, &answer.payload, *now);
            }
        }
        for question in polled(b, *now) {
            for answer in given(a, B, &question.payload, *now).1 {
                more(b, *now);
                given(b, A, &answer.payload, *now);
            }
        }
    }
}

fn state(prober: &Prober, peer: u8, now: Instant) -> super::Liveness {
    prober.report(now)[&key(peer).public()].lines[0].state
}

#[test]
fn forged_probes_leave_a_good_path_alive() {
    let mut now = Instant::now();
    let (mut a, mut b) = (prober(1, 2, B, now), prober(2, 1, A, now));
    let seen = polled(&mut a, now).remove(0);
    for (boot, from) in [([7; 16], A), ([1; 16], A), ([7; 16], "203.0.113.9:51820")] {
        let mut forged = seen.payload.clone();
        let mut count = 1u64 << 20;
        let mut rejected = 0;
        // 20,000 a second and more, each with a nonce of its own.
        talk_beside(&mut a, &mut b, &mut now, 250, |b, now| {
            for _ in 0..400 {
                count += 1;
                forged[12..28].copy_from_slice(&boot);
                forged[28..36].copy_from_slice(&count.to_be_bytes());
                let (came, answers) = given(b, from, &forged, now);
                assert!(answers.is_empty());
                rejected += u32::from(came == Received::Rejected(Rejected::Forged));
            }
        });
        assert!(rejected > 0);
        assert_eq!((state(&a, 2, now), state(&b, 1, now)), (super::Liveness::Alive, super::Liveness::Alive));
        let report = &b.report(now)[&key(1).public()];
        assert!(report.lines[0].loss < 0.1 && !report.blocked, "{report:?}");
    }
}

#[test]
fn a_flood_costs_little_to_open() {
    let now = Instant::now();
    let (mut a, mut b) = (prober(1, 2, B, now), prober(2, 1, A, now));
    let mut forged = polled(&mut a, now).remove(0).payload;
    let mut opened = 0;
    for n in 0..50_000u64 {
        forged[28..36].copy_from_slice(&n.to_be_bytes());
        *forged.last_mut().unwrap() ^= 1;
        forged[12] = 99;
        opened += u32::from(given(&mut b, A, &forged, now).0 == Received::Rejected(Rejected::Forged));
    }
    assert!(opened <= 2_000 + 50_000 / 8, "{opened}");
}

#[test]
fn recordings_of_a_boot_before_use_up_no_answers() {
    let mut now = Instant::now();
    let mut before = prober(1, 2, B, now);
    let mut recorded = Vec::new();
    let mut moment = now;
    while recorded.len() < 700 {
        moment += Duration::from_secs(40);
        recorded.extend(polled(&mut before, moment).into_iter().map(|question| question.payload));
    }
    let mut a = Prober::new(key(1), [77; 16]);
    let paths = PeerPaths { candidates: vec![direct(B)], mtu_most: 1500, ..PeerPaths::default() };
    a.set_peers(BTreeMap::from([(key(2).public(), paths)]), |_| true, now);
    let mut b = prober(2, 1, A, now);
    talk_beside(&mut a, &mut b, &mut now, 50, |_, _| ());
    let (mut next, mut answers) = (0, 0);
    talk_beside(&mut a, &mut b, &mut now, 500, |b, now| {
        for _ in 0..40 {
            answers += given(b, A, &recorded[next % recorded.len()], now).1.len();
            next += 1;
        }
    });
    assert_eq!(state(&a, 2, now), super::Liveness::Alive);
    assert!(a.report(now)[&key(2).public()].lines[0].loss < 0.1);
    assert!(answers <= 320, "{answers} in ten seconds");
}

#[test]
fn recordings_take_no_place_of_a_peer_that_moved() {
    let mut now = Instant::now();
    let mut before = prober(1, 2, B, now);
    let mut a = Prober::new(key(1), [77; 16]);
    let paths = PeerPaths { candidates: vec![direct(B)], mtu_most: 1500, ..PeerPaths::default() };
    a.set_peers(BTreeMap::from([(key(2).public(), paths)]), |_| true, now);
    let mut b = prober(2, 1, A, now);
    talk_beside(&mut a, &mut b, &mut now, 50, |_, _| ());
    let moved = "198.51.100.77:4000";
    let question = loop {
        now += Duration::from_millis(20);
        if let Some(question) = polled(&mut a, now).pop() {
            break question;
        }
    };
    given(&mut b, moved, &question.payload, now);
    assert!(addresses(&b, 1, now).contains(&at(moved)));
    for n in 0..50u32 {
        let recorded = loop {
            now += Duration::from_millis(50);
            if let Some(recorded) = polled(&mut before, now + Duration::from_secs(u64::from(n) * 60)).pop() {
                break recorded;
            }
        };
        given(&mut b, &format!("203.0.113.{n}:1000"), &recorded.payload, now);
    }
    let known = addresses(&b, 1, now);
    assert!(known.contains(&at(moved)) && known.len() <= 1 + 1 + 2, "{known:?}");
}

// How many datagrams go to addresses that answer nobody in so many seconds.
fn asked_in_vain(peers: u8, candidates: u8, seconds: u64) -> (usize, usize) {
    let begin = Instant::now();
    let mut a = Prober::new(key(1), [1; 16]);
    let paths = |peer: u8| {
        let all = (0..candidates).map(|n| direct(&format!("203.0.{peer}.{n}:51820")));
        (key(peer).public(), PeerPaths { candidates: all.collect(), mtu_most: 1500, ..PeerPaths::default() })
    };
    a.set_peers((2..2 + peers).map(paths).collect(), |_| true, begin);
    let (mut all, mut late) = (0, 0);
    for tick in 0..seconds * 10 {
        let sent = polled(&mut a, begin + Duration::from_millis(100 * tick)).len();
        all += sent;
        late += if tick >= (seconds - 60) * 10 { sent } else { 0 };
    }
    (all, late)
}

#[test]
fn addresses_that_never_answered_are_asked_rarely() {
    let (all, late) = asked_in_vain(1, 8, 600);
    assert!((8 * 30..=8 * 48).contains(&all), "{all}");
    assert!((8..=8 * 2 + 8).contains(&late), "{late} in the last minute");
    // However many one peer has, it gets two a second.
    let (all, _) = asked_in_vain(1, 200, 61);
    assert!(all <= 24 + 2 * 61, "{all}");
    // And all of them have a budget together.
    let (all, _) = asked_in_vain(250, 100, 61);
    assert!(all <= 4_000 + 500 * 61, "{all}");
}

#[test]
fn a_peer_that_went_short_is_the_next() {
    let begin = Instant::now();
    let mut a = Prober::new(key(1), [1; 16]);
    let paths = |n: u32| {
        let secret: Vec<u8> = (0..32).map(|at| (n >> (8 * (at % 2))) as u8 | 1).collect();
        let secret: [u8; 32] = secret.try_into().unwrap();
        let all = (0..24).map(|at| direct(&format!("203.{}.{}.{at}:51820", n / 250, n % 250)));
        let key = PrivateKey::from_bytes(&secret).unwrap().public();
        (key, PeerPaths { candidates: all.collect(), mtu_most: 1500, ..PeerPaths::default() })
    };
    let peers: BTreeMap<_, _> = (0..1200).map(paths).collect();
    let count = peers.len();
    a.set_peers(peers, |_| true, begin);
    let mut asked = std::collections::BTreeSet::new();
    for tick in 0..200 {
        let sent = polled(&mut a, begin + Duration::from_millis(100 * tick));
        asked.extend(sent.into_iter().map(|one| {
            let SocketAddr::V4(to) = one.to else { panic!("{}", one.to) };
            let [_, high, low, _] = to.ip().octets();
            (high, low)
        }));
    }
    assert_eq!(asked.len(), count, "within twenty seconds every peer");
}

#[test]
fn addresses_that_nobody_has_are_never_asked() {
    let now = Instant::now();
    let special = [
        "127.0.0.1:51820",
        "0.0.0.0:51820",
        "169.254.169.254:80",
        "224.0.0.1:51820",
        "255.255.255.255:51820",
        "[::1]:51820",
        "[fe80::1]:51820",
        "[ff02::1]:51820",
        "[::ffff:127.0.0.1]:51820",
        "192.0.2.9:0",
    ];
    let mut a = Prober::new(key(1), [1; 16]);
    let candidates = special.iter().map(|address| direct(address)).chain([direct(B)]).collect();
    let paths = PeerPaths { candidates, mtu_most: 1500, ..PeerPaths::default() };
    a.set_peers(BTreeMap::from([(key(2).public(), paths)]), |_| true, now);
    let mut b = prober(2, 1, A, now);
    for address in special {
        a.observed(&key(2).public(), at(address), now);
        let question = polled(&mut b, now + Duration::from_secs(30)).pop();
        question.map(|question| given(&mut a, address, &question.payload, now));
    }
    assert_eq!(addresses(&a, 2, now), [at(B)]);
    assert!(polled(&mut a, now).iter().all(|one| one.to == at(B)));
}

#[test]
fn a_peer_that_moves_is_found_beside_dead_candidates() {
    let mut now = Instant::now();
    let mut b = Prober::new(key(2), [2; 16]);
    let dead = (0..10).map(|n| direct(&format!("203.0.113.{n}:51820"))).collect();
    let paths = PeerPaths { candidates: dead, mtu_most: 1500, ..PeerPaths::default() };
    b.set_peers(BTreeMap::from([(key(1).public(), paths)]), |_| true, now);
    for _ in 0..600 {
        now += Duration::from_millis(100);
        polled(&mut b, now);
    }
    let mut a = prober(1, 2, B, now);
    let question = polled(&mut a, now).remove(0);
    given(&mut b, A, &question.payload, now);
    let until = now + Duration::from_secs(2);
    while !polled(&mut b, now).iter().any(|one| one.to == at(A)) {
        now += Duration::from_millis(50);
        assert!(now < until, "nobody asks the address that the peer spoke from");
    }
}
