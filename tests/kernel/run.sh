#!/usr/bin/env bash
# The mesh with the kernel's WireGuard, on a machine whose own kernel need not have it: `make kernel-test`.
# Arguments go to the test program, such as the name of one test.
set -euo pipefail
cd "$(dirname "$0")/../.."
started=$SECONDS
step() { echo "== $((SECONDS - started)) s: $*"; }

step "a kernel with WireGuard, and an emulator for it"
status=0
image=$(tests/kernel/image.sh) || status=$?
mapfile -t image <<<"$image"
if ((status == 3)); then
  echo "SKIPPED kernel-test: what it lacks is named above" >&2
  [[ ${CI:-} != true ]] || { echo "under CI nothing is skipped" >&2; exit 1; }
  exit 0
fi
((status == 0)) || exit "$status"

step "a systemd, and a disk for it"
status=0
host=$(tests/kernel/host-image.sh) || status=$?
mapfile -t host <<<"$host"
# The tests that need it say that they are skipped, and fail under CI.
((status == 0 || status == 3)) || exit "$status"
((status == 0)) || host=()

step "building the programs"
programs=$(tests/setup/programs.sh)
backends=$(awk '$1 == "overlay" && $2 == "backends" {print $3}' <<<"$programs")
mapfile -t tests < <(awk '$1 == "tests/kernel" && ($2 == "kernel" || $2 == "boot") {print $3}' <<<"$programs")
bin=$(dirname "$(dirname "${tests[0]}")")

step "packing the programs for the guest"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/root/bin"
strip --strip-debug -o "$work/root/bin/mesh-agent" "$bin/mesh-agent"
strip --strip-debug -o "$work/root/bin/kernel-guest" "$bin/kernel-guest"
strip --strip-debug -o "$work/root/bin/backends" "$backends"
# The base image may have the same libraries already; that does no harm.
ldd "$work"/root/bin/* | grep -oE '/[^ )]+' | grep -v ':$' | sort -u | while read -r library; do
  mkdir -p "$work/root${library%/*}"
  cp -L "$library" "$work/root$library"
done
(cd "$work/root" && find . -print0 | cpio -o -0 -H newc -R 0:0 --quiet) >"$work/programs.cpio"

if ((${#host[@]} > 0)); then
  rm "$work/root/bin/backends"
  tests/kernel/host/fill.sh "${host[1]}" "$work/root" "$work/host.disk"
  export SENNIT_HOST_INITRAMFS=${host[0]} SENNIT_HOST_DISK=$work/host.disk
fi

step "running the tests"
export SENNIT_KERNEL=${image[0]} SENNIT_KERNEL_INITRAMFS=${image[1]}
export SENNIT_KERNEL_PROGRAMS=$work/programs.cpio SENNIT_BIN_DIR=$bin
# The mesh lives until the test program ends, too long to clean up after itself.
export TMPDIR=$work
status=0
for program in "${tests[@]}"; do
  "$program" --test-threads=1 "$@" || status=$?
done
step "done"
exit "$status"
