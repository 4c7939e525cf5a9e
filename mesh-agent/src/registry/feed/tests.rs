use std::time::Duration;

use mesh_policy::model::Labels;
use mesh_policy::networkpolicy;
use mesh_policy::object::{Key, Metadata, Namespace, Pod, PodSpec, PodStatus};
use serde_json::json;
use tokio::time::timeout;

use super::*;

fn pod(name: &str, uid: &str) -> Pod {
    let metadata = Metadata { name: name.into(), uid: Some(uid.into()), ..Metadata::default() };
    Pod::new(metadata, PodSpec::default(), PodStatus::default()).unwrap()
}

fn gone(name: &str) -> Event {
    Event::PodGone(Key::new(None, name))
}

fn namespace(name: &str) -> Namespace {
    Namespace::new(name, Labels::new())
}

fn policy(name: &str) -> networkpolicy::Read {
    networkpolicy::read(&json!({"metadata": {"name": name, "namespace": "n"}}))
}

#[test]
fn events_come_out_once_and_in_order() {
    let feed = Feed::new();
    let said = [
        Event::Pods(vec![pod("a", "1")]),
        Event::Policy(policy("p")),
        Event::Pod(pod("b", "1")),
        Event::Namespace(namespace("n")),
        gone("a"),
    ];
    said.iter().cloned().for_each(|event| feed.push(event));
    assert_eq!(feed.take(), said);
    assert_eq!(feed.take(), []);
}

#[test]
fn of_each_object_the_last_event_counts_where_it_came() {
    let feed = Feed::new();
    for event in [Event::Pod(pod("a", "1")), Event::Pod(pod("b", "1")), gone("b"), Event::Pod(pod("a", "2"))]
    {
        feed.push(event);
    }
    assert_eq!(feed.take(), [gone("b"), Event::Pod(pod("a", "2"))]);
    feed.push(Event::Pod(pod("a", "3")));
    assert_eq!(feed.take(), [Event::Pod(pod("a", "3"))], "what was taken is not looked for");
}

#[test]
fn a_list_makes_what_was_said_of_its_kind_superfluous_and_nothing_else() {
    let feed = Feed::new();
    for event in [
        Event::Pods(vec![pod("a", "1"), pod("b", "1")]),
        Event::Pod(pod("c", "1")),
        Event::Namespace(namespace("n")),
        Event::Policies(networkpolicy::KIND, vec![policy("p")]),
        Event::Pods(vec![pod("a", "2")]),
        Event::PolicyGone(policy("p").policy.id),
        gone("a"),
    ] {
        feed.push(event);
    }
    let wanted = [
        Event::Namespace(namespace("n")),
        Event::Policies(networkpolicy::KIND, vec![policy("p")]),
        Event::Pods(vec![pod("a", "2")]),
        Event::PolicyGone(policy("p").policy.id),
        gone("a"),
    ];
    assert_eq!(feed.take(), wanted);
}

#[test]
fn it_is_complete_when_each_kind_was_listed_and_stays_so() {
    let feed = Feed::new();
    feed.push(Event::Pods(Vec::new()));
    feed.push(Event::Namespaces(Vec::new()));
    feed.push(Event::Policy(policy("p")));
    assert!(!feed.complete());
    for kind in &KINDS {
        assert!(!feed.complete());
        feed.push(kind.all([]));
    }
    assert!(feed.complete());
    feed.take();
    feed.trouble("Pod", Some("away".into()));
    assert!(feed.complete());
}

#[test]
fn what_nobody_takes_is_dropped_for_a_list_and_other_kinds_are_not() {
    let feed = Feed::new();
    feed.push(Event::Namespaces(Vec::new()));
    feed.push(Event::Pods(Vec::new()));
    for n in 0..=WAITING_MOST {
        assert!(!feed.lost(Kind::POD), "{n}");
        feed.push(gone(&format!("pod-{n}")));
    }
    assert!(feed.lost(Kind::POD) && !feed.lost(Kind::NAMESPACE));
    feed.push(Event::Pod(pod("a", "1")));
    assert_eq!(feed.take(), [Event::Namespaces(Vec::new())], "a single event is nothing without the others");
    assert!(feed.lost(Kind::POD), "taking makes up for nothing");
    feed.push(Event::Pods(vec![pod("a", "1")]));
    feed.push(Event::Pod(pod("b", "1")));
    assert!(!feed.lost(Kind::POD));
    assert_eq!(feed.take(), [Event::Pods(vec![pod("a", "1")]), Event::Pod(pod("b", "1"))]);
}

#[test]
fn refused_objects_are_named_within_bounds_until_they_are_mended() {
    let feed = Feed::new();
    for n in 0..70 {
        feed.refuse(format!("Pod n/p-{n:02}"), Some("no address".into()));
    }
    let problems = feed.problems();
    assert_eq!(problems.len(), NAMED_MOST + 1);
    assert_eq!(problems[0], "Pod n/p-00: no address");
    assert_eq!(problems[NAMED_MOST], "and 6 more");
    (1..70).for_each(|n| feed.refuse(format!("Pod n/p-{n:02}"), None));
    assert_eq!(feed.problems(), ["Pod n/p-00: no address"]);
}

#[test]
fn each_kind_tells_its_own_trouble() {
    let feed = Feed::new();
    assert_eq!(feed.staleness(), None);
    feed.trouble("Pod", Some("away".into()));
    feed.trouble("Namespace", Some("refused".into()));
    assert_eq!(feed.staleness().unwrap(), "Namespace: refused; Pod: away");
    feed.trouble("Namespace", None);
    assert_eq!(feed.staleness().unwrap(), "Pod: away");
    feed.trouble("Pod", None);
    assert_eq!(feed.staleness(), None);
}

#[tokio::test]
async fn news_wakes_once_and_what_is_no_news_does_not() {
    let feed = Feed::new();
    let quiet = async || timeout(Duration::from_millis(20), feed.changed()).await.is_err();
    assert!(quiet().await);
    let other = feed.clone();
    other.push(gone("a"));
    other.push(gone("b"));
    feed.changed().await;
    assert!(quiet().await);
    feed.trouble("Pod", None);
    feed.refuse("Pod n/p".into(), None);
    assert!(quiet().await);
    for _ in 0..2 {
        feed.refuse("Pod n/p".into(), Some("why".into()));
    }
    feed.changed().await;
    feed.refuse("Pod n/p".into(), Some("why".into()));
    feed.trouble("Pod", Some("away".into()));
    feed.changed().await;
    feed.trouble("Pod", Some("away".into()));
    assert!(quiet().await);
}
