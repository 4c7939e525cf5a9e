#!/usr/bin/env bash
# What probing a thousand living peers costs an agent, what floods of probes cost the tunnel, and what VXLAN costs it.
# Usage: paths.sh [PEERS]     Programs: $SENNIT_BIN_DIR, default target/release
set -euo pipefail
cd "$(dirname "$0")/../.."
peers=${1:-1000}
bin=${SENNIT_BIN_DIR:-$PWD/target/release}
[[ $(id -u) == 0 ]] || { echo "paths.sh needs root" >&2; exit 1; }
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
seconds=90
config=/run/netlab/private/agent.yaml

"$bin/crowd" write "$peers" >"$dir/nodes.yaml"
cat >"$dir/crowd.sh" <<END
set -e
key=\$(sed -n 's/.*public-key: *"*\([^"]*\)"*/\1/p' /run/netlab/shared/registry/published/near-1.yaml)
ip route add local 172.20.0.0/16 dev lo
$bin/crowd run $peers \$key 198.18.1.11:51820 $seconds
END
cat >"$dir/cost.sh" <<'END'
set -e
agent=
for pid in /proc/[0-9]*; do
  test "$(cat $pid/comm)" = mesh-agent && test "$(readlink $pid/ns/net)" = "$(readlink /proc/self/ns/net)" && agent=$pid
done
ticks() { awk '{print $14 + $15}' $agent/stat; }
before=$(ticks)
sleep 40
after=$(ticks)
awk -v t=$((after - before)) '/VmRSS/ {printf "mesh-agent: %.2f %% of a core, %d MiB\n", t / 40, $2 / 1024}' $agent/status
END
cat >"$dir/cost.yaml" <<END
name: probe-cost
sites:
  - name: near
    nodes: 2
    prefixes: [10.96.0.0/11, "fd99::/48"]
steps:
  - handshakes: all
  - kill: {nodes: near-2}
  - kill: {nodes: near-2, target: device}
  - exec: {on: near-1, command: "ip route add 172.20.0.0/16 via 198.18.1.12"}
  - apply: {file: many.yaml, source: nodes.yaml}
  - timeout: 60s
    status: {nodes: near-1, where: [{path: /peers, atLeast: $peers}, {path: /ready, equals: true}]}
  - exec: {on: near-2, command: "bash $dir/crowd.sh > $dir/crowd.log 2>&1 &"}
  - timeout: 60s
    eventually:
      deadline: 60s
      step: {status: {nodes: near-1, where: [{path: /peers/crowd-0/probed/state, equals: alive}]}}
  - name: the first seconds are not counted
    always: {for: 20s, step: {exec: {on: near-2, command: "true"}}}
  - timeout: 100s
    exec: {on: near-1, command: "bash $dir/cost.sh > $dir/cost.log 2>&1"}
  - timeout: 60s
    eventually: {deadline: 60s, step: {exec: {on: near-2, command: "grep peers $dir/crowd.log"}}}
END
echo "== $peers peers that answer" >&2
SENNIT_BIN_DIR=$bin "$bin/meshlab" run "$dir/cost.yaml" --dump-dir "$dir/dump" >"$dir/out" 2>&1 || { cat "$dir/out" >&2; exit 1; }
cat "$dir/crowd.log" "$dir/cost.log"

# One stream after the other in one lab, in turn, so that a machine that gets slower gets slower for all.
cat >"$dir/flood.sh" <<END
kind=\$1
key=\$(sed -n 's/.*public-key: *"*\([^"]*\)"*/\1/p' /run/netlab/shared/registry/published/aws-1.yaml)
exec $bin/probe-flood \$kind 198.18.1.11:51820 100000 8 /run/netlab/private/state/keys/private.key \$key
END
stream() { # what
  printf '  - exec: {on: aws-1-pod-1, command: "iperf3 -s -D -1 -p 5201"}\n  - timeout: 60s\n    exec: {on: gcp-1-pod-1, command: "sleep 0.5; iperf3 -c 10.1.0.2 -p 5201 -t 5 -C reno -J > %s"}\n' "$dir/$1.json"
}
{
  cat <<END
name: probe-flood
sites: [{name: aws}, {name: gcp}, {name: evil}]
steps:
  - handshakes: all
  - expect: {matrix: pods}
END
  for round in 1 2 3; do
    stream "direct-$round"
    for kind in random forged replayed; do
      printf '  - exec: {on: evil-1, command: "bash %s/flood.sh %s > %s/flood-%s-%s.log 2>&1 &"}\n' "$dir" $kind "$dir" $kind $round
      stream "$kind-$round"
      printf '  - timeout: 60s\n    eventually: {deadline: 60s, step: {exec: {on: evil-1, command: "grep second %s/flood-%s-%s.log"}}}\n' "$dir" $kind $round
    done
    cat <<END
  - block: {at: aws, protocol: udp, port: 51820}
  - status: {where: [{path: /peers/gcp-1/path, equals: vxlan}]}
    timeout: 20s
END
    stream "vxlan-$round"
    cat <<END
  - unblock: aws
  - status: {where: [{path: "/peers/*/path", equals: direct}]}
    timeout: 60s
END
  done
} | sed 's|status: {where: \[{path: /peers/gcp-1/path|status: {nodes: aws, where: [{path: /peers/gcp-1/path|' >"$dir/flood.yaml"
echo "== floods of 100,000 probes a second, and VXLAN: three rounds" >&2
SENNIT_BIN_DIR=$bin "$bin/meshlab" run "$dir/flood.yaml" --dump-dir "$dir/dump" >"$dir/out" 2>&1 || { cat "$dir/out" >&2; exit 1; }
python3 - "$dir" <<'END'
import json, statistics, sys
def rate(what, n):
    return json.load(open(f"{sys.argv[1]}/{what}-{n}.json"))["end"]["sum_received"]["bits_per_second"] / 1e9
direct = [rate("direct", n) for n in (1, 2, 3)]
print(f"direct: {statistics.median(direct):.2f} Gb/s ({min(direct):.2f}-{max(direct):.2f})")
for what in ("random", "forged", "replayed", "vxlan"):
    ratios = [rate(what, n) / one for n, one in zip((1, 2, 3), direct)]
    sent = "" if what == "vxlan" else " beside " + open(f"{sys.argv[1]}/flood-{what}-1.log").read().strip()
    print(f"{what}: {statistics.median(ratios):.2f} of direct ({min(ratios):.2f}-{max(ratios):.2f}){sent}")
END
