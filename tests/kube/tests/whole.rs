//! Whole nodes, from `kubectl apply -k` to the last pod.
#![allow(clippy::unwrap_used)]

use std::io::Write as _;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use kube_tests::cluster::deployment;
use kube_tests::mesh::lossless;
use kube_tests::whole::{CLUSTERS, Pod, Whole};
use kube_tests::{eventually, images, programs};
use serde_json::Value;

fn tell(what: &str) {
    let _ = writeln!(std::io::stderr(), "{what}");
}

#[test]
fn two_clusters_and_two_hosts_become_one_mesh_by_their_manifests() {
    if !programs::can_run_nodes("two_clusters_and_two_hosts_become_one_mesh_by_their_manifests") {
        return;
    }
    let mut whole = Whole::new().unwrap();
    let pods = whole.pods().unwrap();
    let captures = whole.watch().unwrap();
    let applied = Instant::now();
    whole.install().unwrap();
    let answers = whole.stands(&pods).unwrap();
    let took = applied.elapsed().as_secs_f64();
    tell(&format!("{answers} answers among {} pods, {took:.1} s after kubectl apply", pods.len()));
    let mut frames = 0;
    for capture in captures {
        // The first questions were asked before anybody could know of a mesh; nobody answers such a one.
        let report = capture.stop().unwrap();
        assert_eq!(report.stats.marker_frames, [0], "{report:?}");
        frames += report.stats.packets;
    }
    // From now on not even an address may be seen.
    let captures = whole.watch().unwrap();
    assert_eq!(whole.reaches(&pods).unwrap(), answers);
    let mut wireguard = 0;
    for capture in captures {
        let report = capture.stop().unwrap();
        assert!(report.is_clean(), "{report:?}");
        frames += report.stats.packets;
        wireguard += report.stats.wireguard;
    }
    assert!(wireguard > 0);
    tell(&format!("0 of {frames} frames on the underlay's links hold the marker"));

    // And off again, as deploy/kubernetes/cleanup says.
    let cluster = &whole.clusters[0];
    cluster.kubectl(&["delete", "daemonset", "-n", "sennit", "sennit-agent", "sennit-device"]).unwrap();
    cluster.kubectl(&["apply", "--server-side", "-k", &deployment("kubernetes/cleanup")]).unwrap();
    cluster.rolled_out("sennit", "sennit-cleanup").with_context(|| whole.logs()).unwrap();
    for (host, node) in whole.nodes.iter().filter(|(host, _)| host.starts_with(CLUSTERS[0])) {
        let left = "nft list tables | grep sennit; ip rule | grep 'proto 82'; ip route show table all proto 82; \
                    ip -6 route show table all proto 82; ip -br link | grep sennit0; find /run/sennit /var/lib/sennit -type f";
        eventually("nothing of ours is left", || {
            let left = node.host().command("sh").args(["-c", left]).output(Duration::from_secs(20))?;
            anyhow::ensure!(
                left.stdout.is_empty() && left.stderr.is_empty(),
                "{host}: {}{}",
                left.stdout_text(),
                left.stderr_text()
            );
            Ok(())
        })
        .unwrap();
        let annotations = cluster.get("node", &node.name).unwrap()["metadata"]["annotations"].to_string();
        assert!(!annotations.contains("sennit.dev/"), "{annotations}");
    }
    let folder = deployment("examples/kubernetes/east");
    cluster
        .kubectl_within(
            &["delete", "--ignore-not-found", "-k", &folder, "--timeout=90s"],
            Duration::from_secs(120),
        )
        .unwrap();
}

fn up() -> (Whole, Vec<Pod>) {
    let mut whole = Whole::new().unwrap();
    whole.install().unwrap();
    let pods = whole.pods().unwrap();
    whole.stands(&pods).unwrap();
    for cluster in &whole.clusters {
        cluster.rolled_out("sennit", "sennit-agent").unwrap();
    }
    (whole, pods)
}

fn ours(whole: &Whole, component: &str, field: &str) -> Vec<String> {
    let label = format!("app.kubernetes.io/component={component}");
    let path = format!("jsonpath={{range .items[*]}}{{{field}}}{{\"\\n\"}}{{end}}");
    let all = whole.clusters.iter().flat_map(|cluster| {
        let listed = cluster.kubectl(&["get", "pods", "-n", "sennit", "-l", &label, "-o", &path]).unwrap();
        listed.lines().map(str::to_owned).collect::<Vec<_>>()
    });
    let mut all: Vec<String> = all.collect();
    all.sort();
    all
}

#[test]
fn a_rolling_update_loses_no_packet_and_a_new_device_a_short_while() {
    if !programs::can_run_nodes("a_rolling_update_loses_no_packet_and_a_new_device_a_short_while") {
        return;
    }
    let (whole, pods) = up();
    let captures = whole.watch().unwrap();
    let devices = ours(&whole, "device", ".metadata.uid");
    let flow = |from: &str, to: &str| whole.traffic(&pods, from, to, 1000).unwrap();
    let flows = [flow("bare-1-pod-1", "east-node-1"), flow("bare-2-pod-1", "west-node-2")];

    // A release: another image for both DaemonSets.
    let next = images::deployed_name().unwrap() + "-next";
    for node in whole.nodes.values() {
        node.ctr(&["images", "tag", &images::deployed_name().unwrap(), &next]).unwrap();
    }
    for cluster in &whole.clusters {
        for component in ["agent", "device"] {
            let (set, image) = (format!("daemonset/sennit-{component}"), format!("{component}={next}"));
            cluster.kubectl(&["set", "image", "-n", "sennit", &set, &image]).unwrap();
        }
        cluster.rolled_out("sennit", "sennit-agent").unwrap();
    }
    assert!(ours(&whole, "agent", ".spec.containers[0].image").iter().all(|image| *image == next));
    assert_eq!(
        ours(&whole, "device", ".metadata.uid"),
        devices,
        "a device is replaced only where its pod is deleted"
    );
    for host in whole.nodes.keys() {
        assert_eq!(whole.status(host).unwrap()["ready"], true);
    }
    for flow in flows {
        let report = flow.stop(Duration::from_secs(2)).unwrap();
        tell(&format!("agents updated: {} of {} packets lost", report.lost, report.sent));
        assert!(report.sent > 1000 && report.lost == 0, "{report:?}");
    }

    // The operator updates one node's device.
    let flow = flow("bare-1-pod-1", "east-node-1");
    let others = whole.traffic(&pods, "bare-2-pod-1", "east-node-2", 1000).unwrap();
    let east = &whole.clusters[0];
    let on = ["-l", "app.kubernetes.io/component=device", "--field-selector", "spec.nodeName=node-1"];
    east.kubectl(&[&["delete", "pod", "-n", "sennit", "--wait=true"], &on[..]].concat()).unwrap();
    eventually("the new device carries the flow", || {
        let before = flow.snapshot().received;
        let image = east.kubectl(
            &[
                &["get", "pods", "-n", "sennit", "-o", "jsonpath={.items[*].spec.containers[0].image}"],
                &on[..],
            ]
            .concat(),
        )?;
        anyhow::ensure!(image == next, "{image}");
        let ready = whole.status("east-node-1")?["ready"].clone();
        anyhow::ensure!(ready == true && flow.snapshot().received > before, "ready: {ready}");
        Ok(())
    })
    .unwrap();
    let report = flow.stop(Duration::from_secs(2)).unwrap();
    tell(&format!("device updated: the longest gap is {:.2} s", report.max_gap.as_secs_f64()));
    assert!(report.max_gap < Duration::from_secs(30), "{report:?}");
    lossless(others).unwrap();
    for capture in captures {
        let report = capture.stop().unwrap();
        assert!(report.is_clean(), "{report:?}");
    }
}

#[test]
fn with_an_api_away_and_everything_of_ours_restarted_no_packet_is_lost() {
    if !programs::can_run_nodes("with_an_api_away_and_everything_of_ours_restarted_no_packet_is_lost") {
        return;
    }
    // By hand with 600 for the ten minutes.
    let away = std::env::var("SENNIT_AWAY_SECONDS").map_or(20, |seconds| seconds.parse().unwrap());
    let (mut whole, pods) = up();
    let flows =
        [("bare-1-pod-1", "east-node-1"), ("bare-2-pod-1", "east-node-2"), ("bare-1-pod-2", "west-node-1")]
            .map(|(from, to)| whole.traffic(&pods, from, to, 200).unwrap());
    let mirrored = |whole: &Whole| whole.clusters[1].kubectl(&["get", "meshnodes", "-o", "name"]).unwrap();
    let mirrors = mirrored(&whole);
    let leader = |whole: &Whole| {
        let lease =
            whole.clusters[1].kubectl(&["get", "lease", "-n", "sennit", "sennit-federate", "-o", "json"])?;
        anyhow::Ok(
            serde_json::from_str::<Value>(&lease)?["spec"]["holderIdentity"]
                .as_str()
                .unwrap_or_default()
                .to_owned(),
        )
    };

    let began = Instant::now();
    whole.clusters[0].stop_api().unwrap();
    // An agent starts from what it knew; its status tells what is missing.
    whole.kill_container("east-node-1", "agent").unwrap();
    eventually("the agent is back with all its peers", || {
        let status = whole.status("east-node-1")?;
        anyhow::ensure!(status["synced"] == false, "not restarted yet");
        anyhow::ensure!(
            status["peers"].as_array().is_some_and(|peers| peers.len() == 5),
            "{}",
            status["peers"]
        );
        Ok(())
    })
    .unwrap();
    // In the other cluster the federator that leads dies; the next one knows the remote cluster from its mirrors only.
    let first = leader(&whole).unwrap();
    let host = first[..first.len() - 17].to_owned();
    whole.kill_container(&host, "federate").unwrap();
    eventually("another federator leads", || {
        let now = leader(&whole)?;
        anyhow::ensure!(now != first && !now.is_empty(), "{now}");
        Ok(())
    })
    .unwrap();
    let link = eventually("the link tells that the remote API is away", || {
        let link = whole.clusters[1].get("clusterlink", CLUSTERS[0])?;
        anyhow::ensure!(link["status"]["conditions"][0]["status"] == "False", "{}", link["status"]);
        Ok(link["status"].to_string())
    })
    .unwrap();
    while began.elapsed() < Duration::from_secs(away) {
        // Whoever asks meanwhile gets an answer.
        whole.reaches(&pods.iter().filter(|pod| !pod.name.starts_with("east/")).collect::<Vec<_>>()).unwrap();
        eventually("agents of the other cluster miss nothing", || {
            let errors = whole.status("west-node-1")?["errors"].to_string();
            anyhow::ensure!(errors == "[]", "{errors}");
            Ok(())
        })
        .unwrap();
    }
    assert_eq!(mirrored(&whole), mirrors, "{link}");
    tell(&format!("the API was away for {:.0} s", began.elapsed().as_secs_f64()));
    whole.clusters[0].start_api().unwrap();
    whole.clusters[0].restart_controllers().unwrap();
    eventually("nobody misses anything any more", || {
        for host in whole.nodes.keys() {
            let status = whole.status(host)?;
            anyhow::ensure!(
                status["ready"] == true && status["errors"] == serde_json::json!([]),
                "{host}: {}",
                status["errors"]
            );
        }
        Ok(())
    })
    .unwrap();
    whole.stands(&pods).unwrap();
    assert_eq!(mirrored(&whole), mirrors);
    for flow in flows {
        let report = flow.stop(Duration::from_secs(2)).unwrap();
        tell(&format!("{} of {} packets lost", report.lost, report.sent));
        assert!(report.lost == 0, "{report:?}");
    }
}
