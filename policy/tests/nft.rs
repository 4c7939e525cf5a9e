//! The policy table on the real kernel, each test in fresh network namespaces.

// All of this is tests.
#![allow(clippy::unwrap_used)]

#[path = "nft/lab.rs"]
mod lab;
#[path = "nft/random.rs"]
mod random;

use std::collections::BTreeSet;
use std::net::{IpAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use lab::{fresh, listing, needed, nft, nft_file, normal, on_text, refused, see_text};
use mesh_policy::nft::{Foreign, NftError, Ownership, Table, Watch};
use mesh_policy::render::{self, Slot};
use mesh_policy::ruleset::{Change, Element, End, Family, Kind, Match, Rule, Ruleset, Verdict};
use random::Random;

fn small() -> Ruleset {
    Random::new(7).ruleset()
}

fn replaced(ruleset: &Ruleset) -> Table {
    let mut table = Table::open(Ownership::Shared).unwrap();
    table.replace(ruleset).unwrap();
    table
}

/// Elements that are given to an address set.
fn addresses(first: u32, count: u32) -> Vec<Element> {
    (first..first + count).map(|n| Element::Address(IpAddr::V4(n.into()))).collect()
}

fn add_elements(set: &str, elements: Vec<Element>) -> Change {
    Change::AddElements { set: set.to_owned(), family: Family::V4, kind: Kind::Addresses, elements }
}

fn set(set: &str) -> Change {
    Change::AddSet { name: set.to_owned(), family: Family::V4, kind: Kind::Addresses }
}

fn chain(name: &str) -> Change {
    Change::AddChain { name: name.to_owned(), hook: None }
}

#[test]
fn every_construct_is_the_same_bytecode_as_that_of_its_text() {
    if !needed("every_construct_is_the_same_bytecode_as_that_of_its_text") {
        return;
    }
    let ruleset = lab::everything();
    let text = render::ruleset(&ruleset, Slot::A);
    let by_text = fresh(|| on_text(&text));
    let by_netlink = fresh(|| {
        drop(replaced(&ruleset));
        see_text()
    });
    lab::same(&by_text, &by_netlink, &text);
    assert!(by_text.contains("ct direction original ct reply ip6 saddr . meta l4proto . th dport @a_p6"));
}

#[test]
fn changes_do_the_same_as_their_text() {
    if !needed("changes_do_the_same_as_their_text") {
        return;
    }
    let other = Random::new(8).ruleset();
    for (from, to) in [(&Ruleset::default(), &lab::everything()), (&small(), &other), (&other, &small())] {
        let changes = from.changes_to(to);
        let text = render::changes(&changes, Slot::A);
        let by_text = fresh(|| {
            drop(replaced(from));
            nft_file(&["--check"], &text).unwrap();
            on_text(&text)
        });
        let by_netlink = fresh(|| {
            let mut table = replaced(from);
            table.commit(&changes).unwrap();
            assert!(table.verify(to).unwrap());
            see_text()
        });
        lab::same(&by_text, &by_netlink, &text);
    }
}

#[test]
fn the_text_passes_a_check() {
    if !needed("the_text_passes_a_check") {
        return;
    }
    fresh(|| {
        nft_file(&["--check"], &render::ruleset(&lab::everything(), Slot::B)).unwrap();
        assert_eq!(nft(&["list", "ruleset"]), "");
    });
}

#[test]
fn a_ruleset_replaces_whatever_stood_in_the_table() {
    if !needed("a_ruleset_replaces_whatever_stood_in_the_table") {
        return;
    }
    let (old, new) = (small(), lab::everything());
    let from_scratch = fresh(|| {
        drop(replaced(&new));
        normal(&listing())
    });
    fresh(|| {
        let mut table = replaced(&old);
        assert_eq!(table.slot(), Slot::A);
        // Of somebody else, and of a predecessor that died while it built the other slot.
        nft_file(
            &[],
            "table inet sennit-policy {
                 counter foreign { }
                 quota limited { over 1 mbytes }
                 map of_chains { type ipv4_addr : verdict; elements = { 10.0.0.1 : jump their_own } }
                 chain their_own { ip saddr { 10.0.0.1, 10.0.0.2 } jump { counter; accept; }; }
                 chain hooked { type filter hook output priority 7; quota name \"limited\"
                   ip saddr vmap @of_chains; }
                 set b_half { type ipv4_addr; elements = { 10.0.0.1 } }
                 chain b_built { ip saddr @b_half accept; }
             }",
        )
        .unwrap();
        assert!(!table.verify(&old).unwrap());
        table.replace(&new).unwrap();
        assert_eq!(table.slot(), Slot::B);
        assert!(table.verify(&new).unwrap());
        assert_eq!(normal(&listing()).replace("b_", "a_"), from_scratch);
        table.replace(&new).unwrap();
        assert_eq!(table.slot(), Slot::A);
        assert_eq!(normal(&listing()), from_scratch);
        table.replace(&Ruleset::default()).unwrap();
        assert_eq!(listing(), "table inet sennit-policy {\n}\n");
    });
}

#[test]
fn a_predecessor_that_died_between_the_two_last_transactions_leaves_two_and_one_is_kept() {
    if !needed("a_predecessor_that_died_between_the_two_last_transactions_leaves_two_and_one_is_kept") {
        return;
    }
    let ruleset = small();
    fresh(|| {
        nft_file(&[], &render::ruleset(&ruleset, Slot::A)).unwrap();
        nft_file(&[], &render::ruleset(&ruleset, Slot::B)).unwrap();
        let table = replaced(&ruleset);
        assert_eq!(table.slot(), Slot::B);
        assert!(!listing().contains("a_"), "{}", listing());
    });
}

#[test]
fn an_owned_table_is_safe_from_others_and_is_adopted_when_its_owner_is_gone() {
    if !needed("an_owned_table_is_safe_from_others_and_is_adopted_when_its_owner_is_gone") {
        return;
    }
    let ruleset = small();
    fresh(|| {
        let mut table = Table::open(Ownership::Owner).unwrap();
        if table.ownership() == Ownership::Shared {
            lab::skipped("an owned table", "this kernel has no tables that stay without their owner");
            return;
        }
        table.replace(&ruleset).unwrap();
        assert!(table.verify(&ruleset).unwrap());
        let before = normal(&listing());
        nft(&["flush", "ruleset"]);
        assert_eq!(normal(&listing()), before);
        assert!(refused(&["delete", "table", "inet", "sennit-policy"]).contains("not permitted"));
        let second = Table::open(Ownership::Shared).unwrap_err().to_string();
        assert!(second.contains("no other process may own the table"), "{second}");
        drop(table);
        assert_eq!(normal(&listing()), before);
        let mut table = Table::open(Ownership::Owner).unwrap();
        assert_eq!(table.ownership(), Ownership::Owner);
        assert_eq!(table.slot(), Slot::A);
        assert!(table.verify(&ruleset).unwrap());
        table.replace(&ruleset).unwrap();
        assert_eq!(table.slot(), Slot::B);
        table.remove().unwrap();
        assert_eq!(nft(&["list", "tables"]), "");
        table.remove().unwrap();
        table.replace(&ruleset).unwrap();
        assert!(table.verify(&ruleset).unwrap());
    });
}

#[test]
fn a_table_that_was_made_to_be_shared_stays_so() {
    if !needed("a_table_that_was_made_to_be_shared_stays_so") {
        return;
    }
    fresh(|| {
        drop(replaced(&small()));
        let mut table = Table::open(Ownership::Owner).unwrap();
        assert_eq!(table.ownership(), Ownership::Shared);
        table.replace(&small()).unwrap();
        assert!(table.verify(&small()).unwrap());
    });
}

#[test]
fn a_watch_tells_of_others_and_not_of_ourselves() {
    if !needed("a_watch_tells_of_others_and_not_of_ourselves") {
        return;
    }
    fresh(|| {
        let mut table = Table::open(Ownership::Shared).unwrap();
        let mut watch = Watch::new().unwrap();
        let own = table.port_id();
        table.replace(&lab::everything()).unwrap();
        table.commit(&[set("one"), add_elements("one", addresses(1, 3))]).unwrap();
        assert_eq!(watch.foreign(own).unwrap(), Foreign::No);
        nft(&["add", "table", "inet", "another"]);
        assert_eq!(watch.foreign(own).unwrap(), Foreign::No);
        nft(&["add", "element", "inet", "sennit-policy", "a_one", "{ 9.9.9.9 }"]);
        assert!(lab::readable(&watch));
        assert_eq!(watch.foreign(own).unwrap(), Foreign::Yes);
        assert_eq!(watch.foreign(own).unwrap(), Foreign::No);
        assert!(!lab::readable(&watch));
        nft(&["flush", "ruleset"]);
        assert_eq!(watch.foreign(own).unwrap(), Foreign::Yes);
        assert!(!table.verify(&lab::everything()).unwrap());
        table.replace(&lab::everything()).unwrap();
        assert!(table.verify(&lab::everything()).unwrap());
        assert_eq!(watch.foreign(own).unwrap(), Foreign::No);
    });
}

#[test]
fn a_change_that_fails_is_named_and_none_is_made() {
    if !needed("a_change_that_fails_is_named_and_none_is_made") {
        return;
    }
    fresh(|| {
        let mut table = replaced(&small());
        let before = normal(&listing());
        let ranges = Change::AddSet { name: "ahead".to_owned(), family: Family::V4, kind: Kind::Ranges };
        let range = Change::AddElements {
            set: "ahead".to_owned(),
            family: Family::V4,
            kind: Kind::Ranges,
            elements: vec![Element::Range([10, 0, 0, 1].into(), [10, 0, 0, 9].into())],
        };
        let fine = Rule::new(vec![Match::Protocol(6)], Verdict::Accept);
        let into_nothing = Rule::new(vec![], Verdict::Jump("nowhere".to_owned()));
        let rules = Change::AddRules { chain: "new".to_owned(), rules: vec![fine, into_nothing] };
        let error = table.commit(&[chain("new"), ranges, range, rules]).unwrap_err();
        let NftError::Refused { change, message, .. } = &error else { panic!("{error}") };
        assert_eq!((*change, message.as_deref()), (Some(3), Some("adding a rule to chain a_new")));
        assert!(error.to_string().contains("No such file"), "{error}");
        assert_eq!(normal(&listing()), before);
        // What is there already is neither taken for new nor deleted.
        table.commit(&[set("twice")]).unwrap();
        let error = table.commit(&[chain("new"), set("twice")]).unwrap_err();
        assert!(matches!(error, NftError::Refused { change: Some(1), .. }), "{error}");
        assert!(listing().contains("a_twice"));
        let error = table.commit(&[Change::DeleteChain("gone".to_owned())]).unwrap_err().to_string();
        assert!(error.contains("deleting chain a_gone"), "{error}");
        // A circle is found at the end, by the whole.
        let jump = |from: &str, to: &str| Change::AddRules {
            chain: from.to_owned(),
            rules: vec![Rule::new(vec![], Verdict::Jump(to.to_owned()))],
        };
        let hook =
            Change::AddChain { name: "base".to_owned(), hook: Some(mesh_policy::ruleset::Hook::Input) };
        let circle = [chain("x1"), chain("x2"), hook, jump("x1", "x2"), jump("x2", "x1"), jump("base", "x1")];
        assert!(table.commit(&circle).is_err());
        table.commit(&[set("after")]).unwrap();
    });
}

#[test]
fn twenty_thousand_elements_load() {
    if !needed("twenty_thousand_elements_load") {
        return;
    }
    let mut ruleset = Ruleset::default();
    let v6 = |n: u32| IpAddr::V6((0xfd00_u128 << 112 | u128::from(n) << 8).into());
    let sets: [(&str, Family, Kind, Vec<Element>); 3] = [
        ("many", Family::V4, Kind::Addresses, addresses(0x0a00_0000, 20_000)),
        ("ports", Family::V6, Kind::Ports, (0..20_000).map(|n| Element::Port(v6(n), 6, 80)).collect()),
        (
            "ranges",
            Family::V6,
            Kind::Ranges,
            (0..5_000).map(|n| Element::Range(v6(2 * n), v6(2 * n + 1))).collect(),
        ),
    ];
    for (name, family, kind, elements) in sets {
        let elements: BTreeSet<_> = elements.into_iter().collect();
        ruleset.sets.insert(name.to_owned(), mesh_policy::ruleset::Set { family, kind, elements });
    }
    fresh(|| {
        let began = Instant::now();
        replaced(&ruleset);
        eprintln!("20,000 addresses, 20,000 ports and 5,000 ranges: {:?}", began.elapsed());
        let count =
            |set: &str| nft(&["list", "set", "inet", "sennit-policy", set]).matches(['.', ':']).count();
        assert_eq!(count("a_many"), 20_000 * 3);
        let mut table = Table::open(Ownership::Shared).unwrap();
        let more = Ruleset::default().changes_to(&ruleset);
        table.replace(&Ruleset::default()).unwrap();
        let began = Instant::now();
        table.commit(&more).unwrap();
        eprintln!("the same as changes: {:?}", began.elapsed());
        assert!(table.verify(&ruleset).unwrap());
    });
}

#[test]
fn counters_count_on_when_the_ruleset_is_replaced() {
    if !needed("counters_count_on_when_the_ruleset_is_replaced") {
        return;
    }
    fresh(|| {
        lab::sh("ip link set lo up");
        let hook = Some(mesh_policy::ruleset::Hook::Input);
        let count = mesh_policy::ruleset::Statement::Count("seen".to_owned());
        let rule = Rule { matches: vec![], statements: vec![count], verdict: Verdict::Continue };
        let base = mesh_policy::ruleset::Chain { hook, rules: vec![rule] };
        let mut ruleset = Ruleset::default();
        ruleset.counters.insert("seen".to_owned());
        ruleset.chains.insert("input".to_owned(), base);
        let mut table = replaced(&ruleset);
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.send_to(b"four", socket.local_addr().unwrap()).unwrap();
        let counted = table.counters().unwrap();
        assert_eq!(counted["seen"], (1, 32));
        table.replace(&ruleset).unwrap();
        assert_eq!(table.counters().unwrap(), counted);
    });
}

#[test]
fn no_packet_slips_through_while_rulesets_are_replaced() {
    if !needed("no_packet_slips_through_while_rulesets_are_replaced") {
        return;
    }
    let mut ruleset = lab::everything();
    let loopback = Element::Address(IpAddr::from([127, 0, 0, 1]));
    ruleset.sets.get_mut("none4").unwrap().elements.insert(loopback);
    let ours = Match::In {
        family: Family::V4,
        end: End::Source,
        set: "none4".to_owned(),
        kind: Kind::Addresses,
        negated: false,
    };
    ruleset.chains.get_mut("input").unwrap().rules.insert(0, Rule::new(vec![ours], Verdict::Drop));
    fresh(|| {
        lab::sh("ip link set lo up");
        let mut table = replaced(&ruleset);
        let receiver = UdpSocket::bind("127.0.0.1:0").unwrap();
        receiver.set_nonblocking(true).unwrap();
        let to = receiver.local_addr().unwrap();
        let stop = AtomicBool::new(false);
        let sent = std::thread::scope(|scope| {
            let sender = scope.spawn(|| {
                let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
                let mut sent = 0_u32;
                while !stop.load(Ordering::Relaxed) {
                    // EPERM where the drop is told to the sender.
                    let _ = socket.send_to(b"denied", to);
                    sent += 1;
                }
                sent
            });
            (0..150).for_each(|_| table.replace(&ruleset).unwrap());
            stop.store(true, Ordering::Relaxed);
            sender.join().unwrap()
        });
        assert!(sent > 1_000, "{sent}");
        let received = receiver.recv(&mut [0; 16]);
        assert_eq!(received.unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    });
}

#[test]
fn changes_lead_where_a_replacement_leads() {
    if !needed("changes_lead_where_a_replacement_leads") {
        return;
    }
    let mut random = Random::new(20_260_101);
    fresh(|| {
        let mut changed = Ruleset::default();
        let mut table = replaced(&changed);
        for round in 0..200 {
            let next = random.ruleset();
            let changes = changed.changes_to(&next);
            table.commit(&changes).unwrap_or_else(|error| {
                panic!("round {round}: {error}\n{}", render::changes(&changes, table.slot()))
            });
            changed = next;
            assert!(table.verify(&changed).unwrap());
            let by_changes = normal(&listing());
            // Changes take no counters, so that these go by the first replacement.
            let slot = table.slot();
            table.replace(&changed).unwrap();
            let by_replacement = normal(&listing()).replace(table.slot().prefix(), slot.prefix());
            assert_eq!(without_counters(&by_changes), without_counters(&by_replacement), "round {round}");
            let text = render::ruleset(&changed, slot);
            nft_file(&["--check"], &text).unwrap_or_else(|error| panic!("round {round}: {error}\n{text}"));
        }
    });
}

#[test]
fn random_rulesets_are_the_same_bytecode_as_their_text() {
    if !needed("random_rulesets_are_the_same_bytecode_as_their_text") {
        return;
    }
    let mut random = Random::new(3);
    for _ in 0..40 {
        let ruleset = random.ruleset();
        let text = render::ruleset(&ruleset, Slot::A);
        let by_text = fresh(|| on_text(&text));
        let by_netlink = fresh(|| {
            drop(replaced(&ruleset));
            see_text()
        });
        lab::same(&by_text, &by_netlink, &text);
    }
}

fn without_counters(normal: &str) -> String {
    normal.split("\n\n").filter(|block| !block.starts_with("\tcounter ")).collect::<Vec<_>>().join("\n\n")
}
