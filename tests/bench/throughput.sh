#!/usr/bin/env bash
# TCP throughput of mesh-wg and wireguard-go, interleaved, between two network namespaces of this machine.
# Both ends share its cores, so the ratio says how much work a byte is, not how fast a network is.
# Usage: throughput.sh [ROUNDS] [SECONDS]     Programs: $SENNIT_BIN_DIR, default target/release
set -euo pipefail
cd "$(dirname "$0")/../.."
if [[ ${1:-} != inside ]]; then
  if [[ $(id -u) != 0 ]]; then
    echo "SKIPPED throughput: needs root for network namespaces"
    exit 0
  fi
  # Private mounts and processes: sockets and namespaces vanish with this script, whatever happens.
  exec unshare --mount --net --pid --fork --kill-child --mount-proc "$0" inside "${SENNIT_BIN_DIR:-$PWD/target/release}" "$@"
fi
bin=$2 rounds=${3:-5} seconds=${4:-5}
mount -t tmpfs tmpfs /run
umask 077
ip netns add a && ip netns add b
ip link add under netns a type veth peer name under netns b
for n in a:1 b:2; do
  ip -n "${n%:*}" address add "192.0.2.${n#*:}/24" dev under
  ip -n "${n%:*}" link set under up
  ip -n "${n%:*}" link set lo up
  wg genkey >"/run/key-${n%:*}"
done

# name-of-implementation command -> "Gb/s CPU-seconds-per-GB"
measure() {
  local command=$1 pids=() from to
  for n in a b; do
    ip netns exec $n $command -f "wg$n" >/dev/null 2>&1 &
    pids+=($!)
  done
  for n in a b; do
    until [[ -S /run/wireguard/wg$n.sock ]]; do read -rt 0.05 <> <(:) || :; done
  done
  ip netns exec a wg set wga private-key /run/key-a listen-port 51820 peer "$(wg pubkey </run/key-b)" \
    allowed-ips 10.0.0.2/32 endpoint 192.0.2.2:51820
  ip netns exec b wg set wgb private-key /run/key-b listen-port 51820 peer "$(wg pubkey </run/key-a)" \
    allowed-ips 10.0.0.1/32 endpoint 192.0.2.1:51820
  for n in a:1 b:2; do
    ip -n "${n%:*}" address add "10.0.0.${n#*:}/24" dev "wg${n%:*}"
    ip -n "${n%:*}" link set "wg${n%:*}" mtu 1420 up
  done
  ip netns exec a ping -q -c 1 -W 5 10.0.0.2 >/dev/null
  ip netns exec b iperf3 -s -1 -D --pidfile /run/iperf
  from=$(cpu "${pids[@]}")
  # The server needs a moment to listen; iperf3 itself has no retry.
  until ip netns exec a iperf3 -c 10.0.0.2 -t "$seconds" -J >/run/result 2>/dev/null; do :; done
  to=$(cpu "${pids[@]}")
  jq -r --argjson cpu $((to - from)) --argjson hz "$(getconf CLK_TCK)" \
    '.end.sum_received | "\(.bits_per_second / 1e9) \($cpu / $hz / (.bytes / 1e9))"' /run/result
  kill "${pids[@]}"
  wait "${pids[@]}" 2>/dev/null || :
}
cpu() { # clock ticks of these processes and their children
  local pid sum=0
  for pid in "$@"; do
    for p in "$pid" $(pgrep -P "$pid" || :); do
      sum=$((sum + $(awk '{print $14 + $15}' "/proc/$p/stat" 2>/dev/null || echo 0)))
    done
  done
  echo $sum
}
printf '%-6s %-14s %8s %10s\n' round program Gb/s 'CPU s/GB'
for ((round = 1; round <= rounds; round++)); do
  for program in "$bin/mesh-wg" wireguard-go; do
    read -r rate load < <(measure "$program")
    printf '%-6s %-14s %8.2f %10.2f\n' $round "$(basename "$program")" "$rate" "$load" | tee -a /run/table
  done
done
median() { # program column
  awk -v p="$1" -v c="$2" '$2 == p {print $c}' /run/table | sort -n | awk '{v[NR] = $1} END {print v[int((NR + 1) / 2)]}'
}
for program in mesh-wg wireguard-go; do
  printf 'median %-14s %8.2f %10.2f\n' $program "$(median $program 3)" "$(median $program 4)"
done
awk -v a="$(median mesh-wg 3)" -v b="$(median wireguard-go 3)" -v c="$(median mesh-wg 4)" -v d="$(median wireguard-go 4)" \
  'BEGIN {printf "ratio mesh-wg : wireguard-go  %.2f in Gb/s, %.2f in CPU s/GB\n", a / b, c / d}'
