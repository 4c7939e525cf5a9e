//! Policy, as its users meet it: manifests in the registry, real agents, packets between pods through tunnels.

mod mesh;

use mesh::Mesh;

/// Pods of two sites with a node each: `web` and `client` in aws, `db` and `client` in gcp.
const PODS: &str = r#"- apply:
    file: pods.yaml
    manifest:
      - apiVersion: v1
        kind: Namespace
        metadata: {name: shop, labels: {team: red}}
      - apiVersion: v1
        kind: Pod
        metadata: {name: web, namespace: shop, labels: {app: web}}
        spec: {nodeName: aws-1, containers: [{ports: [{name: http, containerPort: 8080}]}]}
        status: {phase: Running, podIPs: [{ip: 10.1.0.2}, {ip: "fd00:1::2"}]}
      - apiVersion: v1
        kind: Pod
        metadata: {name: client-a, namespace: shop, labels: {app: client}}
        spec: {nodeName: aws-1}
        status: {phase: Running, podIPs: [{ip: 10.1.0.3}, {ip: "fd00:1::3"}]}
      - apiVersion: v1
        kind: Pod
        metadata: {name: db, namespace: shop, labels: {app: db}}
        spec: {nodeName: gcp-1}
        status: {phase: Running, podIPs: [{ip: 10.2.0.2}, {ip: "fd00:2::2"}]}
      - apiVersion: v1
        kind: Pod
        metadata: {name: client-g, namespace: shop, labels: {app: client}}
        spec: {nodeName: gcp-1}
        status: {phase: Running, podIPs: [{ip: 10.2.0.3}, {ip: "fd00:2::3"}]}
"#;

fn mesh(test: &str) -> Mesh {
    let mut mesh = Mesh::new(test);
    mesh.sites("- {name: aws, podsPerNode: 2}\n- {name: gcp, podsPerNode: 2}").steps(PODS);
    mesh
}

/// `db` is reached by `web` only.
const ONLY_WEB: &str = r#"- apply:
    file: only-web.yaml
    manifest:
      apiVersion: networking.k8s.io/v1
      kind: NetworkPolicy
      metadata: {name: only-web, namespace: shop}
      spec:
        podSelector: {matchLabels: {app: db}}
        ingress: [{from: [{podSelector: {matchLabels: {app: web}}}]}]
"#;

#[test]
fn a_policy_counts_for_what_comes_out_of_the_tunnel_and_for_neighbours() {
    mesh("policy-ingress")
        .steps("- capture: underlay\n- handshakes: all\n- expect: {matrix: pods}\n")
        .steps(ONLY_WEB)
        .steps(
            r#"- expect:
    pairs:
      - {from: aws-1-pod-1, to: gcp-1-pod-1}
      - {from: aws-1-pod-2, to: gcp-1-pod-1, verdict: deny}
      - {from: gcp-1-pod-2, to: gcp-1-pod-1, verdict: deny}
      - {from: gcp-1-pod-1, to: [aws-1-pod-1, aws-1-pod-2, gcp-1-pod-2]}
- name: a neighbour of the pod's own node is exempt
  expect: {pairs: [{from: gcp-1, to: gcp-1-pod-1}, {from: aws-1, to: gcp-1-pod-1, verdict: deny}]}
- status: {nodes: gcp-1, where: [{path: /policy/standing, equals: true}, {path: /policy/owned, equals: true}, {path: /policy/pods, equals: 4}, {path: /policy/policies, equals: 1}, {path: /policy/localAddresses, equals: 4}]}
- name: each denied flow is told with the policy and the two pods
  eventually:
    deadline: 30s
    step:
      exec: {on: gcp-1, command: "grep -h '\"verdict\":\"deny\"' /run/netlab/private/state/flows.jsonl | grep only-web | grep client-a | grep -m1 db", contains: '"direction":"ingress"'}
- name: the label that was missing
  exec: {on: aws-1, command: "cd /run/netlab/shared/registry && sed 's/\"app\": *\"client\"/\"app\": \"web\"/; s/app: client/app: web/' pods.yaml > .pods && mv .pods pods.yaml"}
- expect: {matrix: pods}
- assertNoCleartext: {}
"#,
        )
        .passes();
}

#[test]
fn administrators_overrule_and_fill_gaps_through_the_tunnel() {
    mesh("policy-cluster")
        .steps("- capture: underlay\n- handshakes: all\n- expect: {matrix: pods}\n")
        .steps(ONLY_WEB)
        .steps(
            r#"- name: what a developer allows, an administrator denies; what a developer denies, he lets in
  apply:
    file: admin.yaml
    manifest:
      apiVersion: policy.networking.k8s.io/v1alpha2
      kind: ClusterNetworkPolicy
      metadata: {name: admin}
      spec:
        tier: Admin
        priority: 10
        subject: {pods: {namespaceSelector: {matchLabels: {team: red}}, podSelector: {matchLabels: {app: db}}}}
        ingress:
          - {action: Deny, from: [{pods: {namespaceSelector: {}, podSelector: {matchLabels: {app: web}}}}]}
          - {action: Accept, from: [{namespaces: {matchLabels: {team: red}}}]}
- expect:
    pairs:
      - {from: aws-1-pod-1, to: gcp-1-pod-1, verdict: deny}
      - {from: aws-1-pod-2, to: gcp-1-pod-1}
      - {from: gcp-1-pod-2, to: [gcp-1-pod-1, aws-1-pod-1]}
- name: where nobody else says anything, the baseline does; nodes are known by their labels
  apply:
    file: baseline.yaml
    manifest:
      apiVersion: policy.networking.k8s.io/v1alpha2
      kind: ClusterNetworkPolicy
      metadata: {name: baseline}
      spec:
        tier: Baseline
        priority: 10
        subject: {namespaces: {}}
        egress:
          - {action: Accept, to: [{nodes: {matchLabels: {kubernetes.io/hostname: gcp-1}}}]}
          - {action: Deny, to: [{networks: [10.1.0.0/16, "fd00:1::/32"]}, {nodes: {}}]}
- expect:
    pairs:
      - {from: gcp-1-pod-2, to: aws-1-pod-1, verdict: deny}
      - {from: aws-1-pod-2, to: gcp-1-pod-1}
      - {from: aws-1-pod-1, to: gcp-1}
      - {from: gcp-1-pod-2, to: aws-1, verdict: deny}
- name: a rule of a kind that nobody knows denies, and is named
  apply:
    file: admin.yaml
    manifest:
      apiVersion: policy.networking.k8s.io/v1alpha2
      kind: ClusterNetworkPolicy
      metadata: {name: admin}
      spec:
        tier: Admin
        priority: 10
        subject: {namespaces: {}}
        ingress: [{action: Pass, from: [{planets: {}}]}]
- expect: {pairs: [{from: aws-1-pod-2, to: gcp-1-pod-1, verdict: deny}, {from: gcp-1-pod-1, to: gcp-1-pod-2, verdict: deny}]}
- status: {where: [{path: /policy/problems/0, contains: "ClusterNetworkPolicy admin: spec.ingress[0].from[0].planets"}]}
- assertNoCleartext: {}
"#,
        )
        .passes();
}

#[test]
fn a_permission_that_is_withdrawn_cuts_its_flow_and_no_other() {
    mesh("policy-revocation")
        .steps(
            r#"- handshakes: all
- expect: {matrix: pods}
- traffic: {start: doomed, from: aws-1-pod-2, to: gcp-1-pod-1, packetsPerSecond: 100}
- traffic: {start: kept, from: aws-1-pod-1, to: gcp-1-pod-1, packetsPerSecond: 100}
- traffic: {start: bystander, from: gcp-1-pod-2, to: aws-1-pod-1, packetsPerSecond: 100}
"#,
        )
        .steps(ONLY_WEB)
        .steps(
            r#"- expect: {pairs: [{from: aws-1-pod-2, to: gcp-1-pod-1, verdict: deny}]}
- traffic: {stop: doomed, maxLost: 1000000}
- name: with the agents dead policy stands
  kill: {nodes: all}
- expect: {pairs: [{from: aws-1-pod-2, to: gcp-1-pod-1, verdict: deny}, {from: aws-1-pod-1, to: gcp-1-pod-1}]}
- name: and it is taken over without a gap
  restart: {nodes: all}
- status: {where: [{path: /ready, equals: true}, {path: /policy/standing, equals: true}]}
- expect: {pairs: [{from: aws-1-pod-2, to: gcp-1-pod-1, verdict: deny}, {from: aws-1-pod-1, to: gcp-1-pod-1}]}
- traffic: {stop: kept, maxLost: 0, minReceived: 10}
- traffic: {stop: bystander, maxLost: 0, minReceived: 10}
"#,
        )
        .passes();
}

#[test]
fn sites_are_denied_by_the_mesh_unless_a_policy_allows_it() {
    mesh("policy-sites")
        .steps(
            r#"- handshakes: all
- expect: {matrix: pods}
- apply:
    file: mesh.yaml
    manifest:
      apiVersion: sennit.dev/v1alpha1
      kind: Mesh
      metadata: {name: policy-sites}
      spec: {policy: {sites: {default: deny, pairs: [{from: gcp, to: aws, stance: allow}]}}}
- name: what begins in aws does not get into gcp, the other way round it does
  expect: {pairs: [{from: pods@aws, to: pods@gcp, verdict: deny}, {from: pods@gcp, to: pods@aws}, {from: pods@aws, to: pods@aws}, {from: aws-1, to: pods@gcp, verdict: deny}]}
"#,
        )
        .steps(ONLY_WEB)
        .steps(
            r"- expect: {pairs: [{from: aws-1-pod-1, to: gcp-1-pod-1}, {from: aws-1-pod-2, to: pods@gcp, verdict: deny}, {from: aws-1-pod-1, to: gcp-1-pod-2, verdict: deny}]}
",
        )
        .passes();
}

#[test]
fn audit_tells_what_it_would_deny_and_denies_nothing() {
    let mut mesh = mesh("policy-audit");
    mesh.config("policy: {mode: audit}")
        .steps("- handshakes: all\n")
        .steps(ONLY_WEB)
        .steps(
            r#"- status: {nodes: gcp-1, where: [{path: /policy/policies, equals: 1}, {path: /policy/mode, equals: audit}]}
- expect: {matrix: pods}
- eventually:
    deadline: 30s
    step:
      exec: {on: gcp-1, command: "grep -h '\"verdict\":\"would-deny\"' /run/netlab/private/state/flows.jsonl | grep -m1 only-web", contains: client}
"#,
        )
        .passes();
}

#[test]
fn a_refused_policy_is_named_and_isolates_and_others_cannot_touch_the_table() {
    mesh("policy-refused")
        .steps(
            r#"- handshakes: all
- apply:
    file: broken.yaml
    manifest:
      apiVersion: networking.k8s.io/v1
      kind: NetworkPolicy
      metadata: {name: broken, namespace: shop}
      spec:
        podSelector: {matchLabels: {app: db}}
        ingress: [{}, {ports: [{port: 80, endPort: 79}]}]
- status: {nodes: gcp-1, where: [{path: /policy/problems, contains: "NetworkPolicy shop/broken: spec.ingress[1].ports[0].endPort"}]}
- expect: {pairs: [{from: pods@aws, to: gcp-1-pod-1, verdict: deny}, {from: pods@aws, to: gcp-1-pod-2}, {from: gcp-1-pod-1, to: pods@aws}]}
- exec: {on: gcp-1, command: "nft flush ruleset; nft delete table inet sennit-policy && exit 1; true"}
- expect: {pairs: [{from: pods@aws, to: gcp-1-pod-1, verdict: deny}, {from: pods@aws, to: gcp-1-pod-2}]}
- status: {where: [{path: /guard/standing, equals: true}, {path: /ready, equals: true}]}
"#,
        )
        .passes();
}

#[test]
fn a_directory_that_is_emptied_takes_no_policy_away() {
    mesh("policy-emptied")
        .steps("- handshakes: all\n- expect: {matrix: pods}\n")
        .steps(ONLY_WEB)
        .steps(
            r#"- expect: {pairs: [{from: aws-1-pod-2, to: gcp-1-pod-1, verdict: deny}]}
- name: what was mounted there is not any more
  exec: {on: aws-1, command: "mkdir /run/netlab/shared/away && mv /run/netlab/shared/registry/*.yaml /run/netlab/shared/away/"}
- status: {where: [{path: /errors, contains: counts as incomplete}]}
- expect: {pairs: [{from: aws-1-pod-2, to: gcp-1-pod-1, verdict: deny}, {from: aws-1-pod-1, to: gcp-1-pod-1}]}
- name: not even for an agent that starts meanwhile
  restart: {nodes: all}
- status: {where: [{path: /errors, contains: counts as incomplete}]}
- expect: {pairs: [{from: aws-1-pod-2, to: gcp-1-pod-1, verdict: deny}, {from: aws-1-pod-1, to: gcp-1-pod-1}]}
- name: nor where policy has to begin anew, as after a reboot
  kill: {nodes: gcp-1}
- exec: {on: gcp-1, command: nft delete table inet sennit-policy}
- restart: {nodes: gcp-1}
- status: {nodes: gcp-1, where: [{path: /policy/complete, equals: false}, {path: /ready, equals: false}]}
- expect: {pairs: [{from: aws-1-pod-2, to: gcp-1-pod-1, verdict: deny}]}
- name: it is back
  exec: {on: aws-1, command: "mv /run/netlab/shared/away/*.yaml /run/netlab/shared/registry/"}
- status: {where: [{path: /ready, equals: true}, {path: /policy/complete, equals: true}]}
- expect: {pairs: [{from: aws-1-pod-2, to: gcp-1-pod-1, verdict: deny}, {from: aws-1-pod-1, to: gcp-1-pod-1}]}
"#,
        )
        .passes();
}

/// A host beside aws-1 that is of no mesh, at 203.0.113.7.
const OUTSIDE: &str = r#"- name: a host outside of the mesh
  exec:
    on: aws-1
    command: >-
      unshare -n sleep 3000 >/dev/null 2>&1 & p=$!;
      while [ "$(readlink /proc/$p/ns/net)" = "$(readlink /proc/self/ns/net)" ]; do :; done;
      ip link add out0 type veth peer name out1 && ip link set out1 netns $p &&
      ip addr add 203.0.113.1/24 dev out0 && ip link set out0 up &&
      nsenter -n -t $p sh -c 'ip addr add 203.0.113.7/24 dev out1 && ip link set out1 up' &&
      nft 'add table ip out; add chain ip out nat { type nat hook postrouting priority 100; }; add rule ip out nat oifname "out0" masquerade'
"#;

/// A server of names at gcp-1's second pod, a question of aws-1's first, and a policy that lets that pod go nowhere but by name. The
/// answer names a host outside of the mesh, and a pod.
fn with_names(test: &str, ttl: u32) -> (Mesh, String) {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/policy/dns.py");
    let serve = format!(
        "- exec: {{on: gcp-1-pod-2, command: \"python3 {script} serve 10.2.0.3 db.example.com 10.2.0.2,203.0.113.7 {ttl}\"}}\n"
    );
    let ask = format!(
        "- exec: {{on: aws-1-pod-1, command: \"python3 {script} ask 10.2.0.3 db.example.com\", contains: 203.0.113.7}}\n"
    );
    let mut mesh = mesh(test);
    mesh.steps("- handshakes: all\n- expect: {matrix: pods}\n")
        .steps(OUTSIDE)
        .steps("- exec: {on: aws-1-pod-1, command: \"ping -n -c 1 -W 2 203.0.113.7\"}\n")
        .steps(&serve)
        .steps(
            r#"- name: the server is the cluster's own
  apply:
    file: dns.yaml
    manifest:
      apiVersion: v1
      kind: Pod
      metadata: {name: dns, namespace: kube-system, labels: {k8s-app: kube-dns}, creationTimestamp: "2026-01-01T00:00:00Z"}
      spec: {nodeName: gcp-1}
      status: {phase: Running, podIPs: [{ip: 10.2.0.3}, {ip: "fd00:2::3"}]}
- apply:
    file: names.yaml
    manifest:
      apiVersion: policy.networking.k8s.io/v1alpha2
      kind: ClusterNetworkPolicy
      metadata: {name: names}
      spec:
        tier: Admin
        priority: 1
        subject: {pods: {namespaceSelector: {}, podSelector: {matchLabels: {app: web}}}}
        egress:
          - {action: Accept, to: [{domainNames: ["*.example.com"]}]}
          - {action: Accept, to: [{pods: {namespaceSelector: {}, podSelector: {matchLabels: {k8s-app: kube-dns}}}}]}
          - {action: Deny, to: [{networks: [0.0.0.0/0, "::/0"]}]}
- expect: {pairs: [{from: aws-1-pod-1, to: gcp-1-pod-1, verdict: deny}, {from: aws-1-pod-2, to: gcp-1-pod-1}]}
"#,
        );
    (mesh, ask)
}

#[test]
fn a_name_is_reached_once_it_was_asked_for_and_no_longer_than_it_says() {
    let (mut mesh, ask) = with_names("policy-names", 7);
    mesh.steps(&ask)
        .steps(
            r#"- name: what was answered is reached, but for what is of the mesh
  exec: {on: aws-1-pod-1, command: "ping -n -c 1 -W 2 203.0.113.7 && ! ping -n -c 1 -W 1 10.2.0.2"}
- status: {nodes: aws-1, where: [{path: /policy/problems, contains: "dns-address-refused: db.example.com resolved to 10.2.0.2"}]}
- name: and no longer than that
  eventually:
    deadline: 60s
    step: {exec: {on: aws-1-pod-1, command: "! ping -n -c 1 -W 1 203.0.113.7"}}
"#,
        )
        .steps(&ask)
        .steps("- exec: {on: aws-1-pod-1, command: \"ping -n -c 1 -W 2 203.0.113.7\"}\n")
        .passes();
}

#[test]
fn a_name_that_was_learnt_outlives_the_agent() {
    let (mut mesh, ask) = with_names("policy-names-restart", 600);
    mesh.steps(&ask)
        .steps(
            r#"- exec: {on: aws-1-pod-1, command: "ping -n -c 1 -W 2 203.0.113.7"}
- eventually:
    deadline: 30s
    step: {exec: {on: aws-1, command: "grep -q db.example.com /run/netlab/private/state/names.json"}}
- restart: {nodes: aws-1, signal: KILL}
- status: {nodes: aws-1, where: [{path: /ready, equals: true}, {path: /policy/complete, equals: true}]}
- name: nobody has asked since
  exec: {on: aws-1-pod-1, command: "ping -n -c 1 -W 2 203.0.113.7 && ! ping -n -c 1 -W 1 10.2.0.2"}
"#,
        )
        .passes();
}

#[test]
fn a_flood_of_answers_holds_up_nothing_else() {
    let (mut mesh, ask) = with_names("policy-names-flood", 600);
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/policy/dns.py");
    let policy = |n: u32| {
        format!(
            r#"      - apiVersion: policy.networking.k8s.io/v1alpha2
        kind: ClusterNetworkPolicy
        metadata: {{name: names-{n}}}
        spec:
          tier: Admin
          priority: {}
          subject: {{pods: {{namespaceSelector: {{}}, podSelector: {{matchLabels: {{app: client}}}}}}}}
          egress: [{{action: Accept, to: [{{domainNames: ["*.d{n}.example.com"]}}]}}]
"#,
            n + 2
        )
    };
    let many: String = (0..400).map(policy).collect();
    mesh.steps(&ask)
        .steps(&format!("- apply:\n    file: many.yaml\n    manifest:\n{many}"))
        .steps("- status: {nodes: aws-1, where: [{path: /policy/policies, equals: 401}]}\n")
        .steps(&format!(
            "- exec: {{on: aws-1-pod-1, command: \"python3 {script} ask 10.2.0.3 flood.example.com\"}}\n"
        ))
        .steps(
            r#"- apply:
    file: closed.yaml
    manifest:
      apiVersion: networking.k8s.io/v1
      kind: NetworkPolicy
      metadata: {name: closed, namespace: shop}
      spec: {podSelector: {matchLabels: {app: client}}, policyTypes: [Ingress]}
- name: under the flood, a new policy counts on the node that is flooded
  expect: {pairs: [{from: gcp-1-pod-1, to: aws-1-pod-2, verdict: deny}]}
- status: {nodes: aws-1, where: [{path: /policy/policies, equals: 402}]}
- name: who floods is named
  status: {nodes: aws-1, where: [{path: /policy/problems, contains: "dns-budget: pod shop/web"}]}
- name: and what was learnt before counts
  exec: {on: aws-1-pod-1, command: "ping -n -c 1 -W 2 203.0.113.7"}
"#,
        )
        .passes();
}

#[test]
fn calicos_policies_and_the_meshs_own_count_through_the_tunnel() {
    mesh("policy-calico")
        .steps("- capture: underlay\n- handshakes: all\n- expect: {matrix: pods}\n")
        .steps(
            r#"- name: of aws only web may cross, and only to db; what stays at home is nobody's business
  apply:
    file: mesh-policy.yaml
    manifest:
      - apiVersion: sennit.dev/v1alpha1
        kind: MeshPolicy
        metadata: {name: crossing}
        spec:
          tier: Admin
          priority: 1
          subject: {namespaces: {}, sites: [aws]}
          egress:
            - {action: Deny, to: [{pods: {podSelector: {matchExpressions: [{key: app, operator: NotIn, values: [db]}]}}, notSites: [aws]}]}
            - {action: Pass, to: [{sites: [gcp]}]}
      - apiVersion: sennit.dev/v1alpha1
        kind: MeshPolicy
        metadata: {name: ledger}
        spec:
          tier: Admin
          priority: 2
          subject: {pods: {podSelector: {matchLabels: {app: db}}}}
          ingress:
            - {action: Accept, from: [{pods: {podSelector: {matchLabels: {app: web}}}, sites: [aws]}]}
            - {action: Deny, from: [{notSites: [gcp]}]}
- expect:
    pairs:
      - {from: aws-1-pod-1, to: [gcp-1-pod-1, aws-1-pod-2]}
      - {from: aws-1-pod-1, to: gcp-1-pod-2, verdict: deny}
      - {from: aws-1-pod-2, to: [gcp-1-pod-1, gcp-1-pod-2], verdict: deny}
      - {from: gcp-1-pod-2, to: [gcp-1-pod-1, aws-1-pod-1]}
- exec: {on: aws-1, command: "cd /run/netlab/shared/registry && rm mesh-policy.yaml"}
- expect: {matrix: pods}
- name: Calico's tiers before the developers', and what is staged is told only
  apply:
    file: calico.yaml
    manifest:
      - apiVersion: projectcalico.org/v3
        kind: Tier
        metadata: {name: security}
        spec: {order: 100, defaultAction: Pass}
      - apiVersion: projectcalico.org/v3
        kind: GlobalNetworkPolicy
        metadata: {name: security.db}
        spec:
          tier: security
          selector: app == 'db'
          ingress:
            - {action: Allow, source: {selector: "app in {'web'}", namespaceSelector: team == 'red'}}
            - {action: Deny, source: {notSelector: has(app)}}
            - {action: Pass}
      - apiVersion: crd.projectcalico.org/v1
        kind: NetworkPolicy
        metadata: {name: default.db, namespace: shop}
        spec:
          selector: app == 'db'
          ingress: [{action: Allow, source: {selector: app == 'nobody'}}]
      - apiVersion: projectcalico.org/v3
        kind: StagedGlobalNetworkPolicy
        metadata: {name: staged}
        spec: {selector: app == 'client', types: [Ingress], ingress: [{action: Deny, source: {selector: app == 'web'}}]}
- expect:
    pairs:
      - {from: aws-1-pod-1, to: [gcp-1-pod-1, gcp-1-pod-2, aws-1-pod-2]}
      - {from: aws-1-pod-2, to: gcp-1-pod-1, verdict: deny}
      - {from: aws-1, to: gcp-1-pod-1, verdict: deny}
- name: what the staged policy would deny
  eventually:
    deadline: 30s
    step:
      exec: {on: gcp-1, command: "grep -h '\"verdict\":\"would-deny\"' /run/netlab/private/state/flows.jsonl | grep -m1 StagedGlobalNetworkPolicy", contains: client-g}
- name: a node as an endpoint of its own, but for what is safe
  apply:
    file: host.yaml
    manifest:
      - apiVersion: projectcalico.org/v3
        kind: HostEndpoint
        metadata: {name: gcp-1, labels: {role: node}}
        spec: {node: gcp-1, interfaceName: "*"}
      - apiVersion: projectcalico.org/v3
        kind: GlobalNetworkPolicy
        metadata: {name: nodes}
        spec: {selector: role == 'node', types: [Ingress], ingress: [{action: Allow, source: {selector: app == 'web'}}]}
- expect:
    pairs:
      - {from: aws-1-pod-1, to: gcp-1}
      - {from: aws-1-pod-2, to: gcp-1, verdict: deny}
      - {from: gcp-1-pod-2, to: gcp-1}
- handshakes: all
- assertNoCleartext: {}
"#,
        )
        .passes();
}

#[test]
fn an_underlay_interface_may_be_closed_and_a_tunnel_be_a_host_endpoint() {
    mesh("policy-interfaces")
        .steps(
            r#"- capture: underlay
- handshakes: all
- expect: {matrix: pods}
- exec: {on: gcp-1, command: "ip -4 -o address show dev eth0 | awk '{print $4}' | cut -d/ -f1 > /run/netlab/shared/underlay"}
- exec: {on: aws-1, command: "ping -n -c 1 -W 2 $(cat /run/netlab/shared/underlay)"}
- name: by the underlay nobody speaks with the node, but for what carries the mesh
  apply:
    file: underlay.yaml
    manifest:
      - apiVersion: projectcalico.org/v3
        kind: HostEndpoint
        metadata: {name: gcp-1-eth0, labels: {role: underlay}}
        spec: {node: gcp-1, interfaceName: eth0}
- eventually:
    deadline: 20s
    step: {exec: {on: aws-1, command: "! ping -n -c 1 -W 1 $(cat /run/netlab/shared/underlay)"}}
- restart: {nodes: gcp-1}
- handshakes: all
- expect: {matrix: pods}
- expect: {pairs: [{from: [aws-1, aws-1-pod-1], to: gcp-1}]}
- name: what the tunnel's host endpoint lets through
  apply:
    file: tunnel.yaml
    manifest:
      - apiVersion: projectcalico.org/v3
        kind: HostEndpoint
        metadata: {name: gcp-1-tunnel, labels: {role: tunnel}}
        spec: {node: gcp-1, interfaceName: sennit0, profiles: [projectcalico-default-allow]}
      - apiVersion: projectcalico.org/v3
        kind: GlobalNetworkPolicy
        metadata: {name: crossing}
        spec:
          selector: role == 'tunnel'
          applyOnForward: true
          types: [Ingress]
          ingress: [{action: Allow, source: {selector: app == 'web'}}]
- expect:
    pairs:
      - {from: aws-1-pod-1, to: [gcp-1-pod-1, gcp-1-pod-2, gcp-1]}
      - {from: aws-1-pod-2, to: [gcp-1-pod-1, gcp-1-pod-2, gcp-1], verdict: deny}
      - {from: gcp-1-pod-2, to: [gcp-1-pod-1, aws-1-pod-1, aws-1-pod-2]}
- exec: {on: gcp-1, command: "rm /run/netlab/shared/registry/tunnel.yaml /run/netlab/shared/registry/underlay.yaml"}
- eventually:
    deadline: 20s
    step: {exec: {on: aws-1, command: "ping -n -c 1 -W 1 $(cat /run/netlab/shared/underlay)"}}
- expect: {matrix: pods}
- assertNoCleartext: {}
"#,
        )
        .passes();
}

#[test]
fn a_hostile_tenant_neither_silences_a_node_nor_delays_others() {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/policy/tenants.py");
    let flood = format!(
        "- timeout: 180s\n  exec: {{on: aws-1, command: \"python3 {script} /run/netlab/shared/registry 10.1.0.2 /run/sennit/agent.sock 20\", contains: slowest}}\n"
    );
    let mut mesh = Mesh::new("policy-tenants");
    mesh.sites("- {name: aws, podsPerNode: 2}\n- {name: gcp, podsPerNode: 1}")
        .steps(
            r"- apply:
    file: pods.yaml
    manifest:
      - {apiVersion: v1, kind: Namespace, metadata: {name: victim}}
      - {apiVersion: v1, kind: Namespace, metadata: {name: hostile}}
      - {apiVersion: v1, kind: Namespace, metadata: {name: other}}
      - apiVersion: v1
        kind: Pod
        metadata: {name: v, namespace: victim}
        spec: {nodeName: aws-1}
        status: {phase: Running, podIPs: [{ip: 10.1.0.2}, {ip: 'fd00:1::2'}]}
      - apiVersion: v1
        kind: Pod
        metadata: {name: h, namespace: hostile}
        spec: {nodeName: aws-1}
        status: {phase: Running, podIPs: [{ip: 10.1.0.3}, {ip: 'fd00:1::3'}]}
      - apiVersion: v1
        kind: Pod
        metadata: {name: o, namespace: other}
        spec: {nodeName: gcp-1}
        status: {phase: Running, podIPs: [{ip: 10.2.0.2}, {ip: 'fd00:2::2'}]}
- capture: underlay
- handshakes: all
- expect: {matrix: pods}
",
        )
        .steps(&flood)
        .steps(
            r#"- status: {nodes: aws-1, where: [{path: /policy/overBudget/0/object, equals: "Namespace hostile"}, {path: /policy/overBudget/0/code, equals: PolicyBudgetExceeded}, {path: /policy/overBudgetTotal, equals: 1}, {path: /policy/standing, equals: true}]}
- name: who is over its budget is closed, in the direction that it judges; its neighbour has what it asked for
  expect:
    pairs:
      - {from: gcp-1-pod-1, to: [aws-1-pod-1, aws-1-pod-2], verdict: deny}
      - {from: [aws-1-pod-1, aws-1-pod-2], to: gcp-1-pod-1}
- name: within its budget again it is open again
  exec: {on: aws-1, command: "cd /run/netlab/shared/registry && rm hostile-*.json victim.json"}
- status: {nodes: aws-1, where: [{path: /policy/overBudgetTotal, equals: 0}]}
- expect: {matrix: pods}
- assertNoCleartext: {}
"#,
        )
        .passes();
}
