//! Tenants of one node: what the policies of one may cost the others.

use mesh_policy::Event;
use mesh_policy::budget::Budgets;
use mesh_policy::compile::Settings;
use policy_tests::rig::settings;
use policy_tests::tenants::{largest, pod, policy, time, without_budgets};
use policy_tests::{Link, Packet, Rig};
use serde_json::json;

use crate::{TCP, UDP, address, in_rig, with_settings};

const HOSTILE: &str = "10.0.1.1";
const VICTIM: &str = "10.0.1.2";
const OTHER: &str = "10.0.1.3";

fn reaches(rig: &mut Rig, to: &str, protocol: u8, port: u16) -> anyhow::Result<bool> {
    let number = rig.number();
    let packet = Packet::first(address(OTHER), address(to), protocol, port, number);
    rig.passes(Link::Pods, &packet)
}

fn pods() -> [Event; 3] {
    [pod("h", "hostile", HOSTILE), pod("v", "victim", VICTIM), pod("o", "other", OTHER)]
}

#[test]
fn each_port_of_a_set_passes_and_no_other() {
    in_rig("each_port_of_a_set_passes_and_no_other", |mut rig| {
        let ports = json!([
            {"port": 80}, {"port": 82}, {"port": 8000, "endPort": 8010}, {"port": 65535},
            {"protocol": "UDP", "port": 53}, {"protocol": "UDP", "port": 82, "endPort": 83},
        ]);
        rig.tell(pods().into_iter().chain([policy("p", "victim", json!([{"ports": ports}]))]))?;
        let listed = |protocol: u8, port: u16| match protocol {
            TCP => matches!(port, 80 | 82 | 8000..=8010 | 65535),
            _ => matches!(port, 53 | 82 | 83),
        };
        for port in [1, 53, 79, 80, 81, 82, 83, 84, 7999, 8000, 8005, 8010, 8011, 65534, 65535] {
            for protocol in [TCP, UDP] {
                let expected = listed(protocol, port);
                assert_eq!(reaches(&mut rig, VICTIM, protocol, port)?, expected, "{protocol} {port}");
            }
        }
        // The same ports in all others: a set of the complement.
        let ports = json!([{"port": 1, "endPort": 79}, {"port": 83, "endPort": 65535}]);
        rig.tell([policy("p", "victim", json!([{"ports": ports}]))])?;
        for (port, expected) in [(79, true), (80, false), (82, false), (83, true)] {
            assert_eq!(reaches(&mut rig, VICTIM, TCP, port)?, expected, "{port}");
        }
        Ok(())
    });
}

#[test]
fn a_hostile_tenant_delays_no_neighbour() {
    let budgets = Budgets::default();
    with_settings("a_hostile_tenant_delays_no_neighbour", Settings { budgets, ..settings() }, |mut rig| {
        rig.tell(pods())?;
        assert!(reaches(&mut rig, VICTIM, TCP, 80)? && reaches(&mut rig, HOSTILE, TCP, 80)?);
        let mut times = Vec::new();
        for index in 0..40 {
            let name = format!("p{index}");
            rig.enforcer.compiler.take(policy(&name, "hostile", largest(index, 4_000)));
            rig.enforce()?;
            let denies = index % 2 == 0;
            let rules = if denies { json!([]) } else { json!([{}]) };
            times.push(time(&mut rig, policy("v", "victim", rules))?);
            assert_eq!(reaches(&mut rig, VICTIM, TCP, 80)?, !denies, "after {index} policies");
        }
        let over = rig.enforcer.compiler.excesses();
        assert!(over.iter().all(|over| over.object == "Namespace hostile") && over.len() == 1, "{over:?}");
        assert!(!reaches(&mut rig, HOSTILE, TCP, 80)?);
        times.sort();
        eprintln!("a neighbour's change: p50 {:?}, p99 {:?}", times[20], times[39]);
        Ok(())
    });
}

#[test]
fn without_budgets_what_is_listed_stays_sets() {
    with_settings("without_budgets_what_is_listed_stays_sets", without_budgets(), |mut rig| {
        rig.tell(pods())?;
        let rules = |rig: &Rig| -> usize {
            rig.enforcer.compiler.ruleset().chains.values().map(|chain| chain.rules.len()).sum()
        };
        rig.tell([policy("p0", "hostile", largest(0, 4_095))])?;
        let before = rules(&rig);
        let all = (1..20).map(|index| policy(&format!("p{index}"), "hostile", largest(index, 4_095)));
        rig.tell(all)?;
        // Blocks of one family and pods of both, for each policy.
        assert_eq!(rules(&rig) - before, 19 * 3);
        assert!(reaches(&mut rig, VICTIM, TCP, 80)?);
        Ok(())
    });
}
