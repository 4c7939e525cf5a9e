#!/usr/bin/env bash
# What policy costs: small changes and first packets at scale, and streams through the tunnel with up to 10,000 rules beside streams
# without any policy, in one run.
# Usage: policy.sh [ROUNDS]     Programs: $SENNIT_BIN_DIR, default target/release
set -euo pipefail
cd "$(dirname "$0")/../.."
rounds=${1:-3}
bin=${SENNIT_BIN_DIR:-$PWD/target/release}
[[ $(id -u) == 0 ]] || { echo "policy.sh needs root" >&2; exit 1; }
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
echo "== 20,000 pods, 1,000 policies, 110 pods of the node" >&2
"$bin/policy-bench"

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
stream() { # name, iperf3's arguments
  printf '  - exec: {on: aws-1-pod-1, command: "iperf3 -s -D -1 -p 5201"}\n  - timeout: 60s\n    exec: {on: gcp-1-pod-1, command: "sleep 0.5; iperf3 -c 10.1.0.2 -p 5201 -t 4 %s -J > %s"}\n' "$2" "$dir/$1.json"
}
both() {
  stream "tcp-$1" "-C reno"
  stream "udp-$1" "-u -b 0 -l 64"
}
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
mesh: {config: {policy: {mode: enforce}}}
steps:
  - apply: {file: pods.json, source: pods.json}
  - handshakes: all
END
  for ((round = 1; round <= rounds; round++)); do
    mode off
    both "off-$round"
    mode enforce
    for count in 0 100 1000 10000; do
      printf '  - apply: {file: policies.json, source: %s.json}\n' $count
      policies=$((count == 0 ? 0 : (count + 999) / 1000 + 1))
      printf '  - status: {nodes: aws-1, where: [{path: /policy/policies, equals: %s}, {path: /policy/standing, equals: true}]}\n' $policies
      both "$count-$round"
    done
  done
} >"$dir/cost.yaml"
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
for name, rate, unit in (("TCP", tcp, "Gb/s"), ("UDP of 64 bytes", udp, "thousand packets/s")):
    base = [rate("off", n) for n in rounds]
    print(f"{name} without policy: {statistics.median(base):.2f} {unit} ({min(base):.2f}-{max(base):.2f})")
    for count in (0, 100, 1000, 10000):
        ratios = [rate(count, n) / one for n, one in zip(rounds, base)]
        print(f"  with {count:>6} rules: {statistics.median(ratios):.3f} of that ({min(ratios):.3f}-{max(ratios):.3f})")
END
