//! Recorded flows under other policies: which of them would be decided differently.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read as _};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use mesh_policy::State;
use mesh_policy::object::Key;
use mesh_policy::probe::{Answer, AnswerDecision, Place, Probe, ProtocolName};
use serde::{Deserialize, Serialize};

use super::{load, warn};
use crate::cli::PolicyOutput;
use crate::commands::{print, shown};
use crate::config::Config;

/// The longest line of a log that is read.
const LINE_MOST: usize = 64 << 10;
/// The most lines that are named as none.
const WRONG_MOST: usize = 8;

/// What of a line of the flow log counts.
#[derive(Debug, Deserialize)]
struct Recorded {
    verdict: String,
    direction: String,
    source: Option<End>,
    destination: Option<End>,
    protocol: Option<String>,
    #[serde(default)]
    packets: u64,
}

#[derive(Debug, Deserialize)]
struct End {
    ip: IpAddr,
    port: Option<u16>,
    pod: Option<String>,
    namespace: Option<String>,
}

impl End {
    // A pod is who it is, whatever address it has by now.
    fn place(&self) -> Place {
        match (&self.namespace, &self.pod) {
            (Some(namespace), Some(pod)) => Place::Pod(format!("{namespace}/{pod}")),
            _ => Place::Ip(self.ip),
        }
    }

    fn shown(&self) -> String {
        match self.place() {
            Place::Pod(name) => name,
            _ => self.ip.to_string(),
        }
    }
}

/// A flow that is decided differently.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
struct Flow {
    /// `egress` or `ingress`.
    direction: String,
    /// What was decided, as in the log.
    was: &'static str,
    /// What these policies decide.
    becomes: &'static str,
    from: String,
    to: String,
    protocol: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    port: Option<u16>,
    /// The tier, policy and rule that decide now.
    by: String,
}

#[derive(Debug, Serialize)]
struct Difference {
    #[serde(flatten)]
    flow: Flow,
    packets: u64,
}

/// What came of all lines.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct Replay {
    /// Lines that were judged.
    judged: usize,
    /// Lines of which an end is not in the state any more.
    unknown: usize,
    /// Lines about no policy: what was not believed, or was not told apart.
    passed_over: usize,
    /// Lines that are none.
    wrong: usize,
    /// What is decided differently, the most packets first.
    differences: Vec<Difference>,
}

fn by(decision: &AnswerDecision) -> String {
    let parts = [&decision.tier, &decision.policy, &decision.rule];
    let parts: Vec<&str> = parts.into_iter().flatten().map(String::as_str).collect();
    if parts.is_empty() { decision.reason.to_owned() } else { parts.join(" / ") }
}

fn judge(
    state: &State,
    line: &Recorded,
    replay: &mut Replay,
    differences: &mut BTreeMap<Flow, u64>,
) -> Result<(), String> {
    let (Some(source), Some(destination), Some(protocol)) = (&line.source, &line.destination, &line.protocol)
    else {
        replay.passed_over += 1;
        return Ok(());
    };
    if line.direction == "tunnel" {
        replay.passed_over += 1;
        return Ok(());
    }
    let was = match line.verdict.as_str() {
        "allow" => "allow",
        "deny" => "deny",
        "would-deny" => "would-deny",
        other => return Err(format!("verdict: {other:?}")),
    };
    // The log has a protocol's number as text.
    let name = match protocol.parse::<u8>() {
        Ok(number) => ProtocolName::Number(number),
        Err(_) => ProtocolName::Name(protocol.clone()),
    };
    let is_known = |end: &End| match (&end.namespace, &end.pod) {
        (Some(namespace), Some(pod)) => state.world.pod(&Key::new(Some(namespace), pod)).is_some(),
        _ => true,
    };
    if !is_known(source) || !is_known(destination) {
        replay.unknown += 1;
        return Ok(());
    }
    let family = Some(if source.ip.is_ipv4() { 4 } else { 6 });
    let ends = (source.place(), destination.place());
    let probe = Probe { src_port: source.port, ..Probe::new(ends.0, ends.1, name, destination.port, family) };
    let Answer { egress, ingress, .. } = probe.answer(state);
    let decision = match line.direction.as_str() {
        "egress" => egress,
        "ingress" => ingress,
        other => return Err(format!("direction: {other:?}")),
    };
    let Some(decision) = decision else {
        replay.unknown += 1;
        return Ok(());
    };
    replay.judged += 1;
    if (was == "allow") != (decision.verdict == "allow") {
        let flow = Flow {
            direction: line.direction.clone(),
            was,
            becomes: decision.verdict,
            from: source.shown(),
            to: destination.shown(),
            protocol: protocol.clone(),
            port: destination.port,
            by: by(&decision),
        };
        let packets = differences.entry(flow).or_default();
        *packets = packets.saturating_add(line.packets);
    }
    Ok(())
}

/// The next line, of a longer one the beginning. `None`: there is none.
fn next_line(log: &mut impl BufRead) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    let most = LINE_MOST as u64 + 1;
    if log.by_ref().take(most).read_until(b'\n', &mut line)? == 0 {
        return Ok(None);
    }
    let mut ended = line.last() == Some(&b'\n');
    while !ended {
        let mut rest = Vec::new();
        let read = log.by_ref().take(most).read_until(b'\n', &mut rest)?;
        ended = read == 0 || rest.last() == Some(&b'\n');
    }
    Ok(Some(line))
}

fn replay(state: &State, logs: &[PathBuf]) -> anyhow::Result<(Replay, Vec<String>)> {
    let (mut replay, mut differences, mut told) = (Replay::default(), BTreeMap::new(), Vec::new());
    for path in logs {
        let log: Box<dyn io::Read> = match path.to_str() {
            Some("-") => Box::new(io::stdin()),
            _ => Box::new(File::open(path).with_context(|| format!("reading flows from {}", shown(path)))?),
        };
        let mut log = BufReader::new(log);
        for index in 0_usize.. {
            let line = next_line(&mut log).with_context(|| format!("reading flows from {}", shown(path)))?;
            let Some(line) = line else { break };
            if line.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            let judged = match line.len() > LINE_MOST {
                true => Err(format!("longer than {LINE_MOST} bytes")),
                false => serde_json::from_slice::<Recorded>(&line)
                    .map_err(|e| e.to_string())
                    .and_then(|line| judge(state, &line, &mut replay, &mut differences)),
            };
            if let Err(why) = judged {
                replay.wrong += 1;
                if told.len() < WRONG_MOST {
                    told.push(format!("{}: line {}: {why}", shown(path), index + 1));
                }
            }
        }
    }
    let differences = differences.into_iter().map(|(flow, packets)| Difference { flow, packets });
    replay.differences = differences.collect();
    replay.differences.sort_by_key(|difference| std::cmp::Reverse(difference.packets));
    Ok((replay, told))
}

pub(super) fn execute(
    state: &Path,
    logs: &[PathBuf],
    config: Option<&Config>,
    output: PolicyOutput,
) -> anyhow::Result<()> {
    let loaded = load(state, config)?;
    warn(&loaded);
    let (replay, told) = replay(&loaded.state, logs)?;
    told.iter().for_each(|text| eprintln!("no flow: {text}"));
    match output {
        PolicyOutput::Json => print(&format!("{}\n", serde_json::to_string_pretty(&replay)?)),
        PolicyOutput::Table => {
            let mut text = String::new();
            for Difference { flow, packets } in &replay.differences {
                let port = flow.port.map(|port| format!(" {port}")).unwrap_or_default();
                text.push_str(&format!(
                    "{} -> {} {}{port}, {}: was {}, becomes {} by {}, {packets} packets\n",
                    flow.from, flow.to, flow.protocol, flow.direction, flow.was, flow.becomes, flow.by
                ));
            }
            let Replay { judged, unknown, passed_over, wrong, differences } = &replay;
            text.push_str(&format!(
                "{judged} flows judged, {} decided differently; {unknown} of pods that are gone, {passed_over} about no policy, {wrong} lines that are none\n",
                differences.len()
            ));
            print(&text)
        }
    }
}

#[cfg(test)]
mod tests {
    use mesh_policy::Event;
    use mesh_policy::object::Pod;
    use serde_json::{Value, json};

    use super::*;
    use crate::manifest::{self, Object};

    fn state() -> State {
        let pod = |name: &str, address: &str| {
            json!({
                "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "shop", "labels": {"app": name}},
                "status": {"podIP": address},
            })
        };
        let policy = json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "only-web", "namespace": "shop"},
            "spec": {"podSelector": {"matchLabels": {"app": "db"}}, "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "web"}}}]}]},
        });
        let items = [pod("web", "10.1.0.1"), pod("db", "10.1.0.2"), pod("client", "10.1.0.3"), policy];
        let list = json!({"apiVersion": "v1", "kind": "List", "items": items}).to_string();
        let mut state = State::default();
        state.world.set_bounds(&[].into(), true);
        for object in manifest::parse(list.as_bytes()).unwrap().objects {
            match object {
                Object::Pod(pod) => drop(state.take(Event::Pod(Pod::clone(&pod)))),
                Object::Said(said) => drop(state.take(said.there())),
                _ => {}
            }
        }
        state
    }

    fn line(verdict: &str, direction: &str, from: &str, packets: u64) -> Value {
        json!({
            "time": "2026-11-25T14:00:00.000Z", "verdict": verdict, "direction": direction, "policy": {"id": "t_0"},
            // The address that it had then.
            "source": {"ip": "10.9.9.9", "port": 40512, "pod": from, "namespace": "shop"},
            "destination": {"ip": "10.1.0.2", "port": 5432, "pod": "db", "namespace": "shop"},
            "protocol": "TCP", "packets": packets,
        })
    }

    fn replayed(lines: &[Value]) -> (Replay, Vec<String>) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text: Vec<String> = lines.iter().map(Value::to_string).collect();
        std::fs::write(file.path(), text.join("\n")).unwrap();
        replay(&state(), &[file.path().to_owned()]).unwrap()
    }

    #[test]
    fn what_would_be_decided_differently_is_listed_once() {
        let (replay, _) = replayed(&[
            line("allow", "ingress", "client", 3),
            line("allow", "ingress", "client", 4),
            line("deny", "ingress", "web", 90),
            line("allow", "egress", "client", 1),
            line("deny", "ingress", "client", 1),
            line("would-deny", "ingress", "client", 1),
        ]);
        assert_eq!((replay.judged, replay.differences.len()), (6, 2));
        let told = |index: usize| {
            let Difference { flow, packets } = &replay.differences[index];
            (flow.from.as_str(), flow.was, flow.becomes, *packets)
        };
        assert_eq!(told(0), ("shop/web", "deny", "allow", 90));
        assert_eq!(told(1), ("shop/client", "allow", "deny", 7));
        assert_eq!(replay.differences[1].flow.by, "default / NetworkPolicy shop/only-web");
    }

    #[test]
    fn what_cannot_be_judged_is_counted_and_spoils_nothing() {
        let mut apart = line("deny", "ingress", "client", 1);
        apart.as_object_mut().unwrap().remove("source");
        let (replay, told) = replayed(&[
            line("allow", "ingress", "gone", 1),
            line("deny", "tunnel", "client", 1),
            apart,
            line("perhaps", "ingress", "client", 1),
            json!({"verdict": "deny"}),
            json!("a".repeat(2 * LINE_MOST)),
            line("allow", "ingress", "client", 1),
        ]);
        let counts = (replay.judged, replay.unknown, replay.passed_over, replay.wrong);
        assert_eq!((counts, replay.differences.len()), ((1, 1, 2, 3), 1));
        assert!(told[0].contains("line 4: verdict: \"perhaps\""), "{told:?}");
    }
}
