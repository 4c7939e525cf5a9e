//! `traffic`: streams that run beside the steps.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use netlab::flow::{self, FlowSpec};
use netlab::probe::Kind;

use super::{Trouble, Verdict};
use crate::agents::wait_for;
use crate::picture::StreamView;
use crate::scenario::Family;
use crate::scenario::step::Traffic;
use crate::scenario::value::OneOrMany;
use crate::selector::{self, End};
use crate::stage::{ECHO_PORT, MARKER, Stage, Stream};

/// How long answers under way are waited for after the last packet.
const GRACE: Duration = Duration::from_secs(2);

pub(super) fn perform(stage: &mut Stage, traffic: &Traffic, deadline: Instant) -> Verdict {
    match (&traffic.start, &traffic.stop) {
        (Some(name), _) => start(stage, name, traffic),
        (None, Some(name)) => stop(stage, name, traffic, deadline),
        (None, None) => Ok(String::new()),
    }
}

fn start(stage: &mut Stage, name: &str, traffic: &Traffic) -> Verdict {
    let (from, to) = (one(stage, traffic.from.as_deref())?, one(stage, traffic.to.as_deref())?);
    let (here, there) = (addresses(stage, from)?, addresses(stage, to)?);
    let families = traffic.family.map_or(vec![Family::Ipv4, Family::Ipv6], |family| vec![family]);
    let target = families.into_iter().find_map(|family| {
        let has = |list: &[IpAddr]| list.iter().copied().find(|address| Family::of(*address) == family);
        has(&here).and(has(&there))
    });
    let target = target.ok_or_else(|| {
        Trouble::failed(format!("{} and {} share no such address family", from.name(), to.name()))
    })?;
    let namespace = match from {
        End::Pod(pod) => &**stage.lab.pod(&pod.name)?,
        End::Node(node) => &**stage.lab.host(&node.name)?,
        End::Address(_) => return Err(Trouble::failed("a stream starts at a pod or a node")),
    };
    let rate = traffic.packets_per_second.unwrap_or(100);
    let payload = if stage.binaries.is_some() { MARKER.to_vec() } else { b"meshlab-stream".to_vec() };
    let flow = flow::start(namespace, FlowSpec { to: target, kind: Kind::Udp(ECHO_PORT), rate, payload })?;
    let detail = format!("{} -> {} ({target}), {rate} packets/s", from.name(), to.name());
    let stream = Stream { flow, from: from.name(), to: to.name() };
    stage.streams.insert(name.to_owned(), stream);
    Ok(detail)
}

fn stop(stage: &mut Stage, name: &str, traffic: &Traffic, deadline: Instant) -> Verdict {
    let stream = stage
        .streams
        .remove(name)
        .ok_or_else(|| Trouble::failed(format!("no stream `{name}` is running")))?;
    let least = traffic.min_received.unwrap_or(1);
    wait_for(deadline, || stage.interrupted() || stream.flow.snapshot().received >= least);
    stage.go_on()?;
    let report = stream.flow.stop(GRACE)?;
    let longest_gap_ms = report.max_gap.as_secs_f64() * 1000.0;
    stage.note_stream(StreamView {
        name: name.to_owned(),
        sent: report.sent,
        lost: report.lost,
        longest_gap_ms,
    });
    let detail =
        format!("{} sent, {} lost, longest silence {longest_gap_ms:.0} ms", report.sent, report.lost);
    let mut failures = Vec::new();
    let most = traffic.max_lost.unwrap_or(0);
    if report.lost > most {
        failures.push(format!("{} -> {}: {detail}; at most {most} may be lost", stream.from, stream.to));
    }
    if traffic.max_gap.is_some_and(|most| report.max_gap > most.0) {
        failures.push(format!("{} -> {}: {detail}; that is too long", stream.from, stream.to));
    }
    if report.received < least {
        failures.push(format!("only {} packets were answered, at least {least} have to be", report.received));
    }
    if failures.is_empty() { Ok(detail) } else { Err(Trouble::Failed(failures)) }
}

fn one<'a>(stage: &'a Stage, name: Option<&str>) -> Result<End<'a>, Trouble> {
    let name = OneOrMany::One(name.unwrap_or_default().to_owned());
    let found = selector::ends(&stage.layout, &name).map_err(Trouble::failed)?;
    found.first().copied().ok_or_else(|| Trouble::failed(format!("{name} stands for no one")))
}

/// A node is reached by its mesh addresses, or on the LAN where there are no agents.
fn addresses(stage: &Stage, end: End<'_>) -> Result<Vec<IpAddr>, Trouble> {
    match end {
        End::Pod(pod) => Ok(pod.addresses.clone()),
        End::Address(address) => Ok(vec![address]),
        End::Node(node) if stage.binaries.is_none() => Ok(node.lan.clone()),
        End::Node(node) => {
            let status = stage.statuses(&[&node.name]).pop();
            status.map_or(Ok(Vec::new()), |status| Ok(status.map_err(Trouble::failed)?.mesh_addresses))
        }
    }
}
