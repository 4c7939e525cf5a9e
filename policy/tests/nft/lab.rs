//! Fresh network namespaces, `nft` in them, and its listings in a form that can be compared.

use std::io::Write as _;
use std::process::{Command, Stdio};

use mesh_policy::ruleset::{
    Chain, Element, End, Family, Hook, Kind, Match, Number, Rule, Ruleset, Set, State, Statement, Verdict,
    Way,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};

/// Says loudly that a test did not run. Where CI is on, that is a failure.
pub(crate) fn skipped(test: &str, missing: &str) {
    // Not by a macro: libtest keeps what those print to itself when a test passes.
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {missing}");
    assert!(std::env::var("CI").as_deref() != Ok("true"), "{test} has to run under CI: {missing}");
}

/// Whether a test can run.
pub(crate) fn needed(test: &str) -> bool {
    let missing = if !nix::unistd::geteuid().is_root() {
        Some("root")
    } else if Command::new("nft").arg("--version").output().is_err() {
        Some("the program nft")
    } else {
        None
    };
    missing.inspect(|missing| skipped(test, missing)).is_none()
}

/// Runs something in a network namespace of its own, which ends with it. Programs that it starts are in there too.
pub(crate) fn fresh<T: Send>(body: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let inside = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            body()
        });
        inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn run(mut command: Command, input: &str) -> Result<String, String> {
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_owned();
    let writer = std::thread::spawn(move || stdin.write_all(input.as_bytes()));
    let output = child.wait_with_output().unwrap();
    let _ = writer.join();
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(format!("{command:?}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr)))
    }
}

/// A program that has to succeed.
pub(crate) fn sh(script: &str) -> String {
    let mut command = Command::new("sh");
    command.args(["-ec", script]);
    run(command, "").unwrap()
}

/// `nft`, which has to succeed.
pub(crate) fn nft(arguments: &[&str]) -> String {
    let mut command = Command::new("nft");
    command.args(arguments);
    run(command, "").unwrap()
}

/// `nft`, which has to fail; what it says.
pub(crate) fn refused(arguments: &[&str]) -> String {
    let mut command = Command::new("nft");
    command.args(arguments);
    run(command, "").unwrap_err()
}

/// `nft -f` of a text.
pub(crate) fn nft_file(arguments: &[&str], text: &str) -> Result<String, String> {
    let mut command = Command::new("nft");
    command.args(arguments).args(["-f", "-"]);
    run(command, text)
}

/// What stands, but for the table's flags and what `nft` says of its owner.
pub(crate) fn listing() -> String {
    let text = nft(&["list", "table", "inet", "sennit-policy"]);
    let lines = text.lines().filter(|line| !line.starts_with("\tflags "));
    let lines = lines.map(|line| line.split(" # progname").next().unwrap_or_default());
    let text: String = lines.map(|line| format!("{line}\n")).collect();
    // Behind the flags is an empty line.
    text.replacen("{\n\n", "{\n", 1)
}

/// Loads a text, and what then stands.
pub(crate) fn on_text(text: &str) -> String {
    nft_file(&[], text).unwrap_or_else(|error| panic!("{error}\n{text}"));
    see_text()
}

/// What stands, as bytecode and as text, without handles and without the order of elements in a hash table.
pub(crate) fn see_text() -> String {
    // It must not abort.
    nft(&["-j", "list", "table", "inet", "sennit-policy"]);
    let bytecode = nft(&["--debug=netlink", "list", "table", "inet", "sennit-policy"]);
    let (bytecode, listing) = bytecode.split_once("\ntable inet").unwrap_or(("", &bytecode));
    let mut sections: Vec<Vec<String>> = Vec::new();
    for line in bytecode.lines().filter(|line| !line.is_empty()) {
        if line.starts_with("inet ") {
            // Handles are numbers.
            let words: Vec<&str> = line.split(' ').filter(|word| word.parse::<u64>().is_err()).collect();
            sections.push(vec![words.join(" ")]);
        } else if let Some(section) = sections.last_mut() {
            section.push(line.to_owned());
        }
    }
    // Elements of a set are in no order, nor are sets and chains; the sort of the latter leaves rules in theirs.
    for section in &mut sections {
        if section.get(1).is_some_and(|line| line.starts_with("\telement")) {
            section[1..].sort();
        }
    }
    sections.sort_by(|one, other| one[0].cmp(&other[0]));
    let sections: Vec<String> = sections.iter().map(|section| section.join("\n")).collect();
    format!("{}\n\ntable inet{}", sections.join("\n"), normal(listing))
}

/// A listing with elements and blocks sorted.
pub(crate) fn normal(listing: &str) -> String {
    let mut text = String::new();
    let mut rest = listing;
    while let Some(at) = rest.find("elements = {") {
        let (before, after) = rest.split_at(at);
        let end = after.find('}').unwrap();
        let mut elements: Vec<&str> = after["elements = {".len()..end].split(',').map(str::trim).collect();
        elements.sort_unstable();
        text.push_str(before);
        text.push_str(&format!("elements = {{ {} }}", elements.join(", ")));
        rest = &after[end + 1..];
    }
    text.push_str(rest);
    let inner = text.trim_end().trim_end_matches('}').trim_end();
    let (head, inner) = inner.split_once("{\n").unwrap_or((inner, ""));
    let mut blocks: Vec<&str> = inner.split("\n\n").collect();
    blocks.sort_unstable();
    format!("{head}{{\n{}", blocks.join("\n\n"))
}

/// Fails with the first lines that differ.
pub(crate) fn same(by_text: &str, by_netlink: &str, text: &str) {
    let mut lines = by_text.lines().zip(by_netlink.lines()).enumerate();
    if let Some((at, (left, right))) = lines.find(|(_, (left, right))| left != right) {
        let before: Vec<&str> = by_text.lines().skip(at.saturating_sub(8)).take(8).collect();
        panic!("after\n{}\nby text:    {left}\nby netlink: {right}\n\n{text}", before.join("\n"));
    }
    assert_eq!(by_text.lines().count(), by_netlink.lines().count(), "{text}");
}

/// Whether a file can be read from now.
pub(crate) fn readable(file: &impl std::os::fd::AsFd) -> bool {
    let mut files = [PollFd::new(file.as_fd(), PollFlags::POLLIN)];
    poll(&mut files, PollTimeout::ZERO).unwrap() == 1
}

fn rule(matches: Vec<Match>, verdict: Verdict) -> Rule {
    Rule::new(matches, verdict)
}

/// A ruleset with every construct in it.
pub(crate) fn everything() -> Ruleset {
    let v4 = |n: u8| [10, 0, n, 1].into();
    let v6 = |n: u8| format!("fd00:{n:x}::1").parse().unwrap();
    let mut ruleset = Ruleset::default();
    ruleset.counters.extend(["denied".to_owned(), "spoofed".to_owned()]);
    for family in Family::BOTH {
        let suffix = family.suffix();
        let at = |n: u8| if family == Family::V4 { v4(n) } else { v6(n) };
        let mut put = |name: &str, kind: Kind, elements: Vec<Element>| {
            let elements = elements.into_iter().collect();
            ruleset.sets.insert(format!("{name}{suffix}"), Set { family, kind, elements });
        };
        put("a", Kind::Addresses, vec![Element::Address(at(1)), Element::Address(at(2))]);
        put(
            "r",
            Kind::Ranges,
            vec![Element::Range(at(1), at(3)), Element::Range(at(5), at(5)), Element::Range(at(8), at(90))],
        );
        put("p", Kind::Ports, vec![Element::Port(at(1), 6, 80), Element::Port(at(1), 132, 65535)]);
        if family == Family::V4 {
            put("n", Kind::Numbers, vec![Element::Numbers(6, 80, 80), Element::Numbers(17, 0, 65535)]);
        }
        put(
            "in",
            Kind::Chains,
            vec![Element::Chain(at(1), "x".to_owned()), Element::Chain(at(2), "y".to_owned())],
        );
        put("none", Kind::Addresses, vec![]);
        put("rates", Kind::Rates, vec![]);
    }
    let mut x = Vec::new();
    for family in Family::BOTH {
        let suffix = family.suffix();
        for end in [End::Source, End::Destination, End::Client, End::Server, End::Dialled] {
            for (name, kind) in [("a", Kind::Addresses), ("r", Kind::Ranges)] {
                for negated in [false, true] {
                    let set = format!("{name}{suffix}");
                    x.push(rule(vec![Match::In { family, end, set, kind, negated }], Verdict::Return));
                }
            }
        }
        for (way, end) in [
            (Way::Original, End::Client),
            (Way::Original, End::Server),
            (Way::Reply, End::Client),
            (Way::Reply, End::Server),
        ] {
            for negated in [false, true] {
                let set = format!("p{suffix}");
                x.push(rule(vec![Match::Named { family, end, set, way, negated }], Verdict::Accept));
            }
        }
        x.push(rule(vec![Match::Family(family), Match::NotProtocol(6)], Verdict::Accept));
        let both = [End::Source, End::Destination].map(|end| Match::In {
            family,
            end,
            set: format!("a{suffix}"),
            kind: Kind::Addresses,
            negated: true,
        });
        x.push(rule(both.to_vec(), Verdict::Drop));
    }
    for (first, last) in [(80, 90), (80, 80), (0, 1), (0, 65535), (1024, 65535)] {
        for (protocol, number) in
            [(6, Number::ServerPort), (17, Number::ClientPort), (1, Number::Icmp), (6, Number::DialledPort)]
        {
            for negated in [false, true] {
                let numbers = Match::Numbers { number, first, last, negated };
                x.push(rule(vec![Match::Protocol(protocol), numbers], Verdict::Return));
            }
        }
    }
    for number in [Number::ServerPort, Number::ClientPort, Number::DialledPort] {
        let set = format!("n{}", Family::V4.suffix());
        x.push(rule(vec![Match::Protocol(6), Match::AnyOf { number, set }], Verdict::Return));
    }
    for protocol in [0, 1, 6, 17, 58, 132, 255] {
        x.push(rule(vec![Match::Protocol(protocol)], Verdict::Return));
    }
    for (first, last) in [(133, 137), (135, 135), (0, 255)] {
        x.push(rule(vec![Match::Icmp6(first, last)], Verdict::Accept));
    }
    x.push(rule(vec![Match::Direction(Way::Original)], Verdict::Return));
    x.push(rule(vec![Match::Direction(Way::Reply)], Verdict::Return));
    for state in
        [State::New, State::Invalid, State::Established, State::Known, State::Related, State::Untracked]
    {
        x.push(rule(vec![Match::State(state)], Verdict::Accept));
    }
    x.push(rule(vec![Match::MidStream], Verdict::Goto("y".to_owned())));
    x.push(rule(vec![Match::Protocol(6), Match::MidStream], Verdict::Drop));
    x.push(rule(vec![Match::State(State::New), Match::MidStream], Verdict::Goto("y".to_owned())));
    for name in ["sennit0", "a-much-too-long", "star*"] {
        x.push(rule(vec![Match::Interface(name.to_owned())], Verdict::Drop));
    }
    for (mask, value) in [(0xffff_ff00, 0x1200), (0x0ff0, 0x10), (1, 1), (0xff, 0), (u32::MAX, 5)] {
        x.push(rule(vec![Match::Mark { mask, value }], Verdict::Accept));
        let statements = vec![Statement::SetMark { mask, value }];
        x.push(Rule { matches: vec![], statements, verdict: Verdict::Continue });
    }
    for family in Family::BOTH {
        for end in [End::Client, End::Destination] {
            let set = format!("rates{}", family.suffix());
            let each = Statement::LimitEach { family, end, set, rate: 100, burst: 200 };
            let statements = vec![each, Statement::Copy { group: 5 }];
            x.push(Rule { matches: vec![], statements, verdict: Verdict::Continue });
        }
    }
    let statements = vec![
        Statement::Limit { rate: 100, burst: 20 },
        Statement::Log { prefix: "v1|D|I|7 ".to_owned(), group: 5 },
    ];
    x.push(Rule { matches: vec![], statements, verdict: Verdict::Continue });
    let statements = vec![Statement::Count("denied".to_owned())];
    x.push(Rule { matches: vec![], statements, verdict: Verdict::Drop });
    let y = vec![rule(vec![Match::State(State::Related), Match::Protocol(1)], Verdict::Accept)];
    let mut base = Vec::new();
    for family in Family::BOTH {
        for end in [End::Source, End::Destination, End::Client, End::Server, End::Dialled] {
            let map = format!("in{}", family.suffix());
            base.push(rule(vec![], Verdict::Lookup { family, end, map }));
        }
    }
    base.push(rule(vec![Match::NoWayBack], Verdict::Drop));
    base.push(rule(vec![Match::State(State::Known)], Verdict::Jump("y".to_owned())));
    ruleset.chains.insert("x".to_owned(), Chain { hook: None, rules: x });
    ruleset.chains.insert("y".to_owned(), Chain { hook: None, rules: y });
    ruleset.chains.insert("fwd".to_owned(), Chain { hook: Some(Hook::Forward), rules: base.clone() });
    let mut raw: Vec<Rule> = Vec::new();
    for (protocol, number) in
        [(6, Number::SourcePort), (17, Number::DestinationPort), (1, Number::PacketIcmp)]
    {
        for (first, last, negated) in
            [(80, 80, false), (80, 90, false), (80, 80, true), (0x0800, 0x08ff, true)]
        {
            let numbers = Match::Numbers { number, first, last, negated };
            raw.push(rule(vec![Match::Protocol(protocol), numbers], Verdict::Return));
        }
    }
    for number in [Number::SourcePort, Number::DestinationPort] {
        let set = format!("n{}", Family::V4.suffix());
        raw.push(rule(vec![Match::Protocol(17), Match::AnyOf { number, set }], Verdict::Return));
    }
    let statements = vec![Statement::NoTrack];
    let untracked = Rule { matches: vec![], statements, verdict: Verdict::Accept };
    let for_another = rule(vec![Match::ForAnother], Verdict::Accept);
    for (name, hook) in [("raw_input", Hook::RawInput), ("raw_output", Hook::RawOutput)] {
        let last = if hook == Hook::RawInput { for_another.clone() } else { untracked.clone() };
        let rules = raw.iter().cloned().chain([last]).collect();
        ruleset.chains.insert(name.to_owned(), Chain { hook: Some(hook), rules });
    }
    let translated = rule(vec![Match::Translated, Match::FromThisHost], Verdict::Jump("y".to_owned()));
    ruleset
        .chains
        .insert("post".to_owned(), Chain { hook: Some(Hook::Postrouting), rules: vec![translated] });
    let sources = vec![rule(vec![Match::Family(Family::V4), Match::NoWayBack], Verdict::Drop)];
    ruleset.chains.insert("sources".to_owned(), Chain { hook: Some(Hook::Sources), rules: sources });
    ruleset.chains.insert("input".to_owned(), Chain { hook: Some(Hook::Input), rules: base });
    ruleset
}
