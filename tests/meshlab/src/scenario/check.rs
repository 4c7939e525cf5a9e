//! What the YAML types alone cannot say: names that must exist, orders that must make sense.

use std::collections::BTreeSet;
use std::path::{Component, Path};

use serde_saphyr::{Location, Spanned};

use super::step::{Action, Apply, Expect, KEYWORDS, Matrix, Pair, Step, Traffic, Via};
use super::value::OneOrMany;
use super::{FirewallRule, Problem, Protocol, Scenario, Site, ruled_out};
use crate::layout::{Layout, LayoutError};
use crate::selector;

/// Checks a scenario and lays it out; every problem is found in one go.
pub(super) fn check(scenario: &Scenario) -> Result<Layout, Vec<Problem>> {
    let mut problems = Vec::new();
    if !is_label(&scenario.name) {
        problems.push(Problem::nowhere(format!(
            "name: `{}` has to be 1 to 63 lower-case letters, digits and dashes",
            scenario.name
        )));
    }
    if scenario.routed_pods && scenario.agents {
        problems
            .push(Problem::nowhere("routedPods: only with `agents: false`; agents carry the pods' packets"));
    }
    for site in &scenario.sites {
        if let Err(message) = ruled_out::mtu(scenario, &site.value) {
            problems.push(Problem::at(site.referenced, message));
        }
        for rule in &site.value.firewall {
            if let Err(message) = check_firewall_rule(rule) {
                problems.push(Problem::at(
                    site.referenced,
                    format!("site `{}`: firewall: {message}", site.value.name),
                ));
            }
        }
    }
    let sites: Vec<&Site> = scenario.sites.iter().map(|site| &site.value).collect();
    let layout = match Layout::compute(&sites) {
        Ok(layout) => layout,
        Err(errors) => {
            // With agents the range is narrower, and told above.
            let told = |error: &LayoutError| matches!(error, LayoutError::Mtu(_, mtu, _) if scenario.agents && ruled_out::too_small(*mtu));
            let errors = errors.into_iter().filter(|(_, error)| !told(error));
            problems.extend(errors.map(|(index, error)| {
                match index.and_then(|index| scenario.sites.get(index)) {
                    Some(site) => Problem::at(site.referenced, error.to_string()),
                    None => Problem::nowhere(format!("sites: {error}")),
                }
            }));
            return Err(problems);
        }
    };
    for name in scenario.mesh.per_site.keys().filter(|name| layout.site(name).is_none()) {
        problems.push(Problem::nowhere(format!("mesh.perSite: there is no site `{name}`")));
    }
    for name in scenario.mesh.per_node.keys().filter(|name| layout.node(name).is_none()) {
        problems.push(Problem::nowhere(format!("mesh.perNode: there is no node `{name}`")));
    }
    problems.extend(ruled_out::fragments(scenario).into_iter().map(Problem::nowhere));
    StepCheck {
        scenario,
        layout: &layout,
        streams: BTreeSet::new(),
        used: BTreeSet::new(),
        leased: BTreeSet::new(),
        capturing: false,
    }
    .run(&mut problems);
    if problems.is_empty() { Ok(layout) } else { Err(problems) }
}

fn is_label(name: &str) -> bool {
    (1..=63).contains(&name.len())
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
        && !name.starts_with('-')
        && !name.ends_with('-')
}

fn check_firewall_rule(rule: &FirewallRule) -> Result<(), String> {
    check_filter(rule.protocol, rule.port, rule.address.as_deref())
}

fn check_filter(protocol: Option<Protocol>, port: Option<u16>, address: Option<&str>) -> Result<(), String> {
    if port.is_some() && !matches!(protocol, Some(Protocol::Udp | Protocol::Tcp)) {
        return Err("a port needs `protocol: udp` or `protocol: tcp`".to_owned());
    }
    if port == Some(0) {
        return Err("port 0 is no port".to_owned());
    }
    match address {
        Some(text) if text.parse::<ipnet::IpNet>().is_err() && text.parse::<std::net::IpAddr>().is_err() => {
            Err(format!("`{text}` is neither an address nor a prefix"))
        }
        _ => Ok(()),
    }
}

/// Walks the steps in order, knowing what earlier ones started.
struct StepCheck<'a> {
    scenario: &'a Scenario,
    layout: &'a Layout,
    streams: BTreeSet<&'a str>,
    used: BTreeSet<&'a str>,
    leased: BTreeSet<&'a str>,
    capturing: bool,
}

impl<'a> StepCheck<'a> {
    fn run(mut self, problems: &mut Vec<Problem>) {
        for Spanned { value: step, referenced, .. } in &self.scenario.steps {
            let mut report = |message: String| problems.push(named(*referenced, step, &message));
            if let Err(message) = self.step(step) {
                report(message);
            }
        }
        for name in &self.streams {
            problems.push(Problem::nowhere(format!(
                "traffic `{name}` is started but never stopped; add `traffic: {{stop: {name}}}`"
            )));
        }
    }

    fn step(&mut self, step: &'a Step) -> Result<(), String> {
        let actions = step.actions();
        let action = match actions.as_slice() {
            [] => return Err(format!("the step does nothing; give it one of: {KEYWORDS}")),
            [action] => *action,
            several => {
                let words: Vec<_> = several.iter().map(Action::keyword).collect();
                return Err(format!("a step does one thing, this one has {}; split it", words.join(" and ")));
            }
        };
        if action.needs_agents() && !self.scenario.agents {
            return Err(format!(
                "`{}` needs agents, but the scenario says `agents: false`",
                action.keyword()
            ));
        }
        match action {
            Action::Expect(expect) => self.expect(expect),
            Action::Handshakes(nodes) => {
                let nodes = selector::nodes(self.layout, nodes)?;
                if nodes.len() < 2 {
                    return Err("handshakes: one node alone has no one to shake hands with".to_owned());
                }
                ruled_out::handshakes(self.scenario, self.layout, &nodes)
                    .map_err(|message| format!("handshakes: {message}"))
            }
            Action::Status(status) => {
                if status.conditions.is_empty() {
                    return Err("status: `where` is empty; write at least one condition".to_owned());
                }
                for condition in &status.conditions {
                    crate::condition::check(condition)?;
                }
                self.nodes(&status.nodes)
            }
            Action::Apply(apply) => check_apply(apply),
            Action::Delete(delete) => check_file(&delete.file),
            Action::Block(block) => {
                check_filter(block.protocol, block.port, block.address.as_deref())?;
                self.nodes(&block.at)
            }
            Action::Unblock(at) | Action::Stop(at) | Action::Start(at) => self.nodes(at),
            Action::ForgetNat(sites) => {
                let known = |name: &str| self.layout.sites.iter().any(|site| site.name == name);
                match sites.iter().find(|name| *name != "all" && !known(name)) {
                    Some(name) => Err(format!("forgetNat: there is no site `{name}`")),
                    None => Ok(()),
                }
            }
            Action::Kill(kill) | Action::Restart(kill) => self.nodes(&kill.nodes),
            Action::Exec(exec) => {
                if step.timeout.is_some_and(|timeout| timeout.0.is_zero()) {
                    return Err("exec: `timeout: 0s` leaves the command no time; write more".to_owned());
                }
                if exec.command.0.is_empty() || exec.command.0[0].is_empty() {
                    return Err("exec: the command is empty".to_owned());
                }
                selector::place(self.layout, &exec.on).map(drop)
            }
            Action::Capture(_) => {
                self.capturing = true;
                Ok(())
            }
            Action::AssertNoCleartext(_) if !self.capturing => {
                Err("assertNoCleartext: nothing is recorded yet; put a step `capture: underlay` before"
                    .to_owned())
            }
            Action::AssertNoCleartext(_) => {
                self.capturing = false;
                Ok(())
            }
            Action::Traffic(traffic) => self.traffic(traffic),
            Action::Dhcp(dhcp) => dhcp.check(self.scenario, self.layout, &mut self.leased),
            Action::Eventually(eventually) => self.inner("eventually", &eventually.step),
            Action::Always(always) => self.inner("always", &always.step),
        }
    }

    fn inner(&mut self, keyword: &str, step: &'a Step) -> Result<(), String> {
        if let [action] = step.actions().as_slice()
            && !action.is_check()
        {
            return Err(format!(
                "{keyword}: `{}` changes things and cannot be tried again; only checks can",
                action.keyword()
            ));
        }
        self.step(step).map_err(|message| format!("{keyword}: {message}"))
    }

    fn nodes(&self, names: &OneOrMany) -> Result<(), String> {
        selector::nodes(self.layout, names).map(drop)
    }

    fn expect(&self, expect: &Expect) -> Result<(), String> {
        if expect.matrix.is_none() && expect.pairs.is_empty() {
            return Err("expect: write `matrix: pods`, `matrix: nodes` or `pairs`".to_owned());
        }
        if expect.via == Some(Via::Mesh) && !self.scenario.agents {
            return Err("expect: `via: mesh` needs agents, but the scenario says `agents: false`".to_owned());
        }
        check_probe(expect.protocol.unwrap_or_default(), expect.port)?;
        match expect.matrix {
            Some(Matrix::Pods) if self.layout.pods().count() < 2 => {
                return Err("expect: a pod matrix needs two pods".to_owned());
            }
            Some(Matrix::Nodes) if self.layout.nodes().count() < 2 => {
                return Err("expect: a node matrix needs two nodes".to_owned());
            }
            Some(Matrix::Pods) => ruled_out::pod_matrix(self.layout, expect.families.as_deref())
                .map_err(|message| format!("expect: matrix: {message}"))?,
            _ => {}
        }
        expect.pairs.iter().try_for_each(|pair| self.pair(pair))
    }

    fn pair(&self, pair: &Pair) -> Result<(), String> {
        check_probe(pair.protocol, pair.port)?;
        let from = selector::ends(self.layout, &pair.from)?;
        if from.iter().any(|end| matches!(end, selector::End::Address(_))) {
            return Err("expect: `from` has to be a pod or a node, not an address".to_owned());
        }
        let to = selector::ends(self.layout, &pair.to)?;
        from.iter()
            .flat_map(|here| to.iter().map(move |there| (here, there)))
            .try_for_each(|(here, there)| ruled_out::pair(here, there, pair.family))
            .map_err(|message| format!("expect: {message}"))
    }

    fn traffic(&mut self, traffic: &'a Traffic) -> Result<(), String> {
        match (&traffic.start, &traffic.stop) {
            (Some(name), None) => {
                if !self.used.insert(name) {
                    return Err(format!("traffic: the name `{name}` is taken by an earlier stream"));
                }
                self.streams.insert(name);
                if traffic.max_lost.is_some() || traffic.min_received.is_some() {
                    return Err("traffic: maxLost and minReceived belong to the step that stops the stream"
                        .to_owned());
                }
                if !(1..=5000).contains(&traffic.packets_per_second.unwrap_or(100)) {
                    return Err("traffic: packetsPerSecond has to be 1 to 5000".to_owned());
                }
                for (field, end) in [("from", &traffic.from), ("to", &traffic.to)] {
                    let name = end.as_ref().ok_or_else(|| format!("traffic: `start` needs `{field}`"))?;
                    let found = selector::ends(self.layout, &OneOrMany::One(name.clone()))?;
                    if !matches!(found.as_slice(), [selector::End::Pod(_) | selector::End::Node(_)]) {
                        return Err(format!("traffic: `{field}` has to be one pod or one node"));
                    }
                }
                Ok(())
            }
            (None, Some(name)) => {
                if traffic.from.is_some() || traffic.to.is_some() || traffic.packets_per_second.is_some() {
                    return Err(
                        "traffic: from, to and packetsPerSecond belong to the step that starts it".to_owned()
                    );
                }
                if self.streams.remove(name.as_str()) {
                    Ok(())
                } else {
                    Err(format!("traffic: no stream `{name}` is running here"))
                }
            }
            _ => Err("traffic: write either `start` or `stop`".to_owned()),
        }
    }
}

fn named(location: Location, step: &Step, message: &str) -> Problem {
    Problem::at(location, format!("step `{}`: {message}", step.title()))
}

fn check_probe(protocol: Protocol, port: Option<u16>) -> Result<(), String> {
    match port {
        Some(0) => Err("expect: port 0 is no port".to_owned()),
        Some(_) if protocol == Protocol::Icmp => Err("expect: icmp has no port".to_owned()),
        _ => Ok(()),
    }
}

fn check_apply(apply: &Apply) -> Result<(), String> {
    check_file(&apply.file)?;
    let contents =
        [apply.manifest.is_some(), apply.raw.is_some(), apply.base64.is_some(), apply.source.is_some()];
    if contents.iter().filter(|given| **given).count() != 1 {
        return Err("apply: write exactly one of manifest, raw, base64 and source".to_owned());
    }
    if let Some(text) = &apply.base64 {
        crate::manifest::decode_base64(text).map_err(|error| format!("apply: base64: {error}"))?;
    }
    Ok(())
}

/// A file name in the registry directory, or one level down in `published/`.
fn check_file(file: &str) -> Result<(), String> {
    let parts: Vec<_> = Path::new(file).components().collect();
    let good = match parts.as_slice() {
        [Component::Normal(_)] => true,
        [Component::Normal(folder), Component::Normal(_)] => *folder == "published",
        _ => false,
    };
    if good && !file.ends_with('/') {
        Ok(())
    } else {
        Err(format!("file: `{file}` has to be a file name, or published/NAME"))
    }
}
