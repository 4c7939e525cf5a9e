use super::*;
use mesh_keyring::PrivateKey;

fn key(n: u8) -> PublicKey {
    PrivateKey::from_bytes(&[n; 32]).unwrap().public()
}

fn instance(id: u64, starts: u32) -> Instance {
    Instance { copied: false, made: 100, starts, id }
}

/// An agent with key 1 and number `id`, after the one with `before`.
fn tenure(id: u64, before: Option<u64>, stood: bool, now: Instant) -> Tenure {
    Tenure::new(instance(id, 5), key(1), 100, before, stood, now)
}

fn seen(of: Instance, key_of: u8, ours: bool) -> Seen {
    Seen { key: Some(key(key_of)), generation: 100, instance: Some(of), endpoints: String::new(), ours }
}

fn at(begun: Instant, seconds: u64) -> Instant {
    begun + Duration::from_secs(seconds)
}

#[test]
fn a_node_that_is_new_speaks_at_once() {
    let now = Instant::now();
    let verdict = tenure(1, None, false, now).look(Some(None), now);
    assert_eq!((verdict.step, verdict.dial), (Step::Publish, true));
}

#[test]
fn a_restarted_agent_with_tunnels_speaks_at_once() {
    let now = Instant::now();
    let before = seen(instance(7, 4), 1, true);
    let mut tenure = tenure(1, Some(7), true, now);
    assert!(tenure.look(None, now).dial);
    let verdict = tenure.look(Some(Some(&before)), now);
    assert_eq!((verdict.step, verdict.dial), (Step::Publish, true));
    tenure.wrote(Some(&before), now);
    assert_eq!(tenure.rival(), None);
}

#[test]
fn after_a_reboot_nobody_answers_and_the_name_is_ours() {
    let now = Instant::now();
    let before = seen(instance(7, 4), 1, true);
    let mut tenure = tenure(1, Some(7), false, now);
    assert!(!tenure.look(None, now).dial, "the registry may be read in a moment");
    assert_eq!(tenure.look(Some(Some(&before)), now).step, Step::Ask);
    tenure.asked(now);
    let asked = Seen { instance: Some(instance(1, 5)), ..before };
    assert_eq!(
        tenure.look(Some(Some(&asked)), at(now, 1)),
        Verdict { step: Step::Keep, dial: false, generation: 100 }
    );
    assert_eq!(tenure.wake_at(), Some(at(now, 3)));
    assert_eq!(
        tenure.look(Some(Some(&asked)), at(now, 3)),
        Verdict { step: Step::Publish, dial: true, generation: 100 }
    );
}

#[test]
fn without_the_registry_tunnels_come_up_after_a_while() {
    let now = Instant::now();
    let mut tenure = tenure(1, Some(7), false, now);
    assert!(!tenure.look(None, at(now, 2)).dial);
    assert!(tenure.look(None, at(now, 3)).dial);
    for seconds in 0..60 {
        assert_eq!(tenure.look(None, at(now, seconds)).step, Step::Keep, "what stands there is not known");
    }
}

#[test]
fn tunnels_stay_when_the_registry_is_back() {
    let now = Instant::now();
    let before = seen(instance(7, 4), 1, true);
    let mut tenure = tenure(1, Some(7), false, now);
    assert!(tenure.look(None, at(now, 3)).dial);
    let verdict = tenure.look(Some(Some(&before)), at(now, 3600));
    assert_eq!((verdict.step, verdict.dial), (Step::Ask, true));
    tenure.asked(at(now, 3600));
    // A living holder writes its own back: then they go.
    tenure.look(Some(Some(&before)), at(now, 3601));
    let verdict = tenure.look(Some(Some(&before)), at(now, 3610));
    assert!(tenure.waits() && !verdict.dial, "{verdict:?}");
}

#[test]
fn an_unheard_question_keeps_no_tunnel_down() {
    let now = Instant::now();
    let before = seen(instance(7, 4), 1, true);
    let mut tenure = tenure(1, Some(7), false, now);
    let first = tenure.look(Some(Some(&before)), now);
    assert_eq!((first.step, first.dial), (Step::Ask, false));
    assert_eq!(tenure.wake_at(), Some(at(now, 3)));
    // The registry takes no writes.
    let verdict = tenure.look(Some(Some(&before)), at(now, 3));
    assert_eq!((verdict.step, verdict.dial), (Step::Ask, true));
}

/// A copy that has asked, and was answered by the agent with number 7.
fn answered(now: Instant) -> (Tenure, Seen) {
    let original = seen(instance(7, 4), 1, true);
    let mut copy = tenure(1, Some(7), false, now);
    copy.look(Some(Some(&original)), now);
    copy.asked(now);
    copy.look(Some(Some(&original)), now);
    let verdict = copy.look(Some(Some(&original)), at(now, 1));
    assert_eq!((verdict.step, verdict.dial), (Step::Keep, false));
    assert!(copy.waits() && copy.rival().is_some());
    (copy, original)
}

#[test]
fn a_copy_beside_its_original_waits_and_asks_ever_more_rarely() {
    let begun = Instant::now();
    let (mut copy, original) = answered(begun);
    let mut now = at(begun, 1);
    let mut questions = Vec::new();
    for _ in 0..600 {
        now += Duration::from_secs(1);
        let verdict = copy.look(Some(Some(&original)), now);
        assert!(!verdict.dial && verdict.step != Step::Publish);
        if verdict.step == Step::Ask {
            questions.push(now.duration_since(begun).as_secs());
            copy.asked(now);
        }
    }
    assert!((7..14).contains(&questions.len()), "{questions:?}");
    assert_eq!(questions[0], 9);
}

#[test]
fn a_copy_takes_the_name_once_its_original_is_gone() {
    let begun = Instant::now();
    let (mut copy, original) = answered(begun);
    assert_eq!(copy.look(Some(Some(&original)), at(begun, 9)).step, Step::Ask);
    copy.asked(at(begun, 9));
    let asked = Seen { instance: Some(instance(1, 5)), ..original };
    assert_eq!(copy.look(Some(Some(&asked)), at(begun, 33)).step, Step::Keep);
    assert_eq!(copy.look(Some(Some(&asked)), at(begun, 34)).step, Step::Publish);
}

#[test]
fn what_a_registry_shows_once_more_is_no_answer() {
    let now = Instant::now();
    let before = seen(instance(7, 4), 1, true);
    let asked = Seen { instance: Some(instance(1, 5)), ..before.clone() };
    let mut tenure = tenure(1, Some(7), false, now);
    tenure.look(Some(Some(&before)), now);
    tenure.asked(now);
    tenure.look(Some(Some(&before)), now);
    tenure.look(Some(Some(&asked)), at(now, 1));
    tenure.look(Some(Some(&asked)), at(now, 2));
    assert_eq!(tenure.look(Some(Some(&asked)), at(now, 3)).step, Step::Publish);
}

/// An agent that speaks.
fn speaking(own: Instance, now: Instant) -> Tenure {
    let mut tenure = Tenure::new(own, key(1), 100, None, false, now);
    assert_eq!(tenure.look(Some(None), now).step, Step::Publish);
    tenure
}

#[test]
fn of_two_that_speak_the_younger_or_the_copy_steps_back() {
    let now = Instant::now();
    let (old, young) = (instance(9, 4), instance(1, 5));
    let copy = Instance { copied: true, starts: 1, id: 2, ..young };
    for (own, other, stays) in
        [(old, young, true), (young, old, false), (copy, young, false), (young, copy, true)]
    {
        let mut tenure = speaking(own, now);
        let other = seen(other, 1, false);
        assert_eq!(
            tenure.look(Some(Some(&other)), now).step,
            Step::Publish,
            "it may be what once stood there"
        );
        tenure.wrote(Some(&other), now);
        let verdict = tenure.look(Some(Some(&other)), now);
        if verdict.step == Step::Publish {
            tenure.wrote(Some(&other), now);
        }
        assert!(tenure.rival().is_some(), "either way it is told");
        assert_eq!((verdict.step == Step::Publish, verdict.dial), (stays, stays), "{own} {other:?}");
    }
}

#[test]
fn who_asks_is_answered_even_by_a_younger_one() {
    let now = Instant::now();
    let mut holder = speaking(instance(9, 9), now);
    let question = seen(instance(1, 1), 1, true);
    assert_eq!(holder.look(Some(Some(&question)), now).step, Step::Publish);
    holder.wrote(Some(&question), now);
    assert_eq!(holder.look(Some(Some(&question)), now).step, Step::Publish);
    // But for an original that comes back to a copy of it.
    let mut copy = speaking(Instance { copied: true, ..instance(9, 9) }, now);
    assert_eq!(copy.look(Some(Some(&question)), now).step, Step::Keep);
}

#[test]
fn writing_against_somebody_else_gets_ever_slower() {
    let begun = Instant::now();
    // One of an earlier version neither says who it is nor steps back.
    let other = Seen { instance: None, ..seen(instance(3, 3), 1, false) };
    let mut tenure = speaking(instance(1, 1), begun);
    let mut writes = 0;
    for tenth in 0..600 {
        let now = begun + Duration::from_millis(tenth * 100);
        if tenure.look(Some(Some(&other)), now).step == Step::Publish {
            tenure.wrote(Some(&other), now);
            writes += 1;
        }
    }
    assert!((4..12).contains(&writes), "{writes} writes in a minute");
    assert!(tenure.rival().is_some());
    tenure.look(Some(None), at(begun, 600));
    assert_eq!(tenure.rival(), None, "it is forgotten once it is gone");
}

#[test]
fn an_annotation_that_somebody_edited_is_written_back_at_once() {
    let now = Instant::now();
    let mut tenure = speaking(instance(1, 1), now);
    let edited = seen(instance(1, 1), 2, false);
    for _ in 0..20 {
        assert_eq!(tenure.look(Some(Some(&edited)), now).step, Step::Publish);
        tenure.wrote(Some(&edited), now);
    }
    assert_eq!(tenure.rival(), None);
}

#[test]
fn a_name_that_an_impostor_had_is_taken_back_with_a_later_generation() {
    let now = Instant::now();
    let impostor = Seen { generation: 5000, ..seen(instance(3, 3), 2, false) };
    let mut original = tenure(1, Some(7), true, now);
    assert_eq!(original.look(Some(Some(&impostor)), now).step, Step::Ask);
    original.asked(now);
    let asked = Seen { instance: Some(instance(1, 5)), ..impostor };
    let verdict = original.look(Some(Some(&asked)), at(now, 3));
    assert_eq!(verdict, Verdict { step: Step::Publish, dial: true, generation: 5001 });
}

#[test]
fn a_registry_restored_from_a_backup_costs_one_writing() {
    let now = Instant::now();
    let mut tenure = speaking(instance(9, 9), now);
    // What an earlier agent of this state wrote, with other endpoints.
    let before = seen(instance(3, 3), 1, false);
    assert_eq!(
        tenure.look(Some(Some(&before)), now),
        Verdict { step: Step::Publish, dial: true, generation: 100 }
    );
    tenure.wrote(Some(&before), now);
    let own = seen(instance(9, 9), 1, true);
    assert_eq!(tenure.rival(), None, "nobody is there");
    assert!(tenure.look(Some(Some(&own)), at(now, 1)).dial && !tenure.waits());
}

#[test]
fn a_publication_that_cannot_be_written_stops_nobody() {
    let now = Instant::now();
    let before = seen(instance(7, 4), 1, false);
    let mut tenure = tenure(1, Some(7), true, now);
    for seconds in 0..60 {
        let verdict = tenure.look(Some(Some(&before)), at(now, seconds));
        assert_eq!((verdict.step, verdict.dial), (Step::Publish, true), "{seconds}");
    }
    assert_eq!(tenure.rival(), None);
}
