#!/usr/bin/env bash
# Replays the cases of public network-policy suites, converted to JSON: a folder for each suite. They are no part of this project.
set -euo pipefail
oracles=$(realpath -m "$1")
cd "$(dirname "$0")/../.."

if [[ ! -d $oracles/cyclonus ]]; then
  echo "SKIPPED conformance: $oracles holds no suites (cyclonus, k8s-e2e, knp, cnp-conformance, knp-anp-as-cnp, calico-v3, calico-polprog, selectors); name their folder: make conformance ORACLES=FOLDER" >&2
  [[ ${CI:-} != true ]] || exit 1
  exit 0
fi
cargo build --release --locked -p mesh-agent -p policy-tests --bins
packets=()
if [[ $(id -u) != 0 ]]; then
  echo "SKIPPED real packets: they need root" >&2
  packets=(--no-packets)
fi
exec target/release/policy-conformance --oracles "$oracles" --agent target/release/mesh-agent "${packets[@]}"
