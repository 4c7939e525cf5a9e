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
    let paths = PeerPaths { candidates: vec![direct(address)], mtu_most: 1500 };
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
    let paths = PeerPaths { candidates: vec![direct(B), carrier], mtu_most: 1500 };
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
    let paths = PeerPaths { candidates: vec![direct("10.9.9.9:1"), direct(A)], mtu_most: 1500 };
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
