#!/usr/bin/env bash
# Makes what the guest boots from: a kernel with WireGuard and a small initramfs, both in a cache outside of the tree.
# Prints their two paths on standard output, progress on standard error. Installs nothing but programs that run here;
# the kernel's package is unpacked, never installed.
#
# Ends with 3 where this machine cannot have it, and says what is missing.
set -euo pipefail
cd "$(dirname "$0")"

. ./pieces.sh

# In the order of use. What the kernel has built in needs no module.
modules=(virtio_pci virtio_net virtio_console virtio_rng af_packet unix ipv6 tun veth bridge dummy wireguard vxlan
  nf_tables nft_objref nf_conntrack nft_ct nft_fib nft_fib_ipv4 nft_fib_ipv6 nft_fib_inet nft_limit
  nf_flow_table nf_flow_table_inet nft_flow_offload vrf)
programs=(ip nft wg unshare bash ping)
mapfile -t found < <(for program in "${programs[@]}"; do command -v "$program"; done)
((${#found[@]} == ${#programs[@]})) || lacks "one of the programs ${programs[*]}"
mapfile -t linked < <(libraries "${found[@]}")
key=$(cat image.sh pieces.sh init "${found[@]}" "${linked[@]}" "$dir/busybox/bin/busybox" | sha256sum | cut -c 1-16)
image=$dir/base-$key.cpio
if [[ ! -f $image ]]; then
  say "building the initramfs for Linux $version"
  root=$(mktemp -d "$dir/new.XXXXXX")
  trap 'rm -rf "$root"' EXIT
  mkdir -p "$root"/{bin,usr/bin,etc,proc,sys,dev,run,tmp,var,root,modules}
  ln -s bin "$root/sbin"
  ln -s bin "$root/usr/sbin"
  ln -s ../run "$root/var/run"
  put "$root" "${found[@]}"
  put_in_order "$root/modules" "${modules[@]}"
  cp init "$root/init"
  chmod 755 "$root/init"
  archive "$root" >"$image.new"
  find "$dir" -maxdepth 1 -name 'base-*.cpio' -mtime +30 -delete
  mv "$image.new" "$image"
  say "$(du -h "$image" | cut -f 1) of initramfs, $(find "$root/modules" -type f | wc -l) modules"
fi
touch "$image"
say "guest: Linux $version, $(qemu-system-x86_64 --version | head -n 1)"
printf '%s\n' "$tree/boot/vmlinuz-$version" "$image"
