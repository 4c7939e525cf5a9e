//! One line of the log: a record, and what its addresses and its rule are called.

use std::net::IpAddr;

use jiff::Timestamp;
use serde::{Serialize, Serializer};

use super::packet::{Detail, protocol_name};
use super::{Decision, Direction, Record};

/// Whose an address is; what is not known is left out.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Identity {
    /// Name of the pod.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    /// Its namespace.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// The node, of the pod or itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// The site.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub site: Option<String>,
}

/// What the id of a rule stands for.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct RuleName {
    /// The tier that decided.
    pub tier: String,
    /// The policy, or all those that together left no way.
    pub policies: Vec<String>,
    /// The rule of the policy, unless it is what holds where no rule does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
}

/// Knows names for what is in records.
pub trait Identify {
    /// Whose an address is.
    fn address(&self, address: IpAddr) -> Identity;
    /// What a rule's id stands for. `None` when the rule is gone or never was.
    fn rule(&self, id: &str) -> Option<RuleName>;
}

/// A record with names, to be serialized as one JSON object. The names of its fields are stable; those that do not apply are
/// left out. Without `source` and `destination` it counts packets that were not told apart.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Line {
    /// When the first packet came, RFC 3339 in UTC with milliseconds.
    #[serde(serialize_with = "milliseconds")]
    pub time: Timestamp,
    /// When the last one did.
    #[serde(serialize_with = "milliseconds")]
    pub last_time: Timestamp,
    /// `deny`, `would-deny` or `allow`.
    pub verdict: &'static str,
    /// `ingress`, `egress` or `tunnel`.
    pub direction: &'static str,
    /// Which rule.
    pub policy: PolicyField,
    /// Who sent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<EndField>,
    /// To whom.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub destination: Option<EndField>,
    /// `TCP`, `UDP`, `SCTP`, `ICMP`, `ICMPv6` or the number of another protocol, as a string.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub protocol: Option<String>,
    /// Type of ICMP or `ICMPv6`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub icmp_type: Option<u8>,
    /// Its code, of the first packet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub icmp_code: Option<u8>,
    /// How many packets.
    pub packets: u64,
}

/// The rule of a [`Line`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PolicyField {
    /// Its id in the ruleset.
    pub id: String,
    /// What that stands for.
    #[serde(flatten)]
    pub name: Option<RuleName>,
}

/// One end of a [`Line`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct EndField {
    /// Address.
    pub ip: IpAddr,
    /// Port; at the source that of the first packet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// Whose it is.
    #[serde(flatten)]
    pub identity: Identity,
}

impl Record {
    /// The line of this record.
    pub fn to_json(&self, who: &dyn Identify) -> Line {
        let end = |ip: IpAddr, port: Option<u16>| EndField { ip, port, identity: who.address(ip) };
        let detail = self.flow.map_or(Detail::None, |flow| flow.detail);
        let (ports, icmp) = match detail {
            Detail::None => (None, None),
            Detail::Ports { source, destination } => (Some((source, destination)), None),
            Detail::Icmp { kind, code } => (None, Some((kind, code))),
        };
        Line {
            time: self.first,
            last_time: self.last,
            verdict: match self.decision {
                Decision::Denied => "deny",
                Decision::WouldBeDenied => "would-deny",
                Decision::Allowed => "allow",
            },
            direction: match self.direction {
                Direction::Ingress => "ingress",
                Direction::Egress => "egress",
                Direction::Tunnel => "tunnel",
            },
            policy: PolicyField { name: who.rule(&self.id), id: self.id.clone() },
            source: self.flow.map(|flow| end(flow.source, ports.map(|(source, _)| source))),
            destination: self
                .flow
                .map(|flow| end(flow.destination, ports.map(|(_, destination)| destination))),
            protocol: self.flow.map(|flow| protocol_name(flow.protocol)),
            icmp_type: icmp.map(|(kind, _)| kind),
            icmp_code: icmp.map(|(_, code)| code),
            packets: self.count,
        }
    }
}

fn milliseconds<S: Serializer>(time: &Timestamp, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{time:.3}"))
}

#[cfg(test)]
mod tests {
    use super::super::packet::Head;
    use super::*;

    struct Cluster;

    impl Identify for Cluster {
        fn address(&self, address: IpAddr) -> Identity {
            if address != IpAddr::from([10, 1, 0, 7]) {
                return Identity::default();
            }
            let text = |text: &str| Some(text.to_owned());
            Identity { pod: text("web-0"), namespace: text("shop"), node: text("n1"), site: text("aws") }
        }

        fn rule(&self, id: &str) -> Option<RuleName> {
            let policies = vec!["shop/db".to_owned()];
            (id == "abc").then(|| RuleName { tier: "application".to_owned(), policies, rule: None })
        }
    }

    fn record(id: &str, protocol: u8, detail: Detail) -> Record {
        let head =
            Head { source: [10, 1, 0, 7].into(), destination: [192, 0, 2, 1].into(), protocol, detail };
        Record {
            first: "2026-03-01T10:00:00Z".parse().unwrap(),
            last: "2026-03-01T10:00:04.5678Z".parse().unwrap(),
            decision: Decision::Denied,
            direction: Direction::Ingress,
            id: id.to_owned(),
            flow: Some(head),
            count: 12,
        }
    }

    fn json(record: &Record) -> String {
        serde_json::to_string(&record.to_json(&Cluster)).unwrap()
    }

    #[test]
    fn a_line_has_stable_fields_in_order() {
        let ports = Detail::Ports { source: 40_000, destination: 5432 };
        let expected = concat!(
            r#"{"time":"2026-03-01T10:00:00.000Z","lastTime":"2026-03-01T10:00:04.567Z","verdict":"deny","#,
            r#""direction":"ingress","policy":{"id":"abc","tier":"application","policies":["shop/db"]},"#,
            r#""source":{"ip":"10.1.0.7","port":40000,"pod":"web-0","namespace":"shop","node":"n1","site":"aws"},"#,
            r#""destination":{"ip":"192.0.2.1","port":5432},"protocol":"TCP","packets":12}"#,
        );
        assert_eq!(json(&record("abc", 6, ports)), expected);
    }

    #[test]
    fn icmp_has_type_and_code_instead_of_ports() {
        let line = json(&record("abc", 1, Detail::Icmp { kind: 3, code: 13 }));
        assert!(line.ends_with(r#""protocol":"ICMP","icmpType":3,"icmpCode":13,"packets":12}"#), "{line}");
        assert!(!line.contains("port\":"), "{line}");
    }

    #[test]
    fn a_rule_that_nobody_knows_keeps_its_id() {
        let line = json(&record("gone", 47, Detail::None));
        assert!(line.contains(r#""policy":{"id":"gone"},"#) && line.contains(r#""protocol":"47""#), "{line}");
    }

    #[test]
    fn packets_that_were_not_told_apart_have_no_ends() {
        let mut record = record("abc", 6, Detail::None);
        record.flow = None;
        record.decision = Decision::WouldBeDenied;
        record.direction = Direction::Tunnel;
        let line = json(&record);
        assert!(line.contains(r#""verdict":"would-deny","direction":"tunnel""#), "{line}");
        assert!(line.ends_with(r#""policies":["shop/db"]},"packets":12}"#), "{line}");
        record.decision = Decision::Allowed;
        record.direction = Direction::Egress;
        assert!(json(&record).contains(r#""verdict":"allow","direction":"egress""#));
    }
}
