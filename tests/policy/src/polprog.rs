//! Felix' policy programs, through the one form of all policies.
//!
//! A program is what one endpoint is given in one direction: tiers, then profiles, and for hosts several stages before those. Each stage is
//! a set of policies here, evaluated by the same code as all others.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use anyhow::{Context as _, ensure};
use mesh_policy::evaluate::{Flow, Reason, evaluate};
use mesh_policy::model::{
    Action, Block, Condition, End, Icmp, ObjectId, Order, Peer, Policy, Port, PortMatch, Reach, Rule, Side,
    Subject, Tier,
};
use mesh_policy::object::{Key, NamedPort, Pod};
use mesh_policy::{PolicySet, Protocol, World, protocol::Family};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::oracle::{Asked, Case};

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Program {
    ip_version: u8,
    tiers: Vec<TierOf>,
    profiles: Vec<Profile>,
    #[serde(rename = "hostPreDNATTiers")]
    host_pre_dnat_tiers: Vec<TierOf>,
    host_forward_tiers: Vec<TierOf>,
    host_normal_tiers: Vec<TierOf>,
    host_profiles: Vec<Profile>,
    for_host_interface: bool,
    #[serde(rename = "forXDP")]
    for_xdp: bool,
    suppress_normal_host_policy: bool,
    ip_sets: BTreeMap<String, Vec<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct TierOf {
    name: String,
    end_action: String,
    policies: Vec<Profile>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Profile {
    name: String,
    rules: Vec<RuleOf>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
struct RuleOf {
    action: String,
    protocol: Option<Value>,
    not_protocol: Option<Value>,
    src_nets: Vec<String>,
    not_src_nets: Vec<String>,
    dst_nets: Vec<String>,
    not_dst_nets: Vec<String>,
    src_ports: Vec<(u16, u16)>,
    not_src_ports: Vec<(u16, u16)>,
    dst_ports: Vec<(u16, u16)>,
    not_dst_ports: Vec<(u16, u16)>,
    src_sets: Vec<String>,
    not_src_sets: Vec<String>,
    dst_sets: Vec<String>,
    not_dst_sets: Vec<String>,
    src_named_port_sets: Vec<String>,
    dst_named_port_sets: Vec<String>,
    icmp: Option<Message>,
    #[serde(rename = "notICMP")]
    not_icmp: Option<Message>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
struct Message {
    #[serde(rename = "type")]
    kind: u8,
    #[serde(default)]
    code: Option<u8>,
}

/// Every probe of a case that is not ignored, told, and whether it is judged as expected; `None`: it never leaves its endpoint.
///
/// # Errors
/// A program that is not understood.
pub fn probes(case: &Case) -> anyhow::Result<Vec<(String, Option<bool>)>> {
    let mut all = Vec::new();
    for step in &case.steps {
        let spec = case.resources.iter().chain(&step.apply).next_back().context("no program")?;
        let program: Program = serde_json::from_value(spec["spec"].clone())?;
        let world = program.world()?;
        for asked in step.probes.iter().filter(|asked| asked.expect != "ignore") {
            let flow = asked.probe.flow(&Default::default())?;
            let judged = match flow.source == flow.destination {
                true => None,
                false => Some(program.judge(&world, &flow, asked)? == (asked.expect == "allow")),
            };
            all.push((format!("{asked:?}"), judged));
        }
    }
    Ok(all)
}

/// What a stage says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Says {
    Allow,
    Deny,
    Nothing,
}

impl Program {
    fn judge(&self, world: &World, flow: &Flow, asked: &Asked) -> anyhow::Result<bool> {
        let stage = |tiers: &[TierOf], profiles: Option<&[Profile]>, flow: &Flow| {
            self.stage(world, tiers, profiles, flow)
        };
        let mut untouched = *flow;
        if let Some(before) = &asked.before_nat {
            (untouched.destination, untouched.port) = (before.ip, before.port);
        }
        let pre_dnat = stage(&self.host_pre_dnat_tiers, None, &untouched)?;
        if pre_dnat == Says::Deny {
            return Ok(false);
        }
        if self.for_xdp {
            return Ok(stage(&self.host_normal_tiers, None, flow)? != Says::Deny);
        }
        let local = asked.from_host || asked.to_host;
        if pre_dnat == Says::Nothing {
            if local && !self.suppress_normal_host_policy {
                let profiles = Some(self.host_profiles.as_slice());
                if stage(&self.host_normal_tiers, profiles, flow)? != Says::Allow {
                    return Ok(false);
                }
            } else if !local && stage(&self.host_forward_tiers, None, flow)? == Says::Deny {
                return Ok(false);
            }
        }
        if self.for_host_interface {
            return Ok(true);
        }
        Ok(stage(&self.tiers, Some(&self.profiles), flow)? == Says::Allow)
    }

    /// With profiles, what none of them allows is denied.
    fn stage(
        &self,
        world: &World,
        tiers: &[TierOf],
        profiles: Option<&[Profile]>,
        flow: &Flow,
    ) -> anyhow::Result<Says> {
        let mut policies = PolicySet::default();
        let mut put = |order: usize, tier: &str, end: End, index: usize, profile: &Profile| {
            let rules: Vec<Rule> = profile
                .rules
                .iter()
                .map(|rule| self.rules(rule))
                .collect::<anyhow::Result<Vec<_>>>()?
                .into_iter()
                .flatten()
                .collect();
            policies.put(Policy {
                tier: Tier { order: Order(order as f64), name: tier.to_owned(), end },
                order: Order(index as f64),
                id: ObjectId {
                    kind: "Program",
                    namespace: None,
                    name: format!("{order}/{index}/{}", profile.name),
                },
                subject: Subject::All(BTreeSet::new()),
                egress: None,
                ingress: Some(rules),
                reach: Reach::Ends,
                staged: false,
                replaces: None,
            });
            anyhow::Ok(())
        };
        for (order, tier) in tiers.iter().enumerate() {
            let end = if tier.end_action == "pass" { End::Pass } else { End::Deny };
            for (index, policy) in tier.policies.iter().enumerate() {
                put(order, &tier.name, end, index, policy)?;
            }
        }
        for (index, profile) in profiles.unwrap_or_default().iter().enumerate() {
            put(tiers.len(), "profiles", End::Deny, index, profile)?;
        }
        let decision = evaluate(world, &policies, flow).ingress;
        Ok(match (decision.reason, decision.allowed) {
            (Reason::Unjudged, _) if profiles.is_some() => Says::Deny,
            (Reason::Unjudged, _) => Says::Nothing,
            (_, true) => Says::Allow,
            (_, false) => Says::Deny,
        })
    }

    fn family(&self) -> Family {
        if self.ip_version == 6 { Family::V6 } else { Family::V4 }
    }

    /// A set of addresses with ports is pods that name these ports by the set's name.
    fn world(&self) -> anyhow::Result<World> {
        let mut ports: BTreeMap<IpAddr, BTreeSet<NamedPort>> = BTreeMap::new();
        for (name, members) in &self.ip_sets {
            for member in members.iter().filter(|member| member.contains(',')) {
                let (address, port) = member.split_once(',').context("a member")?;
                let (protocol, port) = port.split_once(':').context("a port")?;
                let address = address.split('/').next().unwrap_or(address).parse()?;
                let named =
                    NamedPort { name: name.to_lowercase(), protocol: protocol.parse()?, port: port.parse()? };
                ports.entry(address).or_default().insert(named);
            }
        }
        let mut world = World::default();
        // Sets hold addresses of anywhere.
        world.set_bounds(&BTreeSet::new(), true);
        for (index, (address, ports)) in ports.into_iter().enumerate() {
            let from = |value: Value| serde_json::from_value(value);
            let mut pod = Pod::new(
                from(json!({"name": format!("p{index}")}))?,
                serde_json::from_value(json!({}))?,
                serde_json::from_value(json!({"podIP": address}))?,
            )?;
            pod.key = Key::new(None, &format!("p{index}"));
            pod.ports = std::sync::Arc::new(ports);
            world.put_pod(pod);
        }
        Ok(world)
    }

    fn nets(nets: &[String]) -> anyhow::Result<BTreeSet<Peer>> {
        let block = |net: &String| Ok(Peer::Block(Block { net: net.parse()?, except: Vec::new() }));
        nets.iter().map(block).collect()
    }

    /// A rule, or several where it speaks of ports without a protocol: of each that has any.
    fn rules(&self, of: &RuleOf) -> anyhow::Result<Vec<Rule>> {
        let action = match of.action.as_str() {
            "allow" => Action::Allow,
            "deny" => Action::Deny,
            "pass" => Action::Pass,
            "log" => Action::Log,
            other => anyhow::bail!("action {other:?}"),
        };
        let protocol = of.protocol.as_ref().map(protocol).transpose()?;
        let mut when = BTreeSet::new();
        when.extend(protocol.map(Condition::Protocol));
        when.extend(of.not_protocol.as_ref().map(self::protocol).transpose()?.map(Condition::NotProtocol));
        let family = self.family();
        let icmp = |message: Message| Icmp { family, kind: message.kind, code: message.code };
        when.extend(of.icmp.map(icmp).map(Condition::Icmp));
        when.extend(of.not_icmp.map(icmp).map(Condition::NotIcmp));
        let ends = [
            (Side::Source, &of.src_nets, &of.not_src_nets, &of.src_sets, &of.not_src_sets),
            (Side::Destination, &of.dst_nets, &of.not_dst_nets, &of.dst_sets, &of.not_dst_sets),
        ];
        for (side, nets, not_nets, sets, not_sets) in ends {
            if !nets.is_empty() {
                when.insert(Condition::Is(side, Self::nets(nets)?));
            }
            if !not_nets.is_empty() {
                when.insert(Condition::IsNot(side, Self::nets(not_nets)?));
            }
            for name in sets {
                when.insert(Condition::Is(side, Self::nets(&self.ip_sets[name])?));
            }
            for name in not_sets {
                when.insert(Condition::IsNot(side, Self::nets(&self.ip_sets[name])?));
            }
        }
        let protocols = protocol.map_or_else(|| Protocol::WITH_PORTS.to_vec(), |protocol| vec![protocol]);
        let range = |(first, last): &(u16, u16)| PortMatch::Range(*first, *last);
        let named = |name: &String| PortMatch::Named(name.to_lowercase());
        for (side, ports, sets) in [
            (Side::Source, &of.src_ports, &of.src_named_port_sets),
            (Side::Destination, &of.dst_ports, &of.dst_named_port_sets),
        ] {
            let all: Vec<PortMatch> = ports.iter().map(range).chain(sets.iter().map(named)).collect();
            if all.is_empty() {
                continue;
            }
            let of_protocols = protocols.iter().flat_map(|protocol| {
                all.iter().map(|ports| Port { protocol: *protocol, ports: ports.clone() })
            });
            when.insert(Condition::Ports(side, of_protocols.collect()));
        }
        let rule = |more: BTreeSet<Condition>| Rule {
            name: String::new(),
            action,
            when: when.iter().cloned().chain(more).collect(),
        };
        let not = [(Side::Source, &of.not_src_ports), (Side::Destination, &of.not_dst_ports)];
        let not: Vec<_> = not.into_iter().filter(|(_, ports)| !ports.is_empty()).collect();
        if not.is_empty() {
            return Ok(vec![rule(BTreeSet::new())]);
        }
        ensure!(action != Action::Log, "a log of other ports would be told several times");
        let of_protocol = |protocol: &Protocol| {
            let conditions = not.iter().map(|(side, ports)| {
                Condition::NotPorts(*side, Some(*protocol), ports.iter().map(range).collect())
            });
            rule(conditions.collect())
        };
        Ok(protocols.iter().map(of_protocol).collect())
    }
}

fn protocol(value: &Value) -> anyhow::Result<Protocol> {
    match value {
        Value::Number(number) => Ok(Protocol(u8::try_from(number.as_u64().context("a protocol")?)?)),
        other => Ok(other.as_str().context("a protocol")?.parse()?),
    }
}
