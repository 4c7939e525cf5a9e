#!/usr/bin/env bash
# Builds the container image of mesh-agent and mesh-wg: the two programs, nft, the libraries that they are linked with, and
# nothing else: no shell, no package manager. Run by `make image`.
#
# usage: build.sh [OUT.tar]        SENNIT_BIN_DIR: where the programs are; SENNIT_IMAGE: its name, default sennit.dev/sennit:VERSION
set -euo pipefail
umask 022
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
programs=${SENNIT_BIN_DIR:-$root/target/release}
version=$(sed -n '/^\[workspace.package\]/,/^\[/s/^version = "\(.*\)"/\1/p' "$root/Cargo.toml")
name=${SENNIT_IMAGE:-sennit.dev/sennit:$version}
out=${1:-$root/target/sennit-image.tar}
nft=$(PATH=$PATH:/usr/sbin:/sbin command -v nft) || { echo "build.sh: there is no nft: install the package nftables" >&2; exit 1; }

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
chmod 755 "$folder"
install -D --strip --target-directory="$folder/usr/bin" "$programs/mesh-agent" "$programs/mesh-wg"
install -D --target-directory="$folder/usr/sbin" "$nft"
# What the loader needs, where it looks for it.
for program in "$programs/mesh-agent" "$programs/mesh-wg" "$nft"; do
  ldd "$program" | grep --only-matching --extended-regexp '/[^ )]+'
done | sort --unique | while read -r library; do
  install -D --mode=755 "$library" "$folder$library"
done
# Mount points, because the root is read-only; and where names are looked up.
mkdir -p "$folder"/{etc/sennit,run/sennit,run/wireguard,var/lib/sennit,tmp,proc,sys,dev}
ln -s /run "$folder/var/run"
echo 'hosts: files dns' >"$folder/etc/nsswitch.conf"
# For API servers whose kubeconfig names no authority of its own.
authorities=/etc/ssl/certs/ca-certificates.crt
if [[ -f $authorities ]]; then
  install -D --mode=644 "$authorities" "$folder$authorities"
else
  echo "build.sh: no $authorities here, so none in the image: kubeconfigs need certificate-authority-data" >&2
fi
"$here/pack.sh" "$folder" "$name" '["/usr/bin/mesh-agent"]' "$out"
