//! The steps of a scenario, as written in YAML.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::lease::Dhcp;
use super::value::{CommandLine, OneOrMany, Span};
use super::{Direction, Family, Protocol};

/// One step: an optional name and deadline, and exactly one action.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Step {
    /// What the step shows, as a sentence. Default: the action's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// How long the step may take. A check is tried again until it holds or this runs out.
    /// Default: 30s; `0s` tries a check exactly once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<Span>,
    /// Check: who reaches whom.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expect: Option<Expect>,
    /// Check: these nodes (`all`, sites or nodes) all have an established, encrypted handshake with each
    /// other, by the status of both ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub handshakes: Option<OneOrMany>,
    /// Check: conditions on `mesh-agent status -o json`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<StatusCheck>,
    /// Writes a manifest into the registry directory, by atomic rename.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub apply: Option<Apply>,
    /// Removes a manifest file from the registry directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delete: Option<Delete>,
    /// Drops matching packets at a site's router or at a node, until `unblock`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block: Option<Block>,
    /// Takes away every block at these sites or nodes (`all` for every block there is).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unblock: Option<OneOrMany>,
    /// The routers of these sites forget all connections and NAT mappings, as one does that reboots.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forget_nat: Option<OneOrMany>,
    /// Sends a signal to the agent or the WireGuard device process of nodes. The agent is not started again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kill: Option<Kill>,
    /// Ends the agent (or the device process) and, for the agent, starts it again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restart: Option<Kill>,
    /// Stops the agents of these nodes with SIGTERM and waits until they are gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop: Option<OneOrMany>,
    /// Starts the agents of these nodes and waits until their status answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start: Option<OneOrMany>,
    /// Runs a command on a node, in a pod or on a site's router and checks what came of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exec: Option<Exec>,
    /// Starts recording packets; `underlay` means every site LAN and every router uplink.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capture: Option<CaptureScope>,
    /// Check on the captures: no marker and no pod address in clear on any recorded link, and WireGuard
    /// packets were really seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub assert_no_cleartext: Option<NoCleartext>,
    /// Starts or stops a constant stream of packets that runs beside the following steps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traffic: Option<Traffic>,
    /// A DHCP server at a site's router gives a node an address, routes and MTU, or the node gives them back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dhcp: Option<Dhcp>,
    /// Tries the inner step again and again until it passes or the deadline runs out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eventually: Option<Eventually>,
    /// The inner check has to hold every time it is tried during the given time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub always: Option<Always>,
}

/// The one action of a step, borrowed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Action<'a> {
    /// `expect`
    Expect(&'a Expect),
    /// `handshakes`
    Handshakes(&'a OneOrMany),
    /// `status`
    Status(&'a StatusCheck),
    /// `apply`
    Apply(&'a Apply),
    /// `delete`
    Delete(&'a Delete),
    /// `block`
    Block(&'a Block),
    /// `unblock`
    Unblock(&'a OneOrMany),
    /// `forgetNat`
    ForgetNat(&'a OneOrMany),
    /// `kill`
    Kill(&'a Kill),
    /// `restart`
    Restart(&'a Kill),
    /// `stop`
    Stop(&'a OneOrMany),
    /// `start`
    Start(&'a OneOrMany),
    /// `exec`
    Exec(&'a Exec),
    /// `capture`
    Capture(&'a CaptureScope),
    /// `assertNoCleartext`
    AssertNoCleartext(&'a NoCleartext),
    /// `traffic`
    Traffic(&'a Traffic),
    /// `dhcp`
    Dhcp(&'a Dhcp),
    /// `eventually`
    Eventually(&'a Eventually),
    /// `always`
    Always(&'a Always),
}

impl Action<'_> {
    /// The action's field name in YAML.
    pub fn keyword(&self) -> &'static str {
        match self {
            Self::Expect(_) => "expect",
            Self::Handshakes(_) => "handshakes",
            Self::Status(_) => "status",
            Self::Apply(_) => "apply",
            Self::Delete(_) => "delete",
            Self::Block(_) => "block",
            Self::Unblock(_) => "unblock",
            Self::ForgetNat(_) => "forgetNat",
            Self::Kill(_) => "kill",
            Self::Restart(_) => "restart",
            Self::Stop(_) => "stop",
            Self::Start(_) => "start",
            Self::Exec(_) => "exec",
            Self::Capture(_) => "capture",
            Self::AssertNoCleartext(_) => "assertNoCleartext",
            Self::Traffic(_) => "traffic",
            Self::Dhcp(_) => "dhcp",
            Self::Eventually(_) => "eventually",
            Self::Always(_) => "always",
        }
    }

    /// True for actions that only look, and may therefore be tried again (`assertNoCleartext` ends a recording).
    pub fn is_check(&self) -> bool {
        matches!(self, Self::Expect(_) | Self::Handshakes(_) | Self::Status(_) | Self::Exec(_))
    }

    /// True for actions that, standing first in a scenario, happen before the agents are started.
    pub fn prepares(&self) -> bool {
        matches!(self, Self::Capture(_) | Self::Apply(_) | Self::Block(_))
    }

    /// True for actions that need running agents.
    pub fn needs_agents(&self) -> bool {
        matches!(
            self,
            Self::Handshakes(_)
                | Self::Status(_)
                | Self::Kill(_)
                | Self::Restart(_)
                | Self::Stop(_)
                | Self::Start(_)
        )
    }
}

/// All the action keywords, for messages.
pub const KEYWORDS: &str = "expect, handshakes, status, apply, delete, block, unblock, forgetNat, kill, restart, stop, \
start, exec, capture, assertNoCleartext, traffic, dhcp, eventually, always";

impl Step {
    /// Every action written in this step; a valid step has one.
    pub fn actions(&self) -> Vec<Action<'_>> {
        [
            self.expect.as_ref().map(Action::Expect),
            self.handshakes.as_ref().map(Action::Handshakes),
            self.status.as_ref().map(Action::Status),
            self.apply.as_ref().map(Action::Apply),
            self.delete.as_ref().map(Action::Delete),
            self.block.as_ref().map(Action::Block),
            self.unblock.as_ref().map(Action::Unblock),
            self.forget_nat.as_ref().map(Action::ForgetNat),
            self.kill.as_ref().map(Action::Kill),
            self.restart.as_ref().map(Action::Restart),
            self.stop.as_ref().map(Action::Stop),
            self.start.as_ref().map(Action::Start),
            self.exec.as_ref().map(Action::Exec),
            self.capture.as_ref().map(Action::Capture),
            self.assert_no_cleartext.as_ref().map(Action::AssertNoCleartext),
            self.traffic.as_ref().map(Action::Traffic),
            self.dhcp.as_ref().map(Action::Dhcp),
            self.eventually.as_ref().map(Action::Eventually),
            self.always.as_ref().map(Action::Always),
        ]
        .into_iter()
        .flatten()
        .collect()
    }

    /// The name to show: the written one, else the action.
    pub fn title(&self) -> String {
        self.name.clone().unwrap_or_else(|| match self.actions().first() {
            Some(action) => action.keyword().to_owned(),
            None => "(empty step)".to_owned(),
        })
    }
}

/// What a probe is expected to show.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// The probe and its answer pass.
    #[default]
    Allow,
    /// No answer comes.
    Deny,
}

/// Which ends a matrix has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Matrix {
    /// Every pod to every other pod.
    Pods,
    /// Every node to every other node.
    Nodes,
}

/// By which address a node is probed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Via {
    /// The node's addresses in the mesh, by its agent's status.
    Mesh,
    /// The node's addresses on its site's LAN.
    Underlay,
}

/// Reachability: a matrix, pairs, or both. The probes carry the marker that `assertNoCleartext` looks for.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Expect {
    /// All ordered pairs of pods or of nodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub matrix: Option<Matrix>,
    /// The matrix's protocol. Default: udp.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<Protocol>,
    /// The matrix's destination port. Default: 7777. Not with icmp.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// The matrix's address families. Default: those that both ends have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub families: Option<Vec<Family>>,
    /// The matrix's verdict. Default: allow.
    #[serde(default)]
    pub verdict: Verdict,
    /// By which address nodes are probed. Default: mesh with agents, underlay without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub via: Option<Via>,
    /// Single probes, each with its own verdict.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pairs: Vec<Pair>,
}

/// Probes from some ends to others.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Pair {
    /// Where the probe starts: a pod, a node, `pods@SITE`, `pods@NODE`, `nodes@SITE`, `pods` or `nodes`.
    pub from: OneOrMany,
    /// Where it goes; the same names as `from`, or an IP address.
    pub to: OneOrMany,
    /// Default: udp.
    #[serde(default)]
    pub protocol: Protocol,
    /// Destination port. Default: 7777. Not with icmp.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// Default: every family that both ends have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub family: Option<Family>,
    /// Default: allow.
    #[serde(default)]
    pub verdict: Verdict,
}

/// Conditions on the agents' status.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct StatusCheck {
    /// Whose status: `all`, sites or nodes. Default: all.
    #[serde(default = "all")]
    pub nodes: OneOrMany,
    /// All of these have to hold on each of the nodes.
    #[serde(rename = "where")]
    pub conditions: Vec<Condition>,
}

pub(super) fn all() -> OneOrMany {
    OneOrMany::One("all".to_owned())
}

/// One condition on a place in the status document.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Condition {
    /// A JSON pointer such as `/ready` or `/guard/egressDrops`. In a list, a segment may be an index, `*` for
    /// each element, or the `name` or `node` of an element: `/peers/gcp-2/state`, `/peers/*/encrypted`.
    pub path: String,
    /// The value there equals this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub equals: Option<Value>,
    /// The value there differs from this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_equals: Option<Value>,
    /// This text occurs in the value or, for a list or object, in any text below it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub contains: Option<String>,
    /// This text occurs nowhere in or below the value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_contains: Option<String>,
    /// The list or object has this many elements.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub count: Option<usize>,
    /// The number (or the list's length) is at least this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at_least: Option<f64>,
    /// The number (or the list's length) is at most this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at_most: Option<f64>,
    /// Whether there is anything but null at the path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exists: Option<bool>,
}

/// A manifest to write. Exactly one of `manifest`, `raw`, `base64`, `source`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Apply {
    /// File name in the registry directory; `published/NAME` speaks in the place of a node's agent.
    pub file: String,
    /// The manifest itself, or a list of manifests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub manifest: Option<Value>,
    /// The file's text, byte for byte: for manifests that are wrong on purpose.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub raw: Option<String>,
    /// The file's bytes in base64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base64: Option<String>,
    /// A file to copy, relative to the scenario's own directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
}

/// A manifest file to remove.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Delete {
    /// File name in the registry directory, as in `apply`.
    pub file: String,
}

/// Packets to drop. Without protocol, port and address everything is dropped.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Block {
    /// A site (its router drops what passes between the site and the others) or a node.
    pub at: OneOrMany,
    /// Default: every protocol.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<Protocol>,
    /// Source or destination port; needs udp or tcp. Default: every port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// The other end's address or prefix. Default: everyone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// As seen from the site or node. Default: both.
    #[serde(default)]
    pub direction: Direction,
}

/// Which process of a node is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Target {
    /// The agent.
    #[default]
    Agent,
    /// The userspace WireGuard process.
    Device,
}

/// A signal to a process of some nodes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Kill {
    /// `all`, sites or nodes.
    pub nodes: OneOrMany,
    /// Default: agent.
    #[serde(default)]
    pub target: Target,
    /// KILL, TERM, INT, HUP, STOP, CONT, USR1 or USR2. Default: KILL for `kill`, TERM for `restart`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<Signal>,
}

/// A signal by its name without `SIG`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "UPPERCASE")]
#[allow(missing_docs)]
pub enum Signal {
    Kill,
    Term,
    Int,
    Hup,
    Stop,
    Cont,
    Usr1,
    Usr2,
}

/// A command and what should come of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Exec {
    /// A node, a pod, or `router@SITE`.
    pub on: String,
    /// A string for `sh -c`, or a list of arguments.
    pub command: CommandLine,
    /// Expected exit code. Default: 0.
    #[serde(default)]
    pub exit_code: i32,
    /// Texts that standard output has to contain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub contains: Option<OneOrMany>,
    /// Texts that standard output must not contain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_contains: Option<OneOrMany>,
}

/// What to record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum CaptureScope {
    /// Every site LAN and every router uplink.
    Underlay,
}

/// Bounds for the cleartext check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct NoCleartext {
    /// WireGuard packets that every recorded link has to show at the least. Default: 1.
    pub min_encrypted: u64,
}

impl Default for NoCleartext {
    fn default() -> Self {
        Self { min_encrypted: 1 }
    }
}

/// Starts or stops a stream. Exactly one of `start` and `stop`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Traffic {
    /// Starts a stream of this name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start: Option<String>,
    /// Stops the stream of this name and judges its losses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop: Option<String>,
    /// With `start`: the sending pod or node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// With `start`: the pod or node that answers each packet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
    /// With `start`: Default: ipv4 where both ends have it, else ipv6.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub family: Option<Family>,
    /// With `start`: packets per second, 1 to 5000. Default: 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub packets_per_second: Option<u32>,
    /// With `stop`: how many packets may stay unanswered. Default: 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_lost: Option<u64>,
    /// With `stop`: how long the stream may have been silent at most. Default: any time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_gap: Option<Span>,
    /// With `stop`: the stream goes on until so many packets were answered or the timeout runs out, which fails
    /// the step. Default: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_received: Option<u64>,
}

/// A step that may take several tries.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Eventually {
    /// Until when the inner step has to pass.
    pub deadline: Span,
    /// The inner step, a check.
    pub step: Box<Step>,
}

/// A check that has to hold all the time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Always {
    /// How long it has to hold.
    #[serde(rename = "for")]
    pub duration: Span,
    /// The inner step, a check.
    pub step: Box<Step>,
}
