//! Everything in `deploy/` is accepted by a real API server, without a word of warning.
#![allow(clippy::unwrap_used)]

use std::process::Command;

use kube_tests::cluster::{Cluster, deployment};
use kube_tests::programs;
use mesh_agent::config::Config;
use netlab::{HostSpec, Lab, LabSpec, SiteSpec};
use serde_json::{Value, json};

const KUSTOMIZATIONS: [&str; 7] = [
    "kubernetes/base",
    "kubernetes/cleanup",
    "kubernetes/file-registry-cleanup",
    "kubernetes/addon",
    "kubernetes/file-registry",
    "examples/kubernetes/east",
    "examples/kubernetes/west",
];

const EVERYTHING: [&str; 24] = [
    "--set=federation.enabled=true",
    "--set=cluster=east",
    "--set=site=aws",
    "--set=sites[0].name=aws",
    "--set=sites[0].prefixes={10.1.0.0/16,fd00:1::/48}",
    "--set=protectedAddresses={192.0.2.1}",
    "--set=api.host=192.0.2.1",
    "--set=imagePullSecrets[0].name=registry",
    "--set=image.repository=registry.example/sennit",
    "--set=image.tag=v1",
    "--set=wireguard.listenPort=51821",
    "--set=wireguard.backend=userspace",
    "--set=config.underlay.mtu=1400",
    "--set=agent.nodeSelector.mesh=on-here",
    "--set-json=agent.tolerations=[{\"key\":\"a\",\"operator\":\"Exists\"}]",
    "--set=agent.resources.limits.memory=256Mi",
    "--set=bootGuard.enabled=true",
    "--set=agent.priorityClassName=most-important",
    "--set=agent.labels.team=net",
    "--set=agent.updateStrategy.type=OnDelete",
    "--set-json=agent.env=[{\"name\":\"HTTPS_PROXY\",\"value\":\"http://proxy:3128\"}]",
    "--set=agent.annotations.owner=net",
    "--set=federation.labels.team=net",
    "--set-json=device.affinity={\"nodeAffinity\":{\"requiredDuringSchedulingIgnoredDuringExecution\":{\"nodeSelectorTerms\":[{\"matchExpressions\":[{\"key\":\"a\",\"operator\":\"Exists\"}]}]}}}",
];

fn template(args: &[&str]) -> Result<String, String> {
    template_of(&deployment("helm/sennit"), args)
}

fn template_of(chart: &str, args: &[&str]) -> Result<String, String> {
    let output = Command::new(programs::kubernetes("helm"))
        .args(["template", "sennit", chart, "--kube-version", "1.36.3"])
        .args(args)
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

fn cluster(lab: &Lab, dir: &std::path::Path) -> Cluster {
    let cluster = Cluster::start(lab.host("control").unwrap(), dir).unwrap();
    // A dry run makes none, and what is in it would be refused.
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "sennit"}});
    cluster.apply(&namespace).unwrap();
    cluster
}

fn lab() -> Lab {
    Lab::build(&LabSpec::new().site(SiteSpec::new("site").host(HostSpec::new("control")))).unwrap()
}

#[test]
fn kustomizations_and_charts_are_accepted_without_warnings() {
    let test = "kustomizations_and_charts_are_accepted_without_warnings";
    if !programs::can_run_with(test, &["helm"]) {
        return;
    }
    let (lab, dir) = (lab(), tempfile::tempdir().unwrap());
    let cluster = cluster(&lab, dir.path());
    let accepted = |what: &str, args: &[&str], input: &str| {
        let args = [&["apply", "--server-side", "--dry-run=server", "-o", "json"], args].concat();
        let output = cluster.kubectl_as("admin", &args, input).unwrap();
        assert!(output.success() && output.stderr.is_empty(), "{what}: {}", output.stderr_text());
        let list: Value = serde_json::from_slice(&output.stdout).unwrap();
        let of = |kind: &str, name: &str| {
            let mut items = list["items"].as_array().unwrap().iter();
            items.find(|item| item["kind"] == kind && item["metadata"]["name"] == name).cloned()
        };
        if what.ends_with("base") || what.ends_with("cleanup") {
            return;
        }
        assert!(of("DaemonSet", "sennit-agent").is_some(), "{what}");
        // What it mounts has to be a configuration.
        let configuration = of("ConfigMap", "sennit-agent").unwrap();
        let text = configuration["data"]["agent.yaml"].as_str().unwrap();
        let parsed = Config::parse(what, text, Some("node-1")).unwrap();
        assert!(parsed.wireguard.external_device, "{what}: {text}");
    };
    for folder in KUSTOMIZATIONS {
        accepted(folder, &["-k", &deployment(folder)], "");
    }
    let charts = [
        ("the chart as it is", &[][..]),
        ("the chart with everything", &EVERYTHING),
        ("the chart's cleanup", &["--set=cleanup.enabled=true"]),
    ];
    for (what, args) in charts {
        let rendered = template(&[&["--namespace", "sennit"], args].concat()).unwrap();
        accepted(what, &["-f", "-"], &rendered);
    }
    // What an operator is told of the kinds.
    cluster.deploy().unwrap();
    for (field, wanted) in
        [("meshnodes.spec.podCIDRs", "prefixes that peers route"), ("clusterlinks.spec.site", "broker")]
    {
        let explained = cluster.explain(field).unwrap();
        assert!(explained.contains(wanted), "{explained}");
    }
}

#[test]
fn values_that_cannot_be_are_refused_with_their_names() {
    if !programs::can_run_with("values_that_cannot_be_are_refused_with_their_names", &["helm"]) {
        return;
    }
    for (args, wanted) in [
        (&["--namespace", "default"][..], "namespace sennit"),
        (&["--namespace", "sennit", "--set", "federation.enabled=true"], "/cluster"),
        (&["--namespace", "sennit", "--set", "device.enabled=false"], "/wireguard/backend"),
        (&["--namespace", "sennit", "--set", "wireguard.port=1"], "port"),
        (&["--namespace", "sennit", "--set", "site=Not A Site"], "/site"),
        (&["--namespace", "sennit", "--set", "config.runDir=/elsewhere"], "/config/runDir"),
    ] {
        let said = template(args).unwrap_err();
        assert!(said.contains(wanted), "{args:?}: {said}");
    }
}

#[test]
fn a_chart_without_its_links_says_so() {
    if !programs::can_run_with("a_chart_without_its_links_says_so", &["helm"]) {
        return;
    }
    // As what packs it does that leaves links out.
    let dir = tempfile::tempdir().unwrap();
    let chart = dir.path().join("sennit");
    let script = format!(
        "cp -a {} {} && find {} -type l -delete",
        deployment("helm/sennit"),
        chart.display(),
        chart.display()
    );
    assert!(Command::new("sh").args(["-c", &script]).status().unwrap().success());
    let said = template_of(chart.to_str().unwrap(), &["--namespace", "sennit"]).unwrap_err();
    assert!(said.contains("the chart is not complete") && said.contains("helm package"), "{said}");
}

#[test]
fn pods_are_placed_and_labelled_as_asked() {
    if !programs::can_run_with("pods_are_placed_and_labelled_as_asked", &["helm"]) {
        return;
    }
    let rendered = template(&[&["--namespace", "sennit"], &EVERYTHING[..]].concat()).unwrap();
    let agent = rendered
        .split("---\n")
        .find(|part| part.contains("kind: DaemonSet") && part.contains("name: sennit-agent"));
    let agent = agent.unwrap();
    for wanted in [
        "priorityClassName: most-important",
        "team: net",
        "type: OnDelete",
        "value: http://proxy:3128",
        "owner: net",
        "app.kubernetes.io/component: agent",
        "sennit.dev/configuration:",
        "name: SENNIT_NODE",
    ] {
        assert!(agent.contains(wanted), "{wanted}: {agent}");
    }
    assert!(!rendered.contains("most-important\n      priorityClassName"), "once");
    let limits = rendered.matches("limits:").count();
    let containers = rendered.matches("image: registry.example").count();
    assert_eq!(limits, containers, "every container has limits");
}
