#!/usr/bin/env bash
# The mesh over a real Kubernetes API: `make kube-test`. Arguments go to the test programs, such as the name of one test.
set -euo pipefail
cd "$(dirname "$0")/../.."
started=$SECONDS
step() { echo "== $((SECONDS - started)) s: $*"; }

step "the programs of a cluster"
status=0
bin=$(tests/kube/binaries.sh --nodes) || status=$?
if ((status == 3)); then
  echo "SKIPPED kube-test: what it lacks is named above" >&2
  [[ ${CI:-} != true ]] || { echo "under CI nothing is skipped" >&2; exit 1; }
  exit 0
fi
((status == 0)) || exit "$status"

step "building the programs"
# As `make test` builds them: with the features of all packages together.
cargo build --locked --workspace --bins
cargo test --locked --no-run -p kube-tests

step "running the tests"
export SENNIT_KUBE_BIN=$bin
run() { cargo test --locked -p kube-tests --no-fail-fast "$@" || status=$?; }
# Two clusters at a time, since they wait most of the time; whole nodes with all their containers take both cores.
mapfile -t small < <(basename -s .rs -a tests/kube/tests/*.rs | grep -vx whole | sed 's/^/--test=/')
run --lib --bins "${small[@]}" -- --test-threads=2 "$@"
run --test=whole -- --test-threads=1 "$@"
step "done"
exit "$status"
