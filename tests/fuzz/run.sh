#!/usr/bin/env bash
# Fuzzes each target for FUZZ_SECONDS (600), two at a time. Usage: run.sh [TARGET...]
# New inputs go to target/, not into the committed corpora; what crashes lies in artifacts/.
set -euo pipefail
cd "$(dirname "$0")"
seconds=${FUZZ_SECONDS:-600}
targets=("$@")
((${#targets[@]})) || mapfile -t targets < <(sed -n 's/^name = "\([a-z_]*\)"$/\1/p' Cargo.toml | grep -v sennit)
if ! command -v cargo-fuzz >/dev/null; then
  echo "installing cargo-fuzz from crates.io"
  cargo install cargo-fuzz --locked
fi
# The sanitizer's flags are unstable ones; a stable compiler takes them when told so.
export RUSTC_BOOTSTRAP=1
# What is linked at once cannot be told where it came from.
export CARGO_PROFILE_RELEASE_LTO=off
cargo fuzz build --fuzz-dir . --debug-assertions --target-dir "$PWD/target"
built=target/$(rustc -vV | sed -n 's/^host: //p')/release
run() {
  mkdir -p "target/found/$1" "artifacts/$1"
  # What was built, itself: `cargo fuzz run` would build anew whatever somebody edits meanwhile.
  "$built/$1" -artifact_prefix="artifacts/$1/" -max_total_time="$seconds" -timeout=20 -rss_limit_mb=4096 \
    -print_final_stats=1 "target/found/$1" "corpus/$1" >"target/$1.log" 2>&1 ||
    { echo "$1: FOUND SOMETHING, see artifacts/$1 and target/$1.log"; return 1; }
  echo "$1: $(sed -n 's/^stat::number_of_executed_units: *//p' "target/$1.log") runs in $seconds s, nothing found"
}
status=0
while ((${#targets[@]})); do
  pids=()
  for target in "${targets[@]:0:2}"; do
    run "$target" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || status=1; done
  targets=("${targets[@]:2}")
done
exit $status
