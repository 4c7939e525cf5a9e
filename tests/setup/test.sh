#!/usr/bin/env bash
# All tests, each suite once, with a closing line that counts them.
set -euo pipefail
cd "$(dirname "$0")/../.."

if [[ $(id -u) != 0 ]]; then
  if [[ ${CI:-} == true ]]; then
    echo "the labs need root, and under CI nothing is skipped" >&2
    exit 1
  fi
  echo "Not root: the labs build network namespaces and are left out. Running the unit tests alone."
  echo "SKIPPED suites: mesh-wg on real interfaces, backends, netlab, meshlab, end to end"
  exec make unit
fi

log=$(mktemp)
trap 'rm -f "$log"' EXIT
started=$SECONDS
echo "== building programs and tests"
cargo build --workspace --bins --locked
# kernel-tests needs an emulated machine: `make kernel-test`; kube-tests a cluster: `make kube-test`.
cargo test --workspace --exclude kernel-tests --exclude kube-tests --locked --no-run
echo "== running the tests"
status=0
# Labs share two cores at most: one test program at a time, and inside of it what it chooses itself.
run() { cargo test --locked --no-fail-fast "$@" 2>&1 | tee -a "$log" || status=1; }
run --workspace --exclude kernel-tests --exclude kube-tests --exclude e2e
# Whole meshes wait most of the time, for handshakes, probes and deaths: four of them at once. By their programs, since `-p e2e` would
# choose other features of dependencies than all packages together, and build half of them anew.
mapfile -t meshes < <(cargo test --workspace --exclude kernel-tests --exclude kube-tests --locked --no-run --message-format=json 2>/dev/null |
  jq -r 'select(.executable != null and .profile.test and (.manifest_path | endswith("/e2e/Cargo.toml"))) | .executable')
((${#meshes[@]} > 1)) || { echo "no test programs of e2e were found" >&2; status=1; }
for program in "${meshes[@]}"; do
  echo "     Running $program"
  (cd tests/e2e && "$program" --test-threads=4) 2>&1 | tee -a "$log" || status=1
done
skips=$(grep -o 'SKIPPED [^ ]*: .*' "$log" | sort -u || true)
skipped=$(grep -c . <<<"$skips" || true)
echo "$skips"
# libtest counts a test that left early as passed.
passed=$(awk -v skipped="$skipped" '/^test result:/ {p += $4} END {print p - skipped}' "$log")
failed=$(awk '/^test result:/ {f += $6} END {print f + 0}' "$log")
grep -aE '^test .* FAILED$' "$log" || true
echo "took $((SECONDS - started)) s"
echo "$passed passed, $failed failed, $skipped skipped"
exit $status
