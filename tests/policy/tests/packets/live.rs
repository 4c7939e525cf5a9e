//! Flows that are there while policy changes.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use mesh_policy::Event;
use mesh_policy::nft::{Ownership, Table};
use policy_tests::objects::{gone, no_policy, only, pod, policy, remote};
use policy_tests::packet::{ACK, PSH_ACK, SYN_ACK};
use policy_tests::rig::{BETWEEN, END};
use policy_tests::{Link, Packet, Rig};
use serde_json::json;

use crate::{TCP, UDP, first, in_rig};

const A: [&str; 2] = ["10.0.1.1", "fd00:1::1"];
const B: [&str; 2] = ["10.0.1.2", "fd00:1::2"];
const C: [&str; 2] = ["10.0.1.3", "fd00:1::3"];

/// A flow of which both ends have spoken.
struct Established {
    client: Packet,
    server: Packet,
}

impl Established {
    fn new(rig: &mut Rig, source: &str, destination: &str, protocol: u8) -> anyhow::Result<Self> {
        let client = first(rig, source, destination, protocol);
        let server = client.answer(rig.number());
        let flow = Self { client, server };
        anyhow::ensure!(rig.passes(Link::Pods, &client)? && rig.passes(Link::Pods, &server)?, "no flow");
        anyhow::ensure!(flow.passed(rig)? == [true; 3], "not established");
        Ok(flow)
    }

    /// Which of these pass: an acknowledgement and data of the client, data of the server.
    fn passed(&self, rig: &mut Rig) -> anyhow::Result<[bool; 3]> {
        let [one, two, three] = [rig.number(), rig.number(), rig.number()];
        let packets =
            [self.client.again(ACK, one), self.client.again(PSH_ACK, two), self.server.again(PSH_ACK, three)];
        let passed = rig.pass(Link::Pods, &packets)?;
        Ok([passed[0], passed[1], passed[2]])
    }
}

fn pods() -> [Event; 3] {
    [Event::Pod(pod("a", "a", &A)), Event::Pod(pod("b", "b", &B)), Event::Pod(pod("c", "c", &C))]
}

#[test]
fn revoking_a_permission_cuts_its_flows_and_no_others() {
    in_rig("revoking_a_permission_cuts_its_flows_and_no_others", |mut rig| {
        let allow = |from: &[&str]| {
            policy(
                "p",
                json!({
                    "podSelector": {"matchLabels": {"app": "b"}},
                    "ingress": [{"from": [{"podSelector": {"matchExpressions": [{"key": "app", "operator": "In", "values": from}]}}]}],
                }),
            )
        };
        for (family, protocol) in [(0, TCP), (0, UDP), (1, TCP), (1, UDP), (0, 132)] {
            rig.tell(pods().into_iter().chain([allow(&["a", "c"])]))?;
            let cut = Established::new(&mut rig, A[family], B[family], protocol)?;
            let kept = Established::new(&mut rig, C[family], B[family], protocol)?;
            rig.enforcer.compiler.take(allow(&["c"]));
            // Within the transaction, and not when the next epoch begins.
            rig.enforce()?;
            assert_eq!(
                (cut.passed(&mut rig)?, kept.passed(&mut rig)?),
                ([false; 3], [true; 3]),
                "protocol {protocol}"
            );
            rig.settle()?;
            assert_eq!(
                (cut.passed(&mut rig)?, kept.passed(&mut rig)?),
                ([false; 3], [true; 3]),
                "protocol {protocol}"
            );
            // It is not opened by trying again, from either end.
            let number = rig.number();
            assert!(!rig.passes(Link::Pods, &cut.client.again(cut.client.flags, number))?);
            let number = rig.number();
            assert!(!rig.passes(Link::Pods, &cut.server.again(SYN_ACK, number))?);
            assert_eq!(kept.passed(&mut rig)?, [true; 3]);
            // Who is allowed again may go on.
            rig.tell([allow(&["a", "c"])])?;
            assert_eq!(
                (cut.passed(&mut rig)?, kept.passed(&mut rig)?),
                ([true; 3], [true; 3]),
                "protocol {protocol}"
            );
            rig.tell([no_policy("p")])?;
            rig.run("conntrack", "-F")?;
        }
        Ok(())
    });
}

#[test]
fn every_way_to_lose_a_permission_cuts() {
    in_rig("every_way_to_lose_a_permission_cuts", |mut rig| {
        let cuts: [(&str, Event); 6] = [
            ("the client is labelled anew", Event::Pod(pod("a", "z", &A))),
            ("the server is isolated by another policy's label", Event::Pod(pod("b", "isolated", &B))),
            ("the client is gone", gone("a")),
            (
                "the client has ended",
                Event::Pod(mesh_policy::object::Pod { addresses: Default::default(), ..pod("a", "a", &A) }),
            ),
            (
                "another pod has the client's address",
                Event::Pod(mesh_policy::object::Pod {
                    created: "2027-01-01T00:00:00Z".to_owned(),
                    ..pod("new", "new", &A)
                }),
            ),
            (
                "the client may begin nothing any more",
                policy(
                    "out",
                    json!({"podSelector": {"matchLabels": {"app": "a"}}, "policyTypes": ["Egress"]}),
                ),
            ),
        ];
        for (how, event) in cuts {
            rig.tell(pods().into_iter().chain([
                no_policy("out"),
                gone("new"),
                policy("p", only("a", "b")),
                policy("i", json!({"podSelector": {"matchLabels": {"app": "isolated"}}})),
            ]))?;
            let flow = Established::new(&mut rig, A[0], B[0], UDP)?;
            rig.enforcer.compiler.take(event);
            rig.enforce()?;
            assert_eq!(flow.passed(&mut rig)?, [false; 3], "{how}");
            rig.settle()?;
            assert_eq!(flow.passed(&mut rig)?, [false; 3], "{how}");
            rig.run("conntrack", "-F")?;
        }
        Ok(())
    });
}

#[test]
fn an_address_that_is_used_again_inherits_nothing() {
    in_rig("an_address_that_is_used_again_inherits_nothing", |mut rig| {
        rig.tell(pods().into_iter().chain([policy("p", only("a", "b"))]))?;
        let old = Established::new(&mut rig, A[0], B[0], TCP)?;
        rig.tell([gone("a")])?;
        assert_eq!(old.passed(&mut rig)?, [false; 3], "nobody has the address");
        rig.tell([Event::Pod(pod("other", "other", &A))])?;
        assert_eq!(old.passed(&mut rig)?, [false; 3], "somebody else has");
        let fresh = first(&mut rig, A[0], B[0], UDP);
        assert!(!rig.passes(Link::Pods, &fresh)?);
        // A pod that is going keeps what it has, until somebody else has its address.
        let going = mesh_policy::object::Pod { terminating: true, ..pod("other", "a", &A) };
        rig.tell([Event::Pod(going)])?;
        let fresh = first(&mut rig, A[0], B[0], UDP);
        assert!(rig.passes(Link::Pods, &fresh)?);
        rig.tell([Event::Pod(pod("heir", "heir", &A))])?;
        let fresh = first(&mut rig, A[0], B[0], UDP);
        assert!(!rig.passes(Link::Pods, &fresh)?);
        Ok(())
    });
}

#[test]
fn a_connection_is_not_picked_up_in_its_middle() {
    in_rig("a_connection_is_not_picked_up_in_its_middle", |mut rig| {
        rig.tell(pods().into_iter().chain([policy("p", only("a", "b"))]))?;
        let flow = Established::new(&mut rig, A[0], B[0], TCP)?;
        rig.run("conntrack", "-F")?;
        assert_eq!(
            flow.passed(&mut rig)?,
            [false; 3],
            "from the server it would look as if that had begun it"
        );
        Ok(())
    });
}

#[test]
fn where_nothing_is_denied_connections_that_are_older_go_on() {
    in_rig("where_nothing_is_denied_connections_that_are_older_go_on", |mut rig| {
        rig.tell(pods())?;
        let flow = Established::new(&mut rig, A[0], B[0], TCP)?;
        // As for an agent that is the first on its node to look at connections.
        rig.run("conntrack", "-F")?;
        assert_eq!(flow.passed(&mut rig)?, [true; 3]);
        // By the first policy all are known, and judged.
        rig.tell([policy("p", only("a", "b"))])?;
        assert_eq!(flow.passed(&mut rig)?, [true; 3]);
        rig.run("conntrack", "-F")?;
        assert_eq!(flow.passed(&mut rig)?, [false; 3]);
        rig.tell([no_policy("p")])?;
        assert_eq!(flow.passed(&mut rig)?, [true; 3]);
        Ok(())
    });
}

#[test]
fn a_label_that_changes_under_traffic_lets_nothing_through_that_it_forbids() {
    in_rig("a_label_that_changes_under_traffic_lets_nothing_through_that_it_forbids", |mut rig| {
        rig.tell(pods().into_iter().chain([policy("p", only("a", "b"))]))?;
        let (cut, kept) =
            (Established::new(&mut rig, A[0], B[0], UDP)?, Established::new(&mut rig, A[0], C[0], UDP)?);
        for round in 0..200 {
            let allowed = round % 2 == 1;
            let app = if allowed { "a" } else { "z" };
            rig.enforcer.compiler.take(Event::Pod(pod("a", app, &A)));
            rig.enforce()?;
            assert_eq!(
                (cut.passed(&mut rig)?, kept.passed(&mut rig)?),
                ([allowed; 3], [true; 3]),
                "round {round}"
            );
            if round % 3 == 0 {
                rig.settle()?;
                assert_eq!(
                    (cut.passed(&mut rig)?, kept.passed(&mut rig)?),
                    ([allowed; 3], [true; 3]),
                    "round {round}"
                );
            }
        }
        Ok(())
    });
}

#[test]
fn policy_outlives_its_agent_and_is_taken_over_without_a_gap() {
    in_rig("policy_outlives_its_agent_and_is_taken_over_without_a_gap", |mut rig| {
        rig.tell(pods().into_iter().chain([policy("p", only("a", "b"))]))?;
        let kept = Established::new(&mut rig, A[0], B[0], TCP)?;
        let sees = |rig: &mut Rig| {
            let denied = first(rig, C[0], B[0], UDP);
            let allowed = first(rig, A[0], B[0], UDP);
            rig.pass(Link::Pods, &[denied, allowed])
        };
        for _ in 0..3 {
            // Its socket is closed, and the table is nobody's.
            let orphan = rig.orphan()?;
            assert_eq!((sees(&mut rig)?, kept.passed(&mut rig)?), (vec![false, true], [true; 3]));
            rig.adopt(orphan)?;
            assert_eq!((sees(&mut rig)?, kept.passed(&mut rig)?), (vec![false, true], [true; 3]));
            rig.settle()?;
            assert_eq!((sees(&mut rig)?, kept.passed(&mut rig)?), (vec![false, true], [true; 3]));
        }
        assert_eq!(Table::open(Ownership::Owner).err().map(|_| ()), Some(()), "it has an owner");
        Ok(())
    });
}

#[test]
fn nobody_slips_through_while_policy_changes_under_traffic() {
    // Two flows are hammered while everything else changes at random: one that is always allowed, one that never is.
    let changes: usize =
        std::env::var("SENNIT_POLICY_CHANGES").ok().and_then(|text| text.parse().ok()).unwrap_or(500);
    in_rig("nobody_slips_through_while_policy_changes_under_traffic", move |mut rig| {
        rig.tell(
            pods()
                .into_iter()
                .chain([policy("always", only("a", "b")), policy("never", only("nobody", "c"))]),
        )?;
        let (allowed, denied) = (first(&mut rig, A[0], B[0], UDP), first(&mut rig, A[0], C[0], UDP));
        let phase = Arc::new(AtomicUsize::new(0));
        let traffic = rig.hammer([allowed, denied], &phase);
        let mut random = 20_261_125_u64;
        let mut dice = |below: u64| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (random >> 33) % below
        };
        let began = Instant::now();
        let mut made = 0;
        for _ in 0..changes {
            let index = dice(20);
            let app = ["a", "d", "e"][dice(3) as usize];
            let selected = ["b", "d"][dice(2) as usize];
            rig.enforcer.compiler.take(match dice(7) {
                0 => Event::Pod(remote(&format!("r{index}"), app, &[&format!("10.0.2.{index}"), &format!("fd00:2::{index:x}")])),
                1 => gone(&format!("r{index}")),
                2 => Event::Pod(pod(&format!("l{index}"), app, &[&format!("10.0.1.{}", 100 + index)])),
                3 => gone(&format!("l{index}")),
                // The class of the one that is never reached is another each time.
                5 => policy("shut", only(&format!("n{}", dice(1000)), "c")),
                // Policies that also select the server of the flow that is always allowed, and add to it.
                4 => policy(&format!("p{}", index % 5), json!({
                    "podSelector": {"matchLabels": {"app": selected}},
                    "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": app}}}, {"ipBlock": {"cidr": format!("10.{index}.0.0/16"), "except": [format!("10.{index}.1.0/24")]}}], "ports": [{"port": 1 + index}]}],
                })),
                _ => no_policy(&format!("p{}", index % 5)),
            });
            made += rig.enforcer.pass(Instant::now())?.changes;
        }
        phase.store(END, Ordering::SeqCst);
        let [counts, ..] = traffic.join().map_err(|_| anyhow::anyhow!("the traffic ended early"))??;
        println!(
            "{changes} changes ({made} writes) in {:.1} s: always allowed {} of {} passed, never allowed {} of {}",
            began.elapsed().as_secs_f64(),
            counts[0].1,
            counts[0].0,
            counts[1].1,
            counts[1].0,
        );
        assert!(counts[0].0 > 100 && counts[0].0 == counts[0].1, "lost what is allowed");
        assert!(counts[1].0 > 100 && counts[1].1 == 0, "let through what is denied");
        Ok(())
    });
}

#[test]
fn a_flow_that_is_cut_under_full_traffic_stays_cut() {
    const ALLOWED: usize = 0;
    const CUT: usize = 2;
    let rounds: usize =
        std::env::var("SENNIT_POLICY_CUTS").ok().and_then(|text| text.parse().ok()).unwrap_or(20);
    in_rig("a_flow_that_is_cut_under_full_traffic_stays_cut", move |mut rig| {
        rig.tell(pods().into_iter().chain([policy("p", only("a", "b"))]))?;
        let flows = [TCP, UDP].map(|protocol| Established::new(&mut rig, A[0], B[0], protocol));
        let [tcp, udp] = flows;
        let (tcp, udp) = (tcp?, udp?);
        let kept = Established::new(&mut rig, C[0], A[0], UDP)?;
        let packets = [
            tcp.client.again(PSH_ACK, 1),
            tcp.server.again(PSH_ACK, 2),
            udp.client,
            udp.server,
            kept.client,
            kept.server,
        ];
        let packets = packets.map(|packet| Packet { number: rig.number(), ..packet });
        let phase = Arc::new(AtomicUsize::new(ALLOWED));
        let traffic = rig.hammer(packets, &phase);
        // Passes come when they are due, as in the agent, and packets never stop.
        let run = |rig: &mut Rig, event: Event| -> anyhow::Result<Instant> {
            rig.enforcer.compiler.take(event);
            rig.enforcer.pass(Instant::now())?;
            Ok(Instant::now())
        };
        let until_open = |rig: &mut Rig, least: Duration| -> anyhow::Result<()> {
            let end = Instant::now() + least;
            while rig.enforcer.wake_at().is_some() || Instant::now() < end {
                rig.enforcer.pass(Instant::now())?;
                std::thread::yield_now();
            }
            Ok(())
        };
        for _ in 0..rounds {
            phase.store(BETWEEN, Ordering::SeqCst);
            run(&mut rig, Event::Pod(pod("a", "z", &A)))?;
            phase.store(CUT, Ordering::SeqCst);
            until_open(&mut rig, Duration::from_millis(80))?;
            phase.store(BETWEEN, Ordering::SeqCst);
            run(&mut rig, Event::Pod(pod("a", "a", &A)))?;
            phase.store(ALLOWED, Ordering::SeqCst);
            until_open(&mut rig, Duration::from_millis(60))?;
        }
        phase.store(END, Ordering::SeqCst);
        let counts = traffic.join().map_err(|_| anyhow::anyhow!("the traffic ended early"))??;
        let passed = |phase: usize, which: &[usize]| {
            which.iter().fold((0, 0), |(sent, passed), index| {
                (sent + counts[phase][*index].0, passed + counts[phase][*index].1)
            })
        };
        let (cut, kept) = (
            passed(CUT, &[0, 1, 2, 3]),
            (0..END)
                .map(|phase| passed(phase, &[4, 5]))
                .fold((0, 0), |sum, more| (sum.0 + more.0, sum.1 + more.1)),
        );
        let allowed = passed(ALLOWED, &[0, 1, 2, 3]);
        println!(
            "{rounds} times cut: {} of {} packets passed while cut; the neighbour's {} of {}; while allowed {} of {}",
            cut.1, cut.0, kept.1, kept.0, allowed.1, allowed.0
        );
        assert!(cut.0 > 1000 && cut.1 == 0, "passed after the transaction");
        assert_eq!(kept.0, kept.1, "the neighbour lost packets");
        assert_eq!(allowed.0, allowed.1);
        Ok(())
    });
}
