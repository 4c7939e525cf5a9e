use super::*;

const POD: &str = "10.0.1.1";

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn domains(text: &str) -> BTreeSet<Domain> {
    [text.parse().unwrap()].into()
}

fn wanting(texts: &[&str]) -> Names {
    let mut names = Names::default();
    texts.iter().for_each(|text| names.want(&text.parse().unwrap()));
    names
}

fn resolved(name: &str, address: &str, ttl: u32) -> Resolved {
    Resolved { name: name.to_owned(), addresses: [ip(address)].into(), ttl, asker: ip(POD) }
}

fn of(asker: &str, name: &str, address: u32) -> Resolved {
    let address = IpAddr::V4((0x2000_0000 + address).into());
    Resolved { name: name.to_owned(), addresses: [address].into(), ttl: 60, asker: ip(asker) }
}

fn addresses(changes: Changes) -> BTreeSet<IpAddr> {
    changes.into_keys().collect()
}

/// Counts anew what is counted as it changes.
fn check(names: &Names) {
    let pairs = |known: &Known| known.addresses.len();
    assert_eq!(names.pairs, names.known.values().map(pairs).sum::<usize>());
    assert_eq!(names.of.values().map(BTreeSet::len).sum::<usize>(), names.pairs);
    let pooled = names.known.values().filter(|known| known.pooled.is_some());
    assert_eq!(names.pairs_of.values().sum::<usize>(), pooled.clone().map(pairs).sum::<usize>());
    assert_eq!(names.agent.len(), pooled.count());
    assert_eq!(names.pods.values().map(Pool::len).sum::<usize>(), names.agent.len());
    for (name, known) in &names.known {
        let plain = backwards(name);
        assert!(!known.addresses.is_empty(), "{plain}");
        assert_eq!(known.pooled.is_none(), names.wanted.is_exact(&plain), "{plain}");
    }
    for (domain, pool) in &names.wildcards {
        let below = below(&names.known, domain).filter(|(_, known)| known.pooled.is_some());
        assert_eq!(pool.len(), below.count(), "{domain}");
    }
}

#[test]
fn an_address_counts_as_long_as_the_longest_answer_said_and_lingers_then() {
    let (mut names, all) = (wanting(&["example.com"]), domains("example.com"));
    let address = ip("192.0.2.1");
    assert_eq!(addresses(names.learn(resolved("example.com", "192.0.2.1", 60), 100)), [address].into());
    assert!(names.learn(resolved("example.com", "192.0.2.1", 30), 110).is_empty());
    assert!(names.has(&all, address) && !names.had(&all, address));
    assert!(names.due().is_some_and(|due| due <= 160));
    assert_eq!((addresses(names.pass(159)), names.due()), (BTreeSet::new(), Some(160)));
    assert_eq!(addresses(names.pass(160)), [address].into());
    assert!(!names.has(&all, address) && names.had(&all, address));
    assert_eq!(names.due(), Some(160 + LINGER));
    assert_eq!(addresses(names.learn(resolved("example.com", "192.0.2.1", 0), 170)), [address].into());
    assert!(names.has(&all, address));
    assert_eq!(addresses(names.pass(170 + LEAST)), [address].into(), "a moment at least");
    assert_eq!(addresses(names.pass(170 + LEAST + LINGER)), [address].into());
    assert!(!names.had(&all, address) && names.due().is_none());
    assert!(names.pass(5).is_empty(), "a clock that goes back");
    check(&names);
}

#[test]
fn what_is_recalled_counts_for_as_long_as_it_would_have() {
    let (mut names, all) = (wanting(&["*.example.com"]), domains("*.example.com"));
    names.learn(resolved("a.example.com", "192.0.2.1", 60), 100);
    names.learn(resolved("b.example.com", "192.0.2.2", 10), 100);
    names.pass(120);
    let kept = names.kept(9);
    assert_eq!((kept.len(), names.kept(1)), (2, vec![kept[0].clone()]));
    assert_eq!(kept[0].name, "a.example.com");
    let mut again = Names::default();
    let touched = addresses(again.recall(kept.clone(), 130));
    let [a, b] = ["192.0.2.1", "192.0.2.2"].map(ip);
    assert_eq!(touched, [a, b].into());
    assert!(again.has(&all, a) && !again.has(&all, b) && again.had(&all, b));
    assert_eq!(again.due(), Some(160));
    assert_eq!(addresses(again.pass(160)), [a].into());
    check(&again);
    // What is too old, or says more than an answer can, is no more than that.
    let mut late = Names::default();
    assert!(late.recall(kept, 161 + LINGER).is_empty() && late.known.is_empty());
    let far = Recalled { name: "a.example.com".to_owned(), address: a, until: u64::MAX };
    late.recall(vec![far], 200 + LINGER);
    assert_eq!(late.due(), Some(200 + LINGER + MOST));
}

#[test]
fn a_name_word_by_word_always_has_room() {
    let mut names = wanting(&["*.example.com", "shop.example.com"]);
    for n in 0..3 * NAMES_OF_WILDCARD as u32 {
        let pod = format!("10.0.{}.{}", n / 400 % 250, n % 7);
        names.learn(of(&pod, &format!("a{n}.example.com"), n), 1);
    }
    let held = names.wildcards.values().next().map_or(0, Pool::len);
    assert!((NAMES_OF_WILDCARD..=2 * NAMES_OF_WILDCARD).contains(&held), "{held}");
    names.learn(of(POD, "shop.example.com", 1), 1);
    assert!(names.has(&domains("shop.example.com"), IpAddr::V4(0x2000_0001.into())));
    check(&names);
}

#[test]
fn one_pod_cannot_fill_names_of_others() {
    let mut names = wanting(&["*.example.com"]);
    let all = domains("*.example.com");
    for second in 0..60 {
        for n in 0..200 {
            names.learn(
                of("10.0.1.66", &format!("a{n}.b{second}.example.com"), 200 * second + n),
                1 + u64::from(second) / 2,
            );
        }
    }
    assert_eq!(names.known.len(), NAMES_OF_POD);
    names.learn(of(POD, "mine.example.com", 99_999), 31);
    assert!(names.has(&all, IpAddr::V4((0x2000_0000u32 + 99_999).into())));
    let told = names.refusals(|address| format!("pod {address}"));
    let over = told.iter().find(|told| told.contains("pod 10.0.1.66 has 500 names"));
    assert!(over.is_some_and(|told| told.starts_with("dns-budget: ")), "{told:?}");
    check(&names);
    // What has no valid address any more makes room.
    names.pass(1_000);
    names.learn(of("10.0.1.66", "late.example.com", 77_777), 1_000);
    assert!(names.has(&all, IpAddr::V4((0x2000_0000u32 + 77_777).into())));
    assert_eq!(names.known.len(), NAMES_OF_POD + 1);
    check(&names);
}

#[test]
fn pods_that_conspire_leave_a_share() {
    let mut names = wanting(&["*.example.com"]);
    let all = domains("*.example.com");
    for pod in 0..8 {
        for n in 0..NAMES_OF_POD as u32 {
            names.learn(of(&format!("10.0.2.{pod}"), &format!("a{n}.b{pod}.example.com"), n), 1);
        }
    }
    assert!((NAMES_OF_WILDCARD..2 * NAMES_OF_WILDCARD).contains(&names.known.len()), "{}", names.known.len());
    for n in 0..100 {
        names.learn(of(POD, &format!("mine{n}.example.com"), 50_000 + n), 2);
        assert!(names.has(&all, IpAddr::V4((0x2000_0000 + 50_000 + n).into())), "{n}");
    }
    check(&names);
}

#[test]
fn all_wildcards_together_have_a_budget() {
    let texts: Vec<String> = (0..40).map(|n| format!("*.d{n}.example.com")).collect();
    let mut names = wanting(&texts.iter().map(String::as_str).collect::<Vec<_>>());
    for n in 0..60_000u32 {
        let pod = format!("10.1.{}.{}", n % 80, n % 3);
        names.learn(of(&pod, &format!("a{n}.d{}.example.com", n % 40), n), 1 + u64::from(n / 30_000));
    }
    assert!(names.known.len() <= 2 * NAMES_OF_AGENT, "{}", names.known.len());
    check(&names);
}

#[test]
fn addresses_have_budgets_of_name_pod_and_agent() {
    let mut names = wanting(&["*.example.com", "exact.net"]);
    let many = |first: u32, count: u32| -> BTreeSet<IpAddr> {
        (first..first + count).map(|n| IpAddr::V4((0x2000_0000 + n).into())).collect()
    };
    let answer = |name: &str, addresses, asker: &str| Resolved {
        name: name.to_owned(),
        addresses,
        ttl: 60,
        asker: ip(asker),
    };
    names.learn(answer("exact.net", many(0, 1000), POD), 101);
    assert_eq!(names.kept(usize::MAX).len(), ADDRESSES_OF_NAME);
    names.pass(1000);
    let moved = names.learn(answer("exact.net", many(5_000, 1), POD), 1000);
    assert_eq!((moved.len(), names.pairs), (2, ADDRESSES_OF_NAME), "the oldest goes");
    check(&names);
    for n in 0..40 {
        names.learn(answer(&format!("a{n}.example.com"), many(1000 * n, 200), POD), 1001 + u64::from(n));
    }
    assert!(names.pairs_of[&ip(POD)] <= ADDRESSES_OF_POD, "{:?}", names.pairs_of);
    check(&names);
    for pod in 0..100 {
        for second in 0..8u32 {
            let name = format!("a{second}.b{pod}.example.com");
            names.learn(
                answer(&name, many(4096 * pod, 250), &format!("10.0.3.{pod}")),
                1050 + 4 * u64::from(second),
            );
        }
    }
    assert!(names.pairs <= 2 * ADDRESSES_OF_AGENT, "{}", names.pairs);
    names.learn(answer("exact.net", many(900_000, 1), POD), 1090);
    assert!(names.has(&domains("exact.net"), IpAddr::V4((0x2000_0000u32 + 900_000).into())));
    check(&names);
}

#[test]
fn a_pod_that_changes_too_much_is_slowed_alone() {
    let mut names = wanting(&["*.example.com"]);
    let mut learnt = 0;
    for n in 0..10_000u32 {
        learnt += names.learn(of("10.0.1.66", &format!("a{}.example.com", n % 400), n), 1).len();
    }
    assert_eq!(learnt as u64, budget::CHANGES.1);
    assert_eq!(names.learn(of(POD, "mine.example.com", 77), 1).len(), 1);
    assert!(names.refusals(|pod| pod.to_string()).iter().any(|told| told.contains("10.0.1.66 brings more")));
}

#[test]
fn names_of_policies_change_no_faster_than_others() {
    let mut names = wanting(&["*.example.com", "exact.net", "other.net"]);
    let answer = |name: &str, pod: &str, first: u32| Resolved {
        name: name.to_owned(),
        addresses: (first..first + 20).map(|n| IpAddr::V4((0x2000_0000 + n).into())).collect(),
        ttl: 1,
        asker: ip(pod),
    };
    let mut learnt = 0;
    // Ever new addresses, each for as short as it may be.
    for n in 0..6_000u32 {
        let name = if n % 2 == 0 { "exact.net" } else { "other.net" };
        let changes = names.learn(answer(name, "10.0.1.66", 20 * n), 1 + u64::from(n / 100));
        learnt += changes.len() as u64;
    }
    let (rate, burst) = budget::CHANGES;
    // What comes pushes out what has lapsed.
    assert!((burst..=2 * (burst + 60 * rate)).contains(&learnt), "{learnt}");
    assert!(names.refusals(|pod| pod.to_string()).iter().any(|told| told.contains("10.0.1.66 brings more")));
    // Neither another pod nor what the same one asks for below a wildcard waits for that.
    assert!(names.learn(answer("exact.net", POD, 900_000), 61).len() >= 20);
    assert!(names.has(&domains("exact.net"), IpAddr::V4((0x2000_0000u32 + 900_000).into())));
    names.learn(of("10.0.1.66", "mine.example.com", 950_000), 61);
    assert!(names.has(&domains("*.example.com"), IpAddr::V4((0x2000_0000u32 + 950_000).into())));
    check(&names);
}

#[test]
fn protected_addresses_are_refused_and_told_once() {
    let mut names = wanting(&["*.example.com"]);
    let all = domains("*.example.com");
    names
        .protect(Protected::of(["10.0.0.0/8".parse().unwrap()].into_iter(), [ip("203.0.113.5")].into_iter()));
    for refused in ["127.0.0.1", "::ffff:10.0.0.9", "10.9.9.9", "203.0.113.5", "169.254.169.254", "fe80::1"] {
        for n in 0..100 {
            assert!(names.learn(resolved(&format!("a{n}.example.com"), refused, 60), 1).is_empty());
        }
        assert!(!names.has(&all, ip(refused).to_canonical()), "{refused}");
    }
    assert!(names.known.is_empty() && names.due().is_none());
    let told = names.refusals(|address| format!("pod {address}"));
    assert_eq!(told.len(), 5, "{told:?}");
    assert!(told.iter().all(|told| told.starts_with("dns-address-refused: ")
        && told.contains("remedy") | told.contains("allow it by")));
    let mesh = told.iter().find(|told| told.contains("is in a prefix of the mesh")).unwrap();
    assert!(mesh.contains("200 times") && mesh.contains("pod 10.0.1.1"), "{mesh}");
    // The rest of such an answer counts.
    let both = Resolved {
        addresses: ["10.9.9.9", "192.0.2.7"].map(ip).into(),
        ..resolved("b.example.com", POD, 60)
    };
    assert_eq!(addresses(names.learn(both, 1)), [ip("192.0.2.7")].into());
    // So it is with what a file says, and with what is protected from now on.
    let recalled =
        |address: &str| Recalled { name: "c.example.com".to_owned(), address: ip(address), until: 90 };
    let told = names.recall(["10.1.1.1", "::ffff:127.0.0.1", "192.0.2.8"].map(recalled).into(), 2);
    assert_eq!(addresses(told), [ip("192.0.2.8")].into());
    let wide = Protected::of(["192.0.2.8/32".parse().unwrap()].into_iter(), [].into_iter());
    assert_eq!(addresses(names.protect(wide.clone())), [ip("192.0.2.8")].into());
    assert!(!names.has(&all, ip("192.0.2.8")) && !names.had(&all, ip("192.0.2.8")));
    assert!(names.protect(wide).is_empty());
    check(&names);
}

#[test]
fn policies_that_come_and_go_keep_the_counts() {
    let mut names = wanting(&["*.example.com"]);
    let domain = |text: &str| -> Domain { text.parse().unwrap() };
    for n in 0..50 {
        names.learn(of(POD, &format!("a{}.x{}.example.com", n % 10, n % 5), n), 1);
    }
    for text in ["*.x1.example.com", "a1.x1.example.com", "*.example.com"] {
        names.want(&domain(text));
        check(&names);
    }
    names.learn(of(POD, "a1.x1.example.com", 1_000), 1);
    for text in ["*.example.com", "a1.x1.example.com", "*.example.com", "*.x1.example.com"] {
        names.unwant(&domain(text));
        check(&names);
    }
    assert!(names.wanted().is_empty() && names.wildcards.is_empty());
    names.pass(61 + LINGER);
    assert!(names.known.is_empty() && names.pods.is_empty() && names.pairs == 0);
    check(&names);
}

#[test]
fn a_pod_takes_over_what_was_recalled() {
    let mut names = wanting(&["*.example.com"]);
    let recalled =
        |n: u32| Recalled { name: format!("a{n}.example.com"), address: ip("192.0.2.1"), until: 90 };
    names.recall((0..600).map(recalled).collect(), 2);
    assert_eq!(names.pods[&BEFORE].len(), 600);
    names.learn(of(POD, "a7.example.com", 1), 3);
    assert_eq!(names.pods[&ip(POD)].len(), 1);
    check(&names);
}
