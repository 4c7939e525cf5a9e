//! What policy costs at scale: compiling, writing to the kernel, small changes, and the first packet of a flow.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Parser;
use ipnet::IpNet;
use mesh_policy::compile::Settings;
use mesh_policy::nft::{Ownership, Table};
use mesh_policy::object::{Namespace, Pod};
use mesh_policy::ruleset::{Change, Element, Family, Kind};
use mesh_policy::{Event, calico, clusternetworkpolicy, networkpolicy};
use policy_tests::rig::NODE;
use policy_tests::tenants::without_budgets;
use policy_tests::{Link, Packet, Rig};
use serde_json::{Value, json};

/// Measures policy at scale, in a network namespace of its own. Needs root.
#[derive(Debug, Parser)]
struct Cli {
    /// Pods of the cluster.
    #[arg(long, default_value_t = 20_000)]
    pods: u32,
    /// Pods of this node.
    #[arg(long, default_value_t = 110)]
    local: u32,
    /// NetworkPolicies that select pods of this node.
    #[arg(long, default_value_t = 1_000)]
    policies: u32,
    /// Small changes of each kind.
    #[arg(long, default_value_t = 1_000)]
    changes: u32,
    /// Only what it costs to check sources by the interface that packets come in by, in so many rounds.
    #[arg(long)]
    sources: Option<usize>,
    /// Policies of five tiers and three APIs, instead of NetworkPolicies alone.
    #[arg(long)]
    tiers: bool,
    /// Only what a network set of so many prefixes costs, and one more.
    #[arg(long)]
    networks: Option<u32>,
    /// Only what the policies of one tenant cost the others.
    #[arg(long)]
    tenants: bool,
}

const APPS: u32 = 200;

fn pod(index: u32, local: u32, version: u32) -> Pod {
    let node = if index < local { NODE.to_owned() } else { format!("node-{}", index % 1000) };
    let app = format!("app-{}", (index + version) % APPS);
    let metadata = json!({"name": format!("pod-{index}"), "namespace": "default", "uid": format!("{index:036}"), "creationTimestamp": "2026-11-25T12:00:00Z",
        "labels": {"app": app, "tier": "web", "version": "v1"}});
    let spec = json!({"nodeName": node, "serviceAccountName": "default", "containers": [{"ports": [{"name": "http", "containerPort": 8080}]}]});
    let status = json!({"phase": "Running", "podIPs": [{"ip": format!("10.{}.{}.{}", 1 + index / 62_500, index / 250 % 250, 1 + index % 250)}, {"ip": format!("fd00::{:x}:{:x}", 1 + index / 65_536, index % 65_536)}]});
    let read = |value: Value| serde_json::from_value(value).expect("metadata");
    Pod::new(
        read(metadata),
        serde_json::from_value(spec).expect("a spec"),
        serde_json::from_value(status).expect("a status"),
    )
    .expect("a pod")
}

/// A policy for one application: others of its kind may reach some ports of it, and so may a block.
fn policy(index: u32, variant: u32, tiers: bool) -> Event {
    match index % 5 {
        _ if !tiers => network_policy(index, variant),
        0 => cluster_policy(index, variant, "Admin"),
        1 => calico_policy(index, variant, "security"),
        2 => network_policy(index, variant),
        3 => calico_policy(index, variant, "platform"),
        _ => cluster_policy(index, variant, "Baseline"),
    }
}

/// Calico's tiers: one before the developers' and one behind.
fn calico_tiers() -> [Event; 2] {
    [("security", 100.0), ("platform", 2e6)].map(|(name, order)| {
        let tier = json!({"metadata": {"name": name}, "spec": {"order": order, "defaultAction": "Pass"}});
        Event::Referent(calico::tier(&tier))
    })
}

/// The same in Calico's words. Others pass.
fn calico_policy(index: u32, variant: u32, tier: &str) -> Event {
    let from = format!(
        "app in {{'app-{}', 'app-{}'}}",
        (index * 7 + variant) % APPS,
        (index * 7 + 1 + variant) % APPS
    );
    let allow = json!({"action": "Allow", "protocol": "TCP", "source": {"selector": from}, "destination": {"ports": [1000 + index, "http"]}});
    let net = json!({"action": "Deny", "source": {"nets": [format!("192.168.{}.0/24", index % 250)]}});
    Event::Policy(calico::global(&json!({
        "metadata": {"name": format!("policy-{index}")},
        "spec": {"tier": tier, "order": index, "selector": format!("app == 'app-{}'", index % 110), "ingress": [allow, net]},
    })))
}

/// The same in an administrator's words. Others pass.
fn cluster_policy(index: u32, variant: u32, tier: &str) -> Event {
    let from: Vec<Value> = (0..2).map(|n| json!({"pods": {"podSelector": {"matchLabels": {"app": format!("app-{}", (index * 7 + n + variant) % APPS)}}}})).collect();
    let subject = json!({"pods": {"podSelector": {"matchLabels": {"app": format!("app-{}", index % 110)}}}});
    let accept = json!({"action": "Accept", "from": from, "protocols": [{"tcp": {"destinationPort": {"number": 1000 + index}}}]});
    Event::Policy(clusternetworkpolicy::read(&json!({
        "metadata": {"name": format!("policy-{index}")},
        "spec": {"tier": tier, "priority": index % 1000, "subject": subject, "ingress": [accept]},
    })))
}

fn network_policy(index: u32, variant: u32) -> Event {
    let peers: Vec<Value> = (0..2).map(|n| json!({"podSelector": {"matchLabels": {"app": format!("app-{}", (index * 7 + n + variant) % APPS)}}})).collect();
    let block = json!({"ipBlock": {"cidr": format!("192.168.{}.0/24", index % 250), "except": [format!("192.168.{}.64/26", index % 250)]}});
    Event::Policy(networkpolicy::read(&json!({
        "metadata": {"name": format!("policy-{index}"), "namespace": "default"},
        "spec": {
            "podSelector": {"matchLabels": {"app": format!("app-{}", index % 110)}},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": peers, "ports": [{"port": 1000 + index}, {"port": "http"}]}, {"from": [block]}],
            "egress": [{"to": [{"podSelector": {}}], "ports": [{"port": 8080}]}],
        },
    })))
}

fn resident() -> anyhow::Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").trim().parse()?)
}

fn quantile(sorted: &[Duration], of: f64) -> Duration {
    sorted[((sorted.len() - 1) as f64 * of) as usize]
}

#[expect(clippy::print_stdout, reason = "its output is what it is run for")]
fn told(what: &str, mut times: Vec<Duration>) {
    times.sort();
    let (p50, p99) = (quantile(&times, 0.5), quantile(&times, 0.99));
    println!("{what:<58} p50 {:>9.1} us   p99 {:>9.1} us", p50.as_secs_f64() * 1e6, p99.as_secs_f64() * 1e6);
}

#[expect(clippy::print_stdout, reason = "its output is what it is run for")]
fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    if let Some(nets) = cli.networks {
        print!("{}", policy_tests::networks::measure(nets)?);
        return Ok(());
    }
    if cli.tenants {
        print!("{}", policy_tests::tenants::measure()?);
        return Ok(());
    }
    if let Some(rounds) = cli.sources {
        return source_checks(rounds.max(1));
    }
    let own: Vec<IpNet> = vec!["10.1.0.0/25".parse()?];
    let settings = Settings { own: own.into_iter().collect(), strangers: true, ..without_budgets() };
    let mut rig = Rig::new(settings, Default::default()).context("it needs root")?;
    one_element(&mut rig, cli.changes)?;
    first_packets()?;
    let before = resident()?;
    let compiler = &mut rig.enforcer.compiler;
    let began = Instant::now();
    compiler.take(Event::Namespaces(vec![Namespace::new("default", Default::default())]));
    compiler.take(Event::Pods((0..cli.pods).map(|index| pod(index, cli.local, 0)).collect()));
    calico_tiers().into_iter().filter(|_| cli.tiers).for_each(|tier| compiler.take(tier));
    (0..cli.policies).for_each(|index| compiler.take(policy(index, 0, cli.tiers)));
    let read = began.elapsed();
    let began = Instant::now();
    let delta = compiler.update();
    let compiled = began.elapsed();
    drop(delta);
    rig.enforcer.distrust();
    let began = Instant::now();
    rig.settle()?;
    let written = began.elapsed();
    let ruleset = rig.enforcer.compiler.ruleset();
    let rules: usize = ruleset.chains.values().map(|chain| chain.rules.len()).sum();
    let elements: usize = ruleset.sets.values().map(|set| set.elements.len()).sum();
    println!(
        "cold start: {} pods, {} local, {} policies: {:.0} ms to take, {:.0} ms to compile, {:.0} ms to write; {} chains, {rules} rules, {} sets, {elements} elements; {} MiB",
        cli.pods,
        cli.local,
        cli.policies,
        read.as_secs_f64() * 1e3,
        compiled.as_secs_f64() * 1e3,
        written.as_secs_f64() * 1e3,
        ruleset.chains.len(),
        ruleset.sets.len(),
        (resident()? - before) / 1024,
    );
    let mut random = 7_u32;
    let mut dice = |below: u32| {
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (random >> 8) % below
    };
    let time = |rig: &mut Rig, event: Event| -> anyhow::Result<Duration> {
        let began = Instant::now();
        rig.enforcer.compiler.take(event);
        rig.enforce()?;
        let took = began.elapsed();
        rig.settle()?;
        Ok(took)
    };
    let mut times = Vec::new();
    for version in 1..=cli.changes {
        let index = cli.local + dice(cli.pods - cli.local);
        times.push(time(&mut rig, Event::Pod(pod(index, cli.local, version)))?);
    }
    told("another node's pod is labelled anew, until the kernel has it", times);
    let mut times = Vec::new();
    for version in 1..=cli.changes.min(300) {
        times.push(time(&mut rig, Event::Pod(pod(dice(cli.local), cli.local, version)))?);
    }
    told("a pod of this node is labelled anew", times);
    let mut times = Vec::new();
    for variant in 1..=cli.changes.min(100) {
        times.push(time(&mut rig, policy(dice(cli.policies), variant, cli.tiers))?);
    }
    told("a policy changes", times);
    println!("memory then: {} MiB", resident()? / 1024);
    Ok(())
}

/// One element more and less in a set of 20,000, without anything to compile.
fn one_element(rig: &mut Rig, changes: u32) -> anyhow::Result<()> {
    let mut table = std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)?;
        anyhow::Ok(Table::open(Ownership::Owner)?)
    })
    .join()
    .map_err(|_| anyhow::anyhow!("no namespace"))??;
    let (name, family, kind) = ("s".to_owned(), Family::V4, Kind::Addresses);
    let address = |n: u32| Element::Address(std::net::Ipv4Addr::from(0x0a00_0000 + n).into());
    let add = |elements| Change::AddElements { set: name.clone(), family, kind, elements };
    table.replace(&Default::default())?;
    table.commit(&[
        Change::AddSet { name: name.clone(), family, kind },
        add((0..20_000).map(address).collect()),
    ])?;
    let mut times = Vec::new();
    for n in 0..changes {
        let began = Instant::now();
        table.commit(&[add(vec![address(100_000 + n)])])?;
        times.push(began.elapsed());
    }
    told("one element into a set of 20,000, transaction alone", times);
    let mut times = Vec::new();
    rig.run("nft", "add table inet beside")?;
    rig.run("nft", "add set inet beside s { type ipv4_addr ; }")?;
    for n in 0..changes.min(200) {
        let began = Instant::now();
        rig.run("nft", &format!("add element inet beside s {{ 10.{}.{}.1 }}", n / 250, n % 250))?;
        times.push(began.elapsed());
    }
    told("the same by the nft program, into an empty set", times);
    rig.run("nft", "delete table inet beside")?;
    Ok(())
}

/// First packets of flows past rules that do not match, the last one does.
#[expect(clippy::print_stdout, reason = "its output is what it is run for")]
fn first_packets() -> anyhow::Result<()> {
    for rules in [0_u32, 100, 1_000, 10_000] {
        let rate = std::thread::spawn(move || -> anyhow::Result<f64> {
            let mut rig = Rig::new(without_budgets(), Default::default())?;
            let own = |name: &str, address: &str| policy_tests::objects::pod(name, name, &[address]);
            let rule = |n: u32| json!({"from": [{"podSelector": {"matchLabels": {"app": format!("a{}", n % 100)}}}], "ports": [{"port": 1 + n}]});
            let last = json!({"from": [{"podSelector": {"matchLabels": {"app": "client"}}}]});
            let policy = |name: &str, ingress: Vec<Value>| {
                policy_tests::objects::policy(name, json!({"podSelector": {"matchLabels": {"app": "server"}}, "ingress": ingress}))
            };
            // By name, so that the one that matches comes last.
            let many = (0..rules).step_by(1_000).map(|first| {
                policy(&format!("p{first:05}"), (first..rules.min(first + 1_000)).map(rule).collect())
            });
            let pods = [own("client", "10.0.1.1"), own("server", "10.0.1.2")].map(Event::Pod);
            rig.tell(pods.into_iter().chain(many).chain([policy("z", vec![last])]))?;
            let packet = Packet::first("10.0.1.1".parse()?, "10.0.1.2".parse()?, 17, 80, 1);
            let packets: Vec<Packet> =
                (0..2_000).map(|n| Packet { number: n, source_port: 1024 + n as u16, ..packet }).collect();
            let began = Instant::now();
            let mut passed = 0;
            for _ in 0..5 {
                passed += rig.pass(Link::Pods, &packets)?.into_iter().filter(|passed| *passed).count();
            }
            anyhow::ensure!(passed == 10_000, "{passed} of 10,000 passed");
            Ok(began.elapsed().as_secs_f64() / 10_000.0)
        })
        .join()
        .map_err(|_| anyhow::anyhow!("no rig"))??;
        println!(
            "first packet of a flow past {rules:>6} rules of its class, sent, judged, received: {:>8.2} us",
            rate * 1e6
        );
    }
    Ok(())
}

/// Seconds of processor time of this process, the kernel's for its packets included.
fn busy() -> anyhow::Result<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let (_, fields) = stat.rsplit_once(')').context("/proc/self/stat")?;
    let ticks: Vec<u64> =
        fields.split_whitespace().skip(11).take(2).map(str::parse).collect::<Result<_, _>>()?;
    Ok(ticks.iter().sum::<u64>() as f64 / 100.0)
}

/// Packets of established flows with and without the check, in turns: rate and processor time of each beside the first.
#[expect(clippy::print_stdout, reason = "its output is what it is run for")]
fn source_checks(rounds: usize) -> anyhow::Result<()> {
    const PACKETS: u32 = 40_000;
    let nets = |own: &str| -> anyhow::Result<_> { Ok([own.parse::<IpNet>()?].into()) };
    for (family, own, ends) in [
        ("IPv4", "10.0.1.0/24", ["10.0.1.1", "10.0.1.2"]),
        ("IPv6", "fd00:1::/64", ["fd00:1::1", "fd00:1::2"]),
    ] {
        let unchecked = Settings { own: nets(own)?, ..without_budgets() };
        let from_pods = Settings { check_sources: true, ..unchecked.clone() };
        // Of another network: neither end is of this node.
        let outside = Settings { outside: ["pods0".to_owned()].into(), ..from_pods.clone() };
        let arms = [
            ("pods, unchecked", unchecked.clone()),
            ("pods, checked", from_pods),
            ("others, unchecked", unchecked),
            ("others, checked", outside),
        ];
        let mut rig = Rig::new(arms[0].1.clone(), Default::default())?;
        rig.tell(ends.map(|address| Event::Pod(policy_tests::objects::pod(address, address, &[address]))))?;
        let world =
            if family == "IPv4" { ["192.0.2.1", "192.0.2.2"] } else { ["2001:db8::1", "2001:db8::2"] };
        let mut measured = vec![Vec::new(); arms.len()];
        for _ in 0..rounds {
            for (index, (_, settings)) in arms.iter().enumerate() {
                rig.enforcer.compiler.configure(settings.clone(), Default::default());
                rig.settle()?;
                let [source, destination] = if index >= 2 { world } else { ends };
                let packet = Packet::first(source.parse()?, destination.parse()?, 17, 80, 0);
                let number = rig.number();
                rig.pass(Link::Pods, &[packet, packet.answer(number)])?;
                let packets: Vec<Packet> = (0..2_000).map(|number| Packet { number, ..packet }).collect();
                let (began, spent) = (Instant::now(), busy()?);
                let mut passed = 0;
                for _ in 0..PACKETS / 2_000 {
                    passed += rig.pass(Link::Pods, &packets)?.into_iter().filter(|passed| *passed).count();
                }
                anyhow::ensure!(passed == PACKETS as usize, "{passed} of {PACKETS} passed");
                let rate = f64::from(PACKETS) / began.elapsed().as_secs_f64();
                measured[index].push((rate, (busy()? - spent) / f64::from(PACKETS) * 1e6));
            }
        }
        for (index, (name, _)) in arms.iter().enumerate() {
            let median = |of: fn(&(f64, f64)) -> f64| {
                let mut values: Vec<f64> = measured[index].iter().map(of).collect();
                values.sort_by(f64::total_cmp);
                values[values.len() / 2]
            };
            println!(
                "{family} {name:<17} {:>9.0} packets/s, {:>6.2} us of CPU each (medians of {rounds} rounds, in turns)",
                median(|(rate, _)| *rate),
                median(|(_, spent)| *spent)
            );
        }
    }
    Ok(())
}
