#!/usr/bin/env bash
# Installs the programs that the labs and tests use, from Debian/Ubuntu packages. Says what it does.
set -euo pipefail

# program or file -> package
declare -A need=(
  [cc]=build-essential [ip]=iproute2 [tc]=iproute2 [nft]=nftables [wg]=wireguard-tools
  [wg-quick]=wireguard-tools [wireguard-go]=wireguard-go [iperf3]=iperf3 [ping]=iputils-ping
  [ethtool]=ethtool [unshare]=util-linux [setpriv]=util-linux [ps]=procps [conntrack]=conntrack [jq]=jq [python3]=python3
  [dnsmasq]=dnsmasq-base [dhcpcd]=dhcpcd-base
)
missing=()
for program in "${!need[@]}"; do
  PATH="$PATH:/usr/sbin:/sbin" command -v "$program" >/dev/null || missing+=("${need[$program]}")
done
if ((${#missing[@]} > 0)); then
  mapfile -t missing < <(printf '%s\n' "${missing[@]}" | sort -u)
  if [[ $(id -u) != 0 ]]; then
    echo "missing packages: ${missing[*]}; install them as root: apt-get install ${missing[*]}" >&2
  elif ! command -v apt-get >/dev/null; then
    echo "missing programs of the Debian packages ${missing[*]}; install them by your distribution's means" >&2
    exit 1
  else
    echo "installing Debian packages: ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
  fi
fi
if ! command -v cargo >/dev/null; then
  echo "no Rust toolchain: install rustup (https://rustup.rs) with Rust 1.95 or later, then run this again" >&2
  exit 1
fi
