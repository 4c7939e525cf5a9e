//! Replays the cases of public suites: against `mesh-agent policy evaluate`, and against the kernel with real packets.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context as _, ensure};
use clap::Parser;
use mesh_policy::Protocol;
use mesh_policy::evaluate::{Flow, Reason, evaluate};
use policy_tests::oracle::{Case, Standing};
use policy_tests::rig::{NODE, settings};
use policy_tests::{Link, Packet, Rig, polprog, selectors};
use serde_json::{Value, json};

/// Replays the cases of public network-policy suites.
#[derive(Debug, Parser)]
struct Cli {
    /// The folder with a folder for each suite.
    #[arg(long)]
    oracles: PathBuf,
    /// The `mesh-agent` program.
    #[arg(long)]
    agent: PathBuf,
    /// Leave out the real packets, which need root.
    #[arg(long)]
    no_packets: bool,
}

/// Suites of manifests.
const SUITES: [&str; 6] = ["cyclonus", "k8s-e2e", "knp", "cnp-conformance", "knp-anp-as-cnp", "calico-v3"];
/// Disagreements that are shown in full.
const SHOWN: usize = 20;

#[derive(Debug, Default)]
struct Count {
    cases: usize,
    agree: usize,
    disagree: usize,
    ignored: usize,
    /// Flows that no packet can be made of: a pod to its own address, which never leaves it.
    inside: usize,
    /// Messages that begin nothing: conntrack calls them invalid, and what it cannot place is dropped.
    invalid: usize,
    later: usize,
    seconds: f64,
}

#[derive(Default)]
struct Tally {
    counts: BTreeMap<(&'static str, String), Count>,
    shown: usize,
}

impl Tally {
    fn count(&mut self, how: &'static str, suite: &str) -> &mut Count {
        self.counts.entry((how, suite.to_owned())).or_default()
    }

    fn note(&mut self, how: &'static str, suite: &str, agrees: bool, told: impl FnOnce() -> String) {
        let count = self.count(how, suite);
        if agrees {
            count.agree += 1;
            return;
        }
        count.disagree += 1;
        self.shown += 1;
        if self.shown <= SHOWN {
            eprintln!("DISAGREES {how}: {}", told());
        }
    }
}

#[expect(clippy::print_stdout, reason = "its output is what it is run for")]
fn main() -> anyhow::Result<ExitCode> {
    let cli = Cli::parse();
    let mut tally = Tally::default();
    for suite in SUITES {
        let cases = Case::load_all(&cli.oracles.join(suite))?;
        eprintln!("== {suite}: {} cases", cases.len());
        let (cases, later): (Vec<_>, Vec<_>) =
            cases.into_iter().partition(|(_, case)| case.unknown_kind().is_none());
        tally.count("evaluate", suite).later = later.len();
        let began = Instant::now();
        for (file, case) in &cases {
            by_command(&cli.agent, file, case, &mut tally)?;
        }
        tally.count("evaluate", suite).seconds = began.elapsed().as_secs_f64();
        if cli.no_packets || cases.is_empty() {
            continue;
        }
        for family in [4, 6] {
            let how = if family == 4 { "packets, IPv4" } else { "packets, IPv6" };
            let began = Instant::now();
            let mut rig = Rig::new(settings(), BTreeMap::new()).context("real packets need root")?;
            for (file, case) in &cases {
                by_packets(&mut rig, file, case, family, how, &mut tally).with_context(|| file.clone())?;
            }
            tally.count(how, suite).seconds = began.elapsed().as_secs_f64();
        }
    }
    let began = Instant::now();
    for (file, case) in Case::load_all(&cli.oracles.join("calico-polprog"))? {
        let counts = tally.count("evaluate", "calico-polprog");
        counts.cases += 1;
        counts.ignored +=
            case.steps.iter().flat_map(|step| &step.probes).filter(|asked| asked.expect == "ignore").count();
        for (told, judged) in polprog::probes(&case).with_context(|| file.clone())? {
            match judged {
                None => tally.count("evaluate", "calico-polprog").inside += 1,
                Some(agrees) => {
                    tally.note("evaluate", "calico-polprog", agrees, || format!("{file}: {told}"));
                }
            }
        }
    }
    tally.count("evaluate", "calico-polprog").seconds = began.elapsed().as_secs_f64();
    let began = Instant::now();
    for (told, agrees) in selectors::cases(&cli.oracles.join("selectors"))? {
        tally.note("parsing", "selectors", agrees, || told);
        tally.count("parsing", "selectors").cases += 1;
    }
    tally.count("parsing", "selectors").seconds = began.elapsed().as_secs_f64();
    println!(
        "{:<16} {:<16} {:>6} {:>8} {:>9} {:>8} {:>7} {:>8} {:>6} {:>7}",
        "against", "suite", "cases", "agree", "disagree", "ignored", "inside", "invalid", "later", "seconds"
    );
    let mut wrong = 0;
    for ((how, suite), count) in &tally.counts {
        let Count { cases, agree, disagree, ignored, inside, invalid, later, seconds } = count;
        wrong += disagree;
        println!(
            "{how:<16} {suite:<16} {cases:>6} {agree:>8} {disagree:>9} {ignored:>8} {inside:>7} {invalid:>8} {later:>6} {seconds:>7.1}"
        );
    }
    println!(
        "ignored: the suite itself says so. inside: a pod to its own address. invalid: an ICMP message that begins nothing, which conntrack drops whatever a rule says. later: cases with kinds of policies that are not known yet."
    );
    println!("{wrong} disagreements");
    for suite in SUITES.iter().chain(&["calico-polprog"]) {
        let agree = tally.counts.get(&("evaluate", (*suite).to_owned())).map_or(0, |count| count.agree);
        ensure!(agree > 0, "{suite}: no case of it was judged");
    }
    Ok(if wrong == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Asks the program, with a directory of manifests for each step.
fn by_command(agent: &Path, file: &str, case: &Case, tally: &mut Tally) -> anyhow::Result<()> {
    const HOW: &str = "evaluate";
    let mut standing = Standing::new(&case.resources);
    let folder = tempfile::tempdir()?;
    let probes_at = folder.path().join("probes");
    for (index, step) in case.steps.iter().enumerate() {
        standing.step(step);
        fs::write(folder.path().join("state.json"), standing.manifest().to_string())?;
        let probes: Vec<Value> = step.probes.iter().map(|asked| json!({
            "from": place(&asked.probe.from), "to": place(&asked.probe.to), "protocol": protocol(&asked.probe.protocol),
            "port": asked.probe.port, "family": asked.probe.family, "srcPort": asked.probe.src_port,
            "icmpType": asked.probe.icmp_type, "icmpCode": asked.probe.icmp_code,
        })).collect();
        fs::write(&probes_at, Value::Array(probes).to_string())?;
        let output = Command::new(agent)
            .args(["policy", "evaluate", "--state"])
            .arg(folder.path())
            .arg("--probes")
            .arg(&probes_at)
            .output()
            .with_context(|| agent.display().to_string())?;
        ensure!(output.status.success(), "{file}: {}", String::from_utf8_lossy(&output.stderr));
        let answers: Vec<Value> = serde_json::from_slice(&output.stdout)?;
        ensure!(answers.len() == step.probes.len(), "{file}: {} answers", answers.len());
        for (asked, answer) in step.probes.iter().zip(&answers) {
            if asked.expect == "ignore" {
                tally.count(HOW, &case.suite).ignored += 1;
                continue;
            }
            let agrees = answer["verdict"] == asked.expect && answer.get("error").is_none();
            tally.note(HOW, &case.suite, agrees, || format!("{file} step {index}: {asked:?}: {answer}"));
        }
    }
    tally.count(HOW, &case.suite).cases += 1;
    Ok(())
}

fn place(place: &mesh_policy::probe::Place) -> Value {
    use mesh_policy::probe::Place;
    match place {
        Place::Pod(name) => json!({"pod": name}),
        Place::Node(name) => json!({"node": name}),
        Place::Ip(address) => json!({"ip": address}),
    }
}

fn protocol(protocol: &Option<mesh_policy::probe::ProtocolName>) -> Value {
    use mesh_policy::probe::ProtocolName;
    match protocol {
        None => Value::Null,
        Some(ProtocolName::Number(number)) => json!(number),
        Some(ProtocolName::Name(name)) => json!(name),
    }
}

/// Sends the first packet of each flow through the kernel. All pods are on one node, so that both ends are enforced.
fn by_packets(
    rig: &mut Rig,
    file: &str,
    case: &Case,
    family: u8,
    how: &'static str,
    tally: &mut Tally,
) -> anyhow::Result<()> {
    let mut standing = Standing::new(&case.resources);
    let has_blocks = case.has_blocks();
    for (index, step) in case.steps.iter().enumerate() {
        standing.step(step);
        rig.enforcer.compiler.configure(settings(), standing.nodes()?);
        rig.tell(standing.events(|pod| pod.node = Some(NODE.to_owned()))?)?;
        let state = rig.enforcer.compiler.state().clone();
        let mut sent: Vec<(Packet, &str, Flow)> = Vec::new();
        for asked in &step.probes {
            let mut probe = asked.probe.clone();
            // Where a probe names no family, IPv4 is meant; without addresses in policies the other is no different.
            if probe.family.map_or(family == 6 && has_blocks, |named| named != family) {
                continue;
            }
            probe.family = Some(family);
            let Ok(flow) = probe.flow(&state) else { continue };
            if asked.expect == "ignore" {
                tally.count(how, &case.suite).ignored += 1;
                continue;
            }
            if evaluate(&state.world, &state.policies, &flow).egress.reason == Reason::OwnAddress {
                tally.count(how, &case.suite).inside += 1;
                continue;
            }
            let begins = match flow.protocol {
                Protocol::ICMP => [8, 13, 15, 17].contains(&flow.icmp.0),
                Protocol::ICMPV6 => [128, 139].contains(&flow.icmp.0),
                _ => true,
            };
            // Whatever a rule says of it.
            if !begins {
                tally.count(how, &case.suite).invalid += 1;
                continue;
            }
            let number = rig.number();
            let first = Packet::first(flow.source, flow.destination, flow.protocol.0, flow.port, number);
            let source_port = asked.probe.src_port.unwrap_or(first.source_port);
            let packet = Packet { source_port, icmp: flow.icmp, ..first };
            sent.push((packet, &asked.expect, flow));
        }
        let packets: Vec<Packet> = sent.iter().map(|(packet, ..)| *packet).collect();
        // A flow the other way round, between the same ports, would be an answer.
        let passed = match step.probes.iter().any(|asked| asked.probe.src_port.is_some()) {
            false => rig.pass(Link::Pods, &packets)?,
            true => packets
                .iter()
                .map(|packet| {
                    rig.run("conntrack", "-F")?;
                    rig.passes(Link::Pods, packet)
                })
                .collect::<anyhow::Result<_>>()?,
        };
        for ((_, expect, flow), passed) in sent.iter().zip(passed) {
            let agrees = (*expect == "allow") == passed;
            tally.note(how, &case.suite, agrees, || {
                format!("{file} step {index}: {flow:?}: passed is {passed}")
            });
        }
    }
    tally.count(how, &case.suite).cases += 1;
    Ok(())
}
