//! The cost of large network sets: the time until enforced, and one more prefix.

use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use mesh_policy::{Event, calico};
use serde_json::{Value, json};

use crate::rig::Rig;
use crate::tenants::without_budgets;
use crate::{Link, Packet, objects};

/// Prefixes of each set, where they are spread over several: more does not go into one object of an API server.
const OF_ONE: usize = 10_000;
/// Changes of each kind.
const CHANGES: usize = 50;

/// Addresses far from each other, so that none joins another: each is a range of its own.
fn address(index: u32) -> Ipv4Addr {
    Ipv4Addr::from(0xc000_0000 | ((index.wrapping_mul(2_654_435_761) >> 3) & 0x1fff_fffe))
}

fn set(name: usize, nets: &[String]) -> Value {
    json!({"metadata": {"name": format!("feed-{name}"), "labels": {"feed": "bad"}}, "spec": {"nets": nets}})
}

fn read(manifest: &Value) -> Event {
    Event::Referent(calico::global_network_set(manifest))
}

fn resident() -> anyhow::Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    Ok(line.and_then(|line| line.trim().trim_end_matches(" kB").trim().parse().ok()).unwrap_or_default())
}

fn median(times: &mut [Duration]) -> f64 {
    times.sort();
    times[times.len() / 2].as_secs_f64() * 1e3
}

/// Measures a deny list of so many prefixes, in one object and in several.
pub fn measure(nets: u32) -> anyhow::Result<String> {
    let mut text = String::new();
    for (how, of_one) in [("one object", usize::MAX), ("objects of 10,000", OF_ONE)] {
        let (how, of_one) = (how.to_owned(), of_one);
        // A namespace of its own for each.
        let told = std::thread::spawn(move || spread(&how, nets, of_one)).join();
        text.push_str(&told.map_err(|_| anyhow::anyhow!("no rig"))??);
    }
    Ok(text)
}

fn spread(how: &str, count: u32, of_one: usize) -> anyhow::Result<String> {
    let mut rig = Rig::new(without_budgets(), Default::default())?;
    let deny = json!({"metadata": {"name": "deny-feed"}, "spec": {"selector": "app == 'db'", "types": ["Ingress"],
        "ingress": [{"action": "Deny", "source": {"selector": "feed == 'bad'"}}, {"action": "Allow"}]}});
    rig.tell([Event::Pod(objects::pod("db", "db", &["10.0.1.2"])), Event::Policy(calico::global(&deny))])?;
    let nets: Vec<String> = (0..count).map(|index| address(index).to_string()).collect();
    let mut sets: Vec<Vec<String>> = nets.chunks(of_one.min(nets.len())).map(<[String]>::to_vec).collect();
    let before = resident()?;
    let began = Instant::now();
    let events: Vec<Event> = sets.iter().enumerate().map(|(name, nets)| read(&set(name, nets))).collect();
    let parsed = began.elapsed();
    let began = Instant::now();
    events.into_iter().for_each(|event| rig.enforcer.compiler.take(event));
    rig.enforce()?;
    let in_force = began.elapsed();
    rig.settle()?;
    let memory = (resident()?.saturating_sub(before)) / 1024;
    let elements: usize = rig.enforcer.compiler.ruleset().sets.values().map(|set| set.elements.len()).sum();
    let last = sets.len() - 1;
    let (mut reads, mut mores, mut lesses) = (Vec::new(), Vec::new(), Vec::new());
    for index in 0..CHANGES {
        for more in [true, false] {
            match more {
                true => sets[last].push(Ipv4Addr::from(0xac10_0000 + 2 * index as u32).to_string()),
                false => drop(sets[last].pop()),
            }
            let began = Instant::now();
            let event = read(&set(last, &sets[last]));
            reads.push(began.elapsed());
            let began = Instant::now();
            rig.enforcer.compiler.take(event);
            rig.enforce()?;
            let took = began.elapsed();
            if more {
                mores.push(took)
            } else {
                lesses.push(took)
            }
            rig.settle()?;
        }
    }
    // What is listed is denied, and nothing else.
    let mut to = |from: Ipv4Addr, number: u32| -> anyhow::Result<bool> {
        let packet = Packet::first(from.into(), "10.0.1.2".parse()?, 17, 80, number);
        rig.passes(Link::Pods, &packet)
    };
    anyhow::ensure!(!to(address(count / 2), 1)?, "what is listed passes");
    anyhow::ensure!(to(Ipv4Addr::new(172, 16, 0, 9), 2)?, "what is not listed is denied");
    let mut text = String::new();
    writeln!(
        text,
        "{count} prefixes in {how} ({} sets): {:.0} ms to read, {:.0} ms until they are in force, {elements} elements, {memory} MiB",
        sets.len(),
        parsed.as_secs_f64() * 1e3,
        in_force.as_secs_f64() * 1e3,
    )?;
    writeln!(
        text,
        "  one more: {:.1} ms until it is in force, one less {:.1} ms; the object is read in {:.1} ms (medians of {CHANGES})",
        median(&mut mores),
        median(&mut lesses),
        median(&mut reads),
    )?;
    Ok(text)
}
