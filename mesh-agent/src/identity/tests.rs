use std::path::Path;
use std::time::Duration;

use super::*;
use mesh_overlay::{Advertisement, Memory, Peer};

fn config(dir: &Path, node: &str, extra: &str) -> Config {
    let text = format!(
        "node: {node}\nsite: aws\nmesh: test\nstateDir: {}\nregistry: {{file: {{dir: /r}}}}\n{extra}",
        dir.display()
    );
    Config::parse("test", &text, None).unwrap()
}

fn at(millis: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_millis(millis)
}

fn machine(n: u8) -> Machine {
    serde_json::from_value(serde_json::json!({ "hardware": format!("{n}") })).unwrap()
}

fn start(config: &Config, on: u8, now: u64) -> Begun {
    begin_on(config, &mut LastGood::default(), &machine(on), at(now)).unwrap()
}

#[test]
fn a_generation_does_not_come_from_the_file_date() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), "a", "");
    let first = start(&config, 1, 5_000);
    assert_eq!((first.kept.generation, first.kept.starts, first.predecessor), (5_000, 1, None));
    let file = std::fs::File::open(run::key_file(&config).path()).unwrap();
    file.set_modified(at(1)).unwrap();
    let second = start(&config, 1, 2);
    assert_eq!((second.kept.generation, second.kept.starts), (5_000, 2));
    assert_eq!(second.predecessor, Some(first.instance.id));
    assert!(second.copied.is_none() && second.instance.id != first.instance.id);
}

#[test]
fn a_key_of_an_earlier_version_keeps_what_it_published() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), "a", "");
    let keys = run::key_file(&config);
    let key = keys.load_or_create().unwrap().key.public();
    std::fs::File::open(keys.path()).unwrap().set_modified(at(7_000)).unwrap();
    let begun = start(&config, 1, 9_000);
    assert_eq!((begun.key.public(), begun.kept.generation, begun.adopted), (key, 7_000, true));
    std::fs::File::open(keys.path()).unwrap().set_modified(at(1)).unwrap();
    assert_eq!(start(&config, 1, 9_001).kept.generation, 7_000, "once");
}

#[test]
fn state_of_another_node_or_machine_makes_its_own_key() {
    for (node, on) in [("b", 1), ("a", 2)] {
        let dir = tempfile::tempdir().unwrap();
        let original = start(&config(dir.path(), "a", ""), 1, 5_000);
        let mut remembered = LastGood { published: true, registered: true, ..LastGood::default() };
        remembered.prefixes.push("10.1.0.0/24".parse().unwrap());
        let copy = config(dir.path(), node, "");
        let begun = begin_on(&copy, &mut remembered, &machine(on), at(4_000)).unwrap();
        assert_ne!(begun.key.public(), original.key.public());
        assert_eq!((begun.kept.generation, begun.predecessor), (5_001, None));
        assert!(begun.instance.copied && begun.copied.is_some() && !begun.waits);
        assert_eq!(remembered, LastGood::default(), "what the original was says nothing of the copy");
        let again = start(&copy, on, 9_000);
        assert_eq!(again.key.public(), begun.key.public());
        assert!(again.copied.is_none() && again.instance.copied, "it stays behind its original");
    }
}

#[test]
fn a_copy_that_waits_leaves_all_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let original = start(&config(dir.path(), "a", ""), 1, 5_000);
    let waiting = config(dir.path(), "a", "identity: {onCopy: wait}\n");
    for _ in 0..2 {
        let begun = start(&waiting, 2, 9_000);
        assert!(begun.waits && begun.key.public() == original.key.public());
    }
    let back = start(&waiting, 1, 9_000);
    assert!(!back.waits && back.copied.is_none(), "at home it is the original");
}

#[test]
fn state_of_an_earlier_version_that_knows_us_is_anothers() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), "a", "");
    let key = run::key_file(&config).load_or_create().unwrap().key.public();
    let claim = Advertisement {
        public_key: PrivateKey::from_bytes(&[3; 32]).unwrap().public(),
        epoch: 1,
        site: "aws".parse().unwrap(),
        endpoints: Vec::new(),
        internal_endpoints: Vec::new(),
        mtu: None,
        reflexive_endpoints: Vec::new(),
        paths: Default::default(),
        encrypts: true,
    };
    let peer = Peer {
        name: "a".parse().unwrap(),
        claim,
        address: "fd00::1".parse().unwrap(),
        prefixes: Vec::new(),
        withheld: Vec::new(),
    };
    let mut remembered =
        LastGood { peers: Memory([(peer.name.clone(), peer)].into()), ..LastGood::default() };
    let begun = begin_on(&config, &mut remembered, &machine(1), at(1)).unwrap();
    assert!(begun.key.public() != key && begun.copied.is_some());
}

#[test]
fn a_key_put_there_by_hand_is_a_later_one() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), "a", "");
    start(&config, 1, 5_000);
    let key = PrivateKey::generate().unwrap();
    run::key_file(&config).replace(&key).unwrap();
    let begun = start(&config, 1, 4_000);
    assert!(begun.key.public() == key.public() && begun.kept.generation == 5_001 && begun.copied.is_none());
}

#[test]
fn a_new_key_is_later_than_all_that_is_known() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), "a", "");
    let first = start(&config, 1, 5_000);
    let kept = rekey(&config, None, at(10)).unwrap();
    assert!(kept.generation == 5_001 && kept.public_key != first.key.public());
    assert_eq!(rekey(&config, Some(90_000), at(10)).unwrap().generation, 90_001);
    let begun = begin_on(&config, &mut LastGood::default(), &Machine::own(), at(10)).unwrap();
    assert_eq!((begun.kept.generation, begun.predecessor), (90_001, Some(first.instance.id)));
    assert!(rekey(&config, Some(u64::MAX), at(10)).is_err());
    assert_eq!(rekey(&config, None, at(10)).unwrap().generation, 90_002, "nothing was used up");
}
