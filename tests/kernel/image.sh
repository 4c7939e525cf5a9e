#!/usr/bin/env bash
# Makes what the guest boots from: a kernel with WireGuard and a small initramfs, both in a cache outside of the tree.
# Prints their two paths on standard output, progress on standard error. Installs nothing but programs that run here;
# the kernel's package is unpacked, never installed.
#
# Ends with 3 where this machine cannot have it, and says what is missing.
set -euo pipefail
cd "$(dirname "$0")"

say() { echo "kernel-test: $*" >&2; }
lacks() { say "missing: $*"; exit 3; }
export PATH="$PATH:/usr/sbin:/sbin"

[[ $(uname -m) == x86_64 ]] || lacks "an x86_64 machine (this one is $(uname -m))"
[[ $(id -u) == 0 ]] || lacks root
command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || lacks "apt-get and dpkg-deb, for the kernel's package"

declare -A need=([qemu-system-x86_64]=qemu-system-x86 [cpio]=cpio [depmod]=kmod [modprobe]=kmod [xz]=xz-utils
  [unshare]=util-linux [ip]=iproute2 [nft]=nftables [wg]=wireguard-tools)
updated=
update() {
  [[ -n $updated ]] || { say "reading the package lists"; apt-get update -qq >&2 || lacks "apt's package lists"; }
  updated=yes
}
absent=()
for program in "${!need[@]}"; do
  command -v "$program" >/dev/null || absent+=("${need[$program]}")
done
if ((${#absent[@]} > 0)); then
  update
  say "installing the Debian packages ${absent[*]}"
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${absent[@]}" >/dev/null ||
    lacks "the Debian packages ${absent[*]}"
fi

cache=${SENNIT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/sennit}
mkdir -p "$cache"
exec 9>"$cache/kernel.lock"
flock 9

# The meta package names the current kernel of this distribution. Without apt's lists one that is unpacked will do.
kernel_package() {
  { apt-cache depends linux-image-cloud-amd64 2>/dev/null || true; } | awk '$1 == "Depends:" {print $2; exit}'
}
unpacked_package() {
  find "$cache" -maxdepth 2 -path '*/kernel-*/root' -printf '%P\n' | sort -V |
    sed -n '$s|^kernel-\(.*\)/root$|linux-image-\1|p'
}
package=$(kernel_package)
[[ -n $package ]] || package=$(unpacked_package)
if [[ -z $package ]]; then
  update
  package=$(kernel_package)
fi
[[ -n $package ]] || lacks "the package linux-image-cloud-amd64 in apt's lists"
version=${package#linux-image-}
dir=$cache/kernel-$version

# unpack PACKAGE DIR: downloads a package and unpacks it, whole or not at all.
unpack() {
  [[ -d $2 ]] && return
  local new=$2.new
  rm -rf "$new" && mkdir -p "$new/deb"
  say "downloading $1"
  if ! (cd "$new/deb" && apt-get download -qq -o APT::Sandbox::User=root "$1" >&2); then
    update
    (cd "$new/deb" && apt-get download -qq -o APT::Sandbox::User=root "$1" >&2) || lacks "the package $1"
  fi
  say "unpacking $1"
  dpkg-deb -x "$new"/deb/*.deb "$new"
  rm -rf "$new/deb"
  mv "$new" "$2"
}
mkdir -p "$dir"
unpack "$package" "$dir/root"
unpack busybox-static "$dir/busybox"
tree=$dir/root
[[ -f $tree/lib/modules/$version/modules.dep.bin ]] || depmod -b "$tree" "$version"

# In the order of use. What the kernel has built in needs no module.
modules=(virtio_pci virtio_net virtio_console virtio_rng af_packet unix ipv6 tun veth bridge dummy wireguard vxlan
  nf_tables nft_objref nf_conntrack nft_ct nft_fib nft_fib_ipv4 nft_fib_ipv6 nft_fib_inet nft_limit
  nf_flow_table nf_flow_table_inet nft_flow_offload vrf)
programs=(ip nft wg unshare bash ping)
mapfile -t found < <(for program in "${programs[@]}"; do command -v "$program"; done)
((${#found[@]} == ${#programs[@]})) || lacks "one of the programs ${programs[*]}"
mapfile -t libraries < <(ldd "${found[@]}" | grep -oE '/[^ )]+' | grep -v ':$' | sort -u)

key=$(cat image.sh init "${found[@]}" "${libraries[@]}" "$dir/busybox/bin/busybox" | sha256sum | cut -c 1-16)
image=$dir/base-$key.cpio
if [[ ! -f $image ]]; then
  say "building the initramfs for Linux $version"
  root=$(mktemp -d "$dir/new.XXXXXX")
  trap 'rm -rf "$root"' EXIT
  mkdir -p "$root"/{bin,usr/bin,etc,proc,sys,dev,run,tmp,var,root,modules}
  ln -s bin "$root/sbin"
  ln -s bin "$root/usr/sbin"
  ln -s ../run "$root/var/run"
  cp "$dir/busybox/bin/busybox" "$root/bin/"
  for applet in $("$dir/busybox/bin/busybox" --list); do
    [[ -e $root/bin/$applet ]] || ln -s busybox "$root/bin/$applet"
  done
  for program in "${found[@]}"; do
    rm -f "$root/bin/${program##*/}"
    cp -L "$program" "$root/bin/"
  done
  # Busybox as a shell would take its own applets before the programs of the same name.
  ln -sf bash "$root/bin/sh"
  for library in "${libraries[@]}"; do
    [[ $library == /* && -f $library && ! " ${found[*]} " == *" $library "* ]] || continue
    mkdir -p "$root${library%/*}"
    cp -L "$library" "$root$library"
  done
  files=()
  for module in "${modules[@]}"; do
    needs=$(modprobe -d "$tree" -S "$version" --show-depends "$module") || lacks "the module $module in $package"
    mapfile -t -O "${#files[@]}" files < <(awk '/^insmod/ {print $2}' <<<"$needs")
  done
  number=100
  printf '%s\n' "${files[@]}" | awk '!seen[$0]++' | while read -r file; do
    number=$((number + 1))
    name=${file##*/}
    case $file in
      *.xz) xz -dc "$file" >"$root/modules/$number-${name%.xz}" ;;
      *) cp "$file" "$root/modules/$number-$name" ;;
    esac
  done
  cp init "$root/init"
  chmod 755 "$root/init"
  (cd "$root" && find . -print0 | cpio -o -0 -H newc -R 0:0 --quiet) >"$image.new"
  find "$dir" -maxdepth 1 -name 'base-*.cpio' -mtime +30 -delete
  mv "$image.new" "$image"
  say "$(du -h "$image" | cut -f 1) of initramfs, $(find "$root/modules" -type f | wc -l) modules"
fi
touch "$image"
say "guest: Linux $version, $(qemu-system-x86_64 --version | head -n 1)"
printf '%s\n' "$tree/boot/vmlinuz-$version" "$image"
