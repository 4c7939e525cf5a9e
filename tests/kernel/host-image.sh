#!/usr/bin/env bash
# Makes what the guest with systemd boots from: a small initramfs that mounts a disk, and the folder that the disk is
# filled with, both in the cache beside the kernel. Prints their two paths on standard output, progress on standard
# error. Debian's systemd is unpacked, never installed.
#
# Ends with 3 where this machine cannot have it, and says what is missing.
set -euo pipefail
cd "$(dirname "$0")"

. ./pieces.sh

# There is no udev: what has a device is loaded before systemd starts, and all else when the kernel asks for it.
early=(virtio_pci virtio_blk ext4 crc32c_generic virtio_net virtio_console virtio_rng)
modules=(af_packet unix ipv6 dummy veth bridge wireguard vxlan nf_tables nft_objref nf_conntrack nft_ct nft_fib
  nft_fib_ipv4 nft_fib_ipv6 nft_fib_inet nft_limit nft_reject nft_reject_inet nf_conntrack_netlink)
programs=(ip nft wg bash ping kmod)
mapfile -t found < <(for program in "${programs[@]}"; do command -v "$program"; done)
((${#found[@]} == ${#programs[@]})) || lacks "one of the programs ${programs[*]}"

# What a machine that has systemd lacks of it is nothing but its newest version.
systemd=$dir/systemd
if [[ ! -d $systemd ]]; then
  needs() { apt-get install -s --no-install-recommends systemd 2>/dev/null | awk '/^Inst/ && $2 !~ /^(libpam|libnss)-/ {print $2}' || true; }
  mapfile -t packages < <({ printf '%s\n' systemd libsystemd-shared; needs; } | sort -u)
  unpack "$systemd" "${packages[@]}"
fi
of_systemd=(usr/lib/systemd/systemd usr/lib/systemd/systemd-shutdown usr/bin/systemctl
  usr/lib/systemd/system-generators/systemd-debug-generator)
# From 255 on.
[[ ! -e $systemd/usr/lib/systemd/systemd-executor ]] || of_systemd+=(usr/lib/systemd/systemd-executor)
# Debian 12 and older have these below /lib and /bin.
file() { [[ -e $systemd/$1 ]] && echo "$systemd/$1" || echo "$systemd/${1#usr/}"; }
systemd_libraries() {
  local lib=$systemd/usr/lib/x86_64-linux-gnu file
  for file in "${of_systemd[@]}"; do
    LD_LIBRARY_PATH=$lib:$systemd/lib/x86_64-linux-gnu:$lib/systemd ldd "$(file "$file")"
  done | grep -oE '/[^ )]+|.* not found' | grep -v ':$' | sort -u
}
mapfile -t linked < <(systemd_libraries)
! grep 'not found' < <(printf '%s\n' "${linked[@]}") >&2 || lacks "libraries of systemd, named above"

mapfile -t others < <(libraries "${found[@]}")
key=$(cat host-image.sh pieces.sh host/init "${found[@]}" "${others[@]}" "${linked[@]}" "$(file "${of_systemd[0]}")" |
  sha256sum | cut -c 1-16)
host=$dir/host-$key
if [[ ! -d $host ]]; then
  say "building the initramfs and the disk's folder for $(basename "$(printf '%s\n' "${linked[@]}" | grep -m 1 libsystemd-shared)")"
  new=$(mktemp -d "$dir/new.XXXXXX")
  trap 'rm -rf "$new"' EXIT
  early_root=$new/early
  mkdir -p "$early_root"/{bin,proc,sys,dev,root,modules}
  cp "$dir/busybox/bin/busybox" "$early_root/bin/"
  ln -s busybox "$early_root/bin/sh"
  put_in_order "$early_root/modules" "${early[@]}"
  install -m 755 host/init "$early_root/init"
  archive "$early_root" >"$new/early.cpio"
  rm -r "$early_root"

  root=$new/root
  mkdir -p "$root"/{usr/bin,usr/lib/systemd/system,usr/lib64,etc/systemd/system,proc,sys,dev,run,root} "$root"/{tmp,var/tmp,var/lib}
  chmod 1777 "$root/tmp" "$root/var/tmp"
  for folder in bin lib lib64; do ln -s "usr/$folder" "$root/$folder"; done
  ln -s usr/bin "$root/sbin"
  ln -s bin "$root/usr/sbin"
  ln -s ../run "$root/var/run"
  put "$root" "${found[@]}"
  for link in modprobe insmod lsmod rmmod depmod; do ln -sf kmod "$root/bin/$link"; done
  # Its targets are Debian's; of its services it gets none.
  cp -a "$(file usr/lib/systemd/system)"/*.{target,slice} "$root/usr/lib/systemd/system/"
  for file in "${of_systemd[@]}"; do
    rm -f "$root/$file"
    install -D -m 755 "$(file "$file")" "$root/$file"
  done
  for library in "${linked[@]}"; do
    [[ -f $library ]] || continue
    mkdir -p "$root$(dirname "${library#"$systemd"}")"
    cp -L "$library" "$root${library#"$systemd"}"
  done
  ln -sf multi-user.target "$root/usr/lib/systemd/system/default.target"
  # With an identity it is no first boot, which would enable units by presets.
  echo 5e001700000000000000000000000017 >"$root/etc/machine-id"
  echo 'root:x:0:0:root:/root:/bin/sh' >"$root/etc/passwd"
  echo 'root:x:0:' >"$root/etc/group"
  files_of "${modules[@]}" | while read -r file; do
    install -D -m 644 "$file" "$root/usr/lib/modules/$version/${file#*"/modules/$version/"}"
  done
  cp "$tree/lib/modules/$version"/modules.{builtin,builtin.modinfo,order} "$root/usr/lib/modules/$version/"
  depmod -b "$root" "$version"
  find "$dir" -maxdepth 1 -name 'host-*' -mtime +30 -exec rm -r {} +
  chmod 755 "$new"
  mv "$new" "$host"
  trap - EXIT
  say "$(du -sh "$host/root" | cut -f 1) of disk, $(du -h "$host/early.cpio" | cut -f 1) of initramfs"
fi
touch "$host"
printf '%s\n' "$host/early.cpio" "$host/root"
