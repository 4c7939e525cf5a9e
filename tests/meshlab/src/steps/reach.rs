//! `expect`: plans the probes, asks them, and asks the wrong ones again.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use netlab::probe::{self, Answer, Failure, Kind, Probe};

use super::{POLL, Trouble, Verdict, shortened};
use crate::picture::Matrix as Rows;
use crate::report::count;
use crate::scenario::step::{Expect, Matrix, Verdict as Wanted, Via};
use crate::scenario::value::OneOrMany;
use crate::scenario::{Family, Protocol};
use crate::selector::{self, End};
use crate::stage::{ECHO_PORT, MARKER, Stage};

/// How long one probe waits for its answer. An allowed one is sent again meanwhile, so that one lost packet
/// or a handshake under way does not fail it.
const PATIENCE: Duration = Duration::from_millis(1000);
const RESEND: Duration = Duration::from_millis(200);

struct Planned {
    from: String,
    to: String,
    family: Family,
    protocol: Protocol,
    wanted: Wanted,
    in_matrix: bool,
    probe: Probe,
}

/// Addresses by which nodes are reached, in place of asking for each probe.
struct Ends<'a> {
    stage: &'a Stage,
    mesh: Vec<(String, Vec<IpAddr>)>,
    via: Via,
}

impl Ends<'_> {
    fn addresses(&self, end: &End<'_>) -> Vec<IpAddr> {
        match end {
            End::Pod(pod) => pod.addresses.clone(),
            End::Address(address) => vec![*address],
            End::Node(node) if self.via == Via::Underlay => node.lan.clone(),
            End::Node(node) => self
                .mesh
                .iter()
                .find(|(name, _)| *name == node.name)
                .map_or_else(Vec::new, |(_, addresses)| addresses.clone()),
        }
    }

    /// Whether packets to there have to stay inside tunnels, and so may carry the marker.
    fn is_inner(&self, to: &End<'_>, address: IpAddr) -> bool {
        match to {
            End::Pod(_) => true,
            End::Node(_) => self.via == Via::Mesh,
            End::Address(_) => self
                .stage
                .layout
                .sites
                .iter()
                .flat_map(|site| &site.prefixes)
                .any(|net| net.contains(&address)),
        }
    }
}

/// Checks reachability until everything is as expected, or the deadline.
pub(super) fn expect(stage: &mut Stage, expect: &Expect, deadline: Instant) -> Verdict {
    let mut planned = plan_in_time(stage, expect, deadline)?;
    let mut open: Vec<usize> = (0..planned.len()).collect();
    let mut rounds = 0;
    loop {
        stage.go_on()?;
        rounds += 1;
        let probes: Vec<Probe> = open.iter().map(|index| planned[*index].probe.clone()).collect();
        let whole = open.len() == planned.len();
        let answers = probe::batch(&probes);
        let mut wrong = Vec::new();
        let mut sentences = Vec::new();
        for (index, answer) in open.iter().zip(&answers) {
            let planned = &mut planned[*index];
            note(stage, planned, answer.is_ok());
            if let Some(sentence) = complaint(planned, answer) {
                wrong.push(*index);
                sentences.push(sentence);
            }
        }
        if wrong.is_empty() && whole {
            break;
        }
        if wrong.is_empty() {
            // Each was right at some time; now all of them have to be right at the same time.
            open = (0..planned.len()).collect();
            continue;
        }
        if Instant::now() >= deadline {
            let mut failures =
                vec![format!("{} of {} probes are not as expected", wrong.len(), planned.len())];
            failures.extend(sentences);
            return Err(Trouble::Failed(shortened(failures)));
        }
        open = wrong;
        std::thread::sleep(POLL);
    }
    let all_pods = expect.matrix == Some(Matrix::Pods) && expect.verdict == Wanted::Allow;
    if all_pods && stage.picture.seconds_to_reachability.is_none() {
        stage.picture.seconds_to_reachability = stage.since_agents();
    }
    let again = if rounds > 1 { format!(" after {rounds} rounds") } else { String::new() };
    Ok(format!("{} as expected{again}", count(planned.len(), "probe")))
}

/// Mesh addresses come from the agents, who may need a moment to know them.
fn plan_in_time(stage: &mut Stage, expect: &Expect, deadline: Instant) -> Result<Vec<Planned>, Trouble> {
    let mut planned = None;
    super::until(stage, deadline, |stage| {
        planned = Some(plan(stage, expect)?);
        Ok(String::new())
    })?;
    let planned = planned.unwrap_or_default();
    if planned.is_empty() {
        return Err(Trouble::failed("there is nothing to probe: the ends are the same, or share no family"));
    }
    if expect.matrix == Some(Matrix::Pods) {
        let pods: Vec<String> = stage.layout.pods().map(|pod| pod.name.clone()).collect();
        stage.picture.matrices.clear();
        for family in [Family::Ipv4, Family::Ipv6] {
            if planned.iter().any(|probe| probe.in_matrix && probe.family == family) {
                stage.picture.matrices.push(Rows::new(family, pods.clone()));
            }
        }
    }
    Ok(planned)
}

fn plan(stage: &Stage, expect: &Expect) -> Result<Vec<Planned>, Trouble> {
    let via = expect.via.unwrap_or(if stage.binaries.is_some() { Via::Mesh } else { Via::Underlay });
    let word = |word: &str| OneOrMany::One(word.to_owned());
    let mut groups = Vec::new();
    if let Some(matrix) = expect.matrix {
        let all = word(if matrix == Matrix::Pods { "pods" } else { "nodes" });
        groups.push((
            all.clone(),
            all,
            expect.protocol.unwrap_or_default(),
            expect.port,
            None,
            expect.verdict,
        ));
    }
    groups.extend(expect.pairs.iter().map(|pair| {
        (pair.from.clone(), pair.to.clone(), pair.protocol, pair.port, pair.family, pair.verdict)
    }));

    let resolve = |names: &OneOrMany| selector::ends(&stage.layout, names).map_err(Trouble::failed);
    let mut node_names = Vec::new();
    for (from, to, ..) in &groups {
        for end in resolve(from)?.into_iter().chain(resolve(to)?) {
            if let End::Node(node) = end {
                node_names.push(node.name.as_str());
            }
        }
    }
    node_names.sort_unstable();
    node_names.dedup();
    let mut mesh = Vec::new();
    if via == Via::Mesh {
        for (name, status) in node_names.iter().zip(stage.statuses(&node_names)) {
            let addresses = status.map_err(Trouble::failed)?.mesh_addresses;
            if addresses.is_empty() {
                return Err(Trouble::failed(format!("{name}: its agent names no mesh address")));
            }
            mesh.push(((*name).to_owned(), addresses));
        }
    }
    let ends = Ends { stage, mesh, via };
    let mut planned = Vec::new();
    for (index, (from, to, protocol, port, family, wanted)) in groups.iter().enumerate() {
        let in_matrix = index == 0 && expect.matrix.is_some();
        let families: Vec<Family> = match (in_matrix, &expect.families, family) {
            (true, Some(families), _) => families.clone(),
            (_, _, Some(family)) => vec![*family],
            _ => vec![Family::Ipv4, Family::Ipv6],
        };
        for here in resolve(from)? {
            for there in resolve(to)? {
                if here == there {
                    continue;
                }
                let before = planned.len();
                for family in &families {
                    let kind = kind(*protocol, *port);
                    if let Some(probe) = one(&ends, &here, &there, *family, kind, *wanted)? {
                        let (from, to) = (here.name(), there.name());
                        let (family, protocol, wanted) = (*family, *protocol, *wanted);
                        planned.push(Planned { from, to, family, protocol, wanted, in_matrix, probe });
                    }
                }
                if planned.len() == before && !in_matrix {
                    let sentence =
                        format!("{} and {} share no such address family", here.name(), there.name());
                    return Err(Trouble::failed(sentence));
                }
            }
        }
    }
    Ok(planned)
}

fn kind(protocol: Protocol, port: Option<u16>) -> Kind {
    let port = port.unwrap_or(ECHO_PORT);
    match protocol {
        Protocol::Udp => Kind::Udp(port),
        Protocol::Tcp => Kind::Tcp(port),
        Protocol::Icmp => Kind::Icmp,
    }
}

/// The probe of one pair in one family; none where an end lacks the family.
fn one(
    ends: &Ends<'_>,
    from: &End<'_>,
    to: &End<'_>,
    family: Family,
    kind: Kind,
    wanted: Wanted,
) -> Result<Option<Probe>, Trouble> {
    let of_family = |end: &End<'_>| ends.addresses(end).into_iter().find(|a| Family::of(*a) == family);
    let (Some(_), Some(address)) = (of_family(from), of_family(to)) else { return Ok(None) };
    let namespace = match from {
        End::Pod(pod) => &**ends.stage.lab.pod(&pod.name)?,
        End::Node(node) => &**ends.stage.lab.host(&node.name)?,
        End::Address(_) => return Ok(None),
    };
    let mut payload = if ends.is_inner(to, address) { MARKER.to_vec() } else { b"meshlab-underlay".to_vec() };
    payload.extend_from_slice(format!(" {} {}", from.name(), to.name()).as_bytes());
    let probe = Probe::new(namespace, address, kind).payload(payload).deadline(PATIENCE);
    Ok(Some(if wanted == Wanted::Allow { probe.retry(RESEND) } else { probe }))
}

fn note(stage: &mut Stage, planned: &Planned, reached: bool) {
    if planned.in_matrix
        && let Some(rows) = stage.picture.matrices.iter_mut().find(|rows| rows.family == planned.family)
    {
        rows.note(&planned.from, &planned.to, reached);
    }
}

/// What is wrong with an answer, if anything.
fn complaint(planned: &Planned, answer: &Result<Answer, Failure>) -> Option<String> {
    let Planned { from, to, family, protocol, wanted, probe, .. } = planned;
    let what = match probe.kind {
        Kind::Icmp => protocol.label().to_owned(),
        Kind::Udp(port) | Kind::Tcp(port) => format!("{} {port}", protocol.label()),
    };
    let pair = format!("{from} -> {to} ({}, {what}, {})", family.label(), probe.to);
    match (wanted, answer) {
        (Wanted::Allow, Ok(_)) => None,
        (Wanted::Allow, Err(failure)) => Some(format!("{pair}: should pass, but {failure}")),
        (Wanted::Deny, Ok(_)) => Some(format!("{pair}: should be denied, but was answered")),
        // A changed echo means that packets pass.
        (Wanted::Deny, Err(Failure::Mismatch)) => {
            Some(format!("{pair}: should be denied, but was answered wrongly"))
        }
        (Wanted::Deny, Err(_)) => None,
    }
}
