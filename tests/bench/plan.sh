#!/usr/bin/env bash
# How long the plan of a large mesh takes, and what agent and device hold in memory with that many peers.
# Usage: plan.sh [NODES]     Programs: $SENNIT_BIN_DIR, default target/release
set -euo pipefail
cd "$(dirname "$0")/../.."
nodes=${1:-1000}
bin=${SENNIT_BIN_DIR:-$PWD/target/release}
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT

# Any 32 bytes are a point on the curve's x line; the few weak ones do not come up.
key() { head -c 32 /dev/urandom | base64; }
echo "writing $nodes nodes" >&2
for ((i = 1; i <= nodes; i++)); do
  cat <<END
---
apiVersion: v1
kind: Node
metadata:
  name: far-$i
  annotations:
    sennit.dev/public-key: "$(key)"
    sennit.dev/epoch: "1"
    sennit.dev/site: far
    sennit.dev/endpoints: "203.0.$((i / 250)).$((i % 250 + 1)):51820"
spec: {podCIDRs: ["10.$((100 + i / 256)).$((i % 256)).0/24", "fd99:0:0:$(printf %x "$i")::/64"]}
END
done >"$dir/nodes.yaml"

mkdir "$dir/state" && cp "$dir/nodes.yaml" "$dir/state/"
TIMEFORMAT="plan of $nodes nodes, the whole command: %R s (%U s user)"
time "$bin/mesh-agent" plan --state "$dir/state" --node far-1 >"$dir/plan.json"
printf 'size of the plan: %s KiB\n' "$(($(stat -c %s "$dir/plan.json") / 1024))"

if [[ $(id -u) != 0 ]]; then
  echo "SKIPPED memory with $nodes peers: needs root"
  exit 0
fi
cat >"$dir/scenario.yaml" <<END
name: thousand
sites:
  - name: near
    nodes: 2
  - name: far
    prefixes: [10.96.0.0/11, "fd99::/48"]
    nodes: [anchor]
steps:
  - handshakes: all
  - apply: {file: many.yaml, source: nodes.yaml}
  - name: every peer is in the device
    timeout: 120s
    status: {nodes: near-1, where: [{path: /peers, atLeast: $nodes}, {path: /ready, equals: true}]}
  - name: the next pass writes nothing
    timeout: 60s
    status: {nodes: near-1, where: [{path: /changes/0, equals: 0}, {path: /ready, equals: true}]}
  - exec:
      on: near-1
      command: >-
        for name in mesh-agent mesh-wg; do
        for pid in /proc/[0-9]*; do
        test "\$(cat \$pid/comm)" = \$name && test "\$(readlink \$pid/ns/net)" = "\$(readlink /proc/self/ns/net)" &&
        echo "memory of \$name with $nodes peers: \$(awk '/VmRSS/ {print int(\$2 / 1024)}' \$pid/status) MiB (peak \$(awk '/VmHWM/ {print int(\$2 / 1024)}' \$pid/status) MiB)";
        done; done > $dir/memory; true
END
SENNIT_BIN_DIR=$bin "$bin/meshlab" run "$dir/scenario.yaml" --dump-dir "$dir/dump" 2>/dev/null
cat "$dir/memory"
