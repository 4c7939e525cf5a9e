#!/usr/bin/env bash
# What policy costs: small changes and first packets at scale, and streams through the tunnel with up to 10,000 rules beside streams
# without any policy, in one run.
# Usage: policy.sh [ROUNDS]     Programs: $SENNIT_BIN_DIR, default target/release
set -euo pipefail
cd "$(dirname "$0")/../.."
rounds=${1:-5}
bin=${SENNIT_BIN_DIR:-$PWD/target/release}
[[ $(id -u) == 0 ]] || { echo "policy.sh needs root" >&2; exit 1; }
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
echo "== 20,000 pods, 1,000 policies, 110 pods of the node" >&2
"$bin/policy-bench"
echo "== the same in five tiers of three APIs" >&2
"$bin/policy-bench" --tiers | sed -n '/cold start/,$p'
echo "== a network set of 200,000 prefixes, and one more" >&2
"$bin/policy-bench" --networks 200000
echo "== one tenant's policies beside its neighbour's" >&2
"$bin/policy-bench" --tenants

echo "== sources checked by the interface that packets come in by, in turns with unchecked ones" >&2
"$bin/policy-bench" --sources "$rounds"

# Rules that the server's class has before the one that lets the client in: policies of a thousand each.
python3 - "$dir" <<'END'
import json, sys
dir = sys.argv[1]
def pod(name, node, *ips):
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "x", "labels": {"app": name}},
            "spec": {"nodeName": node}, "status": {"podIPs": [{"ip": ip} for ip in ips]}}
pods = [pod("server", "aws-1", "10.1.0.2", "fd00:1::2"), pod("client", "gcp-1", "10.2.0.2", "fd00:2::2")]
json.dump({"apiVersion": "v1", "kind": "List", "items": pods}, open(f"{dir}/pods.json", "w"))
for count in (0, 100, 1000, 10000):
    items = []
    for first in range(0, count, 1000):
        rules = [{"from": [{"podSelector": {"matchLabels": {"app": f"a{n % 100}"}}}], "ports": [{"port": 1 + n}]}
                 for n in range(first, min(first + 1000, count))]
        items.append((f"p{first:05}", rules))
    if count:
        items.append(("z", [{"from": [{"podSelector": {"matchLabels": {"app": "client"}}}]}]))
    policies = [{"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": name, "namespace": "x"},
                 "spec": {"podSelector": {"matchLabels": {"app": "server"}}, "ingress": rules}} for name, rules in items]
    json.dump({"apiVersion": "v1", "kind": "List", "items": policies}, open(f"{dir}/{count}.json", "w"))
END
# The same 10,000 rules as 1,000 policies of five tiers and three APIs; the last one lets the client in.
python3 - "$dir" <<'END'
import json, sys
def rules(index, make):
    return [make(f"a{n % 100}", 1 + n) for n in range(index * 10, index * 10 + 10)]
def cluster(index, tier):
    make = lambda app, port: {"action": "Accept", "from": [{"pods": {"podSelector": {"matchLabels": {"app": app}}}}],
                              "protocols": [{"tcp": {"destinationPort": {"number": port}}}]}
    spec = {"tier": tier, "priority": index, "subject": {"pods": {"podSelector": {"matchLabels": {"app": "server"}}}}, "ingress": rules(index, make)}
    return {"apiVersion": "policy.networking.k8s.io/v1alpha2", "kind": "ClusterNetworkPolicy", "metadata": {"name": f"p{index}"}, "spec": spec}
def calico(index, tier):
    make = lambda app, port: {"action": "Allow", "protocol": "TCP", "source": {"selector": f"app == '{app}'"}, "destination": {"ports": [port]}}
    spec = {"tier": tier, "order": index, "selector": "app == 'server'", "ingress": rules(index, make)}
    return {"apiVersion": "projectcalico.org/v3", "kind": "GlobalNetworkPolicy", "metadata": {"name": f"p{index}"}, "spec": spec}
def developer(index):
    make = lambda app, port: {"from": [{"podSelector": {"matchLabels": {"app": app}}}], "ports": [{"port": port}]}
    more = [{"from": [{"podSelector": {"matchLabels": {"app": "client"}}}]}] if index == 997 else []
    spec = {"podSelector": {"matchLabels": {"app": "server"}}, "ingress": rules(index, make) + more}
    return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": f"p{index:04}", "namespace": "x"}, "spec": spec}
items = [{"apiVersion": "projectcalico.org/v3", "kind": "Tier", "metadata": {"name": name}, "spec": {"order": order, "defaultAction": "Pass"}}
         for name, order in (("security", 100), ("platform", 2e6))]
kinds = (lambda n: cluster(n, "Admin"), lambda n: calico(n, "security"), developer, lambda n: calico(n, "platform"), lambda n: cluster(n, "Baseline"))
items += [kinds[n % 5](n) for n in range(1000)]
json.dump({"apiVersion": "v1", "kind": "List", "items": items}, open(f"{sys.argv[1]}/tiers.json", "w"))
END
stream() { # name, iperf3's arguments
  printf '  - exec: {on: aws-1-pod-1, command: "iperf3 -s -D -1 -p 5201"}\n  - timeout: 60s\n    exec: {on: gcp-1-pod-1, command: "sleep 0.5; head -n 1 /proc/stat > %s; iperf3 -c 10.1.0.2 -p 5201 -t 3 %s -J > %s; head -n 1 /proc/stat > %s"}\n' \
    "$dir/$1.before" "$2" "$dir/$1.json" "$dir/$1.after"
}
both() {
  stream "tcp-$1" "-C reno"
  stream "udp-$1" "-u -b 0 -l 64"
}
cat >"$dir/beside.nft" <<'END'
table inet beside { chain f { type filter hook forward priority 10; ct state invalid counter; }; }
END
cat >"$dir/mode.sh" <<'END'
sed -i -E "s/(\"?mode\"?: *)\"?(off|enforce)\"?/\1\"$1\"/" /run/netlab/private/agent.yaml
grep -q "\"$1\"" /run/netlab/private/agent.yaml
END
mode() {
  for node in aws-1 gcp-1; do
    printf '  - exec: {on: %s, command: "bash %s/mode.sh %s"}\n' $node "$dir" "$1"
  done
  # A mode that YAML would read as a truth value.
  printf '  - restart: {nodes: all}\n  - status: {where: [{path: /ready, equals: true}, {path: /policy/mode, equals: "%s"}]}\n' "$1"
}
{
  cat <<END
name: policy-cost
sites: [{name: aws}, {name: gcp}]
mesh: {config: {policy: {mode: enforce, budgets: {namespace: {rules: 40000, bytes: 100000000}, class: {rules: 40000, bytes: 100000000}}}}}
steps:
  - apply: {file: pods.json, source: pods.json}
  - handshakes: all
END
  for ((round = 1; round <= rounds; round++)); do
    mode off
    both "off-$round"
    # Whatever else of a node's nftables asks conntrack, as kube-proxy does on all nodes of Kubernetes.
    for node in aws-1 gcp-1; do printf '  - exec: {on: %s, command: "nft -f %s"}\n' $node "$dir/beside.nft"; done
    both "tracked-$round"
    for node in aws-1 gcp-1; do printf '  - exec: {on: %s, command: "nft delete table inet beside"}\n' $node; done
    mode enforce
    for count in 0 100 1000 10000 tiers; do
      printf '  - apply: {file: policies.json, source: %s.json}\n' $count
      if [[ $count == tiers ]]; then policies=1000; else policies=$((count == 0 ? 0 : (count + 999) / 1000 + 1)); fi
      printf '  - status: {nodes: aws-1, where: [{path: /policy/policies, equals: %s}, {path: /policy/standing, equals: true}]}\n' $policies
      both "$count-$round"
    done
  done
} >"$dir/cost.yaml"
# A running agent whose directory holds 20,000 pods: from when a pod's label is written to when the kernel has it.
python3 - "$dir" <<'END'
import json, sys
def pod(n):
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"pod-{n}", "namespace": "x", "uid": f"{n:036}",
            "labels": {"app": f"app-{n % 200}", "tier": "web", "version": "v1"}},
            "spec": {"nodeName": f"node-{n % 1000}", "containers": [{"ports": [{"name": "http", "containerPort": 8080}]}]},
            "status": {"podIPs": [{"ip": f"10.{100 + n // 62500}.{n // 250 % 250}.{1 + n % 250}"}]}}
json.dump({"apiVersion": "v1", "kind": "List", "items": [pod(n) for n in range(20000)]}, open(f"{sys.argv[1]}/many.json", "w"))
END
cat >"$dir/labels.py" <<'END'
import glob, os, re, subprocess, time
registry = "/run/netlab/shared/registry"
def client(app):
    text = ('{"apiVersion":"v1","kind":"Pod","metadata":{"name":"other","namespace":"x","labels":{"app":"%s"}},'
            '"spec":{"nodeName":"gcp-1"},"status":{"podIPs":[{"ip":"10.2.0.77"}]}}' % app)
    with open(registry + "/.other", "w") as file:
        file.write(text)
    os.rename(registry + "/.other", registry + "/other.json")
def table():
    return subprocess.run(["nft", "list", "table", "inet", "sennit-policy"], capture_output=True, text=True).stdout
client("client")
while True:
    held = re.search(r"set (\w_s_\w+4) \{[^}]*elements = \{[^}]*10\.2\.0\.77", table())
    if held:
        break
name = held.group(1)
def inside():
    return subprocess.run(["nft", "get", "element", "inet", "sennit-policy", name, "{ 10.2.0.77 }"], capture_output=True).returncode == 0
agent = next(pid for pid in glob.glob("/proc/[0-9]*") if open(pid + "/comm").read() == "mesh-agent\n" and os.readlink(pid + "/ns/net") == os.readlink("/proc/self/ns/net"))
def ticks():
    fields = open(agent + "/stat").read().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])
took, before = [], ticks()
for turn in range(100):
    wanted = turn % 2 == 1
    began = time.monotonic()
    client("client" if wanted else "nobody")
    while inside() != wanted:
        pass
    took.append((time.monotonic() - began) * 1e3)
    time.sleep(0.2)
took.sort()
memory = re.search(r"VmRSS:\s*(\d+)", open(agent + "/status").read()).group(1)
print(f"label to kernel, registry directory of 20,000 pods: p50 {took[50]:.0f} ms, p99 {took[98]:.0f} ms; "
      f"agent {(ticks() - before) * 10 / 100:.0f} ms of CPU each, {int(memory) // 1024} MiB")
END
cat >"$dir/labels.yaml" <<END
name: policy-labels
sites: [{name: aws}, {name: gcp}]
steps:
  - apply: {file: pods.json, source: pods.json}
  - apply: {file: many.json, source: many.json}
  - apply: {file: policies.json, source: 100.json}
  - handshakes: all
  - timeout: 60s
    status: {where: [{path: /policy/pods, atLeast: 20000}, {path: /policy/standing, equals: true}]}
  - timeout: 300s
    exec: {on: aws-1, command: "python3 $dir/labels.py > $dir/labels.log 2>&1"}
END
echo "== a label, from the directory to the kernel" >&2
SENNIT_BIN_DIR=$bin "$bin/meshlab" run "$dir/labels.yaml" --dump-dir "$dir/dump" >"$dir/out" 2>&1 || { cat "$dir/out" "$dir/labels.log" >&2; exit 1; }
cat "$dir/labels.log"

echo "== streams through the tunnel, $rounds rounds" >&2
SENNIT_BIN_DIR=$bin "$bin/meshlab" run "$dir/cost.yaml" --dump-dir "$dir/dump" >"$dir/out" 2>&1 || { cat "$dir/out" >&2; exit 1; }
python3 - "$dir" "$rounds" <<'END'
import json, statistics, sys
dir, rounds = sys.argv[1], range(1, int(sys.argv[2]) + 1)
def tcp(what, n):
    return json.load(open(f"{dir}/tcp-{what}-{n}.json"))["end"]["sum_received"]["bits_per_second"] / 1e9
def udp(what, n):
    end = json.load(open(f"{dir}/udp-{what}-{n}.json"))["end"]["sum"]
    return (end["packets"] - end["lost_packets"]) / end["seconds"] / 1e3
def busy(name):
    # user, nice, system, irq, softirq of all processors, in hundredths of a second
    ticks = [[int(n) for n in open(f"{dir}/{name}.{end}").read().split()[1:8]] for end in ("before", "after")]
    return sum(after - before for n, (before, after) in enumerate(zip(*ticks)) if n not in (3, 4)) / 100
def gigabytes(what, n):
    return json.load(open(f"{dir}/tcp-{what}-{n}.json"))["end"]["sum_received"]["bytes"] / 1e9
def packets(what, n):
    end = json.load(open(f"{dir}/udp-{what}-{n}.json"))["end"]["sum"]
    return (end["packets"] - end["lost_packets"]) / 1e6
for name, kind, rate, unit, amount, per in (("TCP", "tcp", tcp, "Gb/s", gigabytes, "GB"),
                                            ("UDP of 64 bytes", "udp", udp, "thousand packets/s", packets, "million packets")):
    base = [rate("off", n) for n in rounds]
    tracked = [rate("tracked", n) for n in rounds]
    cost = lambda what, n: busy(f"{kind}-{what}-{n}") / amount(what, n)
    spent = [cost("off", n) for n in rounds]
    print(f"{name} without policy: {statistics.median(base):.2f} {unit} ({min(base):.2f}-{max(base):.2f}), {statistics.median(spent):.2f} s of CPU per {per}")
    print(f"  with conntrack alone: {statistics.median(a / b for a, b in zip(tracked, base)):.3f} of that, "
          f"{statistics.median(cost('tracked', n) / one for n, one in zip(rounds, spent)):.3f} of the CPU")
    for count in (0, 100, 1000, 10000, "tiers"):
        ratios = [rate(count, n) / one for n, one in zip(rounds, base)]
        costs = [cost(count, n) / one for n, one in zip(rounds, spent)]
        what = f"{count:>6} rules" if count != "tiers" else "10,000 rules in five tiers"
        print(f"  with {what}: {statistics.median(ratios):.3f} of that ({min(ratios):.3f}-{max(ratios):.3f}), "
              f"{statistics.median(costs):.3f} of the CPU ({min(costs):.3f}-{max(costs):.3f}); "
              f"of conntrack alone {statistics.median(rate(count, n) / one for n, one in zip(rounds, tracked)):.3f}, "
              f"{statistics.median(cost(count, n) / cost('tracked', n) for n in rounds):.3f} of the CPU")
END
