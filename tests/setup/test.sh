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
programs=$(tests/setup/programs.sh)
echo "== running the tests"
status=0
# Labs share two cores at most: one test program at a time, and inside of it what it chooses itself; but whole meshes wait most of the
# time, for handshakes, probes and deaths: four of them at once. kernel-tests needs an emulated machine, `make kernel-test`; kube-tests
# a cluster, `make kube-test`.
while read -r folder name program; do
  case $folder in
    tests/kernel | tests/kube) continue ;;
    tests/e2e) threads=(--test-threads=4) ;;
    *) threads=() ;;
  esac
  echo "     Running $name of $folder"
  (cd "$folder" && "$program" "${threads[@]}" </dev/null) 2>&1 | tee -a "$log" || status=1
done <<<"$programs"
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
