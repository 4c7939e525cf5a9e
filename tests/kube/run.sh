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
programs=$(tests/setup/programs.sh | sed -n 's|^tests/kube ||p')

step "running the tests"
export SENNIT_KUBE_BIN=$bin
# Two clusters at a time, since they wait most of the time; whole nodes with all their containers take both cores.
while read -r name program; do
  [[ $name == whole ]] && threads=1 || threads=2
  echo "     Running $name"
  (cd tests/kube && "$program" --test-threads=$threads "$@" </dev/null) || status=$?
done < <(grep -v '^whole ' <<<"$programs"; grep '^whole ' <<<"$programs")
step "done"
exit "$status"
